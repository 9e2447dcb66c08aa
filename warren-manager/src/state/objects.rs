//! What the tables hold.

use std::{collections::BTreeMap, fmt, net::IpAddr, str::FromStr, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use warren_proto::v1;

use super::ClusterNetwork;
use crate::{
    clock::Timestamp,
    ids::{NodeId, OperatorId, SecretId, ServiceId, VolumeId},
};

/// The cluster's identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Random; told apart from other clusters.
    pub id: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// The addresses of its containers and services.
    pub network: ClusterNetwork,
    /// What signs its members' certificates; none in a cluster that nobody can join.
    pub authority: Option<SealedAuthority>,
    /// The unlock key, where managers' keys of secrets are locked.
    #[serde(default)]
    pub lock: Option<Sealed>,
    /// The change of the authority that is under way.
    #[serde(default)]
    pub rotation: Option<Rotation>,
}

impl Cluster {
    /// The certificates of the authorities that members are to believe, in PEM; the one that signs is the first.
    #[must_use]
    pub fn authorities(&self) -> String {
        let signs = self.authority.iter().map(|authority| authority.certificate.as_str());
        let other = self.rotation.iter().map(|rotation| rotation.other.certificate.as_str());
        signs.chain(other).map(str::trim).collect::<Vec<_>>().join("\n")
    }
}

/// A change of the authority: first every member learns of the new one, then every member has a certificate of it, and then
/// every member forgets the old one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotation {
    /// The authority that does not sign: the new one at first, and then the old one.
    pub other: SealedAuthority,
    /// Whether the new one signs.
    pub signs: bool,
}

/// The cluster's certificate authority.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedAuthority {
    /// Its certificate, in PEM.
    pub certificate: String,
    /// Its key.
    pub key: Sealed,
}

/// A member of consensus, or one that is to become one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manager {
    /// Its id in consensus; never another's.
    pub id: u64,
    /// The machine's name.
    pub hostname: String,
    /// When it was let in.
    pub created_at: Timestamp,
    /// Whether it is to vote; one that is not follows all the same.
    #[serde(default = "votes")]
    pub voter: bool,
}

fn votes() -> bool {
    true
}

/// What a token lets its holder become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenRole {
    /// A member of consensus.
    Manager,
    /// A node with an agent.
    Worker,
}

/// A join token, without what is secret of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    /// Of its secret.
    pub hash: String,
    /// What it is for.
    pub role: TokenRole,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it ends to be valid.
    pub expires_at: Timestamp,
}

/// Somebody who works with the cluster from elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operator {
    /// Theirs in certificates, and never another's: one that is removed and comes again has another.
    pub id: OperatorId,
    /// Unique; as events name them.
    pub name: String,
    /// When they were invited.
    pub created_at: Timestamp,
    /// With which they may log in, until they have.
    pub invitation: Option<Invitation>,
}

/// A token for one login, without what is secret of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    /// Of its secret.
    pub hash: String,
    /// When it ends to be valid.
    pub expires_at: Timestamp,
}

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

/// What a secret is sealed as: only who holds the key of keys can open it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// The key that the value is encrypted with, encrypted; in base64, as the log is text.
    pub key: String,
    /// The value, encrypted; in base64.
    pub value: String,
}

/// A small file for containers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Secret {
    /// Its id.
    pub id: SecretId,
    /// The revision of its last write.
    pub version: u64,
    /// Secret or config.
    pub kind: v1::SecretKind,
    /// Unique among its kind.
    pub name: String,
    /// The user's own.
    pub labels: BTreeMap<String, String>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it got its value.
    pub updated_at: Timestamp,
    /// Counts values, from 1.
    pub sequence: u32,
    /// Bytes of the value.
    pub size: u64,
    /// The value.
    pub sealed: Sealed,
}

/// A directory that outlives containers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// The revision of its last write.
    pub version: u64,
    /// Unique.
    pub name: String,
    /// Options of the driver `local`, which is the only one.
    pub options: BTreeMap<String, String>,
    /// The user's own.
    pub labels: BTreeMap<String, String>,
    /// When it was created.
    pub created_at: Timestamp,
    /// Where its data is: given by the user, or by the first container that uses it.
    pub node: Option<NodeId>,
    /// One container at a time.
    pub exclusive: bool,
}

impl Volume {
    /// Whether its data is on one node.
    #[must_use]
    pub fn is_local(&self) -> bool {
        !self.options.get("type").is_some_and(|kind| kind.starts_with("nfs"))
    }
}

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

/// What the manager wants of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Desired {
    /// To run until it ends by itself.
    Running,
    /// To be stopped and removed.
    Removed,
}

/// Where a container is in its life; only ever rises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ContainerState {
    /// Made.
    New,
    /// No node takes it yet; the message says why.
    Pending,
    /// Given to a node.
    Assigned,
    /// Its agent has it.
    Accepted,
    /// Image and snapshot are being made ready.
    Preparing,
    /// The runtime creates and starts it.
    Starting,
    /// It runs.
    Running,
    /// It exited with 0.
    Complete,
    /// It was stopped.
    Shutdown,
    /// It exited otherwise.
    Failed,
    /// It could not be run at all.
    Rejected,
}

impl ContainerState {
    /// All of them, in order.
    pub const ALL: [Self; 11] = [
        Self::New,
        Self::Pending,
        Self::Assigned,
        Self::Accepted,
        Self::Preparing,
        Self::Starting,
        Self::Running,
        Self::Complete,
        Self::Shutdown,
        Self::Failed,
        Self::Rejected,
    ];

    /// Whether it has ended.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        self >= Self::Complete
    }

    /// Whether it ended otherwise than it should.
    #[must_use]
    pub fn is_failure(self) -> bool {
        matches!(self, Self::Failed | Self::Rejected)
    }

    /// As labels and tables show it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Pending => "pending",
            Self::Assigned => "assigned",
            Self::Accepted => "accepted",
            Self::Preparing => "preparing",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Complete => "complete",
            Self::Shutdown => "shutdown",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
        }
    }
}

/// Durations of a container's operations, in nanoseconds; 0 is unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// Its create.
    pub create_ns: u64,
    /// Its start.
    pub start_ns: u64,
    /// Its stop.
    pub stop_ns: u64,
}

/// What is observed of a container. Until it is assigned the manager writes it, from then on the node's agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Where it is.
    pub state: ContainerState,
    /// Why, in words.
    pub message: String,
    /// Since when.
    pub changed_at: Timestamp,
    /// 128 + signal for a signal.
    pub exit_code: Option<i32>,
    /// When its process began.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// In the node's initial PID namespace; 0 is unknown.
    pub pid: u32,
    /// As timed in the kernel.
    pub kernel: Timing,
    /// As timed around the runtime's calls.
    pub runtime: Timing,
    /// The OOM killer took it.
    pub oom_killed: bool,
    /// Its first process had no handler for the stop signal.
    pub signal_ignored: bool,
    /// In the cluster's network.
    pub addresses: Vec<IpAddr>,
    /// What its checks say.
    pub health: v1::Health,
    /// Why it is not healthy.
    pub health_message: String,
}

impl Status {
    /// A status that says no more than this.
    #[must_use]
    pub fn new(state: ContainerState, message: impl Into<String>, at: Timestamp) -> Self {
        Self {
            state,
            message: message.into(),
            changed_at: at,
            exit_code: None,
            started_at: None,
            finished_at: None,
            pid: 0,
            kernel: Timing::default(),
            runtime: Timing::default(),
            oom_killed: false,
            signal_ignored: false,
            addresses: Vec::new(),
            health: v1::Health::Unspecified,
            health_message: String::new(),
        }
    }

    /// Whether it runs and, if it is checked, has been found to do its work.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.state == ContainerState::Running && matches!(self.health, v1::Health::Unspecified | v1::Health::Healthy)
    }
}

pub(super) fn node_ports(ports: &[v1::Port]) -> impl Iterator<Item = &v1::Port> {
    ports.iter().filter(|port| port.host_port != 0 && port.publish_mode() == v1::PublishMode::Host)
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
