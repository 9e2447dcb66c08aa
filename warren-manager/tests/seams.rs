//! The manager's own code on a clock, dice, a disk and wires that are not the machine's: what a simulation will drive.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{body::Body, service::Routes};
use tower::util::MapRequest;
use warren_manager::{
    Policy, Vault,
    api::pinning::Unasked,
    clock::{Environment, Timestamp},
    control::liveness,
    core::{Core, Founding, Seams, Settings},
};
use warren_proto::v1::{
    self, agent_message, dispatcher_client::DispatcherClient, manager_message, nodes_client::NodesClient,
    service_spec::Mode, services_client::ServicesClient,
};
use warren_raft::{
    Disconnected, Entry, LogId, Vote,
    storage::{Durable, Log, Opened, Positions, Snapshots, Storage},
};
use warren_telemetry::{Meters, signals::Identity, table::Emitter};

/// Calls that go straight into a manager's services.
type Direct = MapRequest<Routes, fn(http::Request<Body>) -> http::Request<Body>>;

/// A clock that stands but for tokio's paused one, and dice that fall as the seed says (splitmix64).
#[derive(Debug)]
struct Fixed {
    began: tokio::time::Instant,
    dice: AtomicU64,
}

impl Environment for Fixed {
    fn now(&self) -> Timestamp {
        Timestamp(1_000_000).after(self.began.elapsed())
    }

    fn random(&self) -> u128 {
        let roll = || {
            let mut x = self.dice.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            u128::from(x ^ (x >> 31))
        };
        roll() << 64 | roll()
    }
}

/// What is on a disk.
#[derive(Clone, Debug, Default)]
struct Content {
    positions: Positions,
    entries: BTreeMap<u64, Entry>,
    snapshot: Option<Vec<u8>>,
}

/// A disk in memory, which can lose its power or be full.
#[derive(Clone, Debug, Default)]
struct Disk {
    content: Arc<Mutex<Content>>,
    full: Arc<AtomicU64>,
}

impl Disk {
    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same bytes in another machine: what the first still writes does not reach it.
    fn moved(&self) -> Self {
        Self { content: Arc::new(Mutex::new(self.content().clone())), full: Arc::default() }
    }

    fn check(&self) -> io::Result<()> {
        match self.full.load(Ordering::Relaxed) {
            0 => Ok(()),
            _ => Err(io::ErrorKind::StorageFull.into()),
        }
    }
}

impl Storage for Disk {
    fn place(&self) -> String {
        "memory".to_owned()
    }

    fn open(&self) -> io::Result<Opened> {
        Ok(Opened { log: Box::new(self.clone()), snapshots: Box::new(self.clone()), sync: Duration::from_millis(1) })
    }
}

impl Log for Disk {
    fn positions(&self) -> Positions {
        self.content().positions.clone()
    }

    fn read(&self, from: u64, to: u64, _max_bytes: usize) -> io::Result<Vec<Entry>> {
        let entries = self.content().entries.range(from..to.max(from)).map(|(_, entry)| entry.clone()).collect();
        Ok(entries)
    }

    fn append(&mut self, entries: Vec<Entry>, durable: Durable) -> io::Result<()> {
        self.check()?;
        let mut content = self.content();
        for entry in entries {
            content.positions.last = Some(entry.log_id);
            content.entries.insert(entry.log_id.index, entry);
        }
        drop(content);
        durable(Ok(()));
        Ok(())
    }

    fn vote(&mut self, vote: Vote, durable: Durable) -> io::Result<()> {
        self.check()?;
        self.content().positions.vote = Some(vote);
        durable(Ok(()));
        Ok(())
    }

    fn commit(&mut self, up_to: LogId) -> io::Result<()> {
        self.content().positions.committed = Some(up_to);
        Ok(())
    }

    fn truncate(&mut self, from: u64) -> io::Result<()> {
        let mut content = self.content();
        content.entries.split_off(&from);
        let last = content.entries.values().next_back().map(|entry| entry.log_id);
        content.positions.last = last.or(content.positions.purged);
        Ok(())
    }

    fn purge(&mut self, up_to: LogId) -> io::Result<()> {
        let mut content = self.content();
        content.entries = content.entries.split_off(&(up_to.index + 1));
        content.positions.purged = Some(up_to);
        content.positions.last = content.positions.last.max(Some(up_to));
        Ok(())
    }
}

impl Snapshots for Disk {
    fn save(&self, bytes: &[u8]) -> io::Result<()> {
        self.check()?;
        self.content().snapshot = Some(bytes.to_vec());
        Ok(())
    }

    fn load(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.content().snapshot.clone())
    }
}

struct Manager {
    core: Core,
    shutdown: CancellationToken,
}

impl Manager {
    async fn start(disk: &Disk, seed: u64) -> Self {
        let identity = Identity { service: "warren-manager", instance: "1".to_owned() };
        let meters = Meters::new(&identity, &[Emitter::Manager]);
        let settings = Settings {
            id: 1,
            address: "manager-1".to_owned(),
            snapshot_after: 10,
            snapshot_after_bytes: 64 << 20,
            profile: warren_raft::Profile::Lan,
            newest_schema: warren_manager::state::SCHEMA,
            liveness: liveness::Timing::default(),
            policy: Policy::default(),
            founding: Some(Founding::default()),
            registries: Arc::new(Unasked),
            vault: Vault::ephemeral().expect("randomness"),
        };
        let environment = Fixed { began: tokio::time::Instant::now(), dice: AtomicU64::new(seed) };
        let seams = Seams {
            environment: Arc::new(environment),
            storage: Arc::new(disk.clone()),
            transport: Arc::new(Disconnected),
        };
        let shutdown = CancellationToken::new();
        let core = Core::start(settings, seams, &meters, shutdown.clone()).await.expect("the manager starts");
        Self { core, shutdown }
    }

    /// Calls go straight into the service: there is no socket.
    fn services(&self) -> ServicesClient<Direct> {
        ServicesClient::new(self.direct())
    }

    fn direct(&self) -> Direct {
        MapRequest::new(self.core.routes().prepare(), warren_manager::as_root)
    }

    async fn create(&self, name: &str, replicas: i64) -> Result<(), tonic::Status> {
        let spec = v1::ServiceSpec {
            name: name.to_owned(),
            mode: Some(Mode::Replicated(v1::Replicated { replicas })),
            container: Some(v1::ContainerSpec { image: "demo".to_owned(), ..Default::default() }),
            ..Default::default()
        };
        let request = v1::CreateServiceRequest { spec: Some(spec), request_id: String::new() };
        self.services().create_service(request).await.map(drop)
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.core.stop().await;
    }
}

/// An agent that runs at once what it is told to, until the manager goes.
async fn agent(routes: Direct, id: &'static str) {
    let description = v1::NodeDescription {
        hostname: id.to_owned(),
        resources: Some(v1::ResourceAmounts { cpu_millis: 8000, memory_bytes: 1 << 34 }),
        ..Default::default()
    };
    let request = v1::RegisterNodeRequest { node_id: id.to_owned(), description: Some(description) };
    NodesClient::new(routes.clone()).register_node(request).await.expect("registered");
    let (sender, outgoing) = tokio::sync::mpsc::channel(100);
    let send = async |message| sender.send(v1::AgentMessage { message: Some(message) }).await;
    let hello = v1::Hello { node_id: id.to_owned(), boot_id: "boot".to_owned() };
    send(agent_message::Message::Hello(hello)).await.expect("open");
    let session = DispatcherClient::new(routes).session(ReceiverStream::new(outgoing)).await;
    let mut incoming = session.expect("a session").into_inner();
    while let Some(Ok(message)) = incoming.next().await {
        let Some(manager_message::Message::Assignments(assignments)) = message.message else { continue };
        let status = v1::ContainerStatus { state: v1::ContainerState::Running.into(), ..Default::default() };
        let statuses = assignments.changed.into_iter().map(|assignment| v1::ReportedStatus {
            container_id: assignment.container_id,
            status: Some(status.clone()),
        });
        let report = v1::StatusReport { statuses: statuses.collect(), sent_at: None };
        if send(agent_message::Message::Status(report)).await.is_err() {
            return;
        }
    }
}

async fn until(what: &str, mut check: impl FnMut() -> bool) {
    for _ in 0..10_000 {
        if check() {
            return;
        }
        // Nothing passes but tokio's paused clock.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("never: {what}");
}

fn running(core: &Core) -> usize {
    core.state().containers().filter(|c| c.status.state == warren_manager::state::ContainerState::Running).count()
}

/// Two services on two nodes, from an empty disk; returns the names of the ids that were given, and the disk.
async fn history(seed: u64) -> (Vec<String>, Disk) {
    let disk = Disk::default();
    let manager = Manager::start(&disk, seed).await;
    for id in ["nodea", "nodeb"] {
        tokio::spawn(agent(manager.direct(), id));
    }
    until("both nodes are known", || manager.core.state().nodes().count() == 2).await;
    manager.create("web", 4).await.expect("created");
    until("all run", || running(&manager.core) == 4).await;
    manager.create("db", 2).await.expect("created");
    until("all run", || running(&manager.core) == 6).await;
    let state = manager.core.state();
    let mut given: Vec<String> =
        state.services().map(|service| format!("{} {}", service.spec.name, service.id)).collect();
    given.extend(state.containers().map(|c| format!("{}-{} {} {:?}", c.service_name, c.slot, c.id, c.node)));
    given.sort();
    until("a snapshot is kept", || disk.content().snapshot.is_some()).await;
    manager.stop().await;
    (given, disk)
}

#[tokio::test(start_paused = true)]
async fn dice_and_clock_decide_what_happens() {
    let (first, _) = history(7).await;
    let (again, _) = history(7).await;
    let (other, _) = history(8).await;
    assert_eq!(first.len(), 8);
    assert_eq!(first, again);
    assert_ne!(first, other);
}

#[tokio::test(start_paused = true)]
async fn a_manager_goes_on_from_another_ones_disk() {
    let (given, disk) = history(7).await;
    let manager = Manager::start(&disk.moved(), 9).await;
    let state = manager.core.state();
    assert_eq!(state.services().count() + state.containers().count(), given.len());
    manager.create("more", 0).await.expect("created");
    manager.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_loses_nothing_that_was_acknowledged() {
    let disk = Disk::default();
    let manager = Manager::start(&disk, 1).await;
    manager.create("kept", 0).await.expect("created");
    disk.full.store(1, Ordering::Relaxed);
    let refused = manager.create("lost", 0).await.expect_err("there is no room");
    assert_eq!(refused.code(), tonic::Code::Unavailable, "{refused:?}");
    manager.stop().await;

    let manager = Manager::start(&disk.moved(), 2).await;
    let names: Vec<String> = manager.core.state().services().map(|service| service.spec.name.clone()).collect();
    assert_eq!(names, ["kept"]);
    manager.stop().await;
}
