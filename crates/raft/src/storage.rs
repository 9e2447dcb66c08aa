//! The seam under the log and the snapshots: what consensus keeps, as whole records and whole snapshots. [`crate::Files`] keeps
//! them on a disk; a simulation brings a disk of its own, which is as slow, full or forgetful as it wants.

use std::{fmt::Debug, io, time::Duration};

use crate::types::{Entry, LogId, Vote};

/// Where one manager keeps its log and its snapshot.
pub trait Storage: Debug + Send + Sync + 'static {
    /// Where it is, for people.
    fn place(&self) -> String;

    /// Opens both; called once, where it may block.
    ///
    /// # Errors
    ///
    /// When they cannot be read, or somebody else uses them.
    fn open(&self) -> io::Result<Opened>;

    /// Whether its calls take time, and so are made where they may block. One that is memory is called where it stands.
    fn blocks(&self) -> bool {
        true
    }
}

/// What [`Storage::open`] found.
pub struct Opened {
    /// The log.
    pub log: Box<dyn Log>,
    /// The snapshot.
    pub snapshots: Box<dyn Snapshots>,
    /// How long a small write takes to be durable; election timeouts grow with it.
    pub sync: Duration,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened").field("sync", &self.sync).finish_non_exhaustive()
    }
}

/// Called when a write has become durable, or cannot.
pub type Durable = Box<dyn FnOnce(io::Result<()>) + Send>;

/// Where a log is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    /// The last vote that was cast.
    pub vote: Option<Vote>,
    /// The last entry known to be committed; may be behind.
    pub committed: Option<LogId>,
    /// The last entry that was purged.
    pub purged: Option<LogId>,
    /// The last entry, which may be the last purged one.
    pub last: Option<LogId>,
}

/// An ordered sequence of entries. Writes take effect in the order of their calls, for readers at once; what is not yet durable
/// when a crash comes may be lost, from the end.
pub trait Log: Send + Sync {
    /// Where it is.
    fn positions(&self) -> Positions;

    /// The entries from `from` on and before `to`; at least one, if there is one, and then as many as have `max_bytes`.
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    fn read(&self, from: u64, to: u64, max_bytes: usize) -> io::Result<Vec<Entry>>;

    /// Appends.
    ///
    /// # Errors
    ///
    /// When the entries do not follow the last one, or cannot be written; `durable` may then be called or not.
    fn append(&mut self, entries: Vec<Entry>, durable: Durable) -> io::Result<()>;

    /// Casts a vote.
    ///
    /// # Errors
    ///
    /// When it cannot be written; `durable` may then be called or not.
    fn vote(&mut self, vote: Vote, durable: Durable) -> io::Result<()>;

    /// Notes that entries are committed. Durable with the next append.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    fn commit(&mut self, up_to: LogId) -> io::Result<()>;

    /// Forgets the entries from `from` on.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    fn truncate(&mut self, from: u64) -> io::Result<()>;

    /// Forgets the entries up to this one, which a snapshot has.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    fn purge(&mut self, up_to: LogId) -> io::Result<()>;
}

/// The latest snapshot. What its bytes mean, and whether they are whole, is not its business.
pub trait Snapshots: Send + Sync {
    /// Replaces it; durable when this returns. After a crash there is the old one or the new one.
    ///
    /// # Errors
    ///
    /// When it cannot be written; the old one is then still there.
    fn save(&self, bytes: &[u8]) -> io::Result<()>;

    /// It, if there is one.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    fn load(&self) -> io::Result<Option<Vec<u8>>>;
}
