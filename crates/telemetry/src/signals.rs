//! Traces and logs by OTLP. Metrics go their own way; see [`crate::otlp`].
//!
//! Spans and records wait in bounded queues for the next batch; what a collector that is away cannot take is lost, and the
//! batches that were are counted in `warren_otlp_exports_total`.

use std::{
    future::Future,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use http::HeaderMap;
use opentelemetry::{
    Context, KeyValue,
    propagation::{Extractor, TextMapPropagator as _},
    trace::TracerProvider as _,
};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_otlp::{Compression, WithExportConfig, WithTonicConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    logs::{LogBatch, LogExporter, SdkLoggerProvider},
    propagation::TraceContextPropagator,
    trace::{SdkTracerProvider, SpanData, SpanExporter},
};
use tracing::{Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::{EnvFilter, Layer, filter::Targets, registry::LookupSpan};

use crate::{
    otlp::{self, EXPORT_TIMEOUT, InvalidEndpoint},
    series::{Measurement, Series, Source},
};

/// What a process is, in OpenTelemetry's terms.
#[derive(Clone, Debug)]
pub struct Identity {
    /// `service.name`.
    pub service: &'static str,
    /// `service.instance.id`: the same over restarts.
    pub instance: String,
}

impl Identity {
    /// As attributes of a resource.
    pub(crate) fn attributes(&self) -> Vec<(&'static str, String)> {
        vec![
            ("service.name", self.service.to_owned()),
            ("service.instance.id", self.instance.clone()),
            ("service.version", env!("CARGO_PKG_VERSION").to_owned()),
            ("host.name", rustix::system::uname().nodename().to_string_lossy().into_owned()),
        ]
    }

    /// As the SDK's resource.
    pub(crate) fn resource(&self) -> Resource {
        let attributes = self.attributes().into_iter().map(|(key, value)| KeyValue::new(key, value));
        Resource::builder_empty().with_attributes(attributes).build()
    }
}

/// The pushing of traces and logs, or of neither.
#[derive(Clone, Debug, Default)]
pub struct Signals {
    tracer: Option<SdkTracerProvider>,
    logger: Option<SdkLoggerProvider>,
}

/// How long the last batches may take when a process ends.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(1500);

impl Signals {
    pub(crate) fn start(
        endpoint: &str,
        identity: &Identity,
        traces: bool,
        logs: bool,
    ) -> Result<Self, InvalidEndpoint> {
        otlp::check(endpoint)?;
        let invalid = |_| InvalidEndpoint::Address(endpoint.to_owned());
        let mut signals = Self::default();
        if traces {
            let builder = to_collector(opentelemetry_otlp::SpanExporter::builder().with_tonic(), endpoint);
            let exporter = builder.build().map_err(invalid)?;
            let exporter = Counted { exporter, signal: &TRACES };
            let provider = SdkTracerProvider::builder().with_resource(identity.resource());
            signals.tracer = Some(provider.with_batch_exporter(exporter).build());
        }
        if logs {
            let builder = to_collector(opentelemetry_otlp::LogExporter::builder().with_tonic(), endpoint);
            let exporter = builder.build().map_err(invalid)?;
            let exporter = Counted { exporter, signal: &LOGS };
            let provider = SdkLoggerProvider::builder().with_resource(identity.resource());
            signals.logger = Some(provider.with_batch_exporter(exporter).build());
        }
        Ok(signals)
    }

    /// Makes spans of Warren's own. The exporter's transport has spans too, which would beget spans without end.
    pub(crate) fn traces<S: Subscriber + for<'a> LookupSpan<'a>>(&self) -> Option<impl Layer<S> + use<S>> {
        let tracer = self.tracer.as_ref()?.tracer("warren");
        let layer = tracing_opentelemetry::layer()
            .with_tracer(tracer)
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_level(false)
            .with_target(false);
        Some(layer.with_filter(Targets::new().with_target("warren", tracing::Level::INFO)))
    }

    /// Makes records of the events that `filter` lets through.
    pub(crate) fn logs<S: Subscriber + for<'a> LookupSpan<'a>>(
        &self,
        filter: EnvFilter,
    ) -> Option<impl Layer<S> + use<S>> {
        Some(OpenTelemetryTracingBridge::new(self.logger.as_ref()?).with_filter(filter))
    }

    /// Pushes what is left, both at once; takes a second and a half at most.
    pub async fn shutdown(self) {
        // On threads that the process does not wait for: a batch on its way to a silent collector takes its own time.
        let (ended, both) = tokio::sync::oneshot::channel::<()>();
        let ended = std::sync::Arc::new(ended);
        let holds = std::sync::Arc::clone(&ended);
        std::thread::spawn(move || {
            let _holds = holds;
            self.tracer.map(|provider| provider.shutdown_with_timeout(SHUTDOWN_TIMEOUT))
        });
        std::thread::spawn(move || {
            let _holds = ended;
            self.logger.map(|provider| provider.shutdown_with_timeout(SHUTDOWN_TIMEOUT))
        });
        // A collector that does not take the last batch is counted and told of like any other time.
        let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, both).await;
    }
}

/// How every signal is sent.
fn to_collector<B: WithExportConfig + WithTonicConfig>(builder: B, endpoint: &str) -> B {
    builder.with_endpoint(endpoint).with_timeout(EXPORT_TIMEOUT).with_compression(Compression::Gzip)
}

/// The exports of a signal.
#[derive(Debug)]
struct Exports {
    name: &'static str,
    succeeded: AtomicU64,
    failed: AtomicU64,
    fails: AtomicBool,
}

// A process has one subscriber, and so one of each.
static TRACES: Exports = Exports::new("traces");
static LOGS: Exports = Exports::new("logs");

impl Exports {
    const fn new(name: &'static str) -> Self {
        Self { name, succeeded: AtomicU64::new(0), failed: AtomicU64::new(0), fails: AtomicBool::new(false) }
    }

    fn count(&self, outcome: &OTelSdkResult) {
        let counter = if outcome.is_ok() { &self.succeeded } else { &self.failed };
        counter.fetch_add(1, Ordering::Relaxed);
        let failed = self.fails.swap(outcome.is_err(), Ordering::Relaxed);
        // One line when it begins and one when it ends, however long the collector is away.
        match outcome {
            Err(error) if !failed => tracing::warn!(%error, "{} cannot be exported by OTLP", self.name),
            Ok(()) if failed => tracing::info!("{} are exported by OTLP again", self.name),
            _ => {}
        }
    }

    fn series(&self) -> [Series; 2] {
        let series = |result, counter: &AtomicU64| {
            let value = Measurement::Counter(counter.load(Ordering::Relaxed) as f64);
            Series::new("warren_otlp_exports_total", &[("result", result), ("signal", self.name)], value)
        };
        [series("success", &self.succeeded), series("failure", &self.failed)]
    }
}

/// Contributes the counts of exported batches.
pub(crate) struct ExportSource;

impl Source for ExportSource {
    fn collect(&self) -> Vec<Series> {
        [&TRACES, &LOGS].into_iter().flat_map(Exports::series).collect()
    }
}

/// Counts another exporter's batches.
#[derive(Debug)]
struct Counted<E> {
    exporter: E,
    signal: &'static Exports,
}

impl<E: SpanExporter> SpanExporter for Counted<E> {
    fn export(&self, batch: Vec<SpanData>) -> impl Future<Output = OTelSdkResult> + Send {
        let exported = self.exporter.export(batch);
        async move {
            let outcome = exported.await;
            self.signal.count(&outcome);
            outcome
        }
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl<E: LogExporter> LogExporter for Counted<E> {
    fn export(&self, batch: LogBatch<'_>) -> impl Future<Output = OTelSdkResult> + Send {
        let exported = self.exporter.export(batch);
        async move {
            let outcome = exported.await;
            self.signal.count(&outcome);
            outcome
        }
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

/// Makes `span` a child of the caller's, if the headers name one (W3C Trace Context).
pub fn continue_trace(span: &Span, headers: &HeaderMap) {
    if headers.contains_key("traceparent") {
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &Headers(headers));
        // Fails where nothing is traced.
        let _ = span.set_parent(parent);
    }
}
