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
}

/// The same as flags of a command.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct OtlpArguments {
    /// Push metrics to this OTLP collector too, like http://127.0.0.1:4317.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<String>,
    /// Seconds between pushes.
    #[arg(long, env = "WARREN_OTLP_INTERVAL_S", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..))]
    pub otlp_interval_s: u64,
}

impl OtlpArguments {
    /// As the exporter wants them; `None` when nothing is to be pushed.
    #[must_use]
    pub fn options(&self) -> Option<Options> {
        let interval = Duration::from_secs(self.otlp_interval_s);
        let endpoint = self.otlp_endpoint.clone().filter(|endpoint| !endpoint.is_empty())?;
        Some(Options { endpoint, interval })
    }
}

/// The endpoint is not an address.
#[derive(Debug, thiserror::Error)]
#[error("{endpoint:?} is not an OTLP endpoint: use http://host:port")]
pub struct InvalidEndpoint {
    endpoint: String,
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A collector that takes longer gets the next snapshot instead.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

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
    let invalid = || InvalidEndpoint { endpoint: options.endpoint.clone() };
    let endpoint = Endpoint::from_shared(options.endpoint.clone()).map_err(|_| invalid())?;
    if endpoint.uri().scheme_str() != Some("http") {
        return Err(invalid());
    }
    let channel = endpoint.connect_timeout(CONNECT_TIMEOUT).timeout(EXPORT_TIMEOUT).connect_lazy();
    // A collector answers in the request's compression.
    let client = MetricsServiceClient::new(channel)
        .send_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Gzip);
    let interval = options.interval;
    Ok(async move {
        let exporter = Exporter { client, meters };
        let mut tick = tokio::time::interval(interval);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut shutdown = std::pin::pin!(shutdown);
        let mut works = true;
        loop {
            let last = tokio::select! {
                _ = tick.tick() => false,
                () = &mut shutdown => true,
            };
            let exported = exporter.export().await;
            // One line when it begins and one when it ends, however long the collector is away.
            match (&exported, works) {
                (Err(status), true) => tracing::warn!(why = status.message(), "metrics cannot be exported by OTLP"),
                (Ok(()), false) => tracing::info!("metrics are exported by OTLP again"),
                _ => {}
            }
            works = exported.is_ok();
            if last {
                return;
            }
        }
    })
}

struct Exporter {
    client: MetricsServiceClient<Channel>,
    meters: Meters,
}

impl Exporter {
    async fn export(&self) -> Result<(), tonic::Status> {
        let meters = self.meters.clone();
        // Collecting takes locks and reads maps: not for a thread that serves others.
        let request = tokio::task::spawn_blocking(move || request(&meters)).await;
        let request = request.map_err(|error| tonic::Status::internal(error.to_string()))?;
        let exported = self.client.clone().export(request).await.map(drop);
        self.meters.count_export(exported.is_ok());
        exported
    }
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
pub(crate) fn request(meters: &Meters) -> ExportMetricsServiceRequest {
    let now = nanos(SystemTime::now());
    let families = meters.families();
    let metrics = families.iter().filter(|family| !family.points.is_empty());
    let scope = ScopeMetrics {
        scope: Some(InstrumentationScope { name: "warren".to_owned(), ..Default::default() }),
        metrics: metrics.map(|family| metric(family, nanos(meters.since()), now)).collect(),
        ..Default::default()
    };
    let attributes = meters.resource().iter().map(|(key, value)| attribute(key, value)).collect();
    let resource = Resource { attributes, ..Default::default() };
    ExportMetricsServiceRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: Some(resource),
            scope_metrics: vec![scope],
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
    use crate::{Measurement, Series, Source};

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
        let meters = Meters::new("warren-manager", "1", &[Emitter::Manager, Emitter::Agent]);
        meters.add_source(Arc::new(Stops));
        let commit = meters.histogram("warren_raft_commit_duration_seconds");
        for seconds in [0.0004, 0.003, 100.0] {
            commit.record(seconds, &[]);
        }
        let request = request(&meters);
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
    fn an_endpoint_is_an_http_address() {
        for endpoint in ["", "127.0.0.1:4317", "ftp://x", "https://x:1"] {
            let options = Options { endpoint: endpoint.to_owned(), interval: Duration::from_secs(1) };
            let meters = Meters::new("warren-agent", "1", &[Emitter::Agent]);
            assert!(exporter(&options, meters, async {}).is_err(), "{endpoint:?}");
        }
    }
}
