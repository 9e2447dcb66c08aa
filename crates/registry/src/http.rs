//! Asking a registry: the distribution API's reading half over HTTP. A registry may be anybody's: every answer is bounded before it
//! is read, and it leads nobody who asks to where that one would not go: not to this machine, not to its neighbours' metadata, and not from
//! HTTPS to HTTP.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures::{StreamExt as _, stream::BoxStream};
use http_auth::ParamValue;
use reqwest::{
    Certificate, Response, StatusCode, Url,
    dns::{Addrs, Name, Resolve, Resolving},
    header::{self, HeaderValue},
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256, Sha512};

use crate::Credentials;

/// How long a registry may take to accept a connection, and then to say anything: one that is a cache says nothing of a blob before
/// it has all of it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const READ_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a server of tokens may take.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(30);
/// A token that does not say how long it is valid, is for so long.
const TOKEN_LIFE: Duration = Duration::from_secs(60);
/// One that ends within this time is asked for again.
const TOKEN_REST: Duration = Duration::from_secs(10);
/// No manifest is larger; the distribution specification asks registries for 4 MiB at least.
pub(crate) const MAX_MANIFEST: usize = 4 << 20;
const MAX_TOKEN: usize = 1 << 20;
const MAX_ERROR: usize = 64 << 10;
/// Registries send those who want a blob to where it is kept.
const MAX_REDIRECTS: usize = 5;
/// Tokens kept of one registry, each for another repository.
const MAX_TOKENS: usize = 256;

/// Why an answer is of no use.
#[derive(Debug)]
pub(crate) enum Failure {
    NotFound,
    Unauthorized,
    /// Not now.
    Unavailable(String),
    /// What it says cannot be.
    Unusable(String),
}

impl From<reqwest::Error> for Failure {
    fn from(error: reqwest::Error) -> Self {
        Self::Unavailable(crate::root_cause(&error))
    }
}

/// A blob's bytes are not those of its digest.
#[derive(Debug, thiserror::Error)]
#[error("its bytes have another digest")]
pub(crate) struct Mismatch;

/// A registry, and as whom it is asked. Keeps connections and tokens.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    /// Its host, and its port if that is said.
    host: String,
    plain: bool,
    credentials: Credentials,
    /// The headers that it wants, by repository.
    authorization: Mutex<HashMap<String, Granted>>,
}

#[derive(Clone, Debug)]
struct Granted {
    header: HeaderValue,
    until: Option<Instant>,
}

/// What is asked for.
struct Wanted<'a> {
    repository: &'a str,
    /// Below the repository.
    path: String,
    accept: Option<String>,
    from: u64,
}

impl Client {
    /// A client that trusts these authorities, as PEM, and with `plain` speaks HTTP.
    pub(crate) fn new(
        host: &str,
        plain: bool,
        credentials: Credentials,
        authorities: &[Certificate],
    ) -> Result<Self, Failure> {
        let own = hostname(host).to_owned();
        let http = reqwest::Client::builder()
            .tls_certs_only(authorities.iter().cloned())
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("warren/", env!("CARGO_PKG_VERSION")))
            .dns_resolver(Arc::new(Resolver { own }))
            .build()?;
        Ok(Self { http, host: host.to_owned(), plain, credentials, authorization: Mutex::default() })
    }

    /// A manifest's bytes, and its digest.
    pub(crate) async fn manifest(
        &self,
        repository: &str,
        reference: &str,
        accept: &[&str],
    ) -> Result<(Bytes, String), Failure> {
        let path = format!("manifests/{reference}");
        let wanted = Wanted { repository, path, accept: Some(accept.join(", ")), from: 0 };
        let response = self.get(&wanted).await?;
        let said = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        let said = said.map(str::to_owned);
        let bytes = read_at_most(response, MAX_MANIFEST, "its manifest").await?;
        let expected = if warren_spec::is_digest(reference) { Some(reference.to_owned()) } else { said };
        let own = format!("sha256:{}", hex(&Sha256::digest(&bytes)));
        match expected {
            Some(expected) if warren_spec::is_digest(&expected) => {
                let mut digest = Verifier::new(&expected);
                digest.update(&bytes);
                if !digest.matches() {
                    return Err(Failure::Unusable(format!("its manifest is not the one of {expected}")));
                }
                Ok((bytes, expected))
            }
            _ => Ok((bytes, own)),
        }
    }

    /// A blob's bytes from `from` on, or all of them; and which byte comes first.
    pub(crate) async fn blob(
        &self,
        repository: &str,
        digest: &str,
        from: u64,
    ) -> Result<(BoxStream<'static, io::Result<Bytes>>, u64), Failure> {
        let wanted = Wanted { repository, path: format!("blobs/{digest}"), accept: None, from };
        let response = self.get(&wanted).await?;
        let range = response.headers().get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok());
        let is_part = response.status() == StatusCode::PARTIAL_CONTENT
            && range.is_some_and(|range| range.starts_with(&format!("bytes {from}-")));
        let stream = response.bytes_stream().map(|chunk| chunk.map_err(io::Error::other));
        if is_part && from > 0 {
            return Ok((stream.boxed(), from));
        }
        let mut verifier = Some(Verifier::new(digest));
        let checked = stream.map(Some).chain(futures::stream::iter([None])).filter_map(move |chunk| {
            let checked = match chunk {
                Some(Ok(chunk)) => {
                    if let Some(verifier) = &mut verifier {
                        verifier.update(&chunk);
                    }
                    Some(Ok(chunk))
                }
                Some(Err(error)) => {
                    verifier = None;
                    Some(Err(error))
                }
                None => {
                    let is_another = verifier.take().is_some_and(|verifier| !verifier.matches());
                    is_another.then(|| Err(io::Error::new(io::ErrorKind::InvalidData, Mismatch)))
                }
            };
            std::future::ready(checked)
        });
        Ok((checked.boxed(), 0))
    }

    /// What a registry answers, once it knows who asks.
    async fn get(&self, wanted: &Wanted<'_>) -> Result<Response, Failure> {
        let scheme = if self.plain { "http" } else { "https" };
        let host = if self.host == "docker.io" { "registry-1.docker.io" } else { &self.host };
        let url = format!("{scheme}://{host}/v2/{}/{}", wanted.repository, wanted.path);
        let url: Url = url.parse().map_err(|error| Failure::Unusable(format!("{url} is no address: {error}")))?;
        let known = self.granted(wanted.repository);
        let response = self.follow(url.clone(), wanted, known.as_ref()).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return checked(response).await;
        }
        let challenges = response.headers().get_all(header::WWW_AUTHENTICATE).iter();
        let challenges: Vec<_> = challenges.filter_map(|value| value.to_str().ok().map(str::to_owned)).collect();
        let Some(granted) = self.authorize(&challenges, wanted.repository).await? else {
            return Err(Failure::Unauthorized);
        };
        let response = self.follow(url, wanted, Some(&granted.header)).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            self.grant(wanted.repository, granted);
        }
        checked(response).await
    }

    /// Asks, and asks where the answer says; nobody but the registry hears who asks.
    async fn follow(
        &self,
        mut url: Url,
        wanted: &Wanted<'_>,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Failure> {
        let own = (url.host_str().map(str::to_owned), url.port_or_known_default());
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.http.get(url.clone());
            if let Some(header) = authorization
                && (url.host_str().map(str::to_owned), url.port_or_known_default()) == own
            {
                request = request.header(header::AUTHORIZATION, header.clone());
            }
            if let Some(accept) = &wanted.accept {
                request = request.header(header::ACCEPT, accept);
            }
            if wanted.from > 0 {
                request = request.header(header::RANGE, format!("bytes={}-", wanted.from));
            }
            let response = request.send().await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get(header::LOCATION).and_then(|location| location.to_str().ok());
            let Some(location) = location else { return Ok(response) };
            url = url.join(location).map_err(|_| Failure::Unusable("it leads to what is no address".to_owned()))?;
            self.check(&url)?;
        }
        Err(Failure::Unusable(format!("it leads from address to address more than {MAX_REDIRECTS} times")))
    }

    /// Whether a registry may send anybody there.
    fn check(&self, url: &Url) -> Result<(), Failure> {
        let refused = |why: &str| {
            let to = url.host_str().unwrap_or("nowhere");
            Err(Failure::Unusable(format!("it sends whoever asks to {to}, which is not followed: {why}")))
        };
        match url.scheme() {
            "https" => {}
            "http" if self.plain => {}
            _ => return refused("that is not HTTPS"),
        }
        if !url.username().is_empty() || url.password().is_some() {
            return refused("it says a user");
        }
        let Some(host) = url.host_str() else { return refused("there is no host") };
        let own = hostname(&self.host);
        if host != own && !crate::is_local(own) && (host == "localhost" || literal(host).is_some_and(is_private)) {
            return refused("that is this machine, or its own link");
        }
        Ok(())
    }

    /// Finds out what a registry wants to be shown; nothing where there is nothing to show.
    async fn authorize(&self, challenges: &[String], repository: &str) -> Result<Option<Granted>, Failure> {
        let challenges = challenges.iter().flat_map(|text| http_auth::ChallengeParser::new(text).flatten());
        let challenges: Vec<_> = challenges.collect();
        let find = |scheme: &str| challenges.iter().find(|found| found.scheme.eq_ignore_ascii_case(scheme));
        if let Some(bearer) = find("bearer") {
            let parameter = |name: &str| {
                let found = bearer.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value): &(_, ParamValue<'_>)| value.to_unescaped())
            };
            let realm =
                parameter("realm").ok_or_else(|| Failure::Unusable("it names no server of tokens".to_owned()))?;
            return self.token(&realm, parameter("service"), repository).await.map(Some);
        }
        match (find("basic"), &self.credentials) {
            (Some(_), Credentials::Basic { user, password }) => {
                use base64::Engine as _;

                let pair = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
                Ok(Some(Granted { header: secret(&format!("Basic {pair}"))?, until: None }))
            }
            _ => Ok(None),
        }
    }

    /// Asks a server of tokens for one.
    async fn token(&self, realm: &str, service: Option<String>, repository: &str) -> Result<Granted, Failure> {
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
            expires_in: Option<u64>,
        }

        let no_server = |_| Failure::Unusable("the server of tokens that it names is no address".to_owned());
        let mut url: Url = realm.parse().map_err(no_server)?;
        self.check(&url)?;
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", &service);
        }
        url.query_pairs_mut().append_pair("scope", &format!("repository:{repository}:pull"));
        let mut request = self.http.get(url).timeout(TOKEN_TIMEOUT);
        if let Credentials::Basic { user, password } = &self.credentials {
            request = request.basic_auth(user, Some(password));
        }
        let response = request.send().await?;
        if response.status().is_redirection() {
            return Err(Failure::Unusable("its server of tokens sends whoever asks elsewhere".to_owned()));
        }
        let bytes = read_at_most(checked(response).await?, MAX_TOKEN, "its token").await?;
        let unusable = || Failure::Unusable("its server of tokens answers what is no token".to_owned());
        let token: Token = serde_json::from_slice(&bytes).map_err(|_| unusable())?;
        let life = token.expires_in.map_or(TOKEN_LIFE, |seconds| Duration::from_secs(seconds.min(24 * 3600)));
        let text = token.token.or(token.access_token).ok_or_else(unusable)?;
        Ok(Granted { header: secret(&format!("Bearer {text}"))?, until: Some(Instant::now() + life) })
    }

    fn granted(&self, repository: &str) -> Option<HeaderValue> {
        let known = self.authorization.lock().unwrap_or_else(PoisonError::into_inner);
        let granted = known.get(repository)?;
        let is_valid = granted.until.is_none_or(|until| Instant::now() + TOKEN_REST < until);
        is_valid.then(|| granted.header.clone())
    }

    fn grant(&self, repository: &str, granted: Granted) {
        let mut known = self.authorization.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_TOKENS {
            known.clear();
        }
        known.insert(repository.to_owned(), granted);
    }
}

/// A header that is not shown.
fn secret(text: &str) -> Result<HeaderValue, Failure> {
    let value = HeaderValue::from_str(text);
    let mut value = value.map_err(|_| Failure::Unusable("what it wants to be shown is no header".to_owned()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// A response that has what was asked for.
async fn checked(response: Response) -> Result<Response, Failure> {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<Coded>,
    }
    #[derive(Deserialize)]
    struct Coded {
        code: String,
    }

    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    match status {
        StatusCode::NOT_FOUND => return Err(Failure::NotFound),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(Failure::Unauthorized),
        StatusCode::TOO_MANY_REQUESTS => {
            let after = response.headers().get(header::RETRY_AFTER).and_then(|after| after.to_str().ok());
            let after = after.and_then(|after| after.trim().parse::<u64>().ok());
            let after = after.map(|seconds| format!(", for {seconds} s")).unwrap_or_default();
            return Err(Failure::Unavailable(format!("it is asked too often (429){after}")));
        }
        _ => {}
    }
    let body = read_at_most(response, MAX_ERROR, "its error").await.unwrap_or_default();
    let errors = serde_json::from_slice::<Errors>(&body).map(|said| said.errors).unwrap_or_default();
    let has = |codes: &[&str]| errors.iter().any(|error| codes.contains(&error.code.as_str()));
    Err(if has(&["MANIFEST_UNKNOWN", "NAME_UNKNOWN", "NOT_FOUND", "BLOB_UNKNOWN"]) {
        Failure::NotFound
    } else if has(&["UNAUTHORIZED", "DENIED"]) {
        Failure::Unauthorized
    } else {
        Failure::Unavailable(format!("it answers {}", status.as_u16()))
    })
}

/// A body, unless it is larger than it may be.
async fn read_at_most(mut response: Response, most: usize, what: &str) -> Result<Bytes, Failure> {
    let too_large = || Failure::Unusable(format!("{what} is larger than {most} bytes"));
    if response.content_length().is_some_and(|length| length > most as u64) {
        return Err(too_large());
    }
    let mut body = BytesMut::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > most {
            return Err(too_large());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

/// A digest that is being made, and the one that it should be.
struct Verifier {
    digest: Digest,
    expected: String,
}

enum Digest {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Verifier {
    fn new(expected: &str) -> Self {
        let digest = match expected.split_once(':') {
            Some(("sha512", _)) => Digest::Sha512(Sha512::new()),
            _ => Digest::Sha256(Sha256::new()),
        };
        Self { digest, expected: expected.to_owned() }
    }

    fn update(&mut self, bytes: &[u8]) {
        match &mut self.digest {
            Digest::Sha256(digest) => digest.update(bytes),
            Digest::Sha512(digest) => digest.update(bytes),
        }
    }

    fn matches(self) -> bool {
        let own = match self.digest {
            Digest::Sha256(digest) => format!("sha256:{}", hex(&digest.finalize())),
            Digest::Sha512(digest) => format!("sha512:{}", hex(&digest.finalize())),
        };
        own == self.expected
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A host without its port.
fn hostname(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

/// An address that stands for a host.
fn literal(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// Whether an address is this machine's own, or leads nowhere beyond its link.
fn is_private(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            v4.is_loopback() || v4.is_link_local() || v4.is_unspecified() || v4.is_multicast() || v4.is_broadcast()
        }
        IpAddr::V6(v6) => v6.is_loopback() || v6.is_unicast_link_local() || v6.is_unspecified() || v6.is_multicast(),
    }
}

/// Finds hosts' addresses; those of this machine itself only for the registry that was asked for.
#[derive(Debug)]
struct Resolver {
    own: String,
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let host = name.as_str().to_owned();
        let is_own =
            host == self.own || crate::is_local(&self.own) || self.own == "docker.io" && host == "registry-1.docker.io";
        Box::pin(async move {
            let found = tokio::net::lookup_host((host.as_str(), 0)).await?;
            let found: Vec<SocketAddr> = found.filter(|found| is_own || !is_private(found.ip())).collect();
            if found.is_empty() {
                return Err("a registry leads to this machine, or its own link: not followed".into());
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_comes_is_read_or_refused() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::new("registry.example", false, Credentials::Anonymous, &[]).expect("a client");
        let good: [&[u8]; 3] = [
            br#"Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a:pull""#,
            br#"Basic realm="x", Bearer realm=https://a.example, error="invalid_token""#,
            br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"x","detail":{}}]}"#,
        ];
        warren_fuzz::fuzz(&good, |bytes| {
            let Ok(text) = std::str::from_utf8(bytes) else { return };
            for challenge in http_auth::ChallengeParser::new(text).flatten() {
                for (_, value) in &challenge.params {
                    if let Ok(url) = value.to_unescaped().parse::<Url>()
                        && client.check(&url).is_ok()
                    {
                        let is_followed = url.scheme() == "https" && url.username().is_empty();
                        assert!(is_followed && url.host_str() != Some("localhost"), "{url}");
                    }
                }
            }
            let _ = text.parse::<warren_spec::ImageName>();
        });
    }

    #[test]
    fn a_registry_leads_nobody_astray() {
        let client = |host: &str, plain| Client::new(host, plain, Credentials::Anonymous, &[]).expect("a client");
        let follows = |client: &Client, url: &str| client.check(&url.parse().expect("a URL")).is_ok();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let far = client("registry.example:5000", false);
        for good in ["https://auth.example/token?a=b", "https://10.1.2.3/blob", "https://registry.example/x"] {
            assert!(follows(&far, good), "{good}");
        }
        for bad in [
            "http://registry.example:5000/x",
            "http://auth.example/token",
            "https://user:password@auth.example/",
            "https://127.0.0.1/",
            "https://127.1/",
            "https://2130706433/",
            "https://0.0.0.0/",
            "https://localhost:8443/",
            "https://169.254.169.254/latest/meta-data",
            "https://[::1]/",
            "https://[::ffff:169.254.169.254]/",
            "https://[fe80::1]/",
            "file:///etc/shadow",
            "gopher://registry.example/",
        ] {
            assert!(!follows(&far, bad), "{bad}");
        }
        let (near, plain) = (client("127.0.0.1:5000", true), client("registry.example", true));
        assert!(follows(&near, "http://127.0.0.1:5001/token"), "it is here already");
        assert!(follows(&plain, "http://registry.example:81/token") && !follows(&plain, "http://127.0.0.1/"));
    }

    #[tokio::test]
    async fn names_lead_to_this_machine_only_for_its_own_registry() {
        let resolve = |own: &str, name: &str| Resolver { own: own.to_owned() }.resolve(name.parse().expect("a name"));
        assert!(resolve("registry.example", "localhost").await.is_err());
        assert!(resolve("localhost", "localhost").await.is_ok_and(|mut found| found.next().is_some()));
    }

    #[tokio::test]
    async fn bytes_are_those_of_their_digest() {
        for (digest, good) in [
            ("sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", true),
            ("sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ae", false),
            (
                "sha512:ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
                 2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
                true,
            ),
        ] {
            let mut verifier = Verifier::new(digest);
            verifier.update(b"a");
            verifier.update(b"bc");
            assert_eq!(verifier.matches(), good, "{digest}");
        }
    }
}
