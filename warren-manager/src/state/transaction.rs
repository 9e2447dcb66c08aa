//! Transactions: changes that are made all or not at all.

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde::{Deserialize, Serialize};
use warren_proto::v1;

use super::{
    Availability, Cluster, Container, ContainerState, DELETED_VOLUMES, Desired, Event, JoinToken, Manager, Node,
    Operator, Origin, REQUESTS, Rotation, Schema, Sealed, SealedAuthority, Secret, Service, State, Status, TokenRole,
    Volume, events, needed_secrets, needed_volumes, secret_key,
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
    Create {
        /// Its id.
        id: ContainerId,
        /// Whose it is.
        service: ServiceId,
        /// The service's generation that was seen; if it is another by now, none is made.
        generation: u64,
        /// In which slot.
        slot: u32,
        /// The only node that may run it, for a global service.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pinned: Option<NodeId>,
        /// Failures in a row in its slot before it.
        #[serde(default, skip_serializing_if = "is_zero")]
        failures: u32,
        /// When.
        at: Timestamp,
    },
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

/// As errors show it.
pub(crate) fn kind_name(kind: v1::SecretKind) -> &'static str {
    if kind == v1::SecretKind::Config { "config" } else { "secret" }
}

/// As tables and errors show it.
#[must_use]
pub(crate) fn protocol_name(port: &v1::Port) -> &'static str {
    match port.protocol() {
        v1::Protocol::Udp => "udp",
        v1::Protocol::Tcp | v1::Protocol::Unspecified => "tcp",
    }
}

/// The revision that a transaction made, or why it made none.
pub type Reply = Result<u64, Rejection>;

fn matches(expected: Expected, version: Option<u64>) -> bool {
    match expected {
        Expected::Any => true,
        Expected::Absent => version.is_none(),
        Expected::Version(seen) => version == Some(seen),
    }
}

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
            let told = transaction.origin.as_ref().and_then(|origin| Some((origin, events::tell(&next, change)?)));
            next.change(change)?;
            if let Some((origin, (kind, id, name, message))) = told {
                let (kind, origin) = (kind.to_owned(), origin.clone());
                next.record(Event { revision: index, kind, id, name, message, origin });
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

    fn change(&mut self, change: &Change) -> Result<(), Rejection> {
        if let Change::PutSecret { .. }
        | Change::DeleteSecret { .. }
        | Change::CreateVolume(_)
        | Change::DeleteVolume { .. } = change
        {
            self.shared_revision = self.revision;
        }
        match change {
            Change::FoundCluster(cluster) => {
                self.cluster.get_or_insert_with(|| Arc::new((**cluster).clone()));
            }
            Change::SetLock(lock) => self.change_cluster(|cluster| cluster.lock.clone_from(lock))?,
            Change::BeginRotation(new) => {
                if self.cluster.as_ref().is_some_and(|cluster| cluster.rotation.is_some()) {
                    return Err(Rejection::Conflict("the authority".to_owned()));
                }
                self.certified.clear();
                self.change_cluster(|cluster| {
                    cluster.rotation = Some(Rotation { other: new.clone(), signs: false });
                })?;
            }
            Change::RaiseSchema(schema) => self.schema = Schema(self.schema().max(*schema)),
            Change::AdvanceRotation { signs } => self.advance_rotation(*signs)?,
            Change::Certify { member, digest } => {
                if self.cluster.as_ref().is_some_and(|cluster| cluster.rotation.is_some()) {
                    self.certified.insert(member.clone(), digest.clone());
                }
            }
            Change::AdmitManager(manager) => {
                if manager.id != self.next_manager() {
                    return Err(Rejection::Conflict(format!("the id of manager {}", manager.id)));
                }
                self.next_manager = manager.id + 1;
                self.managers.insert(manager.id, Arc::new(manager.clone()));
            }
            Change::SetManager { id, voter } => {
                let known = self.managers.get(id).ok_or_else(|| Rejection::NotFound(format!("manager {id}")))?;
                let manager = Manager { voter: *voter, ..Manager::clone(known) };
                self.managers.insert(*id, Arc::new(manager));
            }
            Change::RemoveManager { id } => {
                self.managers.remove(id).ok_or_else(|| Rejection::NotFound(format!("manager {id}")))?;
            }
            Change::AdmitNode { id } => {
                if !self.is_new_node(id) {
                    return Err(Rejection::Conflict(format!("node id {id}")));
                }
                self.admitted.insert(id.clone());
            }
            Change::PutToken(token) => {
                self.keep_tokens(|known| known.expires_at > token.created_at);
                self.tokens.insert(token.hash.clone(), Arc::new(token.clone()));
            }
            Change::RevokeTokens { role } => self.keep_tokens(|token| token.role != *role),
            Change::CreateOperator(operator) => {
                if self.operator_named(&operator.name).is_some() {
                    return Err(Rejection::Exists(format!("operator {:?}", operator.name)));
                }
                self.operators.insert(operator.id.clone(), Arc::new(operator.clone()));
            }
            Change::AdmitOperator { id, hash } => {
                let invited = self
                    .operators
                    .get(id)
                    .filter(|operator| operator.invitation.as_ref().is_some_and(|invitation| invitation.hash == *hash));
                let invited = invited.ok_or_else(|| Rejection::Conflict(format!("operator {id}")))?;
                let operator = Operator { invitation: None, ..Operator::clone(invited) };
                self.operators.insert(id.clone(), Arc::new(operator));
            }
            Change::DeleteOperator { id } => {
                self.operators.remove(id).ok_or_else(|| Rejection::NotFound(format!("operator {id}")))?;
            }
            Change::PutService { service, expected } => self.put_service(service, *expected)?,
            Change::DeleteService { id, expected, ports_stay } => {
                let known = self.services.get(id).ok_or_else(|| Rejection::NotFound(format!("service {id}")))?;
                if !matches(*expected, Some(known.version)) {
                    return Err(Rejection::Conflict(format!("service {:?}", known.spec.name)));
                }
                let (name, virtual_index) = (known.spec.name.clone(), known.virtual_index);
                if !self.numbers_revisions() {
                    let ports: Vec<_> = known.spec.node_ports().filter(|_| *ports_stay).cloned().collect();
                    self.have_all_ask(id, &ports, &[], !ports.is_empty());
                }
                self.names.remove(&name);
                self.virtual_addresses.taken.remove(&virtual_index);
                self.services.remove(id);
                self.prune_revisions(id);
            }
            Change::PutSecret { secret, expected } => self.put_secret(secret, *expected)?,
            Change::DeleteSecret { id } => self.delete_secret(id)?,
            Change::CreateVolume(volume) => {
                if self.volume_names.contains_key(&volume.name) {
                    return Err(Rejection::Exists(format!("volume {:?}", volume.name)));
                }
                let mut volume = (**volume).clone();
                volume.version = self.revision;
                self.volume_names.insert(volume.name.clone(), volume.id.clone());
                self.volumes.insert(volume.id.clone(), Arc::new(volume));
            }
            Change::DeleteVolume { id, force } => self.delete_volume(id, *force)?,
            Change::PutNode(node) => {
                let mut node = (**node).clone();
                node.version = self.revision;
                node.subnet_index = match self.nodes.get(&node.id) {
                    Some(known) => {
                        // What operators say of it is not its agent's to change.
                        (node.availability, node.labels) = (known.availability, known.labels.clone());
                        known.subnet_index
                    }
                    None => {
                        let count = self.cluster.as_ref().map_or(0, |cluster| cluster.network.subnets());
                        let taken = self.subnets.take(0, count);
                        taken.ok_or_else(|| Rejection::Exhausted("subnet for another node".to_owned()))?
                    }
                };
                self.nodes.insert(node.id.clone(), Arc::new(node));
            }
            Change::SetNode { id, availability, labels } => {
                let known = self.nodes.get(id).ok_or_else(|| Rejection::NotFound(format!("node {id}")))?;
                let mut node = Node::clone(known);
                node.version = self.revision;
                node.availability = availability.unwrap_or(node.availability);
                for (name, value) in labels {
                    match value {
                        Some(value) => node.labels.insert(name.clone(), value.clone()),
                        None => node.labels.remove(name),
                    };
                }
                self.nodes.insert(id.clone(), Arc::new(node));
            }
            Change::DeleteNode { id } => {
                let node = self.nodes.remove(id);
                let was_admitted = self.admitted.remove(id).is_some();
                if node.is_none() && !was_admitted {
                    return Err(Rejection::NotFound(format!("node {id}")));
                }
                if let Some(node) = node {
                    self.subnets.taken.remove(&node.subnet_index);
                }
                self.node_revisions.remove(id);
                if was_admitted {
                    self.departed.insert(id.clone());
                }
                let containers: Vec<_> = self.containers_on(id).map(|container| container.id.clone()).collect();
                for container in containers {
                    self.delete_container(&container);
                }
            }
            Change::CreateContainer(container) => self.create_container(Container::clone(container))?,
            Change::Create { id, service, generation, slot, pinned, failures, at } => {
                let gone = || Rejection::Conflict(format!("service {service}"));
                let owner = self.services.get(service).ok_or_else(gone)?;
                if owner.generation != *generation {
                    return Err(Rejection::Conflict(format!("service {:?}", owner.spec.name)));
                }
                let container = Container {
                    id: id.clone(),
                    version: 0,
                    service: owner.id.clone(),
                    service_name: owner.spec.name.clone(),
                    slot: *slot,
                    pinned: pinned.clone(),
                    node: None,
                    created_at: *at,
                    desired: Desired::Running,
                    status: Status::new(ContainerState::New, "", *at),
                    revision: self.current_revision(owner)?,
                    failures: *failures,
                };
                self.create_container(container)?;
            }
            Change::Assign { id, node, at } => self.assign(id, node, *at),
            Change::Refuse { id, message, at } => self.update(id, |container| {
                if container.node.is_none() && !container.status.state.is_terminal() {
                    container.status = Status::new(ContainerState::Pending, message, *at);
                }
            }),
            Change::Remove { id } => self.update(id, |container| container.desired = Desired::Removed),
            Change::Observe { id, node, status } => self.update(id, |container| {
                let newer = status.state >= container.status.state && !container.status.state.is_terminal();
                // After its end only what the kernel measured may still be added.
                let adds = status.state == container.status.state;
                if container.node.as_ref() == Some(node) && (newer || adds) {
                    container.status = (**status).clone();
                }
            }),
            Change::DeleteContainer { id } => self.delete_container(id),
        }
        Ok(())
    }

    fn change_cluster(&mut self, change: impl FnOnce(&mut Cluster)) -> Result<(), Rejection> {
        let cluster = self.cluster.as_mut().ok_or_else(|| Rejection::NotFound("cluster".to_owned()))?;
        change(Arc::make_mut(cluster));
        Ok(())
    }

    fn advance_rotation(&mut self, signs: bool) -> Result<(), Rejection> {
        let is_there = |cluster: &Arc<Cluster>| cluster.rotation.as_ref().is_some_and(|known| known.signs == signs);
        if !self.cluster.as_ref().is_some_and(is_there) {
            return Err(Rejection::Conflict("the authority".to_owned()));
        }
        self.certified.clear();
        if !signs {
            // They name the old one: who joins by them would be refused.
            self.tokens.clear();
            let came = self.operators.iter().filter(|(_, operator)| operator.invitation.is_none());
            self.operators = came.map(|(id, operator)| (id.clone(), Arc::clone(operator))).collect();
        }
        self.change_cluster(|cluster| {
            let Some(rotation) = cluster.rotation.take() else { return };
            if !signs {
                let old = cluster.authority.replace(rotation.other);
                cluster.rotation = old.map(|other| Rotation { other, signs: true });
            }
        })
    }

    fn create_container(&mut self, mut container: Container) -> Result<(), Rejection> {
        // Made from a service that may be gone or changed by now: then it is not needed.
        let number = container.revision.number;
        let current = self.services.get(&container.service).filter(|service| service.generation == number);
        let current = current.and_then(|service| self.current_revision(service).ok());
        // Made by who had not seen yet that another leader did it already.
        let taken = self.live_in_slot(&container.service, container.slot, container.pinned.as_ref()).is_some();
        let Some(revision) = current.filter(|_| !taken && !self.containers.contains_key(&container.id)) else {
            return Err(Rejection::Conflict(format!("service {:?}", container.service_name)));
        };
        (container.version, container.revision) = (self.revision, revision);
        self.put_container(container);
        Ok(())
    }

    fn keep_tokens(&mut self, keep: impl Fn(&JoinToken) -> bool) {
        self.tokens =
            self.tokens.iter().filter(|(_, token)| keep(token)).map(|(k, v)| (k.clone(), v.clone())).collect();
    }

    fn put_service(&mut self, service: &Service, expected: Expected) -> Result<(), Rejection> {
        let known = self.services.get(&service.id).cloned();
        let name = &service.spec.name;
        if !matches(expected, known.as_ref().map(|known| known.version)) {
            return Err(Rejection::Conflict(format!("service {name:?}")));
        }
        if self.names.get(name).is_some_and(|owner| *owner != service.id) {
            return Err(Rejection::NameTaken(name.clone()));
        }
        // What it needed before and has lost since does not keep anything else of it from being changed.
        let before = known.as_ref().map(|known| &known.spec.container);
        for (kind, name) in needed_secrets(&service.spec.container) {
            let had = before.is_some_and(|before| needed_secrets(before).any(|needed| needed == (kind, name)));
            if !had && self.secret_named(kind, name).is_none() {
                let kind = kind_name(kind);
                return Err(Rejection::Unknown {
                    field: format!("spec.container.{kind}s"),
                    what: format!("{kind} {name:?}"),
                });
            }
        }
        for name in needed_volumes(&service.spec.container) {
            let had = before.is_some_and(|before| needed_volumes(before).any(|needed| needed == name));
            if !had && self.volume_named(name).is_none() {
                return Err(Rejection::Unknown {
                    field: "spec.container.mounts".to_owned(),
                    what: format!("volume {name:?}"),
                });
            }
        }
        if let Some((port, service)) = self.published_elsewhere(service) {
            return Err(Rejection::PortTaken { port, service });
        }
        let mut service = service.clone();
        service.version = self.revision;
        if let Some(known) = &known {
            let old = known.spec.name.clone();
            service.virtual_index = known.virtual_index;
            self.names.remove(&old);
        } else {
            let count = self.cluster.as_ref().map_or(0, |cluster| cluster.network.virtual_addresses());
            // The first and the last address of a network are not anybody's.
            let taken = self.virtual_addresses.take(1, count.saturating_sub(1));
            service.virtual_index =
                taken.ok_or_else(|| Rejection::Exhausted("virtual address for another service".to_owned()))?;
        }
        self.revise(known.as_deref(), &mut service);
        self.names.insert(service.spec.name.clone(), service.id.clone());
        let id = service.id.clone();
        self.services.insert(id.clone(), Arc::new(service));
        self.prune_revisions(&id);
        Ok(())
    }

    fn put_secret(&mut self, secret: &Secret, expected: Expected) -> Result<(), Rejection> {
        let what = format!("{} {:?}", kind_name(secret.kind), secret.name);
        let known = self.secrets.get(&secret.id);
        if !matches(expected, known.map(|known| known.version)) {
            return Err(Rejection::Conflict(what));
        }
        let key = secret_key(secret.kind, &secret.name);
        if self.secret_names.get(&key).is_some_and(|owner| *owner != secret.id) {
            return Err(Rejection::Exists(what));
        }
        let is_update = known.is_some();
        let mut secret = secret.clone();
        secret.version = self.revision;
        let (kind, name) = (secret.kind, secret.name.clone());
        self.secret_names.insert(key, secret.id.clone());
        self.secrets.insert(secret.id.clone(), Arc::new(secret));
        if is_update {
            self.renew_containers_with(kind, &name);
        }
        Ok(())
    }

    /// Services whose containers are to be replaced when this secret changes begin another generation.
    fn renew_containers_with(&mut self, kind: v1::SecretKind, name: &str) {
        let asks = |service: &&Arc<Service>| {
            let container = &service.spec.container;
            let mounts = if kind == v1::SecretKind::Config { &container.configs } else { &container.secrets };
            mounts.iter().any(|mount| mount.source == name && mount.on_update() == v1::OnUpdate::Restart)
        };
        let services: Vec<_> = self.services.values().filter(asks).cloned().collect();
        for service in services {
            let mut service = Service::clone(&service);
            service.generation += 1;
            service.version = self.revision;
            self.insert_revision(&service, self.revision);
            let id = service.id.clone();
            self.services.insert(id.clone(), Arc::new(service));
            self.prune_revisions(&id);
        }
    }

    fn delete_volume(&mut self, id: &VolumeId, force: bool) -> Result<(), Rejection> {
        let known = self.volumes.get(id).ok_or_else(|| Rejection::NotFound(format!("volume {id}")))?.clone();
        let uses = |service: &&Arc<Service>| needed_volumes(&service.spec.container).any(|name| name == known.name);
        let mut users: Vec<_> = self.services.values().filter(uses).map(|service| service.spec.name.clone()).collect();
        users.sort();
        if !users.is_empty() && !force {
            return Err(Rejection::InUse { what: format!("volume {:?}", known.name), users });
        }
        self.volume_names.remove(&known.name);
        self.volumes.remove(id);
        self.deleted_volumes.insert((self.revision, id.clone()));
        while self.deleted_volumes.len() > DELETED_VOLUMES {
            if let Some(oldest) = self.deleted_volumes.get_min().cloned() {
                self.deleted_volumes.remove(&oldest);
            }
        }
        Ok(())
    }

    fn delete_secret(&mut self, id: &SecretId) -> Result<(), Rejection> {
        let known = self.secrets.get(id).ok_or_else(|| Rejection::NotFound(format!("secret {id}")))?.clone();
        let uses = |service: &&Arc<Service>| {
            needed_secrets(&service.spec.container).any(|needed| needed == (known.kind, known.name.as_str()))
        };
        let mut users: Vec<_> = self.services.values().filter(uses).map(|service| service.spec.name.clone()).collect();
        users.sort();
        if !users.is_empty() {
            return Err(Rejection::InUse { what: format!("{} {:?}", kind_name(known.kind), known.name), users });
        }
        self.secret_names.remove(&secret_key(known.kind, &known.name));
        self.secrets.remove(id);
        Ok(())
    }

    /// A port of this service that another one publishes, where one of the two does so on every node.
    fn published_elsewhere(&self, service: &Service) -> Option<(String, String)> {
        let everywhere = |port: &v1::Port| port.publish_mode() != v1::PublishMode::Host;
        let published = |service: &Service| {
            service.spec.ports.iter().filter(|port| port.host_port != 0).cloned().collect::<Vec<_>>()
        };
        let own = published(service);
        if own.is_empty() {
            return None;
        }
        for other in self.services.values().filter(|other| other.id != service.id) {
            for theirs in published(other) {
                let clash = own.iter().find(|port| {
                    (port.host_port, protocol_name(port)) == (theirs.host_port, protocol_name(&theirs))
                        && (everywhere(port) || everywhere(&theirs))
                });
                if let Some(port) = clash {
                    return Some((format!("{}/{}", port.host_port, protocol_name(port)), other.spec.name.clone()));
                }
            }
        }
        None
    }

    /// A container that no longer waits, or a node that is gone, makes an assignment moot, not wrong.
    fn assign(&mut self, id: &ContainerId, node: &NodeId, at: Timestamp) {
        if !self.nodes.contains_key(node) {
            return;
        }
        // Of two assignments that were planned together the first decides where a volume is, and who has it.
        let Some(container) = self.containers.get(id).cloned() else { return };
        let volumes: Vec<_> = self.volumes_of(&container.revision.spec).cloned().collect();
        let elsewhere = |volume: &Arc<Volume>| volume.node.as_ref().is_some_and(|at| at != node);
        if container.node.is_none()
            && volumes.iter().any(|volume| elsewhere(volume) || (volume.exclusive && self.is_held(volume)))
        {
            return;
        }
        let waits = container.status.state < ContainerState::Assigned && container.desired == Desired::Running;
        for volume in volumes.into_iter().filter(|volume| waits && volume.is_local() && volume.node.is_none()) {
            let mut volume = Volume::clone(&volume);
            volume.node = Some(node.clone());
            volume.version = self.revision;
            self.volumes.insert(volume.id.clone(), Arc::new(volume));
            self.shared_revision = self.revision;
        }
        self.update(id, |container| {
            if container.status.state < ContainerState::Assigned && container.desired == Desired::Running {
                container.node = Some(node.clone());
                container.status = Status::new(ContainerState::Assigned, "", at);
            }
        });
    }

    fn update(&mut self, id: &ContainerId, change: impl FnOnce(&mut Container)) {
        let Some(known) = self.containers.get(id) else { return };
        let mut container = (**known).clone();
        change(&mut container);
        if container != **known {
            container.version = self.revision;
            self.put_container(container);
        }
    }
}
