//! How a manager's data directory comes to be: by founding a cluster, or by joining one. Both only write files; the manager
//! that uses the directory does the rest, and waits for them if it is there already.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};
use warren_pki::{Authority, Credentials, Identity, Request, Role, Secret, Token};
use warren_proto::v1;

use crate::{
    clock::System,
    data::data_dir::{self, IDENTITY},
    ids::NodeId,
    state::{SealedAuthority, TokenRole},
    trust::{
        founding::{self, CERTIFICATE_LIFETIME, Networks},
        vault::{self, Vault},
    },
};

/// Where its log and snapshots are, below its data directory.
const FOUNDING: &str = "founding.json";
const MANAGERS: &str = "managers.json";

/// The id of a cluster's first manager.
const FIRST_MANAGER: u64 = 1;

/// Why a data directory could not be made a manager's.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is one already.
    #[error("{} is a manager's already: a machine is in one cluster at a time", .0.display())]
    Taken(PathBuf),
    /// What was joined is no manager's.
    #[error("the cluster's answer cannot be used: {0}")]
    Answer(&'static str),
    /// Keys and certificates.
    #[error(transparent)]
    Pki(#[from] warren_pki::Error),
    /// The key of secrets.
    #[error(transparent)]
    Vault(#[from] vault::Error),
    /// The directory.
    #[error(transparent)]
    DataDir(#[from] data_dir::Error),
    /// A file in it.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What a founder is told, once.
#[derive(Debug)]
pub struct Founded {
    /// The cluster's id.
    pub cluster_id: String,
    /// Lets managers in.
    pub manager_token: Token,
    /// Lets nodes in.
    pub worker_token: Token,
}

/// What the manager is to put into the state when it first runs.
#[derive(Serialize, Deserialize)]
struct Founding {
    cluster_id: String,
    authority: SealedAuthority,
    tokens: Vec<(String, TokenRole)>,
    hostname: String,
}

fn write(directory: &Path, file: &str, content: &impl Serialize) -> Result<(), Error> {
    let path = directory.join(file);
    let failed = |source| Error::File { path: path.display().to_string(), source };
    let bytes = serde_json::to_vec_pretty(content).map_err(|error| failed(error.into()))?;
    warren_durable::replace(&path, &bytes).map_err(failed)
}

fn read<T: for<'a> Deserialize<'a>>(directory: &Path, file: &str) -> Result<Option<T>, Error> {
    let path = directory.join(file);
    let failed = |source| Error::File { path: path.display().to_string(), source };
    match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| failed(error.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

/// Whether a directory is nobody's; it is made if need be.
///
/// # Errors
///
/// When it is somebody's, or cannot be made.
pub fn check_free(directory: &Path) -> Result<(), Error> {
    match data_dir::open(directory)? {
        Some(_) => Err(Error::Taken(directory.to_owned())),
        None => Ok(data_dir::prepare(directory)?),
    }
}

/// Makes the directory that of the first manager of a new cluster.
///
/// # Errors
///
/// When it is somebody's, or cannot be written.
pub fn found(directory: &Path, hostname: &str) -> Result<Founded, Error> {
    check_free(directory)?;
    let cluster_id = NodeId::generate(&System).to_string();
    let now = SystemTime::now();
    let authority = Authority::generate(&cluster_id, now)?;
    let identity = Identity { cluster: cluster_id.clone(), role: Role::Manager, id: FIRST_MANAGER.to_string() };
    let request = Request::new()?;
    let certificate = authority.sign(request.pem(), &identity, now, CERTIFICATE_LIFETIME)?;
    Credentials::create(&directory.join(IDENTITY), &request.key_pem(), &certificate, authority.certificate_pem())?;
    let vault = Vault::open(directory)?;
    let (manager, worker) = (Secret::random()?, Secret::random()?);
    let founding = Founding {
        authority: SealedAuthority {
            certificate: authority.certificate_pem().to_owned(),
            key: vault.seal_authority(&cluster_id, &authority.key_pem())?,
        },
        tokens: vec![(manager.hash(), TokenRole::Manager), (worker.hash(), TokenRole::Worker)],
        hostname: hostname.to_owned(),
        cluster_id: cluster_id.clone(),
    };
    write(directory, FOUNDING, &founding)?;
    data_dir::settle(directory, FIRST_MANAGER)?;
    Ok(Founded {
        cluster_id,
        manager_token: Token::new(authority.certificate_pem(), manager)?,
        worker_token: Token::new(authority.certificate_pem(), worker)?,
    })
}

/// Makes the directory that of a manager that was let into a cluster, with the key of its request.
///
/// # Errors
///
/// When it is somebody's, or cannot be written.
pub fn settle(directory: &Path, joined: &v1::JoinClusterResponse, key: &str) -> Result<(), Error> {
    check_free(directory)?;
    let id = joined.id.parse().map_err(|_| Error::Answer("a manager's id is a number"))?;
    // What an `init` that was cut short left is nobody's.
    founded(directory)?;
    Credentials::create(&directory.join(IDENTITY), key, &joined.certificate, &joined.authorities)?;
    Vault::create(directory, &joined.key_of_secrets)?;
    write(directory, MANAGERS, &joined.managers)?;
    Ok(data_dir::settle(directory, id)?)
}

/// The cluster that the manager of a directory is to found, if it is.
///
/// # Errors
///
/// When the directory cannot be read.
pub(crate) fn founding(directory: &Path, networks: Networks) -> Result<Option<founding::Founding>, Error> {
    let founding: Option<Founding> = read(directory, FOUNDING)?;
    Ok(founding.map(|founding| founding::Founding {
        cluster_id: Some(founding.cluster_id),
        networks,
        authority: Some(founding.authority),
        tokens: founding.tokens,
        hostname: founding.hostname,
    }))
}

/// The cluster is founded: what it was founded with is in its state.
///
/// # Errors
///
/// When the directory cannot be written.
pub(crate) fn founded(directory: &Path) -> Result<(), Error> {
    let path = directory.join(FOUNDING);
    match fs::remove_file(&path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(Error::File { path: path.display().to_string(), source })
        }
        _ => Ok(()),
    }
}

/// The managers that were there when this one joined.
///
/// # Errors
///
/// When the directory cannot be read.
pub(crate) fn managers(directory: &Path) -> Result<Vec<String>, Error> {
    Ok(read(directory, MANAGERS)?.unwrap_or_default())
}
