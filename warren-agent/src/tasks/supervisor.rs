//! All containers of the node: follows the manager's assignments, adopts what is there, removes what is nobody's.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use warren_agent_ebpf::abi::{container::flag, group};
use warren_proto::v1::{self, AssignmentKind, ContainerState};

use super::{
    Board, Cache, CachedContainer, Ending, Timings,
    worker::{Beginning, NodeSettings, Registrar, Shared, Spawned, StopOptions, Worker},
};
use crate::{
    health::Checks,
    logs::Logs,
    network::Network,
    probes::{self, Groups, LifecycleEvent, Maps, Phase},
    runtime::{self, Containerd, Found, Images, TaskState},
    secrets::Secrets,
    volumes::Volumes,
};

/// What containers run with.
#[derive(Debug)]
pub struct Options {
    /// The daemon.
    pub containerd: Containerd,
    /// Where assignments and statuses are kept.
    pub cache: Cache,
    /// The agent's own timing.
    pub timings: Arc<Timings>,
    /// What the node gives them.
    pub node: NodeSettings,
    /// What connects them.
    pub network: Network,
    /// What they are made from.
    pub images: Images,
    /// What finds out whether they are well.
    pub(crate) checks: Checks,
    /// What they are given to know.
    pub secrets: Secrets,
    /// Where what they write goes.
    pub logs: Logs,
    /// What they keep.
    pub volumes: Volumes,
    /// The probes, if they work.
    pub probes: Option<(Arc<Maps>, Arc<Mutex<Groups>>)>,
}

/// Supervises the node's containers.
pub struct Supervisor {
    shared: Arc<Shared>,
    workers: BTreeMap<String, Spawned>,
    assigned: BTreeSet<String>,
    /// Found on the daemon and not yet known to be anybody's.
    found: HashMap<String, Found>,
    sequence: Option<u64>,
    /// Volumes that were deleted, as the manager says.
    deleted_volumes: BTreeSet<String>,
}

impl std::fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervisor").field("assigned", &self.assigned).finish_non_exhaustive()
    }
}

/// A message does not follow the ones before it: the session must begin anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("assignments apply to {applies_to}, this agent is at {at:?}")]
pub struct OutOfSequence {
    applies_to: u64,
    at: Option<u64>,
}

/// What is being done to containers.
#[derive(Clone, Debug)]
pub struct Actions {
    tracker: TaskTracker,
    stopping: CancellationToken,
}

impl Actions {
    /// Begins nothing else, interrupts pulls, and waits for the rest, `patience` at most: a call that is cut off while containerd
    /// deletes a task leaves the task's shim behind for good. Returns whether all came to its end.
    pub async fn end(&self, patience: Duration) -> bool {
        self.tracker.close();
        self.stopping.cancel();
        tokio::time::timeout(patience, self.tracker.wait()).await.is_ok()
    }
}

struct ProbeRegistrar(Arc<Maps>, Arc<Mutex<Groups>>);

impl Registrar for ProbeRegistrar {
    fn register(&self, id: &str, service: &str, stop_signal: u32) {
        let mut groups = self.1.lock().unwrap_or_else(PoisonError::into_inner);
        // SIGKILL always counts; see the programs.
        let group = groups.number(&self.0, service).unwrap_or_else(|error| {
            tracing::warn!(
                service,
                error = probes::describe(&error),
                "DNS queries are accounted to the overflow group"
            );
            group::OVERFLOW
        });
        if let Err(error) = self.0.register(id, group, 1 << (stop_signal & 63)) {
            tracing::warn!(container = id, error = probes::describe(&error), "a container is not timed in the kernel");
        }
    }

    fn unregister(&self, id: &str) {
        self.0.unregister(id);
    }
}

struct NoProbes;

impl Registrar for NoProbes {
    fn register(&self, _: &str, _: &str, _: u32) {}
    fn unregister(&self, _: &str) {}
}

fn ending_of(status: &v1::ContainerStatus) -> Option<Ending> {
    let code = status.exit_code;
    match status.state() {
        ContainerState::Complete => Some(Ending::Exited(code.unwrap_or(0))),
        ContainerState::Shutdown => Some(Ending::Stopped(code.unwrap_or(0))),
        ContainerState::Rejected => Some(Ending::Rejected(status.message.clone())),
        // Whatever its exit code: one that was stopped for being unhealthy may have ended with 0.
        ContainerState::Failed => Some(Ending::Failed(status.message.clone())),
        _ => None,
    }
}

impl Supervisor {
    /// Finds out what runs on the node, and adopts what an earlier agent was told to run. Nothing is started or stopped.
    ///
    /// # Errors
    ///
    /// When the daemon does not answer.
    pub async fn start(options: Options, board: Board) -> Result<Self, runtime::Error> {
        let registrar: Arc<dyn Registrar> = match &options.probes {
            Some((maps, groups)) => Arc::new(ProbeRegistrar(Arc::clone(maps), Arc::clone(groups))),
            None => Arc::new(NoProbes),
        };
        let shared = Arc::new(Shared {
            containerd: options.containerd,
            board,
            cache: options.cache,
            timings: options.timings,
            registrar,
            node: options.node,
            network: options.network,
            images: options.images,
            checks: options.checks,
            secrets: options.secrets,
            logs: options.logs,
            volumes: options.volumes,
            actions: TaskTracker::new(),
            stopping: CancellationToken::new(),
        });
        let found = shared.containerd.containers().await?;
        if let Some((maps, groups)) = &options.probes {
            seed(maps, groups, &found);
        }
        let mut supervisor = Self {
            shared,
            workers: BTreeMap::new(),
            assigned: BTreeSet::new(),
            found: found.into_iter().map(|found| (found.id.clone(), found)).collect(),
            sequence: None,
            deleted_volumes: BTreeSet::new(),
        };
        for CachedContainer { assignment, status } in supervisor.shared.cache.load() {
            supervisor.begin(assignment, Some(&status));
        }
        Ok(supervisor)
    }

    /// Follows a message of the manager.
    ///
    /// # Errors
    ///
    /// When messages in between are missing.
    pub fn assign(&mut self, message: v1::Assignments) -> Result<(), OutOfSequence> {
        let complete = message.kind() == AssignmentKind::Complete;
        if complete {
            let wanted: BTreeSet<_> = message.changed.iter().map(|a| a.container_id.clone()).collect();
            let gone: Vec<_> = self.assigned.difference(&wanted).cloned().collect();
            self.remove_all(&gone);
        } else if self.sequence != Some(message.applies_to) {
            return Err(OutOfSequence { applies_to: message.applies_to, at: self.sequence });
        }
        self.sequence = Some(message.results_in);
        self.remove_all(&message.removed);
        let renewed = self.shared.secrets.update(complete, message.secrets, &message.removed_secrets);
        if !renewed.is_empty() {
            self.workers.values().for_each(|worker| worker.renew(&renewed));
        }
        for assignment in message.changed {
            self.begin(assignment, None);
        }
        if !message.deleted_volumes.is_empty() {
            self.deleted_volumes.extend(message.deleted_volumes);
            self.remove_deleted_volumes();
        }
        if complete {
            self.remove_orphans();
        }
        Ok(())
    }

    /// A session ended; the next one begins with a complete set.
    pub fn disconnected(&mut self) {
        self.sequence = None;
    }

    fn begin(&mut self, assignment: v1::Assignment, cached: Option<&v1::ContainerStatus>) {
        let id = assignment.container_id.clone();
        let to_run = assignment.desired_state() != ContainerState::Removed;
        if !self.assigned.insert(id.clone()) {
            if !to_run && let Some(worker) = self.workers.get(&id) {
                worker.remove();
            }
            return;
        }
        self.shared.board.introduce(&id, &assignment.service_name, assignment.slot);
        if let Some(status) = cached {
            self.shared.board.update(&id, |known| *known = status.clone());
        }
        let found = self.found.remove(&id);
        let beginning = match beginning(found.as_ref(), cached) {
            // It was never begun, or nothing of it is left: it has ended.
            Beginning::New if !to_run => Beginning::Ended(Ending::Cancelled, None),
            beginning => beginning,
        };
        // What it was made with is on its record, an image's own signal included.
        let stop = found.as_ref().map(|found| StopOptions::from_labels(&found.labels));
        let worker = Worker::assigned(Arc::clone(&self.shared), assignment, beginning, stop);
        if !to_run {
            worker.remove();
        }
        self.workers.insert(id, worker);
    }

    fn remove_all(&mut self, ids: &[String]) {
        for id in ids {
            if self.assigned.remove(id)
                && let Some(worker) = self.workers.get(id)
            {
                worker.remove();
            }
        }
        self.reap();
    }

    /// Removes what was found on the daemon and is assigned to nobody.
    fn remove_orphans(&mut self) {
        for (id, found) in std::mem::take(&mut self.found) {
            tracing::info!(container = id, "removing a container that is assigned to nobody");
            let beginning = match found.task {
                Some((TaskState::Running | TaskState::Unknown, pid)) => Beginning::Running { pid },
                _ => Beginning::Ended(Ending::Cancelled, None),
            };
            let stop = StopOptions::from_labels(&found.labels);
            let worker = Worker::orphan(Arc::clone(&self.shared), id.clone(), stop, beginning);
            self.workers.insert(id, worker);
        }
    }

    /// Looks for containers that somebody else made in the namespace, and removes them. Does nothing before the manager has
    /// said what is assigned.
    ///
    /// # Errors
    ///
    /// When the daemon does not answer.
    pub async fn look_for_strangers(&mut self) -> Result<(), runtime::Error> {
        if self.sequence.is_some() {
            let known = |id: &String| self.workers.contains_key(id) || self.assigned.contains(id);
            let listed = self.shared.containerd.containers().await?;
            self.found = listed.into_iter().map(|f| (f.id.clone(), f)).filter(|(id, _)| !known(id)).collect();
            self.remove_orphans();
        }
        Ok(())
    }

    /// The daemon whose containers these are.
    #[must_use]
    pub fn containerd(&self) -> Containerd {
        self.shared.containerd.clone()
    }

    /// What is being done to containers now, for an agent that ends.
    #[must_use]
    pub fn actions(&self) -> Actions {
        Actions { tracker: self.shared.actions.clone(), stopping: self.shared.stopping.clone() }
    }

    /// Removes what is here of deleted volumes, apart from those that containers still have.
    fn remove_deleted_volumes(&self) {
        let (volumes, deleted) = (self.shared.volumes.clone(), self.deleted_volumes.clone());
        // It may be much: not on a thread that serves others.
        tokio::task::spawn_blocking(move || volumes.remove(&deleted));
    }

    /// Forgets containers that are gone and no longer assigned: the manager knows of their end.
    pub fn reap(&mut self) {
        let done: Vec<_> = self
            .workers
            .iter()
            .filter(|(id, worker)| worker.is_finished() && !self.assigned.contains(*id))
            .map(|(id, _)| id.clone())
            .collect();
        if !done.is_empty() && !self.deleted_volumes.is_empty() {
            // One of them had it.
            self.remove_deleted_volumes();
        }
        for id in done {
            self.workers.remove(&id);
            self.shared.board.forget(&id);
            self.shared.cache.remove(&id);
        }
    }
}

/// Where a worker begins, from what is on the daemon and what was noted before.
fn beginning(found: Option<&Found>, cached: Option<&v1::ContainerStatus>) -> Beginning {
    if let Some(ending) = cached.and_then(ending_of) {
        return Beginning::Ended(ending, None);
    }
    let ran = cached.is_some_and(|status| status.state() >= ContainerState::Running);
    match found.and_then(|found| found.task) {
        Some((TaskState::Running | TaskState::Unknown, pid)) => Beginning::Running { pid },
        Some((TaskState::Stopped { exit_code, at }, _)) => Beginning::Ended(Ending::Exited(exit_code), at),
        // It had run, and is gone: it must not run twice.
        _ if ran => Beginning::Ended(Ending::Failed("it ended while its agent was away".to_owned()), None),
        Some((TaskState::Created, _)) | None => Beginning::New,
    }
}

/// Enters running containers that the probes do not know, so that their stops are timed.
pub(crate) fn seed(maps: &Maps, groups: &Mutex<Groups>, found: &[Found]) {
    let mut groups = groups.lock().unwrap_or_else(PoisonError::into_inner);
    for container in found {
        let Some((TaskState::Running, pid)) = container.task else { continue };
        let Some(cgroup) = probes::cgroup_of(pid) else { continue };
        let service = runtime::service_label(&container.labels).unwrap_or("unknown");
        let signals = 1 << (StopOptions::from_labels(&container.labels).signal & 63);
        let seeded =
            groups.number(maps, service).and_then(|group| maps.seed(&container.id, cgroup, pid, group, signals));
        if let Err(error) = seeded {
            tracing::warn!(container = container.id, error = probes::describe(&error), "its stop will not be timed");
        }
    }
}

/// Notes what the kernel saw of a container in its status.
pub fn handle_kernel_event(board: &Board, event: &LifecycleEvent) {
    board.amend(&event.id, |status| {
        let kernel = status.kernel.get_or_insert_default();
        match event.phase {
            Phase::Created => kernel.create_nanos = event.duration_ns,
            Phase::Started => kernel.start_nanos = event.duration_ns,
            Phase::Stopped => kernel.stop_nanos = event.duration_ns,
            Phase::StopBegan | Phase::Escalated | Phase::Exited | Phase::Removed => {}
        }
        status.oom_killed |= event.has(flag::OOM);
        status.signal_ignored |= event.has(flag::SIGNAL_IGNORED);
    });
}
