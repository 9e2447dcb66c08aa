//! Which nodes are alive. Kept in the leader's memory and never in Raft: an idle cluster writes nothing.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::Instant};

use crate::ids::NodeId;

/// How a node is, as far as its leader knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Nothing was heard of it since this manager began to lead, and it is too early to call it down.
    Unknown,
    /// It is heard of.
    Ready,
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
            Self::Down => "down",
        }
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
}

impl Default for Timing {
    fn default() -> Self {
        Self { heartbeat: Duration::from_secs(2), tolerated: 5, max_rate: 500 }
    }
}

impl Timing {
    /// The period for this many nodes.
    #[must_use]
    pub fn period(&self, nodes: usize) -> Duration {
        let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
        self.heartbeat.max(Duration::from_secs(1) * (nodes / self.max_rate.max(1)))
    }

    fn patience(&self, nodes: usize) -> Duration {
        self.period(nodes) * self.tolerated
    }
}

#[derive(Debug)]
struct Table {
    timing: Timing,
    heard: HashMap<NodeId, Instant>,
    since: Instant,
}

impl Table {
    fn reset(&mut self, now: Instant) {
        self.heard.clear();
        self.since = now;
    }

    /// A node was heard; whether that is news.
    fn heard(&mut self, node: &NodeId, now: Instant) -> bool {
        let patience = self.timing.patience(self.heard.len());
        let before = self.heard.insert(node.clone(), now);
        before.is_none_or(|before| now - before > patience)
    }

    fn health(&self, node: &NodeId, now: Instant) -> Health {
        let patience = self.timing.patience(self.heard.len());
        match self.heard.get(node) {
            Some(heard) if now - *heard <= patience => Health::Ready,
            Some(_) => Health::Down,
            None if now - self.since <= patience * 2 => Health::Unknown,
            None => Health::Down,
        }
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
        let table = Table { timing, heard: HashMap::new(), since: Instant::now() };
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

    /// How a node is.
    #[must_use]
    pub fn health(&self, node: &NodeId) -> Health {
        self.table().health(node, Instant::now())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_means_down_and_a_new_leader_is_patient() {
        let start = Instant::now();
        let mut table = Table { timing: Timing::default(), heard: HashMap::new(), since: start };
        let (a, b) = (NodeId::from("a"), NodeId::from("b"));
        assert!(table.heard(&a, start));
        let at = |seconds| start + Duration::from_secs(seconds);
        let health = |table: &Table, now| (table.health(&a, now), table.health(&b, now));
        assert_eq!(health(&table, at(10)), (Health::Ready, Health::Unknown));
        assert_eq!(health(&table, at(11)), (Health::Down, Health::Unknown));
        assert_eq!(health(&table, at(21)), (Health::Down, Health::Down));
        assert!(table.heard(&a, at(21)), "it was down");
        assert!(!table.heard(&a, at(22)), "it was not");
        table.heard(&b, at(22));
        assert_eq!(health(&table, at(22)), (Health::Ready, Health::Ready));
        table.reset(at(23));
        assert_eq!(health(&table, at(23)), (Health::Unknown, Health::Unknown));
    }

    #[test]
    fn large_clusters_are_heard_less_often() {
        let timing = Timing::default();
        assert_eq!(timing.period(10), Duration::from_secs(2));
        assert_eq!(timing.period(5000), Duration::from_secs(10));
    }
}
