//! The cluster's state as a file; clusters that begin from one; and clusters that go on with what one manager has, when a majority
//! is lost for good.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};
use warren_pki::{Authority, Credentials, Identity, Request, Role};
use warren_raft::offline::{self, Held, Reach};

use crate::{
    clock::Timestamp,
    data::{
        data_dir::{self, IDENTITY, RAFT},
        formation,
    },
    state::{Actor, Change, Event, Machine, Manager, Origin, State, Transaction},
    trust::{
        founding::CERTIFICATE_LIFETIME,
        vault::{self, KeptKey, UnlockKey, Vault},
    },
};

const KIND: &[u8; 8] = b"WRNBKUP1";
const COMPRESSION_LEVEL: i32 = 3;

/// Why a cluster cannot begin, or go on, from what there is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is none, or not whole.
    #[error("the backup {} cannot be used: {why}", path.display())]
    Backup {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// Log and snapshot.
    #[error("the log and snapshot in {} cannot be used: {source}", path.display())]
    Raft {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A manager uses it.
    #[error("a manager runs with {}: stop it first", .0.display())]
    Runs(PathBuf),
    /// There is no manager here.
    #[error("{} is no manager's", .0.display())]
    Nobodys(PathBuf),
    /// A cluster that nobody can join.
    #[error("the cluster has no authority that could sign a manager's certificate")]
    NoAuthority,
    /// The data directory, and what is in it.
    #[error(transparent)]
    Formation(#[from] formation::Error),
    /// Keys and certificates.
    #[error(transparent)]
    Pki(#[from] warren_pki::Error),
    /// The key of secrets.
    #[error(transparent)]
    Vault(#[from] vault::Error),
    /// The directory.
    #[error(transparent)]
    DataDir(#[from] data_dir::Error),
}

/// What a backup is of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct About {
    /// The cluster's id.
    pub cluster_id: String,
    /// The last log entry in it.
    pub revision: u64,
    /// When it was made.
    pub created_at: Timestamp,
    /// The version that made it.
    pub version: String,
    /// What opens the secrets in it: locked, if the cluster's was. Whoever has one that is not has the secrets.
    key: KeptKey,
}

/// The unlock key of a cluster that locks its managers' keys.
pub(crate) fn unlock_key(state: &State, vault: &Vault) -> Result<Option<UnlockKey>, vault::Error> {
    let cluster = state.cluster();
    let lock = cluster.and_then(|cluster| Some((&cluster.id, cluster.lock.as_ref()?)));
    lock.map(|(id, sealed)| vault.open_unlock_key(id, sealed)).transpose()
}

/// A state as a file.
pub(crate) fn encode(state: &State, vault: &Vault, now: Timestamp) -> io::Result<Vec<u8>> {
    let unlock = unlock_key(state, vault).map_err(io::Error::other)?;
    let about = About {
        cluster_id: state.cluster().map(|cluster| cluster.id.clone()).unwrap_or_default(),
        revision: state.revision(),
        created_at: now,
        version: warren_telemetry::build::LONG_VERSION.to_owned(),
        key: vault.kept(unlock.as_ref()).map_err(io::Error::other)?,
    };
    let state = zstd::encode_all(state.to_bytes()?.as_slice(), COMPRESSION_LEVEL)?;
    Ok(warren_durable::pack(KIND, &serde_json::to_vec(&about)?, &state))
}

fn decode(bytes: &[u8]) -> Result<(About, State), String> {
    let (about, state) = warren_durable::unpack(KIND, bytes).map_err(|damage| damage.to_string())?;
    let about = serde_json::from_slice(about).map_err(|error| error.to_string())?;
    let state = zstd::decode_all(state).and_then(|state| State::from_bytes(&state));
    Ok((about, state.map_err(|error| error.to_string())?))
}

/// Checks that a backup is whole, and says what it is of.
///
/// # Errors
///
/// When it cannot be read, or not a bit of it is missing or another.
pub fn check(file: &Path) -> Result<About, Error> {
    read(file).map(|(about, _)| about)
}

fn read(file: &Path) -> Result<(About, State), Error> {
    let unusable = |why: String| Error::Backup { path: file.to_owned(), why };
    let bytes = fs::read(file).map_err(|error| unusable(error.to_string()))?;
    decode(&bytes).map_err(unusable)
}

/// So many managers may have joined since a backup was made, or out of this one's sight.
const NUMBERS_SKIPPED: u64 = 100;

/// Has a state go on with one manager: others are no longer in the cluster. The history of changes says so, as an event of this kind.
fn go_on_with(state: &mut State, manager: Manager, kind: &str, message: String) -> u64 {
    let address = format!("the disk of {}", manager.hostname);
    let others: Vec<u64> = state.managers().map(|known| known.id).filter(|id| *id != manager.id).collect();
    let known_as = state.manager(manager.id).map(|known| known.voter);
    let mut changes: Vec<_> = others.into_iter().map(|id| Change::RemoveManager { id }).collect();
    let at = manager.created_at;
    match known_as {
        None => changes.push(Change::AdmitManager(manager)),
        Some(false) => changes.push(Change::SetManager { id: manager.id, voter: true }),
        Some(true) => {}
    }
    let actor = Actor { id: "root".to_owned(), role: "admin".to_owned(), address };
    let origin = Origin { actor, at };
    let index = state.revision() + 1;
    let id = state.cluster().map(|cluster| cluster.id.clone()).unwrap_or_default();
    let message = format!("{message}; tokens and operators of before are not let in any more");
    let (kind, name) = (kind.to_owned(), String::new());
    state.record(Event { revision: index, kind, id, name, message, origin: origin.clone() });
    let transaction = Transaction { origin: Some(origin), changes, ..Transaction::default() };
    // Every one of them is possible: they were read from the state.
    let _ = state.apply(index, &transaction);
    index
}

fn now() -> Timestamp {
    let since_epoch = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX))
}

/// Makes a directory that of the only manager of a cluster that is as a backup says. Managers that the cluster had are no longer in
/// it; nodes are, and find the manager if it is where one of the others was.
///
/// # Errors
///
/// When the directory is somebody's, the backup cannot be used, or the unlock key does not fit.
pub fn restore(
    directory: &Path,
    file: &Path,
    hostname: &str,
    address: &str,
    unlock: Option<&UnlockKey>,
) -> Result<(About, u64), Error> {
    let (about, mut state) = read(file)?;
    formation::check_free(directory)?;
    let vault = about.key.open(unlock)?;
    let cluster = state.cluster().cloned().ok_or(Error::NoAuthority)?;
    let sealed = cluster.authority.as_ref().ok_or(Error::NoAuthority)?;
    let authority = Authority::from_pem(&sealed.certificate, &vault.open_authority(&cluster.id, &sealed.key)?)?;
    // What the cluster has done since the backup nobody knows: its tokens may have been revoked, its operators removed, and the
    // next numbers used.
    state.forget_whom_it_let_in();
    state.skip_managers(NUMBERS_SKIPPED);
    let id = state.next_manager();
    let manager = Manager { id, hostname: hostname.to_owned(), created_at: now(), voter: true };
    let words = format!("from a backup of revision {}, with manager {id}", about.revision);
    let index = go_on_with(&mut state, manager, "cluster.restored", words);

    let request = Request::new()?;
    let identity = Identity { cluster: cluster.id.clone(), role: Role::Manager, id: id.to_string() };
    let certificate = authority.sign(request.pem(), &identity, SystemTime::now(), CERTIFICATE_LIFETIME)?;
    let authorities = cluster.authorities();
    Credentials::create(&directory.join(IDENTITY), &request.key_pem(), &certificate, &authorities)?;
    vault.keep(directory, unlock_key(&state, &vault)?.as_ref())?;
    let (path, made) = (directory.join(RAFT), directory.join("raft.restored"));
    // What a restore that was cut short left is nobody's.
    let begun = remove(&made).and_then(|()| offline::begin(&made, id, address, &state.to_bytes()?, 1, index));
    begun.and_then(|()| fs::rename(&made, &path)).map_err(|source| Error::Raft { path, source })?;
    data_dir::settle(directory, id)?;
    Ok((about, id))
}

fn set_aside(path: &Path, elsewhere: &Path) -> io::Result<()> {
    match fs::rename(path, elsewhere) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What a manager that is not running has. None can be started on it while this is there.
#[derive(Debug)]
pub struct Survivor {
    /// Its number.
    pub id: u64,
    /// How far its log reaches.
    pub reach: Reach,
    state: State,
    _held: Held,
}

/// Looks what a manager that is not running has.
///
/// # Errors
///
/// When the directory is no manager's, a manager uses it, or what is in it cannot be read.
pub fn survey(directory: &Path) -> Result<Survivor, Error> {
    let identity = data_dir::open(directory)?.ok_or_else(|| Error::Nobodys(directory.to_owned()))?;
    let (mut machine, view) = Machine::new();
    let path = directory.join(RAFT);
    let (reach, held) = offline::read(&path, &mut machine).map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock => Error::Runs(directory.to_owned()),
        _ => Error::Raft { path, source },
    })?;
    let state = view.borrow().clone();
    Ok(Survivor { id: identity.id, reach, state, _held: held })
}

impl Survivor {
    /// The state that its log and snapshots are of.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Whether it is the whole cluster already.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        matches!(self.reach.members.as_slice(), [only] if only.id == self.id && only.voter)
    }

    /// Has the cluster go on with this manager alone. What it had is kept beside, under another name, which is returned.
    ///
    /// # Errors
    ///
    /// When the directory cannot be written.
    pub fn go_on_alone(mut self, directory: &Path, hostname: &str) -> Result<PathBuf, Error> {
        let at = now();
        let manager = Manager { id: self.id, hostname: hostname.to_owned(), created_at: at, voter: true };
        // Those that are lost may have revoked tokens, removed operators and used numbers that this one never heard of.
        self.state.forget_whom_it_let_in();
        self.state.skip_managers(NUMBERS_SKIPPED);
        let words = format!("with manager {} alone, from log entry {}", self.id, self.reach.last_index);
        go_on_with(&mut self.state, manager, "cluster.recovered", words);
        let own = self.reach.members.iter().find(|member| member.id == self.id);
        let address = own.map(|own| own.address.clone()).unwrap_or_default();
        let path = directory.join(RAFT);
        let (made, before) =
            (directory.join("raft.recovered"), directory.join(format!("raft.before-recovery-{}", at.0)));
        let failed = |source| Error::Raft { path: path.clone(), source };
        // What a recovery that was cut short left may be all that there was.
        let left = set_aside(&made, &directory.join(format!("raft.left-over-{}", at.0)));
        let begun = left.and_then(|()| {
            let index = self.reach.last_index.max(self.state.revision()) + 1;
            offline::begin(&made, self.id, &address, &self.state.to_bytes()?, self.reach.term, index)
        });
        begun.map_err(failed)?;
        // At no time is there no log, which a manager that is started would take for its having none.
        let exchanged = renameat_with(CWD, &made, CWD, &path, RenameFlags::EXCHANGE).map_err(io::Error::from);
        exchanged.and_then(|()| fs::rename(&made, &before)).map_err(failed)?;
        fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)?;
        Ok(before)
    }
}

/// How long ago a backup was made.
impl About {
    /// As of now.
    #[must_use]
    pub fn age(&self) -> Duration {
        now().since(self.created_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::{apply, founded, put, service};

    #[test]
    fn a_backup_is_the_state_and_notices_damage() {
        let mut state = founded();
        apply(&mut state, [put(service("web", "web", 3))]);
        let vault = Vault::ephemeral().expect("a vault");
        let bytes = encode(&state, &vault, Timestamp(1)).expect("encodes");
        let (about, read) = decode(&bytes).expect("decodes");
        assert_eq!((about.revision, about.cluster_id.as_str()), (state.revision(), "cluster"));
        assert_eq!(read.to_bytes().expect("bytes"), state.to_bytes().expect("bytes"));
        assert_eq!(about.key.open(None).expect("open").key(), vault.key());
        for cut in [0, 7, bytes.len() / 2, bytes.len() - 1] {
            assert!(decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        let mut other = bytes.clone();
        other[bytes.len() / 2] ^= 1;
        assert_eq!(decode(&other).expect_err("is damaged"), "its checksum does not match");
    }

    #[test]
    fn whoever_goes_on_is_the_only_one() {
        let mut state = founded();
        let manager = |id| Manager { id, hostname: format!("m{id}"), created_at: Timestamp(1), voter: id != 2 };
        apply(&mut state, (1..=3).map(|id| Change::AdmitManager(manager(id))));
        let mut alone = state.clone();
        go_on_with(&mut alone, manager(2), "cluster.recovered", "alone".to_owned());
        let left: Vec<_> = alone.managers().map(|manager| (manager.id, manager.voter)).collect();
        assert_eq!((left, alone.next_manager()), (vec![(2, true)], 4));
        let mut events = alone.events().map(|event| (event.kind.as_str(), event.message.as_str()));
        assert!(events.any(|event| event.0 == "cluster.recovered" && event.1.starts_with("alone; tokens")));
        let mut restored = state;
        let next = restored.next_manager();
        go_on_with(&mut restored, manager(next), "cluster.restored", String::new());
        let left: Vec<_> = restored.managers().map(|manager| manager.id).collect();
        assert_eq!((left, restored.next_manager()), (vec![4], 5));
    }
}
