//! What was changed, and by whom: kept with the state, the latest of it.

use serde::{Deserialize, Serialize};

use super::{Availability, Change, Mode, Node, Service, ServiceSpec, State, TokenRole, kind_name};
use crate::clock::Timestamp;

/// Who changes something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// `root`, an operator's name, a node's id or a manager's; empty for who has no certificate yet.
    pub id: String,
    /// What they are, as certificates have it; empty for who has none.
    pub role: String,
    /// From where.
    pub address: String,
}

/// Who asked for a transaction, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Who.
    pub actor: Actor,
    /// When.
    pub at: Timestamp,
}

/// A change that somebody made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The log entry that made it.
    pub revision: u64,
    /// What was done, like `service.updated`.
    pub kind: String,
    /// To which object.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What changed, in words.
    pub message: String,
    /// Who did it, and when.
    pub origin: Origin,
}

/// What a change is to who reads about it: kind, id, name and words.
type Told = (&'static str, String, String, String);

fn role_name(role: TokenRole) -> &'static str {
    match role {
        TokenRole::Manager => "manager",
        TokenRole::Worker => "worker",
    }
}

/// What tells two specs apart, in words: the values of what people change often, else just what it is.
fn differences(old: &ServiceSpec, new: &ServiceSpec) -> String {
    let mut words = Vec::new();
    let count = |mode: Mode| match mode {
        Mode::Replicated(replicas) => replicas.to_string(),
        Mode::Global => "global".to_owned(),
    };
    let mut changed = |what: &str, before: String, after: String| {
        if before != after {
            words.push(format!("{what} {before} -> {after}"));
        }
    };
    changed("name", old.name.clone(), new.name.clone());
    changed("replicas", count(old.mode), count(new.mode));
    changed("image", old.container.image.clone(), new.container.image.clone());
    let mut rest = |what: &str, differs: bool| {
        if differs {
            words.push(what.to_owned());
        }
    };
    let same_image = |spec: &ServiceSpec| {
        let mut container = (*spec.container).clone();
        (container.image, container.image_digest) = Default::default();
        // Its values may be secrets: that they differ is all that is said.
        container
    };
    rest("container", same_image(old) != same_image(new));
    rest("resources", old.resources != new.resources);
    rest("restart", old.restart != new.restart);
    rest("ports", old.ports != new.ports);
    rest("labels", old.labels != new.labels);
    rest("endpoint mode", old.endpoint_mode != new.endpoint_mode);
    rest("constraints", old.constraints != new.constraints);
    rest("lost after", old.lost_after != new.lost_after);
    if words.is_empty() { "nothing changed".to_owned() } else { words.join(", ") }
}

fn service(state: &State, service: &Service) -> Told {
    let (id, name) = (service.id.to_string(), service.spec.name.clone());
    match state.service(&service.id) {
        Some(known) => ("service.updated", id, name, differences(&known.spec, &service.spec)),
        None => ("service.created", id, name, format!("image {}", service.spec.container.image)),
    }
}

fn node(state: &State, node: &Node) -> Told {
    let (id, name) = (node.id.to_string(), node.description.hostname.clone());
    match state.node(&node.id) {
        Some(known) if known.description.agent_version != node.description.agent_version => {
            let (before, after) = (&known.description.agent_version, &node.description.agent_version);
            ("node.updated", id, name, format!("agent {before} -> {after}"))
        }
        Some(_) => ("node.updated", id, name, "its agent describes it otherwise".to_owned()),
        None => ("node.joined", id, name, String::new()),
    }
}

fn node_settings(
    state: &State,
    id: &crate::ids::NodeId,
    availability: Option<Availability>,
    labels: &std::collections::BTreeMap<String, Option<String>>,
) -> Told {
    let known = state.node(id);
    let name = known.map(|node| node.description.hostname.clone()).unwrap_or_default();
    let kind = match availability.filter(|wanted| known.is_some_and(|node| node.availability != *wanted)) {
        Some(Availability::Active) => "node.uncordoned",
        Some(Availability::Cordoned) => "node.cordoned",
        Some(Availability::Drained) => "node.drained",
        None => "node.labelled",
    };
    let words = labels.iter().map(|(name, value)| match value {
        Some(value) => format!("{name}={value}"),
        None => format!("{name} removed"),
    });
    (kind, id.to_string(), name, words.collect::<Vec<_>>().join(", "))
}

fn operator_name(state: &State, id: &crate::ids::OperatorId) -> String {
    state.operator(id).map(|operator| operator.name.clone()).unwrap_or_default()
}

/// What a change is about, before it is made; `None` for what is nobody's news, or is told of otherwise.
pub(super) fn tell(state: &State, change: &Change) -> Option<Told> {
    Some(match change {
        Change::FoundCluster(cluster) => ("cluster.founded", cluster.id.clone(), String::new(), String::new()),
        Change::SetLock(lock) => {
            let kind = if lock.is_some() { "cluster.locked" } else { "cluster.unlocked" };
            let is_locked = state.cluster().is_some_and(|cluster| cluster.lock.is_some());
            let words = if lock.is_some() && is_locked { "with another unlock key" } else { "" };
            (kind, String::new(), String::new(), words.to_owned())
        }
        Change::BeginRotation(_) => {
            let words = "members learn of the new one".to_owned();
            ("authority.changing", String::new(), String::new(), words)
        }
        Change::AdvanceRotation { signs: false } => {
            let words = "the new one signs; tokens are no longer valid".to_owned();
            ("authority.changing", String::new(), String::new(), words)
        }
        Change::AdvanceRotation { signs: true } => ("authority.changed", String::new(), String::new(), String::new()),
        Change::Certify { .. } => return None,
        // One that begins has had no other.
        Change::RaiseSchema(schema) => {
            state.cluster()?;
            ("cluster.schema_raised", String::new(), String::new(), format!("to {schema}"))
        }
        Change::AdmitManager(manager) => {
            ("manager.admitted", manager.id.to_string(), manager.hostname.clone(), String::new())
        }
        Change::SetManager { id, voter } => {
            let kind = if *voter { "manager.promoted" } else { "manager.demoted" };
            let name = state.manager(*id).map(|manager| manager.hostname.clone()).unwrap_or_default();
            (kind, id.to_string(), name, String::new())
        }
        Change::RemoveManager { id } => {
            let name = state.manager(*id).map(|manager| manager.hostname.clone()).unwrap_or_default();
            ("manager.removed", id.to_string(), name, String::new())
        }
        Change::AdmitNode { id } => ("node.admitted", id.to_string(), String::new(), String::new()),
        Change::PutToken(token) => {
            ("token.created", token.hash.chars().take(12).collect(), String::new(), role_name(token.role).to_owned())
        }
        Change::RevokeTokens { role } => {
            ("token.revoked", String::new(), String::new(), format!("all of role {}", role_name(*role)))
        }
        Change::CreateOperator(operator) => {
            ("operator.invited", operator.id.to_string(), operator.name.clone(), String::new())
        }
        Change::AdmitOperator { id, .. } => {
            ("operator.admitted", id.to_string(), operator_name(state, id), String::new())
        }
        Change::DeleteOperator { id } => ("operator.removed", id.to_string(), operator_name(state, id), String::new()),
        Change::PutService { service: new, .. } => service(state, new),
        Change::DeleteService { id, .. } => {
            let name = state.service(id).map(|service| service.spec.name.clone()).unwrap_or_default();
            ("service.deleted", id.to_string(), name, String::new())
        }
        Change::PutSecret { secret, .. } => {
            let kind = match (kind_name(secret.kind), state.secret(&secret.id).is_some()) {
                ("config", false) => "config.created",
                ("config", true) => "config.updated",
                (_, false) => "secret.created",
                (_, true) => "secret.updated",
            };
            (kind, secret.id.to_string(), secret.name.clone(), format!("value {}", secret.sequence))
        }
        Change::DeleteSecret { id } => {
            let known = state.secret(id)?;
            let kind = if kind_name(known.kind) == "config" { "config.deleted" } else { "secret.deleted" };
            (kind, id.to_string(), known.name.clone(), String::new())
        }
        Change::CreateVolume(volume) => ("volume.created", volume.id.to_string(), volume.name.clone(), String::new()),
        Change::DeleteVolume { id, force } => {
            let name = state.volumes().find(|volume| volume.id == *id).map(|v| v.name.clone()).unwrap_or_default();
            ("volume.deleted", id.to_string(), name, if *force { "by force".to_owned() } else { String::new() })
        }
        Change::PutNode(new) => node(state, new),
        Change::SetNode { id, availability, labels } => node_settings(state, id, *availability, labels),
        Change::DeleteNode { id } => {
            let name = state.node(id).map(|node| node.description.hostname.clone()).unwrap_or_default();
            ("node.removed", id.to_string(), name, String::new())
        }
        Change::CreateContainer(_)
        | Change::Create { .. }
        | Change::Assign { .. }
        | Change::Refuse { .. }
        | Change::Remove { .. }
        | Change::Observe { .. }
        | Change::DeleteContainer { .. } => return None,
    })
}
