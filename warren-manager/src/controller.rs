//! The leader's loop: reconciles and schedules whenever the state or the nodes' health changes, and from time to time
//! without a reason, as repair.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use opentelemetry::KeyValue;
use tokio_util::sync::CancellationToken;

use crate::{
    clock::Environment,
    ids::ContainerId,
    liveness::Liveness,
    metrics::ManagerMetrics,
    reconciler, scheduler,
    state::{Change, ContainerState, State},
    store::{Error, Store},
};

/// Looks again after this long even if nothing seems to have happened; also how often silence is noticed.
const REPAIR: Duration = Duration::from_secs(1);
/// What changes within this time is looked at together.
const DEBOUNCE: Duration = Duration::from_millis(1);

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
        loop {
            let mut leads = self.store.raft().status().is_leader;
            if leads && !led {
                // What its predecessor did may not have reached this manager's state yet: a plan without it would do it again.
                leads = self.store.read().await.is_ok();
                self.liveness.reset();
            }
            led = leads;
            state.mark_unchanged();
            let pause = if leads { self.cycle().await } else { REPAIR };
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
    async fn cycle(&self) -> Duration {
        let began = Instant::now();
        let outcome = self.reconcile().await;
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

    async fn reconcile(&self) -> Result<Duration, Error> {
        let now = self.environment.now();
        let plan = reconciler::plan(&self.store.view(), |node| self.liveness.standing(node), now);
        let mut changes = plan.changes;
        for creation in &plan.create {
            if creation.replaces {
                let service = creation.service.spec.name.clone();
                self.metrics.restarts.add(1, &[KeyValue::new("service", service)]);
            }
            changes.push(creation.change(ContainerId::generate(&*self.environment), now));
        }
        self.store.transact_each(changes).await?;
        let until_due = plan.wake_at.map_or(REPAIR, |at| at.since(now));
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
