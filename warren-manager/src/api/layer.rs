//! Counts, times and traces every call.

use std::{
    collections::HashMap,
    future::Future,
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Instant,
};

use http::{Request, Response};
use opentelemetry::{
    KeyValue,
    metrics::{BoundCounter, BoundHistogram},
};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::{Instrument as _, Span, field};

use super::DESCRIPTORS;
use crate::metrics::ManagerMetrics;

/// Wraps the API's services.
#[derive(Clone, Debug)]
pub struct MetricsLayer {
    methods: Arc<Methods>,
}

impl MetricsLayer {
    /// A layer that records into these instruments.
    #[must_use]
    pub fn new(metrics: &Arc<ManagerMetrics>) -> Self {
        Self { methods: Arc::new(Methods::new(metrics)) }
    }
}

impl<S> Layer<S> for MetricsLayer {
    type Service = Measured<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Measured { inner, methods: Arc::clone(&self.methods) }
    }
}

/// A service that is counted, timed and traced.
#[derive(Clone, Debug)]
pub struct Measured<S> {
    inner: S,
    methods: Arc<Methods>,
}

/// The methods that the API has, by the path of their requests. A path comes from outside: what is none of them must not
/// make labels.
#[derive(Debug)]
struct Methods {
    known: HashMap<String, Arc<Method>>,
    other: Arc<Method>,
}

impl Methods {
    fn new(metrics: &Arc<ManagerMetrics>) -> Self {
        let known = names().into_iter().map(|name| {
            let label = name.rsplit('/').next().unwrap_or_default().to_owned();
            (format!("/{name}"), Arc::new(Method::new(metrics, label, name)))
        });
        // The names are those of the field's conventions and of the metrics' table.
        let other = Arc::new(Method::new(metrics, "other".to_owned(), "_OTHER".to_owned()));
        Self { known: known.collect(), other }
    }

    fn find(&self, path: &str) -> Arc<Method> {
        Arc::clone(self.known.get(path).unwrap_or(&self.other))
    }
}

/// `package.Service/Method` of everything that is served.
fn names() -> Vec<String> {
    let files = DESCRIPTORS.into_iter().filter_map(|set| FileDescriptorSet::decode(set).ok()).flat_map(|set| set.file);
    let services = files.flat_map(|file| {
        let package = file.package().to_owned();
        file.service.into_iter().map(move |service| (package.clone(), service))
    });
    services
        .flat_map(|(package, service)| {
            let prefix = format!("{package}.{}", service.name());
            service.method.into_iter().map(move |method| format!("{prefix}/{}", method.name()))
        })
        .collect()
}

/// A method's instruments. Those of a status are bound when the first call ends with it.
#[derive(Debug)]
struct Method {
    metrics: Arc<ManagerMetrics>,
    label: KeyValue,
    full_name: String,
    duration: BoundHistogram<f64>,
    by_code: [OnceLock<ByCode>; CODES],
}

/// gRPC's status codes are 0 to 16.
const CODES: usize = 17;

#[derive(Debug)]
struct ByCode {
    requests: BoundCounter<u64>,
    rpc_duration: BoundHistogram<f64>,
}

impl Method {
    fn new(metrics: &Arc<ManagerMetrics>, label: String, full_name: String) -> Self {
        let label = KeyValue::new("method", label);
        let duration = metrics.api_duration.bind(std::slice::from_ref(&label));
        Self { metrics: Arc::clone(metrics), label, full_name, duration, by_code: Default::default() }
    }

    fn ended(&self, code: Code, seconds: f64) {
        self.duration.record(seconds);
        let of_code = self.by_code[code as usize].get_or_init(|| {
            let name = code_name(code);
            let mut attributes = vec![
                KeyValue::new("rpc.method", self.full_name.clone()),
                KeyValue::new("rpc.response.status_code", name),
                KeyValue::new("rpc.system.name", "grpc"),
            ];
            if is_the_servers_fault(code) {
                attributes.push(KeyValue::new("error.type", name));
            }
            ByCode {
                requests: self.metrics.api_requests.bind(&[self.label.clone(), KeyValue::new("status", name)]),
                rpc_duration: self.metrics.rpc_duration.bind(&attributes),
            }
        });
        of_code.requests.add(1);
        of_code.rpc_duration.record(seconds);
    }

    fn span(&self) -> Span {
        let name = self.full_name.as_str();
        tracing::info_span!(
            "rpc",
            otel.name = name,
            otel.kind = "server",
            otel.status_code = field::Empty,
            rpc.system.name = "grpc",
            rpc.method = name,
            rpc.response.status_code = field::Empty,
            error.r#type = field::Empty,
        )
    }
}

/// The codes that OpenTelemetry's conventions count as a server's errors; the others are the caller's.
fn is_the_servers_fault(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    )
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
        let method = self.methods.find(request.uri().path());
        let span = method.span();
        warren_telemetry::signals::continue_trace(&span, request.headers());
        let began = Instant::now();
        let answer = span.in_scope(|| self.inner.call(request)).instrument(span.clone());
        Box::pin(async move {
            let answer = answer.await;
            // A failed call has its code in the headers; a call that answers has OK in the trailers.
            let code = match &answer {
                Ok(response) => Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code()),
                Err(_) => Code::Internal,
            };
            method.ended(code, began.elapsed().as_secs_f64());
            span.record("rpc.response.status_code", code_name(code));
            if is_the_servers_fault(code) {
                span.record("otel.status_code", "ERROR");
                span.record("error.type", code_name(code));
            }
            answer
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_that_is_served_has_a_name() {
        let names = names();
        for name in [
            "warren.v1.Services/CreateService",
            "warren.v1.Containers/WatchContainers",
            "warren.v1.Dispatcher/Session",
            "grpc.health.v1.Health/Check",
            "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        ] {
            assert!(names.iter().any(|known| known == name), "{name} is not among {names:?}");
        }
    }
}
