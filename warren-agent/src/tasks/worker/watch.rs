//! What becomes of a process: its end, and what its checks find.

use std::sync::Arc;

use warren_proto::v1;

use super::{Event, RETRY, Worker, timestamp};
use crate::health::{Health, Subject};

/// The exit code of a container whose end nobody saw.
const LOST: i32 = 255;

impl Worker {
    /// Tells of the exit when it comes, also across a restart of the daemon.
    pub(super) fn watch_exit(&self) {
        let (shared, id, sender) = (Arc::clone(&self.shared), self.id.clone(), self.sender.clone());
        tokio::spawn(async move {
            let code = loop {
                match shared.containerd.wait_task(&id).await {
                    Ok((code, at)) => {
                        if let Some(at) = at {
                            shared.board.amend(&id, |status| status.finished_at = Some(timestamp(at)));
                        }
                        break code;
                    }
                    Err(error) if error.is_not_found() => break LOST,
                    Err(error) => {
                        tracing::debug!(container = id, %error, "waiting for a container's exit was interrupted");
                        tokio::time::sleep(RETRY).await;
                    }
                }
                if sender.is_closed() {
                    return;
                }
            };
            // A worker that is gone has seen the end otherwise.
            let _ = sender.send(Event::Exited(code));
        });
    }

    /// Has the container checked, if its service says how, until it ends.
    pub(super) fn watch_health(&self, pid: u32) {
        let spec = self.assignment.as_ref().and_then(|assignment| assignment.spec.as_ref());
        let Some(check) = spec.and_then(|spec| spec.health_check.clone()) else { return };
        let status = self.shared.board.get(&self.id).unwrap_or_default();
        // What it was before the agent's restart it is until it is found otherwise.
        let health = match status.health() {
            v1::Health::Healthy => Health::Healthy,
            _ => Health::Starting,
        };
        self.note(|status| {
            if health == Health::Starting {
                status.health = v1::Health::Starting.into();
            }
        });
        let subject = Subject {
            containerd: self.shared.containerd.clone(),
            id: self.id.clone(),
            pid,
            addresses: status.addresses,
            check,
            health,
        };
        let (shared, id, sender) = (Arc::clone(&self.shared), self.id.clone(), self.sender.clone());
        let changed = move |health: Health, why: String| {
            shared.board.amend(&id, |status| {
                let health = match health {
                    Health::Starting => v1::Health::Starting,
                    Health::Healthy => v1::Health::Healthy,
                    Health::Unhealthy => v1::Health::Unhealthy,
                };
                status.health = health.into();
                status.health_message.clone_from(&why);
            });
            if health == Health::Unhealthy {
                // A worker that is gone needs no telling.
                let _ = sender.send(Event::Unhealthy(why));
            }
            health != Health::Unhealthy
        };
        let (checks, ended) = (self.shared.checks.clone(), self.ended.clone());
        tokio::spawn(async move { ended.run_until_cancelled(checks.watch(subject, changed)).await });
    }
}
