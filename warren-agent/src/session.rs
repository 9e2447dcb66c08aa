//! The session with a manager: registers the node, follows assignments, reports status and telemetry. It comes back by
//! itself, and nothing is lost while it is away: statuses wait on the board, telemetry is cumulative.

mod told;
mod wishes;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{Status, Streaming};
use warren_pki::Dialer;
use warren_proto::v1::{
    self, agent_message, cluster_client::ClusterClient, dispatcher_client::DispatcherClient, manager_message,
    nodes_client::NodesClient,
};
use warren_telemetry::{Series, Source};

use crate::{
    conditions::Conditions,
    exec::Execs,
    logs::Logs,
    membership::Managers,
    network::{Network, Parts, Place},
    runtime::{self, Containerd},
    tasks::{self, Board, Supervisor},
};
use told::Told;
use wishes::Wishes;

/// How to reach the manager, and what to tell it.
pub struct Options {
    /// The ways to them.
    pub(crate) managers: Managers,
    /// The node's id.
    pub node_id: String,
    /// The node.
    pub description: v1::NodeDescription,
    /// Between telemetry snapshots, which are no more frequent than heartbeats.
    pub telemetry_interval: Duration,
    /// What they hold.
    pub sources: Vec<Arc<dyn Source>>,
    /// Names the counts' beginning.
    pub epoch: String,
    /// What may be wrong with the node.
    pub(crate) conditions: Conditions,
    /// Is told where the node is in the cluster, and what else is there.
    pub network: Network,
    /// What containers write.
    pub logs: Logs,
    /// Commands in containers.
    pub(crate) execs: Execs,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("managers", &self.managers)
            .field("node_id", &self.node_id)
            .finish_non_exhaustive()
    }
}

/// Whether there is a session, for the readiness check. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Link {
    problem: Arc<Mutex<Option<String>>>,
}

impl Link {
    /// A link that is not up yet.
    #[must_use]
    pub fn new() -> Self {
        let link = Self::default();
        link.down("no session yet");
        link
    }

    fn set(&self, problem: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    fn up(&self) {
        self.set(None);
    }

    fn down(&self, why: impl ToString) {
        self.set(Some(why.to_string()));
    }

    /// Nothing wrong, or what is.
    ///
    /// # Errors
    ///
    /// What keeps the session from being up.
    pub fn check(&self) -> Result<(), String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone().map_or(Ok(()), Err)
    }
}

const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(5);
/// Containers are listed this often even if no event says so.
const REPAIR: Duration = Duration::from_secs(30);
/// Heartbeat periods between questions who the managers are.
const LEARN: u32 = 15;
/// Longest that listing them may hold up the session.
const LOOK_TIMEOUT: Duration = Duration::from_secs(3);
/// News of containers waits this long for more.
const QUIET: Duration = Duration::from_millis(2);
/// A complete set of assignments is one message, environment and all.
const MAX_MESSAGE: usize = 256 << 20;
/// A manager answers a hello within this time, or is as good as away.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Unreachable(#[from] crate::membership::Error),
    #[error("the manager at {manager} cannot be reached: {}", warren_pki::reason(.why))]
    Connect { manager: String, why: tonic::transport::Error },
    #[error("this node is in no cluster (`warren cluster join` lets it into one), and no manager runs on this machine ({})", warren_pki::reason(.0))]
    Alone(tonic::transport::Error),
    #[error("{}", .0.message())]
    Refused(Box<Status>),
    #[error("the manager closed the session")]
    Closed,
    #[error("another manager leads, and is spoken to directly from now on")]
    Moves,
    #[error("the manager did not say welcome in time")]
    NoWelcome,
    #[error(transparent)]
    OutOfSequence(#[from] crate::tasks::OutOfSequence),
}

impl From<Status> for Ended {
    fn from(status: Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

/// Keeps a session until `shutdown`.
pub async fn run(options: Options, mut supervisor: Supervisor, board: Board, link: Link, shutdown: CancellationToken) {
    let mut backoff = FIRST_BACKOFF;
    loop {
        // Another than last time, perhaps: any of them will do.
        let ended = match options.managers.any() {
            Ok(manager) => {
                let session = Session { options: &options, manager: &manager, board: &board, link: &link };
                let ran = shutdown.run_until_cancelled(session.run(&mut supervisor, &mut backoff)).await;
                let Some(ended) = ran else { return };
                ended
            }
            Err(error) => error.into(),
        };
        supervisor.disconnected();
        let why = crate::probes::describe(&ended);
        match link.check() {
            Ok(()) if matches!(ended, Ended::Moves) => {
                tracing::info!("another manager leads, and is spoken to directly")
            }
            Ok(()) => tracing::warn!(why, "the session with the manager ended; containers go on"),
            // Each reason once: it tries again for as long as it takes.
            Err(known) if known == why => tracing::debug!(why, "no session with a manager"),
            Err(_) => tracing::warn!(why, "no session with a manager; trying again"),
        }
        link.down(&why);
        // Jitter keeps a cluster's agents from coming back all at once.
        let pause = backoff.mul_f64(rand::random_range(0.5..1.0));
        backoff = (backoff * 2).min(MAX_BACKOFF);
        if shutdown.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            return;
        }
    }
}

struct Session<'a> {
    options: &'a Options,
    manager: &'a Dialer,
    board: &'a Board,
    link: &'a Link,
}

impl Session<'_> {
    async fn run(&self, supervisor: &mut Supervisor, backoff: &mut Duration) -> Ended {
        match self.try_run(supervisor, backoff).await {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    async fn try_run(
        &self,
        supervisor: &mut Supervisor,
        backoff: &mut Duration,
    ) -> Result<std::convert::Infallible, Ended> {
        let channel = self.manager.connect().await;
        let channel = channel.map_err(|why| match self.options.managers.has_joined() {
            true => Ended::Connect { manager: self.manager.to_string(), why },
            false => Ended::Alone(why),
        })?;
        let registered = NodesClient::new(channel.clone())
            .register_node(v1::RegisterNodeRequest {
                node_id: self.options.node_id.clone(),
                description: Some(self.options.description.clone()),
            })
            .await?;
        self.options.network.set_place(place(registered.into_inner()));

        let (sender, outgoing) = mpsc::channel(16);
        let hello = v1::Hello { node_id: self.options.node_id.clone(), boot_id: self.options.epoch.clone() };
        send(&sender, agent_message::Message::Hello(hello)).await?;
        let mut cluster = ClusterClient::new(channel.clone());
        let mut dispatcher = DispatcherClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
        let incoming = dispatcher.session(ReceiverStream::new(outgoing)).await?;
        let mut incoming = incoming.into_inner();
        let (mut period, takes_increments) =
            tokio::time::timeout(WELCOME_TIMEOUT, welcome(&mut incoming)).await.unwrap_or(Err(Ended::NoWelcome))?;

        let mut said_conditions = self.conditions();
        send(&sender, agent_message::Message::Conditions(said_conditions.clone())).await?;
        self.link.up();
        *backoff = FIRST_BACKOFF;
        self.options.managers.registered();
        tracing::info!(manager = %self.manager, "in session with the manager");
        self.board.resend();
        let (set_period, periods) = watch::channel(period);
        let said = Arc::new(Notify::new());
        // Apart from everything else, so that a daemon that is slow to answer does not make the node look dead.
        let _heartbeats = AbortOnDropHandle::new(tokio::spawn(heartbeats(sender.clone(), periods, Arc::clone(&said))));
        let mut told = Told::default();
        let (mut next_snapshot, mut next_question) = (Instant::now(), Instant::now());
        let mut reap = tokio::time::interval(Duration::from_secs(1));
        let mut repair = tokio::time::interval(REPAIR);
        let wishes = Wishes::new(self.manager.clone(), self.options, self.board.clone());
        let mut parts = Parts::default();
        let (hints, mut started) = mpsc::channel(1);
        let _watcher = AbortOnDropHandle::new(tokio::spawn(follow_starts(supervisor.containerd(), hints)));
        loop {
            tokio::select! {
                message = incoming.message() => {
                    match message?.ok_or(Ended::Closed)?.message {
                        Some(manager_message::Message::Assignments(message)) => supervisor.assign(message)?,
                        Some(manager_message::Message::HeartbeatPeriod(message)) => {
                            period = positive(message.period, period);
                            set_period.send_replace(period);
                        }
                        Some(manager_message::Message::Network(part)) => {
                            if let Some(update) = parts.put_together(part) {
                                self.options.network.update(update);
                            }
                        }
                        Some(manager_message::Message::Logs(wish)) => wishes.logs(wish),
                        Some(manager_message::Message::Stats(wish)) => wishes.stats(wish),
                        Some(manager_message::Message::Exec(wish)) => wishes.exec(wish),
                        Some(manager_message::Message::Authorities(wanted)) => {
                            self.options.managers.believe(wanted.digest, wanted.confirm);
                        }
                        Some(manager_message::Message::Welcome(_)) | None => {}
                    }
                }
                () = self.board.changed() => {
                    tokio::time::sleep(QUIET).await;
                    let statuses = self.board.take_unsent();
                    if !statuses.is_empty() {
                        send(&sender, agent_message::Message::Status(v1::StatusReport { statuses, sent_at: Some(tasks::now()) })).await?;
                    }
                }
                () = sleep_until(next_snapshot) => {
                    next_snapshot = Instant::now() + self.options.telemetry_interval.max(period);
                    for part in told.next(self.collect().await, takes_increments) {
                        let (epoch, taken_at) = (self.options.epoch.clone(), Some(tasks::now()));
                        let snapshot = v1::TelemetrySnapshot { epoch, taken_at, ..part };
                        send(&sender, agent_message::Message::Telemetry(snapshot)).await?;
                    }
                    said.notify_one();
                }
                _ = reap.tick() => {
                    supervisor.reap();
                    let conditions = self.conditions();
                    if conditions != said_conditions {
                        send(&sender, agent_message::Message::Conditions(conditions.clone())).await?;
                        said_conditions = conditions;
                    }
                }
                Some(()) = started.recv() => look(supervisor).await,
                _ = repair.tick() => look(supervisor).await,
                () = sleep_until(next_question) => {
                    next_question = Instant::now() + period * LEARN;
                    let asked = cluster.get_cluster_info(v1::GetClusterInfoRequest {});
                    if let Ok(Ok(info)) = tokio::time::timeout(LOOK_TIMEOUT, asked).await {
                        self.options.network.set_managers(&info.get_ref().managers).await;
                        if self.options.managers.learn(info.get_ref()) {
                            return Err(Ended::Moves);
                        }
                    }
                }
            }
        }
    }

    fn conditions(&self) -> v1::NodeConditions {
        v1::NodeConditions {
            conditions: self.options.conditions.holding(std::time::Instant::now()),
            listeners: self.options.network.listeners(),
        }
    }

    async fn collect(&self) -> Vec<Series> {
        let sources = self.options.sources.clone();
        // Reading maps takes system calls: not on a thread that serves others.
        let read = move || sources.iter().flat_map(|source| source.collect()).collect();
        tokio::task::spawn_blocking(read).await.unwrap_or_default()
    }
}

/// Looks for strangers; a daemon that does not answer in time is asked again later.
async fn look(supervisor: &mut Supervisor) {
    match tokio::time::timeout(LOOK_TIMEOUT, supervisor.look_for_strangers()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "containers could not be listed"),
        Err(_) => tracing::debug!("containers could not be listed in time"),
    }
}

/// Says that the agent is there, a period after it has said so last. What else it `said` does as well: then half a period more is
/// waited, for the next of that to come first.
async fn heartbeats(to: mpsc::Sender<v1::AgentMessage>, mut periods: watch::Receiver<Duration>, said: Arc<Notify>) {
    let (mut last, mut is_said) = (Instant::now(), true);
    loop {
        let period = *periods.borrow_and_update();
        tokio::select! {
            () = sleep_until(last + if is_said { period * 3 / 2 } else { period }) => {
                if send(&to, agent_message::Message::Heartbeat(v1::Heartbeat { sent_at: Some(tasks::now()) })).await.is_err() {
                    return;
                }
                (last, is_said) = (Instant::now(), false);
            }
            () = said.notified() => (last, is_said) = (Instant::now(), true),
            changed = periods.changed() => if changed.is_err() { return },
        }
    }
}

/// Follows the daemon's events, across its restarts.
async fn follow_starts(containerd: Containerd, hints: mpsc::Sender<()>) {
    while !hints.is_closed() {
        if let Err(error) = runtime::watch_starts(&containerd, &hints).await {
            tracing::debug!(%error, "containerd's events are not followed");
        }
        tokio::time::sleep(MAX_BACKOFF).await;
    }
}

async fn send(to: &mpsc::Sender<v1::AgentMessage>, message: agent_message::Message) -> Result<(), Ended> {
    to.send(v1::AgentMessage { message: Some(message) }).await.map_err(|_| Ended::Closed)
}

/// The heartbeat period, and whether snapshots of telemetry may be incremental.
async fn welcome(from: &mut Streaming<v1::ManagerMessage>) -> Result<(Duration, bool), Ended> {
    const DEFAULT: Duration = Duration::from_secs(2);
    match from.message().await?.and_then(|message| message.message) {
        Some(manager_message::Message::Welcome(welcome)) => {
            Ok((positive(welcome.heartbeat_period, DEFAULT), welcome.incremental_telemetry))
        }
        _ => Err(Ended::NoWelcome),
    }
}

/// The node's place in the cluster's network. Prefixes that cannot be read are left out.
fn place(registered: v1::RegisterNodeResponse) -> Place {
    let prefixes = |list: &[String]| list.iter().filter_map(|prefix| prefix.parse().ok()).collect();
    let node = registered.node.unwrap_or_default();
    Place { node_id: node.id, subnets: prefixes(&node.subnets), cluster: prefixes(&registered.cluster_networks) }
}

/// A period that a timer can have.
fn positive(wire: Option<pbjson_types::Duration>, otherwise: Duration) -> Duration {
    let period = wire.and_then(|wire| Duration::try_from(wire).ok());
    period.filter(|period| !period.is_zero()).unwrap_or(otherwise)
}
