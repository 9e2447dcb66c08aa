//! Export by OTLP: every interval, everything the endpoint shows, in one request. Kernel histograms go as exponential ones,
//! bucket for bucket.
//!
//! There is no queue: metrics are cumulative, so the latest snapshot replaces what could not be sent.

use std::{
    future::Future,
    time::{Duration, SystemTime},
};

use opentelemetry_proto::tonic::{
    collector::metrics::v1::{ExportMetricsServiceRequest, metrics_service_client::MetricsServiceClient},
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value},
    metrics::v1::{
        AggregationTemporality, ExponentialHistogram, ExponentialHistogramDataPoint, Gauge, Histogram,
        HistogramDataPoint, Metric, NumberDataPoint, ResourceMetrics, ScopeMetrics, Sum,
        exponential_histogram_data_point::Buckets, metric::Data, number_data_point,
    },
    resource::v1::Resource,
};
use prost::Message as _;
use tonic::{
    codec::CompressionEncoding,
    transport::{Channel, Endpoint},
};

use crate::{
    Family, Meters, Point, Value,
    series::Exponential,
    table::{Emitter, Kind},
};

/// Where and how often to export.
#[derive(Clone, Debug)]
pub struct Options {
    /// A collector's gRPC endpoint, like `http://127.0.0.1:4317`.
    pub endpoint: String,
    /// Between exports.
    pub interval: Duration,
    /// Whether OpenTelemetry's conventional metrics go too.
    pub semantic_conventions: bool,
}

/// What cannot be exported to.
#[derive(Debug, thiserror::Error)]
pub enum InvalidEndpoint {
    /// It is not an address.
    #[error("{0:?} is not an OTLP endpoint: use http://host:port")]
    Address(String),
    /// The environment asks for what this exporter does not do.
    #[error("{variable}={value}: {why}")]
    Variable {
        /// Which variable.
        variable: &'static str,
        /// As it is set; a secret one is not shown.
        value: String,
        /// Why it cannot be so.
        why: &'static str,
    },
}

/// OpenTelemetry's variables for exporters that this one does not follow: silence would send telemetry another way than was asked for.
pub(crate) fn check_environment(variable: impl Fn(&str) -> Option<String>) -> Result<(), InvalidEndpoint> {
    const PROTOCOLS: [&str; 4] = [
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
        "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL",
    ];
    const ENDPOINTS: [&str; 3] = [
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT",
    ];
    const TLS: [&str; 3] =
        ["OTEL_EXPORTER_OTLP_CERTIFICATE", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "OTEL_EXPORTER_OTLP_CLIENT_KEY"];
    const HEADERS: [&str; 4] = [
        "OTEL_EXPORTER_OTLP_HEADERS",
        "OTEL_EXPORTER_OTLP_METRICS_HEADERS",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
        "OTEL_EXPORTER_OTLP_LOGS_HEADERS",
    ];
    let set = |name: &str| variable(name).filter(|value| !value.is_empty());
    let refused = |variable, value, why| Err(InvalidEndpoint::Variable { variable, value, why });
    for name in PROTOCOLS {
        if let Some(value) = set(name).filter(|value| value != "grpc") {
            return refused(
                name,
                value,
                "only grpc is there yet: send to the collector's gRPC port, which is 4317 mostly",
            );
        }
    }
    for name in ENDPOINTS {
        if let Some(value) = set(name) {
            let why = "there is one endpoint for all signals: OTEL_EXPORTER_OTLP_ENDPOINT; --otlp-signals says which go there";
            return refused(name, value, why);
        }
    }
    for name in TLS {
        if let Some(value) = set(name) {
            return refused(name, value, "there is no TLS to collectors yet: send to one on this machine");
        }
    }
    if let Some(name) = HEADERS.into_iter().find(|name| set(name).is_some()) {
        return refused(name, "...".to_owned(), "headers are not sent yet: a collector on this machine can add them");
    }
    Ok(())
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// What is left when the process ends is waited for no longer: a collector that says nothing keeps nobody.
const LAST_TIMEOUT: Duration = Duration::from_secs(1);
/// A collector that takes longer gets the next snapshot instead.
pub(crate) const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// Exports until `shutdown` completes, and once more then.
///
/// # Errors
///
/// When the endpoint is no address. A collector that is away is tried again at every interval.
pub fn exporter(
    options: &Options,
    meters: Meters,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<impl Future<Output = ()> + Send + 'static, InvalidEndpoint> {
    let channel = check(&options.endpoint)?.connect_timeout(CONNECT_TIMEOUT).timeout(EXPORT_TIMEOUT).connect_lazy();
    // A collector answers in the request's compression.
    let client = MetricsServiceClient::new(channel)
        .send_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Gzip);
    let (interval, conventions) = (options.interval, options.semantic_conventions);
    Ok(async move {
        let exporter = Exporter { client, meters, conventions };
        let mut tick = tokio::time::interval(interval);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut shutdown = std::pin::pin!(shutdown);
        let mut works = true;
        loop {
            let exported = tokio::select! {
                exported = async {
                    tick.tick().await;
                    exporter.export().await
                } => exported,
                () = &mut shutdown => {
                    // What is on its way is in the next as well.
                    if tokio::time::timeout(LAST_TIMEOUT, exporter.export()).await.is_err() {
                        tracing::warn!("the collector did not take the last metrics in time");
                    }
                    return;
                }
            };
            // One line when it begins and one when it ends, however long the collector is away.
            match (&exported, works) {
                (Err(status), true) => tracing::warn!(why = status.message(), "metrics cannot be exported by OTLP"),
                (Ok(()), false) => tracing::info!("metrics are exported by OTLP again"),
                _ => {}
            }
            works = exported.is_ok();
        }
    })
}

/// A collector's address, if it is one.
pub(crate) fn check(endpoint: &str) -> Result<Endpoint, InvalidEndpoint> {
    let invalid = || InvalidEndpoint::Address(endpoint.to_owned());
    let parsed = Endpoint::from_shared(endpoint.to_owned()).map_err(|_| invalid())?;
    if parsed.uri().scheme_str() == Some("http") { Ok(parsed) } else { Err(invalid()) }
}

struct Exporter {
    client: MetricsServiceClient<Channel>,
    meters: Meters,
    conventions: bool,
}

impl Exporter {
    async fn export(&self) -> Result<(), tonic::Status> {
        let (meters, conventions) = (self.meters.clone(), self.conventions);
        // Collecting takes locks and reads maps: not for a thread that serves others.
        let request = tokio::task::spawn_blocking(move || request(&meters, conventions)).await;
        let request = request.map_err(|error| tonic::Status::internal(error.to_string()))?;
        let mut exported = Ok(());
        for part in parts(request) {
            let answer = self.client.clone().export(part).await;
            let refused = answer.as_ref().ok().and_then(|answer| answer.get_ref().partial_success.clone());
            if let Some(refused) = refused.filter(|refused| refused.rejected_data_points > 0) {
                let (points, why) = (refused.rejected_data_points, refused.error_message);
                tracing::warn!(points, why, "the collector refused some of the metrics");
            }
            exported = exported.and(answer.map(drop));
        }
        self.meters.count_export(exported.is_ok());
        exported
    }
}

/// Bytes of metrics in one request: collectors take 4 MiB unless they are told otherwise.
const MAX_PART: usize = 2 << 20;

/// The same metrics in requests that collectors take.
fn parts(request: ExportMetricsServiceRequest) -> Vec<ExportMetricsServiceRequest> {
    if request.encoded_len() <= MAX_PART {
        return vec![request];
    }
    let mut parts = Vec::new();
    for resource in request.resource_metrics {
        for mut scope in resource.scope_metrics {
            let all = std::mem::take(&mut scope.metrics);
            let (mut metrics, mut bytes) = (Vec::new(), 0);
            let mut end = |metrics: Vec<Metric>| {
                let scope_metrics = vec![ScopeMetrics { metrics, ..scope.clone() }];
                let resource =
                    ResourceMetrics { resource: resource.resource.clone(), scope_metrics, ..Default::default() };
                parts.push(ExportMetricsServiceRequest { resource_metrics: vec![resource] });
            };
            for metric in all {
                let length = metric.encoded_len();
                if bytes > 0 && bytes + length > MAX_PART {
                    end(std::mem::take(&mut metrics));
                    bytes = 0;
                }
                bytes += length;
                metrics.push(metric);
            }
            end(metrics);
        }
    }
    parts
}

fn nanos(time: SystemTime) -> u64 {
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX)
}

fn attribute(key: &str, value: &str) -> KeyValue {
    let value = AnyValue { value: Some(any_value::Value::StringValue(value.to_owned())) };
    KeyValue { key: key.to_owned(), value: Some(value), ..Default::default() }
}

/// Everything there is to export now.
pub(crate) fn request(meters: &Meters, conventions: bool) -> ExportMetricsServiceRequest {
    let now = nanos(SystemTime::now());
    let families = meters.families();
    let metrics = families.iter().filter(|family| !family.points.is_empty());
    let scope = ScopeMetrics {
        scope: Some(InstrumentationScope { name: "warren".to_owned(), ..Default::default() }),
        metrics: metrics.map(|family| metric(family, nanos(meters.since()), now)).collect(),
        ..Default::default()
    };
    let mut scopes = vec![scope];
    if conventions {
        scopes.extend(meters.semantic_conventions().collect());
    }
    let attributes = meters.resource().iter().map(|(key, value)| attribute(key, value)).collect();
    let resource = Resource { attributes, ..Default::default() };
    ExportMetricsServiceRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: Some(resource),
            scope_metrics: scopes,
            ..Default::default()
        }],
    }
}

fn metric(family: &Family, since: u64, now: u64) -> Metric {
    let metric = family.metric;
    // What the kernel counts began before this process did; when is not known.
    let start = if metric.emitter == Emitter::Agent { 0 } else { since };
    let cumulative = AggregationTemporality::Cumulative.into();
    let is_native = family.points.iter().any(|point| matches!(&point.value, Value::Histogram { native: Some(_), .. }));
    let numbers = || family.points.iter().filter_map(|point| number(point, start, now)).collect();
    let data = match metric.kind {
        Kind::Counter => {
            Data::Sum(Sum { data_points: numbers(), aggregation_temporality: cumulative, is_monotonic: true })
        }
        Kind::Gauge => Data::Gauge(Gauge { data_points: numbers() }),
        Kind::Histogram if is_native => Data::ExponentialHistogram(ExponentialHistogram {
            data_points: family.points.iter().filter_map(|point| exponential(point, start, now)).collect(),
            aggregation_temporality: cumulative,
        }),
        Kind::Histogram => Data::Histogram(Histogram {
            data_points: family.points.iter().filter_map(|point| explicit(point, start, now)).collect(),
            aggregation_temporality: cumulative,
        }),
    };
    Metric {
        name: metric.name.to_owned(),
        description: metric.help.to_owned(),
        unit: metric.unit.to_owned(),
        data: Some(data),
        ..Default::default()
    }
}

fn attributes(point: &Point) -> Vec<KeyValue> {
    point.labels.iter().map(|(name, value)| attribute(name, value)).collect()
}

fn number(point: &Point, start: u64, now: u64) -> Option<NumberDataPoint> {
    let Value::Number(value) = point.value else { return None };
    Some(NumberDataPoint {
        attributes: attributes(point),
        start_time_unix_nano: start,
        time_unix_nano: now,
        value: Some(number_data_point::Value::AsDouble(value)),
        ..Default::default()
    })
}

fn explicit(point: &Point, start: u64, now: u64) -> Option<HistogramDataPoint> {
    let Value::Histogram { count, sum, buckets, .. } = &point.value else { return None };
    let mut before = 0;
    let mut counts = Vec::with_capacity(buckets.len() + 1);
    for (_, cumulative) in buckets {
        counts.push(cumulative - before);
        before = *cumulative;
    }
    counts.push(count - before);
    Some(HistogramDataPoint {
        attributes: attributes(point),
        start_time_unix_nano: start,
        time_unix_nano: now,
        count: *count,
        sum: Some(*sum),
        bucket_counts: counts,
        explicit_bounds: buckets.iter().map(|(bound, _)| *bound).collect(),
        ..Default::default()
    })
}

fn exponential(point: &Point, start: u64, now: u64) -> Option<ExponentialHistogramDataPoint> {
    let Value::Histogram { native: Some(Exponential { scale, offset, buckets, sum }), count, .. } = &point.value else {
        return None;
    };
    Some(ExponentialHistogramDataPoint {
        attributes: attributes(point),
        start_time_unix_nano: start,
        time_unix_nano: now,
        count: *count,
        sum: Some(*sum),
        scale: *scale,
        positive: Some(Buckets { offset: *offset, bucket_counts: buckets.clone() }),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{Measurement, Series, Source, signals::Identity};

    fn identity(service: &'static str) -> Identity {
        Identity { service, instance: "1".to_owned() }
    }

    struct Stops;

    impl Source for Stops {
        fn collect(&self) -> Vec<Series> {
            let histogram = Exponential { scale: 3, offset: -5, buckets: vec![1, 0, 2], sum: 1.5 };
            let labels = [("node", "a"), ("source", "kernel")];
            let name = "warren_container_stop_duration_seconds";
            vec![Series::new(name, &labels, Measurement::Histogram(histogram))]
        }
    }

    #[test]
    fn kernel_histograms_keep_their_buckets_and_others_their_bounds() {
        let meters = Meters::new(&identity("warren-manager"), &[Emitter::Manager, Emitter::Agent]);
        meters.add_source(Arc::new(Stops));
        let commit = meters.histogram("warren_raft_commit_duration_seconds");
        for seconds in [0.0004, 0.003, 100.0] {
            commit.record(seconds, &[]);
        }
        let request = request(&meters, false);
        let metrics = &request.resource_metrics[0].scope_metrics[0].metrics;
        let data = |name: &str| metrics.iter().find(|m| m.name == name).and_then(|m| m.data.clone()).expect("exported");
        let Data::ExponentialHistogram(stops) = data("warren_container_stop_duration_seconds") else {
            panic!("a kernel histogram is exponential");
        };
        let point = &stops.data_points[0];
        assert_eq!((point.count, point.scale), (3, 3));
        assert_eq!(point.positive.as_ref().map(|b| (b.offset, b.bucket_counts.clone())), Some((-5, vec![1, 0, 2])));
        let Data::Histogram(commits) = data("warren_raft_commit_duration_seconds") else {
            panic!("a histogram of the SDK is explicit");
        };
        let point = &commits.data_points[0];
        assert_eq!(point.bucket_counts.iter().sum::<u64>(), point.count);
        assert_eq!(point.bucket_counts.len(), point.explicit_bounds.len() + 1);
        assert_eq!(point.bucket_counts.last(), Some(&1));
    }

    #[test]
    fn conventional_metrics_are_a_second_set() {
        let meters = Meters::new(&identity("warren-manager"), &[Emitter::Both]);
        let status = opentelemetry::KeyValue::new("rpc.response.status_code", "OK");
        meters.rpc_server_call_duration().record(0.02, &[status]);
        let names = |conventions| -> Vec<String> {
            let request = request(&meters, conventions);
            let scopes = request.resource_metrics.into_iter().flat_map(|resource| resource.scope_metrics);
            scopes.flat_map(|scope| scope.metrics).map(|metric| metric.name).collect()
        };
        let own = names(false);
        assert!(own.iter().all(|name| !name.contains('.')), "{own:?}");
        let both = names(true);
        let second: Vec<_> = both.iter().filter(|name| name.contains('.')).map(String::as_str).collect();
        assert_eq!(
            second,
            [
                "process.cpu.time",
                "process.memory.usage",
                "process.memory.virtual",
                "process.thread.count",
                "process.unix.file_descriptor.count",
                "process.uptime",
                "rpc.server.call.duration"
            ]
        );
        assert_eq!(both.len(), own.len() + second.len());
    }

    #[test]
    fn what_the_environment_asks_for_is_done_or_refused() {
        let asked = |name: &'static str, value: &'static str| {
            check_environment(|variable| (variable == name).then(|| value.to_owned()))
                .map_err(|error| error.to_string())
        };
        assert_eq!(asked("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"), Ok(()));
        assert_eq!(asked("OTEL_EXPORTER_OTLP_PROTOCOL", ""), Ok(()));
        let refused = asked("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf").expect_err("refused");
        assert!(refused.starts_with("OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf: only grpc"), "{refused}");
        assert!(asked("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://x:1").is_err());
        assert!(asked("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca.pem").is_err());
        let refused = asked("OTEL_EXPORTER_OTLP_HEADERS", "key=secret").expect_err("refused");
        assert!(!refused.contains("secret"), "{refused}");
    }

    #[tokio::test]
    async fn a_silent_collector_keeps_nobody() {
        // It accepts and says nothing.
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let options = Options {
            endpoint: format!("http://{}", silent.local_addr().expect("an address")),
            interval: Duration::from_millis(10),
            semantic_conventions: false,
        };
        let meters = Meters::new(&identity("warren-agent"), &[Emitter::Agent]);
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let exporter = exporter(&options, meters, async move { drop(stopped.await) }).expect("an address");
        let running = tokio::spawn(exporter);
        let (_held, _) = silent.accept().await.expect("it connects");
        drop(stop);
        let ended = tokio::time::timeout(2 * LAST_TIMEOUT, running).await;
        assert!(ended.is_ok(), "it waits for the collector");
    }

    #[test]
    fn an_endpoint_is_an_http_address() {
        for endpoint in ["", "127.0.0.1:4317", "ftp://x", "https://x:1"] {
            let options = Options {
                endpoint: endpoint.to_owned(),
                interval: Duration::from_secs(1),
                semantic_conventions: false,
            };
            let meters = Meters::new(&identity("warren-agent"), &[Emitter::Agent]);
            assert!(exporter(&options, meters, async {}).is_err(), "{endpoint:?}");
        }
    }
}
