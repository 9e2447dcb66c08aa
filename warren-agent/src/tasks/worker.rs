//! One container's worker: carries out what its state machine says, and tells it what came of it.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument as _, Span};
use warren_proto::v1::{self, ContainerState};
use warren_registry::Credentials;
use warren_spec::{ImageName, InvalidImageName, Policy};

use super::{Action, Board, Cache, CachedContainer, Ending, Event, Lifecycle, Phase, RuntimePhase, Timings};
use crate::{
    health::{Checks, Health, Subject},
    logs::Logs,
    network::{Files, Leaving, Mounted, Network, Tables},
    runtime::{self, ContainerOptions, Containerd, Images, LocalImage, NetworkNamespace, VolumePath, Wanted},
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

    /// Waits until connections are led to other containers of its service, here and, in all likelihood, elsewhere: those that come
    /// meanwhile it still takes. Where there are no others, and where nobody is led to it, there is nothing to wait for.
    async fn leave(&self) {
        /// For the manager's word that it has left. Without a manager there is none.
        const WORD: Duration = Duration::from_secs(2);
        /// For the other nodes, which have the same word.
        const OTHERS: Duration = Duration::from_millis(750);

        let Some(assignment) = self.assignment.as_ref().filter(|_| self.removing.is_cancelled()) else { return };
        let status = self.shared.board.get(&self.id).unwrap_or_default();
        let is_host = assignment.spec.as_ref().is_some_and(|spec| spec.network() == v1::NetworkMode::Host);
        let serves = matches!(status.health(), v1::Health::Unspecified | v1::Health::Healthy);
        if !serves || (status.addresses.is_empty() && !is_host) {
            return;
        }
        let mut tables = self.shared.network.tables();
        let leaving = |tables: &Tables| tables.leaving(&assignment.service_id, &self.id);
        let left = async {
            let known = tables.wait_for(|tables| leaving(tables) != Leaving::Listed).await;
            let is_alone = known.is_ok_and(|tables| leaving(&tables) == Leaving::Alone);
            if !is_alone {
                tokio::time::sleep(OTHERS).await;
            }
        };
        let left = tokio::time::timeout(WORD + OTHERS, left);
        let _ = self.shared.stopping.run_until_cancelled(left).await;
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

    async fn prepare(&mut self) -> Result<(), Ending> {
        let Some(assignment) = self.assignment.clone() else { return Err(Ending::Cancelled) };
        let spec = assignment.spec.clone().unwrap_or_default();
        let removing = self.removing.clone();
        // Neither changes anything of the container's: what nobody wants any more ends at once.
        let image = removing.run_until_cancelled(self.image(&spec)).await.unwrap_or(Err(Ending::Cancelled))?;
        self.unpack(&image).await?;
        if spec.stop_signal.is_empty()
            && let Some(signal) = image.config.stop_signal().as_deref().and_then(warren_spec::signal)
        {
            self.stop.signal = signal;
        }
        let mut labels: HashMap<_, _> = spec.labels.clone().into_iter().collect();
        labels.extend(self.stop.labels());
        labels.insert(label::SERVICE.to_owned(), assignment.service_name.clone());
        let volumes = self.volumes(&assignment).await?;
        // What an attempt that was cut short left would be in the way.
        retry(|| self.shared.containerd.delete_task(&self.id)).await?;
        let rootfs = retry(|| self.shared.containerd.prepare_container(&image, &self.id, &spec)).await?;
        rootfs.fill(&spec, &volumes).await.map_err(|error| Ending::Failed(error.to_string()))?;
        let secrets = self.shared.secrets.write(&self.id, &spec, |mount| rootfs.owner(mount));
        let secrets = secrets.map_err(|error| Ending::Failed(error.to_string()))?;
        let env = self.shared.secrets.write_env(&self.id, &spec, rootfs.user());
        let env = env.map_err(|error| Ending::Failed(error.to_string()))?;
        let (network, files) = self.connect(&spec).await?;
        let options = ContainerOptions {
            id: self.id.clone(),
            network,
            files,
            secrets,
            env: env.map(|values| (self.shared.node.env_helper.clone(), values)),
            volumes,
            spec,
            resources: assignment.resources.unwrap_or_default(),
            cgroup_parent: self.shared.node.cgroup_parent.clone(),
            init: self.shared.node.init.clone(),
            policy: self.shared.node.policy.clone(),
            pids_limit: self.shared.node.pids_limit,
        };
        retry(|| self.shared.containerd.create_container(&image, &rootfs, &options, labels.clone())).await?;
        self.shared.registrar.register(&self.id, &assignment.service_name, self.stop.signal);
        Ok(())
    }

    /// Who asks the image's registry: whom the service's secret names.
    fn credentials(&self, spec: &v1::ContainerSpec, image: &ImageName) -> Result<Credentials, Ending> {
        if spec.registry_secret.is_empty() {
            return Ok(Credentials::Anonymous);
        }
        let value = self.shared.secrets.value(v1::SecretKind::Secret, &spec.registry_secret);
        let value = value.map_err(|error| Ending::Failed(error.to_string()))?;
        Credentials::parse(&value, image.registry()).map_err(|error| Ending::Rejected(error.to_string()))
    }

    /// Finds the image or has it pulled, and says how far that is.
    async fn image(&self, spec: &v1::ContainerSpec) -> Result<LocalImage, Ending> {
        let began = Instant::now();
        let name: ImageName =
            spec.image.parse().map_err(|error: InvalidImageName| Ending::Rejected(error.to_string()))?;
        let wanted = Wanted {
            credentials: self.credentials(spec, &name)?,
            name,
            digest: Some(spec.image_digest.clone()).filter(|digest| !digest.is_empty()),
            policy: spec.pull_policy(),
        };
        let mut said = Instant::now();
        let watch = |come: u64, all: u64| {
            let megabytes = |bytes: u64| bytes as f64 / 1e6;
            let message = match all {
                0 => "pulling the image".to_owned(),
                all => format!("pulling the image: {:.1} of {:.1} MB", megabytes(come), megabytes(all)),
            };
            // Each is an entry of the manager's log.
            if all == 0 || said.elapsed() >= PULL_NEWS {
                said = Instant::now();
                self.note(|status| status.message = message);
            }
        };
        let image = self.shared.images.ensure(&wanted, watch).await.map_err(ending)?;
        self.shared.timings.phase(RuntimePhase::Pull, began.elapsed());
        Ok(image)
    }

    /// Makes the image's layers snapshots.
    async fn unpack(&self, image: &LocalImage) -> Result<(), Ending> {
        let began = Instant::now();
        self.shared.images.unpack(image, &self.removing).await.map_err(ending)?;
        self.shared.timings.phase(RuntimePhase::Unpack, began.elapsed());
        Ok(())
    }

    /// Makes the container's volumes available.
    async fn volumes(&self, assignment: &v1::Assignment) -> Result<BTreeMap<String, VolumePath>, Ending> {
        let began = Instant::now();
        let (volumes, id, wanted) = (self.shared.volumes.clone(), self.id.clone(), assignment.volumes.clone());
        if wanted.is_empty() {
            return Ok(BTreeMap::new());
        }
        // A file server may take its time: not on a thread that serves others.
        let mounted = tokio::task::spawn_blocking(move || volumes.mount(&id, &wanted)).await;
        let mounted = mounted.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
        let paths = mounted.map_err(|error| Ending::Failed(error.to_string()))?;
        self.shared.timings.phase(RuntimePhase::Volumes, began.elapsed());
        Ok(paths)
    }

    /// Gives the container its place in the network that its service wants, and the files that say so.
    async fn connect(&self, spec: &v1::ContainerSpec) -> Result<(NetworkNamespace, Vec<Mounted>), Ending> {
        let began = Instant::now();
        let files = self.shared.network.files();
        let hostname = runtime::hostname(&self.id, spec);
        let (namespace, addresses) = match spec.network() {
            v1::NetworkMode::Host => return Ok((NetworkNamespace::Node, Files::of_the_node())),
            v1::NetworkMode::None => (NetworkNamespace::Empty, Vec::new()),
            v1::NetworkMode::Cluster | v1::NetworkMode::Unspecified => {
                let attached = self.shared.network.attach(&self.id).await;
                let attachment = attached.map_err(|error| Ending::Failed(format!("network: {error}")))?;
                (NetworkNamespace::Path(attachment.namespace), attachment.addresses)
            }
        };
        let written = files.write(&self.id, &hostname, &addresses);
        let files = written.map_err(|error| Ending::Failed(format!("network: writing its files: {error}")))?;
        self.note(|status| status.addresses = addresses.iter().map(ToString::to_string).collect());
        self.shared.timings.phase(RuntimePhase::Network, began.elapsed());
        Ok((namespace, files))
    }

    /// Values have changed that the container may have asked to hear of.
    async fn renew(&self, changed: &[(v1::SecretKind, String)]) {
        let spec = self.assignment.as_ref().and_then(|assignment| assignment.spec.as_ref());
        let Some(spec) = spec.filter(|_| self.lifecycle.phase() == Phase::Running) else { return };
        let (signal, errors) = self.shared.secrets.renew(&self.id, spec, changed);
        for error in errors {
            tracing::warn!(container = self.id, %error, "a container does not have the newest secrets");
        }
        if let Some(signal) = signal {
            self.signal(signal, false).await;
        }
    }

    async fn start(&self) -> Result<(), Ending> {
        let failed = |error: runtime::Error| Ending::Failed(error.to_string());
        let began = Instant::now();
        let owner = self.assignment.as_ref().map_or((String::new(), 0), |a| (a.service_id.clone(), a.slot));
        let output = self.shared.logs.uri(&self.id, owner.0, owner.1);
        let output = output.map_err(|error| Ending::Failed(format!("its log cannot be kept: {error}")))?;
        let limit = self.shared.node.runtime_timeout;
        let late = async |what: &str| Ending::Failed(self.end_shim(what).await);
        let created = tokio::time::timeout(limit, self.shared.containerd.create_task(&self.id, &output)).await;
        let pid = match created {
            Ok(created) => created.map_err(failed),
            Err(_) => Err(late("create").await),
        };
        let pid = pid.inspect_err(|_| self.shared.timings.failed("create"))?;
        let created = began.elapsed();
        // Whatever becomes of its start.
        self.note(|status| status.pid = pid);
        self.shared.timings.phase(RuntimePhase::Create, created);
        let began = Instant::now();
        let started = tokio::time::timeout(limit, self.shared.containerd.start_task(&self.id)).await;
        let started = match started {
            Ok(started) => started.map_err(failed),
            Err(_) => Err(late("start").await),
        };
        started.inspect_err(|_| self.shared.timings.failed("start"))?;
        let started = began.elapsed();
        self.shared.timings.phase(RuntimePhase::Start, started);
        self.note(|status| {
            let runtime = status.runtime.get_or_insert_default();
            runtime.create_nanos = created.as_nanos() as u64;
            runtime.start_nanos = started.as_nanos() as u64;
        });
        Ok(())
    }

    /// Tells of the exit when it comes, also across a restart of the daemon.
    fn watch_exit(&self) {
        let (shared, id, sender) = (Arc::clone(&self.shared), self.id.clone(), self.sender.clone());
        tokio::spawn(async move {
            let code = loop {
                match shared.containerd.wait_task(&id).await {
                    Ok((code, at)) => {
                        if let Some(at) = at {
                            shared.board.amend(&id, |status| status.finished_at = Some(timestamp(at)));
                        }
                        break code;
                    }
                    Err(error) if error.is_not_found() => break LOST,
                    Err(error) => {
                        tracing::debug!(container = id, %error, "waiting for a container's exit was interrupted");
                        tokio::time::sleep(RETRY).await;
                    }
                }
                if sender.is_closed() {
                    return;
                }
            };
            // A worker that is gone has seen the end otherwise.
            let _ = sender.send(Event::Exited(code));
        });
    }

    /// Has the container checked, if its service says how, until it ends.
    fn watch_health(&self, pid: u32) {
        let spec = self.assignment.as_ref().and_then(|assignment| assignment.spec.as_ref());
        let Some(check) = spec.and_then(|spec| spec.health_check.clone()) else { return };
        let status = self.shared.board.get(&self.id).unwrap_or_default();
        // What it was before the agent's restart it is until it is found otherwise.
        let health = match status.health() {
            v1::Health::Healthy => Health::Healthy,
            _ => Health::Starting,
        };
        self.note(|status| {
            if health == Health::Starting {
                status.health = v1::Health::Starting.into();
            }
        });
        let subject = Subject {
            containerd: self.shared.containerd.clone(),
            id: self.id.clone(),
            pid,
            addresses: status.addresses,
            check,
            health,
        };
        let (shared, id, sender) = (Arc::clone(&self.shared), self.id.clone(), self.sender.clone());
        let changed = move |health: Health, why: String| {
            shared.board.amend(&id, |status| {
                let health = match health {
                    Health::Starting => v1::Health::Starting,
                    Health::Healthy => v1::Health::Healthy,
                    Health::Unhealthy => v1::Health::Unhealthy,
                };
                status.health = health.into();
                status.health_message.clone_from(&why);
            });
            if health == Health::Unhealthy {
                // A worker that is gone needs no telling.
                let _ = sender.send(Event::Unhealthy(why));
            }
            health != Health::Unhealthy
        };
        let (checks, ended) = (self.shared.checks.clone(), self.ended.clone());
        tokio::spawn(async move { ended.run_until_cancelled(checks.watch(subject, changed)).await });
    }

    async fn signal(&self, signal: u32, all: bool) {
        // A daemon that restarts gets the signal to deliver when it is back.
        let signalled = retry(|| self.shared.containerd.kill_task(&self.id, signal, all));
        match tokio::time::timeout(self.shared.node.runtime_timeout, signalled).await {
            Ok(Ok(())) => {}
            Ok(Err(ending)) => {
                tracing::warn!(container = self.id, signal, ?ending, "a container could not be signalled")
            }
            Err(_) => tracing::warn!(container = self.id, signal, "the container runtime does not answer"),
        }
    }

    /// Ends the process that containerd has beside the container, which does not answer: containerd then takes the container away itself.
    /// Returns what to say of it.
    async fn end_shim(&self, what: &str) -> String {
        let seconds = self.shared.node.runtime_timeout.as_secs_f64();
        let message =
            format!("the container runtime did not {what} it in {seconds} s (the agent's --runtime-timeout-s)");
        tracing::warn!(container = self.id, message, "the container's shim is killed");
        self.note(|status| status.message.clone_from(&message));
        let id = self.id.clone();
        // A panic is logged.
        let _ = tokio::task::spawn_blocking(move || runtime::kill_shim(&id)).await;
        message
    }

    fn kill_later(&self, after: Duration) {
        let sender = self.sender.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            // A worker that is gone needs no killing.
            let _ = sender.send(Event::KillDue);
        });
    }

    /// Removes task, record and snapshot, however long it takes.
    async fn clean(&self) {
        loop {
            // Never cut off: containerd would leave what it has begun to take away.
            let mut deletion = std::pin::pin!(self.shared.containerd.delete_task(&self.id));
            let deleted = match tokio::time::timeout(self.shared.node.runtime_timeout, &mut deletion).await {
                Ok(deleted) => deleted,
                Err(_) => {
                    let _ = self.end_shim("delete").await;
                    deletion.await
                }
            };
            let cleaned = match deleted {
                Ok(()) => self.shared.containerd.remove_container(&self.id).await,
                Err(error) => {
                    // A task that was created and never started must be killed first.
                    let _ = self.shared.containerd.kill_task(&self.id, SIGKILL, true).await;
                    Err(error)
                }
            };
            let cleaned = match cleaned {
                Ok(()) => self.shared.network.detach(&self.id).await.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match cleaned {
                Ok(()) => {
                    self.shared.logs.ended(&self.id);
                    self.shared.secrets.remove(&self.id);
                    let (volumes, id) = (self.shared.volumes.clone(), self.id.clone());
                    // A panic is the volume's, and it is logged.
                    let _ = tokio::task::spawn_blocking(move || volumes.release(&id)).await;
                    return;
                }
                Err(error) => tracing::debug!(container = self.id, %error, "a container is not removed yet"),
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// What an error of getting an image makes of a container.
fn ending(error: runtime::Error) -> Ending {
    match error {
        runtime::Error::Cancelled => Ending::Cancelled,
        error if error.is_transient() => Ending::Failed(error.to_string()),
        error => Ending::Rejected(error.to_string()),
    }
}

/// The exit code of a container whose end nobody saw.
const LOST: i32 = 255;

/// Repeats a call while the daemon is away; other errors end the container.
async fn retry<T, F>(call: impl Fn() -> F) -> Result<T, Ending>
where
    F: Future<Output = Result<T, runtime::Error>>,
{
    /// A daemon that is away longer than this may as well be away for good.
    const PATIENCE: Duration = Duration::from_secs(60);
    let began = Instant::now();
    loop {
        match call().await {
            Ok(value) => return Ok(value),
            Err(error) if error.is_transient() && began.elapsed() < PATIENCE => tokio::time::sleep(RETRY).await,
            Err(error) if error.is_transient() => return Err(Ending::Failed(error.to_string())),
            Err(error) => return Err(Ending::Rejected(error.to_string())),
        }
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
