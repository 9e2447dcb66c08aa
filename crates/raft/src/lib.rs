//! Consensus: an ordered, durable, replicated sequence of commands, applied to a state machine on every manager.
//!
//! This is the only crate that names openraft. What it adds: a log that acknowledges nothing before `fdatasync`, snapshots
//! as one checked file each, timeouts that respect the disk, and plain types at its border. State machine,
//! storage, transport and observer are the users' ([`StateMachine`], [`Storage`], [`Transport`], [`Observer`]), so that a
//! simulation can bring its own.

mod config;
mod files;
mod log_store;
mod machine;
mod network;
mod node;
mod observer;
pub mod offline;
mod snapshot;
pub mod storage;
mod transfer;
mod types;

pub use config::{Options, Profile};
pub use files::Files;
pub use machine::{Freeze, StateMachine};
pub use network::{Disconnected, Transport, TransportError};
pub use node::{Member, Node, Status};
pub use observer::{Observer, SnapshotOperation, Unobserved};
pub use storage::Storage;
pub use types::{Entry, LogId, Vote};

use std::io;

/// Why consensus could not be reached, or not even begun.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This manager does not lead.
    #[error("this manager does not lead the cluster{}", leader.map(|id| format!("; manager {id} does")).unwrap_or_default())]
    NotLeader {
        /// Who does, if known.
        leader: Option<u64>,
    },
    /// No majority of managers answers.
    #[error("no majority of managers answers")]
    NoQuorum,
    /// The command is larger than a log entry may be.
    #[error("a change of {0} bytes is too large")]
    TooLarge(usize),
    /// It may have been committed, or not: the leader changed or lost its majority meanwhile.
    #[error("the leader changed or lost its majority; the change may have been made or not")]
    Unknown,
    /// The members cannot be changed like this, or not now.
    #[error("the managers cannot be changed: {0}")]
    Membership(String),
    /// The log or the snapshots cannot be read or written.
    #[error("the Raft storage in {place} is unusable: {source}")]
    Storage {
        /// Where.
        place: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Consensus has stopped on this manager.
    #[error("consensus has stopped on this manager: {0}")]
    Stopped(String),
}
