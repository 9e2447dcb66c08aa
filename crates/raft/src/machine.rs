//! The state machine as openraft drives it.

use std::{io, sync::Arc, time::Instant};

use futures::{Stream, TryStreamExt as _};
use openraft::{
    EntryPayload, OptionalSend, RaftSnapshotBuilder,
    storage::{EntryResponder, RaftStateMachine},
};
use tokio::sync::Notify;

use crate::{
    Observer, SnapshotOperation,
    log_store::FirstFailure,
    snapshot::{self, SnapshotBytes, SnapshotStore},
    types::{Config, LogId, Reply, SnapshotMeta, StoredMembership},
};

/// Writes down a state that was frozen; called once, anywhere, while newer commands are applied.
pub type Freeze = Box<dyn FnOnce() -> io::Result<Vec<u8>> + Send + Sync>;

/// What commands are applied to. A pure function of the log: no clock, no randomness, no effects outside.
pub trait StateMachine: Send + Sync + 'static {
    /// The newest version of commands that it reads, for those who ask before they propose one ([`crate::Node::all_read`]).
    fn reads(&self) -> u32 {
        0
    }

    /// Applies one command and replies. `index` is the command's place in the log.
    ///
    /// # Errors
    ///
    /// When the command cannot be read: a newer version wrote it. Consensus stops here, because a state without it would no
    /// longer be everybody's.
    fn apply(&mut self, index: u64, command: &str) -> io::Result<String>;

    /// Freezes the state as it is now; writing it down may come later.
    fn freeze(&self) -> Freeze;

    /// Replaces the state.
    ///
    /// # Errors
    ///
    /// When the bytes are not what [`StateMachine::freeze`] writes; the state is then as it was.
    fn restore(&mut self, state: &[u8]) -> io::Result<()>;
}

/// Notices when what was applied since the last snapshot has grown large.
#[derive(Debug)]
pub(crate) struct LogLimit {
    bytes: u64,
    limit: u64,
    full: Arc<Notify>,
}

impl LogLimit {
    pub(crate) fn new(limit: u64, full: Arc<Notify>) -> Self {
        Self { bytes: 0, limit, full }
    }

    fn add(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        if self.bytes >= self.limit {
            self.bytes = 0;
            self.full.notify_one();
        }
    }
}

pub(crate) struct Machine {
    limit: LogLimit,
    inner: Box<dyn StateMachine>,
    last_applied: Option<LogId>,
    membership: StoredMembership,
    store: SnapshotStore,
    blocks: bool,
    observer: Arc<dyn Observer>,
    failure: FirstFailure,
}

/// Calls what may block where it may, if it does.
pub(crate) async fn blocking<T: Send + 'static>(
    blocks: bool,
    call: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    if !blocks {
        return call();
    }
    tokio::task::spawn_blocking(call).await.map_err(io::Error::other).flatten()
}

impl Machine {
    pub(crate) fn new(
        inner: Box<dyn StateMachine>,
        store: SnapshotStore,
        blocks: bool,
        limit: LogLimit,
        observer: Arc<dyn Observer>,
        failure: FirstFailure,
    ) -> Self {
        let (last_applied, membership) = (None, StoredMembership::default());
        Self { limit, inner, last_applied, membership, store, blocks, observer, failure }
    }

    fn restore(&mut self, bytes: &SnapshotBytes) -> io::Result<()> {
        let (meta, state) = snapshot::decode(bytes)?;
        self.failure.note_of_machine(self.inner.restore(&state))?;
        self.last_applied = meta.last_log_id;
        self.membership = meta.last_membership;
        Ok(())
    }
}

pub(crate) struct Builder {
    freeze: Option<Freeze>,
    meta: SnapshotMeta,
    store: SnapshotStore,
    blocks: bool,
    observer: Arc<dyn Observer>,
}

impl RaftSnapshotBuilder<Config> for Builder {
    type SnapshotData = SnapshotBytes;

    async fn build_snapshot(&mut self) -> Result<openraft::alias::SnapshotOf<Config, SnapshotBytes>, io::Error> {
        let freeze = self.freeze.take().ok_or_else(|| io::Error::other("a snapshot is built once"))?;
        let (meta, store) = (self.meta.clone(), self.store.clone());
        let began = Instant::now();
        let written = blocking(self.blocks, move || {
            let bytes = snapshot::encode(&meta, &freeze()?)?;
            store.save(&bytes)?;
            Ok(bytes)
        });
        let written = written.await;
        let size = written.as_ref().map_or(0, |bytes| bytes.0.len() as u64);
        self.observer.snapshot(SnapshotOperation::Build, written.is_ok(), began.elapsed(), size);
        Ok(openraft::Snapshot { meta: self.meta.clone(), snapshot: written? })
    }
}

impl RaftStateMachine<Config> for Machine {
    type SnapshotData = SnapshotBytes;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.last_applied, self.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<Config>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let began = Instant::now();
            self.last_applied = Some(entry.log_id);
            let reply = match entry.payload {
                EntryPayload::Blank => Reply::default(),
                EntryPayload::Normal(proposal) => {
                    self.limit.add(proposal.0.len());
                    let applied = self.inner.apply(entry.log_id.index, &proposal.0);
                    Reply(self.failure.note_of_machine(applied)?)
                }
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(entry.log_id), membership);
                    Reply::default()
                }
            };
            self.observer.applied(began.elapsed());
            if let Some(responder) = responder {
                responder.send(reply);
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        self.limit.bytes = 0;
        Builder {
            freeze: Some(self.inner.freeze()),
            meta: SnapshotMeta { last_log_id: self.last_applied, last_membership: self.membership.clone() },
            store: self.store.clone(),
            blocks: self.blocks,
            observer: Arc::clone(&self.observer),
        }
    }

    async fn install_snapshot(&mut self, _meta: &SnapshotMeta, snapshot: SnapshotBytes) -> Result<(), io::Error> {
        let began = Instant::now();
        let installed = self.restore(&snapshot).and_then(|()| self.store.save(&snapshot));
        let size = snapshot.0.len() as u64;
        self.observer.snapshot(SnapshotOperation::Install, installed.is_ok(), began.elapsed(), size);
        installed
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<openraft::alias::SnapshotOf<Config, SnapshotBytes>>, io::Error> {
        let Some(bytes) = self.store.load()? else { return Ok(None) };
        let (meta, _) = snapshot::decode(&bytes)?;
        Ok(Some(openraft::Snapshot { meta, snapshot: bytes }))
    }
}
