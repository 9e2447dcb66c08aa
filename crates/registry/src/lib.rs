//! Images in OCI registries: which bytes a name means now, and a stream of them. Mirrors are asked first; every registry is
//! spoken to by HTTPS but for those on this machine and those that are said to be plain.

pub mod cli;
mod credentials;

pub use credentials::Credentials;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    num::NonZeroUsize,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures::stream::BoxStream;
use lru::LruCache;
use oci_client::{
    Client, Reference as Target, RegistryOperation,
    client::{BlobResponse, Certificate, CertificateEncoding, ClientConfig, ClientProtocol},
    errors::{DigestError, OciDistributionError, OciErrorCode},
    manifest::OciDescriptor,
};
use warren_spec::{ImageName, Reference};

/// How long a registry may take to accept a connection, and then to say anything: one that is a cache says nothing of a blob before
/// it has all of it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const READ_TIMEOUT: Duration = Duration::from_secs(120);
/// How long it may take for a manifest altogether.
const MANIFEST_TIMEOUT: Duration = Duration::from_secs(30);
/// No manifest is larger; the distribution specification asks registries for 4 MiB at least.
const MAX_MANIFEST: usize = 4 << 20;

/// What manifests may be: OCI's and Docker's, of one platform or several.
const ACCEPTED: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// How registries are reached.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Hosts that are asked before a registry, by the registry's name; `http://` or `https://` may stand before them.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Hosts that speak HTTP.
    pub plain: BTreeSet<String>,
    /// Files with certificates, as PEM, that are trusted besides the system's.
    pub ca_files: Vec<PathBuf>,
}

/// Why there is no image to be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The registry knows no such image.
    #[error("{registry} has no image {image}")]
    NotFound {
        /// Who was asked.
        registry: String,
        /// For what.
        image: String,
    },
    /// Not for whoever asks.
    #[error("{registry} does not let {image} be pulled with these credentials")]
    Unauthorized {
        /// Who was asked.
        registry: String,
        /// For what.
        image: String,
    },
    /// The registry does not answer, or not now.
    #[error("{registry} does not answer: {why}")]
    Unavailable {
        /// Who was asked.
        registry: String,
        /// Why not.
        why: String,
    },
    /// It answers something that cannot be.
    #[error("{registry} answers for {image} what cannot be used: {why}")]
    Unusable {
        /// Who was asked.
        registry: String,
        /// For what.
        image: String,
        /// What is wrong with it.
        why: String,
    },
    /// A file with certificates.
    #[error("the certificates in {} cannot be read: {source}", path.display())]
    Certificates {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Nothing here can be trusted, so no registry can be asked, nor one without TLS: the client of the OCI library must have
    /// certificates to be made.
    #[error(
        "no certificates of authorities are installed (Debian's package is ca-certificates), so {registry} cannot be asked"
    )]
    NoAuthorities {
        /// Who was to be asked.
        registry: String,
    },
    /// Credentials that are none.
    #[error("the registry's credentials cannot be read: {0}")]
    Credentials(String),
}

impl Error {
    /// Whether asking again later may help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::NoAuthorities { .. })
    }

    fn of(error: OciDistributionError, registry: &str, image: &str) -> Self {
        use OciDistributionError as E;

        let (registry, image) = (registry.to_owned(), image.to_owned());
        match error {
            E::ImageManifestNotFoundError(_) | E::ServerError { code: 404, .. } => Self::NotFound { registry, image },
            E::UnauthorizedError { .. } | E::AuthenticationFailure(_) | E::ServerError { code: 401 | 403, .. } => {
                Self::Unauthorized { registry, image }
            }
            E::RegistryError { envelope, .. } => {
                let has = |codes: &[OciErrorCode]| envelope.errors.iter().any(|error| codes.contains(&error.code));
                if has(&[OciErrorCode::ManifestUnknown, OciErrorCode::NameUnknown, OciErrorCode::NotFound]) {
                    Self::NotFound { registry, image }
                } else if has(&[OciErrorCode::Unauthorized, OciErrorCode::Denied]) {
                    Self::Unauthorized { registry, image }
                } else {
                    Self::Unavailable { registry, why: envelope.to_string() }
                }
            }
            E::RequestError(error) => Self::Unavailable { registry, why: root_cause(&error) },
            E::ServerError { code, .. } => Self::Unavailable { registry, why: format!("it answers {code}") },
            E::IoError(error) => Self::Unavailable { registry, why: root_cause(&error) },
            other => Self::Unusable { registry, image, why: other.to_string() },
        }
    }
}

fn is_unauthorized(error: &OciDistributionError) -> bool {
    use OciDistributionError as E;

    matches!(error, E::UnauthorizedError { .. } | E::ServerError { code: 401, .. })
        || matches!(error, E::RegistryError { envelope, .. }
            if envelope.errors.iter().any(|error| error.code == OciErrorCode::Unauthorized))
}

/// The last of an error's causes: the others say that a request failed, and repeat its address.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// A manifest's bytes as the registry has them.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// `sha256:...` of the bytes.
    pub digest: String,
    /// What it says it is.
    pub media_type: String,
    /// JSON.
    pub bytes: Bytes,
}

/// A blob on its way.
pub struct Blob {
    /// The bytes as they come.
    pub stream: BoxStream<'static, Result<Bytes, io::Error>>,
    /// Which byte of the blob comes first. What begins with the first one is verified: the stream fails at its end if the bytes are
    /// not what the digest says.
    pub offset: u64,
}

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blob").field("offset", &self.offset).finish_non_exhaustive()
    }
}

/// All registries.
#[derive(Clone, Debug, Default)]
pub struct Registries {
    options: Options,
    certificates: Vec<Vec<u8>>,
    clients: Clients,
}

/// Clients in use lately, by where and for whom. To make one takes milliseconds, in which it reads the system's certificates; it
/// keeps connections and tokens.
#[derive(Clone)]
struct Clients(Arc<Mutex<LruCache<Account, Client>>>);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Account {
    host: String,
    plain: bool,
    credentials: Credentials,
}

const CLIENTS: NonZeroUsize = NonZeroUsize::new(32).unwrap();

impl Default for Clients {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(LruCache::new(CLIENTS))))
    }
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clients").finish_non_exhaustive()
    }
}

impl Clients {
    fn known(&self) -> MutexGuard<'_, LruCache<Account, Client>> {
        // Every change is one insertion or removal: a panic leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A registry, or a mirror of it, that has an image.
pub struct Repository {
    client: Client,
    target: Target,
    account: Account,
    image: ImageName,
}

impl std::fmt::Debug for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Repository").field("image", &self.image).field("registry", &self.account.host).finish()
    }
}

/// Whether a host is this machine, which nobody else can listen in on.
fn is_local(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

impl Registries {
    /// Reads what the options name.
    ///
    /// # Errors
    ///
    /// When a file with certificates cannot be read.
    pub fn new(options: Options) -> Result<Self, Error> {
        // The one provider of cryptography; installed by whoever comes first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let read = |path: &PathBuf| fs::read(path).map_err(|source| Error::Certificates { path: path.clone(), source });
        let certificates = options.ca_files.iter().map(read).collect::<Result<_, _>>()?;
        Ok(Self { options, certificates, clients: Clients::default() })
    }

    fn repository(&self, image: &ImageName, address: &str, credentials: &Credentials) -> Result<Repository, Error> {
        let (host, plain) = match address.split_once("://") {
            Some((scheme, host)) => (host, scheme == "http"),
            None => (address, self.options.plain.contains(address) || is_local(address)),
        };
        let account = Account { host: host.to_owned(), plain, credentials: credentials.clone() };
        let client = self.client(&account, image)?;
        let (host_name, repository) = (host.to_owned(), image.repository().to_owned());
        let target = match image.reference() {
            Reference::Tag(tag) => Target::with_tag(host_name, repository, tag.clone()),
            Reference::Digest(digest) => Target::with_digest(host_name, repository, digest.clone()),
        };
        Ok(Repository { client, target, account, image: image.clone() })
    }

    fn client(&self, account: &Account, image: &ImageName) -> Result<Client, Error> {
        if let Some(client) = self.clients.known().get(account) {
            return Ok(client.clone());
        }
        // The library panics without them, whatever it is told to trust.
        if rustls_native_certs::load_native_certs().certs.is_empty() {
            return Err(Error::NoAuthorities { registry: account.host.clone() });
        }
        let certificate = |data: &Vec<u8>| Certificate { encoding: CertificateEncoding::Pem, data: data.clone() };
        let client = Client::try_from(ClientConfig {
            protocol: if account.plain { ClientProtocol::Http } else { ClientProtocol::Https },
            extra_root_certificates: self.certificates.iter().map(certificate).collect(),
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            user_agent: concat!("warren/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        });
        let client = client.map_err(|error| Error::of(error, &account.host, &image.to_string()))?;
        self.clients.known().put(account.clone(), client.clone());
        Ok(client)
    }

    /// The registry of an image itself, whatever mirrors there are. Asks nobody.
    ///
    /// # Errors
    ///
    /// When there are no certificates to trust.
    pub fn origin(&self, image: &ImageName, credentials: &Credentials) -> Result<Repository, Error> {
        self.repository(image, image.registry(), credentials)
    }

    /// Finds the first mirror, or the registry itself, that has the image, and its manifest or index.
    ///
    /// # Errors
    ///
    /// What the registry itself says, if none has it.
    pub async fn find(&self, image: &ImageName, credentials: &Credentials) -> Result<(Repository, Manifest), Error> {
        for mirror in self.options.mirrors.get(image.registry()).into_iter().flatten() {
            // Credentials are the registry's own.
            let repository = self.repository(image, mirror, &Credentials::Anonymous)?;
            match repository.manifest().await {
                Ok(manifest) => return Ok((repository, manifest)),
                Err(error) => tracing::warn!(mirror, %error, "a mirror is of no help"),
            }
        }
        let repository = self.origin(image, credentials)?;
        let manifest = repository.manifest().await.inspect_err(|error| {
            // Its tokens may be the reason.
            if matches!(error, Error::Unauthorized { .. }) {
                self.clients.known().pop(&repository.account);
            }
        })?;
        Ok((repository, manifest))
    }
}

impl Repository {
    fn failed(&self, error: OciDistributionError) -> Error {
        Error::of(error, &self.account.host, &self.image.to_string())
    }

    async fn manifest_of(&self, target: &Target) -> Result<Manifest, Error> {
        let answered = tokio::time::timeout(MANIFEST_TIMEOUT, self.manifest_unhurried(target)).await;
        answered.unwrap_or_else(|_| Err(self.interrupted(format!("no manifest in {} s", MANIFEST_TIMEOUT.as_secs()))))
    }

    async fn manifest_unhurried(&self, target: &Target) -> Result<Manifest, Error> {
        let auth = self.account.credentials.for_client();
        // Now, so that a refusal is told from an image that is not there.
        let authorised = self.client.auth(target, &auth, RegistryOperation::Pull).await;
        authorised.map_err(|error| self.failed(error))?;
        let pulled = self.client.pull_manifest_raw(target, &auth, &ACCEPTED).await;
        let (bytes, digest) = pulled.map_err(|error| self.failed(error))?;
        if bytes.len() > MAX_MANIFEST {
            return Err(self.unusable("its manifest is too large to be one"));
        }
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Typed {
            media_type: Option<String>,
            manifests: Option<serde::de::IgnoredAny>,
        }
        let typed: Typed = serde_json::from_slice(&bytes).map_err(|error| self.unusable(error.to_string()))?;
        // OCI lets it be left out; what it is shows in what it has.
        let media_type =
            typed.media_type.unwrap_or_else(|| ACCEPTED[usize::from(typed.manifests.is_none())].to_owned());
        Ok(Manifest { digest, media_type, bytes })
    }

    async fn manifest(&self) -> Result<Manifest, Error> {
        self.manifest_of(&self.target).await
    }

    /// Another manifest of the same repository.
    ///
    /// # Errors
    ///
    /// When the registry does not have it.
    pub async fn manifest_at(&self, digest: &str) -> Result<Manifest, Error> {
        let (registry, repository) = (self.account.host.clone(), self.image.repository().to_owned());
        self.manifest_of(&Target::with_digest(registry, repository, digest.to_owned())).await
    }

    /// The registry, or the mirror, that is asked: host and port.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.account.host
    }

    /// The bytes of a layer or configuration from `offset` on, or from the first on if the registry gives no part of a blob.
    ///
    /// # Errors
    ///
    /// When the registry does not have them.
    pub async fn blob(&self, digest: &str, size: u64, offset: u64) -> Result<Blob, Error> {
        let size = i64::try_from(size).unwrap_or(i64::MAX);
        let descriptor = OciDescriptor { digest: digest.to_owned(), size, ..OciDescriptor::default() };
        if offset > 0 {
            match self.client.pull_blob_stream_partial(&self.target, &descriptor, offset, None).await {
                Ok(BlobResponse::Partial(part)) => return Ok(Blob { stream: part.stream, offset }),
                Ok(BlobResponse::Full(whole)) => return Ok(Blob { stream: whole.stream, offset: 0 }),
                Err(error) => {
                    tracing::debug!(digest, %error, "the registry gives no part of a blob; asking for the whole")
                }
            }
        }
        let mut stream = self.client.pull_blob_stream(&self.target, &descriptor).await;
        if stream.as_ref().is_err_and(is_unauthorized) {
            // The token may have expired since the manifest came.
            let auth = self.account.credentials.for_client();
            let authorised = self.client.auth(&self.target, &auth, RegistryOperation::Pull).await;
            authorised.map_err(|error| self.failed(error))?;
            stream = self.client.pull_blob_stream(&self.target, &descriptor).await;
        }
        Ok(Blob { stream: stream.map_err(|error| self.failed(error))?.stream, offset: 0 })
    }

    /// An error of reading a blob, in this registry's name: bytes that are not those of the digest are unusable, whatever else
    /// happens may not happen again.
    #[must_use]
    pub fn broken(&self, digest: &str, error: &io::Error) -> Error {
        let why = format!("{digest}: {}", root_cause(error));
        match error.get_ref() {
            Some(inner) if inner.is::<DigestError>() => self.unusable(why),
            _ => self.interrupted(why),
        }
    }

    /// A transfer that ended before its time.
    #[must_use]
    pub fn interrupted(&self, why: String) -> Error {
        Error::Unavailable { registry: self.account.host.clone(), why }
    }

    /// An answer that cannot be used.
    #[must_use]
    pub fn unusable(&self, why: impl Into<String>) -> Error {
        Error::Unusable { registry: self.account.host.clone(), image: self.image.to_string(), why: why.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_trusted_without_tls() {
        for local in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.9.9.9"] {
            assert!(is_local(local), "{local}");
        }
        for other in ["docker.io", "192.0.2.1:5000", "localhost.example", "127.0.0.1.example:80"] {
            assert!(!is_local(other), "{other}");
        }
    }
}
