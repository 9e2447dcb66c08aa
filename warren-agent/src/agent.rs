//! The agent, put together.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use warren_proto::v1;
use warren_registry::Registries;
use warren_telemetry::{
    Checks, Measurement, Meters, ProcessSource, Series, Source,
    build::BuildInfo,
    endpoint::{self, Endpoint},
    otlp,
    signals::Identity,
    table::Emitter,
};

use crate::{
    conditions::{Conditions, Finding, SETTLED, look_at_disks, watch_containerd, watch_disks},
    dns::{self, Resolver},
    exec::Execs,
    health,
    logs::{self, Logs},
    membership::{self, Managers},
    network::{self, Network},
    node,
    probes::{self, Events, Groups, Labelled, MAX_DNS_PORTS, Maps, ProbeSource, log_dns, read_events, sweep},
    runtime::{self, Containerd, Images},
    secrets::{self, Secrets},
    session::{self, Link},
    stats,
    tasks::{self, Board, Cache, NodeSettings, Supervisor, Timings, handle_kernel_event},
    volumes::Volumes,
};

/// How an agent works.
#[derive(Clone, Debug)]
pub struct Options {
    /// Holds the node's id and what it was told to run.
    pub data_dir: PathBuf,
    /// The socket of the manager on this machine, for a node that has not joined a cluster.
    pub socket: PathBuf,
    /// The node's name; unique in the cluster.
    pub hostname: String,
    /// The operator's own labels.
    pub labels: BTreeMap<String, String>,
    /// Where `/metrics` and the health checks are served.
    pub metrics_addr: SocketAddr,
    /// containerd's socket.
    pub containerd_socket: PathBuf,
    /// containerd's namespace; everything in it is the agent's.
    pub containerd_namespace: String,
    /// What the node gives its containers.
    pub node: NodeSettings,
    /// How they are connected.
    pub network: network::Options,
    /// How names are answered.
    pub dns: dns::Options,
    /// How what containers write is kept.
    pub logs: logs::Options,
    /// Where secrets are: a tmpfs, or what becomes one.
    pub secrets_dir: PathBuf,
    /// Where images come from.
    pub registries: warren_registry::Options,
    /// How long an image that was pulled is kept without use; zero is for ever.
    pub keep_images: Duration,
    /// Bytes that an image may take, as it comes and as it is unpacked.
    pub max_image: u64,
    /// The probes'; `None` leaves them out.
    pub probes: Option<probes::Options>,
    /// How long a DNS query may wait before it counts as unanswered.
    pub dns_timeout: Duration,
    /// Between telemetry snapshots.
    pub telemetry_interval: Duration,
    /// What becomes of metrics.
    pub telemetry: warren_telemetry::Options,
}

/// The exit code for a setting that cannot be.
pub(crate) const USAGE: u8 = 2;

/// Why an agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot do its work.
    #[error("the agent must run as root: it runs containers and loads BPF programs")]
    NotRoot,
    /// More than the programs can compare.
    #[error("{0} DNS ports were given: there can be {MAX_DNS_PORTS} at most")]
    DnsPorts(usize),
    /// No containers without it.
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    /// The data directory.
    #[error("the data directory {} cannot be used: {source}", path.display())]
    DataDir {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The metrics' address.
    #[error(transparent)]
    Metrics(#[from] endpoint::BindError),
    /// Containers could not be given secrets.
    #[error(transparent)]
    Secrets(#[from] secrets::Error),
    /// Names could not be answered.
    #[error("the domain of services' names is none: {0}")]
    Domain(#[from] hickory_proto::ProtoError),
    /// Containers could not be connected.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// The collector's address.
    #[error(transparent)]
    Otlp(#[from] otlp::InvalidEndpoint),
}

impl Error {
    /// The process's exit code: 2 for a collector's address that is none, 4 when containerd is away, 6 without the rights, 7 for an address in use, 8 for a data
    /// directory that cannot be used.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Otlp(_) | Self::DnsPorts(_) | Self::Domain(_) => USAGE,
            Self::NotRoot => 6,
            Self::Runtime(error) if error.is_transient() => 4,
            Self::Runtime(_) | Self::Network(_) | Self::Secrets(_) => 1,
            Self::DataDir { .. } => 8,
            Self::Metrics(error) => error.exit_code(),
        }
    }
}

/// The probes in use, or why there are none.
enum Probing {
    Kernel(Arc<Maps>, Arc<Mutex<Groups>>),
    Absent(String),
}

impl Probing {
    async fn start(options: Option<probes::Options>) -> Self {
        let Some(options) = options else { return Self::Absent(SWITCHED_OFF.to_owned()) };
        let opened = tokio::task::spawn_blocking(move || Maps::open(&options)).await;
        match opened.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())) {
            Ok(maps) => {
                let groups = Groups::load(&maps);
                Self::Kernel(Arc::new(maps), Arc::new(Mutex::new(groups)))
            }
            Err(error) => {
                let why = probes::describe(&error);
                tracing::warn!(why, "no kernel probes: containers are timed around the runtime's calls instead");
                Self::Absent(why)
            }
        }
    }

    fn report(&self) -> v1::ProbeReport {
        match self {
            Self::Kernel(..) => v1::ProbeReport { lifecycle: true, dns: true, message: String::new() },
            Self::Absent(why) => v1::ProbeReport { lifecycle: false, dns: false, message: why.clone() },
        }
    }

    fn epoch(&self) -> String {
        match self {
            Self::Kernel(maps, _) => format!("{:016x}", maps.epoch()),
            Self::Absent(_) => format!("{:016x}", rand::random::<u64>()),
        }
    }
}

/// Says that the probes are not there, where there are none.
struct ProbesAbsent;

impl Source for ProbesAbsent {
    fn collect(&self) -> Vec<Series> {
        let down = |probe| Series::new("warren_probe_up", &[("probe", probe)], Measurement::Gauge(0.0));
        vec![down("lifecycle"), down("dns")]
    }
}

pub(crate) fn check_ports(probes: &probes::Options) -> Result<(), Error> {
    let ports = probes.dns_ports.len();
    if ports > MAX_DNS_PORTS { Err(Error::DnsPorts(ports)) } else { Ok(()) }
}

pub(crate) fn own_identity(instance: &str) -> Identity {
    Identity { service: "warren-agent", instance: instance.to_owned() }
}

/// What the agent of a data directory is, in OpenTelemetry's terms. What is wrong with the directory, [`run`] says.
#[must_use]
pub fn identity(data_dir: &Path) -> Identity {
    own_identity(&membership::node_id(data_dir).unwrap_or_default())
}

/// Runs an agent until `shutdown` is cancelled; `started` is called once it serves. Containers and probes stay.
///
/// # Errors
///
/// When it cannot start. What fails later is logged and shown by `/ready`.
pub async fn run(options: Options, shutdown: CancellationToken, started: impl FnOnce()) -> Result<(), Error> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::NotRoot);
    }
    options.probes.as_ref().map_or(Ok(()), check_ports)?;
    warren_connections::raise_open_files();
    warren_telemetry::keep_memory_private();
    node::limit_processes(&options.node.cgroup_parent);
    let listener = endpoint::bind(options.metrics_addr, &options.telemetry.access).await?;
    let data_dir_error = |source| Error::DataDir { path: options.data_dir.clone(), source };
    let node_id = membership::node_id(&options.data_dir).map_err(data_dir_error)?;
    crate::secrets::install_helper(&options.node.env_helper).map_err(data_dir_error)?;
    let cache = Cache::open(&options.data_dir.join("containers")).map_err(data_dir_error)?;
    let containerd = runtime::connect(&options.containerd_socket, &options.containerd_namespace).await?;
    let containerd = containerd.with_max_image(options.max_image);
    let connected = connected(&cache, &containerd).await?;
    let network = Network::start(options.network.clone(), &connected).await?;
    let secrets = Secrets::start(&options.secrets_dir, |id| connected.contains_key(id))?;
    let resolver = Resolver::new(options.dns.clone())?;
    let registries = Registries::new(options.registries.clone()).map_err(runtime::Error::from)?;
    let images = Images::new(containerd.clone(), registries);
    let checks = health::Checks::new();
    let logs = Logs::new(options.logs.clone());
    let volumes = Volumes::new(options.data_dir.join("volumes"), options.node.policy.clone());
    let probing = Probing::start(options.probes.clone()).await;

    let timings = Arc::new(Timings::new(matches!(probing, Probing::Absent(_))));
    let mut sources: Vec<Arc<dyn Source>> = vec![Arc::clone(&timings) as Arc<dyn Source>];
    let tasks = TaskTracker::new();
    let board = Board::default();
    let probes = match &probing {
        Probing::Kernel(maps, groups) => {
            sources.push(Arc::new(ProbeSource::new(Arc::clone(maps), Arc::clone(groups))));
            tasks.spawn(sweep(Arc::clone(maps), Arc::clone(groups), options.dns_timeout, shutdown.clone()));
            Some((Arc::clone(maps), Arc::clone(groups)))
        }
        Probing::Absent(_) => {
            sources.push(Arc::new(ProbesAbsent));
            None
        }
    };
    let supervisor = Supervisor::start(
        tasks::Options {
            containerd: containerd.clone(),
            cache,
            timings,
            node: options.node.clone(),
            network: network.clone(),
            images: images.clone(),
            checks: checks.clone(),
            secrets,
            logs: logs.clone(),
            volumes: volumes.clone(),
            probes,
        },
        board.clone(),
    )
    .await?;

    if let Probing::Kernel(maps, _) = &probing {
        // The containers are known now: what the rings have kept of them finds its place.
        follow_kernel(maps, &board, &tasks, &shutdown);
    }

    let meters = Meters::new(&own_identity(&node_id), &[Emitter::Agent, Emitter::Node, Emitter::Both]);
    meters.add_source(resolver.source());
    meters.add_source(checks.source());
    meters.add_source(volumes.source());
    meters.add_source(logs.source());
    meters.add_source(Arc::new(ProcessSource));
    meters.add_source(Arc::new(BuildInfo));
    // Not for the managers, where every node's would come together: there are several of each container.
    let used: Arc<dyn Source> = Arc::new(stats::Used::new(board.clone()));
    for source in sources.iter().chain([&used]) {
        meters.add_source(Arc::new(Labelled { hostname: options.hostname.clone(), source: Arc::clone(source) }));
    }
    if let Some(otlp) = &options.telemetry.otlp {
        tasks.spawn(otlp::exporter(otlp, meters.clone(), shutdown.clone().cancelled_owned())?);
    }
    tasks.spawn(network.clone().run(shutdown.clone()));
    tasks.spawn(images.collect(options.keep_images, shutdown.clone()));
    tasks.spawn(resolver.clone().run(network.tables(), shutdown.clone()));
    let link = Link::new();
    let (daemon, disk) = (Finding::default(), Finding::default());
    tasks.spawn(watch_containerd(daemon.clone(), containerd.clone(), shutdown.clone()));
    let mut directories = vec![options.data_dir.clone()];
    directories.extend(containerd.directories().await);
    // Before anybody is told that the node is ready.
    look_at_disks(&disk, &directories).await;
    tasks.spawn(watch_disks(disk.clone(), directories, shutdown.clone()));
    let endpoint = Endpoint {
        meters,
        native_histograms: options.telemetry.native_histograms,
        health: Checks::default(),
        ready: ready(&probing, (&daemon, &disk), &link, &network, &resolver),
    };
    let managers = Managers::new(options.data_dir.clone(), node_id.clone(), options.socket.clone());
    tasks.spawn(shutdown.clone().run_until_cancelled_owned(managers.clone().renew()));
    let session = session::Options {
        managers,
        node_id,
        description: node::describe(
            &options.hostname,
            options.labels.clone(),
            probing.report(),
            network.address(),
            network.public_key(),
        ),
        telemetry_interval: options.telemetry_interval,
        sources,
        epoch: probing.epoch(),
        conditions: conditions(&probing, &daemon, &disk, &network, &resolver),
        network,
        logs: logs.clone(),
        execs: Execs::start(containerd.clone(), options.data_dir.join("exec")).map_err(data_dir_error)?,
    };
    let actions = supervisor.actions();
    let lives = board.clone();
    tasks.spawn(logs.collect(move |id| lives.get(id).is_some(), shutdown.clone()));
    tasks.spawn(session::run(session, supervisor, board, link, shutdown.clone()));
    tracing::info!(metrics = %options.metrics_addr, hostname = options.hostname, "the agent runs");
    started();
    endpoint.serve(listener, shutdown.clone().cancelled_owned()).await;
    tasks.close();
    tasks.wait().await;
    if !actions.end(ACTIONS_PATIENCE).await {
        tracing::warn!("ending while containerd is at work on a container: the next agent finds what is left of it");
    }
    Ok(())
}

/// Containers that are there already, and the addresses that they have.
async fn connected(cache: &Cache, containerd: &Containerd) -> Result<HashMap<String, Vec<IpAddr>>, runtime::Error> {
    let found = containerd.containers().await?.into_iter().map(|found| (found.id, Vec::new()));
    let mut connected: HashMap<_, _> = found.collect();
    for cached in cache.load() {
        let addresses = cached.status.addresses.iter().filter_map(|address| address.parse().ok()).collect();
        connected.insert(cached.assignment.container_id, addresses);
    }
    Ok(connected)
}

/// How long an ending agent waits for containerd to finish what it was asked to do.
const ACTIONS_PATIENCE: Duration = Duration::from_secs(10);

/// Follows what the probes report one by one.
fn follow_kernel(maps: &Arc<Maps>, board: &Board, tasks: &TaskTracker, shutdown: &CancellationToken) {
    let Events { mut lifecycle, mut dns } = match read_events(maps, tasks) {
        Ok(events) => events,
        Err(error) => {
            // Counts and histograms do not need them.
            tracing::error!(error = probes::describe(&error), "single events of the probes cannot be read");
            return;
        }
    };
    let (board, shutdown) = (board.clone(), shutdown.clone());
    tasks.spawn(async move {
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(event) = lifecycle.recv() => {
                    tracing::debug!(container = event.id, phase = ?event.phase, took_ns = event.duration_ns, "kernel");
                    handle_kernel_event(&board, &event);
                }
                Some(event) = dns.recv() => log_dns(&event),
                else => return,
            }
        }
    });
}

/// What may be wrong with the node.
fn conditions(
    probing: &Probing,
    containerd: &Finding,
    disk: &Finding,
    network: &Network,
    resolver: &Resolver,
) -> Conditions {
    let mut conditions = Conditions::default();
    let finding = containerd.clone();
    conditions.add("containerd_unavailable", true, Duration::ZERO, move || finding.check());
    let finding = disk.clone();
    conditions.add("disk_full", true, Duration::ZERO, move || finding.check());
    let ports = network.clone();
    conditions.add("port_conflict", false, Duration::ZERO, move || ports.check_ports());
    let network = network.clone();
    conditions.add("network_failed", true, SETTLED, move || network.check());
    let resolver = resolver.clone();
    conditions.add("dns_failed", false, SETTLED, move || resolver.check());
    if let Probing::Absent(why) = probing
        && why != SWITCHED_OFF
    {
        let why = why.clone();
        conditions.add("probes_absent", false, Duration::ZERO, move || Err(why.clone()));
    }
    conditions
}

/// Why there are no probes, where nobody wants them.
const SWITCHED_OFF: &str = "they are switched off";

fn ready(
    probing: &Probing,
    (containerd, disk): (&Finding, &Finding),
    link: &Link,
    network: &Network,
    resolver: &Resolver,
) -> Checks {
    let mut checks = Checks::default();
    let probes = match probing {
        Probing::Kernel(..) => Ok(()),
        Probing::Absent(why) => Err(why.clone()),
    };
    checks.add("probes", move || probes.clone());
    let finding = containerd.clone();
    checks.add("containerd", move || finding.check());
    let finding = disk.clone();
    checks.add("disk", move || finding.check());
    let network = network.clone();
    checks.add("network", move || network.check());
    let resolver = resolver.clone();
    checks.add("dns", move || resolver.check());
    let link = link.clone();
    checks.add("manager", move || link.check());
    checks
}
