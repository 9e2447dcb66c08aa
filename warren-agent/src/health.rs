//! Health checks: each container is asked from its own network, by its own address, and only a change is told to anybody.

mod probe;
mod tracker;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::Semaphore;
use warren_agent_ebpf::histogram::Histogram;
use warren_proto::v1::{self, health_check::Check};
use warren_telemetry::{Measurement, Series, Source};

use crate::{probes::exponential, runtime::Containerd};
use probe::{Probe, kind, own_address};
pub(crate) use tracker::Health;
use tracker::Tracker;

/// What a service that does not say has.
const INTERVAL: Duration = Duration::from_secs(10);
const TIMEOUT: Duration = Duration::from_secs(5);
const RETRIES: u32 = 3;
/// While a container starts it is asked this often, so that it is known to be up soon after it is.
const STARTING_INTERVAL: Duration = Duration::from_millis(500);
/// Between reports of why a container that starts does not answer: each is an entry of the manager's log.
const RETOLD: Duration = Duration::from_secs(5);
/// A check in the container starts two processes: there are not too many at once.
const EXECS_PER_CORE: usize = 2;

/// What checks have found, by kind and result.
#[derive(Debug, Default)]
struct Counts {
    checks: BTreeMap<(&'static str, &'static str), u64>,
    durations: BTreeMap<&'static str, Histogram>,
}

/// Checks of all containers. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Checks {
    counts: Arc<Mutex<Counts>>,
    execs: Arc<Semaphore>,
}

/// A container to be checked.
pub(crate) struct Subject {
    pub(crate) containerd: Containerd,
    pub(crate) id: String,
    pub(crate) pid: u32,
    pub(crate) addresses: Vec<String>,
    pub(crate) check: v1::HealthCheck,
    /// As an earlier agent knew it.
    pub(crate) health: Health,
}

impl Checks {
    pub(crate) fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { counts: Arc::default(), execs: Arc::new(Semaphore::new(cores * EXECS_PER_CORE)) }
    }

    /// What they count.
    pub(crate) fn source(&self) -> Arc<dyn Source> {
        Arc::new(self.clone())
    }

    /// Checks a container for ever; `changed` hears when it is another now, and why. Ends when `changed` says so.
    pub(crate) async fn watch(self, subject: Subject, mut changed: impl FnMut(Health, String) -> bool) {
        let duration = |wire: Option<pbjson_types::Duration>, otherwise| {
            wire.and_then(|wire| Duration::try_from(wire).ok()).filter(|d| !d.is_zero()).unwrap_or(otherwise)
        };
        let Some(check) = subject.check.check.clone() else { return };
        let interval = duration(subject.check.interval, INTERVAL);
        let retries = if subject.check.retries == 0 { RETRIES } else { subject.check.retries };
        let start_period = duration(subject.check.start_period, Duration::ZERO);
        let mut tracker = Tracker::new(subject.health, retries, interval, start_period);
        let probe = Probe {
            namespace: PathBuf::from(format!("/proc/{}/ns/net", subject.pid)),
            address: own_address(&subject.addresses),
            timeout: duration(subject.check.timeout, TIMEOUT),
            containerd: subject.containerd,
            container: subject.id,
            check,
        };
        let began = Instant::now();
        let mut told = None;
        loop {
            let result = self.check(&probe).await;
            let now = tracker.on(result.is_ok(), began.elapsed());
            let why = result.err().unwrap_or_default();
            // What keeps it from being well is known before it is given up.
            let is_told =
                told.as_ref().is_some_and(|(known, at): &(String, Instant)| *known == why || at.elapsed() < RETOLD);
            if now.is_none() && tracker.health() == Health::Starting && !why.is_empty() && !is_told {
                changed(Health::Starting, why.clone());
                told = Some((why, Instant::now()));
            } else if let Some(health) = now
                && !changed(health, why)
            {
                return;
            }
            let pause = if tracker.health() == Health::Starting { interval.min(STARTING_INTERVAL) } else { interval };
            // Containers that were started together are not all asked together.
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.9..1.1))).await;
        }
    }

    async fn check(&self, probe: &Probe) -> Result<(), String> {
        let is_exec = matches!(probe.check, Check::Exec(_));
        // It is never closed.
        let _turn = if is_exec { self.execs.acquire().await.ok() } else { None };
        let began = Instant::now();
        let result = probe.run().await;
        let took = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let kind = kind(&probe.check);
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.checks.entry((kind, if result.is_ok() { "success" } else { "failure" })).or_default() += 1;
        counts.durations.entry(kind).or_insert(Histogram::EMPTY).observe(took);
        result
    }
}

impl Source for Checks {
    fn collect(&self) -> Vec<Series> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let checks = counts.checks.iter().map(|((kind, result), count)| {
            let labels = [("type", *kind), ("result", *result)];
            Series::new("warren_health_checks_total", &labels, Measurement::Counter(*count as f64))
        });
        let durations = counts.durations.iter().map(|(kind, histogram)| {
            let value = Measurement::Histogram(exponential(histogram));
            Series::new("warren_health_check_duration_seconds", &[("type", *kind)], value)
        });
        checks.chain(durations).collect()
    }
}
