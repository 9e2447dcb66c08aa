//! Status reports, put together so that many containers' news is one log entry.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::Notify;
use warren_proto::v1;

use crate::{
    convert,
    ids::{ContainerId, NodeId},
    state::{Change, Status},
    store::Store,
};

/// News waits this long for more of it; while it is written, more comes together by itself.
const QUIET: Duration = Duration::from_millis(1);
/// Before trying again what consensus would not take.
const RETRY: Duration = Duration::from_millis(500);

/// By who reports, and of which container: nobody's report takes the place of another's.
type Pending = HashMap<(NodeId, ContainerId), Status>;

/// Collects reports, the latest of each container, and writes them.
#[derive(Clone, Debug)]
pub(super) struct Reports {
    pending: Arc<Mutex<Pending>>,
    news: Arc<Notify>,
}

impl Reports {
    /// Begins to write what is added; ends when the last clone is gone.
    pub(super) fn start(store: Store) -> Self {
        let reports = Self { pending: Arc::default(), news: Arc::default() };
        let (pending, news) = (Arc::downgrade(&reports.pending), Arc::clone(&reports.news));
        tokio::spawn(async move {
            loop {
                news.notified().await;
                tokio::time::sleep(QUIET).await;
                let Some(pending) = pending.upgrade() else { return };
                let taken = std::mem::take(&mut *pending.lock().unwrap_or_else(PoisonError::into_inner));
                if taken.is_empty() || !store.raft().status().is_leader {
                    // The agent reports anew to whoever leads.
                    continue;
                }
                if let Err(error) = store.transact_each(changes(&store, &taken)).await {
                    tracing::warn!(%error, "agents' reports could not be written; trying again");
                    tokio::time::sleep(RETRY).await;
                    let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
                    for (whose, status) in taken {
                        pending.entry(whose).or_insert(status);
                    }
                    news.notify_one();
                }
            }
        });
        reports
    }

    /// Takes a node's report; `clock_shift` makes its times the leader's, in milliseconds.
    pub(super) fn add(&self, node: &NodeId, report: v1::StatusReport, clock_shift: i64) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        for reported in report.statuses {
            if let Some(mut status) = reported.status.and_then(convert::observed_status) {
                status.changed_at = status.changed_at.shifted(clock_shift);
                status.started_at = status.started_at.map(|at| at.shifted(clock_shift));
                status.finished_at = status.finished_at.map(|at| at.shifted(clock_shift));
                pending.insert((node.clone(), ContainerId::from(reported.container_id)), status);
            }
        }
        self.news.notify_one();
    }
}

/// What of the reports is news: repeating the known costs no log entry.
fn changes(store: &Store, pending: &Pending) -> Vec<Change> {
    let state = store.view();
    let is_news = |node: &NodeId, id: &ContainerId, status: &Status| {
        state.container(id).is_some_and(|known| {
            known.node.as_ref() == Some(node) && known.status != *status && status.state >= known.status.state
        })
    };
    let news = pending.iter().filter(|((node, id), status)| is_news(node, id, status));
    news.map(|((node, id), status)| Change::Observe {
        id: id.clone(),
        node: node.clone(),
        status: Box::new(status.clone()),
    })
    .collect()
}
