//! The latest status of every container here, and which of them the manager has not heard yet.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;
use warren_proto::v1;

#[derive(Debug, Default)]
struct Entries {
    statuses: BTreeMap<String, v1::ContainerStatus>,
    /// Whose they are: service and slot.
    owners: BTreeMap<String, (String, u32)>,
    unsent: BTreeSet<String>,
}

/// A container that runs.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    pub(crate) id: String,
    /// Its first process, in the node's PID namespace.
    pub(crate) pid: u32,
    /// Its service's name; empty where nobody has said it.
    pub(crate) service: String,
    /// 0 of a global service.
    pub(crate) slot: u32,
}

/// Where workers post statuses and the session picks them up. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Board {
    entries: Arc<Mutex<Entries>>,
    news: Arc<Notify>,
}

impl Board {
    fn entries(&self) -> MutexGuard<'_, Entries> {
        // Every change is one insertion or removal: a panic leaves the board whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes whose a container is.
    pub(crate) fn introduce(&self, id: &str, service: &str, slot: u32) {
        self.entries().owners.insert(id.to_owned(), (service.to_owned(), slot));
    }

    /// Changes a container's status; one that has none begins with an empty one. Returns it.
    pub fn update(&self, id: &str, change: impl FnOnce(&mut v1::ContainerStatus)) -> v1::ContainerStatus {
        let mut entries = self.entries();
        let status = entries.statuses.entry(id.to_owned()).or_default();
        change(status);
        let status = status.clone();
        entries.unsent.insert(id.to_owned());
        drop(entries);
        self.news.notify_one();
        status
    }

    /// Changes a container's status if it has one.
    pub fn amend(&self, id: &str, change: impl FnOnce(&mut v1::ContainerStatus)) {
        let mut entries = self.entries();
        let Some(status) = entries.statuses.get_mut(id) else { return };
        change(status);
        entries.unsent.insert(id.to_owned());
        drop(entries);
        self.news.notify_one();
    }

    /// Forgets a container.
    pub fn forget(&self, id: &str) {
        let mut entries = self.entries();
        entries.statuses.remove(id);
        entries.owners.remove(id);
        entries.unsent.remove(id);
    }

    /// A container's status.
    #[must_use]
    pub fn get(&self, id: &str) -> Option<v1::ContainerStatus> {
        self.entries().statuses.get(id).cloned()
    }

    /// The containers that run.
    #[must_use]
    pub(crate) fn running(&self) -> Vec<Running> {
        let entries = self.entries();
        let running = entries.statuses.iter().filter(|(_, status)| status.state() == v1::ContainerState::Running);
        let running = running.map(|(id, status)| {
            let (service, slot) = entries.owners.get(id).cloned().unwrap_or_default();
            Running { id: id.clone(), pid: status.pid, service, slot }
        });
        running.collect()
    }

    /// Everything is to be sent again: there is a new session.
    pub fn resend(&self) {
        let mut entries = self.entries();
        entries.unsent = entries.statuses.keys().cloned().collect();
        drop(entries);
        self.news.notify_one();
    }

    /// Takes what was not sent yet.
    #[must_use]
    pub fn take_unsent(&self) -> Vec<v1::ReportedStatus> {
        let mut entries = self.entries();
        let unsent = std::mem::take(&mut entries.unsent);
        let report = |id: String| {
            let status = entries.statuses.get(&id).cloned()?;
            Some(v1::ReportedStatus { container_id: id, status: Some(status) })
        };
        unsent.into_iter().filter_map(report).collect()
    }

    /// Waits until there may be something to send.
    pub async fn changed(&self) {
        self.news.notified().await;
    }
}
