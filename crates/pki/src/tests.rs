use std::time::{Duration, SystemTime};

use tokio::net::TcpListener;
use tokio_stream::StreamExt as _;

use super::{
    incoming::{OF_ONE_MEMBER, VISIT, VISITORS_OF_ONE},
    *,
};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn authority(cluster: &str) -> Authority {
    Authority::generate(cluster, SystemTime::now()).expect("an authority")
}

fn identity(role: Role, id: &str) -> Identity {
    Identity { cluster: "c".to_owned(), role, id: id.to_owned() }
}

fn credentials(authority: &Authority, identity: &Identity, at: SystemTime) -> Credentials {
    let request = Request::new().expect("a request");
    let certificate = authority.sign(request.pem(), identity, at, DAY).expect("a certificate");
    Credentials::new(&request.key_pem(), &certificate, authority.certificate_pem()).expect("credentials")
}

#[test]
fn tokens_survive_being_written_down_and_nothing_else_is_one() {
    let authority = authority("c");
    let secret = Secret::random().expect("random");
    let token = Token::new(authority.certificate_pem(), secret.clone()).expect("a token");
    let text = token.to_string();
    assert!(text.starts_with("WRN-1-"), "{text}");
    assert_eq!(text.parse::<Token>().expect("a token"), token);
    assert_eq!(Token::read_secret(&token.secret()).expect("a secret").hash(), secret.hash());
    assert_ne!(Secret::random().expect("random").hash(), secret.hash());
    for wrong in ["", "WRN-2-a-b", "WRN-1-", "WRN-1-a-b", &text[..text.len() - 1], &text.replace("WRN-1-", "WRN-1-a")] {
        assert!(wrong.parse::<Token>().is_err(), "{wrong}");
    }
    assert!(!format!("{token:?}{secret:?}").contains(&token.secret()));
}

#[test]
fn credentials_are_kept_whole_and_are_whose_the_authority_says() {
    let directory = tempfile::tempdir().expect("a directory");
    assert!(Credentials::load(directory.path()).expect("readable").is_none());
    let authority = authority("c");
    let worker = identity(Role::Worker, "w");
    let request = Request::new().expect("a request");
    let certificate = authority.sign(request.pem(), &worker, SystemTime::now(), DAY).expect("a certificate");
    let key = request.key_pem();
    let made = Credentials::create(directory.path(), &key, &certificate, authority.certificate_pem()).expect("kept");
    let loaded = Credentials::load(directory.path()).expect("readable").expect("there");
    for credentials in [&made, &loaded] {
        assert_eq!(credentials.identity(), worker);
        assert_eq!(credentials.authorities().trim(), authority.certificate_pem().trim());
        let (from, to) = credentials.validity();
        assert!(from < SystemTime::now() && to > SystemTime::now() && to < SystemTime::now() + 2 * DAY);
    }
    assert!(!format!("{made:?}").contains("PRIVATE"));
    // Another's key is not the certificate's.
    let other = Request::new().expect("a request").key_pem();
    assert!(Credentials::new(&other, &certificate, authority.certificate_pem()).is_err());
    assert!(Credentials::new(&key, &certificate, "").is_err());
    // What asks for a signature decides nothing but its key.
    let mut greedy = rcgen::CertificateParams::new(vec!["warren-manager".to_owned()]).expect("names");
    greedy.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    greedy.distinguished_name.push(rcgen::DnType::OrganizationalUnitName, "manager");
    let key = rcgen::KeyPair::generate().expect("a key");
    let asked = greedy.serialize_request(&key).and_then(|request| request.pem()).expect("a request");
    let certificate = authority.sign(&asked, &worker, SystemTime::now(), DAY).expect("a certificate");
    let got = Credentials::new(&key.serialize_pem(), &certificate, authority.certificate_pem()).expect("credentials");
    assert_eq!(got.identity(), worker);
    assert!(Authority::from_pem(&certificate, &key.serialize_pem()).is_err(), "it is no authority");
    let another = self::authority("c");
    assert!(Authority::from_pem(authority.certificate_pem(), &another.key_pem()).is_err(), "of another key");
    assert!(Authority::from_pem(authority.certificate_pem(), &authority.key_pem()).is_ok());
    assert!(authority.sign("nonsense", &worker, SystemTime::now(), DAY).is_err());
}

#[tokio::test]
async fn a_certificate_is_renewed_before_it_ends() {
    let directory = tempfile::tempdir().expect("a directory");
    let authority = authority("c");
    let worker = identity(Role::Worker, "w");
    let request = Request::new().expect("a request");
    // Of a life that began an hour ago, when clocks may differ, more than half is over.
    let short = Duration::from_secs(60);
    let certificate = authority.sign(request.pem(), &worker, SystemTime::now(), short).expect("a certificate");
    let own = authority.certificate_pem().to_owned();
    let made = Credentials::create(directory.path(), &request.key_pem(), &certificate, &own).expect("kept");
    let end = made.validity().1;
    let asked = std::sync::atomic::AtomicU32::new(0);
    let ask = |request: String| -> Asked {
        let signed = if asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0 {
            Err("not now".to_owned())
        } else {
            let signed = authority.sign(&request, &worker, SystemTime::now(), DAY).expect("a certificate");
            Ok((signed, own.clone()))
        };
        Box::pin(async { signed })
    };
    let (_wanted, never) = tokio::sync::watch::channel(None);
    let keep = keep_valid(made.clone(), directory.path(), never, ask);
    assert!(tokio::time::timeout(Duration::from_secs(10), keep).await.is_err(), "it never ends");
    assert!(made.validity().1 > end, "it was renewed");
    let kept = Credentials::load(directory.path()).expect("readable").expect("there");
    assert_eq!((kept.validity(), kept.identity()), (made.validity(), worker.clone()));
    assert_eq!(asked.into_inner(), 2, "refused once, and asked once more");
}

/// What a manager learns of a caller; `None` when it is not let in.
async fn seen(manager: &Credentials, dial: impl FnOnce(&str) -> Dialer) -> Option<Peer> {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let mut incoming = incoming(listener, manager.clone());
    let dialer = dial(&address);
    let call = tokio::spawn(async move { dialer.connect().await.map(drop) });
    let seen = tokio::time::timeout(Duration::from_millis(500), incoming.next()).await.ok().flatten();
    call.abort();
    seen.map(|incoming| tonic::transport::server::Connected::connect_info(&incoming.expect("a connection")))
}

/// Whether this connection was ended from here.
async fn has_ended(connection: &mut Incoming) -> bool {
    let mut byte = [0; 1024];
    let end = async { while tokio::io::AsyncReadExt::read(connection, &mut byte).await.is_ok_and(|read| read > 0) {} };
    tokio::time::timeout(Duration::from_millis(300), end).await.is_ok()
}

/// Strangers may be there in number, and for long: nobody is kept out by them, not even from their own address.
#[tokio::test]
async fn who_has_no_certificate_keeps_nobody_out() {
    let ours = authority("c");
    let manager = credentials(&ours, &identity(Role::Manager, "1"), SystemTime::now());
    let worker = credentials(&ours, &identity(Role::Worker, "w"), SystemTime::now());
    let token = Token::new(ours.certificate_pem(), Secret::random().expect("random")).expect("a token");
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let mut incoming = incoming(listener, manager.clone());
    // They say nothing at all.
    let mut silent = Vec::new();
    for _ in 0..600 {
        silent.push(tokio::net::TcpStream::connect(&address).await.expect("connected"));
    }
    let mut calls = Vec::new();
    let mut enter = async |dialer: Dialer| {
        calls.push(tokio::spawn(async move { dialer.connect().await }));
        let next = tokio::time::timeout(Duration::from_secs(2), incoming.next()).await.expect("let in");
        next.expect("more").expect("a connection")
    };
    let newcomer = || Dialer::newcomer(&address, &token).expect("an address");
    let mut there = Vec::new();
    for _ in 0..VISITORS_OF_ONE {
        there.push(enter(newcomer()).await);
    }
    assert!(!has_ended(&mut there[0]).await, "there is room for so many");
    let mut next = enter(newcomer()).await;
    assert!(has_ended(&mut there[0]).await, "the oldest makes room");
    assert!(!has_ended(&mut there[1]).await, "the others stay");
    let mut member = enter(Dialer::new(&address, &worker).expect("an address")).await;
    assert!(member.peer().identity.is_some());
    there.push(enter(newcomer()).await);
    assert!(!has_ended(&mut member).await, "members do not count among them");
    // And whoever stays for long is shown out.
    tokio::time::pause();
    tokio::time::advance(VISIT + Duration::from_secs(1)).await;
    let mut byte = [0];
    let end = tokio::io::AsyncReadExt::read_exact(&mut next, &mut byte).await.expect_err("it is over");
    assert_eq!(end.kind(), std::io::ErrorKind::ConnectionAborted);
    let end = tokio::io::AsyncWriteExt::write_all(&mut next, &byte).await.expect_err("nor to be written to");
    assert_eq!(end.kind(), std::io::ErrorKind::ConnectionAborted);
    calls.iter().for_each(tokio::task::JoinHandle::abort);
}

/// A stolen certificate closes no connections but those that use it.
#[tokio::test]
async fn a_member_has_so_many_connections() {
    let ours = authority("c");
    let manager = credentials(&ours, &identity(Role::Manager, "1"), SystemTime::now());
    let [thief, other] =
        ["thief", "other"].map(|id| credentials(&ours, &identity(Role::Worker, id), SystemTime::now()));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let mut incoming = incoming(listener, manager.clone());
    let mut calls = Vec::new();
    let mut enter = async |credentials: &Credentials| {
        let dialer = Dialer::new(&address, credentials).expect("an address");
        calls.push(tokio::spawn(async move { dialer.connect().await }));
        let next = tokio::time::timeout(Duration::from_secs(2), incoming.next()).await.expect("let in");
        next.expect("more").expect("a connection")
    };
    let mut honest = enter(&other).await;
    let mut stolen = Vec::new();
    for _ in 0..=OF_ONE_MEMBER {
        stolen.push(enter(&thief).await);
    }
    assert!(has_ended(&mut stolen[0]).await && !has_ended(&mut stolen[1]).await);
    assert!(!has_ended(&mut honest).await);
    calls.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn only_the_clusters_own_are_let_in_and_only_its_managers_are_called() {
    let (ours, theirs) = (authority("c"), authority("c"));
    let now = SystemTime::now();
    let manager = credentials(&ours, &identity(Role::Manager, "1"), now);
    let worker = credentials(&ours, &identity(Role::Worker, "w"), now);
    let stranger = credentials(&theirs, &identity(Role::Worker, "w"), now);
    let late = credentials(&ours, &identity(Role::Worker, "w"), now - 2 * DAY);
    let dial = |credentials: &Credentials| {
        let credentials = credentials.clone();
        move |address: &str| Dialer::new(address, &credentials).expect("an address")
    };
    let known = seen(&manager, dial(&worker)).await.expect("let in");
    assert_eq!(known.identity, Some(identity(Role::Worker, "w")));
    assert!(seen(&manager, dial(&stranger)).await.is_none(), "of another authority");
    assert!(seen(&manager, dial(&late)).await.is_none(), "run out");

    let invite = |authority: &Authority| {
        let token = Token::new(authority.certificate_pem(), Secret::random().expect("random")).expect("a token");
        move |address: &str| Dialer::newcomer(address, &token).expect("an address")
    };
    let nobody = seen(&manager, invite(&ours)).await.expect("let in");
    assert_eq!(nobody.identity, None);
    assert!(seen(&manager, invite(&theirs)).await.is_none(), "the token is another cluster's");
    // Somebody who shows the right authority without being signed by it.
    let impostor = {
        let request = Request::new().expect("a request");
        let certificate = theirs.sign(request.pem(), &identity(Role::Manager, "1"), now, DAY).expect("a certificate");
        let both = [theirs.certificate_pem(), ours.certificate_pem()].concat();
        Credentials::new(&request.key_pem(), &certificate, &both).expect("credentials")
    };
    assert!(seen(&impostor, invite(&ours)).await.is_none(), "an impostor");
    assert!(seen(&impostor, dial(&worker)).await.is_none(), "an impostor");
    // Replaced while in use.
    let directory = tempfile::tempdir().expect("a directory");
    let request = Request::new().expect("a request");
    let next = ours.sign(request.pem(), &identity(Role::Worker, "v"), now, DAY).expect("a certificate");
    let clone = worker.clone();
    worker.replace(directory.path(), &request.key_pem(), &next, ours.certificate_pem()).expect("kept");
    let known = seen(&manager, dial(&clone)).await.expect("let in");
    assert_eq!(known.identity, Some(identity(Role::Worker, "v")));
}

/// A connection is as good as the certificate that it began with.
#[tokio::test]
async fn a_connection_ends_with_its_certificate_and_with_who_signed_it() {
    let (old, new) = (authority("c"), authority("c"));
    let now = SystemTime::now();
    let manager = credentials(&old, &identity(Role::Manager, "1"), now);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let mut incoming = incoming(listener, manager.clone());
    let mut calls = Vec::new();
    let mut connect = async |worker: &Credentials| {
        let dialer = Dialer::new(&address, worker).expect("an address");
        calls.push(tokio::spawn(async move { dialer.connect().await }));
        let next = tokio::time::timeout(Duration::from_secs(2), incoming.next()).await.expect("let in");
        next.expect("more").expect("a connection")
    };
    let lasts = async |connection: &mut Incoming| {
        let mut bytes = [0; 1024];
        let all =
            async { while tokio::io::AsyncReadExt::read(connection, &mut bytes).await.is_ok_and(|some| some > 0) {} };
        tokio::time::timeout(Duration::from_secs(3), all).await.is_err()
    };
    // One second is left of its life, which began two hours ago at most.
    let request = Request::new().expect("a request");
    let who = identity(Role::Worker, "w");
    let brief = old.sign(request.pem(), &who, now, Duration::from_secs(2)).expect("a certificate");
    let brief = Credentials::new(&request.key_pem(), &brief, old.certificate_pem()).expect("credentials");
    assert!(!lasts(&mut connect(&brief).await).await, "it has run out");
    let mut known = connect(&credentials(&old, &who, now)).await;
    let directory = tempfile::tempdir().expect("a directory");
    let replace = |signer: &Authority, authorities: &[&Authority]| {
        let request = Request::new().expect("a request");
        let own = signer.sign(request.pem(), &identity(Role::Manager, "1"), now, DAY).expect("a certificate");
        let authorities: String = authorities.iter().map(|authority| authority.certificate_pem()).collect();
        manager.replace(directory.path(), &request.key_pem(), &own, &authorities).expect("kept");
    };
    replace(&new, &[&old, &new]);
    assert!(lasts(&mut known).await, "both are believed");
    replace(&new, &[&new]);
    assert!(!lasts(&mut known).await, "the old one is not believed any more");
    calls.iter().for_each(tokio::task::JoinHandle::abort);
}

#[test]
fn whatever_comes_is_read_or_refused() {
    use rustls::pki_types::{CertificateDer, pem::PemObject as _};

    let ours = authority("c");
    let token = Token::new(ours.certificate_pem(), Secret::random().expect("random")).expect("a token").to_string();
    let certificate = CertificateDer::from_pem_slice(ours.certificate_pem().as_bytes()).expect("a certificate");
    let request = Request::new().expect("a request");
    let good = [token.as_bytes(), &certificate, request.pem().as_bytes(), ours.certificate_pem().as_bytes()];
    warren_fuzz::fuzz(&good, |bytes| {
        let _ = crate::tls::read(bytes);
        if let Ok(text) = std::str::from_utf8(bytes) {
            let _ = text.parse::<Token>();
            let _ = ours.sign(text, &identity(Role::Worker, "w"), SystemTime::now(), DAY);
        }
    });
}
