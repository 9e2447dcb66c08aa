//! What somebody shows to prove who they are.

use std::{
    collections::BTreeSet,
    fmt, fs,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use data_encoding::HEXLOWER;
use rustls::{
    ClientConfig, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use crate::{Error, Identity, Role, tls};

/// A key, its certificate, and the authorities to believe: one file, so that they are always of each other.
const FILE: &str = "identity.pem";

/// Clocks of machines that have just signed and got a certificate may differ by as much.
const SLACK: Duration = Duration::from_secs(60);

struct Material {
    identity: Identity,
    not_before: SystemTime,
    not_after: SystemTime,
    authorities: String,
    client: Arc<ClientConfig>,
    /// A manager's.
    server: Option<Arc<ServerConfig>>,
}

/// Somebody's key and certificate. Cheap to clone; replaced while in use, and then by all clones. Does not show the key.
#[derive(Clone)]
pub struct Credentials(Arc<ArcSwap<Material>>, Arc<watch::Sender<()>>);

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Credentials").field(&self.identity()).finish()
    }
}

fn time(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

fn read(text: &str) -> Result<Material, Error> {
    let key = PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|error| Error::unusable("the key", error))?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let chain = certificates.map_err(|error| Error::unusable("the certificate", error))?;
    let [own, authorities @ ..] = chain.as_slice() else {
        return Err(Error::unusable("the certificate", "there is none"));
    };
    if authorities.is_empty() {
        return Err(Error::unusable("the authority's certificate", "there is none"));
    }
    let (identity, not_before, not_after) = tls::read(own)?;
    let authorities_at = text.match_indices("-----BEGIN CERTIFICATE-----").nth(1).map_or(text.len(), |(at, _)| at);
    let server = match identity.role {
        // Newcomers believe the authority by its digest: it is shown beside the certificate.
        Role::Manager => Some(Arc::new(tls::server(chain.clone(), key.clone_key(), authorities)?)),
        Role::Worker | Role::Admin => None,
    };
    Ok(Material {
        client: Arc::new(tls::client(vec![own.clone()], key, authorities)?),
        server,
        not_before: time(not_before),
        not_after: time(not_after),
        authorities: text[authorities_at..].to_owned(),
        identity,
    })
}

impl Credentials {
    /// Those of a key, its certificate, and the certificates of authorities, all in PEM.
    ///
    /// # Errors
    ///
    /// When they are none, or not of each other.
    pub fn new(key: &str, certificate: &str, authorities: &str) -> Result<Self, Error> {
        let material = read(&[key, certificate, authorities].join("\n"))?;
        Ok(Self::of(material))
    }

    fn of(material: Material) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(material)), Arc::default())
    }

    /// Makes new ones, keeps them in `directory`, and uses them from now on.
    ///
    /// # Errors
    ///
    /// When they are none or not of each other, or cannot be kept. The old ones are then still used.
    pub fn replace(&self, directory: &Path, key: &str, certificate: &str, authorities: &str) -> Result<(), Error> {
        self.0.store(Arc::new(keep(directory, key, certificate, authorities)?));
        self.1.send_replace(());
        Ok(())
    }

    /// Keeps new ones in `directory`.
    ///
    /// # Errors
    ///
    /// As [`Self::replace`].
    pub fn create(directory: &Path, key: &str, certificate: &str, authorities: &str) -> Result<Self, Error> {
        Ok(Self::of(keep(directory, key, certificate, authorities)?))
    }

    /// Those that are kept in `directory`, if there are any.
    ///
    /// # Errors
    ///
    /// When they cannot be read or used.
    pub fn load(directory: &Path) -> Result<Option<Self>, Error> {
        let path = directory.join(FILE);
        let named = || path.display().to_string();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::File { path: named(), source }),
        };
        let checked = check(&text).ok_or_else(|| Error::Damaged {
            path: named(),
            why: "its checksum is missing, or does not match".to_owned(),
        })?;
        let material = read(checked).map_err(|error| Error::Damaged { path: named(), why: error.to_string() })?;
        Ok(Some(Self::of(material)))
    }

    /// Gives those that are kept in `directory` a checksum, if they are of a version that gave them none.
    ///
    /// # Errors
    ///
    /// When they cannot be read or written.
    pub fn complete(directory: &Path) -> Result<(), Error> {
        let path = directory.join(FILE);
        match fs::read_to_string(&path) {
            Ok(text) if !text.contains(CHECKSUM) => write(&path, &text),
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::File { path: path.display().to_string(), source })
            }
            _ => Ok(()),
        }
    }

    /// Removes those that are kept in `directory`.
    ///
    /// # Errors
    ///
    /// When they cannot be removed, or there are none.
    pub fn remove(directory: &Path) -> Result<(), Error> {
        let path = directory.join(FILE);
        fs::remove_file(&path).map_err(|source| Error::File { path: path.display().to_string(), source })
    }

    /// Whose they are.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.0.load().identity.clone()
    }

    /// The authorities that they believe, in PEM.
    #[must_use]
    pub fn authorities(&self) -> String {
        self.0.load().authorities.clone()
    }

    /// What tells the authorities that they believe from others.
    #[must_use]
    pub fn digest(&self) -> String {
        authorities_digest(&self.0.load().authorities)
    }

    /// When they begin and end to be valid.
    #[must_use]
    pub fn validity(&self) -> (SystemTime, SystemTime) {
        let material = self.0.load();
        (material.not_before, material.not_after)
    }

    /// Whether they are valid now, by this machine's clock.
    ///
    /// # Errors
    ///
    /// When they are not, in words.
    pub fn check_valid(&self) -> Result<(), String> {
        let (from, to) = self.validity();
        let now = SystemTime::now();
        let ago = |time: SystemTime| now.duration_since(time).unwrap_or_default().as_secs() / 3600;
        if now > to {
            return Err(format!("the certificate has run out {} hours ago, by this machine's clock", ago(to)));
        }
        if now + SLACK < from {
            return Err("the certificate is not valid yet: this machine's clock is wrong".to_owned());
        }
        Ok(())
    }

    /// Returns once one of the authorities that they believe now is not believed any more.
    pub(crate) async fn forget_one(&self) {
        let certificates = || -> BTreeSet<Vec<u8>> {
            let authorities = self.authorities();
            CertificateDer::pem_slice_iter(authorities.as_bytes()).flatten().map(|one| one.to_vec()).collect()
        };
        let mut changes = self.1.subscribe();
        let believed = certificates();
        while certificates().is_superset(&believed) {
            // The sender is this value's own.
            let _ = changes.changed().await;
        }
    }

    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.0.load().client)
    }

    pub(crate) fn server(&self) -> Option<Arc<ServerConfig>> {
        self.0.load().server.clone()
    }
}

/// What tells some authorities' certificates, in PEM and in this order, from others.
#[must_use]
pub fn authorities_digest(authorities: &str) -> String {
    let certificates = CertificateDer::pem_slice_iter(authorities.as_bytes()).flatten();
    let digest =
        certificates.fold(Sha256::new(), |digest, certificate| digest.chain_update(Sha256::digest(certificate)));
    HEXLOWER.encode(&digest.finalize())
}

/// Before the file's SHA-256, in its last line.
const CHECKSUM: &str = "SHA-256 ";

/// What a file says, if it is whole.
fn check(text: &str) -> Option<&str> {
    let (said, sum) = text.split_once(CHECKSUM)?;
    (HEXLOWER.encode(&Sha256::digest(said)) == sum.trim_end()).then_some(said)
}

fn keep(directory: &Path, key: &str, certificate: &str, authorities: &str) -> Result<Material, Error> {
    let text = [key.trim(), certificate.trim(), authorities.trim(), ""].join("\n");
    let material = read(&text)?;
    let path = directory.join(FILE);
    fs::create_dir_all(directory).map_err(|source| Error::File { path: path.display().to_string(), source })?;
    write(&path, &text)?;
    Ok(material)
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    let text = format!("{text}{CHECKSUM}{}\n", HEXLOWER.encode(&Sha256::digest(text)));
    warren_durable::replace(path, text.as_bytes())
        .map_err(|source| Error::File { path: path.display().to_string(), source })
}
