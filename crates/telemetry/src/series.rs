use std::sync::Arc;

use warren_proto::v1;

use crate::table::{self, Kind, Metric};

/// A histogram of base-2 exponential buckets, as the kernel aggregates it.
#[derive(Clone, Debug, PartialEq)]
pub struct Exponential {
    /// Buckets double every `2^scale`.
    pub scale: i32,
    /// OpenTelemetry's index of `buckets[0]`: it holds `(base^offset, base^(offset+1)]`, `base = 2^(2^-scale)`.
    pub offset: i32,
    /// Observations by bucket. The count is their sum: kept apart, the two could disagree, and Prometheus refuses a whole
    /// scrape over one such histogram.
    pub buckets: Vec<u64>,
    /// Sum of all observations, in the metric's unit.
    pub sum: f64,
}

impl Exponential {
    /// How many observations there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Observations up to and including `bound`. Exact when `bound` is one of the bucket boundaries.
    #[must_use]
    pub fn count_up_to(&self, bound: f64) -> u64 {
        let per_octave = 2f64.powi(self.scale);
        // Bucket i ends at 2^((offset + i + 1) / per_octave). The epsilon absorbs the logarithm's rounding.
        let last = (bound.log2() * per_octave + 1e-9).floor() as i64 - 1 - i64::from(self.offset);
        let included = usize::try_from(last + 1).unwrap_or(0).min(self.buckets.len());
        self.buckets[..included].iter().sum()
    }
}

/// What a [`Series`] says.
#[derive(Clone, Debug, PartialEq)]
pub enum Measurement {
    /// A count since the series began.
    Counter(f64),
    /// A value now.
    Gauge(f64),
    /// Pre-aggregated observations.
    Histogram(Exponential),
}

/// What tells a series from others: its metric, and its labels with their values, sorted by label.
pub type Key = (&'static str, Vec<(String, String)>);

/// One series of a metric in the [`table`], made outside the OpenTelemetry SDK.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// The metric.
    pub metric: &'static str,
    /// Its labels with their values, sorted by label.
    pub labels: Vec<(String, String)>,
    /// Its value.
    pub value: Measurement,
}

impl Series {
    /// A series; labels may come in any order.
    #[must_use]
    pub fn new(metric: &'static str, labels: &[(&str, &str)], value: Measurement) -> Self {
        let mut labels: Vec<_> = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        labels.sort();
        Self { metric, labels, value }
    }

    /// The series with one more label.
    #[must_use]
    pub fn with_label(mut self, label: &str, value: &str) -> Self {
        self.labels.push((label.to_owned(), value.to_owned()));
        self.labels.sort();
        self
    }

    /// What tells it from others, and its value.
    #[must_use]
    pub fn into_entry(self) -> (Key, Measurement) {
        ((self.metric, self.labels), self.value)
    }

    /// The series of an entry.
    #[must_use]
    pub fn of_entry((key, value): (&Key, &Measurement)) -> Self {
        Self { metric: key.0, labels: key.1.clone(), value: value.clone() }
    }

    /// As it travels to the manager.
    #[must_use]
    pub fn to_proto(&self) -> v1::Series {
        v1::Series {
            metric: self.metric.to_owned(),
            labels: self.labels.iter().cloned().collect(),
            value: Some(match &self.value {
                Measurement::Counter(count) => v1::series::Value::Counter(*count as u64),
                Measurement::Gauge(value) => v1::series::Value::Gauge(*value),
                Measurement::Histogram(histogram) => v1::series::Value::Histogram(v1::ExponentialHistogram {
                    scale: histogram.scale,
                    offset: histogram.offset,
                    buckets: histogram.buckets.clone(),
                    sum: histogram.sum,
                }),
            }),
        }
    }

    /// As it arrived from an agent; `None` unless it is an agent's metric, of its kind, with its labels but `node`.
    #[must_use]
    pub fn from_proto(series: v1::Series) -> Option<Self> {
        let metric: &'static Metric = table::find(&series.metric)?;
        let expected = metric.labels.iter().filter(|label| **label != "node").count();
        let known = series.labels.iter().all(|(label, value)| {
            label != "node" && metric.labels.contains(&label.as_str()) && value.len() <= MAX_LABEL_VALUE
        });
        if metric.emitter != table::Emitter::Agent || !known || series.labels.len() != expected {
            return None;
        }
        let value = match (series.value?, metric.kind) {
            (v1::series::Value::Counter(count), Kind::Counter) => Measurement::Counter(count as f64),
            (v1::series::Value::Gauge(value), Kind::Gauge) => Measurement::Gauge(value),
            (v1::series::Value::Histogram(h), Kind::Histogram)
                if (-4..=8).contains(&h.scale) && h.buckets.len() <= 1024 && h.offset.abs() < 1 << 16 =>
            {
                Measurement::Histogram(Exponential { scale: h.scale, offset: h.offset, buckets: h.buckets, sum: h.sum })
            }
            _ => return None,
        };
        Some(Self { metric: metric.name, labels: series.labels.into_iter().collect(), value })
    }
}

/// Bytes that an entry takes in memory, about.
#[must_use]
pub fn weight((key, value): (&Key, &Measurement)) -> usize {
    let labels = key.1.iter().map(|(label, value)| size_of::<(String, String)>() + label.len() + value.len());
    let buckets = match value {
        Measurement::Counter(_) | Measurement::Gauge(_) => 0,
        Measurement::Histogram(histogram) => size_of_val(histogram.buckets.as_slice()),
    };
    size_of::<(Key, Measurement)>() + labels.sum::<usize>() + buckets
}

/// Bytes of a label's value as agents may send it: names of services, images and nodes are shorter.
const MAX_LABEL_VALUE: usize = 256;

/// Contributes series to an endpoint, computed at the scrape.
pub trait Source: Send + Sync {
    /// The series as they are now.
    fn collect(&self) -> Vec<Series>;
}

impl<S: Source + ?Sized> Source for Arc<S> {
    fn collect(&self) -> Vec<Series> {
        (**self).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_up_to_a_boundary_are_exact() {
        // One observation in the bucket that ends at 1 s (index -1), one in the next.
        let h = Exponential { scale: 3, offset: -1, buckets: vec![1, 1], sum: 2.0 };
        assert_eq!(h.count(), 2);
        assert_eq!(h.count_up_to(0.5), 0);
        assert_eq!(h.count_up_to(1.0), 1);
        assert_eq!(h.count_up_to(2.0), 2);
        assert_eq!(h.count_up_to(8.0), 2);
    }

    #[test]
    fn an_agent_cannot_invent_metrics_or_labels() {
        let series = |metric: &str, labels: &[(&str, &str)], value| v1::Series {
            metric: metric.to_owned(),
            labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            value: Some(value),
        };
        let one = || v1::series::Value::Counter(1);
        let good = series("warren_container_exits_total", &[("reason", "oom")], one());
        assert!(Series::from_proto(good).is_some());
        for bad in [
            series("warren_made_up_total", &[], one()),
            series("warren_raft_leader_changes_total", &[], one()),
            series("warren_container_exits_total", &[], one()),
            series("warren_container_exits_total", &[("reason", "oom"), ("node", "other")], one()),
            series("warren_container_exits_total", &[("secret", "x")], one()),
            series("warren_container_exits_total", &[("reason", &"x".repeat(300))], one()),
            series("warren_container_exits_total", &[("reason", "oom")], v1::series::Value::Gauge(1.0)),
        ] {
            assert_eq!(Series::from_proto(bad.clone()), None, "{bad:?}");
        }
    }
}
