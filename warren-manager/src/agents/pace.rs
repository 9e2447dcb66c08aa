//! How often something may be done: so many times at once, and once more after each pause.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// So many times at once, and once more after each pause.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Times at once.
    pub burst: u32,
    /// Between the others.
    pub pause: Duration,
}

/// What is left of one's pace.
#[derive(Debug)]
pub(crate) struct Allowance {
    pace: Pace,
    left: f64,
    at: Instant,
}

impl Allowance {
    pub(crate) fn new(pace: Pace) -> Self {
        Self { pace, left: f64::from(pace.burst), at: Instant::now() }
    }

    /// Adds what time has brought.
    fn earn(&mut self) {
        let now = Instant::now();
        let earned = (now - self.at).as_secs_f64() / self.pace.pause.as_secs_f64();
        self.left = (self.left + earned).min(f64::from(self.pace.burst));
        self.at = now;
    }

    /// Once more, if that is allowed by now.
    fn take(&mut self) -> bool {
        self.earn();
        let allowed = self.left >= 1.0;
        if allowed {
            self.left -= 1.0;
        }
        allowed
    }

    /// Takes so many at once, and waits until that is allowed.
    pub(crate) async fn wait_for(&mut self, count: u32) {
        self.earn();
        self.left -= f64::from(count.min(self.pace.burst));
        if self.left < 0.0 {
            tokio::time::sleep(self.pace.pause.mul_f64(-self.left)).await;
        }
    }

    fn is_whole(&mut self) -> bool {
        self.earn();
        self.left >= f64::from(self.pace.burst)
    }
}

/// The same pace for each of many. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Paces<K> {
    pace: Pace,
    each: Arc<Mutex<Each<K>>>,
}

#[derive(Debug)]
struct Each<K> {
    of: HashMap<K, Allowance>,
    /// With so many, those whose allowance is whole are forgotten.
    tidy_at: usize,
}

const TIDY: usize = 1024;

impl<K: Clone + Eq + Hash> Paces<K> {
    pub(crate) fn new(pace: Pace) -> Self {
        Self { pace, each: Arc::new(Mutex::new(Each { of: HashMap::new(), tidy_at: TIDY })) }
    }

    /// Whether this one may once more; counts it if so.
    pub(crate) fn allows(&self, whose: &K) -> bool {
        // Every change leaves it whole.
        let mut each = self.each.lock().unwrap_or_else(PoisonError::into_inner);
        if each.of.len() >= each.tidy_at {
            each.of.retain(|_, allowance| !allowance.is_whole());
            each.tidy_at = TIDY.max(each.of.len() * 2);
        }
        each.of.entry(whose.clone()).or_insert_with(|| Allowance::new(self.pace)).take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace = Pace { burst: 3, pause: Duration::from_secs(2) };

    #[tokio::test(start_paused = true)]
    async fn each_has_its_own() {
        let paces = Paces::new(PACE);
        let allowed: Vec<_> = (0..5).map(|_| paces.allows(&"a")).collect();
        assert_eq!(allowed, [true, true, true, false, false]);
        assert!(paces.allows(&"b"));
        tokio::time::advance(Duration::from_secs(2)).await;
        assert!(paces.allows(&"a") && !paces.allows(&"a"));
        tokio::time::advance(Duration::from_secs(60)).await;
        let allowed: Vec<_> = (0..4).map(|_| paces.allows(&"a")).collect();
        assert_eq!(allowed, [true, true, true, false], "no more is earned than is allowed at once");
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_are_quiet_are_forgotten() {
        let paces = Paces::new(PACE);
        for number in 0..TIDY {
            assert!(paces.allows(&number));
        }
        tokio::time::advance(Duration::from_secs(10)).await;
        assert!(paces.allows(&TIDY));
        assert_eq!(paces.each.lock().expect("whole").of.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_none_left_waits() {
        let mut allowance = Allowance::new(PACE);
        let began = Instant::now();
        for _ in 0..3 {
            allowance.wait_for(1).await;
        }
        assert_eq!(began.elapsed(), Duration::ZERO);
        allowance.wait_for(2).await;
        assert_eq!(began.elapsed().as_secs(), 4);
        allowance.wait_for(1000).await;
        assert_eq!(began.elapsed().as_secs(), 10, "never longer than for all of it");
    }
}
