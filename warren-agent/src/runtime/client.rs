use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use containerd_client::{
    Client,
    services::v1 as api,
    tonic::{Code, Request, transport::Channel},
};

use super::{Error, Found, image::SNAPSHOTTER, keyed::Keyed, pull::Transfer};

/// How long a call may take that only reads or writes metadata.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// containerd sends messages of up to 16 MiB.
pub(super) const MAX_MESSAGE: usize = 16 << 20;
/// A lease that nobody ended, because the agent died, ends by itself. A pull by a slow line takes hours; containerd's own client
/// gives leases as long.
const LEASE_TIME: Duration = Duration::from_secs(24 * 3600);

/// A connection to containerd in one namespace. Cheap to clone; reconnects by itself.
#[derive(Clone)]
pub struct Containerd {
    channel: Channel,
    namespace: String,
    lease: Option<String>,
    in_flight: InFlight,
    /// Bytes that an image may take, as it comes and as it is unpacked.
    max_image: u64,
}

/// What is being done once for all that ask for it.
#[derive(Clone, Default)]
struct InFlight {
    /// By the digest of the blob.
    transfers: Keyed<Transfer>,
    /// By the chain id of the layer's snapshot.
    unpacking: Keyed<()>,
    /// By the directory of the new volume.
    filling: Keyed<()>,
}

impl std::fmt::Debug for Containerd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Containerd").field("namespace", &self.namespace).field("lease", &self.lease).finish()
    }
}

/// Connects.
///
/// # Errors
///
/// When nothing listens, or what listens does not answer as containerd.
pub async fn connect(socket: &Path, namespace: &str) -> Result<Containerd, Error> {
    let unavailable = |source| Error::Unavailable { socket: PathBuf::from(socket), source };
    let channel = containerd_client::connect(socket).await.map_err(unavailable)?;
    let containerd = Containerd {
        channel,
        namespace: namespace.to_owned(),
        lease: None,
        in_flight: InFlight::default(),
        max_image: u64::MAX,
    };
    containerd.version().await?;
    let made = containerd
        .client()
        .namespaces()
        .create(containerd.request(api::CreateNamespaceRequest {
            namespace: Some(api::Namespace { name: namespace.to_owned(), labels: HashMap::new() }),
        }))
        .await;
    if let Err(status) = made
        && status.code() != Code::AlreadyExists
    {
        return Err(Error::call("creating the namespace")(status));
    }
    Ok(containerd)
}

impl Containerd {
    /// containerd's version.
    ///
    /// # Errors
    ///
    /// When it does not answer.
    pub async fn version(&self) -> Result<String, Error> {
        let answer = self.client().version().version(self.request(())).await;
        Ok(answer.map_err(Error::call("asking its version"))?.into_inner().version)
    }

    /// Where the daemon keeps images and containers' files; nothing if it does not say.
    pub(crate) async fn directories(&self) -> Vec<PathBuf> {
        let request = self.request(api::PluginsRequest { filters: Vec::new() });
        let Ok(answer) = self.client().introspection().plugins(request).await else { return Vec::new() };
        let keeps = |plugin: &api::Plugin| {
            matches!(
                (plugin.r#type.as_str(), plugin.id.as_str()),
                ("io.containerd.content.v1", "content") | ("io.containerd.snapshotter.v1", SNAPSHOTTER)
            )
        };
        let plugins = answer.into_inner().plugins.into_iter().filter(keeps);
        plugins.filter_map(|plugin| plugin.exports.get("root").map(PathBuf::from)).collect()
    }

    /// The same daemon, with no image that takes more than so many bytes.
    #[must_use]
    pub fn with_max_image(self, max_image: u64) -> Self {
        Self { max_image, ..self }
    }

    pub(super) fn max_image(&self) -> u64 {
        self.max_image
    }

    /// The namespace in which everything happens.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    pub(super) fn transfers(&self) -> &Keyed<Transfer> {
        &self.in_flight.transfers
    }

    pub(super) fn filling(&self) -> &Keyed<()> {
        &self.in_flight.filling
    }

    pub(super) fn unpacking(&self) -> &Keyed<()> {
        &self.in_flight.unpacking
    }

    pub(super) fn client(&self) -> Client {
        Client::from(self.channel.clone())
    }

    /// A request in the namespace, under the lease, with the usual time limit.
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = self.unlimited_request(message);
        request.set_timeout(CALL_TIMEOUT);
        request
    }

    /// A request in the namespace, under the lease, that may take as long as it takes.
    pub(super) fn unlimited_request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        if let Ok(namespace) = self.namespace.parse() {
            metadata.insert("containerd-namespace", namespace);
        }
        if let Some(lease) = self.lease.as_ref().and_then(|lease| lease.parse().ok()) {
            metadata.insert("containerd-lease", lease);
        }
        request
    }

    /// The same connection under a new lease: nothing made through it is collected as garbage until
    /// [`Containerd::end_lease`]. From preparing a snapshot to creating its container there must be one, or the snapshot
    /// may go in between.
    pub(super) async fn with_lease(&self) -> Result<Self, Error> {
        let expires: prost_types::Timestamp = (SystemTime::now() + LEASE_TIME).into();
        let labels = HashMap::from([("containerd.io/gc.expire".to_owned(), expires.to_string())]);
        let id = format!("warren-{:016x}", rand::random::<u64>());
        let request = self.request(api::CreateRequest { id: id.clone(), labels });
        self.client().leases().create(request).await.map_err(Error::call("creating a lease"))?;
        Ok(Self { lease: Some(id), ..self.clone() })
    }

    pub(super) async fn end_lease(self) {
        self.end_lease_and(false).await;
    }

    /// Has containerd remove what it has no record of any more, as the file of a blob that was deleted, and waits for it.
    pub(super) async fn collect_garbage(&self) -> Result<(), Error> {
        self.with_lease().await?.end_lease_and(true).await;
        Ok(())
    }

    async fn end_lease_and(self, sync: bool) {
        let Some(id) = self.lease.clone() else { return };
        let unleased = Self { lease: None, ..self };
        let request = unleased.request(api::DeleteRequest { id, sync });
        if let Err(status) = unleased.client().leases().delete(request).await {
            // It expires by itself.
            tracing::debug!(message = status.message(), "a lease could not be ended");
        }
    }
}

/// Labels under which engines keep the name of what a container is part of, most telling first.
const SERVICE_LABELS: [&str; 4] =
    ["warren.service", "com.docker.compose.service", "com.docker.swarm.service.name", "io.kubernetes.container.name"];

/// The service that a container with these labels belongs to, whatever engine made it.
#[must_use]
pub fn service_label(labels: &HashMap<String, String>) -> Option<&str> {
    SERVICE_LABELS.iter().find_map(|label| labels.get(*label)).map(String::as_str)
}

/// A connection to each namespace; none when nothing answers.
async fn every_namespace(socket: &Path) -> Vec<Containerd> {
    let Ok(channel) = containerd_client::connect(socket).await else { return Vec::new() };
    let any = Containerd {
        channel,
        namespace: String::new(),
        lease: None,
        in_flight: InFlight::default(),
        max_image: u64::MAX,
    };
    let Ok(listed) = any.client().namespaces().list(api::ListNamespacesRequest::default()).await else {
        return Vec::new();
    };
    let here = |namespace: api::Namespace| Containerd { namespace: namespace.name, ..any.clone() };
    listed.into_inner().namespaces.into_iter().map(here).collect()
}

/// The service that a container of any engine on this containerd belongs to, by its labels.
pub async fn service_of(socket: &Path, id: &str) -> Option<String> {
    for here in every_namespace(socket).await {
        let request = here.request(api::GetContainerRequest { id: id.to_owned() });
        let Ok(answer) = here.client().containers().get(request).await else { continue };
        return service_label(&answer.into_inner().container?.labels).map(str::to_owned);
    }
    None
}

/// All containers of all engines on this containerd; none when it does not answer.
pub async fn all_containers(socket: &Path) -> Vec<Found> {
    let mut found = Vec::new();
    for here in every_namespace(socket).await {
        found.extend(here.containers().await.unwrap_or_default());
    }
    found
}
