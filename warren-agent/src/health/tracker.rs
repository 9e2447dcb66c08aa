use std::time::Duration;

/// What a container's checks say of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    /// It has not answered yet, and has time to.
    Starting,
    /// It answers.
    Healthy,
    /// It has not answered several times in a row.
    Unhealthy,
}

/// From the results of checks to a container's health. Reads no clock: it is told how long the container has run.
#[derive(Clone, Debug)]
pub(crate) struct Tracker {
    health: Health,
    failures: u32,
    retries: u32,
    /// Between failures that count while a container starts, however often it is asked then.
    interval: Duration,
    /// How long it must have run for the next failure to count.
    counts_from: Duration,
}

impl Tracker {
    /// A container that is what an earlier agent found it to be, or that has just started.
    pub(crate) fn new(health: Health, retries: u32, interval: Duration, start_period: Duration) -> Self {
        Self { health, failures: 0, retries, interval, counts_from: interval.max(start_period) }
    }

    pub(crate) fn health(&self) -> Health {
        self.health
    }

    /// Takes a result, `up` after the container's start, and returns the health if it is another now. Until a container has
    /// answered once, failures within the start period do not count, nor more than one an interval.
    pub(crate) fn on(&mut self, passed: bool, up: Duration) -> Option<Health> {
        let before = self.health;
        if passed {
            self.failures = 0;
            self.health = Health::Healthy;
        } else if self.health != Health::Starting || up >= self.counts_from {
            self.failures += 1;
            self.counts_from = up + self.interval;
            if self.failures >= self.retries {
                self.health = Health::Unhealthy;
            }
        }
        (self.health != before).then_some(self.health)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn it_takes_several_failures_in_a_row() {
        let mut tracker = Tracker::new(Health::Starting, 3, S(1), S(0));
        assert_eq!(tracker.on(true, S(1)), Some(Health::Healthy));
        let results = [false, false, true, false, false, false, false, true];
        let changes: Vec<_> = results.into_iter().map(|passed| tracker.on(passed, S(9))).collect();
        let (bad, good) = (Some(Health::Unhealthy), Some(Health::Healthy));
        assert_eq!(changes, [None, None, None, None, None, bad, None, good]);
    }

    #[test]
    fn a_container_has_time_to_start_and_no_more_once_it_has() {
        let mut tracker = Tracker::new(Health::Starting, 1, S(1), S(10));
        assert_eq!(tracker.on(false, S(9)), None);
        assert_eq!(tracker.on(false, S(10)), Some(Health::Unhealthy));
        let mut tracker = Tracker::new(Health::Starting, 1, S(1), S(10));
        assert_eq!(tracker.on(true, S(2)), Some(Health::Healthy));
        assert_eq!(tracker.on(false, S(3)), Some(Health::Unhealthy), "its first answer ends the period");
    }

    #[test]
    fn while_it_starts_a_failure_an_interval_counts() {
        let mut tracker = Tracker::new(Health::Starting, 3, S(10), S(0));
        for half_seconds in 0..59 {
            assert_eq!(tracker.on(false, Duration::from_millis(500 * half_seconds)), None, "{half_seconds}");
        }
        assert_eq!(tracker.on(false, S(30)), Some(Health::Unhealthy));
    }
}
