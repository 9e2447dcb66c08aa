//! Nodes: machines with an agent.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Amounts, Record, Rejection, State, events::Told};
use crate::{clock::Timestamp, ids::NodeId};

/// A machine with an agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// The revision of its last write.
    pub version: u64,
    /// When it first registered.
    pub created_at: Timestamp,
    /// What its agent says of it.
    pub description: Description,
    /// Which of the cluster's subnets is its containers'; given by the state when the node first registers.
    pub subnet_index: u32,
    /// Whether it takes containers; the operators'.
    #[serde(default)]
    pub availability: Availability,
    /// Labels that operators set.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

impl Record for Node {
    type Id = NodeId;
    type Name = String;
    const KIND: &'static str = "node";

    fn id(&self) -> &NodeId {
        &self.id
    }

    fn name(&self) -> Option<String> {
        None
    }

    fn label(&self) -> String {
        format!("node {}", self.id)
    }

    fn version(&self) -> u64 {
        self.version
    }

    fn set_version(&mut self, revision: u64) {
        self.version = revision;
    }
}

impl Node {
    /// A label that operators set; one of the agent's configuration by its name behind [`AGENT_LABELS`]. What a node says of itself never
    /// passes for what an operator said of it.
    #[must_use]
    pub fn label(&self, name: &str) -> Option<&str> {
        let found = match name.strip_prefix(AGENT_LABELS) {
            Some(own) => self.description.labels.get(own),
            None => self.labels.get(name),
        };
        found.map(String::as_str)
    }

    /// All labels, those of the agent's configuration behind [`AGENT_LABELS`].
    #[must_use]
    pub fn all_labels(&self) -> BTreeMap<String, String> {
        let own = self.description.labels.iter().map(|(name, value)| (format!("{AGENT_LABELS}{name}"), value.clone()));
        let operators = self.labels.iter().filter(|(name, _)| !name.starts_with(AGENT_LABELS));
        own.chain(operators.map(|(name, value)| (name.clone(), value.clone()))).collect()
    }
}

/// What the names of labels begin with that an agent's configuration gives its node.
pub const AGENT_LABELS: &str = "agent/";

/// Whether a node takes containers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Availability {
    /// It does.
    #[default]
    Active,
    /// It keeps what it has.
    Cordoned,
    /// What it has is to go elsewhere.
    Drained,
}

/// What an agent says of its node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The machine's name.
    pub hostname: String,
    /// Of its agent's configuration.
    pub labels: BTreeMap<String, String>,
    /// What it has.
    pub resources: Amounts,
    /// The agent's version and commit.
    pub agent_version: String,
    /// Like `x86_64`.
    pub architecture: String,
    /// The kernel's release.
    pub kernel: String,
    /// Whether its kernel probes work.
    pub probes: Probes,
    /// Where other nodes reach it.
    pub address: Option<IpAddr>,
    /// Of WireGuard; empty when it does not encrypt.
    #[serde(default)]
    pub wireguard_public_key: String,
}

/// Whether a node's kernel probes work.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probes {
    /// Containers are timed in the kernel.
    pub lifecycle: bool,
    /// DNS queries are.
    pub dns: bool,
    /// Why not, if not.
    pub message: String,
}

impl State {
    /// All nodes, by id.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    /// A node by id.
    #[must_use]
    pub fn node(&self, id: &NodeId) -> Option<&Arc<Node>> {
        self.nodes.get(id)
    }

    /// Whether a node was let in with a token, and not removed since.
    #[must_use]
    pub fn is_admitted(&self, node: &NodeId) -> bool {
        self.admitted.contains(node)
    }

    /// Nodes that were let in and whose agents never came.
    pub fn awaited_nodes(&self) -> impl Iterator<Item = &NodeId> {
        self.admitted.iter().filter(|id| !self.nodes.contains(*id))
    }

    /// Whether nobody has had this node id.
    #[must_use]
    pub fn is_new_node(&self, node: &NodeId) -> bool {
        !self.nodes.contains(node) && !self.admitted.contains(node) && !self.departed.contains(node)
    }

    /// Containers' addresses on a node, as prefixes, one of each family.
    #[must_use]
    pub fn subnets_of(&self, node: &Node) -> Vec<IpNet> {
        self.cluster().map(|cluster| cluster.network.node_subnets(node.subnet_index)).unwrap_or_default()
    }

    /// When anything last changed that a node is told of what it is to run.
    #[must_use]
    pub fn assignments_revision(&self, node: &NodeId) -> u64 {
        self.node_revisions.get(node).copied().unwrap_or(0).max(self.shared_revision)
    }

    pub(super) fn put_node(&mut self, node: &Node) -> Result<Told, Rejection> {
        let mut node = node.clone();
        let (id, name) = (node.id.clone(), node.description.hostname.clone());
        let known = self.nodes.get(&id);
        let told = match known.map(|known| &known.description.agent_version) {
            Some(before) if *before != node.description.agent_version => {
                let words = format!("agent {before} -> {}", node.description.agent_version);
                Told::new("node.updated", &id, name, words)
            }
            Some(_) => Told::new("node.updated", &id, name, "its agent describes it otherwise"),
            None => Told::new("node.joined", &id, name, ""),
        };
        node.subnet_index = match known {
            Some(known) => {
                // What operators say of it is not its agent's to change.
                (node.availability, node.labels) = (known.availability, known.labels.clone());
                known.subnet_index
            }
            None => {
                let count = self.cluster.as_ref().map_or(0, |cluster| cluster.network.subnets());
                let taken = self.subnets.take(0, count);
                taken.ok_or_else(|| Rejection::Exhausted("subnet for another node".to_owned()))?
            }
        };
        self.nodes.put(node, self.revision);
        Ok(told)
    }

    pub(super) fn set_node(
        &mut self,
        id: &NodeId,
        availability: Option<Availability>,
        labels: &BTreeMap<String, Option<String>>,
    ) -> Result<Told, Rejection> {
        let mut node = Node::clone(self.nodes.find(id)?);
        let kind = match availability.filter(|wanted| node.availability != *wanted) {
            Some(Availability::Active) => "node.uncordoned",
            Some(Availability::Cordoned) => "node.cordoned",
            Some(Availability::Drained) => "node.drained",
            None => "node.labelled",
        };
        let words = labels.iter().map(|(name, value)| match value {
            Some(value) => format!("{name}={value}"),
            None => format!("{name} removed"),
        });
        let told = Told::new(kind, id, &node.description.hostname, words.collect::<Vec<_>>().join(", "));
        node.availability = availability.unwrap_or(node.availability);
        for (name, value) in labels {
            match value {
                Some(value) => node.labels.insert(name.clone(), value.clone()),
                None => node.labels.remove(name),
            };
        }
        self.nodes.put(node, self.revision);
        Ok(told)
    }

    pub(super) fn delete_node(&mut self, id: &NodeId) -> Result<Told, Rejection> {
        let node = self.nodes.remove(id);
        let was_admitted = self.admitted.remove(id).is_some();
        if was_admitted {
            self.departed.insert(id.clone());
        } else if let Err(rejection) = node {
            return Err(rejection);
        }
        self.node_revisions.remove(id);
        let name = node.map(|node| {
            self.subnets.taken.remove(&node.subnet_index);
            node.description.hostname.clone()
        });
        let containers: Vec<_> = self.containers_on(id).map(|container| container.id.clone()).collect();
        for container in containers {
            self.delete_container(&container);
        }
        Ok(Told::new("node.removed", id, name.unwrap_or_default(), ""))
    }

    pub(super) fn admit_node(&mut self, id: &NodeId) -> Result<Told, Rejection> {
        if !self.is_new_node(id) {
            return Err(Rejection::Conflict(format!("node id {id}")));
        }
        self.admitted.insert(id.clone());
        Ok(Told::new("node.admitted", id, "", ""))
    }
}
