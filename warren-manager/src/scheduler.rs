//! Placement: which node a waiting container goes to. A pure function of the state and of who is alive.
//!
//! Nodes that cannot take a container are filtered out, each with its reason; of the others the one with the fewest
//! containers of the same service wins, then the one with the smallest share of its resources reserved, then the one with
//! the fewest containers. Equals are taken in the order of their ids, so that the same state always gives the same plan.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use warren_proto::v1;

use crate::{
    ids::{ContainerId, NodeId, ServiceId, VolumeId},
    liveness::Health,
    state::{Amounts, Container, ContainerState, Desired, State, Volume, protocol_name},
};

#[cfg(test)]
mod tests;

/// Why a node does not take a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// It is not heard of.
    Down,
    /// Too little CPU is left.
    Cpu,
    /// Too little memory is left.
    Memory,
    /// Its containers' network has no address left.
    Addresses,
    /// Another container there has the host port.
    Port,
    /// A volume's data is on another node.
    Volume,
    /// Another container has a volume for itself.
    VolumeHeld,
    /// The container is for another node.
    Pinned,
}

/// Containers that a node has addresses for: a /24, less its first and last address and the node's own.
const ADDRESSES: u32 = 253;

impl Refusal {
    /// As a label shows it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Addresses => "addresses",
            Self::Port => "port",
            Self::Volume => "volume",
            Self::VolumeHeld => "volume_held",
            Self::Pinned => "pinned",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Down => "not heard of",
            Self::Cpu => "not enough CPU left",
            Self::Memory => "not enough memory left",
            Self::Addresses => "no container address left",
            Self::Port => "a host port is taken",
            Self::Volume => "a volume is on another node",
            Self::VolumeHeld => "a volume is another container's",
            Self::Pinned => "meant for another",
        }
    }
}

/// What a round of scheduling decided.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Which container goes to which node.
    pub assignments: Vec<(ContainerId, NodeId)>,
    /// Which container nobody takes, why in words, and the commonest reason if there are nodes at all.
    pub refusals: Vec<(ContainerId, String, Option<Refusal>)>,
}

/// A node as the round fills it.
#[derive(Debug)]
struct Candidate {
    id: NodeId,
    alive: bool,
    capacity: Amounts,
    reserved: Amounts,
    containers: u32,
    /// Containers with an address of their own.
    addresses: u32,
    /// Ports that its containers have on it.
    ports: BTreeSet<(u32, &'static str)>,
    by_service: BTreeMap<ServiceId, u32>,
}

impl Candidate {
    fn refuses(
        &self,
        container: &Container,
        ports: &[(u32, &'static str)],
        volumes: &[Arc<Volume>],
        claims: &Claims,
    ) -> Option<Refusal> {
        let wanted = container.resources.reservations;
        if container.pinned.as_ref().is_some_and(|pinned| *pinned != self.id) {
            Some(Refusal::Pinned)
        } else if !self.alive {
            Some(Refusal::Down)
        } else if self.reserved.memory_bytes + wanted.memory_bytes > self.capacity.memory_bytes {
            Some(Refusal::Memory)
        } else if self.reserved.cpu_millis + wanted.cpu_millis > self.capacity.cpu_millis {
            Some(Refusal::Cpu)
        } else if has_address(container) && self.addresses >= ADDRESSES {
            Some(Refusal::Addresses)
        } else if ports.iter().any(|port| self.ports.contains(port)) {
            Some(Refusal::Port)
        } else if volumes.iter().any(|volume| claims.place(volume).is_some_and(|at| *at != self.id)) {
            Some(Refusal::Volume)
        } else if volumes.iter().any(|volume| volume.exclusive && claims.held.contains(&volume.id)) {
            Some(Refusal::VolumeHeld)
        } else {
            None
        }
    }

    /// Lower is better. Load is the larger of the two shares reserved, in thousandths.
    fn rank(&self, service: &ServiceId) -> (u32, u64, u32) {
        let share = |used: u64, of: u64| used.saturating_mul(1000).checked_div(of).unwrap_or(0);
        let load = share(self.reserved.cpu_millis, self.capacity.cpu_millis)
            .max(share(self.reserved.memory_bytes, self.capacity.memory_bytes));
        (self.by_service.get(service).copied().unwrap_or(0), load, self.containers)
    }

    fn take(&mut self, container: &Container, ports: &[(u32, &'static str)]) {
        self.ports.extend(ports);
        self.addresses += u32::from(has_address(container));
        self.reserved.cpu_millis += container.resources.reservations.cpu_millis;
        self.reserved.memory_bytes += container.resources.reservations.memory_bytes;
        self.containers += 1;
        *self.by_service.entry(container.service.clone()).or_default() += 1;
    }
}

/// Where volumes are, and which are somebody's, as the round goes on.
#[derive(Debug, Default)]
struct Claims {
    places: BTreeMap<VolumeId, NodeId>,
    held: BTreeSet<VolumeId>,
}

impl Claims {
    fn place<'a>(&'a self, volume: &'a Volume) -> Option<&'a NodeId> {
        volume.node.as_ref().or_else(|| self.places.get(&volume.id))
    }

    fn take(&mut self, volumes: &[Arc<Volume>], node: &NodeId) {
        for volume in volumes {
            self.held.insert(volume.id.clone());
            if volume.is_local() && volume.node.is_none() {
                self.places.insert(volume.id.clone(), node.clone());
            }
        }
    }
}

fn has_address(container: &Container) -> bool {
    matches!(container.spec.network(), v1::NetworkMode::Cluster | v1::NetworkMode::Unspecified)
}

/// The ports that a container needs on its node for itself alone. They are its service's as it is now: what publishes
/// them follows the service too.
fn host_ports(state: &State, container: &Container) -> Vec<(u32, &'static str)> {
    let ports = state.service(&container.service).map(|service| service.spec.ports.as_slice()).unwrap_or_default();
    let own = ports.iter().filter(|port| port.host_port != 0 && port.publish_mode() == v1::PublishMode::Host);
    own.map(|port| (port.host_port, protocol_name(port))).collect()
}

/// Whether a container waits for a node.
#[must_use]
pub fn waits(container: &Container) -> bool {
    container.status.state < ContainerState::Assigned && container.desired == Desired::Running
}

/// Decides where waiting containers go.
#[must_use]
pub fn plan(state: &State, health: impl Fn(&NodeId) -> Health) -> Plan {
    let mut waiting: Vec<_> = state.containers().filter(|container| waits(container)).collect();
    if waiting.is_empty() {
        return Plan::default();
    }
    waiting.sort_by(|a, b| (a.created_at, &a.service, a.slot, &a.id).cmp(&(b.created_at, &b.service, b.slot, &b.id)));
    let mut candidates = candidates(state, health);
    let mut plan = Plan::default();
    let mut claims = Claims::default();
    for volume in state.volumes().filter(|volume| volume.exclusive && state.is_held(volume)) {
        claims.held.insert(volume.id.clone());
    }
    for container in waiting {
        let volumes: Vec<_> = state.volumes_of(&container.spec).cloned().collect();
        let ports = host_ports(state, container);
        let mut refusals = BTreeMap::<Refusal, u32>::new();
        let mut best: Option<(_, usize)> = None;
        for (i, candidate) in candidates.iter().enumerate() {
            if let Some(refusal) = candidate.refuses(container, &ports, &volumes, &claims) {
                *refusals.entry(refusal).or_default() += 1;
                continue;
            }
            let rank = candidate.rank(&container.service);
            if best.as_ref().is_none_or(|(known, _)| rank < *known) {
                best = Some((rank, i));
            }
        }
        match best {
            Some((_, i)) => {
                candidates[i].take(container, &ports);
                claims.take(&volumes, &candidates[i].id);
                plan.assignments.push((container.id.clone(), candidates[i].id.clone()));
            }
            None => {
                let (message, reason) = explain(candidates.len(), &refusals);
                plan.refusals.push((container.id.clone(), message, reason));
            }
        }
    }
    plan
}

fn candidates(state: &State, health: impl Fn(&NodeId) -> Health) -> Vec<Candidate> {
    let candidate = |node: &Arc<crate::state::Node>| {
        let mut candidate = Candidate {
            id: node.id.clone(),
            alive: health(&node.id) == Health::Ready,
            capacity: node.description.resources,
            reserved: Amounts::default(),
            containers: 0,
            addresses: 0,
            ports: BTreeSet::new(),
            by_service: BTreeMap::new(),
        };
        for container in state.containers_on(&node.id).filter(|container| container.holds_resources()) {
            candidate.take(container, &host_ports(state, container));
        }
        candidate
    };
    state.nodes().map(candidate).collect()
}

/// Why nobody takes a container, in words: "3 nodes: 2 not heard of; 1 not enough memory left".
fn explain(nodes: usize, refusals: &BTreeMap<Refusal, u32>) -> (String, Option<Refusal>) {
    let commonest = refusals.iter().max_by_key(|(_, count)| **count).map(|(refusal, _)| *refusal);
    if nodes == 0 {
        return ("no node has joined the cluster".to_owned(), None);
    }
    let words: Vec<_> = refusals.iter().map(|(refusal, count)| format!("{count} {}", refusal.words())).collect();
    let plural = if nodes == 1 { "" } else { "s" };
    (format!("no suitable node ({nodes} node{plural}: {})", words.join("; ")), commonest)
}
