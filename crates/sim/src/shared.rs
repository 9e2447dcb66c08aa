//! What machines and the world around them know of each other, beyond what goes over wires.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use warren_manager::state::State;
use warren_raft::Node;

use crate::history::Call;

#[derive(Default)]
struct Inner {
    managers: BTreeMap<u64, Running>,
    heard: BTreeMap<u64, BTreeSet<String>>,
    members: BTreeSet<u64>,
    calls: Vec<Call>,
    calm: bool,
    /// Operators that have said all that they had to say.
    operators_done: u64,
    /// Containers that have come to run.
    started: u64,
    /// What should not have happened.
    failure: Option<String>,
    /// For who is outside the simulation.
    now: Duration,
    trace: Sha256,
    says: bool,
}

/// Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Shared(Arc<Mutex<Inner>>);

impl Shared {
    pub(crate) fn new(members: BTreeSet<u64>, says: bool) -> Self {
        Self(Arc::new(Mutex::new(Inner { members, says, ..Inner::default() })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_now(&self, now: Duration) {
        self.inner().now = now;
    }

    /// Notes what happened, in order: two runs of a seed must note the same.
    pub(crate) fn trace(&self, what: String) {
        let mut inner = self.inner();
        let at = turmoil::sim_elapsed().unwrap_or(inner.now);
        let at = format!("{:>9.3} ", at.as_secs_f64());
        inner.trace.update(at.as_bytes());
        inner.trace.update(what.as_bytes());
        if inner.says {
            println!("{at}{what}");
        }
    }

    /// What tells this run from another.
    pub(crate) fn digest(&self) -> String {
        let digest = self.inner().trace.clone().finalize();
        digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }

    pub(crate) fn manager_runs(&self, id: u64, running: Running) {
        self.inner().managers.insert(id, running);
    }

    pub(crate) fn manager_crashed(&self, id: u64) {
        let mut inner = self.inner();
        inner.managers.remove(&id);
        inner.heard.remove(&id);
    }

    /// The managers that run.
    pub(crate) fn managers(&self) -> BTreeMap<u64, Running> {
        self.inner().managers.clone()
    }

    /// Which agents a manager hears.
    pub(crate) fn hears(&self, id: u64, agents: BTreeSet<String>) {
        self.inner().heard.insert(id, agents);
    }

    pub(crate) fn heard(&self, id: u64) -> BTreeSet<String> {
        self.inner().heard.get(&id).cloned().unwrap_or_default()
    }

    /// The managers that should be members.
    pub(crate) fn members(&self) -> BTreeSet<u64> {
        self.inner().members.clone()
    }

    pub(crate) fn set_members(&self, members: BTreeSet<u64>) {
        self.inner().members = members;
    }

    pub(crate) fn manager_names(&self) -> Vec<String> {
        self.inner().members.iter().map(|id| manager_name(*id)).collect()
    }

    pub(crate) fn record(&self, call: Call) {
        self.inner().calls.push(call);
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        self.inner().calls.clone()
    }

    pub(crate) fn operator_is_done(&self) {
        self.inner().operators_done += 1;
    }

    pub(crate) fn operators_done(&self) -> u64 {
        self.inner().operators_done
    }

    pub(crate) fn container_started(&self) {
        self.inner().started += 1;
    }

    pub(crate) fn started(&self) -> u64 {
        self.inner().started
    }

    /// Ends the run: this should not have happened.
    pub(crate) fn fail(&self, why: String) {
        self.inner().failure.get_or_insert(why);
    }

    pub(crate) fn failure(&self) -> Option<String> {
        self.inner().failure.clone()
    }

    /// No more faults, and no more than a few calls of operators.
    pub(crate) fn calm(&self) {
        self.inner().calm = true;
    }

    pub(crate) fn is_calm(&self) -> bool {
        self.inner().calm
    }
}

/// A manager that runs, seen from outside.
#[derive(Clone)]
pub(crate) struct Running {
    pub(crate) raft: Node,
    pub(crate) state: watch::Receiver<State>,
}

pub(crate) fn manager_name(id: u64) -> String {
    format!("m{id}")
}
