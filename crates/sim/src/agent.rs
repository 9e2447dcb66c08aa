//! Agents: containers that take a while to start and to stop, and a session that comes back by itself.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _};
use rand_xoshiro::Xoshiro256PlusPlus;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use warren_proto::v1::{
    self, ContainerState, agent_message, dispatcher_client::DispatcherClient, manager_message,
    nodes_client::NodesClient,
};

use crate::{network, shared::Shared};

/// One container of a node.
#[derive(Clone, Debug)]
pub(crate) struct Container {
    /// Which service's, and which of its slots.
    pub(crate) slot: (String, u32),
    /// The service's name.
    name: String,
    pub(crate) image: String,
    pub(crate) state: ContainerState,
    stopping: bool,
    /// Since when it has a process.
    since: Duration,
    /// Since when not any more.
    ended: Duration,
}

impl Container {
    /// Whether it has a process.
    pub(crate) fn runs(&self) -> bool {
        self.state == ContainerState::Running
    }

    fn has_ended(&self) -> bool {
        self.state > ContainerState::Running
    }

    fn exit_code(&self) -> Option<i32> {
        match self.state {
            ContainerState::Complete => Some(0),
            ContainerState::Failed => Some(1),
            ContainerState::Shutdown => Some(143),
            _ => None,
        }
    }
}

fn timestamp(at: Duration) -> pbjson_types::Timestamp {
    pbjson_types::Timestamp { seconds: at.as_secs() as i64, nanos: at.subsec_nanos() as i32 }
}

/// A container that ran when its node was told to stop it.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    pub(crate) id: String,
    pub(crate) slot: (String, u32),
    /// Since when it had run.
    pub(crate) since: Duration,
}

#[derive(Debug, Default)]
struct Inner {
    containers: BTreeMap<String, Container>,
    unsent: Vec<String>,
    /// Containers with a process that it was told to stop, and has not told the world of.
    told_to_stop: Vec<Told>,
    /// The manager it is in a session with, and since when it has had all that it is to run.
    settled: Option<(String, Duration)>,
}

/// A node, which goes on while its agent does not. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Agent {
    pub(crate) id: String,
    inner: Arc<Mutex<Inner>>,
    news: Arc<Notify>,
    shared: Shared,
    dice: Arc<Mutex<Xoshiro256PlusPlus>>,
    /// What its clock showed when the simulation began: anything in two years.
    clock: Duration,
}

const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(2);

impl Agent {
    pub(crate) fn new(number: usize, seed: u64, shared: Shared) -> Self {
        let mut dice = Xoshiro256PlusPlus::seed_from_u64(seed ^ 0xa6e7 ^ ((number as u64) << 32));
        let clock = Duration::from_secs(1_700_000_000 + dice.random_range(0..63_000_000));
        Self {
            clock,
            id: format!("n{number:02}"),
            inner: Arc::default(),
            news: Arc::default(),
            shared,
            dice: Arc::new(Mutex::new(dice)),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn roll(&self, range: std::ops::Range<u64>) -> u64 {
        self.dice.lock().unwrap_or_else(PoisonError::into_inner).random_range(range)
    }

    /// Its containers that have a process: their ids by slot.
    pub(crate) fn running(&self) -> Vec<((String, u32), String)> {
        let inner = self.inner();
        let running = inner.containers.iter().filter(|(_, container)| container.runs());
        running.map(|(id, container)| (container.slot.clone(), id.clone())).collect()
    }

    /// Its containers that have a process: their ids, services' names and images.
    pub(crate) fn images(&self) -> Vec<(String, String, String)> {
        let inner = self.inner();
        let running = inner.containers.iter().filter(|(_, container)| container.runs());
        running.map(|(id, container)| (id.clone(), container.name.clone(), container.image.clone())).collect()
    }

    /// The manager it is in a session with, and since when it has had all that it is to run.
    pub(crate) fn settled(&self) -> Option<(String, Duration)> {
        self.inner().settled.clone()
    }

    /// What it was told to stop since this was asked last.
    pub(crate) fn told_to_stop(&self) -> Vec<Told> {
        std::mem::take(&mut self.inner().told_to_stop)
    }

    fn set(&self, id: &str, state: ContainerState) {
        let mut inner = self.inner();
        let Some(container) = inner.containers.get_mut(id) else { return };
        if container.has_ended() {
            return;
        }
        container.state = state;
        if container.has_ended() {
            container.ended = turmoil::sim_elapsed().unwrap_or_default();
        }
        if state == ContainerState::Running {
            container.since = turmoil::sim_elapsed().unwrap_or_default();
            self.shared.container_started();
        }
        let slot = container.slot.clone();
        inner.unsent.push(id.to_owned());
        drop(inner);
        self.shared.trace(format!("{}: {id} of slot {} of {} is {state:?}", self.id, slot.1, slot.0));
        self.news.notify_one();
    }

    fn assign(&self, manager: &str, message: v1::Assignments) {
        let complete = message.kind() == v1::AssignmentKind::Complete;
        if complete {
            // What nobody has assigned is removed.
            let assigned: Vec<&str> = message.changed.iter().map(|a| a.container_id.as_str()).collect();
            let strangers: Vec<String> =
                self.inner().containers.keys().filter(|id| !assigned.contains(&id.as_str())).cloned().collect();
            for id in strangers {
                self.forget(&id);
            }
            self.inner().settled = turmoil::sim_elapsed().map(|now| (manager.to_owned(), now));
            self.shared.trace(format!("{}: in session with {manager}, {} assigned", self.id, message.changed.len()));
        }
        for id in &message.removed {
            self.forget(id);
        }
        for assignment in message.changed {
            let id = assignment.container_id.clone();
            let runs = assignment.desired_state() == ContainerState::Running;
            let known = self.inner().containers.get(&id).cloned();
            let new = |state, stopping| Container {
                slot: (assignment.service_id.clone(), assignment.slot),
                name: assignment.service_name.clone(),
                state,
                image: assignment.spec.as_ref().map(|spec| spec.image.clone()).unwrap_or_default(),
                stopping,
                since: Duration::ZERO,
                ended: Duration::ZERO,
            };
            match (runs, known) {
                (true, None) => self.start(id, new(ContainerState::Starting, false)),
                (false, None) => {
                    let container = new(ContainerState::Shutdown, true);
                    let mut inner = self.inner();
                    inner.containers.insert(id.clone(), container);
                    inner.unsent.push(id);
                    drop(inner);
                    self.news.notify_one();
                }
                (false, Some(container)) if !container.stopping => self.stop(id),
                _ => {}
            }
        }
    }

    /// Of a container that is no longer assigned nothing is left.
    fn forget(&self, id: &str) {
        let mut inner = self.inner();
        if let Some(container) = inner.containers.remove(id) {
            inner.note_stop(id, &container);
        }
    }

    fn start(&self, id: String, container: Container) {
        self.inner().containers.insert(id.clone(), container);
        self.go_on_starting(id);
    }

    fn go_on_starting(&self, id: String) {
        let (agent, takes) = (self.clone(), Duration::from_millis(self.roll(5..200)));
        // While nothing is to go wrong any more few end: that all run at last is what is waited for.
        let ends = self.roll(0..if self.shared.is_calm() { 50 } else { 8 }) == 0;
        let how = if self.roll(0..3) == 0 { ContainerState::Complete } else { ContainerState::Failed };
        let lives = Duration::from_millis(self.roll(100..5000));
        tokio::spawn(async move {
            tokio::time::sleep(takes).await;
            if agent.inner().containers.get(&id).is_some_and(|container| !container.stopping) {
                agent.set(&id, ContainerState::Running);
            }
            if ends {
                tokio::time::sleep(lives).await;
                agent.set(&id, how);
            }
        });
    }

    fn stop(&self, id: String) {
        let mut inner = self.inner();
        if let Some(container) = inner.containers.get_mut(&id) {
            let before = container.clone();
            container.stopping = true;
            inner.note_stop(&id, &before);
        }
        drop(inner);
        self.go_on_stopping(id);
    }

    fn go_on_stopping(&self, id: String) {
        let (agent, takes) = (self.clone(), Duration::from_millis(self.roll(5..300)));
        tokio::spawn(async move {
            tokio::time::sleep(takes).await;
            agent.set(&id, ContainerState::Shutdown);
        });
    }

    fn reports(&self, all: bool) -> Vec<v1::ReportedStatus> {
        let mut inner = self.inner();
        let mut ids = std::mem::take(&mut inner.unsent);
        if all {
            ids = inner.containers.keys().cloned().collect();
        }
        let found = ids.into_iter().filter_map(|id| inner.containers.get(&id).map(|container| (id, container)));
        // Times are those of its own clock, which is nobody else's.
        let time = |at: Duration| (at > Duration::ZERO).then(|| timestamp(at + self.clock));
        found
            .map(|(container_id, container)| v1::ReportedStatus {
                container_id,
                status: Some(v1::ContainerStatus {
                    state: container.state.into(),
                    exit_code: container.exit_code(),
                    started_at: time(container.since),
                    finished_at: time(container.ended),
                    ..Default::default()
                }),
            })
            .collect()
    }

    /// Its machine has crashed: processes are gone, and what was about to be done is not done.
    pub(crate) fn crash(&self) {
        let mut inner = self.inner();
        let ended: Vec<String> = inner
            .containers
            .iter_mut()
            .filter(|(_, container)| !container.has_ended())
            .map(|(id, container)| {
                container.state = ContainerState::Failed;
                id.clone()
            })
            .collect();
        inner.unsent.extend(ended);
        inner.settled = None;
    }

    /// Its process has ended, and containers run on.
    pub(crate) fn stop_agent(&self) {
        self.inner().settled = None;
    }

    /// Goes on with what its process was about when it ended.
    fn adopt(&self) {
        let containers = self.inner().containers.clone();
        for (id, container) in containers {
            match (container.state, container.stopping) {
                (ContainerState::Starting, false) => self.go_on_starting(id),
                (ContainerState::Starting | ContainerState::Running, true) => self.go_on_stopping(id),
                _ => {}
            }
        }
    }
}

impl Inner {
    fn note_stop(&mut self, id: &str, container: &Container) {
        if container.runs() && !container.stopping {
            self.told_to_stop.push(Told { id: id.to_owned(), slot: container.slot.clone(), since: container.since });
        }
    }
}

/// Runs some agents until their machine crashes, or their processes end.
pub(crate) async fn run(agents: Vec<Agent>) -> turmoil::Result {
    let mut tasks = tokio::task::JoinSet::new();
    for agent in agents {
        agent.adopt();
        tasks.spawn(keep(agent));
    }
    while tasks.join_next().await.is_some() {}
    Ok(())
}

async fn keep(agent: Agent) {
    let mut backoff = FIRST_BACKOFF;
    loop {
        let managers = agent.shared.manager_names();
        let manager = &managers[agent.roll(0..managers.len() as u64) as usize];
        let ended = session(&agent, manager).await;
        if let Some((_, since)) = agent.inner().settled.take() {
            backoff = FIRST_BACKOFF;
            let why = ended.err().map_or_else(|| "closed".to_owned(), |error| error.to_string());
            agent.shared.trace(format!(
                "{}: session with {manager} since {:.3} ended: {why}",
                agent.id,
                since.as_secs_f64()
            ));
        }
        let pause = backoff.mul_f64(agent.roll(500..1000) as f64 / 1000.0);
        backoff = (backoff * 2).min(MAX_BACKOFF);
        tokio::time::sleep(pause).await;
    }
}

/// How long a manager may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);

async fn session(agent: &Agent, manager: &str) -> anyhow::Result<()> {
    let channel = network::connect(manager).await?;
    let description = v1::NodeDescription {
        hostname: agent.id.clone(),
        resources: Some(v1::ResourceAmounts { cpu_millis: 64_000, memory_bytes: 1 << 36 }),
        ..Default::default()
    };
    let request = v1::RegisterNodeRequest { node_id: agent.id.clone(), description: Some(description) };
    tokio::time::timeout(PATIENCE, NodesClient::new(channel.clone()).register_node(request)).await??;
    let (sender, outgoing) = mpsc::channel(16);
    let send = async |message| sender.send(v1::AgentMessage { message: Some(message) }).await;
    let hello = v1::Hello { node_id: agent.id.clone(), boot_id: "boot".to_owned() };
    send(agent_message::Message::Hello(hello)).await?;
    let mut dispatcher = DispatcherClient::new(channel);
    let opened = dispatcher.session(ReceiverStream::new(outgoing));
    let mut incoming = tokio::time::timeout(PATIENCE, opened).await??.into_inner();
    let mut heartbeat = tokio::time::interval(Duration::from_millis(500));
    let mut all = true;
    let mut sequence = None;
    loop {
        tokio::select! {
            message = incoming.message() => {
                let Some(message) = message? else { return Ok(()) };
                if let Some(manager_message::Message::Assignments(message)) = message.message {
                    if message.kind() == v1::AssignmentKind::Incremental && sequence != Some(message.applies_to) {
                        anyhow::bail!("out of sequence");
                    }
                    sequence = Some(message.results_in);
                    agent.assign(manager, message);
                }
            }
            () = agent.news.notified() => {}
            _ = heartbeat.tick() => send(agent_message::Message::Heartbeat(v1::Heartbeat::default())).await?,
        }
        let statuses = agent.reports(std::mem::take(&mut all));
        if !statuses.is_empty() {
            send(agent_message::Message::Status(v1::StatusReport { statuses, sent_at: None })).await?;
        }
    }
}
