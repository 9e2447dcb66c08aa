//! Histograms for the statistics that openraft and raft-log keep of themselves.
//!
//! This stands in for the published crate of the same name (`[patch.crates-io]` in the workspace's manifest), as much of it as
//! those two use. The published one computes tables for sixteen resolutions when the first histogram is made: 26 MB that stay,
//! where one resolution is used, and two thirds of an idle manager. Here a bucket's bounds are computed when they are asked for.
//!
//! Nothing of Warren's reads these statistics; what Warren measures is in `warren-telemetry`.

use std::{fmt, marker::PhantomData};

/// Buckets in each power of two, as a power of two itself: a bucket is at most a quarter of its lower bound wide.
const SUBDIVISION: u32 = 2;
/// Values below this have a bucket each.
const EXACT: u64 = 1 << SUBDIVISION;
const BUCKETS: usize = (64 - SUBDIVISION as usize) << SUBDIVISION | EXACT as usize;

/// Counts of values by size, in buckets that widen with the value. `T` is what the published crate's slots are marked with.
#[derive(Clone, PartialEq, Eq)]
pub struct Histogram<T = ()> {
    counts: Vec<u64>,
    marks: PhantomData<T>,
}

/// Which bucket a value is in.
fn bucket(value: u64) -> usize {
    if value < EXACT {
        return value as usize;
    }
    let exponent = value.ilog2();
    let within = (value >> (exponent - SUBDIVISION)) & (EXACT - 1);
    (((exponent - SUBDIVISION + 1) as usize) << SUBDIVISION) + within as usize
}

/// The least value of a bucket, and how many values it has.
fn bounds(bucket: usize) -> (u64, u64) {
    let octave = (bucket >> SUBDIVISION) as u32;
    let within = bucket as u64 & (EXACT - 1);
    match octave {
        0 => (within, 1),
        _ => ((EXACT + within) << (octave - 1), 1 << (octave - 1)),
    }
}

impl<T> Histogram<T> {
    /// One without values.
    #[must_use]
    pub fn new() -> Self {
        Self { counts: Vec::new(), marks: PhantomData }
    }

    /// Counts a value.
    pub fn record(&mut self, value: u64) {
        self.record_n(value, 1);
    }

    /// Counts a value `n` times.
    pub fn record_n(&mut self, value: u64, n: u64) {
        if self.counts.is_empty() {
            self.counts = vec![0; BUCKETS];
        }
        let count = &mut self.counts[bucket(value)];
        *count = count.saturating_add(n);
    }

    /// How many values were counted.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// An estimate of the value that the share `p` of all values does not exceed; 0 without values.
    #[must_use]
    pub fn percentile(&self, p: f64) -> u64 {
        let rank = ((self.total() as f64 * p).ceil() as u64).max(1);
        let mut before = 0u64;
        for (bucket, count) in self.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            if before.saturating_add(*count) >= rank {
                let (least, width) = bounds(bucket);
                // Values are taken to be spread evenly over their bucket.
                let share = (rank - before) as f64 / *count as f64;
                return least + ((width - 1) as f64 * share) as u64;
            }
            before += count;
        }
        0
    }

    /// The usual percentiles.
    #[must_use]
    pub fn percentile_stats(&self) -> PercentileStats {
        PercentileStats {
            samples: self.total(),
            p0_1: self.percentile(0.001),
            p1: self.percentile(0.01),
            p5: self.percentile(0.05),
            p10: self.percentile(0.1),
            p50: self.percentile(0.5),
            p90: self.percentile(0.9),
            p99: self.percentile(0.99),
            p99_9: self.percentile(0.999),
        }
    }
}

impl<T> Default for Histogram<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> fmt::Debug for Histogram<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Histogram").field("percentiles", &self.percentile_stats()).finish_non_exhaustive()
    }
}

/// Percentiles of a [`Histogram`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "a field's name is its meaning")]
pub struct PercentileStats {
    pub samples: u64,
    pub p0_1: u64,
    pub p1: u64,
    pub p5: u64,
    pub p10: u64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p99_9: u64,
}

impl fmt::Display for PercentileStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { samples, p10, p50, p90, p99, p99_9, .. } = self;
        write!(f, "{samples} samples, p10 {p10}, p50 {p50}, p90 {p90}, p99 {p99}, p99.9 {p99_9}")
    }
}

/// Several histograms to be shown together: a line each.
#[derive(Clone, Debug, Default)]
pub struct AsciiChart {
    lines: Vec<(String, PercentileStats)>,
}

impl AsciiChart {
    /// One without histograms.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a histogram under a name.
    #[must_use]
    pub fn add(mut self, name: impl Into<String>, histogram: Histogram) -> Self {
        self.lines.push((name.into(), histogram.percentile_stats()));
        self
    }
}

impl fmt::Display for AsciiChart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines.iter().try_for_each(|(name, stats)| writeln!(f, "{name}: {stats}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_one_another_and_hold_their_values() {
        let mut next = 0u128;
        for index in 0..BUCKETS {
            let (least, width) = bounds(index);
            assert_eq!(u128::from(least), next, "bucket {index}");
            assert_eq!((bucket(least), bucket(least + (width - 1))), (index, index));
            next = u128::from(least) + u128::from(width);
        }
        assert_eq!(next, 1 << 64);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_within_a_quarter() {
        let mut histogram = Histogram::<()>::new();
        assert_eq!(histogram.percentile(0.5), 0);
        for value in 1..=10_000 {
            histogram.record(value);
        }
        histogram.record_n(1_000_000, 10);
        assert_eq!(histogram.total(), 10_010);
        let stats = histogram.percentile_stats();
        for (found, exact) in [(stats.p10, 1001), (stats.p50, 5005), (stats.p90, 9009)] {
            assert!(found.abs_diff(exact) <= exact / 4, "{found} for {exact}");
        }
        assert!(histogram.percentile(1.0).abs_diff(1_000_000) <= 250_000);
    }
}
