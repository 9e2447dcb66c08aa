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
        let mut table = self.table();
        table.heard.clear();
        table.since = Instant::now();
    }

    /// A node was heard.
    pub fn heard(&self, node: &NodeId) {
        let news = {
            let mut table = self.table();
            let patience = table.timing.patience(table.heard.len());
            let before = table.heard.insert(node.clone(), Instant::now());
            before.is_none_or(|before| before.elapsed() > patience)
        };
        if news {
            self.changes.send_replace(());
        }
    }

    /// How a node is.
    #[must_use]
    pub fn health(&self, node: &NodeId) -> Health {
        let table = self.table();
        let patience = table.timing.patience(table.heard.len());
        match table.heard.get(node) {
            Some(heard) if heard.elapsed() <= patience => Health::Ready,
            Some(_) => Health::Down,
            None if table.since.elapsed() <= patience * 2 => Health::Unknown,
            None => Health::Down,
        }
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

    #[tokio::test(start_paused = true)]
    async fn silence_means_down_and_a_new_leader_is_patient() {
        let liveness = Liveness::new(Timing::default());
        let (a, b) = (NodeId::from("a"), NodeId::from("b"));
        liveness.heard(&a);
        assert_eq!((liveness.health(&a), liveness.health(&b)), (Health::Ready, Health::Unknown));
        tokio::time::advance(Duration::from_secs(11)).await;
        assert_eq!((liveness.health(&a), liveness.health(&b)), (Health::Down, Health::Unknown));
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(liveness.health(&b), Health::Down);
        liveness.reset();
        assert_eq!((liveness.health(&a), liveness.health(&b)), (Health::Unknown, Health::Unknown));
    }

    #[test]
    fn large_clusters_are_heard_less_often() {
        let timing = Timing::default();
        assert_eq!(timing.period(10), Duration::from_secs(2));
        assert_eq!(timing.period(5000), Duration::from_secs(10));
    }
}
