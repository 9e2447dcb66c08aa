//! Services: what users want to run, and how many of it.

use std::{collections::BTreeMap, fmt, net::IpAddr, str::FromStr, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use warren_proto::v1;

use super::{
    Expected, Node, Record, Rejection, SECRETS_IN_ENV, State, events::Told, kind_name, needed_secrets, needed_volumes,
};
use crate::{clock::Timestamp, ids::ServiceId};

/// A service: what should run, and how many of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Service {
    /// Its id.
    pub id: ServiceId,
    /// The revision of its last write.
    pub version: u64,
    /// When it was created.
    pub created_at: Timestamp,
    /// When its spec was last replaced.
    pub updated_at: Timestamp,
    /// What the user wants.
    pub spec: ServiceSpec,
    /// The number of its newest [`super::Revision`]: containers of an earlier one are replaced.
    pub generation: u64,
    /// Which of the cluster's virtual addresses is its own; given by the state when the service is created.
    pub virtual_index: u32,
}

impl Record for Service {
    type Id = ServiceId;
    type Name = String;
    const KIND: &'static str = "service";

    fn id(&self) -> &ServiceId {
        &self.id
    }

    fn name(&self) -> Option<String> {
        Some(self.spec.name.clone())
    }

    fn label(&self) -> String {
        format!("service {:?}", self.spec.name)
    }

    fn version(&self) -> u64 {
        self.version
    }

    fn set_version(&mut self, revision: u64) {
        self.version = revision;
    }

    fn taken(&self) -> Rejection {
        Rejection::NameTaken(self.spec.name.clone())
    }
}

/// What a user wants of a service; validated.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceSpec {
    /// Unique; a DNS label.
    pub name: String,
    /// The user's own.
    pub labels: BTreeMap<String, String>,
    /// How many containers.
    pub mode: Mode,
    /// What runs in each: the message itself, as validation completed it. A field that is added to it needs no other form.
    pub container: Arc<v1::ContainerSpec>,
    /// What each may use.
    pub resources: Resources,
    /// What happens when one ends.
    pub restart: RestartPolicy,
    /// Where its containers listen.
    pub ports: Vec<v1::Port>,
    /// How its name is answered.
    pub endpoint_mode: v1::EndpointMode,
    /// Which nodes may run its containers.
    #[serde(default)]
    pub constraints: Vec<Constraint>,
    /// How long a node must have been down before its containers are given up.
    #[serde(default)]
    pub lost_after: Duration,
}

impl ServiceSpec {
    /// The first schema in which there is all that it asks for, and the field for which it is the first; `None` when every schema that is
    /// written has it.
    pub(crate) fn since(&self) -> Option<(u32, &'static str)> {
        let mounts =
            [("spec.container.secrets", &self.container.secrets), ("spec.container.configs", &self.container.configs)];
        let of_env = |(field, mounts): (_, &Vec<v1::SecretMount>)| {
            mounts.iter().any(|mount| !mount.env.is_empty()).then_some((SECRETS_IN_ENV, field))
        };
        mounts.into_iter().find_map(of_env)
    }

    /// The ports that each of its containers has to itself on its node.
    pub fn node_ports(&self) -> impl Iterator<Item = &v1::Port> {
        node_ports(&self.ports)
    }
}

/// What a constraint looks at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Trait {
    /// A label of this name.
    Label(String),
    /// The node's id.
    Id,
    /// The machine's name.
    Hostname,
    /// Like `x86_64`.
    Architecture,
}

/// What a node must have, or must not, to run a service's containers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Constraint {
    /// What is looked at.
    pub of: Trait,
    /// Whether it must be the value, or must not.
    pub is: bool,
    /// The value.
    pub value: String,
}

impl Constraint {
    /// Whether a node meets it. A label that it does not have is no value's.
    #[must_use]
    pub fn allows(&self, node: &Node) -> bool {
        let has = match &self.of {
            Trait::Label(name) => node.label(name),
            Trait::Id => Some(node.id.as_str()),
            Trait::Hostname => Some(node.description.hostname.as_str()),
            Trait::Architecture => Some(node.description.architecture.as_str()),
        };
        (has == Some(self.value.as_str())) == self.is
    }
}

impl fmt::Display for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.of {
            Trait::Label(name) => write!(f, "node.labels.{name}")?,
            Trait::Id => f.write_str("node.id")?,
            Trait::Hostname => f.write_str("node.hostname")?,
            Trait::Architecture => f.write_str("node.architecture")?,
        }
        write!(f, "{}{}", if self.is { "==" } else { "!=" }, self.value)
    }
}

impl FromStr for Constraint {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const WRONG: &str =
            "is not node.labels.NAME, node.hostname, node.id or node.architecture, then == or !=, and a value";
        let (of, is, value) = match (text.split_once("=="), text.split_once("!=")) {
            (Some((of, value)), None) => (of, true, value),
            (None, Some((of, value))) => (of, false, value),
            // The first of them counts; what follows is the value's.
            (Some((one, value)), Some((other, _))) if one.len() < other.len() => (one, true, value),
            (Some(_), Some((other, value))) => (other, false, value),
            (None, None) => return Err(WRONG),
        };
        let of = match of.trim() {
            "node.id" => Trait::Id,
            "node.hostname" => Trait::Hostname,
            "node.architecture" => Trait::Architecture,
            of => match of.strip_prefix("node.labels.") {
                Some(name) if !name.is_empty() => Trait::Label(name.to_owned()),
                _ => return Err(WRONG),
            },
        };
        Ok(Self { of, is, value: value.trim().to_owned() })
    }
}

/// How many containers a service has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// This many, spread over the nodes.
    Replicated(u32),
    /// One on every node.
    Global,
}

/// What a container may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// What is set aside for it.
    pub reservations: Amounts,
    /// What it is held to; zero is no limit.
    pub limits: Amounts,
}

/// CPU and memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amounts {
    /// Thousandths of a core.
    pub cpu_millis: u64,
    /// Bytes.
    pub memory_bytes: u64,
}

/// When an ended container is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestartCondition {
    /// Always.
    Any,
    /// When it failed.
    OnFailure,
    /// Never.
    Never,
}

/// What happens when a container ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPolicy {
    /// When it is replaced.
    pub condition: RestartCondition,
    /// Before the first replacement; doubles with each failure in a row.
    pub delay: Duration,
    /// Failures in a row after which the slot is given up; 0 is never.
    pub max_attempts: u32,
}

pub(super) fn node_ports(ports: &[v1::Port]) -> impl Iterator<Item = &v1::Port> {
    ports.iter().filter(|port| port.host_port != 0 && port.publish_mode() == v1::PublishMode::Host)
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

/// As tables and errors show it.
#[must_use]
pub(crate) fn protocol_name(port: &v1::Port) -> &'static str {
    match port.protocol() {
        v1::Protocol::Udp => "udp",
        v1::Protocol::Tcp | v1::Protocol::Unspecified => "tcp",
    }
}

impl State {
    /// All services, by id.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// A service by id.
    #[must_use]
    pub fn service(&self, id: &ServiceId) -> Option<&Arc<Service>> {
        self.services.get(id)
    }

    /// A service by name.
    #[must_use]
    pub fn service_named(&self, name: &str) -> Option<&Arc<Service>> {
        self.services.named(name)
    }

    /// Where a service answers whatever becomes of its containers, one of each family.
    #[must_use]
    pub fn virtual_addresses_of(&self, service: &Service) -> Vec<IpAddr> {
        self.cluster().map(|cluster| cluster.network.service_addresses(service.virtual_index)).unwrap_or_default()
    }

    pub(super) fn put_service(&mut self, service: &Service, expected: Expected) -> Result<Told, Rejection> {
        let known = self.services.check(service, expected)?;
        // What it needed before and has lost since does not keep anything else of it from being changed.
        let before = known.as_ref().map(|known| &known.spec.container);
        for (kind, name) in needed_secrets(&service.spec.container) {
            let had = before.is_some_and(|before| needed_secrets(before).any(|needed| needed == (kind, name)));
            if !had && self.secret_named(kind, name).is_none() {
                let kind = kind_name(kind);
                return Err(Rejection::Unknown {
                    field: format!("spec.container.{kind}s"),
                    what: format!("{kind} {name:?}"),
                });
            }
        }
        for name in needed_volumes(&service.spec.container) {
            let had = before.is_some_and(|before| needed_volumes(before).any(|needed| needed == name));
            if !had && self.volume_named(name).is_none() {
                return Err(Rejection::Unknown {
                    field: "spec.container.mounts".to_owned(),
                    what: format!("volume {name:?}"),
                });
            }
        }
        if let Some((port, service)) = self.published_elsewhere(service) {
            return Err(Rejection::PortTaken { port, service });
        }
        let told = match &known {
            Some(known) => {
                let words = differences(&known.spec, &service.spec);
                Told::new("service.updated", &service.id, &service.spec.name, words)
            }
            None => {
                let words = format!("image {}", service.spec.container.image);
                Told::new("service.created", &service.id, &service.spec.name, words)
            }
        };
        let mut service = service.clone();
        service.version = self.revision;
        service.virtual_index = match &known {
            Some(known) => known.virtual_index,
            None => {
                let count = self.cluster.as_ref().map_or(0, |cluster| cluster.network.virtual_addresses());
                // The first and the last address of a network are not anybody's.
                let taken = self.virtual_addresses.take(1, count.saturating_sub(1));
                taken.ok_or_else(|| Rejection::Exhausted("virtual address for another service".to_owned()))?
            }
        };
        self.revise(known.as_deref(), &mut service);
        let id = service.id.clone();
        self.services.put(service, self.revision);
        self.prune_revisions(&id);
        Ok(told)
    }

    pub(super) fn delete_service(
        &mut self,
        id: &ServiceId,
        expected: Expected,
        ports_stay: bool,
    ) -> Result<Told, Rejection> {
        let known = Arc::clone(self.services.find(id)?);
        self.services.check(&known, expected)?;
        if !self.numbers_revisions() {
            let ports: Vec<_> = known.spec.node_ports().filter(|_| ports_stay).cloned().collect();
            self.have_all_ask(id, &ports, &[], !ports.is_empty());
        }
        self.virtual_addresses.taken.remove(&known.virtual_index);
        self.services.remove(id)?;
        self.prune_revisions(id);
        Ok(Told::new("service.deleted", id, &known.spec.name, ""))
    }

    /// A port of this service that another one publishes, where one of the two does so on every node.
    fn published_elsewhere(&self, service: &Service) -> Option<(String, String)> {
        let everywhere = |port: &v1::Port| port.publish_mode() != v1::PublishMode::Host;
        let published = |service: &Service| {
            service.spec.ports.iter().filter(|port| port.host_port != 0).cloned().collect::<Vec<_>>()
        };
        let own = published(service);
        if own.is_empty() {
            return None;
        }
        for other in self.services.values().filter(|other| other.id != service.id) {
            for theirs in published(other) {
                let clash = own.iter().find(|port| {
                    (port.host_port, protocol_name(port)) == (theirs.host_port, protocol_name(&theirs))
                        && (everywhere(port) || everywhere(&theirs))
                });
                if let Some(port) = clash {
                    return Some((format!("{}/{}", port.host_port, protocol_name(port)), other.spec.name.clone()));
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::node;

    #[test]
    fn constraints_are_read_as_they_are_written() {
        let mut east = node("n", 1, 1);
        let labels = |list: &[(&str, &str)]| {
            list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect::<BTreeMap<_, _>>()
        };
        east.description.labels = labels(&[("zone", "west"), ("size", "large")]);
        east.labels = labels(&[("zone", "east"), ("agent/forged", "yes")]);
        assert_eq!(east.all_labels(), labels(&[("agent/size", "large"), ("agent/zone", "west"), ("zone", "east")]));
        for (text, holds) in [
            ("node.labels.zone==east", true),
            ("node.labels.zone==west", false),
            ("node.labels.zone!=west", true),
            ("node.labels.disk==ssd", false),
            ("node.labels.size==large", false),
            ("node.labels.agent/size==large", true),
            ("node.labels.agent/zone==west", true),
            ("node.labels.agent/zone==east", false),
            ("node.labels.agent/forged==yes", false),
            ("node.labels.disk!=ssd", true),
            ("node.labels.disk==", false),
            ("node.hostname==n", true),
            ("node.id!=n", false),
            ("node.architecture==", true),
            ("node.labels.zone!=a==b", true),
        ] {
            let constraint: Constraint = text.parse().expect(text);
            assert_eq!(constraint.allows(&east), holds, "{text}");
            assert_eq!(constraint.to_string(), text);
        }
        for wrong in ["", "zone==east", "node.labels.==x", "node.labels.zone=x", "node.labels.zone", "node.role==x"] {
            assert!(wrong.parse::<Constraint>().is_err(), "{wrong}");
        }
    }
}
