//! The cluster that a node is in: its certificate, and the managers that it knows. Both are files, which joining writes, before
//! the agent is started or while it waits.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use rand::seq::SliceRandom as _;
use tokio::sync::watch;
use warren_pki::{Asked, Credentials, Dialer};
use warren_proto::v1::{self, cluster_client::ClusterClient};

/// Where a node's key and certificate are, below its data directory.
const IDENTITY: &str = "identity";
const MANAGERS: &str = "managers.json";
const NODE_ID: &str = "node-id";
/// There once the agent has been in session with the cluster that it is in; holds the node's id.
const REGISTERED: &str = "registered";
/// How the node is called, where joining said it.
const HOSTNAME: &str = "hostname";
/// How often a node that is in no cluster looks whether it is in one now.
const LOOK: Duration = Duration::from_secs(10);
/// Between attempts to say which authorities the node believes.
const CONFIRM_AGAIN: Duration = Duration::from_millis(500);

/// Why there is no way to a manager.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Keys and certificates.
    #[error(transparent)]
    Pki(#[from] warren_pki::Error),
    /// The agent was started as another.
    #[error("this node is {0} in its cluster now: restart the agent")]
    Renamed(String),
    /// The managers would not believe it.
    #[error(
        "{why}; if the clock is right, remove the node (`warren node rm` at a manager), move {} away, and let it join again",
        directory.display()
    )]
    Expired {
        /// Since when.
        why: String,
        /// The node's data directory.
        directory: PathBuf,
    },
    /// It is in a cluster already.
    #[error("{} is a node's already: a machine is in one cluster at a time", .0.display())]
    Taken(PathBuf),
    /// A file.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Error {
    let path = path.display().to_string();
    move |source| Error::File { path: path.clone(), source }
}

/// The id that a node has given itself, or was given; `None` when it has none yet.
#[must_use]
pub fn known_id(data_dir: &Path) -> Option<String> {
    let id = fs::read_to_string(data_dir.join(NODE_ID)).ok()?.trim().to_owned();
    Some(id).filter(|id| !id.is_empty())
}

/// The node's id: random, made once and kept.
pub(crate) fn node_id(data_dir: &Path) -> io::Result<String> {
    if warren_durable::private_directory(data_dir)? {
        tracing::warn!(directory = %data_dir.display(), "the data directory was open to others than root, and is not any more");
    }
    let path = data_dir.join(NODE_ID);
    match fs::read_to_string(&path) {
        Ok(id) if !id.trim().is_empty() => Ok(id.trim().to_owned()),
        Ok(_) => Err(io::Error::new(io::ErrorKind::InvalidData, format!("{} is empty", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let id = format!("{:032x}", rand::random::<u128>());
            warren_durable::replace(&path, id.as_bytes())?;
            Ok(id)
        }
        Err(error) => Err(error),
    }
}

/// Whether a data directory is that of a cluster's node.
///
/// # Errors
///
/// When it is.
pub fn check_free(data_dir: &Path) -> Result<(), Error> {
    match Credentials::load(&data_dir.join(IDENTITY))? {
        Some(_) => Err(Error::Taken(data_dir.to_owned())),
        None => Ok(()),
    }
}

/// Whether the agent has been in session since its node was let into its cluster.
#[must_use]
pub fn has_registered(data_dir: &Path) -> bool {
    fs::read_to_string(data_dir.join(REGISTERED)).is_ok_and(|id| Some(id) == known_id(data_dir))
}

/// Notes that the agent is in session.
pub(crate) fn note_registered(data_dir: &Path, node_id: &str) {
    if !has_registered(data_dir)
        && let Err(error) = fs::write(data_dir.join(REGISTERED), node_id)
    {
        tracing::warn!(%error, "that this node is in session cannot be noted");
    }
}

/// How a node is to be called, where joining said it; `None` where it did not.
#[must_use]
pub fn given_hostname(data_dir: &Path) -> Option<String> {
    let name = fs::read_to_string(data_dir.join(HOSTNAME)).ok()?.trim().to_owned();
    Some(name).filter(|name| !name.is_empty())
}

/// Keeps how a node is to be called.
///
/// # Errors
///
/// When it cannot be written.
pub fn give_hostname(data_dir: &Path, hostname: &str) -> Result<(), Error> {
    let path = data_dir.join(HOSTNAME);
    warren_durable::replace(&path, hostname.as_bytes()).map_err(failed(&path))
}

/// Makes a data directory that of a node that was let into a cluster, with the key of its request.
///
/// # Errors
///
/// When it is somebody's, or cannot be written.
pub fn settle(data_dir: &Path, joined: &v1::JoinClusterResponse, key: &str) -> Result<(), Error> {
    check_free(data_dir)?;
    // Of another cluster, perhaps.
    let _ = fs::remove_file(data_dir.join(REGISTERED));
    node_id(data_dir).map_err(failed(data_dir))?;
    let path = data_dir.join(NODE_ID);
    warren_durable::replace(&path, joined.id.as_bytes()).map_err(failed(&path))?;
    write_managers(data_dir, &joined.managers)?;
    // Last: with it the directory is the node's.
    Credentials::create(&data_dir.join(IDENTITY), key, &joined.certificate, &joined.authorities)?;
    Ok(())
}

fn write_managers(data_dir: &Path, managers: &[String]) -> Result<(), Error> {
    let path = data_dir.join(MANAGERS);
    let bytes = serde_json::to_vec(managers).map_err(|error| failed(&path)(error.into()))?;
    warren_durable::replace(&path, &bytes).map_err(failed(&path))
}

fn read_managers(data_dir: &Path) -> Result<Vec<String>, Error> {
    let path = data_dir.join(MANAGERS);
    let bytes = fs::read(&path).map_err(failed(&path))?;
    serde_json::from_slice(&bytes).map_err(|error| failed(&path)(error.into()))
}

impl Leader {
    /// Notes where the leader is; whether it is to be tried.
    fn hint(&mut self, address: Option<String>) -> bool {
        let avoided = self.avoid_until.is_some_and(|until| Instant::now() < until);
        if !avoided {
            self.address = address;
        }
        !avoided
    }

    /// Where to try it, once: what comes of it shows in whether somebody gives the same hint again.
    fn take(&mut self) -> Option<String> {
        let address = self.address.take()?;
        self.avoid_until = Some(Instant::now() + AVOID);
        Some(address)
    }
}

/// The managers one after the other, in an order that differs from node to node: one that does not answer is not asked again before the
/// others were.
#[derive(Debug, Default)]
struct Round {
    left: Vec<String>,
    last: String,
}

impl Round {
    /// The next of these, or the one that is to be next.
    fn next(&mut self, managers: Vec<String>, wanted: Option<String>) -> String {
        if let Some(wanted) = wanted {
            self.left.retain(|address| *address != wanted);
            self.last.clone_from(&wanted);
            return wanted;
        }
        self.left.retain(|address| managers.contains(address));
        if self.left.is_empty() {
            self.left = managers;
            self.left.shuffle(&mut rand::rng());
            if self.left.last() == Some(&self.last) {
                self.left.rotate_right(1);
            }
        }
        self.last = self.left.pop().unwrap_or_default();
        self.last.clone()
    }
}

/// The ways to the managers.
#[derive(Clone, Debug)]
pub(crate) struct Managers {
    data_dir: PathBuf,
    node_id: String,
    socket: PathBuf,
    /// Once there are some; the same for all clones, so that what renews them renews everybody's.
    credentials: Arc<OnceLock<Credentials>>,
    /// The digest of the authorities that the cluster wants its members to believe, once a manager has said so.
    authorities: watch::Sender<Option<String>>,
    leader: Arc<Mutex<Leader>>,
    round: Arc<Mutex<Round>>,
}

/// Where the leader is said to be. A session with it spares the way through another manager.
#[derive(Debug, Default)]
struct Leader {
    address: Option<String>,
    /// It was tried there, and that led to nothing: others may know better, but not before this.
    avoid_until: Option<Instant>,
}

/// For so long any manager will do, after the one that was said to lead did not answer.
const AVOID: Duration = Duration::from_secs(60);

impl Managers {
    /// Those of the cluster that the node of `data_dir` is in; until it is in one, the manager behind this machine's socket.
    pub(crate) fn new(data_dir: PathBuf, node_id: String, socket: PathBuf) -> Self {
        let (authorities, leader, round) = Default::default();
        Self { data_dir, node_id, socket, credentials: Arc::default(), authorities, leader, round }
    }

    /// One of them: the one that leads, if it is known.
    ///
    /// # Errors
    ///
    /// When the node's files cannot be used.
    pub(crate) fn any(&self) -> Result<Dialer, Error> {
        if self.credentials.get().is_none()
            && let Some(loaded) = Credentials::load(&self.data_dir.join(IDENTITY))?
        {
            // Another clone may have been first; its are as good.
            let _ = self.credentials.set(loaded);
        }
        let Some(credentials) = self.credentials.get() else { return Ok(Dialer::socket(&self.socket)?) };
        let id = credentials.identity().id;
        if id != self.node_id {
            return Err(Error::Renamed(id));
        }
        let expired = |why| Error::Expired { why, directory: self.data_dir.clone() };
        credentials.check_valid().map_err(expired)?;
        let addresses = read_managers(&self.data_dir)?;
        let leader = self.leader().take();
        let address = self.round().next(addresses, leader);
        Ok(Dialer::new(&address, credentials)?)
    }

    /// A manager has taken the node in.
    pub(crate) fn registered(&self) {
        note_registered(&self.data_dir, &self.node_id);
    }

    /// Whether the node was let into a cluster, as far as was seen yet.
    pub(crate) fn has_joined(&self) -> bool {
        self.credentials.get().is_some()
    }

    fn round(&self) -> MutexGuard<'_, Round> {
        // Every change leaves it whole.
        self.round.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leader(&self) -> MutexGuard<'_, Leader> {
        // Every change leaves it whole.
        self.leader.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cluster's authorities have this digest; `confirm` says whether the cluster waits to hear that the node believes them.
    pub(crate) fn believe(&self, digest: String, confirm: bool) {
        let Some(credentials) = self.credentials.get().cloned() else { return };
        self.authorities.send_replace(Some(digest.clone()));
        if confirm {
            let managers = self.clone();
            tokio::spawn(async move { managers.confirm(&credentials, digest).await });
        }
    }

    /// Says that the node believes these authorities, once it does; until they are others again.
    async fn confirm(self, credentials: &Credentials, digest: String) {
        let wanted = self.authorities.subscribe();
        while wanted.borrow().as_ref() == Some(&digest) {
            if credentials.digest() == digest {
                let said = async {
                    let channel = self.any().map_err(|error| error.to_string())?.connect().await;
                    let mut cluster = ClusterClient::new(channel.map_err(|error| error.to_string())?);
                    let request = v1::ConfirmAuthoritiesRequest { digest: digest.clone() };
                    cluster.confirm_authorities(request).await.map_err(|status| status.message().to_owned())
                };
                match said.await {
                    Ok(_) => return,
                    Err(why) => {
                        tracing::debug!(why, "the cluster does not know yet which authorities are believed here")
                    }
                }
            }
            tokio::time::sleep(CONFIRM_AGAIN).await;
        }
    }

    /// Keeps the node's certificate valid, from when it has one.
    pub(crate) async fn renew(self) {
        let credentials = loop {
            // Whatever is wrong with it, the session says.
            if self.any().is_ok()
                && let Some(credentials) = self.credentials.get()
            {
                break credentials.clone();
            }
            tokio::time::sleep(LOOK).await;
        };
        let ask = |certificate_request: String| -> Asked {
            let manager = self.any().map_err(|error| error.to_string());
            Box::pin(async move {
                let channel = manager?.connect().await.map_err(|error| error.to_string())?;
                let request = v1::RequestCertificateRequest { certificate_request };
                let signed = ClusterClient::new(channel).request_certificate(request).await;
                let signed = signed.map_err(|status| status.message().to_owned())?.into_inner();
                Ok((signed.certificate, signed.authorities))
            })
        };
        let wanted = self.authorities.subscribe();
        warren_pki::keep_valid(credentials, &self.data_dir.join(IDENTITY), wanted, ask).await;
    }

    /// A manager says who they are. Returns whether another than the one that answered leads, and is worth a try.
    pub(crate) fn learn(&self, info: &v1::GetClusterInfoResponse) -> bool {
        let leader = info.managers.iter().find(|manager| manager.leader).map(|manager| manager.address.clone());
        let is_another = leader.is_some() && info.leader_id != info.manager_id && self.credentials.get().is_some();
        self.keep(info);
        is_another && self.leader().hint(leader)
    }

    fn keep(&self, info: &v1::GetClusterInfoResponse) {
        let mut addresses: Vec<String> = info.managers.iter().map(|manager| manager.address.clone()).collect();
        addresses.sort();
        if self.credentials.get().is_none() || addresses.is_empty() {
            return;
        }
        let known = read_managers(&self.data_dir).unwrap_or_default();
        if known != addresses
            && let Err(error) = write_managers(&self.data_dir, &addresses)
        {
            tracing::warn!(%error, "the cluster's managers cannot be kept");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn whoever_did_not_answer_is_asked_after_the_others() {
        let managers = || ["a", "b", "c"].map(str::to_owned).to_vec();
        let mut round = Round::default();
        let mut before = String::new();
        for _ in 0..200 {
            let asked: BTreeSet<String> = (0..3)
                .map(|_| {
                    let next = round.next(managers(), None);
                    assert_ne!(next, before);
                    before.clone_from(&next);
                    next
                })
                .collect();
            assert_eq!(asked.len(), 3);
        }
        // One that was said to lead has had its turn, within a round and before one; and one that is gone has none.
        for _ in 0..50 {
            let leader = round.next(managers(), Some("b".to_owned()));
            assert_eq!(leader, "b");
            assert_ne!(round.next(managers(), None), "b");
            while !round.left.is_empty() {
                let _ = round.next(managers(), None);
            }
        }
        assert_eq!(round.next(vec!["d".to_owned()], None), "d");
        assert_eq!(round.next(vec!["d".to_owned()], None), "d");
        assert_eq!(Round::default().next(Vec::new(), None), "");
    }
}
