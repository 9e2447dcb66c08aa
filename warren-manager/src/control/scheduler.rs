//! Placement: which node a waiting container goes to. A pure function of the state and of who is alive.
//!
//! Nodes that cannot take a container are filtered out, each with its reason; of the others one where no container of the same service
//! failed to start lately wins, then the one with the fewest containers of the service, then the one with the smallest share of its resources reserved, then the one with
//! the fewest containers. Equals are taken in the order of their ids, so that the same state always gives the same plan.
//!
//! Looking at every node for every container would say the same and take nodes times containers. Nodes are kept in the order of
//! their load instead: a container of a service that waits alone takes the first in it that will do and has none of its
//! service, and those that wait together take from a heap of their service's own. A test compares the two with the slow way.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap},
    sync::Arc,
};

use warren_proto::v1;

use crate::{
    control::liveness::Health,
    ids::{ContainerId, NodeId, ServiceId, VolumeId},
    state::{Amounts, Availability, Container, Node, Revision, State, Volume, protocol_name},
};

#[cfg(test)]
mod tests;

/// Why a node does not take a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    /// The container is for another node.
    Pinned,
    /// It is not heard of.
    Down,
    /// It is, but went down too often lately.
    Unsteady,
    /// Something is wrong with it that keeps containers from being started.
    NotReady,
    /// Operators have it take nothing new.
    Cordoned,
    /// Operators have it emptied.
    Drained,
    /// It is not what the service asks for: which of its constraints it does not meet.
    Constraint(usize),
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
}

/// A node where a container of a service failed to start counts as having so many more of them.
const FAILED: u32 = 1 << 20;

/// Containers that a node has addresses for: a /24, less its first and last address and the node's own.
const ADDRESSES: u32 = 253;

impl Refusal {
    /// As a label shows it.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Pinned => "pinned",
            Self::Down => "down",
            Self::Unsteady => "unsteady",
            Self::NotReady => "not_ready",
            Self::Cordoned => "cordoned",
            Self::Drained => "drained",
            Self::Constraint(_) => "constraint",
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Addresses => "addresses",
            Self::Port => "port",
            Self::Volume => "volume",
            Self::VolumeHeld => "volume_held",
        }
    }

    fn words(self, revision: &Revision) -> String {
        let words = match self {
            Self::Pinned => "meant for another",
            Self::Down => "not heard of",
            Self::Unsteady => "went down too often lately",
            Self::NotReady => "not ready",
            Self::Cordoned => "cordoned",
            Self::Drained => "drained",
            Self::Constraint(at) => {
                return revision
                    .constraints
                    .get(at)
                    .map_or_else(|| "a constraint is not met".to_owned(), |it| format!("not {it}"));
            }
            Self::Memory => "not enough memory left",
            Self::Cpu => "not enough CPU left",
            Self::Addresses => "no container address left",
            Self::Port => "a host port is taken",
            Self::Volume => "a volume is on another node",
            Self::VolumeHeld => "a volume is another container's",
        };
        words.to_owned()
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
    node: Arc<Node>,
    /// Why it takes nothing at all.
    closed: Option<Refusal>,
    reserved: Amounts,
    containers: u32,
    /// Containers with an address of their own.
    addresses: u32,
    /// Ports that its containers have on it.
    ports: BTreeSet<(u32, &'static str)>,
}

/// What a container asks of a node; the same for all of a revision.
#[derive(Debug)]
struct Wanted {
    reservations: Amounts,
    has_address: bool,
    ports: Vec<(u32, &'static str)>,
    volumes: Vec<Arc<Volume>>,
    revision: Arc<Revision>,
}

impl Wanted {
    fn new(state: &State, container: &Container) -> Self {
        Self {
            reservations: container.revision.resources.reservations,
            has_address: has_address(container),
            ports: host_ports(container),
            volumes: state.volumes_of(&container.revision.spec).cloned().collect(),
            revision: Arc::clone(&container.revision),
        }
    }
}

impl Candidate {
    /// What only gets more as a round goes on: who refuses one container refuses the next of its kind.
    fn refuses(&self, wanted: &Wanted, claims: &Claims) -> Option<Refusal> {
        if self.closed.is_some() {
            return self.closed;
        }
        let constraints = wanted.revision.constraints.iter();
        if let Some((at, _)) = constraints.enumerate().find(|(_, constraint)| !constraint.allows(&self.node)) {
            return Some(Refusal::Constraint(at));
        }
        let capacity = self.node.description.resources;
        if self.reserved.memory_bytes + wanted.reservations.memory_bytes > capacity.memory_bytes {
            Some(Refusal::Memory)
        } else if self.reserved.cpu_millis + wanted.reservations.cpu_millis > capacity.cpu_millis {
            Some(Refusal::Cpu)
        } else if wanted.has_address && self.addresses >= ADDRESSES {
            Some(Refusal::Addresses)
        } else if wanted.ports.iter().any(|port| self.ports.contains(port)) {
            Some(Refusal::Port)
        } else if wanted.volumes.iter().any(|volume| claims.place(volume).is_some_and(|at| *at != self.node.id)) {
            Some(Refusal::Volume)
        } else if wanted.volumes.iter().any(|volume| volume.exclusive && claims.held.contains(&volume.id)) {
            Some(Refusal::VolumeHeld)
        } else {
            None
        }
    }

    /// Lower is better: the larger of the two shares reserved, in thousandths, and how many containers it has.
    fn load(&self) -> (u64, u32) {
        let share = |used: u64, of: u64| used.saturating_mul(1000).checked_div(of).unwrap_or(0);
        let capacity = self.node.description.resources;
        let load = share(self.reserved.cpu_millis, capacity.cpu_millis)
            .max(share(self.reserved.memory_bytes, capacity.memory_bytes));
        (load, self.containers)
    }

    fn take(&mut self, reservations: Amounts, has_address: bool, ports: &[(u32, &'static str)]) {
        self.ports.extend(ports);
        self.addresses += u32::from(has_address);
        self.reserved.cpu_millis += reservations.cpu_millis;
        self.reserved.memory_bytes += reservations.memory_bytes;
        self.containers += 1;
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
    matches!(container.revision.spec.network(), v1::NetworkMode::Cluster | v1::NetworkMode::Unspecified)
}

/// The ports that a container needs on its node for itself alone.
fn host_ports(container: &Container) -> Vec<(u32, &'static str)> {
    container.revision.node_ports().map(|port| (port.host_port, protocol_name(port))).collect()
}

/// A round: nodes as it fills them, and what it has decided.
struct Round {
    candidates: Vec<Candidate>,
    by_id: HashMap<NodeId, usize>,
    /// Places in `candidates`, by load.
    order: BTreeSet<((u64, u32), usize)>,
    /// How many containers of a service each node has, for services with containers that wait.
    of_service: HashMap<ServiceId, BTreeMap<usize, u32>>,
    claims: Claims,
    plan: Plan,
}

/// Decides where waiting containers go.
#[must_use]
pub fn plan(state: &State, health: impl Fn(&NodeId) -> Health) -> Plan {
    let mut waiting: Vec<_> = state.waiting().collect();
    if waiting.is_empty() {
        return Plan::default();
    }
    waiting.sort_by(|a, b| (a.created_at, &a.service, a.slot, &a.id).cmp(&(b.created_at, &b.service, b.slot, &b.id)));
    let mut round = Round::begin(state, &waiting, health);
    round.avoid_failures(state, &waiting);
    let is_alike = |a: &&Arc<Container>, b: &&Arc<Container>| {
        (&a.revision, a.pinned.is_some()) == (&b.revision, b.pinned.is_some())
    };
    for batch in waiting.chunk_by(is_alike) {
        let wanted = Wanted::new(state, batch[0]);
        match batch {
            [only] if only.pinned.is_none() => round.place_one(only, &wanted),
            several if several[0].pinned.is_none() => round.place_several(several, &wanted),
            pinned => pinned.iter().for_each(|container| round.place_pinned(container, &wanted)),
        }
    }
    round.plan
}

impl Round {
    fn begin(state: &State, waiting: &[&Arc<Container>], health: impl Fn(&NodeId) -> Health) -> Self {
        let mut of_service: HashMap<ServiceId, BTreeMap<usize, u32>> =
            waiting.iter().map(|container| (container.service.clone(), BTreeMap::new())).collect();
        let mut candidates = Vec::new();
        for (at, node) in state.nodes().enumerate() {
            let closed = match (health(&node.id), node.availability) {
                (Health::Down | Health::Unknown, _) => Some(Refusal::Down),
                (_, Availability::Drained) => Some(Refusal::Drained),
                (_, Availability::Cordoned) => Some(Refusal::Cordoned),
                (Health::Unsteady, _) => Some(Refusal::Unsteady),
                (Health::NotReady, _) => Some(Refusal::NotReady),
                (Health::Ready, Availability::Active) => None,
            };
            let mut candidate = Candidate {
                node: Arc::clone(node),
                closed,
                reserved: Amounts::default(),
                containers: 0,
                addresses: 0,
                ports: BTreeSet::new(),
            };
            for container in state.containers_on(&node.id).filter(|container| container.holds_resources()) {
                let ports = host_ports(container);
                candidate.take(container.revision.resources.reservations, has_address(container), &ports);
                if let Some(counts) = of_service.get_mut(&container.service) {
                    *counts.entry(at).or_default() += 1;
                }
            }
            candidates.push(candidate);
        }
        let mut claims = Claims::default();
        if state.volumes().any(|volume| volume.exclusive) {
            let holders = state.containers().filter(|container| container.holds_resources());
            let held = holders.flat_map(|container| state.volumes_of(&container.revision.spec));
            claims.held.extend(held.filter(|volume| volume.exclusive).map(|volume| volume.id.clone()));
        }
        Self {
            by_id: candidates.iter().enumerate().map(|(at, candidate)| (candidate.node.id.clone(), at)).collect(),
            order: candidates.iter().enumerate().map(|(at, candidate)| (candidate.load(), at)).collect(),
            candidates,
            of_service,
            claims,
            plan: Plan::default(),
        }
    }

    /// Where containers that are known by their ends did not even start, others of their kind come last.
    fn avoid_failures(&mut self, state: &State, waiting: &[&Arc<Container>]) {
        let revisions: BTreeMap<&ServiceId, u64> =
            waiting.iter().map(|container| (&container.service, container.revision.number)).collect();
        for (service, revision) in revisions {
            let failed = state.containers_of(service).filter(|container| {
                container.revision.number == revision
                    && container.status.state.is_failure()
                    && container.status.started_at.is_none()
            });
            let nodes: BTreeSet<_> = failed.filter_map(|container| self.by_id.get(container.node.as_ref()?)).collect();
            let counts = self.of_service.entry(service.clone()).or_default();
            for at in nodes {
                *counts.entry(*at).or_default() += FAILED;
            }
        }
    }

    fn count(&self, service: &ServiceId, at: usize) -> u32 {
        self.of_service.get(service).and_then(|counts| counts.get(&at)).copied().unwrap_or(0)
    }

    /// Gives a container to a node; the orders by load and by service are the caller's to set right.
    fn fill(&mut self, container: &Container, wanted: &Wanted, at: usize) {
        let candidate = &mut self.candidates[at];
        candidate.take(wanted.reservations, wanted.has_address, &wanted.ports);
        self.claims.take(&wanted.volumes, &candidate.node.id);
        self.plan.assignments.push((container.id.clone(), candidate.node.id.clone()));
    }

    /// A node's load was this and its service had so many containers fewer: the orders follow.
    fn reorder(&mut self, service: &ServiceId, at: usize, load: (u64, u32), more: u32) {
        self.order.remove(&(load, at));
        self.order.insert((self.candidates[at].load(), at));
        *self.of_service.entry(service.clone()).or_default().entry(at).or_default() += more;
    }

    fn give(&mut self, container: &Container, wanted: &Wanted, at: usize) {
        let load = self.candidates[at].load();
        self.fill(container, wanted, at);
        self.reorder(&container.service, at, load, 1);
    }

    /// One that waits alone: the least loaded node without its service's containers, if there is one that will do.
    fn place_one(&mut self, container: &Container, wanted: &Wanted) {
        let mut best = None;
        for (load, at) in &self.order {
            let count = self.count(&container.service, *at);
            let rank = (count, *load, *at);
            if best.is_none_or(|known| rank < known) && self.candidates[*at].refuses(wanted, &self.claims).is_none() {
                best = Some(rank);
                if count == 0 {
                    break;
                }
            }
        }
        match best {
            Some((_, _, at)) => self.give(container, wanted, at),
            None => self.refuse(&[container], wanted),
        }
    }

    /// Several of a kind. A node that refuses one refuses the others too.
    fn place_several(&mut self, containers: &[&Arc<Container>], wanted: &Wanted) {
        let service = &containers[0].service;
        let all = self.order.iter().map(|(load, at)| Reverse((self.count(service, *at), *load, *at)));
        let mut heap: BinaryHeap<_> = all.collect();
        // The load that each node had before, and how many it got: the orders are set right once for all of them.
        let mut filled = HashMap::<usize, ((u64, u32), u32)>::new();
        let mut rest = containers;
        while let Some((container, others)) = rest.split_first() {
            while let Some(Reverse((_, _, at))) = heap.peek()
                && self.candidates[*at].refuses(wanted, &self.claims).is_some()
            {
                heap.pop();
            }
            let Some(mut top) = heap.peek_mut() else { break };
            let Reverse((count, load, at)) = *top;
            filled.entry(at).or_insert((load, 0)).1 += 1;
            self.fill(container, wanted, at);
            *top = Reverse((count + 1, self.candidates[at].load(), at));
            rest = others;
        }
        for (at, (load, more)) in filled {
            self.reorder(service, at, load, more);
        }
        if !rest.is_empty() {
            let refused: Vec<&Container> = rest.iter().map(|container| &***container).collect();
            self.refuse(&refused, wanted);
        }
    }

    /// One for a node of its own.
    fn place_pinned(&mut self, container: &Container, wanted: &Wanted) {
        let at = container.pinned.as_ref().and_then(|node| self.by_id.get(node)).copied();
        match at {
            Some(at) if self.candidates[at].refuses(wanted, &self.claims).is_none() => {
                self.give(container, wanted, at);
            }
            _ => self.refuse(&[container], wanted),
        }
    }

    fn refuse(&mut self, containers: &[&Container], wanted: &Wanted) {
        let pinned = containers.first().and_then(|container| container.pinned.as_ref());
        let mut refusals = BTreeMap::<Refusal, u32>::new();
        for candidate in &self.candidates {
            let refusal = match pinned {
                Some(pinned) if *pinned != candidate.node.id => Some(Refusal::Pinned),
                _ => candidate.refuses(wanted, &self.claims),
            };
            *refusals.entry(refusal.unwrap_or(Refusal::Pinned)).or_default() += 1;
        }
        let (message, reason) = explain(self.candidates.len(), &refusals, &wanted.revision);
        let refused = containers.iter().map(|container| (container.id.clone(), message.clone(), reason));
        self.plan.refusals.extend(refused);
    }
}

/// Why nobody takes a container, in words: "3 nodes: 2 not heard of; 1 not enough memory left".
fn explain(nodes: usize, refusals: &BTreeMap<Refusal, u32>, revision: &Revision) -> (String, Option<Refusal>) {
    let commonest = refusals.iter().max_by_key(|(_, count)| **count).map(|(refusal, _)| *refusal);
    if nodes == 0 {
        return ("no node has joined the cluster".to_owned(), None);
    }
    let words: Vec<_> =
        refusals.iter().map(|(refusal, count)| format!("{count} {}", refusal.words(revision))).collect();
    let plural = if nodes == 1 { "" } else { "s" };
    (format!("no suitable node ({nodes} node{plural}: {})", words.join("; ")), commonest)
}
