//! Revisions: what services' containers are made of; and how logs and snapshots of every schema hold them and containers.

use std::{collections::BTreeMap, io, sync::Arc};

use serde::{Deserialize, Serialize};
use warren_proto::v1;

use super::{
    Constraint, Container, Desired, KEPT_REVISIONS, REVISIONS, Rejection, Resources, Service, ServiceSpec, State,
    Status, kind_name, needed_secrets, node_ports,
};
use crate::{
    clock::Timestamp,
    ids::{ContainerId, NodeId, ServiceId},
};

/// What a service's containers are made of, as it was when it was written. It never changes: a container keeps the one that it was made from,
/// or one that asks no more of it, whatever becomes of its service.
#[derive(Clone, Debug)]
pub struct Revision {
    /// Whose it is.
    pub service: ServiceId,
    /// Counts them, from 1: the service's generation at the time.
    pub number: u64,
    /// The state's revision at which it was made, to find the event with its actor; 0 when not known.
    pub made_at: u64,
    /// What runs in each container.
    pub spec: Arc<v1::ContainerSpec>,
    /// What each may use.
    pub resources: Resources,
    /// Where each listens, and how that is published.
    pub ports: Vec<v1::Port>,
    /// Which nodes may run them.
    pub constraints: Vec<Constraint>,
    /// Which values the secrets and configs had that it names, by `secret/NAME` and `config/NAME`.
    pub values: BTreeMap<String, u32>,
}

impl PartialEq for Revision {
    /// Two of the same service and number are the same: it never changes.
    fn eq(&self, other: &Self) -> bool {
        (&self.service, self.number) == (&other.service, other.number)
    }
}

impl Revision {
    /// Whether it asks of containers and nodes what a service's spec does.
    fn is_as(&self, spec: &ServiceSpec) -> bool {
        (&self.spec, &self.resources, &self.ports, &self.constraints)
            == (&spec.container, &spec.resources, &spec.ports, &spec.constraints)
    }

    /// The ports that each of its containers has to itself on its node.
    pub fn node_ports(&self) -> impl Iterator<Item = &v1::Port> {
        node_ports(&self.ports)
    }
}

/// A container as logs and snapshots hold it: with the number of its revision, and in those of schemas before [`super::REVISIONS`] with what
/// the revision says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct StoredContainer {
    id: ContainerId,
    version: u64,
    service: ServiceId,
    service_name: String,
    slot: u32,
    pinned: Option<NodeId>,
    node: Option<NodeId>,
    created_at: Timestamp,
    desired: Desired,
    status: Status,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    spec: Option<Arc<v1::ContainerSpec>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    resources: Option<Resources>,
    generation: u64,
    failures: u32,
    /// Those of its node that it holds, once its service, which says so otherwise, is gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ports: Vec<v1::Port>,
}

impl StoredContainer {
    /// With the number of its revision alone.
    fn by_number(container: &Container) -> Self {
        Self {
            id: container.id.clone(),
            version: container.version,
            service: container.service.clone(),
            service_name: container.service_name.clone(),
            slot: container.slot,
            pinned: container.pinned.clone(),
            node: container.node.clone(),
            created_at: container.created_at,
            desired: container.desired,
            status: container.status.clone(),
            spec: None,
            resources: None,
            generation: container.revision.number,
            failures: container.failures,
            ports: Vec::new(),
        }
    }

    /// With all that its revision says, as schemas before revisions have it. `is_orphan` says whether its service is gone.
    fn whole(container: &Container, is_orphan: bool) -> Self {
        let revision = &container.revision;
        let ports = if is_orphan { revision.node_ports().cloned().collect() } else { Vec::new() };
        let (spec, resources) = (Some(Arc::clone(&revision.spec)), Some(revision.resources));
        Self { spec, resources, ports, ..Self::by_number(container) }
    }

    /// The revision that it tells of itself.
    fn own_revision(&self) -> Revision {
        Revision {
            service: self.service.clone(),
            number: self.generation,
            made_at: 0,
            spec: self.spec.clone().unwrap_or_default(),
            resources: self.resources.unwrap_or_default(),
            ports: self.ports.clone(),
            constraints: Vec::new(),
            values: BTreeMap::new(),
        }
    }

    /// The container, with its revision.
    pub(super) fn with(self, revision: Arc<Revision>) -> Container {
        Container {
            id: self.id,
            version: self.version,
            service: self.service,
            service_name: self.service_name,
            slot: self.slot,
            pinned: self.pinned,
            node: self.node,
            created_at: self.created_at,
            desired: self.desired,
            status: self.status,
            revision,
            failures: self.failures,
        }
    }
}

impl From<StoredContainer> for Container {
    fn from(stored: StoredContainer) -> Self {
        let revision = Arc::new(stored.own_revision());
        stored.with(revision)
    }
}

impl From<Container> for StoredContainer {
    fn from(container: Container) -> Self {
        Self::whole(&container, false)
    }
}

/// A revision as snapshots hold it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct StoredRevision {
    pub(super) service: ServiceId,
    pub(super) number: u64,
    made_at: u64,
    /// Not there where it is the service's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    spec: Option<Arc<v1::ContainerSpec>>,
    resources: Resources,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ports: Vec<v1::Port>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    constraints: Vec<Constraint>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    values: BTreeMap<String, u32>,
}

impl StoredRevision {
    fn new(revision: &Revision, service: Option<&Service>) -> Self {
        let is_services = service.is_some_and(|service| service.spec.container == revision.spec);
        Self {
            service: revision.service.clone(),
            number: revision.number,
            made_at: revision.made_at,
            spec: (!is_services).then(|| Arc::clone(&revision.spec)),
            resources: revision.resources,
            ports: revision.ports.clone(),
            constraints: revision.constraints.clone(),
            values: revision.values.clone(),
        }
    }

    pub(super) fn with(self, service: Option<&Service>) -> Revision {
        let of_service = || service.map(|service| Arc::clone(&service.spec.container));
        Revision {
            service: self.service,
            number: self.number,
            made_at: self.made_at,
            spec: self.spec.or_else(of_service).unwrap_or_default(),
            resources: self.resources,
            ports: self.ports,
            constraints: self.constraints,
            values: self.values,
        }
    }
}

impl State {
    /// A service's revisions, as far as they are kept, the oldest first.
    pub fn revisions_of<'a>(&'a self, service: &'a ServiceId) -> impl DoubleEndedIterator<Item = &'a Arc<Revision>> {
        self.revisions.range((service.clone(), 0)..=(service.clone(), u64::MAX)).map(|(_, revision)| revision)
    }

    /// Whether revisions are in snapshots. In those of earlier schemas each container has its own spec and resources, and what ports and
    /// constraints it has is its service's to say: no manager may know more of them than its snapshots do.
    pub(super) fn numbers_revisions(&self) -> bool {
        self.schema() >= REVISIONS
    }

    pub(super) fn stored_revisions(&self) -> Vec<StoredRevision> {
        if !self.numbers_revisions() {
            return Vec::new();
        }
        let service = |revision: &Revision| self.services.get(&revision.service).map(Arc::as_ref);
        self.revisions.values().map(|revision| StoredRevision::new(revision, service(revision))).collect()
    }

    pub(super) fn stored_containers(&self) -> Vec<StoredContainer> {
        let by_number = self.numbers_revisions();
        let stored = |container: &Arc<Container>| {
            if by_number {
                StoredContainer::by_number(container)
            } else {
                StoredContainer::whole(container, !self.services.contains(&container.service))
            }
        };
        self.containers.values().map(stored).collect()
    }

    /// The revision of a container that a snapshot holds.
    pub(super) fn restored_revision(&mut self, container: &StoredContainer) -> io::Result<Arc<Revision>> {
        let key = (container.service.clone(), container.generation);
        if let Some(known) = self.revisions.get(&key) {
            return Ok(Arc::clone(known));
        }
        if container.spec.is_none() {
            let why = format!("container {} has no revision {}", container.id, container.generation);
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        let mut revision = container.own_revision();
        // What it did not say was its service's.
        if let Some(service) = self.services.get(&container.service) {
            (revision.ports, revision.constraints) = (service.spec.ports.clone(), service.spec.constraints.clone());
        }
        let revision = Arc::new(revision);
        self.revisions.insert(key, Arc::clone(&revision));
        Ok(revision)
    }

    /// Makes a service's revision as it is now, unless there is one of its number.
    pub(super) fn insert_revision(&mut self, service: &Service, made_at: u64) -> Arc<Revision> {
        let key = (service.id.clone(), service.generation);
        if let Some(known) = self.revisions.get(&key) {
            return Arc::clone(known);
        }
        let spec = &service.spec;
        let numbers = self.numbers_revisions();
        let values = needed_secrets(&spec.container).filter(|_| numbers).filter_map(|(kind, name)| {
            let secret = self.secret_named(kind, name)?;
            Some((format!("{}/{name}", kind_name(kind)), secret.sequence))
        });
        let revision = Arc::new(Revision {
            service: service.id.clone(),
            number: service.generation,
            made_at: if numbers { made_at } else { 0 },
            spec: Arc::clone(&spec.container),
            resources: spec.resources,
            ports: spec.ports.clone(),
            constraints: spec.constraints.clone(),
            values: values.collect(),
        });
        self.revisions.insert(key, Arc::clone(&revision));
        revision
    }

    /// Forgets what is neither among a service's latest revisions nor any container's.
    pub(super) fn prune_revisions(&mut self, service: &ServiceId) {
        let keep = match self.services.contains(service) {
            true if self.numbers_revisions() => KEPT_REVISIONS,
            true => 1,
            false => 0,
        };
        let numbers: Vec<_> = self.revisions_of(service).map(|revision| revision.number).collect();
        for number in numbers.iter().rev().skip(keep) {
            let key = (service.clone(), *number);
            if !self.users.contains_key(&key) {
                self.revisions.remove(&key);
            }
        }
    }

    pub(super) fn count_user(&mut self, revision: &Revision, more: bool) {
        let key = (revision.service.clone(), revision.number);
        let count = self.users.get(&key).copied().unwrap_or(0);
        let count = if more { count + 1 } else { count.saturating_sub(1) };
        if count == 0 {
            self.users.remove(&key);
            self.prune_revisions(&key.0);
        } else {
            self.users.insert(key, count);
        }
    }

    /// Has all containers of a service ask for these, whatever their revision: in words of earlier versions they have none of their own.
    /// `is_noted` says whether that is a change of those that are on nodes.
    pub(super) fn have_all_ask(
        &mut self,
        service: &ServiceId,
        ports: &[v1::Port],
        constraints: &[Constraint],
        is_noted: bool,
    ) {
        let revisions: Vec<_> = self.revisions_of(service).cloned().collect();
        for revision in revisions {
            let (ports, constraints) = (ports.to_vec(), constraints.to_vec());
            let key = (service.clone(), revision.number);
            let asks = Arc::new(Revision { ports, constraints, ..Revision::clone(&revision) });
            self.revisions.insert(key, Arc::clone(&asks));
            let users: Vec<_> = self.containers_of(service).filter(|user| user.revision == revision).cloned().collect();
            for user in users {
                let version = if is_noted && user.holds_resources() { self.revision } else { user.version };
                let revision = Arc::clone(&asks);
                self.put_container(Container { version, revision, ..Arc::unwrap_or_clone(user) });
            }
        }
    }

    pub(super) fn current_revision(&self, service: &Service) -> Result<Arc<Revision>, Rejection> {
        let found = self.revisions.get(&(service.id.clone(), service.generation)).cloned();
        found.ok_or_else(|| Rejection::Conflict(format!("service {:?}", service.spec.name)))
    }

    /// Makes the revision of a service that is being written. What asks nothing else of containers themselves, another published port for one,
    /// is the revision of those that run as well: they are not replaced for it.
    pub(super) fn revise(&mut self, known: Option<&Service>, service: &mut Service) {
        if !self.numbers_revisions() {
            self.insert_revision(service, self.revision);
            let (ports, constraints) = (&service.spec.ports, &service.spec.constraints);
            if known.is_some_and(|known| (&known.spec.ports, &known.spec.constraints) != (ports, constraints)) {
                self.have_all_ask(&service.id, ports, constraints, false);
            }
            return;
        }
        let same = known.filter(|known| known.generation == service.generation);
        let before = same.and_then(|known| self.revisions.get(&(known.id.clone(), known.generation)).cloned());
        if before.as_ref().is_some_and(|before| before.is_as(&service.spec)) {
            return;
        }
        service.generation += u64::from(before.is_some());
        let revision = self.insert_revision(service, self.revision);
        let runs = |user: &&Arc<Container>| before.as_ref().is_some_and(|before| user.revision == *before);
        let users: Vec<_> = self.containers_of(&service.id).filter(runs).cloned().collect();
        for user in users {
            let (version, revision) = (self.revision, Arc::clone(&revision));
            self.put_container(Container { revision, version, ..Arc::unwrap_or_clone(user) });
        }
    }
}
