//! What happens, as people follow it: changes that somebody made, which are in the state, and what becomes of containers and
//! nodes, which the leader sees and remembers while it leads.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use opentelemetry::KeyValue;
use tokio::sync::{broadcast, watch};
use warren_proto::v1;

use crate::{
    clock::Timestamp,
    control::liveness::{Health, LastSeen, Liveness},
    ids::{ContainerId, NodeId},
    messages::convert,
    metrics::ManagerMetrics,
    state::{Container, ContainerChange, ContainerState, Event, Node, State},
    store::Store,
};

/// Events remembered.
pub(crate) const REMEMBERED: usize = 10_000;
/// Events that wait for a slow follower; a slower one is told that it missed some.
const QUEUE: usize = 4096;
/// Between looks at nodes' health: silence tells nobody.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Inner {
    remembered: VecDeque<Arc<v1::Event>>,
    news: broadcast::Sender<Arc<v1::Event>>,
}

/// The leader's memory of what has happened. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Feed {
    store: Store,
    liveness: Liveness,
    metrics: Arc<ManagerMetrics>,
    leads: watch::Receiver<bool>,
    inner: Arc<Mutex<Inner>>,
    /// Whether what is remembered is of this manager's leading.
    begun: watch::Sender<bool>,
}

/// Where the feed is in the state.
#[derive(Debug)]
struct Position {
    revision: u64,
    /// Their states, and whether it is known that they have ended for want of memory.
    containers: HashMap<ContainerId, (ContainerState, bool)>,
    nodes: LastSeen<Health>,
    /// The conditions of nodes when they were last heard of.
    conditions: HashMap<NodeId, BTreeSet<String>>,
}

fn told(event: &Event) -> v1::Event {
    let actor = &event.origin.actor;
    v1::Event {
        revision: event.revision,
        at: Some(event.origin.at.to_proto()),
        r#type: event.kind.clone(),
        object_id: event.id.clone(),
        object_name: event.name.clone(),
        message: event.message.clone(),
        actor: Some(v1::Actor { id: actor.id.clone(), role: actor.role.clone(), address: actor.address.clone() }),
    }
}

fn container_event(state: &State, revision: u64, container: &Container, kind: &str) -> v1::Event {
    let status = &container.status;
    let node = container.node.as_ref();
    // The managers decide where it goes; what becomes of it there its node says.
    let is_decided = status.state <= ContainerState::Assigned;
    let node_known = node.and_then(|node| state.node(node)).filter(|_| status.state == ContainerState::Assigned);
    let place = node_known.map(|node| format!("to {}", node.description.hostname));
    let exit = status.exit_code.filter(|code| *code != 0).map(|code| format!("exit code {code}"));
    let oom = status.oom_killed.then(|| "out of memory".to_owned());
    let words = Some(status.message.clone()).filter(|message| !message.is_empty());
    v1::Event {
        revision,
        at: Some(status.changed_at.to_proto()),
        r#type: format!("container.{kind}"),
        object_id: container.id.to_string(),
        object_name: match &container.pinned {
            Some(_) => container.service_name.clone(),
            None => format!("{}-{}", container.service_name, container.slot),
        },
        message: [place, exit, oom, words].into_iter().flatten().collect::<Vec<_>>().join(", "),
        actor: node.filter(|_| !is_decided).map(|node| v1::Actor {
            id: node.to_string(),
            role: "worker".to_owned(),
            address: String::new(),
        }),
    }
}

/// Whether a container has ended for want of memory; its node may say so after it has said that it ended.
fn ran_out_of_memory(container: &Container) -> bool {
    container.status.state.is_terminal() && container.status.oom_killed
}

/// What a container's change is to who follows: the steps between are not news.
fn step(container: &Container, before: Option<ContainerState>) -> Option<&'static str> {
    let state = container.status.state;
    if before == Some(state) {
        return None;
    }
    match state {
        ContainerState::New => Some("created"),
        ContainerState::Pending => Some("pending"),
        ContainerState::Assigned => Some("assigned"),
        ContainerState::Running => Some("started"),
        ContainerState::Complete => Some("completed"),
        ContainerState::Shutdown => Some("stopped"),
        ContainerState::Failed => Some("failed"),
        ContainerState::Rejected => Some("rejected"),
        ContainerState::Accepted | ContainerState::Preparing | ContainerState::Starting => None,
    }
}

impl Position {
    /// What is as it is, without its being news.
    fn of(state: &State, liveness: &Liveness) -> Self {
        Self {
            revision: state.revision(),
            containers: state.containers().map(|c| (c.id.clone(), (c.status.state, ran_out_of_memory(c)))).collect(),
            nodes: LastSeen::of(state, |node| liveness.health(&node.id)),
            conditions: HashMap::new(),
        }
    }

    /// What happened since, in order, and the service of each container that ran out of memory.
    fn advance(&mut self, state: &State) -> (Vec<v1::Event>, Vec<String>) {
        let mut out_of_memory = Vec::new();
        let since = self.revision;
        self.revision = state.revision();
        let changes = state.events().rev().take_while(|event| event.revision > since).map(|event| told(event));
        let mut events: Vec<_> = changes.collect();
        events.reverse();
        for (revision, change) in state.changes_since(since).into_iter().flatten() {
            match change {
                ContainerChange::Changed(container) => {
                    let now = (container.status.state, ran_out_of_memory(container));
                    let before = self.containers.insert(container.id.clone(), now);
                    if now.1 && !before.is_some_and(|(_, known)| known) {
                        out_of_memory.push(container.service_name.clone());
                    }
                    if let Some(kind) = step(container, before.map(|(state, _)| state)) {
                        events.push(container_event(state, *revision, container, kind));
                    }
                }
                ContainerChange::Deleted(id, _) => drop(self.containers.remove(id)),
            }
        }
        // In an entry, what somebody changed comes before what became of it.
        events.sort_by_key(|event| event.revision);
        (events, out_of_memory)
    }

    /// What has become of nodes.
    fn look(&mut self, state: &State, liveness: &Liveness, now: Timestamp) -> Vec<v1::Event> {
        let mut events = Vec::new();
        let news = |node: &Node, health: Health| {
            if health != Health::Unknown {
                events.push(v1::Event {
                    revision: state.revision(),
                    at: Some(now.to_proto()),
                    r#type: format!("node.{}", health.name()),
                    object_id: node.id.to_string(),
                    object_name: node.description.hostname.clone(),
                    message: String::new(),
                    actor: None,
                });
            }
        };
        self.nodes.look(state, |node| liveness.health(&node.id), news);
        events.extend(self.look_at_conditions(state, liveness, now));
        events
    }

    /// What has begun or ceased to be wrong with nodes that are heard of.
    fn look_at_conditions(&mut self, state: &State, liveness: &Liveness, now: Timestamp) -> Vec<v1::Event> {
        let mut events = Vec::new();
        for node in state.nodes().filter(|node| liveness.health(&node.id).is_reachable()) {
            let conditions = liveness.conditions(&node.id);
            let kinds = conditions.iter().map(|condition| condition.kind.clone()).collect();
            let before = self.conditions.insert(node.id.clone(), kinds).unwrap_or_default();
            let event = |kind: &str, message: String| v1::Event {
                revision: state.revision(),
                at: Some(now.to_proto()),
                r#type: kind.to_owned(),
                object_id: node.id.to_string(),
                object_name: node.description.hostname.clone(),
                message,
                actor: None,
            };
            let new = conditions.iter().filter(|condition| !before.contains(&condition.kind));
            events.extend(new.map(|condition| event("node.condition", convert::described([condition]))));
            let gone = before.iter().filter(|kind| !conditions.iter().any(|condition| condition.kind == **kind));
            events.extend(gone.map(|kind| event("node.condition_cleared", kind.clone())));
        }
        self.conditions.retain(|node, _| state.node(node).is_some());
        events
    }
}

impl Feed {
    pub(crate) fn new(
        store: Store,
        liveness: Liveness,
        metrics: Arc<ManagerMetrics>,
        leads: watch::Receiver<bool>,
    ) -> Self {
        let (news, _) = broadcast::channel(QUEUE);
        let inner = Inner { remembered: VecDeque::new(), news };
        Self { store, liveness, metrics, leads, inner: Arc::new(Mutex::new(inner)), begun: watch::Sender::new(false) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Every change leaves it whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is remembered, and what comes after it. Waits until this manager leads.
    pub(crate) async fn follow(&self) -> (Vec<Arc<v1::Event>>, broadcast::Receiver<Arc<v1::Event>>) {
        // The sender is this value's own.
        let _ = self.begun.subscribe().wait_for(|begun| *begun).await;
        let inner = self.inner();
        (inner.remembered.iter().cloned().collect(), inner.news.subscribe())
    }

    /// Whether this manager leads, and is followed.
    pub(crate) fn leads(&self) -> watch::Receiver<bool> {
        self.leads.clone()
    }

    fn add(&self, events: Vec<v1::Event>) {
        let mut inner = self.inner();
        for event in events {
            self.metrics.events.add(1, &[KeyValue::new("type", event.r#type.clone())]);
            let event = Arc::new(event);
            inner.remembered.push_back(Arc::clone(&event));
            if inner.remembered.len() > REMEMBERED {
                inner.remembered.pop_front();
            }
            // Nobody may be following.
            let _ = inner.news.send(event);
        }
    }

    /// Watches, while this manager leads. Never ends.
    pub(crate) async fn run(self) {
        let mut state = self.store.watch();
        let mut leads = self.leads.clone();
        loop {
            if leads.wait_for(|leads| *leads).await.is_err() {
                return;
            }
            let view = state.borrow_and_update().clone();
            let mut position = Position::of(&view, &self.liveness);
            // Of a counter that begins with 1 nobody sees that it has risen.
            let service = |name: String| [KeyValue::new("service", name)];
            view.services().for_each(|known| self.metrics.out_of_memory.add(0, &service(known.spec.name.clone())));
            // What its predecessors saw of containers and nodes is gone; what was changed is in the state.
            self.inner().remembered = view.events().map(|event| Arc::new(told(event))).collect();
            self.begun.send_replace(true);
            loop {
                tokio::select! {
                    changed = state.changed() => if changed.is_err() { return },
                    changed = leads.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep(LOOK) => {}
                }
                if !*leads.borrow_and_update() {
                    self.begun.send_replace(false);
                    break;
                }
                let view = state.borrow_and_update().clone();
                let (events, out_of_memory) = position.advance(&view);
                for event in events.iter().filter(|event| event.r#type == "service.created") {
                    self.metrics.out_of_memory.add(0, &service(event.object_name.clone()));
                }
                for name in out_of_memory {
                    self.metrics.out_of_memory.add(1, &service(name));
                }
                self.add(events);
                self.add(position.look(&view, &self.liveness, self.store.now()));
            }
        }
    }
}
