//! From a process to nothing: signals, and what is left of a container.

use std::time::Duration;

use warren_proto::v1;

use super::{Event, RETRY, SIGKILL, Worker, prepare::retry};
use crate::{
    network::{Leaving, Tables},
    runtime,
};

impl Worker {
    /// Waits until connections are led to other containers of its service, here and, in all likelihood, elsewhere: those that come
    /// meanwhile it still takes. Where there are no others, and where nobody is led to it, there is nothing to wait for.
    pub(super) async fn leave(&self) {
        /// For the manager's word that it has left. Without a manager there is none.
        const WORD: Duration = Duration::from_secs(2);
        /// For the other nodes, which have the same word.
        const OTHERS: Duration = Duration::from_millis(750);

        let Some(assignment) = self.assignment.as_ref().filter(|_| self.removing.is_cancelled()) else { return };
        let status = self.shared.board.get(&self.id).unwrap_or_default();
        let is_host = assignment.spec.as_ref().is_some_and(|spec| spec.network() == v1::NetworkMode::Host);
        let serves = matches!(status.health(), v1::Health::Unspecified | v1::Health::Healthy);
        if !serves || (status.addresses.is_empty() && !is_host) {
            return;
        }
        let mut tables = self.shared.network.tables();
        let leaving = |tables: &Tables| tables.leaving(&assignment.service_id, &self.id);
        let left = async {
            let known = tables.wait_for(|tables| leaving(tables) != Leaving::Listed).await;
            let is_alone = known.is_ok_and(|tables| leaving(&tables) == Leaving::Alone);
            if !is_alone {
                tokio::time::sleep(OTHERS).await;
            }
        };
        let left = tokio::time::timeout(WORD + OTHERS, left);
        let _ = self.shared.stopping.run_until_cancelled(left).await;
    }

    pub(super) async fn signal(&self, signal: u32, all: bool) {
        // A daemon that restarts gets the signal to deliver when it is back.
        let signalled = retry(|| self.shared.containerd.kill_task(&self.id, signal, all));
        match tokio::time::timeout(self.shared.node.runtime_timeout, signalled).await {
            Ok(Ok(())) => {}
            Ok(Err(ending)) => {
                tracing::warn!(container = self.id, signal, ?ending, "a container could not be signalled")
            }
            Err(_) => tracing::warn!(container = self.id, signal, "the container runtime does not answer"),
        }
    }

    /// Ends the process that containerd has beside the container, which does not answer: containerd then takes the container away itself.
    /// Returns what to say of it.
    pub(super) async fn end_shim(&self, what: &str) -> String {
        let seconds = self.shared.node.runtime_timeout.as_secs_f64();
        let message =
            format!("the container runtime did not {what} it in {seconds} s (the agent's --runtime-timeout-s)");
        tracing::warn!(container = self.id, message, "the container's shim is killed");
        self.note(|status| status.message.clone_from(&message));
        let id = self.id.clone();
        // A panic is logged.
        let _ = tokio::task::spawn_blocking(move || runtime::kill_shim(&id)).await;
        message
    }

    pub(super) fn kill_later(&self, after: Duration) {
        let sender = self.sender.clone();
        tokio::spawn(async move {
            tokio::time::sleep(after).await;
            // A worker that is gone needs no killing.
            let _ = sender.send(Event::KillDue);
        });
    }

    /// Removes task, record and snapshot, however long it takes.
    pub(super) async fn clean(&self) {
        loop {
            // Never cut off: containerd would leave what it has begun to take away.
            let mut deletion = std::pin::pin!(self.shared.containerd.delete_task(&self.id));
            let deleted = match tokio::time::timeout(self.shared.node.runtime_timeout, &mut deletion).await {
                Ok(deleted) => deleted,
                Err(_) => {
                    let _ = self.end_shim("delete").await;
                    deletion.await
                }
            };
            let cleaned = match deleted {
                Ok(()) => self.shared.containerd.remove_container(&self.id).await,
                Err(error) => {
                    // A task that was created and never started must be killed first.
                    let _ = self.shared.containerd.kill_task(&self.id, SIGKILL, true).await;
                    Err(error)
                }
            };
            let cleaned = match cleaned {
                Ok(()) => self.shared.network.detach(&self.id).await.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            match cleaned {
                Ok(()) => {
                    self.shared.logs.ended(&self.id);
                    self.shared.secrets.remove(&self.id);
                    let (volumes, id) = (self.shared.volumes.clone(), self.id.clone());
                    // A panic is the volume's, and it is logged.
                    let _ = tokio::task::spawn_blocking(move || volumes.release(&id)).await;
                    return;
                }
                Err(error) => tracing::debug!(container = self.id, %error, "a container is not removed yet"),
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}
