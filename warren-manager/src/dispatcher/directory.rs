//! What agents must know to connect containers, derived from the state: services with their endpoints, nodes with their
//! subnets. One task keeps it up for all sessions; each session asks what changed since it last asked, which costs what
//! changed and not what there is.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use imbl::OrdMap;
use tokio::sync::watch;
use warren_proto::v1;

use crate::{
    convert::text,
    ids::{NodeId, ServiceId},
    state::{Container, ContainerChange, ContainerState, Desired, Node, Service, State},
    store::Store,
};

/// Changes that come within this time are one.
const QUIET: Duration = Duration::from_millis(10);
/// Objects that are gone and still remembered for sessions that have not heard of it.
const TOMBSTONES: usize = 10_000;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Service(ServiceId),
    Node(NodeId),
}

/// The tables at one moment. A copy costs a few pointers.
#[derive(Clone, Debug, Default)]
pub(super) struct Directory {
    /// Counts changes.
    sequence: u64,
    /// Which change an object's latest is, gone ones included, both ways.
    latest: OrdMap<Key, u64>,
    order: OrdMap<u64, Key>,
    services: OrdMap<ServiceId, Arc<v1::ServiceEntry>>,
    nodes: OrdMap<NodeId, Arc<v1::NodeEntry>>,
    /// The services' records that the entries were made from.
    versions: OrdMap<ServiceId, u64>,
    /// Who asks for changes since before this one must be told everything.
    forgotten: u64,
}

/// How far a session is.
pub(super) type Position = u64;

impl Directory {
    fn touch(&mut self, key: Key) {
        self.sequence += 1;
        if let Some(before) = self.latest.insert(key.clone(), self.sequence) {
            self.order.remove(&before);
        }
        self.order.insert(self.sequence, key);
    }

    /// Follows the state from `old`, which it was made from, to `new`.
    fn update(&mut self, old: &State, new: &State) {
        let mut stale: BTreeSet<ServiceId> = match new.changes_since(old.revision()) {
            Some(changes) => changes
                .map(|(_, change)| match change {
                    ContainerChange::Changed(container) => container.service.clone(),
                    ContainerChange::Deleted(_, service) => service.clone(),
                })
                .collect(),
            None => self.services.keys().cloned().collect(),
        };
        let changed = |service: &&Arc<Service>| self.versions.get(&service.id) != Some(&service.version);
        stale.extend(new.services().filter(changed).map(|service| service.id.clone()));
        stale.extend(self.services.keys().filter(|id| new.service(id).is_none()).cloned());
        for id in stale {
            let Some(service) = new.service(&id) else {
                self.versions.remove(&id);
                if self.services.remove(&id).is_some() {
                    self.touch(Key::Service(id));
                }
                continue;
            };
            self.versions.insert(id.clone(), service.version);
            let entry = service_entry(new, service);
            if self.services.get(&id).is_none_or(|known| **known != entry) {
                self.services.insert(id.clone(), Arc::new(entry));
                self.touch(Key::Service(id));
            }
        }
        let gone: Vec<_> = self.nodes.keys().filter(|id| new.node(id).is_none()).cloned().collect();
        for id in gone {
            self.nodes.remove(&id);
            self.touch(Key::Node(id));
        }
        for node in new.nodes() {
            if old.node(&node.id).is_some_and(|known| Arc::ptr_eq(known, node)) {
                continue;
            }
            let entry = node_entry(new, node);
            if self.nodes.get(&node.id).is_none_or(|known| **known != entry) {
                self.nodes.insert(node.id.clone(), Arc::new(entry));
                self.touch(Key::Node(node.id.clone()));
            }
        }
        self.forget();
    }

    fn forget(&mut self) {
        while self.latest.len() > self.services.len() + self.nodes.len() + TOMBSTONES {
            let is_gone = |key: &Key| match key {
                Key::Service(id) => !self.services.contains_key(id),
                Key::Node(id) => !self.nodes.contains_key(id),
            };
            let oldest = self.order.iter().find(|(_, key)| is_gone(key)).map(|(at, key)| (*at, key.clone()));
            let Some((at, key)) = oldest else { return };
            self.order.remove(&at);
            self.latest.remove(&key);
            self.forgotten = at;
        }
    }

    /// What an agent that was told everything up to `since` is to be told, and how far it is then. `None` for nothing.
    pub(super) fn news(&self, since: Option<Position>) -> Option<(v1::NetworkUpdate, Position)> {
        let since = since.filter(|since| *since >= self.forgotten);
        let mut update = v1::NetworkUpdate { complete: since.is_none(), ..Default::default() };
        match since {
            Some(since) if since == self.sequence => return None,
            Some(since) => {
                for key in self.order.range(since + 1..).map(|(_, key)| key) {
                    match key {
                        Key::Service(id) => match self.services.get(id) {
                            Some(entry) => update.services.push(v1::ServiceEntry::clone(entry)),
                            None => update.removed_services.push(id.to_string()),
                        },
                        Key::Node(id) => match self.nodes.get(id) {
                            Some(entry) => update.nodes.push(v1::NodeEntry::clone(entry)),
                            None => update.removed_nodes.push(id.to_string()),
                        },
                    }
                }
            }
            None => {
                update.services = self.services.values().map(|entry| v1::ServiceEntry::clone(entry)).collect();
                update.nodes = self.nodes.values().map(|entry| v1::NodeEntry::clone(entry)).collect();
            }
        }
        Some((update, self.sequence))
    }
}

fn service_entry(state: &State, service: &Service) -> v1::ServiceEntry {
    let mut endpoints: Vec<_> =
        state.containers_of(&service.id).filter_map(|container| endpoint(state, container)).collect();
    endpoints.sort_by(|a, b| (a.slot, &a.container_id).cmp(&(b.slot, &b.container_id)));
    v1::ServiceEntry {
        id: service.id.to_string(),
        name: service.spec.name.clone(),
        virtual_addresses: text(state.virtual_addresses_of(service)),
        endpoint_mode: service.spec.endpoint_mode.into(),
        ports: service.spec.ports.clone(),
        endpoints,
    }
}

/// A container as others reach it; `None` while they should not or cannot.
fn endpoint(state: &State, container: &Container) -> Option<v1::Endpoint> {
    if container.desired != Desired::Running || container.status.state != ContainerState::Running {
        return None;
    }
    let node = container.node.as_ref()?;
    let addresses = match container.spec.network() {
        v1::NetworkMode::Host => text(state.node(node)?.description.address),
        _ => text(&container.status.addresses),
    };
    (!addresses.is_empty()).then(|| v1::Endpoint {
        container_id: container.id.to_string(),
        slot: container.slot,
        node_id: node.to_string(),
        addresses,
        healthy: container.status.serves(),
    })
}

fn node_entry(state: &State, node: &Node) -> v1::NodeEntry {
    v1::NodeEntry {
        id: node.id.to_string(),
        hostname: node.description.hostname.clone(),
        address: node.description.address.map(|address| address.to_string()).unwrap_or_default(),
        subnets: text(state.subnets_of(node)),
        wireguard_public_key: node.description.wireguard_public_key.clone(),
    }
}

/// Keeps a directory of the store's state, until the store is gone.
pub(super) fn keep(store: &Store) -> watch::Receiver<Directory> {
    let mut views = store.watch();
    let mut known = views.borrow_and_update().clone();
    let mut directory = Directory::default();
    directory.update(&State::default(), &known);
    let (sender, receiver) = watch::channel(directory.clone());
    tokio::spawn(async move {
        while views.changed().await.is_ok() {
            tokio::time::sleep(QUIET).await;
            let state = views.borrow_and_update().clone();
            let before = directory.sequence;
            directory.update(&known, &state);
            known = state;
            if directory.sequence != before {
                sender.send_replace(directory.clone());
            }
            if sender.is_closed() {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        clock::Timestamp,
        state::{
            Change, Expected, Status,
            tests::{apply, container, founded, node, put, service},
        },
    };

    /// A state and its directory, and an agent that hears of both.
    struct World {
        state: State,
        directory: Directory,
        position: Option<Position>,
        /// By name, the addresses of its endpoints.
        heard: BTreeMap<String, Vec<String>>,
    }

    impl World {
        fn apply(&mut self, changes: Vec<Change>) -> usize {
            let before = self.state.clone();
            assert!(apply(&mut self.state, changes).iter().all(Result::is_ok));
            self.directory.update(&before, &self.state);
            let Some((update, position)) = self.directory.news(self.position) else { return 0 };
            self.position = Some(position);
            if update.complete {
                self.heard.clear();
            }
            for entry in &update.services {
                let addresses = entry.endpoints.iter().flat_map(|endpoint| endpoint.addresses.clone()).collect();
                self.heard.insert(entry.id.clone(), addresses);
            }
            for id in &update.removed_services {
                self.heard.remove(id);
            }
            update.services.len() + update.removed_services.len() + update.nodes.len() + update.removed_nodes.len()
        }
    }

    fn running(id: &str, address: &str) -> Change {
        let addresses = vec![address.parse().expect("an address")];
        let status = Status { addresses, ..Status::new(ContainerState::Running, "", Timestamp(3)) };
        Change::Observe { id: id.into(), node: "n".into(), status: Box::new(status) }
    }

    #[test]
    fn agents_hear_of_what_changed_and_of_nothing_else() {
        let mut world =
            World { state: founded(), directory: Directory::default(), position: None, heard: BTreeMap::new() };
        let web = service("web", "web", 1);
        let begin = vec![put(web.clone()), put(service("db", "db", 1)), Change::PutNode(Box::new(node("n", 1, 1)))];
        assert_eq!(world.apply(begin), 3);
        let mut moved = node("n", 1, 1);
        moved.description.address = Some("192.0.2.7".parse().expect("an address"));
        assert_eq!(world.apply(vec![Change::PutNode(Box::new(moved.clone()))]), 1);
        assert_eq!(world.apply(vec![Change::PutNode(Box::new(moved))]), 0, "as it was");
        let made = vec![
            Change::CreateContainer(Box::new(container("c", &web, 1, 1))),
            Change::Assign { id: "c".into(), node: "n".into(), at: Timestamp(2) },
        ];
        assert_eq!(world.apply(made), 0, "nothing to reach yet");
        assert_eq!(world.apply(vec![running("c", "10.128.0.2")]), 1);
        assert_eq!(world.heard["web"], ["10.128.0.2"]);
        assert!(world.heard["db"].is_empty());
        assert_eq!(world.apply(vec![Change::Remove { id: "c".into() }]), 1, "it leaves before it is stopped");
        assert!(world.heard["web"].is_empty());
        world.apply(vec![Change::DeleteService { id: "web".into(), expected: Expected::Any, ports_stay: true }]);
        assert!(!world.heard.contains_key("web"));
        assert_eq!(world.apply(vec![Change::DeleteNode { id: "n".into() }]), 1);
    }

    #[test]
    fn who_is_too_far_behind_is_told_everything() {
        let mut directory = Directory::default();
        let mut state = founded();
        for i in 0..TOMBSTONES + 5 {
            let before = state.clone();
            let id = format!("s{i}");
            apply(&mut state, [put(service(&id, &id, 1))]);
            directory.update(&before, &state);
            let before = state.clone();
            apply(
                &mut state,
                [Change::DeleteService { id: id.as_str().into(), expected: Expected::Any, ports_stay: true }],
            );
            directory.update(&before, &state);
        }
        assert_eq!(directory.latest.len(), TOMBSTONES);
        assert!(directory.news(Some(1)).expect("news").0.complete);
        let (update, position) = directory.news(Some(directory.sequence - 2)).expect("news");
        assert_eq!((update.complete, update.removed_services.len()), (false, 1));
        assert_eq!(directory.news(Some(position)), None);
    }
}
