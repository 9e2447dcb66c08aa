//! Calling managers.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use rustix::net::sockopt::set_tcp_user_timeout;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use crate::{Credentials, Error, Token, tls};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long the other machine may take to acknowledge what is sent to it. With an agent's heartbeat every two seconds that is half of the
/// time after which a silent node is down: one whose manager's machine has gone is with another before. The kernel sees to it: to ask
/// whether the manager is there costs it more than the heartbeats, with thousands of agents.
const ACKNOWLEDGED: Duration = Duration::from_secs(3);
/// A peer that says nothing for this long is asked all the same, for it may hang; and then it is given up.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
const GIVE_UP: Duration = Duration::from_secs(5);

#[derive(Clone)]
enum As {
    Known(Credentials),
    Newcomer(Arc<ClientConfig>),
}

#[derive(Clone)]
enum To {
    Tls(String, As),
    Socket(PathBuf),
}

/// The way to one manager. Cheap to clone.
#[derive(Clone)]
pub struct Dialer {
    endpoint: Endpoint,
    to: To,
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Dialer").field(&self.to_string()).finish()
    }
}

impl fmt::Display for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.to {
            To::Tls(address, _) => f.write_str(address),
            To::Socket(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

fn endpoint(authority: &str) -> Result<Endpoint, Error> {
    // What runs below it is the connector's business.
    let endpoint =
        Endpoint::from_shared(format!("http://{authority}")).map_err(|_| Error::Address(authority.to_owned()))?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(GIVE_UP)
        .keep_alive_while_idle(true))
}

impl Dialer {
    /// To the manager at `HOST:PORT`, as whom the credentials say.
    ///
    /// # Errors
    ///
    /// When that is no address.
    pub fn new(address: &str, credentials: &Credentials) -> Result<Self, Error> {
        Ok(Self { endpoint: endpoint(address)?, to: To::Tls(address.to_owned(), As::Known(credentials.clone())) })
    }

    /// To the manager at `HOST:PORT`, if it is of the cluster that the token is for.
    ///
    /// # Errors
    ///
    /// When that is no address.
    pub fn newcomer(address: &str, token: &Token) -> Result<Self, Error> {
        let config = Arc::new(tls::newcomer(token)?);
        Ok(Self { endpoint: endpoint(address)?, to: To::Tls(address.to_owned(), As::Newcomer(config)) })
    }

    /// To the manager behind a Unix socket of this machine.
    ///
    /// # Errors
    ///
    /// Never.
    pub fn socket(path: impl Into<PathBuf>) -> Result<Self, Error> {
        Ok(Self { endpoint: endpoint("localhost")?, to: To::Socket(path.into()) })
    }

    /// Connects.
    ///
    /// # Errors
    ///
    /// When nobody answers, or not who should.
    pub async fn connect(&self) -> Result<Channel, tonic::transport::Error> {
        self.endpoint.connect_with_connector(self.connector()).await
    }

    /// Connects when it is used, and again when the connection is lost.
    #[must_use]
    pub fn lazy(&self) -> Channel {
        self.endpoint.connect_with_connector_lazy(self.connector())
    }

    fn connector(
        &self,
    ) -> impl tower::Service<tonic::transport::Uri, Response = TokioIo<Box<dyn Io>>, Error = io::Error, Future: Send>
    + Send
    + 'static {
        let to = self.to.clone();
        tower::service_fn(move |_| {
            let to = to.clone();
            async move { open(to).await.map(TokioIo::new) }
        })
    }
}

/// Bytes both ways.
trait Io: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}
impl<T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Io for T {}

async fn open(to: To) -> io::Result<Box<dyn Io>> {
    let (address, caller) = match to {
        To::Socket(path) => return Ok(Box::new(UnixStream::connect(path).await?)),
        To::Tls(address, caller) => (address, caller),
    };
    let config = match caller {
        // As they are now: they may have been replaced.
        As::Known(credentials) => credentials.client(),
        As::Newcomer(config) => config,
    };
    let stream = TcpStream::connect(&address).await?;
    stream.set_nodelay(true)?;
    set_tcp_user_timeout(&stream, ACKNOWLEDGED.as_millis() as u32)?;
    let name = ServerName::try_from(tls::MANAGER_NAME).map_err(io::Error::other)?;
    let connected = TlsConnector::from(config).connect(name, stream).await;
    Ok(Box::new(connected.map_err(in_words)?))
}

/// What keeps two from believing each other, for people who have not read the TLS specification.
fn in_words(error: io::Error) -> io::Error {
    use rustls::{AlertDescription as Alert, CertificateError as Certificate, Error as Tls};

    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<Tls>()) else { return error };
    let words = match tls {
        Tls::InvalidCertificate(Certificate::UnknownIssuer | Certificate::BadSignature) => {
            "it belongs to another cluster, or the cluster has another authority since"
        }
        Tls::InvalidCertificate(Certificate::Expired | Certificate::ExpiredContext { .. }) => {
            "its certificate has run out; or one of the two clocks is wrong"
        }
        Tls::InvalidCertificate(Certificate::NotValidYet | Certificate::NotValidYetContext { .. }) => {
            "its certificate is not valid yet: one of the two clocks is wrong"
        }
        Tls::AlertReceived(Alert::CertificateExpired) => "it takes this machine's certificate for one that has run out",
        Tls::AlertReceived(Alert::UnknownCA | Alert::BadCertificate | Alert::DecryptError) => {
            "it does not believe this machine's certificate: it belongs to another cluster"
        }
        Tls::General(words) => words,
        _ => return error,
    };
    io::Error::other(words.to_owned())
}

/// The last of an error's causes, which says what happened.
#[must_use]
pub fn reason(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    match cause.to_string().as_str() {
        "deadline has elapsed" => "it does not answer in time".to_owned(),
        why => why.to_owned(),
    }
}

/// The address of this machine that others see, if it has any but loopback.
#[must_use]
pub fn own_address() -> Option<IpAddr> {
    // Connecting a UDP socket sends nothing; the addresses are for documentation (RFC 5737, RFC 3849).
    let towards = |from: IpAddr, to: IpAddr| {
        let socket = UdpSocket::bind((from, 0)).ok()?;
        socket.connect((to, 9)).ok()?;
        Some(socket.local_addr().ok()?.ip()).filter(|address| !address.is_loopback())
    };
    towards(Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(192, 0, 2, 1).into())
        .or_else(|| towards(Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()))
}

/// Whether that is HOST:PORT.
///
/// # Errors
///
/// When it is not.
pub fn check_address(address: &str) -> Result<(), Error> {
    let valid = address.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0) && endpoint(address).is_ok()
    });
    if valid { Ok(()) } else { Err(Error::Address(address.to_owned())) }
}
