//! OpenTelemetry's conventional metrics (semantic conventions 1.44), a second set beside Warren's own names. They go to
//! collectors only, and only when asked for: on the Prometheus endpoint they would say the same twice.
//!
//! Not among them is `dns.lookup.duration`: it demands the name that was asked for, which is unbounded.

use std::{
    fmt,
    sync::{Arc, Weak},
    time::Duration,
};

use opentelemetry::metrics::{Histogram, Meter, MeterProvider as _};
use opentelemetry_proto::tonic::{collector::metrics::v1::ExportMetricsServiceRequest, metrics::v1::ScopeMetrics};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    metrics::{
        InstrumentKind, ManualReader, Pipeline, SdkMeterProvider, Temporality, data::ResourceMetrics,
        reader::MetricReader,
    },
};

use crate::process;

/// The SDK's instruments of the conventional metrics, and the reader that collects them.
pub(crate) struct SemanticConventions {
    reader: SharedReader,
    meter: Meter,
    // Dropping the last handle of the provider would empty the reader.
    _provider: SdkMeterProvider,
}

impl fmt::Debug for SemanticConventions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SemanticConventions").finish_non_exhaustive()
    }
}

/// The conventional bounds of `rpc.server.call.duration`, in seconds.
const RPC_DURATION: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];

impl SemanticConventions {
    pub(crate) fn new(resource: Resource) -> Self {
        let reader = SharedReader(Arc::new(ManualReader::builder().build()));
        let provider = SdkMeterProvider::builder().with_resource(resource).with_reader(reader.clone()).build();
        let meter = provider.meter("warren.semconv");
        observe_process(&meter);
        Self { reader, meter, _provider: provider }
    }

    /// `rpc.server.call.duration`; its attributes are `rpc.system.name`, `rpc.method`, `rpc.response.status_code` and, for a
    /// failed call, `error.type`.
    pub(crate) fn rpc_server_call_duration(&self) -> Histogram<f64> {
        self.meter
            .f64_histogram("rpc.server.call.duration")
            .with_description("Measures the duration of an incoming Remote Procedure Call (RPC).")
            .with_unit("s")
            .with_boundaries(RPC_DURATION.to_vec())
            .build()
    }

    /// Everything recorded, now.
    pub(crate) fn collect(&self) -> Vec<ScopeMetrics> {
        let mut collected = ResourceMetrics::default();
        if let Err(error) = self.reader.0.collect(&mut collected) {
            tracing::warn!(%error, "conventional metrics cannot be collected");
            return Vec::new();
        }
        let request = ExportMetricsServiceRequest::from(&collected);
        request.resource_metrics.into_iter().flat_map(|resource| resource.scope_metrics).collect()
    }
}

/// `process.*`, read when somebody collects.
fn observe_process(meter: &Meter) {
    meter
        .f64_observable_counter("process.cpu.time")
        .with_description("Total CPU seconds of the process.")
        .with_unit("s")
        .with_callback(|observer| {
            if let Some(process) = process::Stat::read() {
                observer.observe(process.cpu_seconds(), &[]);
            }
        })
        .build();
    let up_down = |name, help, unit, read: fn() -> Option<f64>| {
        meter
            .f64_observable_up_down_counter(name)
            .with_description(help)
            .with_unit(unit)
            .with_callback(move |observer| {
                if let Some(value) = read() {
                    observer.observe(value, &[]);
                }
            })
            .build()
    };
    up_down("process.memory.usage", "The amount of physical memory in use.", "By", || {
        process::Stat::read().map(|process| process.resident_bytes())
    });
    up_down("process.memory.virtual", "The amount of committed virtual memory.", "By", || {
        process::Stat::read().map(|process| process.virtual_bytes)
    });
    up_down("process.thread.count", "Process threads count.", "{thread}", || {
        process::Stat::read().map(|process| process.threads)
    });
    up_down(
        "process.unix.file_descriptor.count",
        "Number of unix file descriptors in use by the process.",
        "{file_descriptor}",
        process::open_files,
    );
    meter
        .f64_observable_gauge("process.uptime")
        .with_description("The time the process has been running.")
        .with_unit("s")
        .with_callback(|observer| {
            if let Some(uptime) = process::Stat::read().and_then(|process| process.uptime_seconds()) {
                observer.observe(uptime, &[]);
            }
        })
        .build();
}

/// A reader that the provider and the exporter share.
#[derive(Clone, Debug)]
struct SharedReader(Arc<ManualReader>);

impl MetricReader for SharedReader {
    fn register_pipeline(&self, pipeline: Weak<Pipeline>) {
        self.0.register_pipeline(pipeline);
    }

    fn collect(&self, metrics: &mut ResourceMetrics) -> OTelSdkResult {
        self.0.collect(metrics)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }

    fn temporality(&self, kind: InstrumentKind) -> Temporality {
        self.0.temporality(kind)
    }
}
