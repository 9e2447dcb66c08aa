//! The cluster's state: typed tables, and transactions that change them.
//!
//! A pure function of the log: no clock, no randomness, no effects. Ids and times come in the transactions. The tables are
//! persistent maps, so a copy of the whole state costs a few pointers: readers and planners work on copies while newer
//! transactions are applied.

mod cluster;
mod containers;
mod events;
mod machine;
mod managers;
mod network;
mod nodes;
mod operators;
mod revisions;
mod secrets;
mod services;
mod snapshot;
mod table;
mod transaction;
mod volumes;

#[cfg(test)]
pub(crate) mod tests;

pub use cluster::{Cluster, Rotation, Sealed, SealedAuthority};
use containers::SlotKey;
pub use containers::{Container, ContainerChange, ContainerState, Desired, Status, Timing};
pub use events::{Actor, Event, Origin};
pub use machine::{Machine, encode};
pub use managers::{JoinToken, Manager, TokenRole};
use network::Numbers;
pub use network::{ClusterNetwork, InvalidNetwork, NetworkV6};
pub use nodes::{AGENT_LABELS, Availability, Description, Node, Probes};
pub use operators::{Invitation, Operator};
pub use revisions::Revision;
pub use secrets::Secret;
pub(crate) use secrets::{kind_name, needed_secrets};
use services::node_ports;
pub(crate) use services::protocol_name;
pub use services::{
    Amounts, Constraint, Mode, Resources, RestartCondition, RestartPolicy, Service, ServiceSpec, Trait,
};
pub use table::{Record, Table};
pub use transaction::{Change, Expected, NewContainer, Rejection, Reply, Transaction};
pub use volumes::Volume;
pub(crate) use volumes::needed_volumes;

use std::sync::Arc;

use imbl::{OrdMap, OrdSet, Vector};
use serde::{Deserialize, Serialize};

use crate::ids::{ContainerId, NodeId, ServiceId, VolumeId};

/// Changes remembered for watchers; who is further behind lists anew.
const HISTORY: usize = 10_000;
/// Deleted volumes remembered; a node that was away for longer keeps what it has of others.
const DELETED_VOLUMES: usize = 1000;
/// Changes remembered with who made them.
const EVENTS: usize = 10_000;
/// Revisions of a service that are kept although no container has them.
const KEPT_REVISIONS: usize = 10;
/// Requests remembered, so that repeating one does nothing.
const REQUESTS: usize = 10_000;

/// Everything the cluster agrees on. Its serialized fields are those of snapshots, which hold revisions and containers in forms of their own.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// What its log and snapshots are written in; none of the members is too old to read it.
    schema: Schema,
    revision: u64,
    cluster: Option<Arc<Cluster>>,
    services: Table<Service>,
    nodes: Table<Node>,
    /// What services' containers are made of: the latest of each service, and those that containers have.
    #[serde(skip)]
    revisions: OrdMap<(ServiceId, u64), Arc<Revision>>,
    #[serde(skip)]
    containers: OrdMap<ContainerId, Arc<Container>>,
    secrets: Table<Secret>,
    volumes: Table<Volume>,
    /// The latest that were deleted, by the revision that did it: their nodes have data to remove.
    deleted_volumes: OrdSet<(u64, VolumeId)>,
    managers: Table<Manager>,
    /// No manager ever had this id or a higher one.
    next_manager: u64,
    tokens: Table<JoinToken>,
    #[serde(default)]
    operators: Table<Operator>,
    /// While the authority changes: which authorities each member is known to believe, by their digest.
    #[serde(default)]
    certified: OrdMap<String, String>,
    /// Nodes that were let in with a token; and those that were removed, whose ids nobody gets again.
    admitted: OrdSet<NodeId>,
    departed: OrdSet<NodeId>,
    /// Request ids by the revision of their reply, and their replies.
    requests: OrdMap<u64, String>,
    replies: OrdMap<String, Reply>,
    /// The latest changes that somebody made.
    #[serde(default)]
    events: Vector<Arc<Event>>,
    /// Numbers of nodes' subnets and of services' virtual addresses; which are taken is derived.
    #[serde(rename = "next_subnet")]
    subnets: Numbers,
    #[serde(rename = "next_virtual_address")]
    virtual_addresses: Numbers,
    // What follows is derived, or forgotten at a restart.
    #[serde(skip)]
    by_service: OrdSet<(ServiceId, ContainerId)>,
    #[serde(skip)]
    by_node: OrdSet<(NodeId, ContainerId)>,
    /// How many containers have a revision.
    #[serde(skip)]
    users: OrdMap<(ServiceId, u64), usize>,
    /// The container of each slot that is to run and has not ended.
    #[serde(skip)]
    live: OrdMap<SlotKey, ContainerId>,
    /// Containers that are to run and that no node has yet.
    #[serde(skip)]
    waiting: OrdSet<ContainerId>,
    /// When what a node has last changed; and what nodes share, as secrets.
    #[serde(skip)]
    node_revisions: OrdMap<NodeId, u64>,
    #[serde(skip)]
    shared_revision: u64,
    #[serde(skip)]
    history: Vector<(u64, ContainerChange)>,
    /// Changes up to here are not in the history.
    #[serde(skip)]
    forgotten: u64,
}

/// A schema's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Schema(u32);

impl Default for Schema {
    fn default() -> Self {
        Self(OLDEST_WRITTEN_SCHEMA)
    }
}

/// The newest layout of states and transactions.
pub const SCHEMA: u32 = 7;
/// The first in which a secret can be an environment variable.
const SECRETS_IN_ENV: u32 = 7;
/// The first in which containers hold the number of a revision, and not what it says; and in which every change of what a service asks of its
/// containers and their nodes is another one.
pub(crate) const REVISIONS: u32 = 7;
/// The oldest that is written; a cluster's managers write one between both: [`State::schema`].
pub const OLDEST_WRITTEN_SCHEMA: u32 = 5;
/// The oldest that is read: what a newer one has besides is as if it had never been used.
pub(crate) const OLDEST_SCHEMA: u32 = 3;

impl State {
    /// The schema that the cluster's log and snapshots are written in. What came with a later one must not be written, nor be done
    /// otherwise than before, until every manager reads it and it is raised.
    #[must_use]
    pub fn schema(&self) -> u32 {
        self.schema.0
    }

    /// The revision of the last change: its place in the log.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Whether nobody can have joined or left between another state and this one. It says no where members were only changed, but
    /// costs nothing.
    pub(crate) fn has_members_of(&self, other: &Self) -> bool {
        self.cluster.is_some() == other.cluster.is_some()
            && self.managers.is_untouched(&other.managers)
            && self.admitted.ptr_eq(&other.admitted)
            && self.operators.is_untouched(&other.operators)
    }

    /// Has nobody join any more with a token that there is, and no operator come any more.
    pub(crate) fn forget_whom_it_let_in(&mut self) {
        self.tokens = Table::default();
        self.operators = Table::default();
    }
}
