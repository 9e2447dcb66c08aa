//! What agents must know to connect containers, derived from the state: services with their endpoints, nodes with their
//! subnets. One task keeps it up for all sessions; each session asks what changed since it last asked, which costs what
//! changed and not what there is.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use imbl::OrdMap;
use tokio::sync::watch;
use warren_proto::v1;

use crate::{
    control::liveness::{Health, Liveness},
    ids::{NodeId, ServiceId},
    messages::convert::text,
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
    /// Nodes that are down, while this manager leads and so knows: nobody is led to what was on them.
    down: BTreeSet<NodeId>,
    /// Who asks for changes since before this one must be told everything.
    forgotten: u64,
}

/// A part of an update ends with the object that makes it as large as this, in bytes.
const PART: usize = 16 * 1024;

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
        self.renew(new, stale);
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

    /// Takes note of which nodes are down.
    fn set_down(&mut self, state: &State, down: BTreeSet<NodeId>) {
        if down == self.down {
            return;
        }
        let changed = down.symmetric_difference(&self.down);
        let stale =
            changed.flat_map(|node| state.containers_on(node)).map(|container| container.service.clone()).collect();
        self.down = down;
        self.renew(state, stale);
        self.forget();
    }

    /// Makes these services' entries anew.
    fn renew(&mut self, new: &State, stale: BTreeSet<ServiceId>) {
        for id in stale {
            let Some(service) = new.service(&id) else {
                self.versions.remove(&id);
                if self.services.remove(&id).is_some() {
                    self.touch(Key::Service(id));
                }
                continue;
            };
            self.versions.insert(id.clone(), service.version);
            let entry = service_entry(new, service, &self.down);
            if self.services.get(&id).is_none_or(|known| **known != entry) {
                self.services.insert(id.clone(), Arc::new(entry));
                self.touch(Key::Service(id));
            }
        }
    }

    fn is_gone(&self, key: &Key) -> bool {
        match key {
            Key::Service(id) => !self.services.contains_key(id),
            Key::Node(id) => !self.nodes.contains_key(id),
        }
    }

    fn forget(&mut self) {
        while self.latest.len() > self.services.len() + self.nodes.len() + TOMBSTONES {
            let oldest = self.order.iter().find(|(_, key)| self.is_gone(key)).map(|(at, key)| (*at, key.clone()));
            let Some((at, key)) = oldest else { return };
            self.order.remove(&at);
            self.latest.remove(&key);
            self.forgotten = at;
        }
    }

    /// How far somebody is who was told all of this.
    pub(super) fn position(&self) -> Position {
        self.sequence
    }

    /// What an agent that was told everything up to `since` is to be told, in parts; none for nothing. A connection keeps a buffer
    /// as large as the largest message that it ever sent, and there are thousands of connections.
    pub(super) fn news(&self, since: Option<Position>) -> impl Iterator<Item = v1::NetworkUpdate> + Send {
        let since = since.filter(|since| *since >= self.forgotten);
        let mut complete = since.is_none();
        let told = since.map_or(0, |since| since + 1);
        let is_news = move |key: &&Key| since.is_some() || !self.is_gone(key);
        let mut keys = self.order.range(told..).map(|(_, key)| key).filter(is_news).peekable();
        std::iter::from_fn(move || {
            if keys.peek().is_none() && !complete {
                return None;
            }
            let mut part = v1::NetworkUpdate { complete: std::mem::take(&mut complete), ..Default::default() };
            let mut size = 0;
            while size < PART
                && let Some(key) = keys.next()
            {
                size += self.tell(key, &mut part);
            }
            part.more = keys.peek().is_some();
            Some(part)
        })
    }

    /// Adds how it is with an object; its size in bytes.
    fn tell(&self, key: &Key, part: &mut v1::NetworkUpdate) -> usize {
        match key {
            Key::Service(id) => match self.services.get(id) {
                Some(entry) => add(&mut part.services, v1::ServiceEntry::clone(entry)),
                None => add(&mut part.removed_services, id.to_string()),
            },
            Key::Node(id) => match self.nodes.get(id) {
                Some(entry) => add(&mut part.nodes, v1::NodeEntry::clone(entry)),
                None => add(&mut part.removed_nodes, id.to_string()),
            },
        }
    }
}

fn add<T: prost::Message>(to: &mut Vec<T>, item: T) -> usize {
    let size = item.encoded_len();
    to.push(item);
    size
}

fn service_entry(state: &State, service: &Service, down: &BTreeSet<NodeId>) -> v1::ServiceEntry {
    let is_up = |container: &&Arc<Container>| !container.node.as_ref().is_some_and(|node| down.contains(node));
    let reached = state.containers_of(&service.id).filter(is_up);
    let mut endpoints: Vec<_> = reached.filter_map(|container| endpoint(state, service, container)).collect();
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
fn endpoint(state: &State, service: &Service, container: &Container) -> Option<v1::Endpoint> {
    if container.desired != Desired::Running || container.status.state != ContainerState::Running {
        return None;
    }
    let node = container.node.as_ref()?;
    let addresses = match container.revision.spec.network() {
        v1::NetworkMode::Host => text(state.node(node)?.description.address),
        _ => text(&container.status.addresses),
    };
    (!addresses.is_empty()).then(|| v1::Endpoint {
        container_id: container.id.to_string(),
        slot: container.slot,
        node_id: node.to_string(),
        addresses,
        healthy: container.status.serves(),
        own_ports: (container.revision.ports != service.spec.ports)
            .then(|| v1::EndpointPorts { ports: container.revision.ports.clone() }),
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

/// Keeps a directory of the store's state and, while this manager leads, of which nodes are down, until the store is gone.
pub(super) fn keep(store: &Store, liveness: Liveness, leads: watch::Receiver<bool>) -> watch::Receiver<Directory> {
    /// Silence tells nobody.
    const LOOK: Duration = Duration::from_secs(1);
    let mut views = store.watch();
    let mut known = views.borrow_and_update().clone();
    let mut directory = Directory::default();
    directory.update(&State::default(), &known);
    let (sender, receiver) = watch::channel(directory.clone());
    tokio::spawn(async move {
        let mut heard = liveness.watch();
        loop {
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                changed = heard.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(LOOK) => {}
            }
            tokio::time::sleep(QUIET).await;
            let state = views.borrow_and_update().clone();
            heard.borrow_and_update();
            let before = directory.sequence;
            directory.update(&known, &state);
            known = state;
            let is_down = |node: &&Arc<Node>| liveness.health(&node.id) == Health::Down;
            let down = known.nodes().filter(is_down).map(|node| node.id.clone());
            let down = if *leads.borrow() { down.collect() } else { BTreeSet::new() };
            directory.set_down(&known, down);
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
            let mut count = 0;
            for part in self.directory.news(self.position) {
                if part.complete {
                    self.heard.clear();
                }
                for entry in &part.services {
                    let addresses = entry.endpoints.iter().flat_map(|endpoint| endpoint.addresses.clone()).collect();
                    self.heard.insert(entry.id.clone(), addresses);
                }
                for id in &part.removed_services {
                    self.heard.remove(id);
                }
                count += objects(&part);
            }
            self.position = Some(self.directory.position());
            count
        }
    }

    fn objects(part: &v1::NetworkUpdate) -> usize {
        part.services.len() + part.removed_services.len() + part.nodes.len() + part.removed_nodes.len()
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
        // Of a node that is down nothing can be reached, whatever the state has of it.
        let down = |world: &mut World, nodes: &[&str]| {
            let nodes = nodes.iter().map(|node| (*node).into()).collect();
            world.directory.set_down(&world.state.clone(), nodes);
            world.apply(Vec::new())
        };
        assert_eq!(down(&mut world, &["n"]), 1);
        assert!(world.heard["web"].is_empty());
        assert_eq!(down(&mut world, &["n"]), 0);
        assert_eq!(down(&mut world, &[]), 1);
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
        let all: Vec<_> = directory.news(Some(1)).collect();
        assert_eq!(all, [v1::NetworkUpdate { complete: true, ..Default::default() }], "nothing is left");
        let news: Vec<_> = directory.news(Some(directory.position() - 2)).collect();
        assert_eq!(news.len(), 1);
        assert_eq!((news[0].complete, news[0].removed_services.len()), (false, 1));
        assert_eq!(directory.news(Some(directory.position())).next(), None);
    }

    #[test]
    fn much_is_told_in_parts() {
        let (mut directory, mut state) = (Directory::default(), founded());
        let before = state.clone();
        let name = |i: usize| format!("service-with-a-long-name-{i:04}");
        apply(&mut state, (0..1000).map(|i| put(service(&name(i), &name(i), 1))));
        directory.update(&before, &state);
        for since in [None, Some(0)] {
            let parts: Vec<_> = directory.news(since).collect();
            let (last, others) = parts.split_last().expect("parts");
            assert!(others.len() > 3 && others.iter().all(|part| part.more) && !last.more);
            assert!(parts.iter().all(|part| prost::Message::encoded_len(part) < 2 * PART));
            assert_eq!(parts.iter().position(|part| part.complete), since.is_none().then_some(0));
            assert!(parts[1..].iter().all(|part| !part.complete));
            let mut told: Vec<_> =
                parts.iter().flat_map(|part| &part.services).map(|entry| entry.name.clone()).collect();
            told.sort();
            assert_eq!(told, (0..1000).map(name).collect::<Vec<_>>(), "each once");
        }
    }
}
