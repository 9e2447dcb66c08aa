//! The protobuf exposition: `io.prometheus.client.MetricFamily`, length-delimited.
//!
//! The messages are Prometheus's own (`io/prometheus/client/metrics.proto` of prometheus/client_model), with the fields
//! that Warren writes.

use prost::Message as _;

use crate::{
    family::{Family, Value},
    series::Exponential,
    table::Kind,
};

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct LabelPair {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) value: String,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Number {
    #[prost(double, tag = "1")]
    pub(super) value: f64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(super) struct Bucket {
    #[prost(uint64, tag = "1")]
    pub(super) cumulative_count: u64,
    #[prost(double, tag = "2")]
    pub(super) upper_bound: f64,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, prost::Message)]
pub(super) struct BucketSpan {
    #[prost(sint32, tag = "1")]
    pub(super) offset: i32,
    #[prost(uint32, tag = "2")]
    pub(super) length: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Histogram {
    #[prost(uint64, tag = "1")]
    pub(super) sample_count: u64,
    #[prost(double, tag = "2")]
    pub(super) sample_sum: f64,
    #[prost(message, repeated, tag = "3")]
    pub(super) bucket: Vec<Bucket>,
    #[prost(sint32, tag = "5")]
    pub(super) schema: i32,
    #[prost(double, tag = "6")]
    pub(super) zero_threshold: f64,
    #[prost(message, repeated, tag = "12")]
    pub(super) positive_span: Vec<BucketSpan>,
    #[prost(sint64, repeated, tag = "13")]
    pub(super) positive_delta: Vec<i64>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Metric {
    #[prost(message, repeated, tag = "1")]
    pub(super) label: Vec<LabelPair>,
    #[prost(message, optional, tag = "2")]
    pub(super) gauge: Option<Number>,
    #[prost(message, optional, tag = "3")]
    pub(super) counter: Option<Number>,
    #[prost(message, optional, tag = "7")]
    pub(super) histogram: Option<Histogram>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct MetricFamily {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) help: String,
    #[prost(enumeration = "MetricType", tag = "3")]
    pub(super) r#type: i32,
    #[prost(message, repeated, tag = "4")]
    pub(super) metric: Vec<Metric>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(super) enum MetricType {
    Counter = 0,
    Gauge = 1,
    Histogram = 4,
}

/// Prometheus takes a histogram without observations for a classic one unless its zero bucket has a width. This is
/// client_golang's.
const ZERO_THRESHOLD: f64 = 2.938_735_877_055_719e-39;

pub(super) fn encode(families: &[Family]) -> Vec<u8> {
    let mut out = Vec::new();
    for family in families.iter().filter(|family| !family.points.is_empty()) {
        convert(family).encode_length_delimited(&mut out).expect("a Vec grows as needed");
    }
    out
}

pub(super) fn convert(family: &Family) -> MetricFamily {
    let kind = family.metric.kind;
    let metric = family
        .points
        .iter()
        .map(|point| {
            let label = point
                .labels
                .iter()
                .map(|(name, value)| LabelPair { name: name.clone(), value: value.clone() })
                .collect();
            let mut metric = Metric { label, ..Metric::default() };
            match &point.value {
                Value::Number(value) if kind == Kind::Counter => metric.counter = Some(Number { value: *value }),
                Value::Number(value) => metric.gauge = Some(Number { value: *value }),
                Value::Histogram { count, sum, buckets, native } => {
                    metric.histogram = Some(histogram(*count, *sum, buckets, native.as_ref()));
                }
            }
            metric
        })
        .collect();
    let r#type = match kind {
        Kind::Counter => MetricType::Counter,
        Kind::Gauge => MetricType::Gauge,
        Kind::Histogram => MetricType::Histogram,
    };
    MetricFamily {
        name: family.metric.name.to_owned(),
        help: family.metric.help.to_owned(),
        r#type: r#type.into(),
        metric,
    }
}

fn histogram(count: u64, sum: f64, buckets: &[(f64, u64)], native: Option<&Exponential>) -> Histogram {
    let bucket = buckets
        .iter()
        .map(|(upper_bound, cumulative_count)| Bucket {
            cumulative_count: *cumulative_count,
            upper_bound: *upper_bound,
        })
        .collect();
    let mut histogram = Histogram { sample_count: count, sample_sum: sum, bucket, ..Histogram::default() };
    if let Some(native) = native {
        histogram.schema = native.scale;
        histogram.zero_threshold = ZERO_THRESHOLD;
        // Prometheus names a bucket by its upper bound, OpenTelemetry by its lower one.
        (histogram.positive_span, histogram.positive_delta) = spans(native.offset + 1, &native.buckets);
    }
    histogram
}

/// Gaps up to this many empty buckets are bridged: a span costs more than the zeros.
const BRIDGED_GAP: i32 = 2;

/// Bucket counts as spans of consecutive buckets and differences of their counts; `counts[0]` has index `first`. A span's
/// offset is absolute for the first and relative to the end of the previous for the others.
pub(super) fn spans(first: i32, counts: &[u64]) -> (Vec<BucketSpan>, Vec<i64>) {
    let mut spans: Vec<BucketSpan> = Vec::new();
    let mut deltas = Vec::new();
    let mut previous = 0i64;
    let mut next = 0i32;
    for (index, count) in (first..).zip(counts) {
        if *count == 0 {
            continue;
        }
        match spans.last_mut() {
            Some(span) if index - next <= BRIDGED_GAP => {
                for _ in next..index {
                    span.length += 1;
                    deltas.push(-previous);
                    previous = 0;
                }
                span.length += 1;
            }
            Some(_) => spans.push(BucketSpan { offset: index - next, length: 1 }),
            None => spans.push(BucketSpan { offset: index, length: 1 }),
        }
        deltas.push(*count as i64 - previous);
        previous = *count as i64;
        next = index + 1;
    }
    if spans.is_empty() {
        // An empty span is what marks a native histogram without observations.
        spans.push(BucketSpan { offset: 0, length: 0 });
    }
    (spans, deltas)
}
