//! Transactions: changes that are made all or not at all.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

use super::{
    Availability, Cluster, Container, JoinToken, Manager, Node, OLDEST_WRITTEN_SCHEMA, Operator, Origin, REQUESTS,
    Sealed, SealedAuthority, Secret, Service, State, Status, TokenRole, Volume, events::Told,
};
use crate::{
    clock::Timestamp,
    ids::{ContainerId, NodeId, OperatorId, SecretId, ServiceId, VolumeId},
};

/// What the writer saw of an object; if it is otherwise, nothing is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Expected {
    /// Whatever is there.
    Any,
    /// Nothing is there.
    Absent,
    /// The object's version is this.
    Version(u64),
}

impl Expected {
    /// Whether what there is, by its version, is what the writer saw.
    pub(super) fn is(self, version: Option<u64>) -> bool {
        match self {
            Self::Any => true,
            Self::Absent => version.is_none(),
            Self::Version(seen) => version == Some(seen),
        }
    }
}

/// One change. What has several writers has changes of its own, so that they do not overwrite one another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Change {
    /// Gives the cluster its identity, unless it has one.
    FoundCluster(Box<Cluster>),
    /// Has log and snapshots be of this schema from here on, unless they are of a later one: every manager reads it.
    RaiseSchema(u32),
    /// Locks managers' keys of secrets, or does not.
    SetLock(Option<Sealed>),
    /// Begins to give the cluster another authority, unless that is under way.
    BeginRotation(SealedAuthority),
    /// Goes on with it, if it is where the writer saw it.
    AdvanceRotation {
        /// Whether the new authority signs already.
        signs: bool,
    },
    /// A member believes authorities.
    Certify {
        /// Like `manager 2` or `node x`.
        member: String,
        /// Their digest.
        digest: String,
    },
    /// Lets a manager in, if its id is the next one.
    AdmitManager(Manager),
    /// Says whether a manager is to vote.
    SetManager {
        /// Which.
        id: u64,
        /// Whether.
        voter: bool,
    },
    /// Turns a manager out.
    RemoveManager {
        /// Which.
        id: u64,
    },
    /// Lets a node in, if nobody has had its id.
    AdmitNode {
        /// Which.
        id: NodeId,
    },
    /// Makes a join token.
    PutToken(JoinToken),
    /// Makes all join tokens of a role useless.
    RevokeTokens {
        /// Which.
        role: TokenRole,
    },
    /// Invites an operator.
    CreateOperator(Operator),
    /// Lets an operator in, by an invitation that is used up by it.
    AdmitOperator {
        /// Whom.
        id: OperatorId,
        /// Of the invitation.
        hash: String,
    },
    /// Turns an operator out.
    DeleteOperator {
        /// Whom.
        id: OperatorId,
    },
    /// Writes a service.
    PutService {
        /// The service; its version is set by the write.
        service: Box<Service>,
        /// What was seen of it.
        expected: Expected,
    },
    /// Deletes a service's record; its containers follow by reconciliation.
    DeleteService {
        /// Which.
        id: ServiceId,
        /// What was seen of it.
        expected: Expected,
        /// Whether its containers hold its ports on their nodes until they end. Logs of earlier versions do not say so.
        #[serde(default, skip_serializing_if = "is_false")]
        ports_stay: bool,
    },
    /// Writes a secret or config. Services that ask for it get new containers when its value is another.
    PutSecret {
        /// The secret; its version is set by the write.
        secret: Box<Secret>,
        /// What was seen of it.
        expected: Expected,
    },
    /// Deletes a secret or config that no service uses.
    DeleteSecret {
        /// Which.
        id: SecretId,
    },
    /// Makes a volume.
    CreateVolume(Box<Volume>),
    /// Deletes a volume's record; its nodes remove what they have of it.
    DeleteVolume {
        /// Which.
        id: VolumeId,
        /// Also while services use it.
        force: bool,
    },
    /// Writes what an agent says of its node.
    PutNode(Box<Node>),
    /// Writes what operators say of a node.
    SetNode {
        /// Which.
        id: NodeId,
        /// Whether it takes containers; as before unless given.
        availability: Option<Availability>,
        /// Labels to set, or to remove.
        labels: BTreeMap<String, Option<String>>,
    },
    /// Deletes a node's record and those of its containers.
    DeleteNode {
        /// Which.
        id: NodeId,
    },
    /// Makes a container, in the words of an earlier version: logs may still hold it.
    CreateContainer(Box<Container>),
    /// Makes a container of what its service runs.
    Create(NewContainer),
    /// Gives a container to a node, if it still waits for one.
    Assign {
        /// Which.
        id: ContainerId,
        /// To whom.
        node: NodeId,
        /// When.
        at: Timestamp,
    },
    /// Says why a container waits.
    Refuse {
        /// Which.
        id: ContainerId,
        /// Why.
        message: String,
        /// When.
        at: Timestamp,
    },
    /// Wants a container stopped and removed. There is no way back.
    Remove {
        /// Which.
        id: ContainerId,
    },
    /// Takes note of what an agent reports. A state that is behind the known one is old news and ignored.
    Observe {
        /// Which.
        id: ContainerId,
        /// Who reports.
        node: NodeId,
        /// What.
        status: Box<Status>,
    },
    /// Deletes a container's record.
    DeleteContainer {
        /// Which.
        id: ContainerId,
    },
}

impl Change {
    /// The first schema of a log that may hold it: who reads no later one does not know it, or would do otherwise by it. What is new gets an
    /// arm of its own here.
    fn since(&self) -> u32 {
        match self {
            Self::PutService { service, expected: _ } => {
                service.spec.since().map_or(OLDEST_WRITTEN_SCHEMA, |(schema, _)| schema)
            }
            // As the log of the oldest schema that is written has it.
            Self::FoundCluster(_)
            | Self::RaiseSchema(_)
            | Self::SetLock(_)
            | Self::BeginRotation(_)
            | Self::AdvanceRotation { .. }
            | Self::Certify { .. }
            | Self::AdmitManager(_)
            | Self::SetManager { .. }
            | Self::RemoveManager { .. }
            | Self::AdmitNode { .. }
            | Self::PutToken(_)
            | Self::RevokeTokens { .. }
            | Self::CreateOperator(_)
            | Self::AdmitOperator { .. }
            | Self::DeleteOperator { .. }
            | Self::DeleteService { .. }
            | Self::PutSecret { .. }
            | Self::DeleteSecret { .. }
            | Self::CreateVolume(_)
            | Self::DeleteVolume { .. }
            | Self::PutNode(_)
            | Self::SetNode { .. }
            | Self::DeleteNode { .. }
            | Self::CreateContainer(_)
            | Self::Create(_)
            | Self::Assign { .. }
            | Self::Refuse { .. }
            | Self::Remove { .. }
            | Self::Observe { .. }
            | Self::DeleteContainer { .. } => OLDEST_WRITTEN_SCHEMA,
        }
    }
}

/// A container that is to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewContainer {
    /// Its id.
    pub id: ContainerId,
    /// Whose it is.
    pub service: ServiceId,
    /// The service's generation that was seen; if it is another by now, none is made.
    pub generation: u64,
    /// In which slot.
    pub slot: u32,
    /// The only node that may run it, for a global service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pinned: Option<NodeId>,
    /// Failures in a row in its slot before it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub failures: u32,
    /// When.
    pub at: Timestamp,
}

fn is_false(truth: &bool) -> bool {
    !truth
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// A list of changes, as the log holds it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Transaction {
    /// Who asked for it; nobody, when the cluster does it by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// Chosen by a client: the same twice does its work once.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub request_id: String,
    /// The changes, in order.
    pub changes: Vec<Change>,
}

impl Transaction {
    /// The schema that the cluster has by it: only who reads that may read it. 0 when it is the one that it had.
    pub(super) fn raises_schema_to(&self) -> u32 {
        let raised = |change: &Change| if let Change::RaiseSchema(schema) = change { *schema } else { 0 };
        self.changes.iter().map(raised).max().unwrap_or(0)
    }

    /// The first schema of a log that may hold it.
    pub(super) fn since(&self) -> u32 {
        self.changes.iter().map(Change::since).max().unwrap_or(OLDEST_WRITTEN_SCHEMA)
    }
}

/// Why a transaction changed nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rejection {
    /// Another service has this name.
    NameTaken(String),
    /// There is another of this name.
    Exists(String),
    /// The object has been changed, or is gone, since the writer saw it.
    Conflict(String),
    /// There is no such object.
    NotFound(String),
    /// A service names something that there is not.
    Unknown {
        /// Where it does.
        field: String,
        /// What.
        what: String,
    },
    /// Services use it.
    InUse {
        /// What.
        what: String,
        /// By whom.
        users: Vec<String>,
    },
    /// Another service publishes this port.
    PortTaken {
        /// Which, and its protocol.
        port: String,
        /// Whose it is.
        service: String,
    },
    /// The cluster's networks have no more of these.
    Exhausted(String),
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NameTaken(name) => write!(f, "a service named {name:?} exists already"),
            Self::Exists(what) => write!(f, "{what} exists already"),
            Self::Conflict(what) => write!(f, "{what} was changed by someone else; look again and repeat"),
            Self::NotFound(what) => write!(f, "there is no {what}"),
            Self::Unknown { field, what } => write!(f, "{field}: there is no {what}"),
            Self::InUse { what, users } => write!(f, "{what} is in use by {}", users.join(", ")),
            Self::PortTaken { port, service } => write!(f, "port {port} is published by service {service:?}"),
            Self::Exhausted(what) => write!(f, "the cluster has no {what} left"),
        }
    }
}

/// The revision that a transaction made, or why it made none.
pub type Reply = Result<u64, Rejection>;

impl State {
    /// Whether the transaction of this request was applied, as far back as requests are remembered.
    #[must_use]
    pub fn has_done(&self, request_id: &str) -> bool {
        matches!(self.replies.get(request_id), Some(Ok(_)))
    }

    /// Applies a transaction at `index` of the log.
    pub fn apply(&mut self, index: u64, transaction: &Transaction) -> Reply {
        if let Some(reply) = self.replies.get(&transaction.request_id) {
            return reply.clone();
        }
        // Work on a copy, which is cheap, so that a transaction that fails half-way leaves nothing.
        let mut next = self.clone();
        next.revision = index;
        let reply = transaction.changes.iter().try_for_each(|change| {
            if let (Some(told), Some(origin)) = (next.change(change)?, &transaction.origin) {
                next.record(told.event(index, origin.clone()));
            }
            Ok(())
        });
        let reply = reply.map(|()| index);
        if reply.is_ok() {
            *self = next;
        }
        if !transaction.request_id.is_empty() {
            self.revision = index;
            self.replies.insert(transaction.request_id.clone(), reply.clone());
            self.requests.insert(index, transaction.request_id.clone());
            while self.requests.len() > REQUESTS {
                if let Some((oldest, request)) = self.requests.get_min().cloned() {
                    self.requests.remove(&oldest);
                    self.replies.remove(&request);
                }
            }
        }
        reply
    }

    /// Makes a change; what there is to tell about it. What becomes of containers is told otherwise, and is often.
    fn change(&mut self, change: &Change) -> Result<Option<Told>, Rejection> {
        let told = match change {
            Change::FoundCluster(cluster) => self.found_cluster(cluster),
            Change::RaiseSchema(schema) => return Ok(self.raise_schema(*schema)),
            Change::SetLock(lock) => self.set_lock(lock.as_ref())?,
            Change::BeginRotation(new) => self.begin_rotation(new)?,
            Change::AdvanceRotation { signs } => self.advance_rotation(*signs)?,
            Change::AdmitManager(manager) => self.admit_manager(manager)?,
            Change::SetManager { id, voter } => self.set_manager(*id, *voter)?,
            Change::RemoveManager { id } => self.remove_manager(*id)?,
            Change::AdmitNode { id } => self.admit_node(id)?,
            Change::PutToken(token) => self.put_token(token),
            Change::RevokeTokens { role } => self.revoke_tokens(*role),
            Change::CreateOperator(operator) => self.create_operator(operator)?,
            Change::AdmitOperator { id, hash } => self.admit_operator(id, hash)?,
            Change::DeleteOperator { id } => self.delete_operator(id)?,
            Change::PutService { service, expected } => self.put_service(service, *expected)?,
            Change::DeleteService { id, expected, ports_stay } => self.delete_service(id, *expected, *ports_stay)?,
            Change::PutSecret { secret, expected } => self.put_secret(secret, *expected)?,
            Change::DeleteSecret { id } => self.delete_secret(id)?,
            Change::CreateVolume(volume) => self.create_volume(volume)?,
            Change::DeleteVolume { id, force } => self.delete_volume(id, *force)?,
            Change::PutNode(node) => self.put_node(node)?,
            Change::SetNode { id, availability, labels } => self.set_node(id, *availability, labels)?,
            Change::DeleteNode { id } => self.delete_node(id)?,
            Change::CreateContainer(container) => return self.create_container((**container).clone()).map(|()| None),
            Change::Create(new) => return self.create(new).map(|()| None),
            Change::Certify { member, digest } => {
                self.certify(member, digest);
                return Ok(None);
            }
            Change::Assign { id, node, at } => {
                self.assign(id, node, *at);
                return Ok(None);
            }
            Change::Refuse { id, message, at } => {
                self.refuse(id, message, *at);
                return Ok(None);
            }
            Change::Remove { id } => {
                self.want_removed(id);
                return Ok(None);
            }
            Change::Observe { id, node, status } => {
                self.observe(id, node, status);
                return Ok(None);
            }
            Change::DeleteContainer { id } => {
                self.delete_container(id);
                return Ok(None);
            }
        };
        Ok(Some(told))
    }
}
