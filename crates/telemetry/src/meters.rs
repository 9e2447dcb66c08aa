use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex},
    time::SystemTime,
};

use opentelemetry::{
    KeyValue,
    metrics::{AsyncInstrument, Counter, Histogram, Meter, MeterProvider as _},
};
use opentelemetry_sdk::metrics::SdkMeterProvider;
use prometheus::Registry;

use crate::{
    family::{Family, assemble},
    semconv::SemanticConventions,
    series::Source,
    signals::{ExportSource, Identity},
    table::{self, Emitter, Kind, Metric},
};

/// A process's metrics: OpenTelemetry instruments by the name in the [`table`], and [`Source`]s.
///
/// Cheap to clone. There is one in a process that serves one endpoint; an all-in-one process has two.
#[derive(Clone)]
pub struct Meters {
    inner: Arc<Inner>,
}

struct Inner {
    emitters: &'static [Emitter],
    registry: Registry,
    meter: Meter,
    sources: Mutex<Vec<Arc<dyn Source>>>,
    resource: Vec<(&'static str, String)>,
    conventions: SemanticConventions,
    since: SystemTime,
    exports: Counter<u64>,
    // Dropping the last handle of the provider would empty the registry.
    _provider: SdkMeterProvider,
}

impl fmt::Debug for Meters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Meters").field("emitters", &self.inner.emitters).finish_non_exhaustive()
    }
}

impl Meters {
    /// Metrics of a process that emits those of `emitters`; `identity` is its OpenTelemetry resource.
    ///
    /// # Panics
    ///
    /// Never: the exporter's options are constants.
    #[must_use]
    pub fn new(identity: &Identity, emitters: &'static [Emitter]) -> Self {
        let registry = Registry::new();
        let exporter = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            // The table's names are complete: nothing is to be appended to them.
            .without_units()
            .without_counter_suffixes()
            .without_target_info()
            .scope_info_enabled(false)
            .build()
            .expect("constant options are valid");
        let provider = SdkMeterProvider::builder().with_resource(identity.resource()).with_reader(exporter).build();
        // One meter: the same instrument under two would be two series of one name.
        let meter = provider.meter("warren");
        let exports = counter(&meter, "warren_otlp_exports_total");
        for succeeded in [true, false] {
            exports.add(0, &export_labels(succeeded));
        }
        let inner = Inner {
            emitters,
            registry,
            meter,
            sources: Mutex::new(vec![Arc::new(ExportSource)]),
            resource: identity.attributes(),
            conventions: SemanticConventions::new(identity.resource()),
            since: SystemTime::now(),
            exports,
            _provider: provider,
        };
        Self { inner: Arc::new(inner) }
    }

    /// What the process is, in OpenTelemetry's terms.
    pub(crate) fn resource(&self) -> &[(&'static str, String)] {
        &self.inner.resource
    }

    /// When counting began.
    pub(crate) fn since(&self) -> SystemTime {
        self.inner.since
    }

    pub(crate) fn count_export(&self, succeeded: bool) {
        self.inner.exports.add(1, &export_labels(succeeded));
    }

    pub(crate) fn semantic_conventions(&self) -> &SemanticConventions {
        &self.inner.conventions
    }

    /// OpenTelemetry's conventional histogram of served calls, which only collectors get. Its attributes are
    /// `rpc.system.name`, `rpc.method`, `rpc.response.status_code` and, for a failed call, `error.type`.
    #[must_use]
    pub fn rpc_server_call_duration(&self) -> Histogram<f64> {
        self.inner.conventions.rpc_server_call_duration()
    }

    /// The counter of this name.
    ///
    /// # Panics
    ///
    /// If the table has no such counter, a mistake that any run of the code shows.
    #[must_use]
    pub fn counter(&self, name: &'static str) -> Counter<u64> {
        counter(&self.inner.meter, name)
    }

    /// The histogram of this name, with the table's buckets.
    ///
    /// # Panics
    ///
    /// If the table has no such histogram, a mistake that any run of the code shows.
    #[must_use]
    pub fn histogram(&self, name: &'static str) -> Histogram<f64> {
        let metric = definition(name, Kind::Histogram);
        self.inner
            .meter
            .f64_histogram(name)
            .with_description(metric.help)
            .with_unit(metric.unit)
            .with_boundaries(metric.buckets.to_vec())
            .build()
    }

    /// Has `observe` report the gauge of this name at every scrape; what it no longer reports is gone. It must not create
    /// instruments.
    ///
    /// # Panics
    ///
    /// If the table has no such gauge, a mistake that any run of the code shows.
    pub fn gauge(&self, name: &'static str, observe: impl Fn(&GaugeObserver<'_>) + Send + Sync + 'static) {
        let metric = definition(name, Kind::Gauge);
        self.inner
            .meter
            .f64_observable_gauge(name)
            .with_description(metric.help)
            .with_unit(metric.unit)
            .with_callback(move |instrument| {
                // A panic here would poison the SDK's locks and leave the endpoint empty for good.
                let observed = catch_unwind(AssertUnwindSafe(|| observe(&GaugeObserver(instrument))));
                if observed.is_err() {
                    tracing::error!(metric = name, "reading a gauge panicked");
                }
            })
            .build();
    }

    /// Adds a source of series.
    ///
    /// # Panics
    ///
    /// If another thread panicked while adding one.
    pub fn add_source(&self, source: Arc<dyn Source>) {
        self.inner.sources.lock().expect("adding a source does not panic").push(source);
    }

    /// Everything there is to export, now.
    ///
    /// # Panics
    ///
    /// If a thread panicked while adding a source.
    #[must_use]
    pub fn families(&self) -> Vec<Family> {
        let sources = self.inner.sources.lock().expect("adding a source does not panic").clone();
        let contributed = sources.iter().flat_map(|source| source.collect()).collect();
        assemble(self.inner.registry.gather(), contributed, |metric| self.inner.emitters.contains(&metric.emitter))
    }
}

fn definition(name: &str, kind: Kind) -> &'static Metric {
    match table::find(name) {
        Some(metric) if metric.kind == kind => metric,
        _ => panic!("the table of metrics has no {kind} {name}"),
    }
}

fn counter(meter: &Meter, name: &'static str) -> Counter<u64> {
    let metric = definition(name, Kind::Counter);
    meter.u64_counter(name).with_description(metric.help).with_unit(metric.unit).build()
}

fn export_labels(succeeded: bool) -> [KeyValue; 2] {
    let result = if succeeded { "success" } else { "failure" };
    [KeyValue::new("result", result), KeyValue::new("signal", "metrics")]
}

/// Reports a gauge's values in [`Meters::gauge`].
pub struct GaugeObserver<'a>(&'a dyn AsyncInstrument<f64>);

impl fmt::Debug for GaugeObserver<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GaugeObserver").finish()
    }
}

impl GaugeObserver<'_> {
    /// Reports one value.
    pub fn observe(&self, value: f64, labels: &[KeyValue]) {
        self.0.observe(value, labels);
    }
}
