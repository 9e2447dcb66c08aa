//! The control plane alone, at a size that no machine here could run for real: three managers, each with its log on the disk, and
//! agents that do as they are told at once. All of it is in this process; managers have threads of their own, whose time is
//! counted apart.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use tokio::{net::UnixListener, runtime, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Server};
use warren_manager::{
    Policy, Vault,
    clock::{System, Timestamp},
    core::{Core, Founding, Seams, Settings},
    ids::ContainerId,
    liveness::{self, Health},
    pinning::Unasked,
    scheduler,
    state::{
        Amounts, Availability, Change, Cluster, ClusterNetwork, ContainerState, Description, Expected, Mode, Resources,
        RestartCondition, RestartPolicy, SCHEMA, Service, ServiceSpec, State, Transaction,
    },
};
use warren_pki::Dialer;
use warren_proto::v1::{
    self, agent_message, dispatcher_client::DispatcherClient, manager_message, nodes_client::NodesClient, service_spec,
    services_client::ServicesClient,
};
use warren_raft::{Files, Node, Profile, Transport, TransportError};
use warren_telemetry::{Meters, signals::Identity, table::Emitter};

const NODES: usize = 1000;
const CONTAINERS: u32 = 100_000;
/// Services have virtual addresses of their own, of which a cluster has 65,534.
const DISTINCT: u32 = 50_000;
const SERVICES: usize = 1000;
const IDLE_AGENTS: usize = 5000;
const IDLE: Duration = Duration::from_secs(30);
/// So long without a log entry and without a message to an agent, everybody knows everything.
const QUIET: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(600);

pub(crate) fn measure() {
    planner();
    control_plane();
}

fn node(number: usize) -> warren_manager::state::Node {
    let resources = Amounts { cpu_millis: 64_000, memory_bytes: 1 << 38 };
    let hostname = format!("node-{number:05}");
    warren_manager::state::Node {
        id: format!("n{number:05}").as_str().into(),
        version: 0,
        created_at: Timestamp(1),
        description: Description { hostname, resources, ..Description::default() },
        subnet_index: 0,
        availability: Availability::Active,
        labels: BTreeMap::new(),
    }
}

fn service(number: u32, replicas: u32) -> Service {
    let amounts = Amounts { cpu_millis: 10, memory_bytes: 1 << 20 };
    Service {
        id: format!("s{number:05}").as_str().into(),
        version: 0,
        created_at: Timestamp(1),
        updated_at: Timestamp(1),
        generation: 1,
        virtual_index: 0,
        spec: ServiceSpec {
            name: format!("s{number:05}"),
            labels: BTreeMap::new(),
            mode: Mode::Replicated(replicas),
            container: Arc::new(v1::ContainerSpec { image: "demo".to_owned(), ..Default::default() }),
            resources: Resources { reservations: amounts, limits: Amounts::default() },
            restart: RestartPolicy { condition: RestartCondition::Any, delay: Duration::from_secs(1), max_attempts: 0 },
            ports: Vec::new(),
            endpoint_mode: v1::EndpointMode::Unspecified,
            constraints: Vec::new(),
            lost_after: Duration::ZERO,
        },
    }
}

/// A cluster with nodes and services, and containers that wait.
fn waiting(services: u32, replicas: u32) -> State {
    let mut state = State::default();
    let cluster = Cluster {
        id: "bench".to_owned(),
        created_at: Timestamp(1),
        network: ClusterNetwork::of_random(1),
        authority: None,
        lock: None,
        rotation: None,
    };
    let mut changes = vec![Change::FoundCluster(Box::new(cluster))];
    changes.extend((0..NODES).map(|number| Change::PutNode(Box::new(node(number)))));
    for number in 0..services {
        let made = service(number, replicas);
        changes.extend((1..=replicas).map(|slot| Change::Create {
            id: ContainerId::from(format!("c{number:05}-{slot:06}")),
            service: made.id.clone(),
            generation: 1,
            slot,
            pinned: None,
            failures: 0,
            at: Timestamp(1),
        }));
        let at = changes.len() - replicas as usize;
        changes.insert(at, Change::PutService { service: Box::new(made), expected: Expected::Absent });
    }
    state.apply(1, &Transaction { changes, ..Transaction::default() }).expect("all of it is possible");
    state
}

/// Decisions alone, without writing them down.
fn planner() {
    let rate = |services, replicas| {
        let state = waiting(services, replicas);
        let mut rates: Vec<_> = (0..5)
            .map(|_| {
                let began = Instant::now();
                let plan = scheduler::plan(&state, |_| Health::Ready);
                assert_eq!(plan.assignments.len(), (services * replicas) as usize);
                plan.assignments.len() as f64 / began.elapsed().as_secs_f64()
            })
            .collect();
        crate::median(&mut rates)
    };
    let (one, distinct) = (rate(1, CONTAINERS), rate(DISTINCT, 1));
    println!("placements decided on {NODES} nodes, one thread, median of 5 rounds");
    println!("  {CONTAINERS} containers of one service            {one:10.0} /s   (goal: 1,000,000)");
    println!("  {DISTINCT} services of one container each      {distinct:10.0} /s   (goal: 100,000)\n");
}

/// Managers that reach each other without a network.
#[derive(Clone, Default)]
struct Here(Arc<Mutex<HashMap<String, Node>>>);

impl Transport for Here {
    fn call<'a>(
        &'a self,
        address: &'a str,
        message: Vec<u8>,
        patience: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, TransportError>> {
        let node = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(address).cloned();
        Box::pin(async move {
            let node = node.ok_or_else(|| TransportError("it is not there".to_owned()))?;
            let answer = tokio::time::timeout(patience, node.handle(&message)).await;
            let answer = answer.map_err(|_| TransportError("no answer".to_owned()))?;
            answer.map_err(|error| TransportError(error.to_string()))
        })
    }
}

async fn manager(directory: &Path, id: u64, here: &Here) -> Core {
    let settings = Settings {
        id,
        address: format!("m{id}"),
        snapshot_after: 5000,
        snapshot_after_bytes: 64 << 20,
        profile: Profile::Lan,
        newest_schema: SCHEMA,
        liveness: liveness::Timing::default(),
        policy: Policy::default(),
        registries: Arc::new(Unasked),
        vault: Vault::ephemeral().expect("randomness"),
        founding: (id == 1).then(Founding::default),
    };
    let seams = Seams {
        environment: Arc::new(System),
        storage: Arc::new(Files::new(directory.join(format!("m{id}")))),
        transport: Arc::new(here.clone()),
    };
    let meters = Meters::new(&Identity { service: "bench", instance: id.to_string() }, &[Emitter::Manager]);
    let core = Core::start(settings, seams, &meters, CancellationToken::new()).await.expect("it starts");
    here.0.lock().unwrap_or_else(PoisonError::into_inner).insert(format!("m{id}"), core.raft().clone());
    core
}

/// An agent without containers: it says at once that what it is to run runs. Counts what it is told.
async fn agent(channel: Channel, number: usize, told: Arc<AtomicUsize>) {
    let about = node(number);
    let description = v1::NodeDescription {
        hostname: about.description.hostname.clone(),
        resources: Some(v1::ResourceAmounts { cpu_millis: 64_000, memory_bytes: 1 << 38 }),
        ..Default::default()
    };
    let register = v1::RegisterNodeRequest { node_id: about.id.to_string(), description: Some(description) };
    NodesClient::new(channel.clone()).register_node(register).await.expect("registered");
    let (up, outgoing) = mpsc::channel(16);
    let say = |message| v1::AgentMessage { message: Some(message) };
    let hello = v1::Hello { node_id: about.id.to_string(), boot_id: "bench".to_owned() };
    up.send(say(agent_message::Message::Hello(hello))).await.expect("sent");
    let session = DispatcherClient::new(channel).session(ReceiverStream::new(outgoing)).await;
    let mut down = session.expect("a session").into_inner();
    let mut period = Duration::from_secs(2);
    let mut heartbeat = tokio::time::interval(period);
    loop {
        tokio::select! {
            message = down.message() => {
                let Ok(Some(message)) = message else { return };
                told.fetch_add(1, Ordering::Relaxed);
                match message.message {
                    Some(manager_message::Message::Assignments(assigned)) => {
                        let status = v1::ContainerStatus {
                            state: v1::ContainerState::Running.into(),
                            ..Default::default()
                        };
                        let statuses: Vec<_> = assigned
                            .changed
                            .into_iter()
                            .map(|a| v1::ReportedStatus { container_id: a.container_id, status: Some(status.clone()) })
                            .collect();
                        let report = agent_message::Message::Status(v1::StatusReport { statuses });
                        if up.send(say(report)).await.is_err() {
                            return;
                        }
                    }
                    Some(manager_message::Message::Welcome(v1::Welcome { heartbeat_period: Some(wanted), .. }))
                    | Some(manager_message::Message::HeartbeatPeriod(v1::HeartbeatPeriod { period: Some(wanted) })) => {
                        let wanted = Duration::try_from(wanted).unwrap_or(period);
                        if wanted != period {
                            period = wanted;
                            heartbeat = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
                        }
                    }
                    _ => {}
                }
            }
            _ = heartbeat.tick() => {
                let beat = agent_message::Message::Heartbeat(v1::Heartbeat {});
                if up.send(say(beat)).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Threads of several managers, and of one that is measured after them.
const MANAGERS: &str = "managers";
const ONE_MANAGER: &str = "one-manager";

/// Processor time of this process's threads of a name.
fn processor_time(name: &str) -> Duration {
    let ticks = rustix::param::clock_ticks_per_second();
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let used = threads.filter_map(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).ok()?;
        let (comm, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
        let mut fields = rest.split_whitespace().skip(11);
        let mut next = || fields.next()?.parse::<u64>().ok();
        comm.starts_with(name).then_some(next()? + next()?)
    });
    Duration::from_millis(used.sum::<u64>() * 1000 / ticks)
}

async fn wait(what: &str, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !check() {
        assert!(Instant::now() < end, "never within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn several(name: &'static str) -> runtime::Runtime {
    runtime::Builder::new_multi_thread().worker_threads(2).thread_name(name).enable_all().build().expect("a runtime")
}

fn control_plane() {
    let own = std::env::current_exe().expect("a path");
    let directory = tempfile::tempdir_in(own.parent().expect("a directory")).expect("a directory");
    let (managers, agents) = (several(MANAGERS), several("agents"));
    let here = Here::default();
    let cores = managers.block_on(async {
        let mut cores = Vec::new();
        for id in 1..=3 {
            cores.push(manager(directory.path(), id, &here).await);
        }
        for id in 2..=3 {
            cores[0].raft().add_voter(id, &format!("m{id}")).await.expect("a voter");
        }
        cores
    });
    let leader = &cores[0];
    assert!(leader.raft().status().is_leader, "the first leads");
    let socket = directory.path().join("api.sock");
    let routes = leader.routes();
    managers.spawn({
        let socket = socket.clone();
        async move {
            let listener = UnixListener::bind(socket)?;
            let served = Server::builder().add_routes(routes).serve_with_incoming(UnixListenerStream::new(listener));
            served.await.map_err(io::Error::other)
        }
    });
    crate::until("the API is served", || socket.exists().then_some(()));
    let told = Arc::new(AtomicUsize::new(0));
    let channels: Vec<_> = agents
        .block_on(async { (0..50).map(|_| Dialer::socket(&socket).expect("a path").lazy()).collect::<Vec<Channel>>() });
    let start = |range: std::ops::Range<usize>| {
        let sessions: Vec<_> = range
            .map(|number| {
                let channel = channels[number % channels.len()].clone();
                agents.spawn(agent(channel, number, Arc::clone(&told)))
            })
            .collect();
        agents.block_on(wait("all nodes are there", || leader.state().nodes().count() >= sessions.len()));
        sessions
    };

    let mut sessions = start(0..NODES);
    let began = Instant::now();
    let created = agents.block_on(async {
        let mut services = ServicesClient::new(channels[0].clone());
        for number in 0..SERVICES {
            let spec = v1::ServiceSpec {
                name: format!("s{number}"),
                mode: Some(service_spec::Mode::Replicated(v1::Replicated {
                    replicas: i64::from(CONTAINERS) / SERVICES as i64,
                })),
                container: Some(v1::ContainerSpec { image: "demo".to_owned(), ..Default::default() }),
                ..Default::default()
            };
            let request = v1::CreateServiceRequest { spec: Some(spec), request_id: String::new() };
            services.create_service(request).await.expect("created");
        }
        began.elapsed()
    });
    let all = |state: ContainerState| {
        let view = leader.state();
        view.containers().filter(|container| container.status.state >= state).count() == CONTAINERS as usize
    };
    let assigned = agents.block_on(async {
        wait("all are assigned", || all(ContainerState::Assigned)).await;
        began.elapsed()
    });
    let run = agents.block_on(async {
        wait("all run", || all(ContainerState::Running)).await;
        began.elapsed()
    });
    println!(
        "{CONTAINERS} containers of {SERVICES} services on {NODES} nodes; 3 managers with their logs on one disk, agents simulated"
    );
    println!("  services created, one call after the other  {:8.1} s", created.as_secs_f64());
    println!(
        "  all containers placed, from the first call  {:8.1} s    {:.0} /s, written and replicated",
        assigned.as_secs_f64(),
        f64::from(CONTAINERS) / assigned.as_secs_f64()
    );
    println!("  all reported as running                     {:8.1} s", run.as_secs_f64());

    idle("1000 nodes with 100,000 containers", MANAGERS, leader, &told);
    agents.block_on(async {
        let mut services = ServicesClient::new(channels[0].clone());
        for number in 0..SERVICES {
            let request = v1::DeleteServiceRequest { service: format!("s{number}"), request_id: String::new() };
            services.delete_service(request).await.expect("deleted");
        }
    });
    for session in sessions.drain(..) {
        session.abort();
    }
    println!();
    drop((agents, cores));
    managers.shutdown_background();

    // A cluster of its own, without anything to run.
    idle_agents();
}

/// Processor time of managers' threads while some time passes, in cores.
fn used_in(threads: &str, time: Duration) -> f64 {
    let (before, began) = (processor_time(threads), Instant::now());
    std::thread::sleep(time);
    (processor_time(threads) - before).as_secs_f64() / began.elapsed().as_secs_f64()
}

fn idle(what: &str, threads: &str, leader: &Core, told: &AtomicUsize) {
    // What is still being written, or told to agents, is not idleness.
    let began = Instant::now();
    let state = || (leader.raft().status().last_log_index, told.load(Ordering::Relaxed));
    let mut before = state();
    let mut quiet_since = Instant::now();
    while quiet_since.elapsed() < QUIET && began.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(100));
        let now = state();
        if now != before {
            (before, quiet_since) = (now, Instant::now());
        }
    }
    let settled = began.elapsed() - quiet_since.elapsed();
    let index = leader.raft().status().last_log_index;
    let used = used_in(threads, IDLE);
    let written = leader.raft().status().last_log_index - index;
    println!(
        "  idle, {what}: {:.1} % of a core, managers only; {written} log entries in {} s, after {:.0} s to settle",
        used * 100.0,
        IDLE.as_secs(),
        settled.as_secs_f64()
    );
}

fn idle_agents() {
    let own = std::env::current_exe().expect("a path");
    let directory = tempfile::tempdir_in(own.parent().expect("a directory")).expect("a directory");
    let (managers, agents) = (several(ONE_MANAGER), several("agents"));
    let core = managers.block_on(manager(directory.path(), 1, &Here::default()));
    let socket = directory.path().join("api.sock");
    let routes = core.routes();
    managers.spawn({
        let socket = socket.clone();
        async move {
            let listener = UnixListener::bind(socket)?;
            let served = Server::builder().add_routes(routes).serve_with_incoming(UnixListenerStream::new(listener));
            served.await.map_err(io::Error::other)
        }
    });
    crate::until("the API is served", || socket.exists().then_some(()));
    let told = Arc::new(AtomicUsize::new(0));
    agents.block_on(async {
        let channels: Vec<Channel> = (0..50).map(|_| Dialer::socket(&socket).expect("a path").lazy()).collect();
        for number in 0..IDLE_AGENTS {
            tokio::spawn(agent(channels[number % channels.len()].clone(), number, Arc::clone(&told)));
        }
        wait("all nodes are there", || core.state().nodes().count() == IDLE_AGENTS).await;
    });
    println!(
        "{IDLE_AGENTS} agents in session with one manager, heartbeats only (goal: no log entry, below 10 % of a core)"
    );
    idle("5000 nodes without containers", ONE_MANAGER, &core, &told);
    println!();
    agents.shutdown_background();
    managers.shutdown_background();
}
