//! What agents stream, and what the cluster's state says, as metrics.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use opentelemetry::KeyValue;
use tokio::time::Instant;
use warren_proto::v1;
use warren_telemetry::{Meters, Series, Source, build::BuildInfo};

use crate::{
    ids::NodeId,
    liveness::Liveness,
    metrics::ManagerMetrics,
    state::{ContainerState, State},
    store::Store,
};

#[derive(Debug)]
struct Snapshot {
    hostname: String,
    received: Instant,
    series: Vec<Series>,
}

#[derive(Debug, Default)]
struct Table {
    snapshots: HashMap<NodeId, Snapshot>,
    sessions: HashMap<NodeId, usize>,
}

/// The latest telemetry of every node. Snapshots are cumulative, so the latest is all there is to keep. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Collected {
    table: Arc<Mutex<Table>>,
}

impl Collected {
    fn table(&self) -> MutexGuard<'_, Table> {
        // Every change is one insertion: a panic leaves the table whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn opened(&self, node: &NodeId) {
        *self.table().sessions.entry(node.clone()).or_default() += 1;
    }

    pub(crate) fn closed(&self, node: &NodeId) {
        let mut table = self.table();
        if let Some(count) = table.sessions.get_mut(node) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                table.sessions.remove(node);
            }
        }
    }

    /// Takes a snapshot; false when it held series that are not in the table of metrics, which are left out.
    pub(crate) fn accept(&self, node: &NodeId, hostname: &str, snapshot: v1::TelemetrySnapshot) -> bool {
        let sent = snapshot.series.len();
        let series: Vec<_> = snapshot
            .series
            .into_iter()
            .filter_map(Series::from_proto)
            .map(|series| series.with_label("node", hostname))
            .collect();
        let known = series.len() == sent;
        let snapshot = Snapshot { hostname: hostname.to_owned(), received: Instant::now(), series };
        self.table().snapshots.insert(node.clone(), snapshot);
        known
    }

    fn sessions(&self) -> usize {
        self.table().sessions.len()
    }

    fn ages(&self) -> Vec<(String, f64)> {
        let table = self.table();
        table.snapshots.values().map(|s| (s.hostname.clone(), s.received.elapsed().as_secs_f64())).collect()
    }

    /// Forgets nodes that are no longer in the cluster.
    fn retain(&self, state: &State) {
        self.table().snapshots.retain(|node, _| state.node(node).is_some());
    }
}

/// What a node said longer ago than this is no longer exported: its gauges would look alive.
const STALE: Duration = Duration::from_secs(60);

/// What the leader exports of the agents; a follower exports nothing of them.
#[derive(Debug)]
struct AgentSeries {
    collected: Collected,
    store: Store,
}

impl Source for AgentSeries {
    fn collect(&self) -> Vec<Series> {
        if !leads(&self.store.raft().status()) {
            return Vec::new();
        }
        self.collected.retain(&self.store.view());
        let table = self.collected.table();
        // A node that was set up anew has another id and the same name; only one of the two can be exported.
        let mut newest = BTreeMap::<&str, &Snapshot>::new();
        for snapshot in table.snapshots.values().filter(|snapshot| snapshot.received.elapsed() < STALE) {
            let known = newest.entry(&snapshot.hostname).or_insert(snapshot);
            if known.received < snapshot.received {
                *known = snapshot;
            }
        }
        newest.values().flat_map(|snapshot| snapshot.series.clone()).collect()
    }
}

/// Exports everything that is read when someone scrapes.
pub(crate) fn export(
    meters: &Meters,
    store: &Store,
    collected: &Collected,
    liveness: &Liveness,
    metrics: &Arc<ManagerMetrics>,
) {
    meters.add_source(Arc::new(AgentSeries { collected: collected.clone(), store: store.clone() }));
    meters.add_source(Arc::new(BuildInfo));
    cluster_gauges(meters, store, liveness);
    raft_gauges(meters, store, metrics);

    let sessions = collected.clone();
    meters.gauge("warren_agent_sessions", move |gauge| gauge.observe(sessions.sessions() as f64, &[]));
    let ages = collected.clone();
    meters.gauge("warren_telemetry_age_seconds", move |gauge| {
        for (hostname, age) in ages.ages() {
            gauge.observe(age, &[KeyValue::new("node", hostname)]);
        }
    });
}

/// The state, on the leader: what is the cluster's and not a manager's is exported once, or sums would count it thrice.
fn led(store: &Store) -> Option<State> {
    leads(&store.raft().status()).then(|| store.view())
}

fn cluster_gauges(meters: &Meters, store: &Store, liveness: &Liveness) {
    let (state, health) = (store.clone(), liveness.clone());
    meters.gauge("warren_nodes_total", move |gauge| {
        let mut counts = BTreeMap::<(&str, &str), u32>::new();
        let Some(view) = led(&state) else { return };
        for node in view.nodes() {
            *counts.entry(("worker", health.health(&node.id).name())).or_default() += 1;
        }
        for member in state.raft().status().members {
            *counts.entry(("manager", if member.voter { "voter" } else { "learner" })).or_default() += 1;
        }
        for ((role, status), count) in counts {
            gauge.observe(count.into(), &[KeyValue::new("role", role), KeyValue::new("status", status)]);
        }
    });
    let state = store.clone();
    meters.gauge("warren_services_total", move |gauge| {
        led(&state).into_iter().for_each(|view| gauge.observe(view.services().count() as f64, &[]));
    });
    let state = store.clone();
    meters.gauge("warren_secrets_total", move |gauge| {
        let Some(view) = led(&state) else { return };
        let count = view.secrets().filter(|secret| secret.kind == v1::SecretKind::Secret).count();
        gauge.observe(count as f64, &[]);
    });
    let state = store.clone();
    meters.gauge("warren_volumes_total", move |gauge| {
        led(&state).into_iter().for_each(|view| gauge.observe(view.volumes().count() as f64, &[]));
    });
    let state = store.clone();
    meters.gauge("warren_containers_total", move |gauge| {
        let Some(view) = led(&state) else { return };
        let mut counts = BTreeMap::<ContainerState, u32>::new();
        for container in view.containers() {
            *counts.entry(container.status.state).or_default() += 1;
        }
        for state in ContainerState::ALL {
            let count = counts.get(&state).copied().unwrap_or(0);
            gauge.observe(count.into(), &[KeyValue::new("state", state.name())]);
        }
    });
    let state = store.clone();
    meters.gauge("warren_scheduling_pending", move |gauge| {
        let Some(view) = led(&state) else { return };
        gauge.observe(view.waiting().len() as f64, &[]);
    });
}

fn raft_gauges(meters: &Meters, store: &Store, metrics: &Arc<ManagerMetrics>) {
    let gauge = |name, read: fn(&warren_raft::Status) -> f64| {
        let store = store.clone();
        meters.gauge(name, move |gauge| gauge.observe(read(&store.raft().status()), &[]));
    };
    gauge("warren_raft_is_leader", |status| f64::from(u8::from(leads(status))));
    gauge("warren_raft_peers_total", |status| status.members.len() as f64);
    gauge("warren_raft_log_index", |status| status.last_log_index as f64);
    gauge("warren_raft_applied_index", |status| status.applied_index as f64);
    gauge("warren_raft_term", |status| status.term as f64);
    gauge("warren_raft_quorum_ok", |status| f64::from(u8::from(quorum_ok(status))));
    let lag = store.clone();
    meters.gauge("warren_raft_replication_lag_entries", move |gauge| {
        for (peer, entries) in lag.raft().status().lag {
            gauge.observe(entries as f64, &[KeyValue::new("peer", peer.to_string())]);
        }
    });
    let size = Arc::clone(metrics);
    meters.gauge("warren_raft_snapshot_size_bytes", move |gauge| gauge.observe(size.snapshot_size() as f64, &[]));
}

/// Whether this manager leads, as far as it can know: one that was cut off takes itself for the leader for as long as it is.
#[must_use]
pub(crate) fn leads(status: &warren_raft::Status) -> bool {
    status.is_leader && quorum_ok(status)
}

/// Whether writes can be made, as far as this manager knows: the leader was heard of lately or, on the leader, a majority was.
#[must_use]
pub(crate) fn quorum_ok(status: &warren_raft::Status) -> bool {
    /// As long as any profile waits before an election.
    const STALE: std::time::Duration = std::time::Duration::from_secs(10);
    let heard = if status.is_leader { status.quorum_age } else { status.leader_silent_for };
    status.failure.is_none() && status.leader.is_some() && heard.is_some_and(|age| age < STALE)
}
