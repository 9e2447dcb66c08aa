//! Containers: runs of what services want, where they are, and what is observed of them.

use std::{net::IpAddr, sync::Arc};

use serde::{Deserialize, Serialize};
use warren_proto::v1;

use super::{HISTORY, NewContainer, Record as _, Rejection, Revision, State, Volume, revisions::StoredContainer};
use crate::{
    clock::Timestamp,
    ids::{ContainerId, NodeId, ServiceId},
};

/// One run of a service's spec. A replacement is another container in the same slot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "StoredContainer", into = "StoredContainer")]
pub struct Container {
    /// Its id.
    pub id: ContainerId,
    /// The revision of its last write.
    pub version: u64,
    /// Whose it is.
    pub service: ServiceId,
    /// The service's name, which outlives the service's record here.
    pub service_name: String,
    /// Which replica, from 1; 0 for a global service.
    pub slot: u32,
    /// The only node that may run it, for a global service.
    pub pinned: Option<NodeId>,
    /// Where it is, once assigned.
    pub node: Option<NodeId>,
    /// When it was made.
    pub created_at: Timestamp,
    /// What the manager wants of it.
    pub desired: Desired,
    /// What is observed of it.
    pub status: Status,
    /// What it was made from.
    pub revision: Arc<Revision>,
    /// Failures in a row in its slot before it.
    pub failures: u32,
}

impl Container {
    /// Whether it holds its reservations: it is on a node and has not ended.
    #[must_use]
    pub fn holds_resources(&self) -> bool {
        self.node.is_some() && !self.status.state.is_terminal()
    }
}

/// What the manager wants of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Desired {
    /// To run until it ends by itself.
    Running,
    /// To be stopped and removed.
    Removed,
}

/// Where a container is in its life; only ever rises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ContainerState {
    /// Made.
    New,
    /// No node takes it yet; the message says why.
    Pending,
    /// Given to a node.
    Assigned,
    /// Its agent has it.
    Accepted,
    /// Image and snapshot are being made ready.
    Preparing,
    /// The runtime creates and starts it.
    Starting,
    /// It runs.
    Running,
    /// It exited with 0.
    Complete,
    /// It was stopped.
    Shutdown,
    /// It exited otherwise.
    Failed,
    /// It could not be run at all.
    Rejected,
}

impl ContainerState {
    /// All of them, in order.
    pub const ALL: [Self; 11] = [
        Self::New,
        Self::Pending,
        Self::Assigned,
        Self::Accepted,
        Self::Preparing,
        Self::Starting,
        Self::Running,
        Self::Complete,
        Self::Shutdown,
        Self::Failed,
        Self::Rejected,
    ];

    /// Whether it has ended.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        self >= Self::Complete
    }

    /// Whether it ended otherwise than it should.
    #[must_use]
    pub fn is_failure(self) -> bool {
        matches!(self, Self::Failed | Self::Rejected)
    }

    /// As labels and tables show it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Pending => "pending",
            Self::Assigned => "assigned",
            Self::Accepted => "accepted",
            Self::Preparing => "preparing",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Complete => "complete",
            Self::Shutdown => "shutdown",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
        }
    }
}

/// Durations of a container's operations, in nanoseconds; 0 is unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// Its create.
    pub create_ns: u64,
    /// Its start.
    pub start_ns: u64,
    /// Its stop.
    pub stop_ns: u64,
}

/// What is observed of a container. Until it is assigned the manager writes it, from then on the node's agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Where it is.
    pub state: ContainerState,
    /// Why, in words.
    pub message: String,
    /// Since when.
    pub changed_at: Timestamp,
    /// 128 + signal for a signal.
    pub exit_code: Option<i32>,
    /// When its process began.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// In the node's initial PID namespace; 0 is unknown.
    pub pid: u32,
    /// As timed in the kernel.
    pub kernel: Timing,
    /// As timed around the runtime's calls.
    pub runtime: Timing,
    /// The OOM killer took it.
    pub oom_killed: bool,
    /// Its first process had no handler for the stop signal.
    pub signal_ignored: bool,
    /// In the cluster's network.
    pub addresses: Vec<IpAddr>,
    /// What its checks say.
    pub health: v1::Health,
    /// Why it is not healthy.
    pub health_message: String,
}

impl Status {
    /// A status that says no more than this.
    #[must_use]
    pub fn new(state: ContainerState, message: impl Into<String>, at: Timestamp) -> Self {
        Self {
            state,
            message: message.into(),
            changed_at: at,
            exit_code: None,
            started_at: None,
            finished_at: None,
            pid: 0,
            kernel: Timing::default(),
            runtime: Timing::default(),
            oom_killed: false,
            signal_ignored: false,
            addresses: Vec::new(),
            health: v1::Health::Unspecified,
            health_message: String::new(),
        }
    }

    /// Whether it runs and, if it is checked, has been found to do its work.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.state == ContainerState::Running && matches!(self.health, v1::Health::Unspecified | v1::Health::Healthy)
    }
}

/// A change of a container's record.
#[derive(Clone, Debug)]
pub enum ContainerChange {
    /// It is new or different.
    Changed(Arc<Container>),
    /// Its record is gone.
    Deleted(ContainerId, ServiceId),
}

/// A service's slot; of a global service, one of each node.
pub(super) type SlotKey = (ServiceId, u32, Option<NodeId>);

fn slot_key(container: &Container) -> SlotKey {
    (container.service.clone(), container.slot, container.pinned.clone())
}

fn is_live(container: &Container) -> bool {
    container.desired == Desired::Running && !container.status.state.is_terminal()
}

fn waits(container: &Container) -> bool {
    container.status.state < ContainerState::Assigned && container.desired == Desired::Running
}

impl State {
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

    /// The container of a slot that is to run and has not ended.
    #[must_use]
    fn live_in_slot(&self, service: &ServiceId, slot: u32, pinned: Option<&NodeId>) -> Option<&ContainerId> {
        self.live.get(&(service.clone(), slot, pinned.cloned()))
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

    /// Makes a container of what its service runs, unless that is another revision by now.
    pub(super) fn create(&mut self, new: &NewContainer) -> Result<(), Rejection> {
        let NewContainer { id, service, generation, slot, pinned, failures, at } = new;
        let gone = || Rejection::Conflict(format!("service {service}"));
        let owner = self.services.get(service).ok_or_else(gone)?;
        if owner.generation != *generation {
            return Err(Rejection::Conflict(owner.label()));
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
        self.create_container(container)
    }

    pub(super) fn create_container(&mut self, mut container: Container) -> Result<(), Rejection> {
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

    /// A container that no longer waits, or a node that is gone, makes an assignment moot, not wrong.
    pub(super) fn assign(&mut self, id: &ContainerId, node: &NodeId, at: Timestamp) {
        if !self.nodes.contains(node) {
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
            self.volumes.put(volume, self.revision);
            self.shared_revision = self.revision;
        }
        self.update(id, |container| {
            if container.status.state < ContainerState::Assigned && container.desired == Desired::Running {
                container.node = Some(node.clone());
                container.status = Status::new(ContainerState::Assigned, "", at);
            }
        });
    }

    pub(super) fn refuse(&mut self, id: &ContainerId, message: &str, at: Timestamp) {
        self.update(id, |container| {
            if container.node.is_none() && !container.status.state.is_terminal() {
                container.status = Status::new(ContainerState::Pending, message, at);
            }
        });
    }

    pub(super) fn want_removed(&mut self, id: &ContainerId) {
        self.update(id, |container| container.desired = Desired::Removed);
    }

    pub(super) fn observe(&mut self, id: &ContainerId, node: &NodeId, status: &Status) {
        self.update(id, |container| {
            let newer = status.state >= container.status.state && !container.status.state.is_terminal();
            // After its end only what the kernel measured may still be added.
            let adds = status.state == container.status.state;
            if container.node.as_ref() == Some(node) && (newer || adds) {
                container.status = status.clone();
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

    pub(super) fn put_container(&mut self, container: Container) {
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

    pub(super) fn delete_container(&mut self, id: &ContainerId) {
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
}
