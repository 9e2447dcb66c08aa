//! The HTTP endpoint of a process: `/metrics`, `/health`, `/ready`, `/live`.

use std::{future::Future, io, io::Write as _, net::SocketAddr};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use flate2::{Compression, write::GzEncoder};
use tokio::net::TcpListener;

use crate::{Checks, Meters, cli::NativeHistograms, exposition::Format};

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

/// The endpoint's address could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve metrics on {address}: {}", reason(source))]
pub struct BindError {
    /// The address.
    pub address: SocketAddr,
    /// Why not.
    #[source]
    pub source: io::Error,
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "another process uses this port".to_owned(),
        _ => error.to_string(),
    }
}

/// Takes the address; serving starts with [`Endpoint::serve`].
///
/// # Errors
///
/// When the address is in use or not this machine's.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, BindError> {
    TcpListener::bind(address).await.map_err(|source| BindError { address, source })
}

impl Endpoint {
    /// Serves until `shutdown` completes.
    ///
    /// # Errors
    ///
    /// When accepting connections fails for good.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        let router = Router::new()
            .route("/metrics", get(metrics))
            .route("/health", get(health))
            .route("/live", get(health))
            .route("/ready", get(ready))
            .with_state(self);
        axum::serve(listener, router).with_graceful_shutdown(shutdown).await
    }
}

async fn health(State(endpoint): State<Endpoint>) -> Response {
    report(&endpoint.health)
}

async fn ready(State(endpoint): State<Endpoint>) -> Response {
    report(&endpoint.ready)
}

fn report(checks: &Checks) -> Response {
    let report = checks.evaluate();
    let status = if report.status == "ok" { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(report)).into_response()
}

async fn metrics(State(endpoint): State<Endpoint>, headers: HeaderMap) -> Response {
    let format = match endpoint.native_histograms {
        NativeHistograms::Auto => Format::negotiate(&joined(&headers, header::ACCEPT)),
        NativeHistograms::Off => Format::Text,
    };
    let gzip = accepts_gzip(&joined(&headers, header::ACCEPT_ENCODING));
    // Collecting takes locks and reads maps: not for a thread that serves others.
    let encoded = tokio::task::spawn_blocking(move || {
        let body = format.encode(&endpoint.meters.families());
        if gzip { compress(&body) } else { Ok(body) }
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
