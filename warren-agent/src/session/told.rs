//! What the manager has been told of the node's telemetry, and so need not be told again.

use std::collections::HashMap;

use warren_proto::v1;
use warren_telemetry::{Key, Measurement, Series};

/// What a manager was told in one session.
#[derive(Debug, Default)]
pub(super) struct Told(Option<HashMap<Key, Measurement>>);

impl Told {
    /// The snapshot that says how it is now, with the series whose values are others than before, or with all of them: at first,
    /// when one is gone, and for a manager that does not take less.
    pub(super) fn next(&mut self, series: Vec<Series>, takes_increments: bool) -> v1::TelemetrySnapshot {
        let now: HashMap<_, _> = series.into_iter().map(Series::into_entry).collect();
        let before = self.0.take().filter(|before| takes_increments && before.keys().all(|key| now.contains_key(key)));
        let is_news =
            |entry: &(&Key, &Measurement)| before.as_ref().is_none_or(|known| known.get(entry.0) != Some(entry.1));
        let series = now.iter().filter(is_news).map(|entry| Series::of_entry(entry).to_proto()).collect();
        self.0 = Some(now);
        v1::TelemetrySnapshot { series, incremental: before.is_some(), ..Default::default() }
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
