//! What agents stream, and what the cluster's state says, as metrics.

pub(crate) mod feed;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use opentelemetry::KeyValue;
use tokio::time::Instant;
use warren_proto::v1;
use warren_telemetry::{Key, Measurement, Meters, Series, Source, build::BuildInfo, series};

use crate::{
    control::liveness::{CONDITIONS, Health, Liveness},
    ids::NodeId,
    messages::convert,
    metrics::ManagerMetrics,
    state::{ContainerState, Desired, State},
    store::{Store, quorum_ok},
};

#[derive(Debug)]
struct Snapshot {
    hostname: String,
    received: Instant,
    session: SessionNumber,
    series: HashMap<Key, Measurement>,
    /// Bytes that they take, about.
    weight: usize,
}

/// Bytes that a node's series may take, about: some tens of thousands of counters, or several thousand histograms.
const MAX_WEIGHT: usize = 16 << 20;

/// Why a snapshot was not taken, or not all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotAccepted {
    /// It holds series that are not in the table of metrics, or it is of no use: a newer session has begun, or it is incremental and there
    /// is nothing that it adds to.
    Unknown,
    /// The node has more series than are kept of one.
    TooMuch,
}

impl Snapshot {
    /// Takes series, as long as there is room; whether there was for all.
    fn add(&mut self, series: impl Iterator<Item = Series>) -> bool {
        let mut room = true;
        for series in series {
            let (key, value) = series.into_entry();
            let weight = series::weight((&key, &value));
            let before = self.series.get(&key).map_or(0, |known| series::weight((&key, known)));
            if self.weight - before + weight > MAX_WEIGHT {
                room = false;
                continue;
            }
            self.weight = self.weight - before + weight;
            self.series.insert(key, value);
        }
        room
    }
}

/// Later sessions have higher ones.
pub(crate) type SessionNumber = u64;

#[derive(Debug, Default)]
struct Table {
    snapshots: HashMap<NodeId, Snapshot>,
    sessions: HashMap<NodeId, usize>,
    next_session: SessionNumber,
}

/// The latest telemetry of every node. Values are cumulative, so the latest is all there is to keep. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Collected {
    table: Arc<Mutex<Table>>,
}

impl Collected {
    fn table(&self) -> MutexGuard<'_, Table> {
        // Every change is one insertion: a panic leaves the table whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session with a node begins; its number.
    pub(crate) fn opened(&self, node: &NodeId) -> SessionNumber {
        let mut table = self.table();
        *table.sessions.entry(node.clone()).or_default() += 1;
        table.next_session += 1;
        table.next_session
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

    /// Takes a snapshot that came in a session.
    ///
    /// # Errors
    ///
    /// When it is of no use, or some series were left out.
    pub(crate) fn accept(
        &self,
        session: SessionNumber,
        node: &NodeId,
        hostname: &str,
        snapshot: v1::TelemetrySnapshot,
    ) -> Result<(), NotAccepted> {
        let sent = snapshot.series.len();
        let known = snapshot.series.into_iter().filter_map(Series::from_proto);
        let series: Vec<_> = known.map(|series| series.with_label("node", hostname)).collect();
        let all_known = series.len() == sent;
        let series = series.into_iter();
        let received = Instant::now();
        let mut table = self.table();
        let room = match table.snapshots.get_mut(node) {
            Some(before) if before.session > session => return Err(NotAccepted::Unknown),
            Some(before) if snapshot.incremental && before.session == session => {
                before.received = received;
                before.add(series)
            }
            _ if snapshot.incremental => return Err(NotAccepted::Unknown),
            _ => {
                let hostname = hostname.to_owned();
                let mut snapshot = Snapshot { hostname, received, session, series: HashMap::new(), weight: 0 };
                let room = snapshot.add(series);
                table.snapshots.insert(node.clone(), snapshot);
                room
            }
        };
        match (room, all_known) {
            (false, _) => Err(NotAccepted::TooMuch),
            (true, false) => Err(NotAccepted::Unknown),
            (true, true) => Ok(()),
        }
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
        newest.values().flat_map(|snapshot| &snapshot.series).map(Series::of_entry).collect()
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
    let (state, health) = (store.clone(), liveness.clone());
    meters.gauge("warren_node_condition", move |gauge| {
        let Some(view) = led(&state) else { return };
        for node in view.nodes() {
            let holding: Vec<_> = health.conditions(&node.id).into_iter().map(|condition| condition.kind).collect();
            for condition in CONDITIONS {
                let holds = holding.iter().any(|kind| kind == condition);
                let labels =
                    [KeyValue::new("node", node.description.hostname.clone()), KeyValue::new("condition", condition)];
                gauge.observe(f64::from(u8::from(holds)), &labels);
            }
        }
    });
    let (state, health) = (store.clone(), liveness.clone());
    meters.gauge("warren_service_containers", move |gauge| {
        let Some(view) = led(&state) else { return };
        for service in view.services() {
            let is_down = |node: &NodeId| health.health(node) == Health::Down;
            let running = || {
                view.containers_of(&service.id).filter(|container| {
                    container.status.state == ContainerState::Running
                        && container.desired == Desired::Running
                        && !container.node.as_ref().is_some_and(is_down)
                })
            };
            let ready = running().filter(|container| container.status.serves()).count();
            for (state, count) in [
                ("desired", convert::desired(service, &view) as usize),
                ("running", running().count()),
                ("ready", ready),
            ] {
                let labels = [KeyValue::new("service", service.spec.name.clone()), KeyValue::new("state", state)];
                gauge.observe(count as f64, &labels);
            }
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

/// Who leads, as far as this manager can know: not itself, and nobody else, without a majority or a word of them.
#[must_use]
pub(crate) fn leader(status: &warren_raft::Status) -> Option<u64> {
    status.leader.filter(|_| quorum_ok(status))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(counts: &[(&str, u64)], incremental: bool) -> v1::TelemetrySnapshot {
        let series = counts.iter().map(|(program, count)| v1::Series {
            metric: "warren_probe_runs_total".to_owned(),
            labels: [("program".to_owned(), (*program).to_owned())].into(),
            value: Some(v1::series::Value::Counter(*count)),
        });
        v1::TelemetrySnapshot { series: series.collect(), incremental, ..Default::default() }
    }

    /// What is known of each program.
    fn known(collected: &Collected, node: &NodeId) -> BTreeMap<String, f64> {
        let table = collected.table();
        let series = table.snapshots[node].series.iter();
        let counts = series.map(|((_, labels), value)| {
            let Measurement::Counter(count) = value else { panic!("{value:?}") };
            let program = labels.iter().find(|(label, _)| label == "program").expect("it has one");
            (program.1.clone(), *count)
        });
        counts.collect()
    }

    #[test]
    fn increments_add_to_what_their_own_session_said() {
        let (collected, node) = (Collected::default(), NodeId::from("n"));
        let accept = |session, snapshot| collected.accept(session, &node, "host", snapshot).is_ok();
        let is = |counts: &[(&str, f64)]| {
            let expected = counts.iter().map(|(program, count)| ((*program).to_owned(), *count)).collect();
            assert_eq!(known(&collected, &node), expected);
        };
        let first = collected.opened(&node);
        assert!(!accept(first, snapshot(&[("a", 1)], true)), "there is nothing yet that it adds to");
        assert!(accept(first, snapshot(&[("a", 1), ("b", 1)], false)));
        assert!(accept(first, snapshot(&[("b", 2), ("c", 1)], true)));
        is(&[("a", 1.0), ("b", 2.0), ("c", 1.0)]);
        let second = collected.opened(&node);
        assert!(!accept(second, snapshot(&[("a", 5)], true)), "what it adds to was said to another");
        assert!(accept(second, snapshot(&[("a", 4)], false)));
        is(&[("a", 4.0)]);
        // What is left of a session that another has replaced comes too late.
        assert!(!accept(first, snapshot(&[("a", 3)], true)));
        assert!(!accept(first, snapshot(&[("a", 3)], false)));
        is(&[("a", 4.0)]);
        assert!(!accept(second, v1::TelemetrySnapshot { series: vec![v1::Series::default()], ..snapshot(&[], true) }));
        is(&[("a", 4.0)]);
    }

    #[test]
    fn a_node_has_room_for_so_many_series() {
        let (collected, node) = (Collected::default(), NodeId::from("n"));
        let session = collected.opened(&node);
        let names: Vec<_> = (0..20_000).map(|number| format!("{number:0200}")).collect();
        let counts =
            |range: std::ops::Range<usize>| names[range].iter().map(|name| (name.as_str(), 1)).collect::<Vec<_>>();
        let accept = |counts: &[(&str, u64)], incremental| {
            collected.accept(session, &node, "host", snapshot(counts, incremental))
        };
        assert_eq!(accept(&counts(0..20_000), false), Ok(()));
        let weight = || collected.table().snapshots[&node].weight;
        let whole = weight();
        assert!((4 << 20..MAX_WEIGHT).contains(&whole), "{whole}");
        assert_eq!(accept(&counts(0..100), true), Ok(()));
        assert_eq!(weight(), whole, "what is known takes no more room");
        let more: Vec<_> = (0..100_000).map(|number| format!("more-{number:0200}")).collect();
        let more: Vec<_> = more.iter().map(|name| (name.as_str(), 1)).collect();
        assert_eq!(accept(&more, true), Err(NotAccepted::TooMuch));
        assert!(weight() <= MAX_WEIGHT, "{}", weight());
        assert!(known(&collected, &node).contains_key(&names[0]), "those before stay");
        assert_eq!(accept(&counts(0..1), true), Ok(()), "and go on");
    }
}
