//! Managers in consensus: they enter, are given votes, and are let go.

use std::{sync::Arc, time::Duration};

use super::{Cluster, joining::too_old};
use crate::{
    api::Error,
    caller::Caller,
    messages::validate::Invalid,
    state::{Change, Manager, OLDEST_WRITTEN_SCHEMA, State},
    store,
};

/// How long a leader that is to go waits for its successor.
const HAND_OVER_PATIENCE: Duration = Duration::from_secs(5);
/// How long a leader waits to hear of those that would be left.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);

/// Of the voters that would be left without one: how many answer this leader, and how many there are.
fn left_without(status: &warren_raft::Status, id: u64) -> (usize, usize) {
    let left = || status.members.iter().filter(|member| member.voter && member.id != id);
    (left().filter(|member| status.answers(member.id)).count(), left().count())
}

impl Cluster {
    pub(super) async fn enter(&self, caller: &Caller, address: &str) -> Result<(), Error> {
        let id: u64 = caller.id.parse().map_err(|_| Error::Refused("a manager's id is a number".to_owned()))?;
        let state = self.0.store.read().await?;
        let Some(manager) = state.manager(id) else {
            return Err(Error::Refused(format!("manager {id} is not in this cluster")));
        };
        warren_pki::check_address(address).map_err(|error| Invalid::new("address", error.to_string()))?;
        let raft = self.0.store.raft();
        // What is started need not be what has joined. Of the oldest schema are managers that do not know the question.
        if state.schema() > OLDEST_WRITTEN_SCHEMA {
            match raft.reads_at(address).await {
                Some(reads) if reads < state.schema() => {
                    return Err(too_old(&format!("manager {id}"), reads, state.schema()));
                }
                Some(_) => {}
                None => {
                    return Err(Error::Precondition(format!(
                        "manager {id} does not say at {address} which schema it reads"
                    )));
                }
            }
        }
        let entered =
            if manager.voter { raft.add_voter(id, address).await } else { raft.add_learner(id, address).await };
        entered.map_err(store::Error::from)?;
        tracing::info!(manager = id, address, "a manager takes part");
        Ok(())
    }

    /// Whether a manager may go, or lose its vote. One that leads hands over first; then its successor is to be asked again.
    pub(super) async fn let_go(&self, id: u64) -> Result<(), Error> {
        let raft = self.0.store.raft();
        let deadline = tokio::time::Instant::now() + ANSWER_PATIENCE;
        let status = loop {
            let status = raft.status();
            let (answer, all) = left_without(&status, id);
            if all == 0 {
                return Err(Error::Precondition(format!("manager {id} is the only one that votes")));
            }
            let is_voter = status.members.iter().any(|member| member.id == id && member.voter);
            if !is_voter || !status.is_leader || answer > all / 2 {
                break status;
            }
            // Who has just begun to lead has not heard everybody yet.
            if tokio::time::Instant::now() > deadline {
                return Err(Error::Precondition(format!(
                    "of the {all} managers that would be left to vote {answer} can be reached, which is no majority"
                )));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        if id != status.id {
            return Ok(());
        }
        raft.hand_over().await.map_err(store::Error::from)?;
        let deadline = tokio::time::Instant::now() + HAND_OVER_PATIENCE;
        while raft.status().is_leader && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Err(Error::Store(store::Error::Raft(warren_raft::Error::NotLeader { leader: raft.status().leader })))
    }

    pub(super) fn manager(state: &State, id: u64) -> Result<&Arc<Manager>, Error> {
        state.manager(id).ok_or_else(|| Error::NotFound { kind: "manager", name: id.to_string() })
    }

    pub(super) async fn remove(&self, id: u64) -> Result<(), Error> {
        let state = self.0.store.read().await?;
        Self::manager(&state, id)?;
        self.let_go(id).await?;
        self.0.store.raft().remove(id).await.map_err(store::Error::from)?;
        self.change(vec![Change::RemoveManager { id }]).await?;
        tracing::info!(manager = id, "a manager was removed");
        Ok(())
    }

    pub(super) async fn set_voter(&self, id: u64, voter: bool) -> Result<(), Error> {
        let state = self.0.store.read().await?;
        let known = Self::manager(&state, id)?;
        if !voter {
            self.let_go(id).await?;
        }
        // What it is to be comes first: should this manager end in between, the leader makes it so.
        if known.voter != voter {
            self.change(vec![Change::SetManager { id, voter }]).await?;
        }
        let raft = self.0.store.raft();
        let member = raft.status().members.into_iter().find(|member| member.id == id);
        let changed = match member {
            Some(member) if voter && !member.voter => raft.add_voter(id, &member.address).await,
            Some(member) if !voter && member.voter => raft.demote(id).await,
            // One that has not taken part yet is told when it does.
            _ => Ok(()),
        };
        changed.map_err(store::Error::from)?;
        Ok(())
    }
}
