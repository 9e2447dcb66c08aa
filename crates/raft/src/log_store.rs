//! The durable log, on `raft-log`: an entry is acknowledged when `fdatasync` has returned.

use std::{
    fmt::Debug,
    fs, io,
    ops::{Bound, RangeBounds},
    path::Path,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, Instant},
};

use openraft::{
    LogIdOptionExt as _, OptionalSend, RaftLogReader,
    entry::RaftEntry as _,
    storage::{IOFlushed, LogState, RaftLogStorage},
};
use raft_log::{RaftLog, api::raft_log_writer::RaftLogWriter as _};
use tokio::sync::oneshot;

use crate::{
    Observer,
    types::{Config, Entry, LogId, Vote},
    wal::{Waiter, Wal, WalLogId, WalPayload, WalVote},
};

const CHUNK_BYTES: usize = 16 << 20;
const CACHE_BYTES: usize = 16 << 20;
const CACHE_ITEMS: usize = 100_000;
const READ_BUFFER_BYTES: usize = 256 << 10;
/// Payload bytes sent to a follower in one message, beyond the first entry.
const BATCH_BYTES: usize = 1 << 20;

/// How long a sync waits for more appends. Consensus hands over entries one by one while the one before is being synced, and
/// without any wait the writer would sync each alone instead of all that have queued up: 64 clients would not be served faster
/// than one. A millisecond, the default, would be felt by every lone write.
const BATCH_WAIT: Duration = Duration::from_micros(10);

/// How long to wait for another user of the directory to let go: the previous one may still be ending.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone)]
pub(crate) struct LogStore {
    log: Arc<RwLock<RaftLog<Wal>>>,
    observer: Arc<dyn Observer>,
}

fn wal_config(directory: &Path) -> raft_log::Config {
    let mut config = raft_log::Config::new(directory.to_string_lossy());
    config.wal.chunk_max_size = Some(CHUNK_BYTES);
    config.wal.read_buffer_size = Some(READ_BUFFER_BYTES);
    config.wal.flush_batch_wait = Some(BATCH_WAIT);
    config.log_cache_capacity = Some(CACHE_BYTES);
    config.log_cache_max_items = Some(CACHE_ITEMS);
    config
}

impl LogStore {
    /// Opens the log in `directory`, which is made if need be. What a crash left half-written is dropped: it was never
    /// acknowledged.
    pub(crate) fn open(directory: &Path, observer: Arc<dyn Observer>) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let deadline = Instant::now() + LOCK_PATIENCE;
        let log = loop {
            match RaftLog::open(Arc::new(wal_config(directory))) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::new(error.kind(), "another manager uses it"));
                }
                other => break other?,
            }
        };
        Ok(Self { log: Arc::new(RwLock::new(log)), observer })
    }

    fn read(&self) -> RwLockReadGuard<'_, RaftLog<Wal>> {
        // The log checks before it changes: a panic leaves it as it was.
        self.log.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, RaftLog<Wal>> {
        self.log.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn entries(&self, from: u64, to: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        if from >= to {
            return Ok(entries);
        }
        let mut bytes = 0;
        for item in self.read().read(from, to) {
            let (WalLogId(log_id), WalPayload { payload }) = item?;
            if let openraft::EntryPayload::Normal(proposal) = &payload {
                bytes += proposal.0.len();
            }
            if bytes > max_bytes && !entries.is_empty() {
                break;
            }
            entries.push(Entry { log_id, payload });
        }
        Ok(entries)
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
        self.entries(from, to, usize::MAX)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.entries(start, end, BATCH_BYTES)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.read().log_state().vote().map(|vote| vote.0))
    }
}

impl RaftLogStorage<Config> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Config>, io::Error> {
        let log = self.read();
        let state = log.log_state();
        Ok(LogState { last_purged_log_id: state.purged().map(|id| id.0), last_log_id: state.last().map(|id| id.0) })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let (sender, receiver) = oneshot::channel();
        {
            let mut log = self.write();
            log.save_vote(WalVote(*vote))?;
            log.flush(true, Some(Waiter::Caller(sender)))?;
        }
        receiver.await.map_err(|_| io::Error::other("the log's writer has ended"))?
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        // Becomes durable with the next append; a lost one is found again by consensus.
        if let Some(committed) = committed {
            self.write().commit(WalLogId(committed))?;
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.read().log_state().committed().map(|id| id.0))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Config>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<_> = entries
            .into_iter()
            .map(|entry| (WalLogId(entry.log_id()), WalPayload { payload: entry.payload }))
            .collect();
        let began = Instant::now();
        let observer = Arc::clone(&self.observer);
        let on_success = Box::new(move || observer.log_synced(began.elapsed()));
        let mut log = self.write();
        log.append(entries)?;
        log.flush(true, Some(Waiter::Openraft { flushed: callback, on_success }))
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let mut log = self.write();
        let from = last_log_id.next_index();
        if from < log.log_state().last().map(|id| id.0).next_index() {
            log.truncate(from)?;
        }
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        let mut log = self.write();
        let state = log.log_state();
        let (last, purged) = (state.last().map(|id| id.0), state.purged().map(|id| id.0));
        let committed = state.committed().map(|id| id.0);
        if log_id.index < purged.next_index() {
            return Ok(());
        }
        // Entries of a later term that a snapshot has overtaken would stay the last, and nothing could follow them.
        if last.is_some_and(|last| last.index <= log_id.index && last > log_id) {
            log.truncate(committed.next_index().max(purged.next_index()))?;
        }
        log.purge(WalLogId(log_id))?;
        // Only a flush removes the files.
        log.flush(true, None)
    }
}

#[cfg(test)]
mod tests;
