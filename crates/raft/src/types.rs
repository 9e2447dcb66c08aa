use std::fmt;

use openraft::{BasicNode, alias};
use serde::{Deserialize, Serialize};

/// A command as the log keeps it: text that only the state machine reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Proposal(pub(crate) String);

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Commands may hold secrets; logs may not.
        write!(f, "{} bytes", self.0.len())
    }
}

/// The state machine's reply, as text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Reply(pub(crate) String);

openraft::declare_raft_types!(
    pub Config:
        D = Proposal,
        R = Reply,
        NodeId = u64,
        Node = BasicNode,
);

/// An entry's place: the term and the leader that made it, and its index.
pub type LogId = alias::LogIdOf<Config>;
/// A manager's vote: for whom, in which term, and whether a majority has agreed.
pub type Vote = alias::VoteOf<Config>;
/// A log entry: a command, a membership, or nothing.
pub type Entry = alias::EntryOf<Config>;
pub(crate) type Payload = alias::PayloadOf<Config>;
pub(crate) type StoredMembership = alias::StoredMembershipOf<Config>;
pub(crate) type SnapshotMeta = alias::SnapshotMetaOf<Config>;
