use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::join_all;
use openraft::{
    BasicNode, ChangeMembers, Instant as _, LogIdOptionExt as _, RaftMetrics, RaftState, ReadPolicy, ServerState,
    async_runtime::WatchReceiver as _,
    errors::{ClientWriteError, InitializeError, LinearizableReadError, RaftError},
    raft::{AppendEntriesRequest, AppendEntriesResponse},
};
use serde::Serialize;
use tokio::sync::Notify;

use crate::{
    Error, Observer, Options, StateMachine, Storage, Transport,
    log_store::{FirstFailure, LogStore},
    machine::{self, LogLimit, Machine},
    network::{Message, Network},
    snapshot::SnapshotStore,
    storage::Opened,
    transfer::{self, Incoming, Taken},
    types::{Config, LogId, Proposal, Vote},
};

type Raft = openraft::Raft<Config, Machine>;

/// This manager's part in consensus. Cheap to clone.
#[derive(Clone)]
pub struct Node {
    raft: Raft,
    failure: FirstFailure,
    /// A snapshot that another manager sends.
    incoming: Arc<Incoming>,
    transport: Arc<dyn Transport>,
    /// The newest version of commands that the state machine here reads.
    reads: u32,
    /// Held by whoever changes the members.
    changes: Arc<tokio::sync::Mutex<()>>,
    /// When a leader last sent something.
    led: Arc<Mutex<Option<tokio::time::Instant>>>,
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
    /// Whether a change of the voters is half done: decisions take majorities of the old and of the new ones.
    pub is_joint: bool,
    /// On the leader: entries that each other member has not acknowledged.
    pub lag: BTreeMap<u64, u64>,
    /// On the leader: since each other member last answered, for those that did since it leads.
    pub heard: BTreeMap<u64, Duration>,
    /// On a follower: since it last heard a leader, if ever.
    pub leader_silent_for: Option<Duration>,
    /// Why consensus has stopped here, if it has.
    pub failure: Option<String>,
}

impl Status {
    /// On the leader: whether a member is itself, or has answered lately.
    #[must_use]
    pub fn answers(&self, id: u64) -> bool {
        id == self.id || self.heard.get(&id).is_some_and(|silent| *silent < SILENT)
    }
}

/// Many heartbeats, in every profile.
const SILENT: Duration = Duration::from_secs(5);

/// Entries that a manager may be behind and be given a vote.
const CAUGHT_UP: u64 = 100;
/// How long it is waited for one that does not answer, and for one that does; and between looks.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
const CATCH_UP_PATIENCE: Duration = Duration::from_secs(120);
const CATCH_UP_LOOK: Duration = Duration::from_millis(20);

/// How long a member may take to say what it reads.
const READS_PATIENCE: Duration = Duration::from_secs(1);

/// Escaped once more in the log it may grow by seven, still below what the log takes.
const MAX_COMMAND: usize = 8 << 20;

/// How long a read waits for a majority, and between its attempts.
const QUORUM_PATIENCE: Duration = Duration::from_secs(2);
const QUORUM_RETRY: Duration = Duration::from_millis(20);

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
            // There was a log: the cluster goes on.
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
            Err(error) => return Err(Error::Stopped(error.to_string())),
        }
        node.has_read_members().await?;
        Ok(node)
    }

    /// Starts taking part in a cluster that others have begun: as its log says, or else as soon as they add this manager.
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
        let blocks = storage.blocks();
        let opened = machine::blocking(blocks, move || storage.open()).await;
        let Opened { log, snapshots, sync } = opened.map_err(storage_error)?;
        let (log, snapshots) = (LogStore::new(log, Arc::clone(&observer)), SnapshotStore::new(snapshots));
        let failure = log.failure();
        tracing::debug!(sync_ms = sync.as_secs_f64() * 1e3, "the disk's time to make a write durable");
        let config = options.raft(sync).map_err(|error| Error::Stopped(error.to_string()))?;
        let full = Arc::new(Notify::new());
        let limit = LogLimit::new(options.snapshot_after_bytes, Arc::clone(&full));
        let reads = machine.reads();
        let machine = Machine::new(machine, snapshots, blocks, limit, observer, failure.clone());
        let network = Network { transport: Arc::clone(&transport) };
        let raft = Raft::new(options.id, config, network, log, machine).await;
        let why = |error: &dyn std::error::Error| failure.get().map_or_else(|| error.to_string(), str::to_owned);
        let raft = raft.map_err(|error| storage_error(io::Error::other(why(&error))))?;
        tokio::spawn(snapshot_when_full(raft.clone(), full));
        let node = Self {
            raft,
            failure,
            incoming: Arc::default(),
            transport,
            reads,
            changes: Arc::default(),
            led: Arc::default(),
        };
        node.has_read_members().await?;
        // A lone voter need not wait for anyone.
        if node.is_alone() {
            node.raft.trigger().elect(false).await.map_err(|error| Error::Stopped(error.to_string()))?;
        }
        Ok(node)
    }

    /// Waits until the status tells the members that the log tells: for a moment after the start it tells none.
    async fn has_read_members(&self) -> Result<(), Error> {
        let stopped = |error: &dyn std::error::Error| Error::Stopped(error.to_string());
        let read = self.raft.with_raft_state(|state| state.membership_state.effective().nodes().next().is_some());
        if read.await.map_err(|error| stopped(&error))? {
            let told = |metrics: &RaftMetrics<Config>| metrics.membership_config.nodes().next().is_some();
            self.raft.wait(Some(RECOVERY_TIMEOUT)).metrics(told, "members").await.map_err(|error| stopped(&error))?;
        }
        Ok(())
    }

    /// Whether this manager is the only one that votes.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        let status = self.status();
        status.members.iter().filter(|member| member.voter).map(|member| member.id).eq([status.id])
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

    /// Has a command committed and applied, and returns the state machine's reply. There is no time limit while a majority answers:
    /// one that gave up would not know what became of the command.
    ///
    /// # Errors
    ///
    /// [`Error::NotLeader`] or [`Error::TooLarge`] when nothing was done; [`Error::Unknown`] when it is not known.
    pub async fn propose(&self, command: String) -> Result<String, Error> {
        // Refused before the log is touched: what the log cannot encode would stop consensus.
        if command.len() > MAX_COMMAND {
            return Err(Error::TooLarge(command.len()));
        }
        let written = tokio::select! {
            written = self.raft.client_write(Proposal(command)) => written,
            () = self.majority_lost() => return Err(Error::Unknown),
        };
        match written {
            Ok(written) => Ok(written.data.0),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward))) => {
                Err(Error::NotLeader { leader: forward.leader_id })
            }
            Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => Err(Error::Unknown),
            Err(error) => Err(Error::Stopped(error.to_string())),
        }
    }

    /// Returns when this manager leads, and no majority has answered it for long.
    async fn majority_lost(&self) {
        loop {
            tokio::time::sleep(SILENT / 10).await;
            let status = self.status();
            if status.is_leader && status.quorum_age.is_some_and(|age| age > SILENT) {
                return;
            }
        }
    }

    /// Returns once a read here sees every write that was acknowledged before, anywhere.
    ///
    /// # Errors
    ///
    /// When this manager does not lead, or no majority answers.
    pub async fn linearize(&self) -> Result<(), Error> {
        let deadline = tokio::time::Instant::now() + QUORUM_PATIENCE;
        loop {
            return match self.raft.ensure_linearizable(ReadPolicy::ReadIndex).await {
                Ok(_) => Ok(()),
                Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward))) => {
                    Err(Error::NotLeader { leader: forward.leader_id })
                }
                // One that has just begun to lead, or whose members have just changed, is answered in a moment.
                Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_)))
                    if tokio::time::Instant::now() < deadline =>
                {
                    tokio::time::sleep(QUORUM_RETRY).await;
                    continue;
                }
                Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => Err(Error::NoQuorum),
                Err(error) => Err(Error::Stopped(error.to_string())),
            };
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
        let heard = metrics.heartbeat.iter().flatten().filter(|(id, _)| **id != metrics.id);
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
            is_joint: membership.get_joint_config().len() > 1,
            lag: lag
                .map(|(id, acked)| (*id, last_log_index - acked.index().unwrap_or(0).min(last_log_index)))
                .collect(),
            heard: heard.filter_map(|(id, at)| Some((*id, at.as_ref()?.into_inner().elapsed()))).collect(),
            leader_silent_for: self.led().map(|at| at.elapsed()),
            failure: metrics
                .running_state
                .err()
                .map(|error| self.failure.get().map_or_else(|| error.to_string(), str::to_owned)),
        }
    }

    fn led(&self) -> MutexGuard<'_, Option<tokio::time::Instant>> {
        self.led.lock().unwrap_or_else(PoisonError::into_inner)
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
        if transfer::is_part(message) {
            *self.led() = Some(tokio::time::Instant::now());
            return match self.incoming.take(message) {
                Ok(Some((vote, snapshot))) => {
                    self.know_committed(vote, snapshot.meta.last_log_id).await;
                    let installed = self.raft.install_full_snapshot(vote, snapshot).await;
                    answer(installed.map(|response| Taken { installed: Some(response) }))
                }
                Ok(None) => answer::<Taken, String>(Ok(Taken { installed: None })),
                Err(why) => answer::<Taken, String>(Err(why)),
            };
        }
        match serde_json::from_slice(message)? {
            Message::Append(rpc) => {
                let appended = self.raft.append_entries(rpc).await;
                // Who was deposed leads nobody.
                if appended.as_ref().is_ok_and(|response| !matches!(response, AppendEntriesResponse::HigherVote(_))) {
                    *self.led() = Some(tokio::time::Instant::now());
                }
                answer(appended)
            }
            Message::Vote(rpc) => answer(self.raft.vote(rpc).await),
            Message::PreVote(rpc) => answer(self.raft.pre_vote(rpc).await),
            Message::TransferLeader(rpc) => answer(self.raft.handle_transfer_leader(rpc).await),
            Message::Reads => answer::<u32, String>(Ok(self.reads)),
        }
    }

    /// Takes note of what the sender of a snapshot says by it: what it is of is committed. Who has those entries, and more behind
    /// them, needs no snapshot then, and openraft installs none; it must not, because it takes the end of the log for that of the
    /// snapshot (and panics, where it is built with assertions).
    async fn know_committed(&self, vote: Vote, reached: Option<LogId>) {
        let known = AppendEntriesRequest { vote, prev_log_id: reached, entries: Vec::new(), leader_commit: reached };
        // Whoever does not have them, or knows of a later leader, hears of the snapshot next and answers to that.
        let _ = self.raft.append_entries(known).await;
    }

    /// Takes a member in: first as a learner, and as a voter once it has caught up. One that is a voter already may have another
    /// address now.
    ///
    /// # Errors
    ///
    /// When this manager does not lead, or no majority answers. The member may then follow without a vote: taking it in again
    /// goes on from there.
    pub async fn add_voter(&self, id: u64, address: &str) -> Result<(), Error> {
        let node = BasicNode::new(address);
        let known = self.status().members.into_iter().find(|member| member.id == id);
        if let Some(known) = &known
            && known.address != address
        {
            let nodes = BTreeMap::from([(id, node.clone())]);
            self.change(ChangeMembers::SetNodes(nodes), false).await?;
        }
        if known.is_some_and(|known| known.voter) {
            return Ok(());
        }
        self.change(ChangeMembers::AddNodes(BTreeMap::from([(id, node)])), true).await?;
        self.caught_up(id, address).await?;
        self.change(ChangeMembers::AddVoterIds(BTreeSet::from([id])), false).await
    }

    /// Waits until a member that follows answers and has nearly all of the log: with the vote of one that does not, there may be no
    /// majority any more.
    async fn caught_up(&self, id: u64, address: &str) -> Result<(), Error> {
        let began = tokio::time::Instant::now();
        loop {
            let status = self.status();
            if !status.is_leader {
                return Err(Error::NotLeader { leader: status.leader });
            }
            let answers = status.answers(id);
            let lag = status.lag.get(&id).copied();
            if answers && lag.is_some_and(|lag| lag <= CAUGHT_UP) {
                return Ok(());
            }
            if !answers && began.elapsed() > ANSWER_PATIENCE {
                return Err(Error::Membership(format!("manager {id} cannot be reached at {address}")));
            }
            if began.elapsed() > CATCH_UP_PATIENCE {
                let lag = lag.unwrap_or(status.last_log_index);
                return Err(Error::Membership(format!("manager {id} is still {lag} entries behind")));
            }
            tokio::time::sleep(CATCH_UP_LOOK).await;
        }
    }

    /// Takes a member's vote; it follows all the same. One that leads must hand over first.
    ///
    /// # Errors
    ///
    /// When this manager does not lead, or no majority answers.
    pub async fn demote(&self, id: u64) -> Result<(), Error> {
        self.change(ChangeMembers::RemoveVoters(BTreeSet::from([id])), true).await
    }

    /// Takes a member in that does not vote, or tells where it is now.
    ///
    /// # Errors
    ///
    /// When this manager does not lead, or no majority answers.
    pub async fn add_learner(&self, id: u64, address: &str) -> Result<(), Error> {
        let known = self.status().members.into_iter().find(|member| member.id == id);
        match known {
            Some(known) if known.address == address => Ok(()),
            Some(_) => {
                self.change(ChangeMembers::SetNodes(BTreeMap::from([(id, BasicNode::new(address))])), false).await
            }
            None => self.change(ChangeMembers::AddNodes(BTreeMap::from([(id, BasicNode::new(address))])), true).await,
        }
    }

    /// Finishes a change of the voters that was left half done, because who made it, or the leader, went away between its two
    /// steps. Whoever was to lose their vote follows on: to take them out is to be asked for again.
    ///
    /// # Errors
    ///
    /// When this manager does not lead, or no majority answers.
    pub async fn settle(&self) -> Result<(), Error> {
        let _one_at_a_time = self.changes.lock().await;
        self.finish_half().await
    }

    /// Takes a member out. One that leads must hand over first.
    ///
    /// # Errors
    ///
    /// When this manager does not lead, or no majority answers.
    pub async fn remove(&self, id: u64) -> Result<(), Error> {
        let Some(known) = self.status().members.into_iter().find(|member| member.id == id) else { return Ok(()) };
        if known.voter {
            return self.change(ChangeMembers::RemoveVoters(BTreeSet::from([id])), false).await;
        }
        self.change(ChangeMembers::RemoveNodes(BTreeSet::from([id])), false).await
    }

    /// Changes the members; `retain` has voters that lose their vote follow on.
    async fn change(&self, change: ChangeMembers<u64, BasicNode>, retain: bool) -> Result<(), Error> {
        let _one_at_a_time = self.changes.lock().await;
        // A change that begins at half of another forgets whoever was to lose their vote by that, even if they lead by now; and
        // openraft panics when it goes on as a leader that is no member.
        self.finish_half().await?;
        self.raft.change_membership(change, retain).await.map(drop).map_err(changing)
    }

    /// Only for who holds the lock on changes.
    async fn finish_half(&self) -> Result<(), Error> {
        let is_joint = |state: &RaftState<Config>| state.membership_state.effective().get_joint_config().len() > 1;
        if self.raft.with_raft_state(is_joint).await.map_err(|error| Error::Stopped(error.to_string()))? {
            let nobody = ChangeMembers::AddVoterIds(BTreeSet::new());
            self.raft.change_membership(nobody, true).await.map_err(changing)?;
        }
        Ok(())
    }

    /// The newest version of commands that every member's state machine reads; each is asked, now. `None` while one does not say.
    pub async fn all_read(&self) -> Option<u32> {
        let status = self.status();
        let others = status.members.iter().filter(|member| member.id != status.id);
        let answers = join_all(others.map(|member| self.reads_at(&member.address))).await;
        answers.into_iter().try_fold(self.reads, |all, reads| Some(all.min(reads?)))
    }

    /// The newest version of commands that the state machine of the member at an address reads; `None` when it does not say.
    pub async fn reads_at(&self, address: &str) -> Option<u32> {
        let question = serde_json::to_vec(&Message::Reads).ok()?;
        let answer = self.transport.call(address, question, READS_PATIENCE).await.ok()?;
        serde_json::from_slice::<Result<u32, String>>(&answer).ok()?.ok()
    }

    /// Asks the voter that answers and is least behind to lead instead of this manager. Whether it does shows in the status.
    ///
    /// # Errors
    ///
    /// When there is no other, or consensus has stopped here.
    pub async fn hand_over(&self) -> Result<(), Error> {
        let status = self.status();
        let others = status.members.iter().filter(|member| member.voter && member.id != status.id);
        // In an idle cluster one that is dead is not behind.
        let key = |id| (!status.answers(id), status.lag.get(&id).copied().unwrap_or(u64::MAX));
        let next = others.min_by_key(|member| key(member.id));
        let next = next.ok_or(Error::NoQuorum)?;
        self.raft.trigger().transfer_leader(next.id).await.map_err(|error| Error::Stopped(error.to_string()))
    }

    /// Stops taking part.
    pub async fn shutdown(&self) {
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "consensus did not stop cleanly");
        }
    }
}

/// Takes a snapshot whenever the log has grown large, until consensus stops.
async fn snapshot_when_full(raft: Raft, full: Arc<Notify>) {
    loop {
        full.notified().await;
        if raft.trigger().snapshot().await.is_err() {
            return;
        }
    }
}

fn changing(error: RaftError<Config, ClientWriteError<Config>>) -> Error {
    match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => {
            Error::NotLeader { leader: forward.leader_id }
        }
        RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => Error::Unknown,
        RaftError::APIError(ClientWriteError::ChangeMembershipError(error)) => Error::Membership(error.to_string()),
        RaftError::APIError(error) => Error::Membership(error.to_string()),
        RaftError::Fatal(error) => Error::Stopped(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use openraft::{Membership, entry::RaftEntry as _, vote::RaftLeaderId as _};

    use super::*;
    use crate::{
        Disconnected, Files, Freeze, Profile, Unobserved, snapshot,
        types::{Entry, Payload, SnapshotMeta, StoredMembership},
    };

    /// Keeps the number of commands that it was given.
    #[derive(Clone, Default)]
    struct Counter(Arc<Mutex<u64>>);

    impl StateMachine for Counter {
        fn apply(&mut self, _index: u64, _command: &str) -> io::Result<String> {
            *self.0.lock().expect("no panics") += 1;
            Ok(String::new())
        }

        fn freeze(&self) -> Freeze {
            let count = *self.0.lock().expect("no panics");
            Box::new(move || serde_json::to_vec(&count).map_err(io::Error::other))
        }

        fn restore(&mut self, state: &[u8]) -> io::Result<()> {
            *self.0.lock().expect("no panics") = serde_json::from_slice(state).map_err(io::Error::other)?;
            Ok(())
        }
    }

    /// Entries and snapshots travel by themselves: where that is slow, later entries are there when a snapshot comes that ends
    /// before them.
    #[tokio::test]
    async fn a_snapshot_that_comes_after_later_entries_does_no_harm() {
        let directory = tempfile::tempdir().expect("a directory");
        let options = Options {
            id: 2,
            address: "manager-2".to_owned(),
            profile: Profile::Lan,
            snapshot_after: 1000,
            snapshot_after_bytes: 1 << 20,
        };
        let (files, counter) = (Arc::new(Files::new(directory.path())), Counter::default());
        let machine = Box::new(counter.clone());
        let node = Node::join(&options, files, machine, Arc::new(Disconnected), Arc::new(Unobserved)).await;
        let node = node.expect("starts");
        let leader = openraft::alias::CommittedLeaderIdOf::<Config>::new(1, 1);
        let vote = Vote::new_committed(1, 1);
        let at = |index| LogId::new(leader, index);
        let members = Membership::new(
            vec![BTreeSet::from([1, 3])],
            BTreeMap::from([1, 2, 3].map(|id| (id, BasicNode::new("elsewhere")))),
        );
        let members = members.expect("members");
        let entry = |index| match index {
            0 => Entry::new(at(0), Payload::Membership(members.clone())),
            _ => Entry::new(at(index), Payload::Normal(Proposal(index.to_string()))),
        };
        let append = |previous: Option<u64>, entries: std::ops::Range<u64>, committed: Option<u64>| {
            let (prev_log_id, leader_commit) = (previous.map(at), committed.map(at));
            let request =
                AppendEntriesRequest { vote, prev_log_id, leader_commit, entries: entries.map(entry).collect() };
            serde_json::to_vec(&Message::Append(request)).expect("encodes")
        };
        let accepts = async |message: &[u8]| {
            let answer = node.handle(message).await.expect("a message");
            String::from_utf8(answer).expect("JSON")
        };
        assert!(accepts(&append(None, 0..5, None)).await.contains("Success"));
        let meta = SnapshotMeta {
            last_log_id: Some(at(2)),
            last_membership: StoredMembership::new(Some(at(0)), members.clone()),
        };
        let snapshot = snapshot::encode(&meta, b"2").expect("encodes");
        for part in transfer::parts(vote, &meta, &snapshot.0) {
            let answer = accepts(&part.expect("encodes")).await;
            assert!(answer.contains("Ok") && answer.contains("installed"), "{answer}");
        }
        assert_eq!(node.status().failure, None);
        // What comes next is taken as ever.
        assert!(accepts(&append(Some(4), 5..6, Some(5))).await.contains("Success"));
        let applied = |metrics: &RaftMetrics<Config>| metrics.last_applied.index() == Some(5);
        node.raft.wait(Some(Duration::from_secs(5))).metrics(applied, "all is applied").await.expect("it is");
        assert_eq!(*counter.0.lock().expect("no panics"), 5);
        node.shutdown().await;
    }
}
