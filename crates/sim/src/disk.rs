//! A manager's disk: what is written is there at once for who reads, and durable only after a while. A crash loses the rest.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::Notify;
use warren_raft::{
    Entry, LogId, Vote,
    storage::{Durable, Log, Opened, Positions, Snapshots, Storage},
};

#[derive(Clone, Debug, Default)]
struct Content {
    positions: Positions,
    entries: BTreeMap<u64, Entry>,
}

#[derive(Clone, Debug)]
enum Write {
    Append(Vec<Entry>),
    Vote(Vote),
    Commit(LogId),
    Truncate(u64),
    Purge(LogId),
}

impl Content {
    fn apply(&mut self, write: &Write) {
        match write {
            Write::Append(entries) => {
                for entry in entries {
                    self.positions.last = Some(entry.log_id);
                    self.entries.insert(entry.log_id.index, entry.clone());
                }
            }
            Write::Vote(vote) => self.positions.vote = Some(*vote),
            Write::Commit(up_to) => self.positions.committed = Some(*up_to),
            Write::Truncate(from) => {
                self.entries.split_off(from);
                let last = self.entries.values().next_back().map(|entry| entry.log_id);
                self.positions.last = last.or(self.positions.purged);
            }
            Write::Purge(up_to) => {
                self.entries = self.entries.split_off(&(up_to.index + 1));
                self.positions.purged = Some(*up_to);
                self.positions.last = self.positions.last.max(Some(*up_to));
            }
        }
    }
}

#[derive(Default)]
struct Inner {
    seen: Content,
    durable: Content,
    snapshot: Option<Vec<u8>>,
    queue: VecDeque<(Write, Option<Durable>)>,
    full: bool,
    latency: Duration,
    opened: u64,
}

/// A disk, which outlives the machine that uses it. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Disk {
    inner: Arc<Mutex<Inner>>,
    written: Arc<Notify>,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").finish_non_exhaustive()
    }
}

impl Disk {
    pub(crate) fn new(latency: Duration) -> Self {
        let inner = Inner { latency, ..Inner::default() };
        Self { inner: Arc::new(Mutex::new(inner)), written: Arc::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing has ever become durable here.
    pub(crate) fn is_empty(&self) -> bool {
        let inner = self.inner();
        inner.durable.positions == Positions::default() && inner.snapshot.is_none()
    }

    pub(crate) fn set_full(&self, full: bool) {
        self.inner().full = full;
    }

    pub(crate) fn set_latency(&self, latency: Duration) {
        self.inner().latency = latency;
    }

    fn write(&self, write: Write, durable: Option<Durable>) -> io::Result<()> {
        let mut inner = self.inner();
        if inner.full && !matches!(write, Write::Commit(_) | Write::Truncate(_) | Write::Purge(_)) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        inner.seen.apply(&write);
        inner.queue.push_back((write, durable));
        drop(inner);
        self.written.notify_one();
        Ok(())
    }

    /// Makes durable what was written, as long as the machine runs that opened it.
    async fn sync(self, opened: u64) {
        loop {
            self.written.notified().await;
            loop {
                let (batch, latency) = {
                    let inner = self.inner();
                    if inner.opened != opened {
                        return;
                    }
                    (inner.queue.len(), inner.latency)
                };
                if batch == 0 {
                    break;
                }
                tokio::time::sleep(latency).await;
                let mut done = Vec::new();
                {
                    let mut inner = self.inner();
                    if inner.opened != opened {
                        return;
                    }
                    for _ in 0..batch {
                        let Some((write, durable)) = inner.queue.pop_front() else { break };
                        inner.durable.apply(&write);
                        done.extend(durable);
                    }
                }
                for durable in done {
                    durable(Ok(()));
                }
            }
        }
    }
}

impl Storage for Disk {
    fn place(&self) -> String {
        "memory".to_owned()
    }

    fn open(&self) -> io::Result<Opened> {
        let opened = {
            let mut inner = self.inner();
            // Whoever used it before has crashed: what was not durable is gone.
            inner.queue.clear();
            inner.seen = inner.durable.clone();
            inner.opened += 1;
            inner.opened
        };
        tokio::spawn(self.clone().sync(opened));
        Ok(Opened { log: Box::new(self.clone()), snapshots: Box::new(self.clone()), sync: Duration::from_millis(5) })
    }

    fn blocks(&self) -> bool {
        false
    }
}

impl Log for Disk {
    fn positions(&self) -> Positions {
        self.inner().seen.positions.clone()
    }

    fn read(&self, from: u64, to: u64, _max_bytes: usize) -> io::Result<Vec<Entry>> {
        Ok(self.inner().seen.entries.range(from..to.max(from)).map(|(_, entry)| entry.clone()).collect())
    }

    fn append(&mut self, entries: Vec<Entry>, durable: Durable) -> io::Result<()> {
        self.write(Write::Append(entries), Some(durable))
    }

    fn vote(&mut self, vote: Vote, durable: Durable) -> io::Result<()> {
        self.write(Write::Vote(vote), Some(durable))
    }

    fn commit(&mut self, up_to: LogId) -> io::Result<()> {
        self.write(Write::Commit(up_to), None)
    }

    fn truncate(&mut self, from: u64) -> io::Result<()> {
        self.write(Write::Truncate(from), None)
    }

    fn purge(&mut self, up_to: LogId) -> io::Result<()> {
        self.write(Write::Purge(up_to), None)
    }
}

impl Snapshots for Disk {
    fn save(&self, bytes: &[u8]) -> io::Result<()> {
        let mut inner = self.inner();
        if inner.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        inner.snapshot = Some(bytes.to_vec());
        Ok(())
    }

    fn load(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(self.inner().snapshot.clone())
    }
}
