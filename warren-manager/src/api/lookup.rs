//! Finding objects by what a person types: a name, an id, or a unique prefix of an id.

use std::sync::Arc;

use super::Error;
use crate::ids::NodeId;
use crate::state::{Container, ContainerState, Node, Operator, Secret, Service, State, Volume, kind_name};
use warren_proto::v1;

fn unique<'a, T: 'a>(
    kind: &'static str,
    name: &str,
    candidates: impl Iterator<Item = (&'a str, &'a Arc<T>)>,
) -> Result<Arc<T>, Error> {
    let mut found = None;
    if !name.is_empty() {
        for (id, object) in candidates {
            if id == name {
                return Ok(Arc::clone(object));
            }
            if id.starts_with(name) && found.replace(object).is_some() {
                return Err(Error::Ambiguous { kind, name: name.to_owned() });
            }
        }
    }
    found.cloned().ok_or_else(|| Error::NotFound { kind, name: name.to_owned() })
}

pub(super) fn service(state: &State, name: &str) -> Result<Arc<Service>, Error> {
    match state.service_named(name) {
        Some(service) => Ok(Arc::clone(service)),
        None => unique("service", name, state.services().map(|service| (service.id.as_str(), service))),
    }
}

pub(super) fn secret(state: &State, kind: v1::SecretKind, name: &str) -> Result<Arc<Secret>, Error> {
    match state.secret_named(kind, name) {
        Some(secret) => Ok(Arc::clone(secret)),
        None => {
            let of_kind = state.secrets().filter(|secret| secret.kind == kind);
            unique(kind_name(kind), name, of_kind.map(|secret| (secret.id.as_str(), secret)))
        }
    }
}

pub(super) fn volume(state: &State, name: &str) -> Result<Arc<Volume>, Error> {
    match state.volume_named(name) {
        Some(volume) => Ok(Arc::clone(volume)),
        None => unique("volume", name, state.volumes().map(|volume| (volume.id.as_str(), volume))),
    }
}

pub(super) fn operator(state: &State, name: &str) -> Result<Arc<Operator>, Error> {
    match state.operator_named(name) {
        Some(operator) => Ok(Arc::clone(operator)),
        None => unique("operator", name, state.operators().map(|operator| (operator.id.as_str(), operator))),
    }
}

/// A container by its id or a unique prefix of it, or by its service and slot: then the latest, one that runs before others.
pub(super) fn container(state: &State, name: &str) -> Result<Arc<Container>, Error> {
    if let Some((service, slot)) = name.rsplit_once('-')
        && let (Some(service), Ok(slot)) = (state.service_named(service), slot.parse::<u32>())
    {
        let of_slot = state.containers_of(&service.id).filter(|container| container.slot == slot);
        let runs = |container: &Container| container.status.state == ContainerState::Running;
        if let Some(latest) = of_slot.max_by_key(|container| (runs(container), container.created_at)) {
            return Ok(Arc::clone(latest));
        }
    }
    unique("container", name, state.containers().map(|container| (container.id.as_str(), container)))
}

pub(super) fn node(state: &State, name: &str) -> Result<Arc<Node>, Error> {
    // Hostnames are what machines say of themselves: another's id is none.
    if let Some(node) = state.node(&NodeId::from(name)) {
        return Ok(Arc::clone(node));
    }
    let mut named = state.nodes().filter(|node| node.description.hostname == name);
    match (named.next(), named.next()) {
        (Some(node), None) => Ok(Arc::clone(node)),
        (Some(_), Some(_)) => Err(Error::Ambiguous { kind: "node", name: name.to_owned() }),
        _ => unique("node", name, state.nodes().map(|node| (node.id.as_str(), node))),
    }
}
