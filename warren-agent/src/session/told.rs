//! What the manager has been told of the node's telemetry, and so need not be told again.

use std::collections::HashMap;

use prost::Message as _;
use warren_proto::v1;
use warren_telemetry::{Key, Measurement, Series};

/// Bytes of series in one message: far below what a manager takes.
const MAX_PART: usize = 1 << 20;

/// What a manager was told in one session.
#[derive(Debug, Default)]
pub(super) struct Told(Option<HashMap<Key, Measurement>>);

impl Told {
    /// The snapshot that says how it is now, with the series whose values are others than before, or with all of them: at first,
    /// when one is gone, and for a manager that does not take less.
    ///
    /// What is too much for one message comes in several: those after the first are increments.
    pub(super) fn next(&mut self, series: Vec<Series>, takes_increments: bool) -> Vec<v1::TelemetrySnapshot> {
        let now: HashMap<_, _> = series.into_iter().map(Series::into_entry).collect();
        let before = self.0.take().filter(|before| takes_increments && before.keys().all(|key| now.contains_key(key)));
        let is_news =
            |entry: &(&Key, &Measurement)| before.as_ref().is_none_or(|known| known.get(entry.0) != Some(entry.1));
        let series = now.iter().filter(is_news).map(|entry| Series::of_entry(entry).to_proto());
        let begin = |incremental| v1::TelemetrySnapshot { incremental, ..Default::default() };
        let mut parts = vec![begin(before.is_some())];
        let mut bytes = 0;
        for series in series {
            let length = series.encoded_len();
            if takes_increments && bytes > 0 && bytes + length > MAX_PART {
                parts.push(begin(true));
                bytes = 0;
            }
            bytes += length;
            if let Some(part) = parts.last_mut() {
                part.series.push(series);
            }
        }
        self.0 = Some(now);
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(program: &str, count: f64) -> Series {
        Series::new("warren_probe_runs_total", &[("program", program)], Measurement::Counter(count))
    }

    #[test]
    fn what_is_too_much_for_one_message_comes_in_several() {
        let long = "x".repeat(1000);
        let many = || (0..5000).map(|i| series(&format!("{long}{i}"), 1.0)).collect::<Vec<_>>();
        let parts = Told::default().next(many(), true);
        assert!(parts.len() > 4 && parts.iter().all(|part| part.encoded_len() < 2 * MAX_PART), "{}", parts.len());
        assert_eq!(parts.iter().map(|part| part.series.len()).sum::<usize>(), 5000);
        assert!(!parts[0].incremental && parts[1..].iter().all(|part| part.incremental));
        assert_eq!(Told::default().next(many(), false).len(), 1, "who takes only all");
    }

    #[test]
    fn what_is_as_it_was_is_not_told_again() {
        let mut told = Told::default();
        let mut next = |series: Vec<Series>, takes_increments| {
            let [snapshot] = told.next(series, takes_increments).try_into().expect("one part");
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
