//! Images in OCI registries: which bytes a name means now, and a stream of them. Mirrors are asked first; every registry is
//! spoken to by HTTPS but for those on this machine and those that are said to be plain.

pub mod cli;
mod credentials;
mod http;

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
use http::{Client, Failure, Mismatch};
use lru::LruCache;
use warren_spec::{ImageName, Reference};

/// How long it may take for a manifest altogether.
const MANIFEST_TIMEOUT: Duration = Duration::from_secs(30);

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
    /// Nothing here can be trusted, so no registry can be asked that speaks HTTPS.
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

    fn of(failure: Failure, registry: &str, image: &str) -> Self {
        let (registry, image) = (registry.to_owned(), image.to_owned());
        match failure {
            Failure::NotFound => Self::NotFound { registry, image },
            Failure::Unauthorized => Self::Unauthorized { registry, image },
            Failure::Unavailable(why) => Self::Unavailable { registry, why },
            Failure::Unusable(why) => Self::Unusable { registry, image, why },
        }
    }
}

/// Characters of what a parser says, which quotes what it has read.
const QUOTED: usize = 160;

/// What is wrong with a document that somebody else made: of what it says itself, only a little is quoted.
#[must_use]
pub fn not_json(error: &serde_json::Error) -> String {
    let said = error.to_string();
    match said.char_indices().nth(QUOTED) {
        Some((end, _)) => format!("{}\u{2026} (line {}, column {})", &said[..end], error.line(), error.column()),
        None => said,
    }
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
    certificates: Vec<reqwest::Certificate>,
    clients: Clients,
}

/// Clients in use lately, by where and for whom. To make one takes milliseconds, in which it reads the system's certificates; it
/// keeps connections and tokens.
#[derive(Clone)]
struct Clients(Arc<Mutex<LruCache<Account, Arc<Client>>>>);

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
    fn known(&self) -> MutexGuard<'_, LruCache<Account, Arc<Client>>> {
        // Every change is one insertion or removal: a panic leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A registry, or a mirror of it, that has an image.
pub struct Repository {
    client: Arc<Client>,
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
        let read = |path: &PathBuf| {
            let certificates = fs::read(path)
                .and_then(|bytes| reqwest::Certificate::from_pem_bundle(&bytes).map_err(io::Error::other));
            certificates.map_err(|source| Error::Certificates { path: path.clone(), source })
        };
        let certificates = options.ca_files.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        let certificates = certificates.into_iter().flatten().collect();
        Ok(Self { options, certificates, clients: Clients::default() })
    }

    fn repository(&self, image: &ImageName, address: &str, credentials: &Credentials) -> Result<Repository, Error> {
        let (host, plain) = match address.split_once("://") {
            Some((scheme, host)) => (host, scheme == "http"),
            None => (address, self.options.plain.contains(address) || is_local(address)),
        };
        let account = Account { host: host.to_owned(), plain, credentials: credentials.clone() };
        let client = self.client(&account, image)?;
        Ok(Repository { client, account, image: image.clone() })
    }

    fn client(&self, account: &Account, image: &ImageName) -> Result<Arc<Client>, Error> {
        if let Some(client) = self.clients.known().get(account) {
            return Ok(Arc::clone(client));
        }
        let system = rustls_native_certs::load_native_certs().certs;
        // One that cannot be read is nobody's.
        let system = system.iter().filter_map(|certificate| reqwest::Certificate::from_der(certificate).ok());
        let trusted: Vec<_> = system.chain(self.certificates.iter().cloned()).collect();
        if trusted.is_empty() && !account.plain {
            return Err(Error::NoAuthorities { registry: account.host.clone() });
        }
        let client = Client::new(&account.host, account.plain, account.credentials.clone(), &trusted);
        let client = Arc::new(client.map_err(|failure| Error::of(failure, &account.host, &image.to_string()))?);
        self.clients.known().put(account.clone(), Arc::clone(&client));
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
    fn failed(&self, failure: Failure) -> Error {
        Error::of(failure, &self.account.host, &self.image.to_string())
    }

    async fn manifest_of(&self, reference: &str) -> Result<Manifest, Error> {
        let answered = tokio::time::timeout(MANIFEST_TIMEOUT, self.manifest_unhurried(reference)).await;
        answered.unwrap_or_else(|_| Err(self.interrupted(format!("no manifest in {} s", MANIFEST_TIMEOUT.as_secs()))))
    }

    async fn manifest_unhurried(&self, reference: &str) -> Result<Manifest, Error> {
        let asked = self.client.manifest(self.image.repository(), reference, &ACCEPTED).await;
        let (bytes, digest) = asked.map_err(|failure| self.failed(failure))?;
        #[derive(serde::Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Typed {
            media_type: Option<String>,
            manifests: Option<serde::de::IgnoredAny>,
        }
        let typed: Typed = serde_json::from_slice(&bytes).map_err(|error| self.unusable(not_json(&error)))?;
        // OCI lets it be left out; what it is shows in what it has.
        let media_type =
            typed.media_type.unwrap_or_else(|| ACCEPTED[usize::from(typed.manifests.is_none())].to_owned());
        Ok(Manifest { digest, media_type, bytes })
    }

    async fn manifest(&self) -> Result<Manifest, Error> {
        match self.image.reference() {
            Reference::Tag(reference) | Reference::Digest(reference) => self.manifest_of(reference).await,
        }
    }

    /// Another manifest of the same repository.
    ///
    /// # Errors
    ///
    /// When the registry does not have it.
    pub async fn manifest_at(&self, digest: &str) -> Result<Manifest, Error> {
        self.manifest_of(digest).await
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
    pub async fn blob(&self, digest: &str, offset: u64) -> Result<Blob, Error> {
        let repository = self.image.repository();
        if offset > 0 {
            match self.client.blob(repository, digest, offset).await {
                Ok((stream, offset)) => return Ok(Blob { stream, offset }),
                Err(why) => tracing::debug!(digest, ?why, "the registry gives no part of a blob; asking for the whole"),
            }
        }
        let whole = self.client.blob(repository, digest, 0).await;
        let (stream, offset) = whole.map_err(|failure| self.failed(failure))?;
        Ok(Blob { stream, offset })
    }

    /// An error of reading a blob, in this registry's name: bytes that are not those of the digest are unusable, whatever else
    /// happens may not happen again.
    #[must_use]
    pub fn broken(&self, digest: &str, error: &io::Error) -> Error {
        let why = format!("{digest}: {}", root_cause(error));
        match error.get_ref() {
            Some(inner) if inner.is::<Mismatch>() => self.unusable(why),
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
    fn little_is_quoted_of_what_is_no_manifest() {
        let document = format!("{{\"manifests\": \"{}\"}}", "x".repeat(1 << 20));
        let error = serde_json::from_str::<std::collections::HashMap<String, Vec<u8>>>(&document).expect_err("no list");
        let said = not_json(&error);
        assert!(said.starts_with("invalid type: string \"xxx") && said.len() < 250, "{said}");
        assert!(said.ends_with("(line 1, column 1048592)"), "{said}");
    }

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
