use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use openraft::{
    BasicNode, Instant as _, LogIdOptionExt as _, ReadPolicy, ServerState,
    async_runtime::WatchReceiver as _,
    errors::{ClientWriteError, InitializeError, LinearizableReadError, RaftError},
};
use serde::Serialize;

use crate::{
    Error, Observer, Options, StateMachine, Storage, Transport,
    log_store::LogStore,
    machine::Machine,
    network::{Message, Network},
    snapshot::SnapshotStore,
    storage::Opened,
    types::{Config, Proposal},
};

type Raft = openraft::Raft<Config, Machine>;

/// This manager's part in consensus. Cheap to clone.
#[derive(Clone)]
pub struct Node {
    raft: Raft,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").finish_non_exhaustive()
    }
}

/// A member of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub id: u64,
    /// Where it is reached.
    pub address: String,
    /// Whether it votes; a learner only follows.
    pub voter: bool,
}

/// Consensus as this manager sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// This manager.
    pub id: u64,
    /// The current term.
    pub term: u64,
    /// Who leads, if known.
    pub leader: Option<u64>,
    /// Whether this manager does.
    pub is_leader: bool,
    /// Index of the last log entry.
    pub last_log_index: u64,
    /// Index of the last entry applied here.
    pub applied_index: u64,
    /// Since a majority last answered, on the leader.
    pub quorum_age: Option<Duration>,
    /// All members.
    pub members: Vec<Member>,
    /// On the leader: entries that each other member has not acknowledged.
    pub lag: BTreeMap<u64, u64>,
    /// Why consensus has stopped here, if it has.
    pub failure: Option<String>,
}

/// Escaped once more in the log it may grow by seven, still below what the log takes.
const MAX_COMMAND: usize = 8 << 20;

/// How long a start waits for what the log holds to be applied.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(60);

impl Node {
    /// Starts taking part: opens the log and the snapshot, and replays them into `machine`. A storage without a log
    /// begins a new cluster of this manager alone.
    ///
    /// # Errors
    ///
    /// When the storage cannot be used.
    pub async fn start(
        options: &Options,
        storage: Arc<dyn Storage>,
        machine: Box<dyn StateMachine>,
        transport: Arc<dyn Transport>,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, Error> {
        let node = Self::join(options, storage, machine, transport, observer).await?;
        let members = BTreeMap::from([(options.id, BasicNode::new(&options.address))]);
        match node.raft.initialize(members).await {
            Ok(()) => {}
            // There was a log: the cluster goes on.
            Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {
                // A lone voter need not wait for anyone.
                if node.status().members.iter().filter(|member| member.voter).count() == 1 {
                    node.raft.trigger().elect(false).await.map_err(|error| Error::Stopped(error.to_string()))?;
                }
            }
            Err(error) => return Err(Error::Stopped(error.to_string())),
        }
        Ok(node)
    }

    /// Starts taking part as a member that others will add.
    ///
    /// # Errors
    ///
    /// When the storage cannot be used.
    pub async fn join(
        options: &Options,
        storage: Arc<dyn Storage>,
        machine: Box<dyn StateMachine>,
        transport: Arc<dyn Transport>,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, Error> {
        let place = storage.place();
        let storage_error = |source: io::Error| Error::Storage { place: place.clone(), source };
        let opened = tokio::task::spawn_blocking(move || storage.open()).await;
        let Opened { log, snapshots, sync } = opened.map_err(io::Error::other).flatten().map_err(storage_error)?;
        let (log, snapshots) = (LogStore::new(log, Arc::clone(&observer)), SnapshotStore::new(snapshots));
        tracing::debug!(sync_ms = sync.as_secs_f64() * 1e3, "the disk's time to make a write durable");
        let config = options.raft(sync).map_err(|error| Error::Stopped(error.to_string()))?;
        let machine = Machine::new(machine, snapshots, observer);
        let raft = Raft::new(options.id, config, Network { transport }, log, machine).await;
        let raft = raft.map_err(|error| storage_error(io::Error::other(error.to_string())))?;
        Ok(Self { raft })
    }

    /// Waits until everything that was committed before has been applied here.
    ///
    /// # Errors
    ///
    /// When no majority can be reached in time.
    pub async fn recovered(&self) -> Result<(), Error> {
        self.raft.wait_for_recovery(Some(RECOVERY_TIMEOUT)).await.map_err(|_| Error::NoQuorum)?;
        Ok(())
    }

    /// Has a command committed and applied, and returns the state machine's reply. There is no time limit: one that gave up
    /// would not know what became of the command.
    ///
    /// # Errors
    ///
    /// [`Error::NotLeader`] or [`Error::TooLarge`] when nothing was done; [`Error::Unknown`] when it is not known.
    pub async fn propose(&self, command: String) -> Result<String, Error> {
        // Refused before the log is touched: what the log cannot encode would stop consensus.
        if command.len() > MAX_COMMAND {
            return Err(Error::TooLarge(command.len()));
        }
        match self.raft.client_write(Proposal(command)).await {
            Ok(written) => Ok(written.data.0),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward))) => {
                Err(Error::NotLeader { leader: forward.leader_id })
            }
            Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => Err(Error::Unknown),
            Err(error) => Err(Error::Stopped(error.to_string())),
        }
    }

    /// Returns once a read here sees every write that was acknowledged before, anywhere.
    ///
    /// # Errors
    ///
    /// When this manager does not lead, or no majority answers.
    pub async fn linearize(&self) -> Result<(), Error> {
        match self.raft.ensure_linearizable(ReadPolicy::LeaseRead).await {
            Ok(_) => Ok(()),
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward))) => {
                Err(Error::NotLeader { leader: forward.leader_id })
            }
            Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => Err(Error::NoQuorum),
            Err(error) => Err(Error::Stopped(error.to_string())),
        }
    }

    /// Consensus as it is now.
    #[must_use]
    pub fn status(&self) -> Status {
        let metrics = self.raft.metrics().borrow_watched().clone();
        let last_log_index = metrics.last_log_index.unwrap_or(0);
        let membership = metrics.membership_config.membership();
        let voters: Vec<u64> = membership.voter_ids().collect();
        let lag = metrics.replication.iter().flatten().filter(|(id, _)| **id != metrics.id);
        Status {
            id: metrics.id,
            term: metrics.current_term,
            leader: metrics.current_leader,
            is_leader: metrics.state == ServerState::Leader,
            last_log_index,
            applied_index: metrics.last_applied.index().unwrap_or(0),
            // A lone voter is its own majority; nobody answers it.
            quorum_age: match voters.as_slice() {
                [only] if *only == metrics.id => Some(Duration::ZERO),
                _ => metrics.last_quorum_acked.map(|at| at.into_inner().elapsed()),
            },
            members: membership
                .nodes()
                .map(|(id, node)| Member { id: *id, address: node.addr.clone(), voter: voters.contains(id) })
                .collect(),
            lag: lag
                .map(|(id, acked)| (*id, last_log_index - acked.index().unwrap_or(0).min(last_log_index)))
                .collect(),
            failure: metrics.running_state.err().map(|error| error.to_string()),
        }
    }

    /// Calls `on_change` with every new status until consensus stops. Statuses that follow quickly may be skipped.
    pub async fn watch(&self, mut on_change: impl FnMut(Status)) {
        let mut metrics = self.raft.metrics();
        loop {
            on_change(self.status());
            if metrics.changed().await.is_err() {
                return;
            }
        }
    }

    /// Answers another manager's message.
    ///
    /// # Errors
    ///
    /// When the message cannot be read.
    pub async fn handle(&self, message: &[u8]) -> Result<Vec<u8>, serde_json::Error> {
        fn answer<T: Serialize, E: ToString>(result: Result<T, E>) -> Result<Vec<u8>, serde_json::Error> {
            serde_json::to_vec(&result.map_err(|error| error.to_string()))
        }
        match serde_json::from_slice(message)? {
            Message::Append(rpc) => answer(self.raft.append_entries(rpc).await),
            Message::Vote(rpc) => answer(self.raft.vote(rpc).await),
            Message::PreVote(rpc) => answer(self.raft.pre_vote(rpc).await),
            Message::TransferLeader(rpc) => answer(self.raft.handle_transfer_leader(rpc).await),
            Message::Snapshot { vote, meta, bytes } => {
                let snapshot = openraft::Snapshot { meta, snapshot: crate::snapshot::SnapshotBytes(bytes) };
                answer(self.raft.install_full_snapshot(vote, snapshot).await)
            }
        }
    }

    /// Adds a member that has joined, first as a learner, and as a voter once it has caught up.
    ///
    /// # Errors
    ///
    /// When this manager does not lead or the member cannot be reached.
    pub async fn add_voter(&self, id: u64, address: &str) -> Result<(), Error> {
        let stopped = |error: RaftError<Config, ClientWriteError<Config>>| Error::Stopped(error.to_string());
        self.raft.add_learner(id, BasicNode::new(address), true).await.map_err(stopped)?;
        let mut voters: std::collections::BTreeSet<u64> = self.raft.voter_ids().collect();
        voters.insert(id);
        self.raft.change_membership(voters, false).await.map_err(stopped)?;
        Ok(())
    }

    /// Stops taking part.
    pub async fn shutdown(&self) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "consensus did not stop cleanly");
        }
    }
}
