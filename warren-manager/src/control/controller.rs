//! The leader's loop: reconciles and schedules whenever the state or the nodes' health changes, and from time to time
//! without a reason, as repair.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use opentelemetry::KeyValue;
use tokio_util::sync::CancellationToken;

use crate::{
    clock::{Environment, Timestamp},
    control::{
        liveness::{Health, LastSeen, Liveness},
        reconciler, scheduler,
    },
    ids::{ContainerId, NodeId, ServiceId},
    metrics::ManagerMetrics,
    state::{Change, ContainerChange, ContainerState, State},
    store::{self, Error, Store},
};

/// Looks again after this long even if nothing seems to have happened; also how often silence is noticed.
const REPAIR: Duration = Duration::from_secs(1);
/// What changes within this time is looked at together.
const DEBOUNCE: Duration = Duration::from_millis(1);

/// Everything is looked at again after this long, even if nothing seems to have happened to it.
const LOOK_AT_ALL: Duration = Duration::from_secs(30);

/// What must be looked at.
#[derive(Debug, PartialEq, Eq)]
enum Stale {
    All,
    Services(BTreeSet<ServiceId>),
}

/// What the last round looked at. With nothing seen yet, everything is news.
#[derive(Debug, Default)]
struct Seen {
    revision: u64,
    all_at: Option<Timestamp>,
    /// The services' versions.
    services: HashMap<ServiceId, u64>,
    /// The nodes' versions, and how they were.
    nodes: LastSeen<(u64, Health)>,
    /// When services are to be looked at again, whatever happens.
    due: BTreeMap<ServiceId, Timestamp>,
}

impl Seen {
    /// What must be looked at in this state, which is then the one that was seen.
    fn stale(&mut self, state: &State, health: impl Fn(&NodeId) -> Health, now: Timestamp) -> Stale {
        let since = std::mem::replace(&mut self.revision, state.revision());
        let nodes_changed = self.nodes.look(state, |node| (node.version, health(&node.id)), |_, _| {});
        let mut stale = BTreeSet::new();
        self.services.retain(|id, _| {
            let is_there = state.service(id).is_some();
            if !is_there {
                stale.insert(id.clone());
            }
            is_there
        });
        for service in state.services() {
            if self.services.insert(service.id.clone(), service.version) != Some(service.version) {
                stale.insert(service.id.clone());
            }
        }
        // A clock that was set back must not put it off for ever.
        let is_recent = |at: Timestamp| at <= now && now.since(at) < LOOK_AT_ALL;
        let changes = state.changes_since(since).filter(|_| !nodes_changed && self.all_at.is_some_and(is_recent));
        let Some(changes) = changes else {
            self.all_at = Some(now);
            return Stale::All;
        };
        stale.extend(changes.map(|(_, change)| match change {
            ContainerChange::Changed(container) => container.service.clone(),
            ContainerChange::Deleted(_, service) => service.clone(),
        }));
        stale.extend(self.due.iter().filter(|(_, at)| **at <= now).map(|(id, _)| id.clone()));
        Stale::Services(stale)
    }
}

/// Reconciles and schedules while this manager leads.
#[derive(Debug)]
pub(crate) struct Controller {
    store: Store,
    liveness: Liveness,
    metrics: Arc<ManagerMetrics>,
    environment: Arc<dyn Environment>,
}

impl Controller {
    /// A controller of this manager's store.
    #[must_use]
    pub(crate) fn new(
        store: Store,
        liveness: Liveness,
        metrics: Arc<ManagerMetrics>,
        environment: Arc<dyn Environment>,
    ) -> Self {
        Self { store, liveness, metrics, environment }
    }

    /// Runs until `shutdown`.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let mut state = self.store.watch();
        let mut health = self.liveness.watch();
        let mut led = false;
        let mut seen = Seen::default();
        loop {
            let status = self.store.raft().status();
            let is_cut_off = status.is_leader && status.quorum_age.is_some() && !store::quorum_ok(&status);
            if is_cut_off {
                // No session is kept, and nobody heard: nodes have as long to come back as after an election.
                self.liveness.reset();
            }
            let mut leads = status.is_leader && !is_cut_off;
            if leads && !led {
                // What its predecessor did may not have reached this manager's state yet: a plan without it would do it again.
                leads = self.store.read().await.is_ok();
                self.liveness.reset();
                seen = Seen::default();
            }
            led = leads;
            state.mark_unchanged();
            let pause = if leads { self.cycle(&mut seen).await } else { REPAIR };
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = state.changed() => if changed.is_err() { return },
                _ = health.changed() => {}
                () = tokio::time::sleep(pause) => {}
            }
            tokio::time::sleep(DEBOUNCE).await;
        }
    }

    /// One round; returns how long it may wait for the next.
    async fn cycle(&self, seen: &mut Seen) -> Duration {
        let began = Instant::now();
        let outcome = self.reconcile(seen).await;
        if outcome.is_err() {
            // What was planned may not have been done.
            *seen = Seen::default();
        }
        self.metrics.reconciliations.add(1);
        self.metrics.reconciliation_duration.record(began.elapsed().as_secs_f64());
        let scheduled = match outcome {
            Ok(pause) => self.schedule().await.map(|()| pause),
            Err(error) => Err(error),
        };
        scheduled.unwrap_or_else(|error| {
            tracing::warn!(%error, "the state could not be changed; trying again");
            REPAIR
        })
    }

    async fn reconcile(&self, seen: &mut Seen) -> Result<Duration, Error> {
        let (state, now) = (self.store.view(), self.environment.now());
        self.liveness.keep_only(&state);
        let standing = |node: &NodeId| self.liveness.standing(node);
        let plan = match seen.stale(&state, |node| self.liveness.health(node), now) {
            Stale::All => {
                seen.due.clear();
                reconciler::plan(&state, standing, now)
            }
            Stale::Services(services) => {
                seen.due.retain(|id, _| !services.contains(id));
                reconciler::plan_some(&state, &services, standing, now)
            }
        };
        seen.due.extend(plan.wakes);
        let mut changes = plan.changes;
        for creation in &plan.create {
            if creation.replaces {
                let service = creation.service.spec.name.clone();
                self.metrics.restarts.add(1, &[KeyValue::new("service", service)]);
            }
            changes.push(creation.change(ContainerId::generate(&*self.environment), now));
        }
        self.store.transact_each(changes).await?;
        let until_due = seen.due.values().min().map_or(REPAIR, |at| at.since(now));
        Ok(until_due.min(REPAIR))
    }

    async fn schedule(&self) -> Result<(), Error> {
        let state = self.store.view();
        let plan = scheduler::plan(&state, |node| self.liveness.health(node));
        let batch = plan.assignments.len() + plan.refusals.len();
        if batch == 0 {
            return Ok(());
        }
        self.metrics.scheduling_batch.record(batch as f64);
        let at = self.environment.now();
        let assignments =
            plan.assignments.iter().map(|(id, node)| Change::Assign { id: id.clone(), node: node.clone(), at });
        let new_refusals: Vec<_> =
            plan.refusals.iter().filter(|(id, message, _)| is_news(&state, id, message)).collect();
        let refusals =
            new_refusals.iter().map(|(id, message, _)| Change::Refuse { id: id.clone(), message: message.clone(), at });
        self.store.transact_each(assignments.chain(refusals).collect()).await?;

        for (id, _) in &plan.assignments {
            self.metrics.scheduled.add(1);
            self.decided("placed", "none");
            if let Some(container) = state.container(id) {
                self.metrics.scheduling_latency.record(at.since(container.created_at).as_secs_f64());
            }
        }
        for (_, _, reason) in new_refusals {
            self.metrics.placements_failed.add(1, &[]);
            self.decided("refused", reason.map_or("no_nodes", scheduler::Refusal::label));
        }
        Ok(())
    }

    fn decided(&self, result: &'static str, reason: &'static str) {
        let labels = [KeyValue::new("reason", reason), KeyValue::new("result", result)];
        self.metrics.scheduling_decisions.add(1, &labels);
    }
}

/// Whether a refusal says something that the container's status does not say yet.
fn is_news(state: &State, id: &ContainerId, message: &str) -> bool {
    state.container(id).is_some_and(|container| {
        container.status.state != ContainerState::Pending || container.status.message != message
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::{apply, container, founded, node, observe, put, service};

    #[test]
    fn only_what_something_has_happened_to_is_looked_at() {
        let mut state = founded();
        let (web, db) = (service("w", "web", 1), service("d", "db", 1));
        apply(
            &mut state,
            [
                Change::PutNode(Box::new(node("n", 1, 1))),
                put(web.clone()),
                put(db.clone()),
                Change::CreateContainer(Box::new(container("c", &web, 1, 1))),
                Change::Assign { id: "c".into(), node: "n".into(), at: Timestamp(1) },
            ],
        );
        let mut seen = Seen::default();
        let mut look = |state: &State, health, seconds: u64| seen.stale(state, |_| health, Timestamp(seconds * 1000));
        let some = |ids: &[&str]| Stale::Services(ids.iter().map(|id| ServiceId::from(*id)).collect());
        assert_eq!(look(&state, Health::Ready, 100), Stale::All);
        assert_eq!(look(&state, Health::Ready, 101), some(&[]));
        apply(&mut state, [observe("c", "n", ContainerState::Running, 5)]);
        assert_eq!(look(&state, Health::Ready, 102), some(&["w"]));
        apply(&mut state, [put(service("d", "db", 2))]);
        assert_eq!(look(&state, Health::Ready, 103), some(&["d"]));
        apply(
            &mut state,
            [Change::DeleteService { id: "w".into(), expected: crate::state::Expected::Any, ports_stay: true }],
        );
        assert_eq!(look(&state, Health::Ready, 104), some(&["w"]));
        assert_eq!(look(&state, Health::Down, 105), Stale::All, "a node went");
        assert_eq!(look(&state, Health::Down, 106), some(&[]));
        assert_eq!(look(&state, Health::Down, 135), Stale::All, "it is time");
        assert_eq!(look(&state, Health::Down, 10), Stale::All, "the clock was set back");
        let mut due = Seen { due: BTreeMap::from([("d".into(), Timestamp(7))]), ..Seen::default() };
        due.stale(&state, |_| Health::Ready, Timestamp(1));
        assert_eq!(due.stale(&state, |_| Health::Ready, Timestamp(6)), some(&[]));
        assert_eq!(due.stale(&state, |_| Health::Ready, Timestamp(7)), some(&["d"]));
    }
}
