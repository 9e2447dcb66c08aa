//! The documented shapes of manifests, and what they are on the wire.

use std::{collections::BTreeMap, fmt};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{
    Deserialize, Deserializer,
    de::{self, Visitor},
};
use warren_proto::v1::{self, health_check::Check, service_spec::Mode};

use crate::parse;

/// Cores in the unit of `cpuShares`.
const SHARES_PER_CORE: i64 = 1024;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct ServiceSpec {
    image: String,
    replicas: Option<i64>,
    mode: Option<ServiceMode>,
    command: Vec<String>,
    args: Vec<String>,
    env: Env,
    labels: BTreeMap<String, String>,
    working_dir: String,
    user: String,
    hostname: String,
    read_only: bool,
    init: bool,
    cap_add: Vec<String>,
    cap_drop: Vec<String>,
    ulimits: BTreeMap<String, Ulimit>,
    sysctls: BTreeMap<String, Text>,
    devices: Vec<String>,
    privileged: bool,
    stop_signal: String,
    stop_timeout: Option<Duration>,
    ports: Vec<Port>,
    endpoint_mode: Option<EndpointMode>,
    network: Option<Network>,
    secrets: Vec<Secret>,
    configs: Vec<Secret>,
    registry_secret: String,
    pull_policy: Option<PullPolicy>,
    volumes: Vec<Volume>,
    tmpfs: Vec<Tmpfs>,
    health_check: Option<HealthCheck>,
    resources: Resources,
    restart_policy: Option<RestartPolicy>,
    constraints: Vec<String>,
    lost_after: Option<Duration>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ServiceMode {
    Replicated,
    Global,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum EndpointMode {
    Dnsrr,
    Vip,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Network {
    Cluster,
    Host,
    None,
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum PullPolicy {
    #[serde(alias = "if-not-present")]
    IfNotPresent,
    #[serde(alias = "always")]
    Always,
    #[serde(alias = "never")]
    Never,
}

/// A value that may look like a number or a truth and is meant as it is written: `PORT: 80`, `VERSION: 1.10`, `COUNTRY: NO`.
#[derive(Clone, Debug, Default)]
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

/// Variables in either form: `{PORT: 80}` or `[{name: PORT, value: 80}]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Env(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Env {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Pair {
            name: String,
            #[serde(default)]
            value: Text,
        }

        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Env;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of names to values, or a list of name and value")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Env, A::Error> {
                let mut env = BTreeMap::new();
                while let Some((name, value)) = map.next_entry::<String, Text>()? {
                    env.insert(name, value.0);
                }
                Ok(Env(env))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Env, A::Error> {
                let mut env = BTreeMap::new();
                while let Some(Pair { name, value }) = list.next_element()? {
                    if env.insert(name.clone(), value.0).is_some() {
                        return Err(de::Error::custom(format!("{name:?} is given twice")));
                    }
                }
                Ok(Env(env))
            }
        }

        deserializer.deserialize_any(Either)
    }
}

/// `10s`, `500ms`, or a number of seconds.
#[derive(Clone, Copy, Debug)]
struct Duration(pbjson_types::Duration);

impl<'de> Deserialize<'de> for Duration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Text::deserialize(deserializer)?;
        parse::duration(&text.0).map(Self).map_err(de::Error::custom)
    }
}

/// `64M`, or a number of bytes.
#[derive(Clone, Copy, Debug)]
struct Bytes(i64);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Text::deserialize(deserializer)?;
        parse::memory(&text.0).map(Self).map_err(de::Error::custom)
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
enum Ulimit {
    Both(i64),
    Each { soft: i64, hard: i64 },
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Port {
    name: String,
    container_port: u32,
    host_port: u32,
    protocol: Option<Protocol>,
    publish_mode: Option<PublishMode>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Protocol {
    #[serde(alias = "TCP")]
    Tcp,
    #[serde(alias = "UDP")]
    Udp,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum PublishMode {
    #[serde(alias = "HOST")]
    Host,
    #[serde(alias = "INGRESS")]
    Ingress,
}

/// A secret's name, or more about its file.
#[derive(Clone, Debug)]
enum Secret {
    Name(String),
    Mount(SecretMount),
}

// By hand: what serde derives for it reads values before it knows what they are to be, and 0440 is a number then.
impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Secret;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name, or a map with source, target, mode, uid, gid, onUpdate and signal")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Secret, E> {
                Ok(Secret::Name(name.to_owned()))
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Secret, A::Error> {
                SecretMount::deserialize(de::value::MapAccessDeserializer::new(map)).map(Secret::Mount)
            }
        }

        deserializer.deserialize_any(Either)
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct SecretMount {
    source: String,
    #[serde(default)]
    target: String,
    /// Octal, as text or as YAML has it.
    mode: Option<Text>,
    #[serde(default)]
    uid: u32,
    #[serde(default)]
    gid: u32,
    on_update: Option<OnUpdate>,
    #[serde(default)]
    signal: String,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum OnUpdate {
    None,
    Signal,
    Restart,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Volume {
    source: String,
    target: String,
    #[serde(default)]
    read_only: bool,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Tmpfs {
    target: String,
    size: Option<Bytes>,
    mode: Option<Text>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct HealthCheck {
    r#type: CheckType,
    #[serde(default)]
    endpoint: String,
    #[serde(default)]
    command: Vec<String>,
    interval: Option<Duration>,
    timeout: Option<Duration>,
    #[serde(default)]
    retries: u32,
    start_period: Option<Duration>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum CheckType {
    Http,
    Https,
    Tcp,
    Grpc,
    Exec,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Resources {
    limits: Amounts,
    reservations: Amounts,
    pids: i64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Amounts {
    /// 1024 are a core.
    cpu_shares: i64,
    /// Cores.
    cpus: Option<Text>,
    memory_bytes: Option<Bytes>,
    memory: Option<Bytes>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RestartPolicy {
    #[serde(default)]
    condition: Condition,
    #[serde(default)]
    max_attempts: u32,
    delay: Option<Duration>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Condition {
    #[default]
    #[serde(alias = "always")]
    Any,
    OnFailure,
    #[serde(alias = "none")]
    Never,
}

fn octal(text: &Text) -> Result<u32, String> {
    let digits = text.0.trim_start_matches("0o");
    u32::from_str_radix(digits, 8).map_err(|_| format!("{:?} is not an octal number; quote it", text.0))
}

impl Amounts {
    fn into_proto(self) -> Result<v1::ResourceAmounts, String> {
        let cpu_millis = match self.cpus {
            Some(cores) => parse::millis(&cores.0)?,
            None => self.cpu_shares.saturating_mul(1000) / SHARES_PER_CORE,
        };
        let memory_bytes = self.memory_bytes.or(self.memory).map_or(0, |bytes| bytes.0);
        Ok(v1::ResourceAmounts { cpu_millis, memory_bytes })
    }
}

impl Secret {
    fn into_proto(self) -> Result<v1::SecretMount, String> {
        let mount = match self {
            Self::Name(source) => return Ok(v1::SecretMount { source, ..Default::default() }),
            Self::Mount(mount) => mount,
        };
        let on_update = match mount.on_update {
            Some(OnUpdate::Signal) => v1::OnUpdate::Signal,
            Some(OnUpdate::Restart) => v1::OnUpdate::Restart,
            Some(OnUpdate::None) | None => v1::OnUpdate::None,
        };
        Ok(v1::SecretMount {
            source: mount.source,
            target: mount.target,
            mode: mount.mode.as_ref().map(octal).transpose()?.unwrap_or(0),
            uid: mount.uid,
            gid: mount.gid,
            on_update: on_update.into(),
            signal: mount.signal,
        })
    }
}

impl HealthCheck {
    fn into_proto(self) -> Result<v1::HealthCheck, String> {
        let check = match self.r#type {
            CheckType::Exec => Check::Exec(v1::ExecCheck { command: self.command }),
            kind => {
                let scheme = match kind {
                    CheckType::Http => "http",
                    CheckType::Https => "https",
                    CheckType::Tcp => "tcp",
                    CheckType::Grpc | CheckType::Exec => "grpc",
                };
                // The container itself is asked: which host the endpoint names is no matter.
                let rest = self.endpoint.split_once("://").map_or(self.endpoint.as_str(), |(_, rest)| rest);
                let port = rest.find(':').map(|at| &rest[at + 1..]);
                let port = port.ok_or_else(|| format!("healthCheck.endpoint: {:?} has no port", self.endpoint))?;
                parse::health(&format!("{scheme}://:{port}")).map_err(|why| format!("healthCheck.endpoint: {why}"))?
            }
        };
        Ok(v1::HealthCheck {
            check: Some(check),
            interval: self.interval.map(|d| d.0),
            timeout: self.timeout.map(|d| d.0),
            retries: self.retries,
            start_period: self.start_period.map(|d| d.0),
        })
    }
}

impl Port {
    fn into_proto(self) -> v1::Port {
        v1::Port {
            name: self.name,
            container_port: self.container_port,
            host_port: self.host_port,
            protocol: match self.protocol {
                Some(Protocol::Udp) => v1::Protocol::Udp,
                Some(Protocol::Tcp) | None => v1::Protocol::Tcp,
            }
            .into(),
            publish_mode: match self.publish_mode {
                Some(PublishMode::Host) => v1::PublishMode::Host,
                Some(PublishMode::Ingress) | None => v1::PublishMode::Ingress,
            }
            .into(),
        }
    }
}

impl ServiceSpec {
    pub(super) fn into_proto(self, name: String, labels: BTreeMap<String, String>) -> Result<v1::ServiceSpec, String> {
        let mode = match (self.mode, self.replicas) {
            (Some(ServiceMode::Global), Some(_)) => return Err("replicas: a global service has none".to_owned()),
            (Some(ServiceMode::Global), None) => Mode::Global(v1::Global {}),
            (_, replicas) => Mode::Replicated(v1::Replicated { replicas: replicas.unwrap_or(1) }),
        };
        let mut mounts = Vec::new();
        for volume in self.volumes {
            let kind = if volume.source.starts_with('/') { v1::MountType::Bind } else { v1::MountType::Volume };
            mounts.push(v1::Mount {
                r#type: kind.into(),
                source: volume.source,
                target: volume.target,
                read_only: volume.read_only,
                ..Default::default()
            });
        }
        for tmpfs in self.tmpfs {
            mounts.push(v1::Mount {
                r#type: v1::MountType::Tmpfs.into(),
                target: tmpfs.target,
                size_bytes: tmpfs.size.map_or(0, |size| size.0),
                mode: tmpfs.mode.as_ref().map(octal).transpose()?.unwrap_or(0),
                ..Default::default()
            });
        }
        let ulimit = |limit: Ulimit| match limit {
            Ulimit::Both(both) => v1::Ulimit { soft: both, hard: both },
            Ulimit::Each { soft, hard } => v1::Ulimit { soft, hard },
        };
        let devices: Result<Vec<_>, _> = self.devices.iter().map(|device| parse::device(device)).collect();
        let mounted = |list: Vec<Secret>| list.into_iter().map(Secret::into_proto).collect::<Result<Vec<_>, _>>();
        let container = v1::ContainerSpec {
            image: self.image,
            command: self.command,
            args: self.args,
            env: self.env.0,
            stop_signal: self.stop_signal,
            stop_timeout: self.stop_timeout.map(|timeout| timeout.0),
            working_dir: self.working_dir,
            user: self.user,
            labels: self.labels,
            hostname: self.hostname,
            read_only: self.read_only,
            init: self.init,
            capabilities_add: self.cap_add,
            capabilities_drop: self.cap_drop,
            ulimits: self.ulimits.into_iter().map(|(name, limit)| (name, ulimit(limit))).collect(),
            sysctls: self.sysctls.into_iter().map(|(name, value)| (name, value.0)).collect(),
            devices: devices.map_err(|why| format!("devices: {why}"))?,
            privileged: self.privileged,
            pids_limit: self.resources.pids,
            mounts,
            network: match self.network {
                Some(Network::Host) => v1::NetworkMode::Host,
                Some(Network::None) => v1::NetworkMode::None,
                Some(Network::Cluster) | None => v1::NetworkMode::Cluster,
            }
            .into(),
            pull_policy: match self.pull_policy {
                Some(PullPolicy::Always) => v1::PullPolicy::Always,
                Some(PullPolicy::Never) => v1::PullPolicy::Never,
                Some(PullPolicy::IfNotPresent) | None => v1::PullPolicy::IfNotPresent,
            }
            .into(),
            image_digest: String::new(),
            health_check: self.health_check.map(HealthCheck::into_proto).transpose()?,
            secrets: mounted(self.secrets).map_err(|why| format!("secrets: {why}"))?,
            configs: mounted(self.configs).map_err(|why| format!("configs: {why}"))?,
            registry_secret: self.registry_secret,
        };
        let restart = self.restart_policy.map(|policy| v1::RestartPolicy {
            condition: match policy.condition {
                Condition::Any => v1::RestartCondition::Any,
                Condition::OnFailure => v1::RestartCondition::OnFailure,
                Condition::Never => v1::RestartCondition::Never,
            }
            .into(),
            delay: policy.delay.map(|delay| delay.0),
            max_attempts: policy.max_attempts,
        });
        let in_resources = |why: String| format!("resources: {why}");
        Ok(v1::ServiceSpec {
            name,
            labels,
            mode: Some(mode),
            container: Some(container),
            resources: Some(v1::Resources {
                reservations: Some(self.resources.reservations.into_proto().map_err(in_resources)?),
                limits: Some(self.resources.limits.into_proto().map_err(in_resources)?),
            }),
            restart,
            ports: self.ports.into_iter().map(Port::into_proto).collect(),
            endpoint_mode: match self.endpoint_mode {
                Some(EndpointMode::Vip) => v1::EndpointMode::Vip,
                Some(EndpointMode::Dnsrr) | None => v1::EndpointMode::Dnsrr,
            }
            .into(),
            constraints: self.constraints,
            lost_after: self.lost_after.map(|after| after.0),
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct SecretSpec {
    #[serde(default, rename = "type")]
    _type: Option<String>,
    /// In base64.
    data: Option<String>,
    /// As it is.
    string_data: Option<String>,
}

impl SecretSpec {
    pub(super) fn value(self) -> Result<Vec<u8>, String> {
        match (self.data, self.string_data) {
            // What is wrong with it would quote it.
            (Some(data), None) => STANDARD.decode(data.trim()).map_err(|_| "spec.data: is not base64".to_owned()),
            (None, Some(text)) => Ok(text.into_bytes()),
            _ => Err("spec: either data, in base64, or stringData".to_owned()),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct VolumeSpec {
    #[serde(default)]
    driver: String,
    #[serde(default)]
    driver_opts: BTreeMap<String, Text>,
    #[serde(default)]
    exclusive: bool,
    #[serde(default)]
    node: String,
}

impl VolumeSpec {
    pub(super) fn into_proto(self, name: String, labels: BTreeMap<String, String>) -> v1::CreateVolumeRequest {
        v1::CreateVolumeRequest {
            name,
            driver: self.driver,
            driver_options: self.driver_opts.into_iter().map(|(name, value)| (name, value.0)).collect(),
            labels,
            exclusive: self.exclusive,
            node: self.node,
            request_id: crate::service::request_id(),
        }
    }
}
