//! A manager as a process: its core, on the machine's own clock and disk, and its sockets.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    os::unix::fs::{FileTypeExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::{Server, server::UdsConnectInfo};
use warren_raft::{Disconnected, Files};
use warren_registry::Registries;
use warren_telemetry::{
    Meters, ProcessSource,
    endpoint::{self, Endpoint},
    otlp,
    signals::Identity,
    table::Emitter,
};

use crate::{
    clock::System,
    core::{self, Core, Networks, Seams},
    data_dir, liveness,
    state::InvalidNetwork,
    validate::Policy,
    vault::{self, Vault},
};

/// How a manager works.
#[derive(Clone, Debug)]
pub struct Options {
    /// Holds the cluster's state.
    pub data_dir: PathBuf,
    /// Where the API is served to this machine; a loopback address until there is mutual TLS.
    pub listen_addr: SocketAddr,
    /// Where the API is served to root on this machine.
    pub socket: PathBuf,
    /// Where `/metrics` and the health checks are served.
    pub metrics_addr: SocketAddr,
    /// Log entries between snapshots.
    pub snapshot_after: u64,
    /// Heartbeats of agents.
    pub liveness: liveness::Timing,
    /// What services may ask for.
    pub policy: Policy,
    /// Where images come from.
    pub registries: warren_registry::Options,
    /// The networks of a cluster that is founded.
    pub networks: Networks,
    /// What becomes of metrics.
    pub telemetry: warren_telemetry::Options,
}

/// The first manager of a cluster.
const FIRST_MANAGER: u64 = 1;
/// How long open calls may take once the manager is told to stop.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(2);

/// Why a manager could not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API would be open to the network, unprotected.
    #[error("{0} is not a loopback address: without mutual TLS the API is served to this machine only")]
    NotLoopback(IpAddr),
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
            Self::NotLoopback(_) | Self::Network(_) | Self::Registries(_) | Self::Otlp(_) => 2,
            Self::DataDir(_) | Self::Vault(_) | Self::Raft(warren_raft::Error::Storage { .. }) => 8,
            Self::Listen { .. } | Self::Metrics(_) => 7,
            Self::Raft(_) | Self::Store(_) => 1,
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
    own_identity(data_dir::known_id(data_dir).unwrap_or(FIRST_MANAGER))
}

/// Runs a manager until `shutdown` is cancelled; `started` is called once it serves.
///
/// # Errors
///
/// When it cannot start. What fails later is logged and shown by `/ready`.
pub async fn run(options: Options, shutdown: CancellationToken, started: impl FnOnce()) -> Result<(), Error> {
    if !options.listen_addr.ip().is_loopback() {
        return Err(Error::NotLoopback(options.listen_addr.ip()));
    }
    // Addresses first: they are what a second manager on this machine would trip over, before it touches anything.
    let metrics_listener = endpoint::bind(options.metrics_addr).await?;
    let tcp = TcpListener::bind(options.listen_addr).await.map_err(listen_error(options.listen_addr))?;
    let unix = bind_socket(&options.socket).await?;
    let socket_inode = inode(&options.socket);

    let id = data_dir::open(&options.data_dir, FIRST_MANAGER)?.id;
    let settings = core::Settings {
        id,
        address: options.listen_addr.to_string(),
        snapshot_after: options.snapshot_after,
        liveness: options.liveness,
        policy: options.policy,
        networks: options.networks,
        registries: Arc::new(Registries::new(options.registries.clone())?),
        vault: Vault::open(&options.data_dir)?,
    };
    let seams = Seams {
        environment: Arc::new(System),
        storage: Arc::new(Files::new(options.data_dir.join("raft"))),
        transport: Arc::new(Disconnected),
    };
    let meters = Meters::new(&own_identity(id), &[Emitter::Manager, Emitter::Agent, Emitter::Both]);
    meters.add_source(Arc::new(ProcessSource));
    let core = Core::start(settings, seams, &meters, shutdown.clone()).await?;

    let tasks = TaskTracker::new();
    if let Some(otlp) = &options.telemetry.otlp {
        tasks.spawn(otlp::exporter(otlp, meters.clone(), shutdown.clone().cancelled_owned())?);
    }
    let mut ready = core.ready();
    let probe = options.data_dir.join("writable");
    ready.add("storage", move || {
        let written = fs::write(&probe, b"").and_then(|()| fs::remove_file(&probe));
        written.map_err(|error| format!("the data directory cannot be written: {error}"))
    });
    let endpoint =
        Endpoint { meters, native_histograms: options.telemetry.native_histograms, health: core.health(), ready };
    tasks.spawn(log_failure("metrics", endpoint.serve(metrics_listener, shutdown.clone().cancelled_owned())));
    let server = || Server::builder().layer(core.measured());
    tasks.spawn(log_failure(
        "the API on TCP",
        server()
            .add_routes(core.routes())
            .serve_with_incoming_shutdown(TcpListenerStream::new(tcp), shutdown.clone().cancelled_owned()),
    ));
    tasks.spawn(log_failure(
        "the API on the socket",
        server()
            .layer(tonic::service::InterceptorLayer::new(root_only))
            .add_routes(core.routes())
            .serve_with_incoming_shutdown(UnixListenerStream::new(unix), shutdown.clone().cancelled_owned()),
    ));
    tracing::info!(api = %options.listen_addr, metrics = %options.metrics_addr, "the manager serves");
    started();

    shutdown.cancelled().await;
    tasks.close();
    // Streams like agents' sessions do not end by themselves.
    let _ = tokio::time::timeout(SHUTDOWN_PATIENCE, tasks.wait()).await;
    core.stop().await;
    // Unless a successor has replaced it already. Whoever comes next removes it if this fails.
    if inode(&options.socket) == socket_inode {
        let _ = fs::remove_file(&options.socket);
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

/// Lets root's calls through. The socket's permissions say the same, but root may have given them away.
fn root_only(request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
    let credentials = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
    match credentials {
        Some(credentials) if credentials.uid() == 0 => Ok(request),
        _ => Err(tonic::Status::permission_denied("only root may use this socket")),
    }
}
