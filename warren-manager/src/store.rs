//! The way to the state: views to read, transactions to write.

use std::{fmt, sync::Arc, time::Instant};

use tokio::sync::watch;
use tracing::Instrument as _;
use warren_raft::Node;

use crate::{
    caller::Caller,
    clock::{Environment, Timestamp},
    metrics::ManagerMetrics,
    state::{self, Change, Origin, Rejection, Reply, State, Transaction},
};

/// Changes in one log entry, and their bytes; more are split.
const MAX_CHANGES: usize = 200;
const MAX_BYTES: usize = 1 << 20;

/// Why nothing was read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Consensus was not to be had.
    #[error(transparent)]
    Raft(#[from] warren_raft::Error),
    /// The state did not allow it.
    #[error("{0}")]
    Rejected(Rejection),
    /// The command or its reply could not be encoded.
    #[error("a transaction could not be encoded: {0}")]
    Encoding(#[from] serde_json::Error),
}

/// Reads and writes the cluster's state. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    node: Node,
    view: watch::Receiver<State>,
    metrics: Arc<ManagerMetrics>,
    environment: Arc<dyn Environment>,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl Store {
    /// A store of this manager's copy of the state.
    #[must_use]
    pub fn new(
        node: Node,
        view: watch::Receiver<State>,
        metrics: Arc<ManagerMetrics>,
        environment: Arc<dyn Environment>,
    ) -> Self {
        Self { node, view, metrics, environment }
    }

    /// This manager's part in consensus.
    #[must_use]
    pub fn raft(&self) -> &Node {
        &self.node
    }

    /// The state as this manager has it now, which may be behind the leader's.
    #[must_use]
    pub fn view(&self) -> State {
        self.view.borrow().clone()
    }

    /// The state with every write that was acknowledged before this call.
    ///
    /// # Errors
    ///
    /// When this manager does not lead or no majority answers.
    pub async fn read(&self) -> Result<State, Error> {
        self.node.linearize().await?;
        Ok(self.view())
    }

    /// The time of day.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        self.environment.now()
    }

    /// Follows the state.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<State> {
        self.view.clone()
    }

    /// Makes a transaction durable, and returns the revision it made. It is all done or nothing. What is done to answer a call is
    /// noted as done by the caller.
    ///
    /// # Errors
    ///
    /// When it was rejected, or consensus was not to be had.
    pub async fn transact(&self, transaction: &Transaction) -> Result<u64, Error> {
        let command = match Caller::current().filter(|_| transaction.origin.is_none()) {
            Some(caller) => {
                let origin = Some(Origin { actor: caller.actor(), at: self.environment.now() });
                state::encode(&Transaction { origin, ..transaction.clone() }, self.view().schema())?
            }
            None => state::encode(transaction, self.view().schema())?,
        };
        let span = tracing::info_span!("propose", changes = transaction.changes.len());
        let began = Instant::now();
        let proposed = self.node.propose(command).instrument(span).await;
        self.metrics.commit_duration.record(began.elapsed().as_secs_f64());
        serde_json::from_str::<Reply>(&proposed?)?.map_err(Error::Rejected)
    }

    /// Makes changes that do not depend on one another: each succeeds or is moot by itself.
    ///
    /// # Errors
    ///
    /// When consensus was not to be had. Rejected changes are logged and left: whoever planned them plans again.
    pub async fn transact_each(&self, changes: Vec<Change>) -> Result<(), Error> {
        let mut batches = batches(changes)?;
        batches.reverse();
        let mut are_looked_at = false;
        while let Some(mut changes) = batches.pop() {
            if are_looked_at {
                self.keep_possible(&mut changes);
            }
            if changes.is_empty() {
                continue;
            }
            match self.transact(&Transaction { changes: changes.clone(), ..Transaction::default() }).await {
                Ok(_) => {}
                // Something has changed since they were planned, a service's removal for one: what that makes moot is left out.
                Err(Error::Rejected(_)) if changes.len() > 1 && !are_looked_at => {
                    are_looked_at = true;
                    batches.push(changes);
                }
                // One of them still stands in the way: find it by halves.
                Err(Error::Rejected(_)) if changes.len() > 1 => {
                    let (left, right) = changes.split_at(changes.len() / 2);
                    batches.push(right.to_vec());
                    batches.push(left.to_vec());
                }
                Err(Error::Rejected(rejection)) => {
                    tracing::debug!(%rejection, "a planned change is no longer wanted");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Store {
    /// Leaves out what the state as it is now would reject.
    fn keep_possible(&self, changes: &mut Vec<Change>) {
        let mut state = self.view();
        changes.retain(|change| {
            let transaction = Transaction { changes: vec![change.clone()], ..Transaction::default() };
            state.apply(state.revision() + 1, &transaction).is_ok()
        });
    }
}

/// Splits changes into what one log entry takes. A change that is larger by itself goes alone.
fn batches(changes: Vec<Change>) -> Result<Vec<Vec<Change>>, serde_json::Error> {
    let mut batches: Vec<Vec<Change>> = Vec::new();
    let mut bytes = usize::MAX;
    for change in changes {
        let size = serde_json::to_vec(&change)?.len();
        match batches.last_mut() {
            Some(batch) if batch.len() < MAX_CHANGES && bytes.saturating_add(size) <= MAX_BYTES => {
                bytes += size;
                batch.push(change);
            }
            _ => {
                bytes = size;
                batches.push(vec![change]);
            }
        }
    }
    Ok(batches)
}

/// Whether writes can be made, as far as this manager knows: the leader was heard of lately or, on the leader, a majority was.
#[must_use]
pub(crate) fn quorum_ok(status: &warren_raft::Status) -> bool {
    /// As long as any profile waits before an election.
    const STALE: std::time::Duration = std::time::Duration::from_secs(10);
    let heard = if status.is_leader { status.quorum_age } else { status.leader_silent_for };
    status.failure.is_none() && status.leader.is_some() && heard.is_some_and(|age| age < STALE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::ContainerId;

    #[test]
    fn entries_are_bounded_in_changes_and_bytes() {
        let change = |len: usize| Change::Remove { id: ContainerId::from("x".repeat(len)) };
        let sizes = |changes: Vec<Change>| {
            let batches = batches(changes).expect("encodes");
            batches.iter().map(Vec::len).collect::<Vec<_>>()
        };
        assert_eq!(sizes(vec![]), [0usize; 0]);
        assert_eq!(sizes(vec![change(10); 450]), [200, 200, 50]);
        assert_eq!(sizes(vec![change(MAX_BYTES / 3); 4]), [2, 2]);
        assert_eq!(sizes(vec![change(3 * MAX_BYTES), change(1)]), [1, 1]);
    }
}
