//! The HTTP endpoint of a process: `/metrics`, `/health`, `/ready`, `/live`.

use std::{
    future::Future,
    io,
    io::Write as _,
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use flate2::{Compression, write::GzEncoder};
use hyper::{
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use warren_connections::{Connections, Place};

use crate::{Access, Checks, FileError, Meters, access::Tls, cli::NativeHistograms, exposition::Format};

/// Connections at a time in all, and with one client. Scrapers have one each, and keep it.
const CONNECTIONS: usize = 256;
const OF_ONE_CLIENT: usize = 64;
/// A request's head must be there after this time, also the next one's on the same connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// The first one's, for whoever connects and says nothing.
const FIRST_HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one connection is kept; scrapers connect again. Who reads an answer slowly has as long for it as for all others.
const LIFETIME: Duration = Duration::from_secs(600);
/// Metrics are collected for so many at a time; more wait.
const COLLECTING: usize = 2;
/// How long what is being answered may take at the end.
const LAST_ANSWER: Duration = Duration::from_secs(10);

/// What an endpoint serves.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// `/metrics`.
    pub meters: Meters,
    /// Who gets native histograms.
    pub native_histograms: NativeHistograms,
    /// `/health` and `/live`: whether the process does its work at all. A failing one is worth a restart.
    pub health: Checks,
    /// `/ready`: whether it can do all of its work now.
    pub ready: Checks,
}

/// Why an endpoint cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Its address could not be bound.
    #[error("cannot serve metrics on {address}: {}", reason(source))]
    Address {
        /// The address.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What protects it cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
}

impl BindError {
    /// The process's exit code: 7 for an address, 2 for what it was told.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Address { .. } => 7,
            Self::File(_) => 2,
        }
    }
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "another process uses this port".to_owned(),
        _ => error.to_string(),
    }
}

/// An address that was taken, and who is to be served there.
#[derive(Debug)]
pub struct Listener {
    tcp: TcpListener,
    tls: Option<Tls>,
    access: Access,
}

impl Listener {
    /// Where it is.
    ///
    /// # Errors
    ///
    /// When the kernel does not say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

/// Takes the address; serving starts with [`Endpoint::serve`].
///
/// # Errors
///
/// When the address is in use or not this machine's, or a file cannot be used.
pub async fn bind(address: SocketAddr, access: &Access) -> Result<Listener, BindError> {
    let tls = access.open()?;
    let tcp = TcpListener::bind(address).await.map_err(|source| BindError::Address { address, source })?;
    Ok(Listener { tcp, tls, access: access.clone() })
}

impl Endpoint {
    /// Serves until `shutdown` completes. Whoever can reach the port may connect; nobody keeps the others out by that.
    pub async fn serve(self, listener: Listener, shutdown: impl Future<Output = ()> + Send + 'static) {
        let Listener { tcp, tls, access } = listener;
        let router = Router::new()
            .route("/metrics", get(metrics))
            .route("/health", get(health))
            .route("/live", get(health))
            .route("/ready", get(ready))
            .with_state(Served { endpoint: self, access, collecting: Arc::new(Semaphore::new(COLLECTING)) });
        let connections = Connections::new(warren_connections::at_most(CONNECTIONS), OF_ONE_CLIENT);
        let (tasks, end) = (TaskTracker::new(), CancellationToken::new());
        let mut shutdown = pin!(shutdown);
        loop {
            let (stream, _, place) = tokio::select! {
                accepted = connections.accept(&tcp) => accepted,
                () = &mut shutdown => break,
            };
            tasks.spawn(answer(stream, tls.clone(), router.clone(), place, end.clone()));
        }
        end.cancel();
        tasks.close();
        tasks.wait().await;
    }
}

/// Answers one connection's requests until it ends, has been there for long, or has to make room for another.
async fn answer(stream: TcpStream, tls: Option<Tls>, router: Router, mut place: Place<IpAddr>, end: CancellationToken) {
    let served = async {
        let mut first = [0];
        let begun = tokio::select! {
            begun = tokio::time::timeout(FIRST_HEAD_TIMEOUT, stream.peek(&mut first)) => begun,
            () = end.cancelled() => return,
        };
        if !matches!(begun, Ok(Ok(1))) {
            return;
        }
        match tls.as_ref().map(Tls::acceptor) {
            None => answer_on(stream, router, end.clone()).await,
            Some(Ok(acceptor)) => {
                if let Ok(Ok(stream)) = tokio::time::timeout(FIRST_HEAD_TIMEOUT, acceptor.accept(stream)).await {
                    answer_on(stream, router, end.clone()).await;
                }
            }
            Some(Err(error)) => tracing::warn!(%error, "metrics cannot be served"),
        }
    };
    tokio::select! {
        () = served => {}
        () = place.given_up() => {}
        () = async {
            end.cancelled().await;
            tokio::time::sleep(LAST_ANSWER).await;
        } => {}
    }
}

async fn answer_on<S: AsyncRead + AsyncWrite + Unpin>(stream: S, router: Router, end: CancellationToken) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    let asked = CancellationToken::new();
    let first = asked.clone();
    let service = service_fn(move |request| {
        first.cancel();
        TowerToHyperService::new(router.clone()).call(request)
    });
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    let silent = async {
        if tokio::time::timeout(FIRST_HEAD_TIMEOUT, asked.cancelled()).await.is_ok() {
            std::future::pending().await
        }
    };
    tokio::select! {
        // What went wrong with it is the client's to see.
        _ = &mut connection => return,
        () = silent => return,
        () = tokio::time::sleep(LIFETIME) => {}
        () = end.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(LAST_ANSWER, connection).await;
}

#[derive(Clone, Debug)]
struct Served {
    endpoint: Endpoint,
    access: Access,
    collecting: Arc<Semaphore>,
}

async fn health(State(Served { endpoint, .. }): State<Served>) -> Response {
    report(&endpoint.health)
}

async fn ready(State(Served { endpoint, .. }): State<Served>) -> Response {
    report(&endpoint.ready)
}

fn report(checks: &Checks) -> Response {
    let report = checks.evaluate();
    let status = if report.status == "ok" { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(report)).into_response()
}

async fn metrics(State(Served { endpoint, access, collecting }): State<Served>, headers: HeaderMap) -> Response {
    if !access.allows(&headers) {
        return (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")]).into_response();
    }
    let format = match endpoint.native_histograms {
        NativeHistograms::Auto => Format::negotiate(&joined(&headers, header::ACCEPT)),
        NativeHistograms::Off => Format::Text,
    };
    let gzip = accepts_gzip(&joined(&headers, header::ACCEPT_ENCODING));
    // Never closed.
    let turn = collecting.acquire_owned().await;
    // Collecting takes locks and reads maps: not for a thread that serves others.
    let encoded = tokio::task::spawn_blocking(move || {
        let body = format.encode(&endpoint.meters.families());
        let body = if gzip { compress(&body) } else { Ok(body) };
        drop(turn);
        body
    })
    .await;
    let Ok(Ok(body)) = encoded else { return StatusCode::INTERNAL_SERVER_ERROR.into_response() };
    let types = [(header::CONTENT_TYPE, format.content_type()), (header::VARY, "Accept, Accept-Encoding")];
    let mut response = (types, body).into_response();
    if gzip {
        response.headers_mut().insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    response
}

fn joined(headers: &HeaderMap, name: HeaderName) -> String {
    headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect::<Vec<_>>().join(",")
}

fn accepts_gzip(accept_encoding: &str) -> bool {
    accept_encoding.split(',').any(|coding| {
        let mut parts = coding.split(';').map(str::trim);
        let refused = |parameter: &str| parameter.strip_prefix("q=").is_some_and(|q| q.parse() == Ok(0.0f32));
        parts.next() == Some("gzip") && !parts.any(refused)
    })
}

fn compress(body: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(body)?;
    encoder.finish()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::{signals::Identity, table::Emitter};

    async fn start() -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<()>) {
        let listener = bind(([127, 0, 0, 1], 0).into(), &Access::default()).await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let end = CancellationToken::new();
        let endpoint = Endpoint {
            meters: Meters::new(&Identity { service: "test", instance: "1".to_owned() }, &[Emitter::Both]),
            native_histograms: NativeHistograms::Auto,
            health: Checks::default(),
            ready: Checks::default(),
        };
        let served = tokio::spawn(endpoint.serve(listener, end.clone().cancelled_owned()));
        (address, end, served)
    }

    async fn get(stream: &mut TcpStream, path: &str) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("written");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answered");
        answer
    }

    #[tokio::test]
    async fn who_connects_and_says_nothing_keeps_nobody_out() {
        let (address, end, served) = start().await;
        let mut idle = Vec::new();
        for _ in 0..OF_ONE_CLIENT * 2 {
            idle.push(TcpStream::connect(address).await.expect("connected"));
        }
        let mut scraper = TcpStream::connect(address).await.expect("connected");
        assert!(get(&mut scraper, "/health").await.starts_with("HTTP/1.1 200"));
        // The oldest have made room, the newest have not.
        let mut byte = [0];
        let ended = tokio::time::timeout(Duration::from_secs(5), idle[0].read(&mut byte)).await.expect("ended");
        assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
        let last = idle.last_mut().expect("many");
        assert!(get(last, "/live").await.starts_with("HTTP/1.1 200"));
        end.cancel();
        tokio::time::timeout(Duration::from_secs(5), served)
            .await
            .expect("it ends though others are connected")
            .expect("well");
    }

    #[tokio::test]
    async fn a_request_is_not_waited_for_for_ever() {
        let (address, end, served) = start().await;
        let (mut silent, mut slow, mut patient) = (
            TcpStream::connect(address).await.expect("connected"),
            TcpStream::connect(address).await.expect("connected"),
            TcpStream::connect(address).await.expect("connected"),
        );
        slow.write_all(b"GET /metrics HTTP/1.1\r\n").await.expect("written");
        patient.write_all(b"GET /live HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("written");
        let mut answer = [0; 64];
        let _ = patient.read(&mut answer).await.expect("answered");
        assert!(answer.starts_with(b"HTTP/1.1 200"));
        tokio::time::pause();
        let began = tokio::time::Instant::now();
        let mut rest = Vec::new();
        let _ = silent.read_to_end(&mut rest).await;
        assert!(began.elapsed() < FIRST_HEAD_TIMEOUT + Duration::from_secs(1), "{:?}", began.elapsed());
        let _ = slow.read_to_end(&mut rest).await;
        let _ = patient.read_to_end(&mut rest).await;
        assert!(began.elapsed() < HEAD_TIMEOUT + Duration::from_secs(1), "{:?}", began.elapsed());
        end.cancel();
        served.await.expect("well");
    }
}
