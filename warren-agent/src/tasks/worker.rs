//! One container's worker: carries out what its state machine says, and tells it what came of it.

mod prepare;
mod stop;
mod watch;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument as _, Span};
use warren_proto::v1::{self, ContainerState};
use warren_spec::Policy;

use super::{Action, Board, Cache, CachedContainer, Ending, Event, Lifecycle, Phase, RuntimePhase, Timings};
use crate::{
    health::Checks,
    logs::Logs,
    network::Network,
    runtime::{Containerd, Images},
    secrets::Secrets,
    volumes::Volumes,
};

/// From the stop signal to SIGKILL unless a service says otherwise.
const DEFAULT_STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long SIGKILL may take before it is sent again.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// Between reports of how far a pull is.
const PULL_NEWS: Duration = Duration::from_secs(2);
/// Before asking a daemon again that did not answer.
const RETRY: Duration = Duration::from_millis(500);
const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;

/// Labels that a container carries on containerd: what an agent that knows nothing else needs to stop it.
pub(super) mod label {
    pub(crate) const SERVICE: &str = "warren.service";
    pub(crate) const STOP_SIGNAL: &str = "warren.stop-signal";
    pub(crate) const STOP_TIMEOUT_MS: &str = "warren.stop-timeout-ms";
}

/// How to stop a container.
#[derive(Clone, Copy, Debug)]
pub(super) struct StopOptions {
    pub(super) signal: u32,
    pub(super) timeout: Duration,
}

impl StopOptions {
    pub(super) fn from_labels(labels: &HashMap<String, String>) -> Self {
        let signal = labels.get(label::STOP_SIGNAL).and_then(|signal| warren_spec::signal(signal)).unwrap_or(SIGTERM);
        let timeout = labels.get(label::STOP_TIMEOUT_MS).and_then(|ms| ms.parse().ok()).map(Duration::from_millis);
        Self { signal, timeout: timeout.unwrap_or(DEFAULT_STOP_TIMEOUT) }
    }

    fn labels(self) -> HashMap<String, String> {
        HashMap::from([
            (label::STOP_SIGNAL.to_owned(), self.signal.to_string()),
            (label::STOP_TIMEOUT_MS.to_owned(), self.timeout.as_millis().to_string()),
        ])
    }
}

/// Announces a container to the probes before it is created, and forgets it when it is gone.
pub(super) trait Registrar: Send + Sync {
    fn register(&self, id: &str, service: &str, stop_signal: u32);
    fn unregister(&self, id: &str);
}

/// What the node gives its containers.
#[derive(Clone, Debug, Default)]
pub struct NodeSettings {
    /// The parent of containers' cgroups.
    pub cgroup_parent: PathBuf,
    /// A program for containers that want an init: static, and understanding `init -- command`.
    pub init: Option<PathBuf>,
    /// The program that containers with secrets in their environment begin with: see [`crate::secrets`].
    pub env_helper: PathBuf,
    /// How long the runtime may take to create a container, and to start it.
    pub runtime_timeout: Duration,
    /// What containers may have of the node.
    pub policy: Policy,
    /// Processes of a container whose service does not say; 0 is no limit.
    pub pids_limit: i64,
}

/// What all workers share.
pub(super) struct Shared {
    pub(super) containerd: Containerd,
    pub(super) board: Board,
    pub(super) cache: Cache,
    pub(super) timings: Arc<Timings>,
    pub(super) registrar: Arc<dyn Registrar>,
    pub(super) node: NodeSettings,
    pub(super) network: Network,
    pub(super) images: Images,
    pub(super) checks: Checks,
    pub(super) secrets: Secrets,
    pub(super) logs: Logs,
    pub(super) volumes: Volumes,
    /// The actions being carried out. Once it is closed, no other is begun.
    pub(super) actions: TaskTracker,
    /// Cancelled after that: what can be interrupted is.
    pub(super) stopping: CancellationToken,
}

/// A container that was found on containerd, or was not.
pub(super) enum Beginning {
    /// It is new.
    New,
    /// Its task runs.
    Running { pid: u32 },
    /// Its task ended, at this time if the daemon knows, or its end was reported before.
    Ended(Ending, Option<SystemTime>),
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    id: String,
    /// `None` for a container that nobody assigned: it is only removed.
    assignment: Option<v1::Assignment>,
    stop: StopOptions,
    lifecycle: Lifecycle,
    sender: mpsc::UnboundedSender<Event>,
    events: mpsc::UnboundedReceiver<Event>,
    stop_began: Option<Instant>,
    /// When it was first killed.
    kill_began: Option<Instant>,
    /// Cancelled with the container's end.
    ended: CancellationToken,
    /// Cancelled once it is to be removed, or the agent ends.
    removing: CancellationToken,
}

fn timestamp(time: SystemTime) -> pbjson_types::Timestamp {
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    pbjson_types::Timestamp { seconds: since_epoch.as_secs() as i64, nanos: since_epoch.subsec_nanos() as i32 }
}

/// The time, as it goes over the wire.
pub(crate) fn now() -> pbjson_types::Timestamp {
    timestamp(SystemTime::now())
}

impl Worker {
    /// A worker for an assigned container. `stop` is how one that is there already is stopped.
    pub(super) fn assigned(
        shared: Arc<Shared>,
        assignment: v1::Assignment,
        beginning: Beginning,
        stop: Option<StopOptions>,
    ) -> Spawned {
        let id = assignment.container_id.clone();
        let from_spec = || {
            let spec = assignment.spec.clone().unwrap_or_default();
            let timeout = spec.stop_timeout.map_or(DEFAULT_STOP_TIMEOUT, |timeout| {
                Duration::new(timeout.seconds.unsigned_abs(), timeout.nanos.unsigned_abs())
            });
            // An image's own signal is not known until the image is; see `prepare`.
            StopOptions { signal: warren_spec::signal(&spec.stop_signal).unwrap_or(SIGTERM), timeout }
        };
        let stop = stop.unwrap_or_else(from_spec);
        Self::spawn(shared, id, Some(assignment), stop, beginning)
    }

    pub(super) fn orphan(shared: Arc<Shared>, id: String, stop: StopOptions, beginning: Beginning) -> Spawned {
        let spawned = Self::spawn(shared, id, None, stop, beginning);
        spawned.remove();
        spawned
    }

    fn spawn(
        shared: Arc<Shared>,
        id: String,
        assignment: Option<v1::Assignment>,
        stop: StopOptions,
        beginning: Beginning,
    ) -> Spawned {
        let (sender, events) = mpsc::unbounded_channel();
        let (lifecycle, actions) = match &beginning {
            Beginning::New => Lifecycle::assigned(),
            Beginning::Running { .. } => Lifecycle::adopted(),
            Beginning::Ended(ending, _) => Lifecycle::ended(ending.clone()),
        };
        let removing = shared.stopping.child_token();
        let worker = Self {
            shared,
            id,
            assignment,
            stop,
            lifecycle,
            sender: sender.clone(),
            events,
            stop_began: None,
            kill_began: None,
            ended: CancellationToken::new(),
            removing: removing.clone(),
        };
        if let Some(assignment) = worker.assignment.as_ref().filter(|_| !matches!(beginning, Beginning::New)) {
            // What an earlier agent mounted for it is unmounted with it.
            worker.shared.volumes.keep(&worker.id, &assignment.volumes);
        }
        match beginning {
            Beginning::Running { pid } => {
                worker.note(|status| status.pid = pid);
                worker.watch_exit();
                worker.watch_health(pid);
            }
            Beginning::Ended(_, Some(at)) => worker.note(|status| status.finished_at = Some(timestamp(at))),
            Beginning::New | Beginning::Ended(_, None) => {}
        }
        if let Some(Ending::Exited(code) | Ending::Stopped(code)) = worker.lifecycle.ending() {
            let code = *code;
            worker.note(|status| status.exit_code = Some(code));
        }
        let task = tokio::spawn(worker.run(actions));
        Spawned { sender, removing, task }
    }

    async fn run(mut self, mut actions: Vec<Action>) {
        let mut missed = Vec::new();
        loop {
            for action in std::mem::take(&mut actions) {
                if self.shared.actions.is_closed() {
                    return;
                }
                let _in_progress = self.shared.actions.token();
                let span = self.span(&action);
                self.act(action).instrument(span).await;
            }
            if self.lifecycle.phase() == Phase::Gone {
                self.shared.registrar.unregister(&self.id);
                return;
            }
            // The sender is this worker's own: the channel stays open.
            let Some(event) = self.events.recv().await else { return };
            match event {
                Event::Exited(code) => self.exited(code),
                Event::Renewed(ref changed) if self.lifecycle.phase() == Phase::Running => self.renew(changed).await,
                // Its files may have been written before.
                Event::Renewed(ref changed) => missed.extend(changed.iter().cloned()),
                _ => {}
            }
            let has_started = matches!(event, Event::Started(Ok(())));
            actions = self.lifecycle.on(event);
            if has_started && !missed.is_empty() {
                self.renew(&std::mem::take(&mut missed)).await;
            }
        }
    }

    /// The work on a container is what its traces show.
    fn span(&self, action: &Action) -> Span {
        let name = match action {
            Action::Report => return Span::none(),
            Action::Prepare => "container prepare",
            Action::Start => "container start",
            Action::Stop => "container stop",
            Action::Kill => "container kill",
            Action::Clean => "container clean",
        };
        let service = self.assignment.as_ref().map_or("", |assignment| &assignment.service_name);
        tracing::info_span!("container", otel.name = name, container.id = self.id, warren.service = service)
    }

    /// Changes the container's status on the board and on disk.
    fn note(&self, change: impl FnOnce(&mut v1::ContainerStatus)) {
        let Some(assignment) = self.assignment.clone() else { return };
        let status = self.shared.board.update(&self.id, change);
        self.shared.cache.store(&CachedContainer { assignment, status });
    }

    async fn act(&mut self, action: Action) {
        match action {
            Action::Report => self.report(),
            Action::Prepare => {
                let prepared = self.prepare().await;
                self.tell(Event::Prepared(prepared));
            }
            Action::Start => {
                let started = self.start().await;
                let runs = started.is_ok();
                self.tell(Event::Started(started));
                if runs {
                    self.watch_exit();
                    let pid = self.shared.board.get(&self.id).unwrap_or_default().pid;
                    self.watch_health(pid);
                }
            }
            Action::Stop => {
                self.ended.cancel();
                self.leave().await;
                self.stop_began = Some(Instant::now());
                self.signal(self.stop.signal, false).await;
                self.kill_later(self.stop.timeout);
            }
            Action::Kill => {
                let began = *self.kill_began.get_or_insert_with(Instant::now);
                if began.elapsed() > self.shared.node.runtime_timeout {
                    let _ = self.end_shim("stop").await;
                } else {
                    self.signal(SIGKILL, true).await;
                }
                self.kill_later(KILL_PATIENCE);
            }
            Action::Clean => {
                self.clean().await;
                self.tell(Event::Cleaned);
            }
        }
    }

    fn tell(&self, event: Event) {
        // The receiver is this worker's own.
        let _ = self.sender.send(event);
    }

    fn report(&self) {
        let (state, message) = match (self.lifecycle.phase(), self.lifecycle.ending()) {
            (_, Some(Ending::Exited(0))) => (ContainerState::Complete, String::new()),
            (_, Some(Ending::Exited(code))) => (ContainerState::Failed, format!("exited with code {code}")),
            (_, Some(Ending::Stopped(_))) => (ContainerState::Shutdown, String::new()),
            (_, Some(Ending::Cancelled)) => (ContainerState::Shutdown, "removed before it ran".to_owned()),
            (_, Some(Ending::Rejected(why))) => (ContainerState::Rejected, why.clone()),
            (_, Some(Ending::Failed(why))) => (ContainerState::Failed, why.clone()),
            (Phase::Preparing, None) => (ContainerState::Preparing, String::new()),
            (Phase::Starting, None) => (ContainerState::Starting, String::new()),
            (_, None) => (ContainerState::Running, String::new()),
        };
        self.note(|status| {
            // What an agent finds as it was has not changed.
            if status.state() != state || status.changed_at.is_none() {
                status.changed_at = Some(now());
            }
            status.state = state.into();
            status.message = message;
            if state == ContainerState::Running && status.started_at.is_none() {
                status.started_at = Some(now());
            }
            if self.lifecycle.ending().is_some() && status.finished_at.is_none() {
                status.finished_at = Some(now());
            }
        });
    }

    fn exited(&mut self, code: i32) {
        self.ended.cancel();
        self.note(|status| {
            status.exit_code = Some(code);
            // The daemon's time of it, if that came first.
            status.finished_at.get_or_insert_with(now);
        });
        if let Some(began) = self.stop_began {
            let took = began.elapsed();
            self.shared.timings.stopped(took);
            self.note(|status| status.runtime.get_or_insert_default().stop_nanos = took.as_nanos() as u64);
        }
        self.shared.timings.exited(code, self.stop_began.is_some());
    }
}

/// A running worker.
#[derive(Debug)]
pub(super) struct Spawned {
    sender: mpsc::UnboundedSender<Event>,
    removing: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Spawned {
    /// Its container is no longer assigned.
    pub(super) fn remove(&self) {
        // A worker that is gone has removed it.
        let _ = self.sender.send(Event::Remove);
        self.removing.cancel();
    }

    /// These secrets and configs have another value now.
    pub(super) fn renew(&self, changed: &[(v1::SecretKind, String)]) {
        // As above.
        let _ = self.sender.send(Event::Renewed(changed.to_vec()));
    }

    pub(super) fn is_finished(&self) -> bool {
        self.task.is_finished()
    }
}
