//! The cluster's state: typed tables, and transactions that change them.
//!
//! A pure function of the log: no clock, no randomness, no effects. Ids and times come in the transactions. The tables are
//! persistent maps, so a copy of the whole state costs a few pointers: readers and planners work on copies while newer
//! transactions are applied.

mod containers;
mod events;
mod machine;
mod network;
mod objects;
mod transaction;

#[cfg(test)]
pub(crate) mod tests;

pub use containers::{Container, Revision};
use containers::{StoredContainer, StoredRevision};
pub use events::{Actor, Event, Origin};
pub use machine::{Machine, encode};
use network::Numbers;
pub use network::{ClusterNetwork, InvalidNetwork, NetworkV6};
pub use objects::{
    AGENT_LABELS, Amounts, Availability, Cluster, Constraint, ContainerState, Description, Desired, Invitation,
    JoinToken, Manager, Mode, Node, Operator, Probes, Resources, RestartCondition, RestartPolicy, Rotation, Sealed,
    SealedAuthority, Secret, Service, ServiceSpec, Status, Timing, TokenRole, Trait, Volume,
};
pub use transaction::{Change, Expected, Rejection, Reply, Transaction};
pub(crate) use transaction::{kind_name, protocol_name};

use std::{io, net::IpAddr, sync::Arc};

use imbl::{OrdMap, OrdSet, Vector};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use warren_proto::v1;

use crate::{
    clock::Timestamp,
    ids::{ContainerId, NodeId, OperatorId, SecretId, ServiceId, VolumeId},
};

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

/// A change of a container's record.
#[derive(Clone, Debug)]
pub enum ContainerChange {
    /// It is new or different.
    Changed(Arc<Container>),
    /// Its record is gone.
    Deleted(ContainerId, ServiceId),
}

/// A service's slot; of a global service, one of each node.
type SlotKey = (ServiceId, u32, Option<NodeId>);

fn slot_key(container: &Container) -> SlotKey {
    (container.service.clone(), container.slot, container.pinned.clone())
}

fn is_live(container: &Container) -> bool {
    container.desired == Desired::Running && !container.status.state.is_terminal()
}

fn waits(container: &Container) -> bool {
    container.status.state < ContainerState::Assigned && container.desired == Desired::Running
}

/// Secrets and configs have names of their own each.
fn secret_key(kind: v1::SecretKind, name: &str) -> (bool, String) {
    (kind == v1::SecretKind::Config, name.to_owned())
}

/// The volumes that a container needs, by name.
pub(crate) fn needed_volumes(spec: &v1::ContainerSpec) -> impl Iterator<Item = &str> {
    let volumes = spec.mounts.iter().filter(|mount| mount.r#type() == v1::MountType::Volume);
    volumes.map(|mount| mount.source.as_str())
}

/// The secrets and configs that a container needs, by kind and name.
pub(crate) fn needed_secrets(spec: &v1::ContainerSpec) -> impl Iterator<Item = (v1::SecretKind, &str)> {
    let secrets = spec.secrets.iter().map(|mount| (v1::SecretKind::Secret, mount.source.as_str()));
    let configs = spec.configs.iter().map(|mount| (v1::SecretKind::Config, mount.source.as_str()));
    let registry = Some((v1::SecretKind::Secret, spec.registry_secret.as_str())).filter(|(_, name)| !name.is_empty());
    secrets.chain(configs).chain(registry)
}

/// Everything the cluster agrees on.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// What its log and snapshots are written in; none of the members is too old to read it.
    schema: Schema,
    revision: u64,
    cluster: Option<Arc<Cluster>>,
    services: OrdMap<ServiceId, Arc<Service>>,
    nodes: OrdMap<NodeId, Arc<Node>>,
    /// What services' containers are made of: the latest of each service, and those that containers have.
    revisions: OrdMap<(ServiceId, u64), Arc<Revision>>,
    containers: OrdMap<ContainerId, Arc<Container>>,
    secrets: OrdMap<SecretId, Arc<Secret>>,
    volumes: OrdMap<VolumeId, Arc<Volume>>,
    /// The latest that were deleted, by the revision that did it: their nodes have data to remove.
    deleted_volumes: OrdSet<(u64, VolumeId)>,
    managers: OrdMap<u64, Arc<Manager>>,
    /// No manager ever had this id or a higher one.
    next_manager: u64,
    tokens: OrdMap<String, Arc<JoinToken>>,
    operators: OrdMap<OperatorId, Arc<Operator>>,
    /// While the authority changes: which authorities each member is known to believe, by their digest.
    certified: OrdMap<String, String>,
    /// Nodes that were let in with a token; and those that were removed, whose ids nobody gets again.
    admitted: OrdSet<NodeId>,
    departed: OrdSet<NodeId>,
    /// Request ids by the revision of their reply, and their replies.
    requests: OrdMap<u64, String>,
    replies: OrdMap<String, Reply>,
    /// The latest changes that somebody made.
    events: Vector<Arc<Event>>,
    /// Numbers of nodes' subnets and of services' virtual addresses; which are taken is derived.
    subnets: Numbers,
    virtual_addresses: Numbers,
    // What follows is derived, or forgotten at a restart.
    names: OrdMap<String, ServiceId>,
    secret_names: OrdMap<(bool, String), SecretId>,
    volume_names: OrdMap<String, VolumeId>,
    by_service: OrdSet<(ServiceId, ContainerId)>,
    by_node: OrdSet<(NodeId, ContainerId)>,
    /// How many containers have a revision.
    users: OrdMap<(ServiceId, u64), usize>,
    /// The container of each slot that is to run and has not ended.
    live: OrdMap<SlotKey, ContainerId>,
    /// Containers that are to run and that no node has yet.
    waiting: OrdSet<ContainerId>,
    /// When what a node has last changed; and what nodes share, as secrets.
    node_revisions: OrdMap<NodeId, u64>,
    shared_revision: u64,
    history: Vector<(u64, ContainerChange)>,
    /// Changes up to here are not in the history.
    forgotten: u64,
}

/// A schema's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Schema(u32);

impl Default for Schema {
    fn default() -> Self {
        Self(OLDEST_WRITTEN_SCHEMA)
    }
}

#[derive(Deserialize)]
struct OfSchema {
    schema: u32,
}

/// The state as a snapshot holds it.
#[derive(Serialize, Deserialize)]
struct Stored {
    /// Of this layout.
    schema: u32,
    revision: u64,
    cluster: Option<Arc<Cluster>>,
    services: Vec<Arc<Service>>,
    nodes: Vec<Arc<Node>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    revisions: Vec<StoredRevision>,
    containers: Vec<StoredContainer>,
    secrets: Vec<Arc<Secret>>,
    volumes: Vec<Arc<Volume>>,
    deleted_volumes: OrdSet<(u64, VolumeId)>,
    managers: Vec<Arc<Manager>>,
    next_manager: u64,
    tokens: Vec<Arc<JoinToken>>,
    admitted: OrdSet<NodeId>,
    departed: OrdSet<NodeId>,
    requests: OrdMap<u64, String>,
    replies: OrdMap<String, Reply>,
    next_subnet: u32,
    next_virtual_address: u32,
    #[serde(default)]
    events: Vec<Arc<Event>>,
    #[serde(default)]
    certified: OrdMap<String, String>,
    #[serde(default)]
    operators: Vec<Arc<Operator>>,
}

/// The newest layout of states and transactions.
pub const SCHEMA: u32 = 7;
/// The first in which a secret can be an environment variable.
pub(crate) const SECRETS_IN_ENV: u32 = 7;
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

    /// The cluster's identity, once it has one.
    #[must_use]
    pub fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_deref()
    }

    /// Containers' addresses on a node, as prefixes, one of each family.
    #[must_use]
    pub fn subnets_of(&self, node: &Node) -> Vec<IpNet> {
        self.cluster().map(|cluster| cluster.network.node_subnets(node.subnet_index)).unwrap_or_default()
    }

    /// Where a service answers whatever becomes of its containers, one of each family.
    #[must_use]
    pub fn virtual_addresses_of(&self, service: &Service) -> Vec<IpAddr> {
        self.cluster().map(|cluster| cluster.network.service_addresses(service.virtual_index)).unwrap_or_default()
    }

    /// All services, by id.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// A service by id.
    #[must_use]
    pub fn service(&self, id: &ServiceId) -> Option<&Arc<Service>> {
        self.services.get(id)
    }

    /// A service by name.
    #[must_use]
    pub fn service_named(&self, name: &str) -> Option<&Arc<Service>> {
        self.services.get(self.names.get(name)?)
    }

    /// All secrets and configs, by id.
    pub fn secrets(&self) -> impl Iterator<Item = &Arc<Secret>> {
        self.secrets.values()
    }

    /// A secret or config by id.
    #[must_use]
    pub fn secret(&self, id: &SecretId) -> Option<&Arc<Secret>> {
        self.secrets.get(id)
    }

    /// A secret or config by name.
    #[must_use]
    pub fn secret_named(&self, kind: v1::SecretKind, name: &str) -> Option<&Arc<Secret>> {
        self.secrets.get(self.secret_names.get(&secret_key(kind, name))?)
    }

    /// All volumes, by id.
    pub fn volumes(&self) -> impl Iterator<Item = &Arc<Volume>> {
        self.volumes.values()
    }

    /// A volume by name.
    #[must_use]
    pub fn volume_named(&self, name: &str) -> Option<&Arc<Volume>> {
        self.volumes.get(self.volume_names.get(name)?)
    }

    /// Volumes that were deleted after a revision, as far back as they are remembered.
    pub fn volumes_deleted_since(&self, revision: u64) -> impl Iterator<Item = &VolumeId> {
        self.deleted_volumes.iter().filter(move |(at, _)| *at > revision).map(|(_, id)| id)
    }

    /// The volumes that a container's spec names, as far as there are such.
    pub fn volumes_of<'a>(&'a self, spec: &'a v1::ContainerSpec) -> impl Iterator<Item = &'a Arc<Volume>> {
        needed_volumes(spec).filter_map(|name| self.volume_named(name))
    }

    /// Whether a container that is on a node and has not ended uses a volume.
    #[must_use]
    pub fn is_held(&self, volume: &Volume) -> bool {
        let uses = |container: &&Arc<Container>| {
            container.holds_resources() && needed_volumes(&container.revision.spec).any(|name| name == volume.name)
        };
        self.containers.values().any(|container| uses(&container))
    }

    /// All managers, by id.
    pub fn managers(&self) -> impl Iterator<Item = &Arc<Manager>> {
        self.managers.values()
    }

    /// A manager by id.
    #[must_use]
    pub fn manager(&self, id: u64) -> Option<&Arc<Manager>> {
        self.managers.get(&id)
    }

    /// The id of the next manager.
    #[must_use]
    pub fn next_manager(&self) -> u64 {
        self.next_manager.max(1)
    }

    /// All join tokens, by hash.
    pub fn tokens(&self) -> impl Iterator<Item = &Arc<JoinToken>> {
        self.tokens.values()
    }

    /// A join token by hash.
    #[must_use]
    pub fn token(&self, hash: &str) -> Option<&Arc<JoinToken>> {
        self.tokens.get(hash)
    }

    /// All operators that have a certificate or may get one, by id.
    pub fn operators(&self) -> impl Iterator<Item = &Arc<Operator>> {
        self.operators.values()
    }

    /// An operator by id.
    #[must_use]
    pub fn operator(&self, id: &OperatorId) -> Option<&Arc<Operator>> {
        self.operators.get(id)
    }

    /// An operator by name.
    #[must_use]
    pub fn operator_named(&self, name: &str) -> Option<&Arc<Operator>> {
        self.operators.values().find(|operator| operator.name == name)
    }

    /// The operator whom an unused token invites, by its hash, while it is valid.
    #[must_use]
    pub fn invited(&self, hash: &str, now: Timestamp) -> Option<&Arc<Operator>> {
        self.operators.values().find(|operator| {
            let invitation = operator.invitation.as_ref();
            invitation.is_some_and(|invitation| invitation.hash == hash && invitation.expires_at > now)
        })
    }

    /// The members of the cluster that have certificates, like `manager 2`, `node x` and `operator y`, which are not known to believe
    /// the authorities of this digest.
    pub fn uncertified<'a>(&'a self, digest: &'a str) -> impl Iterator<Item = String> + 'a {
        let managers = self.managers.keys().map(|id| format!("manager {id}"));
        let nodes = self.admitted.iter().map(|id| format!("node {id}"));
        let operators = self.operators.values().filter(|operator| operator.invitation.is_none());
        let operators = operators.map(|operator| format!("operator {}", operator.id));
        managers
            .chain(nodes)
            .chain(operators)
            .filter(move |member| self.certified.get(member).is_none_or(|known| known != digest))
    }

    /// Whether a node was let in with a token, and not removed since.
    #[must_use]
    pub fn is_admitted(&self, node: &NodeId) -> bool {
        self.admitted.contains(node)
    }

    /// Nodes that were let in and whose agents never came.
    pub fn awaited_nodes(&self) -> impl Iterator<Item = &NodeId> {
        self.admitted.iter().filter(|id| !self.nodes.contains_key(*id))
    }

    /// Whether nobody can have joined or left between another state and this one. It says no where members were only changed, but
    /// costs nothing.
    pub(crate) fn has_members_of(&self, other: &Self) -> bool {
        self.cluster.is_some() == other.cluster.is_some()
            && self.managers.ptr_eq(&other.managers)
            && self.admitted.ptr_eq(&other.admitted)
            && self.operators.ptr_eq(&other.operators)
    }

    /// Whether nobody has had this node id.
    #[must_use]
    pub fn is_new_node(&self, node: &NodeId) -> bool {
        !self.nodes.contains_key(node) && !self.admitted.contains(node) && !self.departed.contains(node)
    }

    /// The latest changes that somebody made, oldest first.
    pub fn events(&self) -> impl DoubleEndedIterator<Item = &Arc<Event>> {
        self.events.iter()
    }

    /// The container of a slot that is to run and has not ended.
    #[must_use]
    fn live_in_slot(&self, service: &ServiceId, slot: u32, pinned: Option<&NodeId>) -> Option<&ContainerId> {
        self.live.get(&(service.clone(), slot, pinned.cloned()))
    }

    /// All nodes, by id.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    /// A node by id.
    #[must_use]
    pub fn node(&self, id: &NodeId) -> Option<&Arc<Node>> {
        self.nodes.get(id)
    }

    /// When anything last changed that a node is told of what it is to run.
    #[must_use]
    pub fn assignments_revision(&self, node: &NodeId) -> u64 {
        self.node_revisions.get(node).copied().unwrap_or(0).max(self.shared_revision)
    }

    /// All containers, by id.
    pub fn containers(&self) -> impl Iterator<Item = &Arc<Container>> {
        self.containers.values()
    }

    /// A container by id.
    #[must_use]
    pub fn container(&self, id: &ContainerId) -> Option<&Arc<Container>> {
        self.containers.get(id)
    }

    /// Containers that are to run and that no node has yet.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = &Arc<Container>> {
        self.waiting.iter().map(|id| &self.containers[id])
    }

    /// A service's containers.
    pub fn containers_of<'a>(&'a self, service: &'a ServiceId) -> impl Iterator<Item = &'a Arc<Container>> {
        let first = (service.clone(), ContainerId::from(""));
        let ids = self.by_service.range(first..).take_while(move |(owner, _)| owner == service);
        ids.filter_map(|(_, id)| self.containers.get(id))
    }

    /// A node's containers.
    pub fn containers_on<'a>(&'a self, node: &'a NodeId) -> impl Iterator<Item = &'a Arc<Container>> {
        let first = (node.clone(), ContainerId::from(""));
        let ids = self.by_node.range(first..).take_while(move |(owner, _)| owner == node);
        ids.filter_map(|(_, id)| self.containers.get(id))
    }

    /// Changes of containers after `revision`; `None` when some of them are forgotten.
    #[must_use]
    pub fn changes_since(&self, revision: u64) -> Option<impl Iterator<Item = &(u64, ContainerChange)>> {
        if revision < self.forgotten {
            return None;
        }
        // Watchers are close behind: look from the end.
        let newer = self.history.iter().rev().take_while(|(at, _)| *at > revision).count();
        Some(self.history.iter().skip(self.history.len() - newer))
    }

    fn remember(&mut self, change: ContainerChange) {
        self.history.push_back((self.revision, change));
        while self.history.len() > HISTORY {
            if let Some((revision, _)) = self.history.pop_front() {
                self.forgotten = revision;
            }
        }
    }

    fn put_container(&mut self, container: Container) {
        let id = container.id.clone();
        let before = self.containers.get(&id).map(|old| Arc::clone(&old.revision));
        if before.as_ref() != Some(&container.revision) {
            self.count_user(&container.revision, true);
            if let Some(before) = before {
                self.count_user(&before, false);
            }
        }
        if let Some(old) = self.containers.get(&id)
            && let Some(node) = &old.node
            && container.node.as_ref() != Some(node)
        {
            self.by_node.remove(&(node.clone(), id.clone()));
            self.node_revisions.insert(node.clone(), self.revision);
        }
        if let Some(node) = &container.node {
            self.by_node.insert((node.clone(), id.clone()));
            self.node_revisions.insert(node.clone(), self.revision);
        }
        self.by_service.insert((container.service.clone(), id.clone()));
        let key = slot_key(&container);
        if is_live(&container) {
            self.live.insert(key, id.clone());
        } else if self.live.get(&key) == Some(&id) {
            self.live.remove(&key);
        }
        if waits(&container) {
            self.waiting.insert(id.clone());
        } else {
            self.waiting.remove(&id);
        }
        let container = Arc::new(container);
        self.containers.insert(id, Arc::clone(&container));
        self.remember(ContainerChange::Changed(container));
    }

    fn delete_container(&mut self, id: &ContainerId) {
        let Some(container) = self.containers.remove(id) else { return };
        if let Some(node) = &container.node {
            self.by_node.remove(&(node.clone(), id.clone()));
            self.node_revisions.insert(node.clone(), self.revision);
        }
        self.by_service.remove(&(container.service.clone(), id.clone()));
        let key = slot_key(&container);
        if self.live.get(&key) == Some(id) {
            self.live.remove(&key);
        }
        self.waiting.remove(id);
        self.count_user(&container.revision, false);
        self.remember(ContainerChange::Deleted(id.clone(), container.service.clone()));
    }

    /// Has nobody join any more with a token that there is, and no operator come any more.
    pub(crate) fn forget_whom_it_let_in(&mut self) {
        self.tokens.clear();
        self.operators.clear();
    }

    /// Adds to the history of changes, of which the latest are kept.
    pub(crate) fn record(&mut self, event: Event) {
        self.events.push_back(Arc::new(event));
        while self.events.len() > EVENTS {
            self.events.pop_front();
        }
    }

    /// Has the next managers' numbers be no manager's.
    pub(crate) fn skip_managers(&mut self, count: u64) {
        self.next_manager = self.next_manager() + count;
    }

    /// The state as bytes: the same bytes for the same state, on every manager.
    ///
    /// # Errors
    ///
    /// Never for a state that transactions made.
    pub fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let stored = Stored {
            schema: self.schema(),
            revision: self.revision,
            cluster: self.cluster.clone(),
            services: self.services.values().cloned().collect(),
            nodes: self.nodes.values().cloned().collect(),
            revisions: self.stored_revisions(),
            containers: self.stored_containers(),
            secrets: self.secrets.values().cloned().collect(),
            volumes: self.volumes.values().cloned().collect(),
            deleted_volumes: self.deleted_volumes.clone(),
            managers: self.managers.values().cloned().collect(),
            next_manager: self.next_manager,
            tokens: self.tokens.values().cloned().collect(),
            admitted: self.admitted.clone(),
            departed: self.departed.clone(),
            requests: self.requests.clone(),
            replies: self.replies.clone(),
            next_subnet: self.subnets.next,
            next_virtual_address: self.virtual_addresses.next,
            events: self.events.iter().cloned().collect(),
            certified: self.certified.clone(),
            operators: self.operators.values().cloned().collect(),
        };
        serde_json::to_vec(&stored).map_err(io::Error::other)
    }

    /// The state of these bytes.
    ///
    /// # Errors
    ///
    /// When they are of another schema or damaged.
    pub fn from_bytes(bytes: &[u8]) -> io::Result<Self> {
        Self::of_schema(bytes, SCHEMA)
    }

    /// The state of these bytes, if it is of this schema or an earlier one.
    fn of_schema(bytes: &[u8], newest: u32) -> io::Result<Self> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        // First of all: what another version wrote may have another shape.
        let OfSchema { schema } = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        if !(OLDEST_SCHEMA..=newest).contains(&schema) {
            let known = format!("this manager reads {OLDEST_SCHEMA} to {newest}");
            return Err(invalid(format!("the state is of schema {schema}, {known}")));
        }
        let stored: Stored = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        let mut state = Self {
            schema: Schema(schema.max(OLDEST_WRITTEN_SCHEMA)),
            revision: stored.revision,
            cluster: stored.cluster,
            requests: stored.requests,
            replies: stored.replies,
            deleted_volumes: stored.deleted_volumes,
            managers: stored.managers.into_iter().map(|manager| (manager.id, manager)).collect(),
            next_manager: stored.next_manager,
            tokens: stored.tokens.into_iter().map(|token| (token.hash.clone(), token)).collect(),
            admitted: stored.admitted,
            departed: stored.departed,
            events: stored.events.into(),
            certified: stored.certified,
            operators: stored.operators.into_iter().map(|operator| (operator.id.clone(), operator)).collect(),
            subnets: Numbers { next: stored.next_subnet, ..Numbers::default() },
            virtual_addresses: Numbers { next: stored.next_virtual_address, ..Numbers::default() },
            ..Self::default()
        };
        for service in stored.services {
            state.names.insert(service.spec.name.clone(), service.id.clone());
            state.virtual_addresses.taken.insert(service.virtual_index);
            state.services.insert(service.id.clone(), service);
        }
        for node in stored.nodes {
            state.subnets.taken.insert(node.subnet_index);
            state.nodes.insert(node.id.clone(), node);
        }
        for volume in stored.volumes {
            state.volume_names.insert(volume.name.clone(), volume.id.clone());
            state.volumes.insert(volume.id.clone(), volume);
        }
        for secret in stored.secrets {
            state.secret_names.insert(secret_key(secret.kind, &secret.name), secret.id.clone());
            state.secrets.insert(secret.id.clone(), secret);
        }
        for revision in stored.revisions {
            let service = state.services.get(&revision.service);
            let key = (revision.service.clone(), revision.number);
            let revision = Arc::new(revision.with(service.map(Arc::as_ref)));
            state.revisions.insert(key, revision);
        }
        // Those that a snapshot from before revisions tells of, as far as it does.
        for service in state.services.clone().values() {
            state.insert_revision(service, 0);
        }
        for container in stored.containers {
            let revision = state.restored_revision(&container)?;
            state.put_container(container.with(revision));
        }
        state.shared_revision = state.revision;
        state.history.clear();
        state.forgotten = state.revision;
        Ok(state)
    }
}
