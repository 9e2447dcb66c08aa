//! What the agent times itself: the phases of bringing a container up and, where there are no probes, its create, start and
//! stop around the runtime's calls, marked `source="runtime"`.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use warren_agent_ebpf::histogram::Histogram;
use warren_telemetry::{Measurement, Series, Source};

use crate::probes::exponential;

/// A phase of bringing a container up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuntimePhase {
    /// Finding the image, and pulling it if it is not here.
    Pull,
    /// Making its layers and the container's snapshots.
    Unpack,
    /// Giving the container its network namespace and addresses.
    Network,
    /// Making its volumes available.
    Volumes,
    /// containerd's create, which starts the shim and executes the runtime's create.
    Create,
    /// containerd's start.
    Start,
}

impl RuntimePhase {
    fn label(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Unpack => "unpack",
            Self::Volumes => "volumes",
            Self::Network => "network",
            Self::Create => "create",
            Self::Start => "start",
        }
    }
}

#[derive(Debug, Default)]
struct Recorded {
    phases: BTreeMap<RuntimePhase, Histogram>,
    operations: BTreeMap<&'static str, Histogram>,
    exits: BTreeMap<&'static str, u64>,
    failures: BTreeMap<&'static str, u64>,
}

/// Histograms and counts of this agent's run.
#[derive(Debug)]
pub struct Timings {
    /// Whether there are no probes to time operations better.
    stand_in: bool,
    recorded: Mutex<Recorded>,
}

const CREATE: &str = "warren_container_create_duration_seconds";
const START: &str = "warren_container_start_duration_seconds";
const STOP: &str = "warren_container_stop_duration_seconds";

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Timings {
    /// Nothing recorded yet. With `stand_in`, operations are recorded too, because no probe does it.
    #[must_use]
    pub fn new(stand_in: bool) -> Self {
        Self { stand_in, recorded: Mutex::default() }
    }

    fn record(&self, change: impl FnOnce(&mut Recorded)) {
        change(&mut self.recorded.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A phase ended.
    pub fn phase(&self, phase: RuntimePhase, took: Duration) {
        self.record(|recorded| {
            recorded.phases.entry(phase).or_insert(Histogram::EMPTY).observe(ns(took));
            let operation = match phase {
                RuntimePhase::Pull | RuntimePhase::Unpack | RuntimePhase::Network | RuntimePhase::Volumes => return,
                RuntimePhase::Create => CREATE,
                RuntimePhase::Start => START,
            };
            if self.stand_in {
                recorded.operations.entry(operation).or_insert(Histogram::EMPTY).observe(ns(took));
            }
        });
    }

    /// A stop ended.
    pub fn stopped(&self, took: Duration) {
        if self.stand_in {
            self.record(|recorded| {
                recorded.operations.entry(STOP).or_insert(Histogram::EMPTY).observe(ns(took));
            });
        }
    }

    /// A container ended.
    pub fn exited(&self, code: i32, stopped: bool) {
        if self.stand_in {
            let reason = match code {
                0 => "completed",
                128.. if stopped => "killed",
                _ => "error",
            };
            self.record(|recorded| *recorded.exits.entry(reason).or_default() += 1);
        }
    }

    /// A container could not be created, or not started.
    pub fn failed(&self, what: &'static str) {
        if self.stand_in {
            self.record(|recorded| *recorded.failures.entry(what).or_default() += 1);
        }
    }
}

impl Source for Timings {
    fn collect(&self) -> Vec<Series> {
        let recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        let mut series = Vec::new();
        for (phase, histogram) in &recorded.phases {
            series.push(Series::new(
                "warren_container_phase_duration_seconds",
                &[("phase", phase.label())],
                Measurement::Histogram(exponential(histogram)),
            ));
        }
        for (metric, histogram) in &recorded.operations {
            series.push(Series::new(metric, &[("source", "runtime")], Measurement::Histogram(exponential(histogram))));
        }
        let mut count = |metric, counts: &BTreeMap<&'static str, u64>| {
            for (reason, count) in counts {
                series.push(Series::new(metric, &[("reason", reason)], Measurement::Counter(*count as f64)));
            }
        };
        count("warren_container_exits_total", &recorded.exits);
        count("warren_container_start_failures_total", &recorded.failures);
        series
    }
}
