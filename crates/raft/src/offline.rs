//! What is done with a manager's log and snapshot while no manager uses them: reading them to the end, and beginning a cluster of
//! one from a state.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    path::Path,
    sync::mpsc,
    time::Duration,
};

use openraft::{BasicNode, EntryPayload, Membership, entry::RaftEntry as _, vote::RaftLeaderId as _};

use crate::{
    StateMachine,
    files::SnapshotFile,
    node::Member,
    snapshot::{self, SnapshotBytes},
    storage::{Log, Snapshots as _},
    types::{LogId, SnapshotMeta, StoredMembership, Vote},
};

/// How far a log reaches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// The highest term that the manager has known.
    pub term: u64,
    /// The term of the last entry.
    pub last_term: u64,
    /// The last entry.
    pub last_index: u64,
    /// The last entry that was known here to be committed. Those behind it may have been acknowledged to somebody, or not.
    pub committed_index: u64,
    /// The members, as of the last entry.
    pub members: Vec<Member>,
}

/// Keeps managers from using a log, until it is dropped.
pub struct Held {
    _log: Box<dyn Send>,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Held")
    }
}

/// Bytes of entries that are in memory at a time.
const READ: usize = 16 << 20;
/// How long a disk may take for one write.
const WRITE_PATIENCE: Duration = Duration::from_secs(60);

/// Reads snapshot and log into a state machine, to the log's end: entries of which it is not known whether they were committed as
/// well. No manager can use them while what is returned is held.
///
/// # Errors
///
/// When they cannot be read, something is missing between them, or a manager uses them.
pub fn read(directory: &Path, machine: &mut dyn StateMachine) -> io::Result<(Reach, Held)> {
    if !directory.join("log").exists() {
        let why = format!("{} holds no log", directory.display());
        return Err(io::Error::new(io::ErrorKind::NotFound, why));
    }
    let log = crate::files::open_log(&directory.join("log"))?;
    let (mut last, mut membership) = (None, StoredMembership::default());
    if let Some(bytes) = SnapshotFile::open(&directory.join("snapshot"))?.load()? {
        let (meta, state) = snapshot::decode(&SnapshotBytes(bytes))?;
        machine.restore(&state)?;
        (last, membership) = (meta.last_log_id, meta.last_membership);
    }
    let positions = Log::positions(&log);
    let mut next = last.map_or(0, |last: LogId| last.index + 1);
    if positions.purged.is_some_and(|purged| purged.index >= next) {
        let why = format!("{}: entries between the snapshot and the log are missing", directory.display());
        return Err(io::Error::new(io::ErrorKind::InvalidData, why));
    }
    let end = positions.last.map_or(0, |last| last.index + 1);
    while next < end {
        let entries = Log::read(&log, next, end, READ)?;
        if entries.is_empty() {
            let why = format!("{}: entry {next} of the log is missing", directory.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        for entry in entries {
            let log_id = entry.log_id();
            match entry.payload {
                EntryPayload::Blank => {}
                EntryPayload::Normal(proposal) => drop(machine.apply(log_id.index, &proposal.0)?),
                EntryPayload::Membership(members) => membership = StoredMembership::new(Some(log_id), members),
            }
            (last, next) = (Some(log_id), log_id.index + 1);
        }
    }
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let last_term = last.map_or(0, |last| last.leader_id.term);
    let reach = Reach {
        term: positions.vote.map_or(last_term, |vote| vote.leader_id.term.max(last_term)),
        last_term,
        last_index: last.map_or(0, |last| last.index),
        committed_index: positions.committed.map_or(0, |committed| committed.index),
        members: membership
            .nodes()
            .map(|(id, node)| Member { id: *id, address: node.addr.clone(), voter: voters.contains(id) })
            .collect(),
    };
    Ok((reach, Held { _log: Box::new(log) }))
}

/// Makes `directory`, which must hold nothing yet, that of the only member of a cluster whose state is this one. The manager that
/// is started on it goes on behind `index`, in a term after `term`.
///
/// # Errors
///
/// When there is something in it, or it cannot be written.
pub fn begin(directory: &Path, id: u64, address: &str, state: &[u8], term: u64, index: u64) -> io::Result<()> {
    if directory.exists() {
        let why = format!("{} is there already", directory.display());
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
    }
    let leader = openraft::alias::CommittedLeaderIdOf::<crate::types::Config>::new(term, id);
    let last = LogId::new(leader, index);
    let members = BTreeMap::from([(id, BasicNode::new(address))]);
    let membership = Membership::new(vec![BTreeSet::from([id])], members).map_err(io::Error::other)?;
    let meta = SnapshotMeta { last_log_id: Some(last), last_membership: StoredMembership::new(Some(last), membership) };
    SnapshotFile::open(&directory.join("snapshot"))?.save(&snapshot::encode(&meta, state)?.0)?;
    // An election must come after every term that the state knows.
    let mut log = crate::files::open_log(&directory.join("log"))?;
    let (sender, durable) = mpsc::channel();
    log.vote(Vote::new(term, id), Box::new(move |result| drop(sender.send(result))))?;
    durable.recv_timeout(WRITE_PATIENCE).map_err(io::Error::other)?
}
