//! What the manager has been told of the node's telemetry, and so need not be told again.

use std::collections::HashMap;

use warren_proto::v1;
use warren_telemetry::{Measurement, Series};

type Key = (&'static str, Vec<(String, String)>);

/// What a manager was told in one session.
#[derive(Debug, Default)]
pub(super) struct Told(Option<HashMap<Key, Measurement>>);

impl Told {
    /// The snapshot that says how it is now, with the series whose values are others than before, or with all of them: at first,
    /// when one is gone, and for a manager that does not take less.
    pub(super) fn next(&mut self, series: Vec<Series>, takes_increments: bool) -> v1::TelemetrySnapshot {
        let all = || series.iter().map(Series::to_proto).collect();
        let is_another = |before: &HashMap<Key, Measurement>, series: &&Series| {
            // A lookup by parts of a key is not to be had.
            before.get(&(series.metric, series.labels.clone())) != Some(&series.value)
        };
        let changed = self.0.as_ref().filter(|_| takes_increments).and_then(|before| {
            let changed: Vec<_> = series.iter().filter(|series| is_another(before, series)).collect();
            let new = changed.iter().filter(|series| !before.contains_key(&(series.metric, series.labels.clone())));
            (before.len() + new.count() == series.len()).then(|| changed.into_iter().map(Series::to_proto).collect())
        });
        let incremental = changed.is_some();
        let sent = changed.unwrap_or_else(all);
        self.0 = Some(series.into_iter().map(|series| ((series.metric, series.labels), series.value)).collect());
        v1::TelemetrySnapshot { series: sent, incremental, ..Default::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(program: &str, count: f64) -> Series {
        Series::new("warren_probe_runs_total", &[("program", program)], Measurement::Counter(count))
    }

    #[test]
    fn what_is_as_it_was_is_not_told_again() {
        let mut told = Told::default();
        let mut next = |series: Vec<Series>, takes_increments| {
            let snapshot = told.next(series, takes_increments);
            let mut programs: Vec<_> =
                snapshot.series.into_iter().map(|series| series.labels["program"].clone()).collect();
            programs.sort();
            (programs.concat(), snapshot.incremental)
        };
        let all = || (String::from("ab"), false);
        assert_eq!(next(vec![series("a", 1.0), series("b", 1.0)], true), all(), "at first");
        assert_eq!(next(vec![series("a", 1.0), series("b", 1.0)], true), (String::new(), true));
        assert_eq!(next(vec![series("a", 1.0), series("b", 2.0)], true), ("b".to_owned(), true));
        assert_eq!(next(vec![series("c", 0.0), series("a", 1.0), series("b", 2.0)], true), ("c".to_owned(), true));
        assert_eq!(next(vec![series("a", 1.0), series("b", 2.0)], true), all(), "one is gone");
        assert_eq!(next(vec![series("d", 1.0), series("b", 2.0)], true), ("bd".to_owned(), false), "one for another");
        assert_eq!(
            next(vec![series("d", 1.0), series("b", 2.0)], false),
            ("bd".to_owned(), false),
            "who takes only all"
        );
    }
}
