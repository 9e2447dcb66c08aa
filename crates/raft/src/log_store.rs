//! The log as openraft drives it.

use std::{
    fmt::Debug,
    io,
    ops::{Bound, RangeBounds},
    sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::Instant,
};

use openraft::{
    LogIdOptionExt as _, OptionalSend, RaftLogReader,
    storage::{IOFlushed, LogState, RaftLogStorage},
};
use tokio::sync::oneshot;

use crate::{
    Observer,
    storage::{Log, Positions},
    types::{Config, Entry, LogId, Vote},
};

/// Payload bytes sent to a follower in one message, beyond the first entry.
const BATCH_BYTES: usize = 1 << 20;

/// Why the log could not be written, or what is in it not be applied, when that first failed, in words. Consensus ends then, and says
/// what it tried last, which may only be what followed from it.
#[derive(Clone, Debug, Default)]
pub(crate) struct FirstFailure(Arc<OnceLock<String>>);

impl FirstFailure {
    pub(crate) fn get(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }

    /// Notes that the log could not be written, if it could not.
    fn note<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.inspect_err(|error| {
            let _ = self.0.set(format!("the log cannot be written: {error}"));
        })
    }

    /// Notes what the state machine says, if it cannot go on.
    pub(crate) fn note_of_machine<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.inspect_err(|error| {
            let _ = self.0.set(error.to_string());
        })
    }
}

#[derive(Clone)]
pub(crate) struct LogStore {
    log: Arc<RwLock<Box<dyn Log>>>,
    observer: Arc<dyn Observer>,
    failure: FirstFailure,
}

impl LogStore {
    pub(crate) fn new(log: Box<dyn Log>, observer: Arc<dyn Observer>) -> Self {
        Self { log: Arc::new(RwLock::new(log)), observer, failure: FirstFailure::default() }
    }

    pub(crate) fn failure(&self) -> FirstFailure {
        self.failure.clone()
    }

    fn read(&self) -> RwLockReadGuard<'_, Box<dyn Log>> {
        // The log checks before it changes: a panic leaves it as it was.
        self.log.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Box<dyn Log>> {
        self.log.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The half-open range that `range` means.
fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let from = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start + 1,
        Bound::Unbounded => 0,
    };
    let to = match range.end_bound() {
        Bound::Included(end) => end + 1,
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    (from, to)
}

impl RaftLogReader<Config> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let (from, to) = bounds(&range);
        self.read().read(from, to, usize::MAX)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.read().read(start, end, BATCH_BYTES)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.read().positions().vote)
    }
}

impl RaftLogStorage<Config> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Config>, io::Error> {
        let Positions { purged, last, .. } = self.read().positions();
        Ok(LogState { last_purged_log_id: purged, last_log_id: last })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let (sender, receiver) = oneshot::channel();
        // A caller that gave up does not want to know.
        self.failure.note(self.write().vote(*vote, Box::new(move |result| drop(sender.send(result)))))?;
        let written = receiver.await.unwrap_or_else(|_| Err(io::Error::other("the log's writer has ended")));
        self.failure.note(written)
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        // Becomes durable with the next append; a lost one is found again by consensus.
        committed.map_or(Ok(()), |committed| self.write().commit(committed))
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.read().positions().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Config>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let began = Instant::now();
        let (observer, failure) = (Arc::clone(&self.observer), self.failure());
        let durable = Box::new(move |result: io::Result<()>| {
            observer.log_synced(began.elapsed());
            callback.io_completed(failure.note(result));
        });
        self.failure.note(self.write().append(entries.into_iter().collect(), durable))
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let mut log = self.write();
        let from = last_log_id.next_index();
        if from < log.positions().last.next_index() { log.truncate(from) } else { Ok(()) }
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        let mut log = self.write();
        let Positions { committed, purged, last, .. } = log.positions();
        if log_id.index < purged.next_index() {
            return Ok(());
        }
        // Entries of a later term that a snapshot has overtaken would stay the last, and nothing could follow them.
        if last.is_some_and(|last| last.index <= log_id.index && last > log_id) {
            log.truncate(committed.next_index().max(purged.next_index()))?;
        }
        log.purge(log_id)
    }
}

#[cfg(test)]
mod tests;
