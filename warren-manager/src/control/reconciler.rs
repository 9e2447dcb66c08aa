//! Reconciliation: what must change so that the containers are those that the services ask for. A pure function of the
//! state, of who is alive, and of the time; killing and repeating it at any point does no harm.
//!
//! Containers are one-shot: one that ended is never started again, another takes its slot. At no time are there more
//! containers of a service, on nodes that can be reached, than it asks for.

use std::{
    cell::OnceCell,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use crate::{
    clock::Timestamp,
    control::liveness::{Health, Standing},
    ids::{ContainerId, NodeId, ServiceId},
    state::{
        Availability, Change, Constraint, Container, Desired, Mode, NewContainer, Node, RestartCondition, Service,
        State,
    },
};

#[cfg(test)]
mod tests;

/// Longest wait before a container that keeps failing is replaced.
const MAX_DELAY: Duration = Duration::from_secs(300);
/// A container that ran this long was well: its failure begins a new row.
const WELL_AFTER: Duration = Duration::from_secs(30);
/// Ended containers kept in each slot, for people to look at.
const KEPT_PER_SLOT: usize = 2;

/// A container to make.
#[derive(Clone, Debug, PartialEq)]
pub struct Creation {
    /// Whose it is.
    pub service: Arc<Service>,
    /// In which slot.
    pub slot: u32,
    /// The only node that will do, for a global service.
    pub pinned: Option<NodeId>,
    /// Whether it takes the place of one that ended by itself.
    pub replaces: bool,
    /// Failures in a row before it.
    pub failures: u32,
}

impl Creation {
    /// The change that makes it, under a new id.
    #[must_use]
    pub fn change(&self, id: ContainerId, at: Timestamp) -> Change {
        Change::Create(NewContainer {
            id,
            service: self.service.id.clone(),
            generation: self.service.generation,
            slot: self.slot,
            pinned: self.pinned.clone(),
            failures: self.failures,
            at,
        })
    }
}

/// What reconciliation wants.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Containers to make.
    pub create: Vec<Creation>,
    /// Other changes.
    pub changes: Vec<Change>,
    /// When to look at which services again, if nothing else happens before.
    pub wakes: BTreeMap<ServiceId, Timestamp>,
}

impl Plan {
    fn wake(&mut self, service: &Service, at: Timestamp) {
        self.wakes.entry(service.id.clone()).and_modify(|known| *known = at.min(*known)).or_insert(at);
    }

    /// When to look again at the first of them.
    #[must_use]
    pub fn wake_at(&self) -> Option<Timestamp> {
        self.wakes.values().min().copied()
    }

    fn remove(&mut self, container: &Container) {
        if container.desired == Desired::Running {
            self.changes.push(Change::Remove { id: container.id.clone() });
        }
    }
}

/// The containers that a slot has had, newest first.
type Slot = Vec<Arc<Container>>;

/// Whether a node is one for containers with these constraints, as operators have it.
pub(crate) fn is_for(node: &Node, constraints: &[Constraint]) -> bool {
    node.availability != Availability::Drained && constraints.iter().all(|constraint| constraint.allows(node))
}

/// A service, and what is asked of nodes while it is looked at.
struct Look<'a, F> {
    service: &'a Arc<Service>,
    state: &'a State,
    standing: &'a F,
    /// The only nodes that its volumes are on.
    volumes_at: BTreeSet<&'a NodeId>,
    /// Whether any node would be given one of its containers now.
    taken_somewhere: OnceCell<bool>,
}

impl<'a, F: Fn(&NodeId) -> Standing> Look<'a, F> {
    fn new(service: &'a Arc<Service>, state: &'a State, standing: &'a F) -> Self {
        let volumes_at = state.volumes_of(&service.spec.container).filter_map(|volume| volume.node.as_ref()).collect();
        Self { service, state, standing, volumes_at, taken_somewhere: OnceCell::new() }
    }

    /// Whether a node would be given one of its containers now, as far as that does not depend on what else the node has.
    fn is_taken_by(&self, node: &Node) -> bool {
        node.availability == Availability::Active
            && (self.standing)(&node.id).health == Health::Ready
            && is_for(node, &self.service.spec.constraints)
            && self.volumes_at.iter().all(|at| **at == node.id)
    }

    fn is_taken_somewhere(&self) -> bool {
        *self.taken_somewhere.get_or_init(|| self.state.nodes().any(|node| self.is_taken_by(node)))
    }

    fn is_reachable(&self, node: &NodeId) -> bool {
        (self.standing)(node).health.is_reachable()
    }

    /// Whether a container is given up with its node; or else in how long it will be, if its node stays down.
    ///
    /// Only if another node could run its replacement: on the only node it is better left alone, which may be back before
    /// anyone misses it.
    fn lost(&self, container: &Container) -> Result<bool, Duration> {
        let Some(node) = &container.node else { return Ok(false) };
        let standing = (self.standing)(node);
        // What it has to itself nobody else is given while it may still use it.
        let holds = || self.state.volumes_of(&container.revision.spec).any(|volume| volume.exclusive);
        if standing.health != Health::Down || container.pinned.is_some() || holds() || !self.is_taken_somewhere() {
            return Ok(false);
        }
        match self.service.spec.lost_after.checked_sub(standing.down_for) {
            None | Some(Duration::ZERO) => Ok(true),
            Some(left) => Err(left),
        }
    }

    fn is_lost(&self, container: &Container) -> bool {
        self.lost(container) == Ok(true)
    }

    /// Whether a container is on a node that is not, or no longer, one for it.
    fn must_move(&self, container: &Container) -> bool {
        let node = container.node.as_ref().and_then(|node| self.state.node(node));
        node.is_some_and(|node| !is_for(node, &container.revision.constraints))
    }
}

/// Decides what must change.
#[must_use]
pub fn plan<S: Into<Standing>>(state: &State, standing: impl Fn(&NodeId) -> S, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let standing = |node: &NodeId| standing(node).into();
    for service in state.services() {
        plan_service(&mut plan, &Look::new(service, state, &standing), now);
    }
    orphans(&mut plan, state.containers().filter(|container| state.service(&container.service).is_none()));
    plan
}

/// Decides what must change of these services, be they there or gone: what [`plan`] decides of them.
#[must_use]
pub fn plan_some<S: Into<Standing>>(
    state: &State,
    services: &BTreeSet<ServiceId>,
    standing: impl Fn(&NodeId) -> S,
    now: Timestamp,
) -> Plan {
    let mut plan = Plan::default();
    let standing = |node: &NodeId| standing(node).into();
    for id in services {
        match state.service(id) {
            Some(service) => plan_service(&mut plan, &Look::new(service, state, &standing), now),
            None => orphans(&mut plan, state.containers_of(id)),
        }
    }
    plan
}

fn plan_service(plan: &mut Plan, look: &Look<'_, impl Fn(&NodeId) -> Standing>, now: Timestamp) {
    let (service, state) = (look.service, look.state);
    let mut slots = BTreeMap::<(u32, Option<NodeId>), Slot>::new();
    for container in state.containers_of(&service.id) {
        let key = (container.slot, container.pinned.clone());
        slots.entry(key).or_default().push(Arc::clone(container));
    }
    for slot in slots.values_mut() {
        slot.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
    }
    let wanted: Vec<(u32, Option<NodeId>)> = match service.spec.mode {
        Mode::Replicated(replicas) => (1..=replicas).map(|slot| (slot, None)).collect(),
        Mode::Global => {
            let own = state.nodes().filter(|node| is_for(node, &service.spec.constraints));
            own.map(|node| (0, Some(node.id.clone()))).collect()
        }
    };
    service_slots(plan, look, &slots, &wanted, now);
}

fn service_slots(
    plan: &mut Plan,
    look: &Look<'_, impl Fn(&NodeId) -> Standing>,
    slots: &BTreeMap<(u32, Option<NodeId>), Slot>,
    wanted: &[(u32, Option<NodeId>)],
    now: Timestamp,
) {
    let service = look.service;
    let empty = Slot::new();
    let runs = |container: &&Arc<Container>| {
        container.desired == Desired::Running && !container.status.state.is_terminal() && !look.is_lost(container)
    };
    // Whether every container of the service is up: then one of an earlier generation, or on a node that is to be left, may be
    // replaced.
    let mut all_up = true;
    let mut outdated = None;
    for key in wanted {
        let slot = slots.get(key).unwrap_or(&empty);
        for container in slot.iter().filter(|container| !container.status.state.is_terminal()) {
            match look.lost(container) {
                Ok(true) => plan.remove(container),
                Ok(false) => {}
                Err(left) => plan.wake(service, now.after(left)),
            }
        }
        // A global service's container changes when its node takes containers again; nobody waits for it.
        let pinned = key.1.as_ref().and_then(|node| look.state.node(node));
        let counts = pinned.is_none_or(|node| look.is_taken_by(node));
        match slot.iter().find(runs) {
            // Whether it serves nobody knows.
            Some(container) if counts && !container.node.as_ref().is_none_or(|node| look.is_reachable(node)) => {
                all_up = false;
            }
            Some(container) => {
                let current = container.revision.number == service.generation && !look.must_move(container);
                match (current, container.status.serves()) {
                    // It serves nobody: there is nothing to wait for.
                    (false, false) if counts => {
                        plan.remove(container);
                        all_up = false;
                    }
                    (false, true) if counts && outdated.is_none() => outdated = Some(Arc::clone(container)),
                    (true, false) if counts => all_up = false,
                    _ => {}
                }
            }
            // A slot that stays empty keeps nobody waiting either.
            None => all_up &= !(counts && vacant(plan, look, key, slot, now)),
        }
        tidy(plan, slot, KEPT_PER_SLOT);
    }
    if all_up && let Some(container) = outdated {
        plan.remove(&container);
    }
    let wanted: BTreeSet<_> = wanted.iter().collect();
    for slot in slots.iter().filter(|(key, _)| !wanted.contains(key)).map(|(_, slot)| slot) {
        for container in slot {
            plan.remove(container);
        }
        tidy(plan, slot, 0);
    }
}

/// Decides whether a slot without a container gets one, and when. Returns whether it will.
fn vacant(
    plan: &mut Plan,
    look: &Look<'_, impl Fn(&NodeId) -> Standing>,
    key: &(u32, Option<NodeId>),
    slot: &Slot,
    now: Timestamp,
) -> bool {
    let service = look.service;
    // The one before must be gone first, unless nobody can tell. Then its end must be decided at least: its node may be back by
    // the time that this plan is carried out, and must be told to stop it.
    let stays = |container: &Arc<Container>| {
        !container.status.state.is_terminal()
            && container.node.is_some()
            && (!look.is_lost(container) || container.desired == Desired::Running)
    };
    if slot.iter().any(stays) {
        return true;
    }
    // What was removed on purpose or lost with its node did not end by itself: its slot is filled at once.
    let ended_by_itself =
        slot.first().filter(|last| last.desired == Desired::Running && last.revision.number == service.generation);
    if let Some(last) = ended_by_itself {
        let Some(due) = replaced_at(service, last) else { return false };
        if due > now {
            plan.wake(service, due);
            return true;
        }
    }
    plan.create.push(Creation {
        service: Arc::clone(service),
        slot: key.0,
        pinned: key.1.clone(),
        replaces: ended_by_itself.is_some(),
        failures: ended_by_itself.map_or(0, |last| failures_in_a_row(last)),
    });
    true
}

/// When the slot of a container that ended by itself gets another, by the restart policy; `None` is never.
fn replaced_at(service: &Service, ended: &Container) -> Option<Timestamp> {
    let policy = service.spec.restart;
    let wanted = match policy.condition {
        RestartCondition::Any => true,
        RestartCondition::OnFailure => ended.status.state.is_failure(),
        RestartCondition::Never => false,
    };
    let failures = failures_in_a_row(ended);
    if !wanted || (policy.max_attempts > 0 && failures >= policy.max_attempts) {
        return None;
    }
    let doublings = failures.saturating_sub(1).min(16);
    let delay = policy.delay.saturating_mul(1 << doublings).min(MAX_DELAY.max(policy.delay));
    // When its node said so, by the leader's clock; when it ended is by whatever clock the runtime has.
    Some(ended.status.changed_at.after(delay))
}

/// When a container's slot gets another, if the restart policy has that wait: `None` of one that has not ended, that is not
/// replaced, or that has been.
#[must_use]
pub fn next_try(service: &Service, container: &Container, now: Timestamp) -> Option<Timestamp> {
    let is_last = container.status.state.is_terminal()
        && container.desired == Desired::Running
        && container.revision.number == service.generation;
    let is_wanted = match service.spec.mode {
        Mode::Replicated(replicas) => container.slot <= replicas,
        Mode::Global => true,
    };
    replaced_at(service, container).filter(|at| is_last && is_wanted && *at > now)
}

/// Failures in a row, counting the one that just ended. One that ran well first begins a new row.
fn failures_in_a_row(last: &Container) -> u32 {
    if !last.status.state.is_failure() {
        return 0;
    }
    let ran = last.status.started_at.zip(last.status.finished_at);
    if ran.is_some_and(|(from, to)| to.since(from) >= WELL_AFTER) { 1 } else { last.failures + 1 }
}

/// Deletes the records of all but the newest `keep` ended containers of a slot, and of those that no node has had and none is to have.
fn tidy(plan: &mut Plan, slot: &Slot, keep: usize) {
    let ended = slot.iter().filter(|container| container.status.state.is_terminal()).skip(keep);
    let moot = slot.iter().filter(|container| {
        container.desired == Desired::Removed && container.node.is_none() && !container.status.state.is_terminal()
    });
    for container in ended.chain(moot) {
        plan.changes.push(Change::DeleteContainer { id: container.id.clone() });
    }
}

/// Containers of services that are gone.
fn orphans<'a>(plan: &mut Plan, containers: impl Iterator<Item = &'a Arc<Container>>) {
    for container in containers {
        if container.status.state.is_terminal() || container.node.is_none() {
            plan.changes.push(Change::DeleteContainer { id: container.id.clone() });
        } else {
            plan.remove(container);
        }
    }
}
