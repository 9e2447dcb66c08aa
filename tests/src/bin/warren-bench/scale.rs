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

use futures::{StreamExt as _, future::BoxFuture};
use tokio::{net::UnixListener, runtime, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code,
    transport::{Channel, Server},
};
use warren_manager::{
    Policy, Vault,
    api::pinning::Unasked,
    clock::{System, Timestamp},
    control::{
        liveness::{self, Health},
        scheduler,
    },
    core::{Core, Founding, Seams, Settings},
    ids::ContainerId,
    state::{
        Amounts, Availability, Change, Cluster, ClusterNetwork, ContainerState, Description, Expected, Mode,
        NewContainer, Resources, RestartCondition, RestartPolicy, SCHEMA, Service, ServiceSpec, State, Transaction,
    },
};
use warren_pki::{Credentials, Dialer, Request, Token};
use warren_proto::v1::{
    self, agent_message, cluster_client::ClusterClient, dispatcher_client::DispatcherClient, manager_message,
    nodes_client::NodesClient, service_spec, services_client::ServicesClient,
};
use warren_raft::{Files, Node, Profile, Transport, TransportError};
use warren_telemetry::{Meters, signals::Identity, table::Emitter};
use warren_tests::{
    World,
    cluster::{self, Manager},
};

const NODES: usize = 1000;
const CONTAINERS: u32 = 100_000;
/// Services have virtual addresses of their own, of which a cluster has 65,534.
const DISTINCT: u32 = 50_000;
const SERVICES: usize = 1000;
const IDLE_AGENTS: usize = 5000;
/// On one connection without a certificate.
const JOINED_AT_ONCE: usize = 10;
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
        changes.extend((1..=replicas).map(|slot| {
            Change::Create(NewContainer {
                id: ContainerId::from(format!("c{number:05}-{slot:06}")),
                service: made.id.clone(),
                generation: 1,
                slot,
                pinned: None,
                failures: 0,
                at: Timestamp(1),
            })
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

/// As much as an agent with nothing to time says of itself.
fn series() -> Vec<v1::Series> {
    let series = |metric: &str, label: &str, value: String, measured| v1::Series {
        metric: metric.to_owned(),
        labels: [(label.to_owned(), value)].into(),
        value: Some(measured),
    };
    let histogram = v1::ExponentialHistogram { scale: 3, ..Default::default() };
    let durations = ["create", "start", "stop"].map(|step| {
        let metric = format!("warren_container_{step}_duration_seconds");
        series(&metric, "source", "kernel".to_owned(), v1::series::Value::Histogram(histogram.clone()))
    });
    let counts = (0..45).map(|number| {
        let program = format!("program_{number:02}");
        series("warren_probe_runs_total", "program", program, v1::series::Value::Counter(number))
    });
    durations.into_iter().chain(counts).collect()
}

/// An agent without containers: it says at once that what it is to run runs. Counts what it is told. Ends with its session.
async fn agent(channel: Channel, id: String, number: usize, told: Arc<AtomicUsize>) {
    let description = v1::NodeDescription {
        hostname: format!("node-{number:05}"),
        resources: Some(v1::ResourceAmounts { cpu_millis: 64_000, memory_bytes: 1 << 38 }),
        ..Default::default()
    };
    let register = v1::RegisterNodeRequest { node_id: id.clone(), description: Some(description) };
    if NodesClient::new(channel.clone()).register_node(register).await.is_err() {
        return;
    }
    let (up, outgoing) = mpsc::channel(16);
    let say = |message| v1::AgentMessage { message: Some(message) };
    let hello = v1::Hello { node_id: id, boot_id: "bench".to_owned() };
    up.send(say(agent_message::Message::Hello(hello))).await.expect("sent");
    let mut cluster = ClusterClient::new(channel.clone());
    let Ok(session) = DispatcherClient::new(channel).session(ReceiverStream::new(outgoing)).await else { return };
    let mut down = session.into_inner();
    let mut period = Duration::from_secs(2);
    let mut heartbeat = tokio::time::interval(period);
    let mut question = tokio::time::Instant::now() + period * 15;
    let telemetry = v1::TelemetrySnapshot { series: series(), ..Default::default() };
    up.send(say(agent_message::Message::Telemetry(telemetry))).await.expect("sent");
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
                        let report = agent_message::Message::Status(v1::StatusReport { statuses, sent_at: None });
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
                // An agent of which nothing changes says just that.
                let same = v1::TelemetrySnapshot { incremental: true, ..Default::default() };
                if up.send(say(agent_message::Message::Telemetry(same))).await.is_err() {
                    return;
                }
            }
            () = tokio::time::sleep_until(question) => {
                question = tokio::time::Instant::now() + period * 15;
                let _ = cluster.get_cluster_info(v1::GetClusterInfoRequest {}).await;
            }
        }
    }
}

/// Threads of the managers.
const MANAGERS: &str = "managers";

/// Name and processor time of the thread or process of which this is `/proc`'s directory.
fn stat(directory: &Path) -> Option<(String, Duration)> {
    let stat = fs::read_to_string(directory.join("stat")).ok()?;
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    let ticks = next()? + next()?;
    Some((name.to_owned(), Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())))
}

/// Processor time of this process's threads of a name.
fn processor_time(name: &str) -> Duration {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let used = threads.filter_map(|thread| stat(&thread.path()).filter(|(of, _)| of.starts_with(name)));
    used.map(|(_, time)| time).sum()
}

/// Processor time of another process.
fn processor_time_of(process: u32) -> Duration {
    stat(Path::new(&format!("/proc/{process}"))).map_or(Duration::ZERO, |(_, time)| time)
}

fn resident_mib(process: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
    resident.map_or(f64::NAN, |kib: f64| kib / 1024.0)
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
                agents.spawn(agent(channel, format!("n{number:05}"), number, Arc::clone(&told)))
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

    idle(leader, &told);
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
}

/// Waits until nobody writes or tells anything any more; how long that took.
fn settle(mut state: impl FnMut() -> (u64, usize)) -> Duration {
    // What is still being written, or told to agents, is not idleness.
    let began = Instant::now();
    let mut before = state();
    let mut quiet_since = Instant::now();
    while quiet_since.elapsed() < QUIET && began.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(500));
        let now = state();
        if now != before {
            (before, quiet_since) = (now, Instant::now());
        }
    }
    began.elapsed() - quiet_since.elapsed()
}

/// Percent of a core that is used while some time passes.
fn used(time: impl Fn() -> Duration) -> f64 {
    let (before, began) = (time(), Instant::now());
    std::thread::sleep(IDLE);
    (time() - before).as_secs_f64() / began.elapsed().as_secs_f64() * 100.0
}

fn idle(leader: &Core, told: &AtomicUsize) {
    let index = || leader.raft().status().last_log_index;
    let settled = settle(|| (index(), told.load(Ordering::Relaxed)));
    let before = index();
    let used = used(|| processor_time(MANAGERS));
    println!(
        "  idle: {used:.1} % of a core, all three managers; {} log entries in {} s, after {:.0} s to settle",
        index() - before,
        IDLE.as_secs(),
        settled.as_secs_f64()
    );
}

/// Lets a node in, with a certificate of its own.
async fn join(channel: Channel, token: &Token, number: usize) -> (String, Credentials) {
    let request = Request::new().expect("a key");
    let asked = v1::JoinClusterRequest {
        secret: token.secret(),
        certificate_request: request.pem().to_owned(),
        hostname: format!("node-{number:05}"),
        ..Default::default()
    };
    let mut cluster = ClusterClient::new(channel);
    let joined = loop {
        match cluster.join_cluster(asked.clone()).await {
            Ok(joined) => break joined.into_inner(),
            // Another begins to lead.
            Err(status) if status.code() == Code::Unavailable => tokio::time::sleep(Duration::from_millis(200)).await,
            Err(status) => panic!("not let in: {status}"),
        }
    };
    let credentials = Credentials::new(&request.key_pem(), &joined.certificate, &joined.authorities);
    (joined.id, credentials.expect("a certificate"))
}

/// Has an agent in session with whoever leads.
async fn stay(managers: Vec<String>, credentials: Credentials, id: String, number: usize, told: Arc<AtomicUsize>) {
    for address in managers.iter().cycle() {
        let channel = Dialer::new(address, &credentials).expect("an address").lazy();
        agent(channel, id.clone(), number, Arc::clone(&told)).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Agents with nothing to run, each with a certificate and a connection of its own, at the leader of three managers that are
/// processes with logs on one disk.
pub(crate) fn idle_agents() {
    let world = World::empty("bench-idle");
    let mut managers: Vec<_> = ["m1", "m2", "m3"].iter().map(|name| Manager::new(&world, name)).collect();
    let token: Token = cluster::found(&mut managers).parse().expect("a token");
    let address = managers[cluster::leader(&managers)].address();
    let addresses: Vec<_> = managers.iter().map(Manager::address).collect();
    let agents = several("agents");
    let told = Arc::new(AtomicUsize::new(0));
    let joining = Instant::now();
    agents.block_on(async {
        let mut joined = futures::stream::iter(0..IDLE_AGENTS.div_ceil(JOINED_AT_ONCE))
            .map(|batch| {
                let (address, token) = (&address, &token);
                async move {
                    let channel = Dialer::newcomer(address, token).expect("an address").connect().await;
                    let channel = channel.expect("connected");
                    let numbers = batch * JOINED_AT_ONCE..((batch + 1) * JOINED_AT_ONCE).min(IDLE_AGENTS);
                    let joins = numbers.map(|number| {
                        let channel = channel.clone();
                        async move { (number, join(channel, token, number).await) }
                    });
                    futures::future::join_all(joins).await
                }
            })
            .buffer_unordered(2);
        while let Some(batch) = joined.next().await {
            for (number, (id, credentials)) in batch {
                tokio::spawn(stay(addresses.clone(), credentials, id, number, Arc::clone(&told)));
            }
        }
    });
    let nodes = || {
        let listed = managers[0].warren(&["node", "ls", "--format", "json"]).stdout;
        let listed: serde_json::Value = serde_json::from_str(&listed).unwrap_or_default();
        listed.as_array().map_or(0, |nodes| nodes.iter().filter(|node| node["status"] == "NODE_STATUS_READY").count())
    };
    warren_tests::until_within(PATIENCE, "all nodes are ready", || (nodes() == IDLE_AGENTS).then_some(()));
    let joined = joining.elapsed();
    let index = || managers[0].info().and_then(|info| info["lastLogIndex"].as_str()?.parse::<u64>().ok()).unwrap_or(0);
    let settled = settle(|| (index(), told.load(Ordering::Relaxed)));
    let led = cluster::leader(&managers);
    let before = index();
    let processes: Vec<_> = managers.iter().map(|manager| manager.process.as_ref().expect("it runs").id()).collect();
    let followers = |at: &usize| *at != led;
    let (by_followers, by_leader) = std::thread::scope(|scope| {
        let others = || (0..3).filter(followers).map(|at| processor_time_of(processes[at])).sum();
        let others = scope.spawn(move || used(others));
        let leader = used(|| processor_time_of(processes[led]));
        (others.join().expect("it measures"), leader)
    });
    println!(
        "{IDLE_AGENTS} agents in sessions with the leader of three managers, in TLS, a connection each, of whom nothing changes"
    );
    println!("  let in, and ready                           {:8.1} s", joined.as_secs_f64());
    println!(
        "  idle: {by_leader:.1} % of a core, leader (goal: below 10); {by_followers:.1} % both others; {} log entries in {} s (goal: \
         none), after {:.0} s to settle; {nodes} of them ready after it",
        index() - before,
        IDLE.as_secs(),
        settled.as_secs_f64(),
        nodes = nodes(),
    );
    println!("  memory of the leader                        {:8.1} MiB\n", resident_mib(processes[led]));
    agents.shutdown_background();
}
