//! Counts and times every call.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use http::{Request, Response};
use opentelemetry::KeyValue;
use tonic::{Code, Status};
use tower::{Layer, Service};

use crate::metrics::ManagerMetrics;

/// Wraps the API's services.
#[derive(Clone, Debug)]
pub struct MetricsLayer {
    metrics: Arc<ManagerMetrics>,
}

impl MetricsLayer {
    /// A layer that records into these instruments.
    #[must_use]
    pub fn new(metrics: Arc<ManagerMetrics>) -> Self {
        Self { metrics }
    }
}

impl<S> Layer<S> for MetricsLayer {
    type Service = Measured<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Measured { inner, metrics: Arc::clone(&self.metrics) }
    }
}

/// A service that is counted and timed.
#[derive(Clone, Debug)]
pub struct Measured<S> {
    inner: S,
    metrics: Arc<ManagerMetrics>,
}

/// The method's name if it is one of ours: the path comes from outside and must not make labels.
fn method(path: &str) -> &'static str {
    const METHODS: [&str; 16] = [
        "CreateService",
        "UpdateService",
        "DeleteService",
        "GetService",
        "ListServices",
        "ListContainers",
        "GetContainer",
        "WatchContainers",
        "RegisterNode",
        "ListNodes",
        "GetNode",
        "RemoveNode",
        "GetClusterInfo",
        "Session",
        "Check",
        "ServerReflectionInfo",
    ];
    let name = path.rsplit('/').next().unwrap_or_default();
    METHODS.into_iter().find(|method| *method == name).unwrap_or("other")
}

/// The code's name as gRPC writes it.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

impl<S, B, R> Service<Request<B>> for Measured<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
    S::Error: 'static,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let method = KeyValue::new("method", method(request.uri().path()));
        let metrics = Arc::clone(&self.metrics);
        let began = Instant::now();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            // A failed call has its code in the headers; a call that answers has OK in the trailers.
            let code = match &answer {
                Ok(response) => Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code()),
                Err(_) => Code::Internal,
            };
            metrics.api_requests.add(1, &[method.clone(), KeyValue::new("status", code_name(code))]);
            metrics.api_duration.record(began.elapsed().as_secs_f64(), &[method]);
            answer
        })
    }
}
