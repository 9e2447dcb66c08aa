use std::collections::BTreeMap;

use prometheus::proto;

use crate::{
    series::{Exponential, Measurement, Series},
    table::{Kind, METRICS, Metric},
};

/// A metric with all its points, ready to be written in any exposition format.
#[derive(Clone, Debug)]
pub struct Family {
    /// Its definition.
    pub metric: &'static Metric,
    /// Its points, by labels.
    pub points: Vec<Point>,
}

/// One labelled value.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Labels with their values, sorted by label.
    pub labels: Vec<(String, String)>,
    /// The value.
    pub value: Value,
}

/// A point's value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A counter's or a gauge's.
    Number(f64),
    /// A histogram's.
    Histogram {
        /// Observations.
        count: u64,
        /// Their sum.
        sum: f64,
        /// Upper bounds with the observations up to them, without the infinite one.
        buckets: Vec<(f64, u64)>,
        /// The same in exponential buckets, where it was aggregated so.
        native: Option<Exponential>,
    },
}

/// What is logged of a sample that this process is not to have. The test of coverage looks for it.
const NOT_IN_TABLE: &str = "a sample is not in the table of metrics";
/// What is logged of a metric that nobody has contributed yet. The test of coverage looks for it.
const ASSUMED_ZERO: &str = "nobody has a sample yet: shown as zero";

/// Joins what the SDK gathered with what sources contributed, one family a metric of the table, by name. Families without
/// points yet are there too, so that a fresh endpoint shows all that an emitter may ever have.
pub(crate) fn assemble(
    gathered: Vec<proto::MetricFamily>,
    contributed: Vec<Series>,
    emits: impl Fn(&Metric) -> bool,
) -> Vec<Family> {
    let mut families: BTreeMap<&'static str, Family> = METRICS
        .iter()
        .filter(|metric| emits(metric))
        .map(|metric| (metric.name, Family { metric, points: Vec::new() }))
        .collect();
    for family in gathered {
        let Some(target) = families.get_mut(family.name()) else {
            tracing::error!(metric = family.name(), "{NOT_IN_TABLE}");
            continue;
        };
        target.points.extend(family.get_metric().iter().map(|metric| from_sdk(target.metric.kind, metric)));
    }
    for series in contributed {
        let Some(target) = families.get_mut(series.metric) else {
            tracing::error!(metric = series.metric, "{NOT_IN_TABLE}");
            continue;
        };
        target.points.push(from_series(target.metric, series));
    }
    for family in families.values_mut() {
        family.points.sort_by(|a, b| a.labels.cmp(&b.labels));
        if family.points.is_empty() && family.metric.labels.is_empty() {
            tracing::trace!(metric = family.metric.name, "{ASSUMED_ZERO}");
            family.points.push(Point { labels: Vec::new(), value: zero(family.metric) });
        }
    }
    families.into_values().collect()
}

fn zero(metric: &Metric) -> Value {
    match metric.kind {
        Kind::Counter | Kind::Gauge => Value::Number(0.0),
        Kind::Histogram => Value::Histogram {
            count: 0,
            sum: 0.0,
            buckets: metric.buckets.iter().map(|bound| (*bound, 0)).collect(),
            native: None,
        },
    }
}

fn from_sdk(kind: Kind, metric: &proto::Metric) -> Point {
    let labels = metric.get_label().iter().map(|pair| (pair.name().to_owned(), pair.value().to_owned())).collect();
    let value = match kind {
        Kind::Counter => Value::Number(metric.get_counter().get_value()),
        Kind::Gauge => Value::Number(metric.get_gauge().get_value()),
        Kind::Histogram => {
            let histogram = metric.get_histogram();
            Value::Histogram {
                count: histogram.get_sample_count(),
                sum: histogram.get_sample_sum(),
                buckets: histogram
                    .get_bucket()
                    .iter()
                    .filter(|bucket| bucket.upper_bound().is_finite())
                    .map(|bucket| (bucket.upper_bound(), bucket.cumulative_count()))
                    .collect(),
                native: None,
            }
        }
    };
    Point { labels, value }
}

fn from_series(metric: &Metric, series: Series) -> Point {
    let value = match series.value {
        Measurement::Counter(value) | Measurement::Gauge(value) => Value::Number(value),
        Measurement::Histogram(histogram) => Value::Histogram {
            count: histogram.count(),
            sum: histogram.sum,
            buckets: metric.buckets.iter().map(|bound| (*bound, histogram.count_up_to(*bound))).collect(),
            native: Some(histogram),
        },
    };
    Point { labels: series.labels, value }
}
