use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use serde_json::{Value, json};

const SERVICE: &str = "test-registry";
const ISSUER: &str = "test-tokens";

/// A server of tokens, as Docker's distribution specification has it: who shows a password is given a signed note of what it may
/// do, which the registry believes.
#[derive(Debug)]
pub struct TokenServer {
    signer: Arc<Signer>,
    /// Where tokens are to be had.
    pub realm: String,
    asked: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Signer {
    certificate: String,
    key: EcdsaKeyPair,
}

impl Signer {
    fn token(&self, repository: &str, actions: &[&str]) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a time").as_secs();
        let header = json!({ "typ": "JWT", "alg": "ES256", "x5c": [self.certificate] });
        let claims = json!({
            "iss": ISSUER, "sub": "somebody", "aud": SERVICE, "iat": now, "nbf": now - 10, "exp": now + 300, "jti": "1",
            "access": [{ "type": "repository", "name": repository, "actions": actions }],
        });
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&header), part(&claims));
        let signature = self.key.sign(&SystemRandom::new(), signed.as_bytes()).expect("a signature");
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

impl TokenServer {
    /// Starts one that knows one user, and writes the certificate that its tokens are signed with.
    #[must_use]
    pub fn start((user, password): (&str, &str), certificate: &Path) -> Self {
        let key = rcgen::KeyPair::generate().expect("a key");
        let made = rcgen::CertificateParams::new(Vec::new()).and_then(|parameters| parameters.self_signed(&key));
        let made = made.expect("a certificate");
        std::fs::write(certificate, made.pem()).expect("writable");
        let key =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key.serialize_der(), &SystemRandom::new());
        let signer = Arc::new(Signer { certificate: STANDARD.encode(made.der()), key: key.expect("a key") });
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let realm = format!("http://{}/token", listener.local_addr().expect("an address"));
        let asked = Arc::new(AtomicUsize::new(0));
        let expected = format!("authorization: basic {}", STANDARD.encode(format!("{user}:{password}")));
        let (own, counter) = (Arc::clone(&signer), Arc::clone(&asked));
        // Ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                counter.fetch_add(1, Ordering::SeqCst);
                // One that left is its own affair.
                let _ = answer(stream, &own, &expected);
            }
        });
        Self { signer, realm, asked }
    }

    /// The registry's configuration.
    #[must_use]
    pub(crate) fn configuration(&self, certificate: &Path) -> String {
        format!(
            "auth: {{token: {{realm: {}, service: {SERVICE}, issuer: {ISSUER}, rootcertbundle: {}}}}}\n",
            self.realm,
            certificate.display()
        )
    }

    /// What lets the test itself put something into a repository.
    pub(crate) fn may_push(&self, repository: &str) -> String {
        format!("Bearer {}", self.signer.token(repository, &["pull", "push"]))
    }

    /// How often a token was asked for.
    #[must_use]
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

fn answer(mut stream: TcpStream, signer: &Signer, expected: &str) -> std::io::Result<()> {
    let lines = BufReader::new(stream.try_clone()?).lines();
    let head: Vec<String> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
    let first = head.first().cloned().unwrap_or_default();
    let scope = first.split(['?', '&', ' ']).find_map(|part| part.strip_prefix("scope=repository"));
    let scope = scope.unwrap_or_default().replace("%3A", ":").replace("%2F", "/");
    let repository = scope.trim_start_matches(':').split(':').next().unwrap_or_default().to_owned();
    let known = head.iter().any(|line| {
        let (name, value) = line.split_once(": ").unwrap_or_default();
        let (scheme, secret) = value.split_once(' ').unwrap_or_default();
        format!("{}: {} {secret}", name.to_ascii_lowercase(), scheme.to_ascii_lowercase()) == *expected
    });
    // To strangers a token is given too: one that permits nothing.
    let token = if known { signer.token(&repository, &["pull"]) } else { signer.token(&repository, &[]) };
    let body = json!({ "token": token, "expires_in": 300 }).to_string();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}
