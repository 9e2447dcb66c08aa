//! The documented shapes of manifests, and what they are on the wire.

use std::{collections::BTreeMap, fmt};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{
    Deserialize, Deserializer,
    de::{self, Visitor},
};
use warren_proto::v1::{self, health_check::Check, service_spec::Mode};

use crate::{Invalid, parse};

/// Cores in the unit of `cpuShares`.
const SHARES_PER_CORE: i64 = 1024;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct ServiceSpec {
    #[serde(deserialize_with = "or_default")]
    image: String,
    replicas: Option<i64>,
    mode: Option<ServiceMode>,
    #[serde(deserialize_with = "or_default")]
    command: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    args: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    env: Env,
    #[serde(deserialize_with = "or_default")]
    labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "or_default")]
    working_dir: String,
    #[serde(deserialize_with = "or_default")]
    user: String,
    #[serde(deserialize_with = "or_default")]
    hostname: String,
    #[serde(deserialize_with = "or_default")]
    read_only: bool,
    #[serde(deserialize_with = "or_default")]
    init: bool,
    #[serde(deserialize_with = "or_default")]
    cap_add: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    cap_drop: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    ulimits: BTreeMap<String, Ulimit>,
    #[serde(deserialize_with = "or_default")]
    sysctls: BTreeMap<String, Text>,
    #[serde(deserialize_with = "or_default")]
    devices: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    privileged: bool,
    no_new_privileges: Option<bool>,
    #[serde(deserialize_with = "or_default")]
    stop_signal: String,
    stop_timeout: Option<Duration>,
    #[serde(deserialize_with = "or_default")]
    ports: Vec<OrWords<AnyPort>>,
    endpoint_mode: Option<EndpointMode>,
    network: Option<Network>,
    #[serde(deserialize_with = "or_default")]
    secrets: Vec<Secret>,
    #[serde(deserialize_with = "or_default")]
    configs: Vec<Secret>,
    #[serde(deserialize_with = "or_default")]
    registry_secret: String,
    pull_policy: Option<PullPolicy>,
    #[serde(deserialize_with = "or_default")]
    volumes: Vec<OrWords<Volume>>,
    #[serde(deserialize_with = "or_default")]
    tmpfs: Vec<OrWords<Tmpfs>>,
    health_check: Option<OrWords<AnyCheck>>,
    #[serde(deserialize_with = "or_default")]
    resources: Resources,
    restart_policy: Option<OrWords<RestartPolicy>>,
    #[serde(deserialize_with = "or_default")]
    constraints: Vec<String>,
    lost_after: Option<Duration>,
}

/// A key without a value is a key that is not there.
pub(super) fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
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
            #[serde(default, deserialize_with = "or_default")]
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
                while let Some((name, value)) = map.next_entry::<String, Option<Text>>()? {
                    env.insert(name, value.unwrap_or_default().0);
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
    #[serde(deserialize_with = "or_default")]
    name: String,
    #[serde(deserialize_with = "or_default")]
    container_port: u32,
    #[serde(deserialize_with = "or_default")]
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
                f.write_str(
                    "a name, or a map with source, target, mode, uid, gid, onUpdate and signal, or with source and env",
                )
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
    #[serde(default, deserialize_with = "or_default")]
    target: String,
    /// Octal, as text or as YAML has it.
    mode: Option<Text>,
    /// Names or numbers.
    #[serde(default, deserialize_with = "or_default", alias = "user")]
    uid: Text,
    #[serde(default, deserialize_with = "or_default", alias = "group")]
    gid: Text,
    on_update: Option<OnUpdate>,
    #[serde(default, deserialize_with = "or_default")]
    signal: String,
    /// A variable instead of a file.
    env: Option<String>,
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
    #[serde(default, deserialize_with = "or_default")]
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
    #[serde(default, deserialize_with = "or_default")]
    endpoint: String,
    /// Of a request by HTTP.
    #[serde(default, deserialize_with = "or_default")]
    headers: BTreeMap<String, Text>,
    #[serde(default, deserialize_with = "or_default")]
    command: Vec<String>,
    interval: Option<Duration>,
    timeout: Option<Duration>,
    #[serde(default, deserialize_with = "or_default")]
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
    #[serde(deserialize_with = "or_default")]
    limits: Amounts,
    #[serde(deserialize_with = "or_default")]
    reservations: Amounts,
    #[serde(deserialize_with = "or_default")]
    pids: i64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Amounts {
    /// 1024 are a core.
    #[serde(deserialize_with = "or_default")]
    cpu_shares: i64,
    /// Cores.
    cpus: Option<Text>,
    memory_bytes: Option<Bytes>,
    memory: Option<Bytes>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RestartPolicy {
    #[serde(default, deserialize_with = "or_default")]
    condition: Condition,
    #[serde(default, deserialize_with = "or_default")]
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

/// Says where something is wrong.
fn at(path: impl Into<String>) -> impl FnOnce(String) -> Invalid {
    let path = path.into();
    move |why| Invalid::new(path, why)
}

/// What may be written in the words of the command line instead of a map: `8080:80`, `on-failure`.
trait FromWords: Sized {
    /// Both forms, for whoever wrote a third.
    const EXPECTED: &'static str;

    fn from_words(words: &str) -> Result<Self, String>;
}

/// In words, or as a map.
#[derive(Clone, Debug)]
struct OrWords<T>(T);

impl<'de, T: Deserialize<'de> + FromWords> Deserialize<'de> for OrWords<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either<T>(std::marker::PhantomData<T>);

        impl<'de, T: Deserialize<'de> + FromWords> Visitor<'de> for Either<T> {
            type Value = OrWords<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(T::EXPECTED)
            }

            fn visit_str<E: de::Error>(self, words: &str) -> Result<OrWords<T>, E> {
                T::from_words(words).map(OrWords).map_err(E::custom)
            }

            // YAML of old has `no` for false.
            fn visit_bool<E: de::Error>(self, truth: bool) -> Result<OrWords<T>, E> {
                self.visit_str(if truth { "yes" } else { "no" })
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<OrWords<T>, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<OrWords<T>, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<OrWords<T>, A::Error> {
                T::deserialize(de::value::MapAccessDeserializer::new(map)).map(OrWords)
            }
        }

        deserializer.deserialize_any(Either(std::marker::PhantomData))
    }
}

/// `data:/data:ro`, `/srv/files:/files`, or as `--mount` has it.
impl FromWords for Volume {
    const EXPECTED: &'static str = "a map with source, target and readOnly, or SOURCE:TARGET[:ro]";

    fn from_words(words: &str) -> Result<Self, String> {
        if words.contains('=') {
            let mount = parse::mount(words)?;
            return match mount.r#type() {
                v1::MountType::Tmpfs => Err("in memory: say it under tmpfs".to_owned()),
                _ => Ok(Self { source: mount.source, target: mount.target, read_only: mount.read_only }),
            };
        }
        let mut parts = words.split(':');
        let (source, target) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let read_only = match parts.next() {
            None | Some("rw") => false,
            Some("ro") => true,
            Some(_) => return Err(format!("{words:?} is not SOURCE:TARGET[:ro]")),
        };
        if source.is_empty() || target.is_empty() || parts.next().is_some() {
            return Err(format!("{words:?} is not SOURCE:TARGET[:ro]"));
        }
        Ok(Self { source: source.to_owned(), target: target.to_owned(), read_only })
    }
}

/// `/tmp`, or `/tmp:size=64M,mode=1777`.
impl FromWords for Tmpfs {
    const EXPECTED: &'static str = "a map with target, size and mode, or TARGET[:size=64M,mode=1777]";

    fn from_words(words: &str) -> Result<Self, String> {
        let (target, options) = words.split_once(':').unwrap_or((words, ""));
        let mut tmpfs = Self { target: target.to_owned(), size: None, mode: None };
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some(("size", size)) => tmpfs.size = Some(Bytes(parse::memory(size)?)),
                Some(("mode", mode)) => tmpfs.mode = Some(Text(mode.to_owned())),
                _ => return Err(format!("{option:?} is no option of a tmpfs: size or mode")),
            }
        }
        Ok(tmpfs)
    }
}

/// A port as `--publish` has it.
#[derive(Clone, Debug)]
struct AnyPort(v1::Port);

impl<'de> Deserialize<'de> for AnyPort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Port::deserialize(deserializer).map(|port| Self(port.into_proto()))
    }
}

impl FromWords for AnyPort {
    const EXPECTED: &'static str =
        "a map with containerPort, hostPort, protocol, publishMode and name, or PUBLISHED:TARGET[/PROTOCOL]";

    fn from_words(words: &str) -> Result<Self, String> {
        parse::port(words).map(Self)
    }
}

/// A check as `--health` has it.
#[derive(Clone, Debug)]
enum AnyCheck {
    Map(HealthCheck),
    Words(Check),
}

impl<'de> Deserialize<'de> for AnyCheck {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        HealthCheck::deserialize(deserializer).map(Self::Map)
    }
}

impl FromWords for AnyCheck {
    const EXPECTED: &'static str = "a map with type, endpoint or command, interval, timeout, retries and startPeriod, or http://:8080/path and the like";

    fn from_words(words: &str) -> Result<Self, String> {
        parse::health(words).map(Self::Words)
    }
}

impl AnyCheck {
    fn into_proto(self) -> Result<v1::HealthCheck, Invalid> {
        match self {
            Self::Map(check) => check.into_proto(),
            Self::Words(check) => Ok(v1::HealthCheck { check: Some(check), ..Default::default() }),
        }
    }
}

/// `any`, `on-failure`, `on-failure:3`, `never`; Docker's `always`, `unless-stopped` and `no` are the same as the first and the last.
impl FromWords for RestartPolicy {
    const EXPECTED: &'static str = "any, on-failure or never, or a map with condition, delay and maxAttempts";

    fn from_words(words: &str) -> Result<Self, String> {
        let (condition, attempts) = words.split_once(':').unwrap_or((words, "0"));
        let wrong = || format!("{words:?} is not any, on-failure, on-failure:ATTEMPTS or never");
        let condition = match condition {
            "any" | "always" | "unless-stopped" => Condition::Any,
            "on-failure" => Condition::OnFailure,
            "never" | "none" | "no" => Condition::Never,
            _ => return Err(wrong()),
        };
        Ok(Self { condition, max_attempts: attempts.parse().map_err(|_| wrong())?, delay: None })
    }
}

impl Amounts {
    fn into_proto(self, path: &str) -> Result<v1::ResourceAmounts, Invalid> {
        let cpu_millis = match self.cpus {
            Some(cores) => parse::millis(&cores.0).map_err(at(format!("{path}.cpus")))?,
            None => self.cpu_shares.saturating_mul(1000) / SHARES_PER_CORE,
        };
        let memory_bytes = self.memory_bytes.or(self.memory).map_or(0, |bytes| bytes.0);
        Ok(v1::ResourceAmounts { cpu_millis, memory_bytes })
    }
}

impl Secret {
    fn into_proto(self, path: &str) -> Result<v1::SecretMount, Invalid> {
        let mount = match self {
            Self::Name(source) => {
                let on_update = v1::OnUpdate::Restart.into();
                return Ok(v1::SecretMount { source, on_update, ..Default::default() });
            }
            Self::Mount(mount) => mount,
        };
        let on_update = match mount.on_update {
            Some(OnUpdate::Signal) => v1::OnUpdate::Signal,
            Some(OnUpdate::None) => v1::OnUpdate::None,
            Some(OnUpdate::Restart) | None => v1::OnUpdate::Restart,
        };
        Ok(v1::SecretMount {
            source: mount.source,
            target: mount.target,
            mode: mount.mode.as_ref().map(octal).transpose().map_err(at(format!("{path}.mode")))?.unwrap_or(0),
            on_update: on_update.into(),
            signal: mount.signal,
            user: mount.uid.0,
            group: mount.gid.0,
            env: match mount.env {
                Some(name) if name.is_empty() => return Err(Invalid::new(format!("{path}.env"), "names no variable")),
                name => name.unwrap_or_default(),
            },
            ..Default::default()
        })
    }
}

impl HealthCheck {
    fn into_proto(self) -> Result<v1::HealthCheck, Invalid> {
        let endpoint = |why: String| at("spec.healthCheck.endpoint")(why);
        let headers: BTreeMap<_, _> = self.headers.into_iter().map(|(name, value)| (name, value.0)).collect();
        let check = match self.r#type {
            _ if !headers.is_empty() && !matches!(self.r#type, CheckType::Http | CheckType::Https) => {
                return Err(Invalid::new("spec.healthCheck.headers", "only requests by HTTP have headers"));
            }
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
                let port = port.ok_or_else(|| endpoint(format!("{:?} has no port", self.endpoint)))?;
                match parse::health(&format!("{scheme}://:{port}")).map_err(endpoint)? {
                    Check::Http(check) => Check::Http(v1::HttpCheck { headers, ..check }),
                    check => check,
                }
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
    pub(super) fn into_proto(self, name: String, labels: BTreeMap<String, String>) -> Result<v1::ServiceSpec, Invalid> {
        let mode = match (self.mode, self.replicas) {
            (Some(ServiceMode::Global), Some(_)) => {
                return Err(Invalid::new("spec.replicas", "a global service has none"));
            }
            (Some(ServiceMode::Global), None) => Mode::Global(v1::Global {}),
            (_, replicas) => Mode::Replicated(v1::Replicated { replicas: replicas.unwrap_or(1) }),
        };
        let mut mounts = Vec::new();
        for OrWords(volume) in self.volumes {
            let kind = if volume.source.starts_with('/') { v1::MountType::Bind } else { v1::MountType::Volume };
            mounts.push(v1::Mount {
                r#type: kind.into(),
                source: volume.source,
                target: volume.target,
                read_only: volume.read_only,
                ..Default::default()
            });
        }
        for (i, OrWords(tmpfs)) in self.tmpfs.into_iter().enumerate() {
            let mode = tmpfs.mode.as_ref().map(octal).transpose().map_err(at(format!("spec.tmpfs[{i}].mode")))?;
            mounts.push(v1::Mount {
                r#type: v1::MountType::Tmpfs.into(),
                target: tmpfs.target,
                size_bytes: tmpfs.size.map_or(0, |size| size.0),
                mode: mode.unwrap_or(0),
                ..Default::default()
            });
        }
        let ulimit = |limit: Ulimit| match limit {
            Ulimit::Both(both) => v1::Ulimit { soft: both, hard: both },
            Ulimit::Each { soft, hard } => v1::Ulimit { soft, hard },
        };
        let devices: Result<Vec<_>, _> = self.devices.iter().map(|device| parse::device(device)).collect();
        let mounted = |list: Vec<Secret>, key: &str| {
            let each = list.into_iter().enumerate();
            each.map(|(i, secret)| secret.into_proto(&format!("spec.{key}[{i}]"))).collect::<Result<Vec<_>, _>>()
        };
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
            devices: devices.map_err(at("spec.devices"))?,
            privileged: self.privileged,
            no_new_privileges: self.no_new_privileges,
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
            health_check: self.health_check.map(|check| check.0.into_proto()).transpose()?,
            secrets: mounted(self.secrets, "secrets")?,
            configs: mounted(self.configs, "configs")?,
            registry_secret: self.registry_secret,
        };
        let restart = self.restart_policy.map(|OrWords(policy)| v1::RestartPolicy {
            condition: match policy.condition {
                Condition::Any => v1::RestartCondition::Any,
                Condition::OnFailure => v1::RestartCondition::OnFailure,
                Condition::Never => v1::RestartCondition::Never,
            }
            .into(),
            delay: policy.delay.map(|delay| delay.0),
            max_attempts: policy.max_attempts,
        });
        Ok(v1::ServiceSpec {
            name,
            labels,
            mode: Some(mode),
            container: Some(container),
            resources: Some(v1::Resources {
                reservations: Some(self.resources.reservations.into_proto("spec.resources.reservations")?),
                limits: Some(self.resources.limits.into_proto("spec.resources.limits")?),
            }),
            restart,
            ports: self.ports.into_iter().map(|OrWords(AnyPort(port))| port).collect(),
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
    pub(super) fn value(self) -> Result<Vec<u8>, Invalid> {
        match (self.data, self.string_data) {
            // What is wrong with it would quote it.
            (Some(data), None) => STANDARD
                .decode(data.split_ascii_whitespace().collect::<String>())
                .map_err(|_| Invalid::new("spec.data", "is not base64")),
            (None, Some(text)) => Ok(text.into_bytes()),
            _ => Err(Invalid::new("spec", "is to have either data, in base64, or stringData")),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct VolumeSpec {
    #[serde(default, deserialize_with = "or_default")]
    driver: String,
    #[serde(default, deserialize_with = "or_default")]
    driver_opts: BTreeMap<String, Text>,
    #[serde(default, deserialize_with = "or_default")]
    exclusive: bool,
    #[serde(default, deserialize_with = "or_default")]
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
            request_id: String::new(),
        }
    }
}
