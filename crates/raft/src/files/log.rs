//! The durable log, on `raft-log`: an entry is acknowledged when `fdatasync` has returned.

use std::{
    fs, io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use openraft::entry::RaftEntry as _;
use raft_log::{RaftLog, api::raft_log_writer::RaftLogWriter as _};

use super::wal::{Waiter, Wal, WalLogId, WalPayload, WalVote};
use crate::{
    storage::{Durable, Log, Positions},
    types::{Entry, LogId, Vote},
};

const CHUNK_BYTES: usize = 16 << 20;
const CACHE_BYTES: usize = 16 << 20;
const CACHE_ITEMS: usize = 100_000;
const READ_BUFFER_BYTES: usize = 256 << 10;

/// How long a sync waits for more appends. Consensus hands over entries one by one while the one before is being synced, and
/// without any wait the writer would sync each alone instead of all that have queued up: 64 clients would not be served faster
/// than one. A millisecond, the default, would be felt by every lone write.
const BATCH_WAIT: Duration = Duration::from_micros(10);

/// How long to wait for another user of the directory to let go: the previous one may still be ending.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

pub(crate) fn wal_config(directory: &Path) -> raft_log::Config {
    let mut config = raft_log::Config::new(directory.to_string_lossy());
    config.wal.chunk_max_size = Some(CHUNK_BYTES);
    config.wal.read_buffer_size = Some(READ_BUFFER_BYTES);
    config.wal.flush_batch_wait = Some(BATCH_WAIT);
    config.log_cache_capacity = Some(CACHE_BYTES);
    config.log_cache_max_items = Some(CACHE_ITEMS);
    config
}

/// Opens the log in `directory`, which is made if need be. What a crash left half-written is dropped: it was never
/// acknowledged.
pub(crate) fn open(directory: &Path) -> io::Result<RaftLog<Wal>> {
    fs::create_dir_all(directory)?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match RaftLog::open(Arc::new(wal_config(directory))) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::new(error.kind(), "a manager that runs uses it"));
            }
            other => return other,
        }
    }
}

impl Log for RaftLog<Wal> {
    fn positions(&self) -> Positions {
        let state = self.log_state();
        Positions {
            vote: state.vote().map(|vote| vote.0),
            committed: state.committed().map(|id| id.0),
            purged: state.purged().map(|id| id.0),
            last: state.last().map(|id| id.0),
        }
    }

    fn read(&self, from: u64, to: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        if from >= to {
            return Ok(entries);
        }
        let mut bytes = 0;
        for item in Self::read(self, from, to) {
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

    fn append(&mut self, entries: Vec<Entry>, durable: Durable) -> io::Result<()> {
        let entries =
            entries.into_iter().map(|entry| (WalLogId(entry.log_id()), WalPayload { payload: entry.payload }));
        raft_log::api::raft_log_writer::RaftLogWriter::append(self, entries.collect::<Vec<_>>())?;
        self.flush(true, Some(Waiter(durable)))
    }

    fn vote(&mut self, vote: Vote, durable: Durable) -> io::Result<()> {
        self.save_vote(WalVote(vote))?;
        self.flush(true, Some(Waiter(durable)))
    }

    fn commit(&mut self, up_to: LogId) -> io::Result<()> {
        raft_log::api::raft_log_writer::RaftLogWriter::commit(self, WalLogId(up_to)).map(drop)
    }

    fn truncate(&mut self, from: u64) -> io::Result<()> {
        raft_log::api::raft_log_writer::RaftLogWriter::truncate(self, from).map(drop)
    }

    fn purge(&mut self, up_to: LogId) -> io::Result<()> {
        raft_log::api::raft_log_writer::RaftLogWriter::purge(self, WalLogId(up_to))?;
        // Only a flush removes the files.
        self.flush(true, None)
    }
}
