//! Which nodes are alive. Kept in the leader's memory and never in Raft: an idle cluster writes nothing.

mod conditions;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};
use warren_proto::v1;

pub(crate) use conditions::Conditions;
pub use conditions::{CONDITIONS, Condition};

use crate::{
    clock::Timestamp,
    ids::NodeId,
    state::{Node, State},
};

/// How a node is, as far as its leader knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It is too early to call it down: nothing was heard of it since this manager began to lead, or most nodes were silent and come
    /// back just now.
    Unknown,
    /// It is heard of.
    Ready,
    /// It is heard of, but went down too often lately to be given more.
    Unsteady,
    /// It is heard of, and something is wrong with it that keeps containers from being started.
    NotReady,
    /// It has been silent for too long.
    Down,
}

impl Health {
    /// As labels and tables show it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Ready => "ready",
            Self::Unsteady => "unsteady",
            Self::NotReady => "not_ready",
            Self::Down => "down",
        }
    }
}

impl Health {
    /// Whether its agent is heard of.
    #[must_use]
    pub fn is_reachable(self) -> bool {
        matches!(self, Self::Ready | Self::Unsteady | Self::NotReady)
    }
}

/// How a node is, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// How it is.
    pub health: Health,
    /// For how long it has been down; zero when it is not.
    pub down_for: Duration,
}

impl From<Health> for Standing {
    fn from(health: Health) -> Self {
        Self { health, down_for: Duration::ZERO }
    }
}

/// How often agents are to be heard, and when silence means that they are down.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between heartbeats in a small cluster.
    pub heartbeat: Duration,
    /// Heartbeats that may be missed.
    pub tolerated: u32,
    /// Heartbeats a second that the leader is willing to hear in a large one.
    pub max_rate: u32,
    /// When a node that goes down and comes back again and again is given nothing more.
    pub flapping: Flapping,
}

/// When a node that goes down and comes back again and again is given nothing more.
#[derive(Clone, Copy, Debug)]
pub struct Flapping {
    /// Returns within [`Self::window`] that are nobody's concern.
    pub tolerated: u32,
    /// Returns that are this far apart have nothing to do with each other.
    pub window: Duration,
    /// After the first return too many; it doubles with each further one, up to [`Self::longest`].
    pub hold: Duration,
    /// The longest time without anything new.
    pub longest: Duration,
}

impl Default for Flapping {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { tolerated: 2, window: seconds(600), hold: seconds(30), longest: seconds(600) }
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self { heartbeat: Duration::from_secs(2), tolerated: 5, max_rate: 500, flapping: Flapping::default() }
    }
}

impl Timing {
    /// The period for this many nodes.
    #[must_use]
    pub fn period(&self, nodes: usize) -> Duration {
        let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
        self.heartbeat.max(Duration::from_secs(1) * nodes / self.max_rate.max(1))
    }

    fn patience(&self, nodes: usize) -> Duration {
        self.period(nodes) * self.tolerated
    }
}

/// What is known of a node's silences.
#[derive(Clone, Copy, Debug)]
struct Heard {
    last: Instant,
    /// Returns from being down that followed each other within the window.
    returns: u32,
    returned: Instant,
    unsteady_until: Instant,
}

#[derive(Debug)]
struct Table {
    timing: Timing,
    heard: HashMap<NodeId, Heard>,
    conditions: HashMap<NodeId, Conditions>,
    since: Instant,
    /// Most nodes were silent together, and one has been heard again: until then the others may be as well.
    returning_until: Instant,
}

impl Table {
    fn new(timing: Timing, now: Instant) -> Self {
        Self { timing, heard: HashMap::new(), conditions: HashMap::new(), since: now, returning_until: now }
    }

    fn reset(&mut self, now: Instant) {
        self.heard.clear();
        self.conditions.clear();
        self.since = now;
        self.returning_until = now;
    }

    /// A node was heard; whether that is news.
    fn heard(&mut self, node: &NodeId, now: Instant) -> bool {
        let patience = self.timing.patience(self.heard.len());
        let Flapping { tolerated, window, hold, longest } = self.timing.flapping;
        let Some(known) = self.heard.get_mut(node) else {
            let new = Heard { last: now, returns: 0, returned: now, unsteady_until: now };
            self.heard.insert(node.clone(), new);
            return true;
        };
        let was_down = now - known.last > patience;
        known.last = now;
        if was_down {
            known.returns = if now - known.returned > window { 1 } else { known.returns + 1 };
            known.returned = now;
            if let Some(doublings) = known.returns.checked_sub(tolerated + 1) {
                known.unsteady_until = now + hold.saturating_mul(1 << doublings.min(16)).min(longest);
            }
            // It was the network, not they: they come back one after the other.
            let others_down = self.heard.values().filter(|other| now - other.last > patience).count();
            if (others_down + 1) * 2 > self.heard.len() {
                self.returning_until = now + patience;
            }
        }
        was_down
    }

    fn standing(&self, node: &NodeId, now: Instant) -> Standing {
        let patience = self.timing.patience(self.heard.len());
        let (heard, patience) = match self.heard.get(node) {
            Some(heard) => (heard.last, patience),
            None => (self.since, patience * 3),
        };
        let silent = now.saturating_duration_since(heard);
        let known = self.heard.get(node);
        let health = match known {
            _ if silent > patience && now < self.returning_until => Health::Unknown,
            _ if silent > patience => Health::Down,
            None => Health::Unknown,
            Some(_) if self.conditions.get(node).is_some_and(Conditions::blocks) => Health::NotReady,
            Some(known) if now < known.unsteady_until => Health::Unsteady,
            Some(_) => Health::Ready,
        };
        let down_for = if health == Health::Down { silent.saturating_sub(patience) } else { Duration::ZERO };
        Standing { health, down_for }
    }
}

/// Who was heard when. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Liveness {
    table: Arc<Mutex<Table>>,
    changes: watch::Sender<()>,
}

impl Liveness {
    /// Nobody has been heard of.
    #[must_use]
    pub fn new(timing: Timing) -> Self {
        let table = Table::new(timing, Instant::now());
        Self { table: Arc::new(Mutex::new(table)), changes: watch::Sender::new(()) }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every change is one insertion: a panic leaves the table whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This manager begins to lead: every node has time to be heard.
    pub fn reset(&self) {
        self.table().reset(Instant::now());
    }

    /// A node was heard.
    pub fn heard(&self, node: &NodeId) {
        if self.table().heard(node, Instant::now()) {
            self.changes.send_replace(());
        }
    }

    /// Takes note of what an agent says is wrong with its node.
    pub fn set_conditions(&self, node: &NodeId, conditions: Vec<v1::NodeCondition>, now: Timestamp) {
        if self.table().conditions.entry(node.clone()).or_default().set(conditions, now) {
            self.changes.send_replace(());
        }
    }

    /// Takes note that something was refused of what a node reports, and why.
    pub fn set_refused(&self, node: &NodeId, why: &str, now: Timestamp) {
        let message = format!("some of what it reports is refused: {why}");
        if self.table().conditions.entry(node.clone()).or_default().set_refused(message, now, Instant::now()) {
            tracing::warn!(%node, why, "some of what a node reports is refused");
            self.changes.send_replace(());
        }
    }

    /// Takes note of the ports that processes of a node listen on.
    pub fn set_listeners(&self, node: &NodeId, listeners: &[v1::NodeListener]) {
        self.table().conditions.entry(node.clone()).or_default().set_listeners(listeners);
    }

    /// Whether a process of a node listens on a port, as far as that is known.
    #[must_use]
    pub fn listens(&self, node: &NodeId, port: u32, protocol: v1::Protocol) -> bool {
        self.table().conditions.get(node).is_some_and(|conditions| conditions.listens(port, protocol))
    }

    /// Takes note of a node's clock, as it was when the node sent something that has just arrived.
    pub fn set_clock(&self, node: &NodeId, clock: Timestamp, now: Timestamp) {
        if self.table().conditions.entry(node.clone()).or_default().set_clock(clock, now) {
            self.changes.send_replace(());
        }
    }

    /// What is to be added to a node's times to make them the leader's, in milliseconds.
    #[must_use]
    pub fn clock_shift(&self, node: &NodeId) -> i64 {
        self.table().conditions.get(node).map_or(0, Conditions::shift)
    }

    /// What is wrong with a node, by type; nothing of one that is not heard of.
    #[must_use]
    pub fn conditions(&self, node: &NodeId) -> Vec<Condition> {
        let table = self.table();
        if !table.standing(node, Instant::now()).health.is_reachable() {
            return Vec::new();
        }
        table.conditions.get(node).map(|conditions| conditions.all(Instant::now())).unwrap_or_default()
    }

    /// Forgets nodes that are no longer in the cluster: their silence says nothing of the others.
    pub fn keep_only(&self, state: &State) {
        let mut table = self.table();
        if table.heard.len() > state.nodes().count() {
            table.heard.retain(|node, _| state.node(node).is_some());
            table.conditions.retain(|node, _| state.node(node).is_some());
        }
    }

    /// How a node is.
    #[must_use]
    pub fn health(&self, node: &NodeId) -> Health {
        self.standing(node).health
    }

    /// How a node is, and for how long.
    #[must_use]
    pub fn standing(&self, node: &NodeId) -> Standing {
        self.table().standing(node, Instant::now())
    }

    /// The heartbeat period for now.
    #[must_use]
    pub fn period(&self) -> Duration {
        let table = self.table();
        table.timing.period(table.heard.len())
    }

    /// Wakes whoever follows when a silent node is heard again.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }
}

/// What was seen of each node at the last look. A look that finds nothing new copies nothing.
#[derive(Debug)]
pub(crate) struct LastSeen<T>(HashMap<NodeId, T>);

impl<T> Default for LastSeen<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: Copy + PartialEq> LastSeen<T> {
    /// What is seen of the nodes of a state, for the first time.
    pub(crate) fn of(state: &State, see: impl Fn(&Node) -> T) -> Self {
        Self(state.nodes().map(|node| (node.id.clone(), see(node))).collect())
    }

    /// Looks again: calls `news` with each node that is new or of which something else is seen. Whether there was such a node, or
    /// one is gone.
    pub(crate) fn look(&mut self, state: &State, see: impl Fn(&Node) -> T, mut news: impl FnMut(&Node, T)) -> bool {
        let (mut count, mut is_news) = (0, false);
        for node in state.nodes() {
            let now = see(node);
            count += 1;
            let before = match self.0.get_mut(&node.id) {
                Some(known) => Some(std::mem::replace(known, now)),
                None => self.0.insert(node.id.clone(), now),
            };
            if before != Some(now) {
                is_news = true;
                news(node, now);
            }
        }
        if self.0.len() > count {
            self.0.retain(|node, _| state.node(node).is_some());
            is_news = true;
        }
        is_news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_means_down_and_a_new_leader_is_patient() {
        let start = Instant::now();
        let mut table = Table::new(Timing::default(), start);
        let (a, b) = (NodeId::from("a"), NodeId::from("b"));
        assert!(table.heard(&a, start));
        let at = |seconds| start + Duration::from_secs(seconds);
        let health = |table: &Table, now| (table.standing(&a, now).health, table.standing(&b, now).health);
        assert_eq!(health(&table, at(10)), (Health::Ready, Health::Unknown));
        assert_eq!(health(&table, at(11)), (Health::Down, Health::Unknown));
        assert_eq!(health(&table, at(30)), (Health::Down, Health::Unknown));
        assert_eq!(health(&table, at(31)), (Health::Down, Health::Down));
        assert!(table.heard(&a, at(31)), "it was down");
        assert!(!table.heard(&a, at(32)), "it was not");
        table.heard(&b, at(32));
        assert_eq!(health(&table, at(32)), (Health::Ready, Health::Ready));
        table.reset(at(33));
        assert_eq!(health(&table, at(33)), (Health::Unknown, Health::Unknown));
    }

    #[test]
    fn nodes_that_were_silent_together_have_time_to_come_back() {
        let start = Instant::now();
        let mut table = Table::new(Timing::default(), start);
        let nodes = ["a", "b", "c", "d"].map(NodeId::from);
        for node in &nodes {
            table.heard(node, start);
        }
        let at = |seconds| start + Duration::from_secs(seconds);
        let health = |table: &Table, seconds| nodes.clone().map(|node| table.standing(&node, at(seconds)).health);
        let (ready, unknown, down) = (Health::Ready, Health::Unknown, Health::Down);
        assert_eq!(health(&table, 15), [down; 4]);
        table.heard(&nodes[0], at(15));
        assert_eq!(health(&table, 15), [ready, unknown, unknown, unknown]);
        assert_eq!(table.standing(&nodes[1], at(15)).down_for, Duration::ZERO);
        table.heard(&nodes[1], at(20));
        table.heard(&nodes[0], at(22));
        assert_eq!(health(&table, 30), [ready, ready, down, down], "they had time");
        // One that comes back by itself says nothing of the others.
        table.heard(&nodes[1], at(30));
        table.heard(&nodes[0], at(30));
        table.heard(&nodes[2], at(31));
        assert_eq!(health(&table, 31), [ready, ready, ready, down]);
    }

    #[test]
    fn how_long_a_node_has_been_down_is_known() {
        let start = Instant::now();
        let mut table = Table::new(Timing::default(), start);
        let (a, b) = (NodeId::from("a"), NodeId::from("b"));
        table.heard(&a, start);
        let down_for = |node, seconds| table.standing(node, start + Duration::from_secs(seconds)).down_for;
        assert_eq!(down_for(&a, 10), Duration::ZERO);
        assert_eq!(down_for(&a, 13), Duration::from_secs(3));
        assert_eq!(down_for(&b, 30), Duration::ZERO, "a new leader waits longer");
        assert_eq!(down_for(&b, 34), Duration::from_secs(4));
    }

    #[test]
    fn a_node_that_flaps_is_given_nothing_for_a_while() {
        let start = Instant::now();
        let mut table = Table::new(Timing::default(), start);
        let a = NodeId::from("a");
        table.heard(&a, start);
        // Down for a moment, again and again: tolerated twice, then longer and longer.
        let mut now = start;
        let mut returns = |table: &mut Table, pause: u64| {
            now += Duration::from_secs(pause);
            assert!(table.heard(&a, now), "it was down");
            let mut steady = now;
            while table.standing(&a, steady).health == Health::Unsteady {
                steady += Duration::from_secs(1);
                table.heard(&a, steady);
            }
            let held = steady - now;
            now = steady;
            held.as_secs()
        };
        let held: Vec<_> = (0..5).map(|_| returns(&mut table, 11)).collect();
        assert_eq!(held, [0, 0, 30, 60, 120]);
        assert_eq!(returns(&mut table, 601), 0, "long ago is forgotten");
    }

    #[test]
    fn large_clusters_are_heard_less_often() {
        let timing = Timing::default();
        assert_eq!(timing.period(10), Duration::from_secs(2));
        assert_eq!(timing.period(1250), Duration::from_millis(2500));
        assert_eq!(timing.period(5000), Duration::from_secs(10));
    }
}
