//! A manager as a process: its core, on the machine's own clock and disk, and its sockets.

use std::{
    fs, future, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::Server;
use warren_pki::{Asked, Credentials, Role, incoming};
use warren_proto::v1::{self, cluster_client::ClusterClient};
use warren_raft::{Files, Member, Node, Profile};
use warren_registry::Registries;
use warren_telemetry::{
    Checks, Meters, ProcessSource,
    endpoint::{self, Endpoint},
    otlp,
    signals::Identity,
    table::Emitter,
};

use crate::{
    access::{
        front::Front,
        peers::Peers,
        signing::{self, Signed},
    },
    api::pinning::Asking,
    clock::{Environment as _, System},
    control::liveness,
    core::{self, Core, Networks, Seams},
    data::{backup, data_dir, formation},
    messages::validate::Policy,
    state::{InvalidNetwork, State},
    trust::{
        lock,
        vault::{self, Vault},
    },
};

/// How a manager works.
#[derive(Clone, Debug)]
pub struct Options {
    /// Holds the cluster's state.
    pub data_dir: PathBuf,
    /// Where API, agents' sessions and consensus are served, with mutual TLS.
    pub listen_addr: SocketAddr,
    /// Where others reach it, as HOST:PORT; found out unless given.
    pub advertise_addr: Option<String>,
    /// The machine's name.
    pub hostname: String,
    /// Found a cluster if the data directory is nobody's yet, instead of waiting until it is somebody's.
    pub bootstrap: bool,
    /// Where the API is served to root on this machine.
    pub socket: PathBuf,
    /// Where `/metrics` and the health checks are served.
    pub metrics_addr: SocketAddr,
    /// Opens the key of secrets, if it is locked; without it the manager waits for somebody who does.
    pub unlock_key: Option<String>,
    /// Log entries between snapshots, at most.
    pub snapshot_after: u64,
    /// Bytes of the log between snapshots, about.
    pub snapshot_after_bytes: u64,
    /// How far apart the managers are.
    pub profile: Profile,
    /// Heartbeats of agents.
    pub liveness: liveness::Timing,
    /// The newest schema of the state that is read and written.
    pub newest_schema: u32,
    /// What services may ask for.
    pub policy: Policy,
    /// Where images come from.
    pub registries: warren_registry::Options,
    /// The networks of a cluster that is founded.
    pub networks: Networks,
    /// What becomes of metrics.
    pub telemetry: warren_telemetry::Options,
}

/// How often a manager whose data directory is nobody's looks whether it is somebody's now.
const LOOK: Duration = Duration::from_millis(500);
/// Between attempts to take part.
const ENTER_AGAIN: Duration = Duration::from_secs(1);
/// Calls at a time on one connection. A manager may pass on those of thousands of agents for a moment.
const STREAMS: u32 = 10_000;
/// A connection on which so many calls broke the protocol ends. Those that the client resets are bounded by default.
const RESETS_BY_ERROR: usize = 1024;
/// How long open calls may take once the manager is told to stop.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(2);

/// Why a manager could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody could reach it there.
    #[error("advertise_addr: {0:?} is not HOST:PORT")]
    Advertised(String),
    /// Its data directory has no certificate.
    #[error("the data directory {} has no certificate: let the manager join again, with another directory", .0.display())]
    NoIdentity(PathBuf),
    /// Founding, or what became of joining.
    #[error(transparent)]
    Formation(#[from] formation::Error),
    /// Keys and certificates.
    #[error(transparent)]
    Pki(#[from] warren_pki::Error),
    /// The cluster could not have such networks.
    #[error(transparent)]
    Network(#[from] InvalidNetwork),
    /// How registries are reached.
    #[error(transparent)]
    Registries(#[from] warren_registry::Error),
    /// The key of secrets.
    #[error(transparent)]
    Vault(#[from] vault::Error),
    /// The data directory.
    #[error(transparent)]
    DataDir(#[from] data_dir::Error),
    /// Consensus.
    #[error(transparent)]
    Raft(#[from] warren_raft::Error),
    /// The state.
    #[error(transparent)]
    Store(#[from] crate::store::Error),
    /// The API's address.
    #[error("cannot serve the API on {address}: {why}")]
    Listen {
        /// Which.
        address: String,
        /// Why not.
        why: String,
    },
    /// The log is not where it was.
    #[error(
        "{}/{} holds no log, although this manager had one: remove it from its cluster (`warren cluster rm {id}` at another \
         manager), move the directory away, and let it join again", directory.display(), data_dir::RAFT
    )]
    NoLog {
        /// This manager.
        id: u64,
        /// Its data directory.
        directory: PathBuf,
    },
    /// The metrics' address.
    #[error(transparent)]
    Metrics(#[from] endpoint::BindError),
    /// The collector's address.
    #[error(transparent)]
    Otlp(#[from] otlp::InvalidEndpoint),
}

impl Error {
    /// The process's exit code: 2 for an address that is not allowed, 7 for one in use, 8 for a data directory that cannot be
    /// used.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Advertised(_) | Self::Network(_) | Self::Registries(_) | Self::Otlp(_) => 2,
            Self::NoIdentity(_) | Self::Formation(_) | Self::Pki(_) => 8,
            Self::NoLog { .. } | Self::DataDir(_) | Self::Vault(_) | Self::Raft(warren_raft::Error::Storage { .. }) => {
                8
            }
            Self::Listen { .. } => 7,
            Self::Metrics(error) => error.exit_code(),
            Self::Raft(_) | Self::Store(_) => 1,
        }
    }
}

impl From<core::Error> for Error {
    fn from(error: core::Error) -> Self {
        match error {
            core::Error::Network(error) => error.into(),
            core::Error::Raft(error) => error.into(),
            core::Error::Store(error) => error.into(),
        }
    }
}

fn listen_error(address: impl ToString) -> impl FnOnce(io::Error) -> Error {
    move |error| {
        let why = match error.kind() {
            io::ErrorKind::AddrInUse => "another process uses this address".to_owned(),
            _ => error.to_string(),
        };
        Error::Listen { address: address.to_string(), why }
    }
}

fn own_identity(id: u64) -> Identity {
    Identity { service: "warren-manager", instance: id.to_string() }
}

/// What the manager of a data directory is, in OpenTelemetry's terms.
#[must_use]
pub fn identity(data_dir: &Path) -> Identity {
    own_identity(data_dir::known_id(data_dir).unwrap_or_default())
}

/// Runs a manager until `asked_to_stop` is cancelled; `started` is called once it serves.
///
/// # Errors
///
/// When it cannot start. What fails later is logged and shown by `/ready`.
pub async fn run(options: Options, asked_to_stop: CancellationToken, started: impl FnOnce()) -> Result<(), Error> {
    warren_connections::raise_open_files();
    warren_telemetry::keep_memory_private();
    let address = advertised(&options)?;
    let shutdown = CancellationToken::new();
    let Some(data_dir::Identity { id, has_log, .. }) = wait_for_identity(&options, &asked_to_stop).await? else {
        return Ok(());
    };
    let Some(vault) = asked_to_stop.run_until_cancelled(open_vault(&options)).await.transpose()? else { return Ok(()) };
    // Addresses first: they are what a second manager on this machine would trip over, before it touches anything.
    let metrics_listener = endpoint::bind(options.metrics_addr, &options.telemetry.access).await?;
    let tcp = TcpListener::bind(options.listen_addr).await.map_err(listen_error(options.listen_addr))?;
    let unix = bind_socket(&options.socket).await?;
    note_socket(&options);
    let socket_inode = inode(&options.socket);

    let credentials = Credentials::load(&options.data_dir.join(data_dir::IDENTITY))?;
    let credentials = credentials.ok_or_else(|| Error::NoIdentity(options.data_dir.clone()))?;
    data_dir::check_owner(&options.data_dir, id, &credentials)?;
    let (peers, own) = (Peers::new(credentials.clone()), credentials.clone());
    let settings = core::Settings {
        id,
        address: address.clone(),
        snapshot_after: options.snapshot_after,
        snapshot_after_bytes: options.snapshot_after_bytes,
        profile: options.profile,
        liveness: options.liveness,
        newest_schema: options.newest_schema,
        policy: options.policy,
        founding: formation::founding(&options.data_dir, options.networks)?,
        registries: Arc::new(Asking::new(Registries::new(options.registries.clone())?)),
        vault: vault.clone(),
    };
    let seams = Seams {
        environment: Arc::new(System),
        storage: Arc::new(Files::new(options.data_dir.join(data_dir::RAFT))),
        transport: Arc::new(peers.clone()),
    };
    let meters = Meters::new(&own_identity(id), &[Emitter::Manager, Emitter::Agent, Emitter::Both]);
    meters.add_source(Arc::new(ProcessSource));
    let core = Core::start(settings, seams, &meters, shutdown.clone()).await?;
    formation::founded(&options.data_dir)?;
    match (core.raft().status().members.is_empty(), has_log) {
        // With the log it has lost whom it voted for, and what it has acknowledged.
        (true, true) => return Err(Error::NoLog { id, directory: options.data_dir }),
        (false, false) => data_dir::has_log(&options.data_dir, id)?,
        _ => {}
    }

    let tasks = TaskTracker::new();
    if let Some(otlp) = &options.telemetry.otlp {
        tasks.spawn(otlp::exporter(otlp, meters.clone(), shutdown.clone().cancelled_owned())?);
    }
    let mut ready = core.ready();
    let (removed, is_removed) = watch::channel(false);
    ready.add("membership", move || match *is_removed.borrow() {
        true => Err("this manager was removed from the cluster".to_owned()),
        false => Ok(()),
    });
    let certificate = own.clone();
    ready.add("certificate", move || certificate.check_valid());
    let probe = options.data_dir.join("writable");
    ready.add("storage", move || {
        let written = fs::write(&probe, b"").and_then(|()| fs::remove_file(&probe));
        written.map_err(|error| format!("the data directory cannot be written: {error}"))
    });
    let endpoint =
        Endpoint { meters, native_histograms: options.telemetry.native_histograms, health: core.health(), ready };
    tasks.spawn(endpoint.serve(metrics_listener, shutdown.clone().cancelled_owned()));
    let front = Front::new(core.raft().clone(), core.watch(), peers.clone());
    let server = || {
        let server = Server::builder().max_concurrent_streams(STREAMS);
        let server = server.http2_max_local_error_reset_streams(Some(RESETS_BY_ERROR));
        server.layer(core.measured()).layer(front.clone())
    };
    tasks.spawn(log_failure(
        "the API on TCP",
        server()
            .add_routes(core.routes())
            .serve_with_incoming_shutdown(incoming(tcp, credentials), shutdown.clone().cancelled_owned()),
    ));
    tasks.spawn(log_failure(
        "the API on the socket",
        server()
            .add_routes(core.routes())
            .serve_with_incoming_shutdown(UnixListenerStream::new(unix), shutdown.clone().cancelled_owned()),
    ));
    if core.raft().status().members.is_empty() {
        let noting = keep_log_noted(core.raft().clone(), options.data_dir.clone());
        tasks.spawn(shutdown.clone().run_until_cancelled_owned(noting));
    }
    let known = formation::managers(&options.data_dir)?;
    let noticing = notice_removal(core.raft().clone(), peers.clone(), known.clone(), options.data_dir.clone(), removed);
    tasks.spawn(shutdown.clone().run_until_cancelled_owned(noticing));
    let (told, wanted) = watch::channel(None);
    let (keeping, believing) = (core.watch(), core.watch());
    tasks.spawn(shutdown.clone().run_until_cancelled_owned(keep_key(
        core.raft().clone(),
        keeping,
        vault.clone(),
        options.data_dir.clone(),
    )));
    let believing = believe(believing, id, own.clone(), told, peers.clone(), address.clone());
    tasks.spawn(shutdown.clone().run_until_cancelled_owned(believing));
    let renewing = renew(own, options.data_dir.join(data_dir::IDENTITY), wanted, core.watch(), vault);
    tasks.spawn(shutdown.clone().run_until_cancelled_owned(renewing));
    let entering = enter(core.raft().clone(), core.watch(), peers, address.clone(), known);
    tasks.spawn(shutdown.clone().run_until_cancelled_owned(entering));
    tracing::info!(api = %options.listen_addr, reached_at = address, metrics = %options.metrics_addr, "the manager serves");
    started();

    asked_to_stop.cancelled().await;
    // While it still answers: who asks it is passed on to the next.
    core.hand_over().await;
    shutdown.cancel();
    tasks.close();
    // Streams like agents' sessions do not end by themselves.
    let _ = tokio::time::timeout(SHUTDOWN_PATIENCE, tasks.wait()).await;
    core.stop().await;
    // Unless a successor has replaced it already. Whoever comes next removes it if this fails.
    if inode(&options.socket) == socket_inode {
        let _ = fs::remove_file(&options.socket);
        let _ = fs::remove_file(options.data_dir.join(SOCKET));
    }
    Ok(())
}

async fn log_failure<E: std::fmt::Display>(what: &'static str, serve: impl Future<Output = Result<(), E>>) {
    if let Err(error) = serve.await {
        tracing::error!(%error, "{what} is no longer served");
    }
}

/// Takes the socket, which only root may use; one that a manager left behind is replaced.
async fn bind_socket(path: &Path) -> Result<UnixListener, Error> {
    let failed = || listen_error(path.display());
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed())?;
    }
    if tokio::net::UnixStream::connect(path).await.is_ok() {
        return Err(failed()(io::ErrorKind::AddrInUse.into()));
    }
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => fs::remove_file(path).map_err(failed())?,
        Ok(_) => return Err(failed()(io::Error::other("it is there already, and no socket"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed()(error)),
    }
    let listener = UnixListener::bind(path).map_err(failed())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(failed())?;
    Ok(listener)
}

/// What tells a file from another of the same name.
fn inode(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt as _;

    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Where others reach this manager.
fn advertised(options: &Options) -> Result<String, Error> {
    if let Some(address) = &options.advertise_addr {
        warren_pki::check_address(address).map_err(|_| Error::Advertised(address.clone()))?;
        return Ok(address.clone());
    }
    let mut address = options.listen_addr;
    if address.ip().is_unspecified()
        && let Some(own) = warren_pki::own_address()
    {
        address.set_ip(own);
    }
    Ok(address.to_string())
}

/// Who this manager is, once its data directory says so; `None` when it is told to end before.
async fn wait_for_identity(
    options: &Options,
    shutdown: &CancellationToken,
) -> Result<Option<data_dir::Identity>, Error> {
    let mut waiting = None;
    loop {
        if let Some(identity) = data_dir::open(&options.data_dir)? {
            if let Some((served, task)) = waiting.take() {
                stop_serving(served, task).await;
            }
            return Ok(Some(identity));
        }
        if options.bootstrap {
            formation::found(&options.data_dir, &options.hostname)?;
            continue;
        }
        if waiting.is_none() {
            let directory = options.data_dir.parent().unwrap_or(&options.data_dir).display();
            tracing::info!("waiting for `warren cluster init` or `join` with `--data-dir {directory}` on this machine");
            let socket = bind_socket(&options.socket).await?;
            note_socket(options);
            let (end, metrics) = serve_waiting(options, WAITS).await?;
            let told = end.clone();
            let task = tokio::spawn(async move {
                let refusing = lock::refuse(socket, WAITS, told.cancelled_owned());
                let _ = tokio::join!(log_failure("the API on the socket", refusing), metrics);
            });
            waiting = Some((end, task));
        }
        if shutdown.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_none() {
            // Whoever comes next removes it if this fails.
            let _ = fs::remove_file(&options.socket);
            let _ = fs::remove_file(options.data_dir.join(SOCKET));
            return Ok(None);
        }
    }
}

/// Notes beside a manager's data where its socket is, for commands about that data.
fn note_socket(options: &Options) {
    let socket = std::path::absolute(&options.socket).unwrap_or_else(|_| options.socket.clone());
    let noted = fs::create_dir_all(&options.data_dir)
        .and_then(|()| fs::write(options.data_dir.join(SOCKET), socket.as_os_str().as_encoded_bytes()));
    if let Err(error) = noted {
        tracing::debug!(%error, "where the socket is cannot be noted");
    }
}

/// Where the manager of a data directory has its socket, as it noted when it was started last.
#[must_use]
pub fn socket_of(data_dir: &Path) -> Option<PathBuf> {
    fs::read_to_string(data_dir.join(SOCKET)).ok().map(PathBuf::from)
}

const SOCKET: &str = "socket";

/// What a manager says that is in no cluster.
pub const WAITS: &str =
    "this manager is in no cluster yet: run `warren cluster init` or `warren cluster join` on its machine";

type Serving = (CancellationToken, tokio::task::JoinHandle<()>);

/// Says at the health checks that this manager is not ready, and why.
async fn serve_waiting(options: &Options, why: &'static str) -> Result<Serving, Error> {
    let listener = endpoint::bind(options.metrics_addr, &options.telemetry.access).await?;
    let mut ready = Checks::default();
    ready.add("cluster", move || Err(why.to_owned()));
    let endpoint = Endpoint {
        meters: Meters::new(&own_identity(0), &[]),
        native_histograms: options.telemetry.native_histograms,
        health: Checks::default(),
        ready,
    };
    let end = CancellationToken::new();
    let served = endpoint.serve(listener, end.clone().cancelled_owned());
    Ok((end, tokio::spawn(served)))
}

/// Frees the address for the manager that begins.
async fn stop_serving(end: CancellationToken, mut task: tokio::task::JoinHandle<()>) {
    end.cancel();
    if tokio::time::timeout(SHUTDOWN_PATIENCE, &mut task).await.is_err() {
        task.abort();
    }
}

/// The machine's name.
#[must_use]
pub fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The key of secrets: at once, or once somebody has unlocked it.
async fn open_vault(options: &Options) -> Result<Vault, Error> {
    match (Vault::load(&options.data_dir), &options.unlock_key) {
        (Err(vault::Error::Locked { .. }), Some(key)) => Ok(Vault::unlock(&options.data_dir, &key.parse()?)?),
        (Err(vault::Error::Locked { .. }), None) => {
            tracing::info!("this manager is locked: waiting for `warren cluster unlock`");
            let socket = bind_socket(&options.socket).await?;
            let (end, task) = serve_waiting(options, "locked: run `warren cluster unlock`").await?;
            let unlocked = lock::wait(&options.data_dir, socket).await;
            stop_serving(end, task).await;
            unlocked.map_err(listen_error(options.socket.display()))
        }
        (opened, _) => Ok(opened?),
    }
}

/// Keeps this manager's key of secrets locked or open on its disk, as the cluster has it.
async fn keep_key(raft: Node, mut state: watch::Receiver<State>, vault: Vault, directory: PathBuf) {
    // After a start the state may be one of before the managers were locked, which must not open the key again.
    while raft.recovered().await.is_err() {
        tokio::time::sleep(ENTER_AGAIN).await;
    }
    let mut kept = None;
    loop {
        let view = state.borrow_and_update().clone();
        if let Some(cluster) = view.cluster()
            && kept.as_ref() != Some(&cluster.lock)
        {
            let done = backup::unlock_key(&view, &vault).and_then(|unlock| vault.keep(&directory, unlock.as_ref()));
            match done {
                Ok(()) => kept = Some(cluster.lock.clone()),
                Err(error) => tracing::error!(%error, "the key of secrets is not on the disk as the cluster has it"),
            }
        }
        if state.changed().await.is_err() {
            return;
        }
    }
}

/// Notes that a manager that has joined has a log, as soon as it does.
async fn keep_log_noted(raft: Node, directory: PathBuf) {
    while raft.status().members.is_empty() {
        tokio::time::sleep(LOOK).await;
    }
    if let Err(error) = data_dir::has_log(&directory, raft.status().id) {
        tracing::warn!(%error, "that there is a log is not noted");
    }
}

/// Between looks at whether the others still know this manager, and how long they may take to answer.
const REMOVAL_LOOK: Duration = Duration::from_secs(3);

/// So many times one that was never taken in must be refused: whom it asks may not have heard of it yet.
const REFUSALS: u32 = 3;

/// Nobody tells a manager that was removed: it asks, when no leader is heard. One that was never taken in asks those it was told of.
async fn notice_removal(
    raft: Node,
    peers: Peers,
    known: Vec<String>,
    directory: PathBuf,
    removed: watch::Sender<bool>,
) {
    let mut refusals = 0;
    loop {
        tokio::time::sleep(REMOVAL_LOOK).await;
        let status = raft.status();
        if status.is_leader || status.leader_silent_for.is_some_and(|silent| silent < REMOVAL_LOOK) {
            continue;
        }
        let others = status.members.iter().filter(|member| member.id != status.id).map(|member| &member.address);
        let others: Vec<_> = if status.members.is_empty() { known.iter().collect() } else { others.collect() };
        for other in others {
            let Ok(channel) = peers.channel(other) else { continue };
            let mut cluster = ClusterClient::new(channel);
            let asked = cluster.get_cluster_info(v1::GetClusterInfoRequest {});
            if let Ok(Err(refused)) = tokio::time::timeout(REMOVAL_LOOK, asked).await
                && refused.code() == tonic::Code::PermissionDenied
            {
                refusals += 1;
                if status.members.is_empty() && refusals < REFUSALS {
                    break;
                }
                let directory = directory.display();
                tracing::error!(
                    "this manager was removed from the cluster: stop it; to join again, move {directory} away first"
                );
                removed.send_replace(true);
                return;
            }
        }
    }
}

/// Tells the renewal whom this manager is to believe; and the cluster, while it waits to hear it, that the manager does.
async fn believe(
    mut state: watch::Receiver<State>,
    id: u64,
    own: Credentials,
    told: watch::Sender<Option<String>>,
    peers: Peers,
    address: String,
) {
    loop {
        let view = state.borrow_and_update().clone();
        // One that has just joined is told the cluster's history from its beginning, and of authorities that are not believed any more:
        // what it came with is newer until it has heard of itself.
        let has_heard = view.manager(id).is_some();
        let cluster = view.cluster().filter(|cluster| has_heard && cluster.authority.is_some());
        let wanted = cluster.map(|cluster| warren_pki::authorities_digest(&cluster.authorities()));
        told.send_if_modified(|known| {
            *known != wanted && {
                known.clone_from(&wanted);
                true
            }
        });
        let waits = cluster.is_some_and(|cluster| cluster.rotation.is_some());
        let waited_for = wanted.filter(|digest| {
            waits && own.digest() == *digest && view.uncertified(digest).any(|member| member == format!("manager {id}"))
        });
        if let Some(digest) = waited_for
            && let Ok(channel) = peers.channel(&address)
            && let Err(error) =
                ClusterClient::new(channel).confirm_authorities(v1::ConfirmAuthoritiesRequest { digest }).await
        {
            tracing::warn!(
                error = error.message(),
                "the cluster does not know yet which authorities this manager believes"
            );
        }
        if waits {
            // When the certificate is renewed the state does not say.
            let _ = tokio::time::timeout(LOOK, state.changed()).await;
        } else if state.changed().await.is_err() {
            return;
        }
    }
}

/// Keeps this manager's certificate valid. It has what signs everybody's, and signs its own: after months without power the
/// managers of a cluster could not ask one another.
async fn renew(
    own: Credentials,
    directory: PathBuf,
    wanted: watch::Receiver<Option<String>>,
    state: watch::Receiver<State>,
    vault: Vault,
) {
    let id = own.identity().id;
    let ask = |request: String| -> Asked {
        let signed = signing::sign(&state.borrow(), &vault, System.now(), &request, Role::Manager, &id);
        let signed = signed.map(|Signed { certificate, authorities }| (certificate, authorities));
        Box::pin(future::ready(signed.map_err(|error| error.to_string())))
    };
    warren_pki::keep_valid(own, &directory, wanted, ask).await;
}

/// Sees to it that the others know this manager, and where; and that it votes, unless it is not to.
async fn enter(raft: Node, state: watch::Receiver<State>, peers: Peers, address: String, known: Vec<String>) {
    // Each reason once.
    let mut told = None;
    loop {
        let status = raft.status();
        let votes = state.borrow().manager(status.id).is_none_or(|manager| manager.voter);
        let is_own = |member: &&Member| (member.id, &member.address) == (status.id, &address);
        if status.members.iter().find(is_own).is_some_and(|own| own.voter || !votes) {
            return;
        }
        if status.is_leader {
            // Its own address is another now.
            if let Err(error) = raft.add_voter(status.id, &address).await {
                tracing::warn!(%error, address, "the other managers do not know yet where this one is");
            }
        } else {
            let others =
                status.members.into_iter().filter(|member| member.id != status.id).map(|member| member.address);
            for other in others.chain(known.iter().cloned()) {
                let Ok(channel) = peers.channel(&other) else { continue };
                let request = v1::EnterManagerRequest { address: address.clone() };
                match ClusterClient::new(channel).enter_manager(request).await {
                    Ok(_) => break,
                    Err(error) if told.as_deref() == Some(error.message()) => {}
                    Err(error) => {
                        tracing::warn!(manager = other, error = error.message(), "not taken in yet");
                        told = Some(error.message().to_owned());
                    }
                }
            }
        }
        tokio::time::sleep(ENTER_AGAIN).await;
    }
}
