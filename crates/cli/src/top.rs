//! `warren top`.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use clap::Args;
use tokio::time::Instant;
use warren_proto::v1::{self, series::Value};

use crate::{
    client::ClientArguments,
    error::Error,
    output::{self, say},
    stats::{self, LookArguments, Nodes, Row, percentage},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    look: LookArguments,
}

/// What the probes timed is shown for this long.
const WINDOW: Duration = Duration::from_secs(60);

/// Observations by size, in exponential buckets.
#[derive(Clone, Debug, Default, PartialEq)]
struct Distribution {
    scale: i32,
    buckets: BTreeMap<i32, u64>,
}

impl Distribution {
    fn coarsen(&mut self, scale: i32) {
        let by = u32::try_from(self.scale - scale).unwrap_or(0).min(31);
        if by > 0 {
            let fine = std::mem::take(&mut self.buckets);
            for (index, count) in fine {
                *self.buckets.entry(index >> by).or_default() += count;
            }
            self.scale = scale;
        }
    }

    fn add(&mut self, histogram: &v1::ExponentialHistogram) {
        let buckets = (histogram.offset..).zip(histogram.buckets.iter().copied()).filter(|(_, count)| *count > 0);
        let mut other = Self { scale: histogram.scale, buckets: buckets.collect() };
        if self.buckets.is_empty() {
            *self = other;
            return;
        }
        let scale = self.scale.min(other.scale);
        self.coarsen(scale);
        other.coarsen(scale);
        for (index, count) in other.buckets {
            *self.buckets.entry(index).or_default() += count;
        }
    }

    /// What came since `before`; everything, when counting began anew.
    fn since(&self, before: &Self) -> Self {
        let fewer = |(index, count): (&i32, &u64)| self.buckets.get(index).is_none_or(|now| now < count);
        if self.scale != before.scale || before.buckets.iter().any(fewer) {
            return self.clone();
        }
        let news = |(index, count): (&i32, &u64)| (*index, count - before.buckets.get(index).copied().unwrap_or(0));
        Self { scale: self.scale, buckets: self.buckets.iter().map(news).filter(|(_, count)| *count > 0).collect() }
    }

    fn count(&self) -> u64 {
        self.buckets.values().sum()
    }

    /// The middle of the bucket in which the observation of this rank is.
    fn quantile(&self, quantile: f64) -> Option<f64> {
        let rank = (quantile * self.count() as f64).ceil().max(1.0) as u64;
        let mut counted = 0;
        let (index, _) = self.buckets.iter().find(|(_, count)| {
            counted += **count;
            counted >= rank
        })?;
        Some(((f64::from(*index) + 0.5) * 2f64.powi(-self.scale)).exp2())
    }
}

/// What a node's probes have counted.
#[derive(Clone, Debug, Default, PartialEq)]
struct Counts {
    start: Distribution,
    stop: Distribution,
    dns: Distribution,
    dns_failures: u64,
}

impl Counts {
    fn new(series: &[v1::Series]) -> Self {
        let mut counts = Self::default();
        // Where the kernel times, what the agent timed besides is not counted twice.
        let is_from = |series: &v1::Series, source| series.labels.get("source").is_some_and(|own| own == source);
        let kernel = series.iter().any(|series| is_from(series, "kernel"));
        for one in series.iter().filter(|series| !kernel || !is_from(series, "runtime")) {
            match (one.metric.as_str(), &one.value) {
                ("warren_container_start_duration_seconds", Some(Value::Histogram(h))) => counts.start.add(h),
                ("warren_container_stop_duration_seconds", Some(Value::Histogram(h))) => counts.stop.add(h),
                ("warren_dns_query_duration_seconds", Some(Value::Histogram(h))) => counts.dns.add(h),
                ("warren_dns_failures_total", Some(Value::Counter(count))) => counts.dns_failures += count,
                _ => {}
            }
        }
        counts
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            start: self.start.since(&before.start),
            stop: self.stop.since(&before.stop),
            dns: self.dns.since(&before.dns),
            dns_failures: self.dns_failures.checked_sub(before.dns_failures).unwrap_or(self.dns_failures),
        }
    }
}

/// What nodes have counted, from a window's length ago on.
#[derive(Debug, Default)]
struct History(BTreeMap<String, VecDeque<(Instant, Counts)>>);

impl History {
    /// What a node has counted in the window.
    fn lately(&mut self, node: &str, counts: Counts, now: Instant) -> Counts {
        let past = self.0.entry(node.to_owned()).or_default();
        while past.len() > 1 && past.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= WINDOW) {
            past.pop_front();
        }
        let lately = past.front().map_or_else(Counts::default, |(_, before)| counts.since(before));
        past.push_back((now, counts));
        lately
    }
}

/// How many, and how long the middle one and the slowest hundredth took.
fn shown(distribution: &Distribution) -> String {
    let ms = |quantile| distribution.quantile(quantile).map(|seconds| format!("{:.3}", seconds * 1000.0));
    match (ms(0.5), ms(0.99)) {
        (Some(median), Some(slow)) => format!("{}  {} / {} ms", distribution.count(), cut(&median), cut(&slow)),
        _ => "0".to_owned(),
    }
}

/// Three digits of a number are enough.
fn cut(number: &str) -> &str {
    let end = if number.find('.').is_some_and(|point| point >= 3) { number.find('.') } else { Some(4) };
    number[..end.unwrap_or(number.len()).min(number.len())].trim_end_matches('.')
}

fn node_lines(nodes: &Nodes, counts: &mut impl FnMut(&v1::NodeStats) -> Counts, since: &str) -> Vec<String> {
    let starts = format!("STARTS {since}");
    let header = ["NODE", "CPU", "MEMORY", "CONTAINERS", &starts, "STOPS", "DNS", "DNS FAILED"];
    output::render(
        header,
        nodes.all().map(|seen| {
            let node = seen.node();
            let counts = counts(&node);
            let memory = format!("{} / {}", stats::bytes(node.memory_bytes), stats::bytes(node.memory_total_bytes));
            [
                node.hostname.clone(),
                percentage(seen.cpu_percent()),
                memory,
                seen.latest.containers.len().to_string(),
                shown(&counts.start),
                shown(&counts.stop),
                shown(&counts.dns),
                counts.dns_failures.to_string(),
            ]
        }),
    )
}

pub(crate) async fn run(arguments: Arguments, client: &ClientArguments) -> Result<(), Error> {
    let mut history = History::default();
    let once = arguments.look.once;
    stats::look(client, None, &arguments.look, true, |nodes, screen| {
        let now = Instant::now();
        // At a single look there is no before: everything that was ever counted.
        let mut counts = |node: &v1::NodeStats| {
            let counts = Counts::new(&node.series);
            if once { counts } else { history.lately(&node.node_id, counts, now) }
        };
        let mut lines = node_lines(nodes, &mut counts, if once { "(ALL)" } else { "(LAST MINUTE)" });
        lines.push(String::new());
        let mut rows: Vec<Row> = nodes.rows();
        // The busiest first; else by name.
        rows.sort_by(|a, b| b.cpu_percent.unwrap_or(0.0).total_cmp(&a.cpu_percent.unwrap_or(0.0)));
        lines.extend(stats::table(&rows));
        match screen {
            Some(screen) => screen.show(&lines)?,
            None => lines.iter().for_each(|line| say!("{line}")),
        }
        Ok(())
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(scale: i32, offset: i32, buckets: &[u64]) -> v1::ExponentialHistogram {
        v1::ExponentialHistogram { scale, offset, buckets: buckets.to_vec(), sum: 0.0 }
    }

    #[test]
    fn distributions_of_any_scale_are_one() {
        let mut all = Distribution::default();
        // (1, 2], (2, 4]
        all.add(&histogram(0, 0, &[1, 2]));
        // (1, sqrt 2], (sqrt 2, 2], (2, 2 sqrt 2], (2 sqrt 2, 4], (4, 4 sqrt 2]
        all.add(&histogram(1, 0, &[1, 1, 0, 1, 5]));
        assert_eq!(all, Distribution { scale: 0, buckets: BTreeMap::from([(0, 3), (1, 3), (2, 5)]) });
        assert_eq!(all.count(), 11);
        let middle = |index: f64| Some((index + 0.5).exp2());
        assert_eq!([0.0, 0.5, 0.99].map(|quantile| all.quantile(quantile)), [middle(0.0), middle(1.0), middle(2.0)]);
        assert_eq!(Distribution::default().quantile(0.5), None);
    }

    #[test]
    fn the_window_is_what_came_in_it() {
        let series = |count: u64| v1::Series {
            metric: "warren_dns_query_duration_seconds".to_owned(),
            labels: BTreeMap::new(),
            value: Some(Value::Histogram(histogram(0, 3, &[count]))),
        };
        let counts = |count| Counts::new(&[series(count)]);
        let mut history = History::default();
        let begin = Instant::now();
        let mut at =
            |seconds, count| history.lately("n", counts(count), begin + Duration::from_secs(seconds)).dns.count();
        assert_eq!(at(0, 100), 0, "nothing was seen before");
        assert_eq!(at(30, 130), 30);
        assert_eq!(at(60, 150), 50);
        assert_eq!(at(95, 160), 30, "since 130, which was seen more than a minute ago");
        assert_eq!(at(100, 5), 5, "counting began anew");
    }

    #[test]
    fn what_the_agent_timed_is_shown_where_the_kernel_does_not() {
        let series = |source: &str, count: u64| v1::Series {
            metric: "warren_container_start_duration_seconds".to_owned(),
            labels: BTreeMap::from([("source".to_owned(), source.to_owned())]),
            value: Some(Value::Histogram(histogram(0, 3, &[count]))),
        };
        assert_eq!(Counts::new(&[series("runtime", 2)]).start.count(), 2);
        assert_eq!(Counts::new(&[series("runtime", 2), series("kernel", 3)]).start.count(), 3);
    }

    #[test]
    fn three_digits_are_shown() {
        assert_eq!(
            ["0.123", "1.234", "12.345", "123.456", "1234.567"].map(cut),
            ["0.12", "1.23", "12.3", "123", "1234"]
        );
    }
}
