//! Checking what users send. A refusal names the field and says what would be right.

mod container;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_STANDARD as BASE64};
use warren_proto::v1;

use crate::{
    messages::convert::{self, DEFAULT_RESTART},
    state::{
        AGENT_LABELS, Amounts, ClusterNetwork, Constraint, Description, Mode, Resources, RestartCondition,
        RestartPolicy, ServiceSpec, Trait, protocol_name,
    },
};

/// Whether a name can be shown, and passed on in a header.
pub(crate) fn is_printable(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_graphic())
}

/// What is wrong with a request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct Invalid {
    /// The field's path.
    pub field: Cow<'static, str>,
    /// What is wrong with it.
    pub why: String,
}

impl Invalid {
    /// A field and what is wrong with it.
    pub(crate) fn new(field: impl Into<Cow<'static, str>>, why: impl Into<String>) -> Self {
        Self { field: field.into(), why: why.into() }
    }
}

fn invalid<T>(field: impl Into<Cow<'static, str>>, why: impl Into<String>) -> Result<T, Invalid> {
    Err(Invalid::new(field, why))
}

/// What the cluster allows.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// What containers may have of their nodes.
    pub containers: warren_spec::Policy,
    /// The manager's own ports: API, then metrics; 0 is unused.
    pub own_ports: [u16; 2],
}

const MAX_NAME: usize = 63;
const MAX_REPLICAS: i64 = 100_000;
/// Arguments, variables and labels together must fit into a process's arguments and a log entry.
const MAX_TEXT: usize = 128 << 10;
const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);
/// Bytes or thousandths of a core: a pebibyte, or a million million cores. Sums of them cannot overflow.
const MAX_AMOUNT: i64 = 1 << 50;
/// Cores that a quota can express.
const MAX_CPU_LIMIT: i64 = 1_000_000;
/// The kernel refuses containers with less.
const MIN_MEMORY: i64 = 4 << 20;

/// The name of a secret, config or volume.
pub(crate) fn object_name(name: &str) -> Result<(), Invalid> {
    if !warren_spec::secret_name(name) {
        return invalid(
            "name",
            "is not 1 to 64 of letters, digits, '.', '_' and '-', beginning with a letter or digit",
        );
    }
    Ok(())
}

/// A service's spec, checked and completed.
///
/// # Errors
///
/// When a field is missing or out of its range.
pub(crate) fn service_spec(spec: Option<v1::ServiceSpec>, policy: &Policy) -> Result<ServiceSpec, Invalid> {
    let Some(spec) = spec else { return invalid("spec", "is missing") };
    name(&spec.name)?;
    let mode = match spec.mode {
        None => Mode::Replicated(1),
        Some(v1::service_spec::Mode::Global(_)) => Mode::Global,
        Some(v1::service_spec::Mode::Replicated(v1::Replicated { replicas })) => match u32::try_from(replicas) {
            Ok(count) if replicas <= MAX_REPLICAS => Mode::Replicated(count),
            _ => return invalid("spec.replicated.replicas", format!("{replicas} is not between 0 and {MAX_REPLICAS}")),
        },
    };
    if text(&spec.labels) > MAX_TEXT {
        return invalid("spec.labels", format!("are longer than {MAX_TEXT} bytes together"));
    }
    let mut container = container::check(spec.container, &policy.containers)?;
    say_in_full(&mut container);
    let mut ports = ports(spec.ports)?;
    for port in &mut ports {
        port.protocol = said(port.protocol(), v1::Protocol::Unspecified, v1::Protocol::Tcp).into();
        port.publish_mode = said(port.publish_mode(), v1::PublishMode::Unspecified, v1::PublishMode::Ingress).into();
    }
    if container.network() != v1::NetworkMode::Cluster
        && let Some(i) = ports.iter().position(|port| port.host_port != 0)
    {
        let why = "cannot be published: its containers have no network of their own";
        return invalid(format!("spec.ports[{i}].host_port"), why);
    }
    Ok(ServiceSpec {
        name: spec.name,
        labels: spec.labels,
        mode,
        container: Arc::new(container),
        resources: resources(spec.resources.unwrap_or_default())?,
        restart: restart(spec.restart)?,
        ports,
        endpoint_mode: match v1::EndpointMode::try_from(spec.endpoint_mode) {
            Ok(mode) => mode,
            Err(_) => return invalid("spec.endpoint_mode", format!("{} is not known", spec.endpoint_mode)),
        },
        constraints: constraints(&spec.constraints)?,
        lost_after: match spec.lost_after {
            None => Duration::ZERO,
            Some(wire) if wire.seconds < 0 || wire.nanos < 0 || convert::duration(&wire) > MAX_TIMEOUT => {
                return invalid("spec.lost_after", "is not between 0 and 24 h");
            }
            Some(wire) => convert::duration(&wire),
        },
    })
}

/// What somebody said, or what goes without saying.
fn said<T: PartialEq>(value: T, unspecified: T, default: T) -> T {
    if value == unspecified { default } else { value }
}

/// Says what goes without saying, so that the same spec by flags, by a manifest and by another client is the same: a difference would
/// replace containers.
pub(crate) fn say_in_full(container: &mut v1::ContainerSpec) {
    container.network = said(container.network(), v1::NetworkMode::Unspecified, v1::NetworkMode::Cluster).into();
    let pull = said(container.pull_policy(), v1::PullPolicy::Unspecified, v1::PullPolicy::IfNotPresent);
    container.pull_policy = pull.into();
    for mount in container.secrets.iter_mut().chain(&mut container.configs) {
        mount.on_update = said(mount.on_update(), v1::OnUpdate::Unspecified, v1::OnUpdate::Restart).into();
    }
}

const MAX_CONSTRAINTS: usize = 32;

fn constraints(texts: &[String]) -> Result<Vec<Constraint>, Invalid> {
    if texts.len() > MAX_CONSTRAINTS {
        return invalid("spec.constraints", format!("are more than {MAX_CONSTRAINTS}"));
    }
    let read = |(i, text): (usize, &String)| {
        let constraint = text.parse().map_err(|why: &str| Invalid::new(format!("spec.constraints[{i}]"), why));
        constraint.and_then(|constraint: Constraint| match &constraint.of {
            Trait::Label(name) => label_name(format!("spec.constraints[{i}]"), name).map(|()| constraint),
            _ => Ok(constraint),
        })
    };
    texts.iter().enumerate().map(read).collect()
}

const MAX_LABEL: usize = 128;

/// The name of a node's label.
fn label_name(field: impl Into<Cow<'static, str>>, name: &str) -> Result<(), Invalid> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    let framed = |c: char| c.is_ascii_alphanumeric();
    let whole = (1..=MAX_LABEL).contains(&name.len()) && name.chars().all(plain);
    if !whole || !name.starts_with(framed) || !name.ends_with(framed) {
        let why =
            format!("is not 1 to {MAX_LABEL} of letters, digits, '.', '_', '-' and '/', framed by letters or digits");
        return invalid(field, format!("{name:?} {why}"));
    }
    Ok(())
}

/// Labels that are to be set on a node, or, without a value, removed.
pub(crate) fn node_labels(labels: &BTreeMap<String, Option<String>>) -> Result<(), Invalid> {
    for (name, value) in labels {
        label_name("labels", name)?;
        if name.starts_with(AGENT_LABELS) && value.is_some() {
            let why = "is for what the agent's configuration says (warren-agent --label)";
            return invalid("labels", format!("{name:?}: {AGENT_LABELS} {why}"));
        }
        node_label_value("labels", name, value.as_deref().unwrap_or_default())?;
    }
    Ok(())
}

fn node_label_value(field: &'static str, name: &str, value: &str) -> Result<(), Invalid> {
    if value.len() > MAX_LABEL || value.chars().any(char::is_control) {
        return invalid(field, format!("the value of {name:?} is longer than {MAX_LABEL} bytes or unprintable"));
    }
    Ok(())
}

/// Labels that a node's agent is configured with, without the prefix that they get.
fn agent_labels(labels: &BTreeMap<String, String>) -> Result<(), Invalid> {
    const FIELD: &str = "description.labels";
    if labels.len() > MAX_AGENT_LABELS {
        return invalid(FIELD, format!("are more than {MAX_AGENT_LABELS}"));
    }
    for (name, value) in labels {
        label_name(FIELD, &format!("{AGENT_LABELS}{name}"))?;
        node_label_value(FIELD, name, value)?;
    }
    Ok(())
}

const MAX_AGENT_LABELS: usize = 64;
const MAX_HOSTNAME: usize = 253;
/// More than any machine has: 4096 CPUs, 64 TiB.
const MOST: Amounts = Amounts { cpu_millis: 4_096_000, memory_bytes: 64 << 40 };
/// Bytes of a public key of WireGuard.
const WIREGUARD_KEY: usize = 32;

/// What an agent says of its node.
pub(crate) fn description(description: &Description, network: Option<&ClusterNetwork>) -> Result<(), Invalid> {
    const HOSTNAME: &str = "description.hostname";
    let hostname = &description.hostname;
    if hostname.is_empty() || hostname.len() > MAX_HOSTNAME {
        return invalid(HOSTNAME, format!("is not 1 to {MAX_HOSTNAME} bytes long"));
    }
    if !is_printable(hostname) {
        return invalid(HOSTNAME, "has other than printable ASCII characters in it".to_owned());
    }
    let key = &description.wireguard_public_key;
    if !key.is_empty() && !BASE64.decode(key).is_ok_and(|bytes| bytes.len() == WIREGUARD_KEY) {
        return invalid("description.wireguard_public_key", format!("is not {WIREGUARD_KEY} bytes in base64"));
    }
    agent_labels(&description.labels)?;
    let Amounts { cpu_millis, memory_bytes } = description.resources;
    if !(0..=MOST.cpu_millis).contains(&cpu_millis) || !(0..=MOST.memory_bytes).contains(&memory_bytes) {
        return invalid("description.resources", "are more than any machine has".to_owned());
    }
    let Some(address) = description.address else { return Ok(()) };
    let why = if !is_hosts(address) {
        "is no address of a machine"
    } else if network.is_some_and(|network| network.prefixes().iter().any(|own| own.contains(&address))) {
        "is of the cluster's own networks"
    } else {
        return Ok(());
    };
    invalid("description.address", format!("{address} {why}"))
}

/// Whether a machine could be reached by an address.
fn is_hosts(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !(v4.is_unspecified() || v4.is_multicast() || v4.is_broadcast() || v4.is_link_local()),
        IpAddr::V6(v6) => !(v6.is_unspecified() || v6.is_multicast() || v6.is_unicast_link_local()),
    }
}

const MAX_PORTS: usize = 256;

fn ports(ports: Vec<v1::Port>) -> Result<Vec<v1::Port>, Invalid> {
    if ports.len() > MAX_PORTS {
        return invalid("spec.ports", format!("are more than {MAX_PORTS}"));
    }
    let mut published = BTreeSet::new();
    let mut names = BTreeSet::new();
    for (i, port) in ports.iter().enumerate() {
        let field = |name: &str| format!("spec.ports[{i}].{name}");
        if !port.name.is_empty() {
            label(field("name"), &port.name)?;
            if !names.insert(&port.name) {
                return invalid(field("name"), format!("{:?} is given twice", port.name));
            }
        }
        if !(1..=65535).contains(&port.container_port) {
            return invalid(field("container_port"), format!("{} is not between 1 and 65535", port.container_port));
        }
        if port.host_port > 65535 {
            return invalid(field("host_port"), format!("{} is not between 1 and 65535", port.host_port));
        }
        if v1::Protocol::try_from(port.protocol).is_err() {
            return invalid(field("protocol"), format!("{} is not known", port.protocol));
        }
        if v1::PublishMode::try_from(port.publish_mode).is_err() {
            return invalid(field("publish_mode"), format!("{} is not known", port.publish_mode));
        }
        if port.host_port != 0 && !published.insert((port.host_port, protocol_name(port))) {
            return invalid(field("host_port"), format!("{}/{} is given twice", port.host_port, protocol_name(port)));
        }
    }
    Ok(ports)
}

fn name(name: &str) -> Result<(), Invalid> {
    const FIELD: &str = "spec.name";
    if name.is_empty() {
        return invalid(FIELD, "is missing");
    }
    label(FIELD, name)
}

fn label(field: impl Into<Cow<'static, str>>, name: &str) -> Result<(), Invalid> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if name.is_empty()
        || name.len() > MAX_NAME
        || !name.bytes().all(allowed)
        || name.starts_with('-')
        || name.ends_with('-')
    {
        return invalid(
            field,
            format!(
                "{name:?} is no DNS label: 1 to {MAX_NAME} of a-z, 0-9 and '-', with a letter or digit at both ends"
            ),
        );
    }
    Ok(())
}

fn text(map: &BTreeMap<String, String>) -> usize {
    map.iter().map(|(key, value)| key.len() + value.len()).sum()
}

fn resources(wire: v1::Resources) -> Result<Resources, Invalid> {
    let reservations = wire.reservations.unwrap_or_default();
    let limits = wire.limits.unwrap_or_default();
    for (field, amount) in [
        ("spec.resources.reservations.cpu_millis", reservations.cpu_millis),
        ("spec.resources.reservations.memory_bytes", reservations.memory_bytes),
        ("spec.resources.limits.cpu_millis", limits.cpu_millis),
        ("spec.resources.limits.memory_bytes", limits.memory_bytes),
    ] {
        if amount < 0 {
            return invalid(field, format!("{amount} is negative"));
        }
        if amount > MAX_AMOUNT {
            return invalid(field, format!("{amount} is more than any machine has"));
        }
    }
    if limits.memory_bytes != 0 && limits.memory_bytes < MIN_MEMORY {
        return invalid("spec.resources.limits.memory_bytes", format!("is less than {MIN_MEMORY}"));
    }
    if limits.cpu_millis != 0 && !(10..=MAX_CPU_LIMIT).contains(&limits.cpu_millis) {
        return invalid("spec.resources.limits.cpu_millis", format!("is not between 10 and {MAX_CPU_LIMIT}"));
    }
    if limits.memory_bytes != 0 && reservations.memory_bytes > limits.memory_bytes {
        return invalid("spec.resources.reservations.memory_bytes", "is more than the limit");
    }
    if limits.cpu_millis != 0 && reservations.cpu_millis > limits.cpu_millis {
        return invalid("spec.resources.reservations.cpu_millis", "is more than the limit");
    }
    let amounts = |wire: v1::ResourceAmounts| Amounts {
        cpu_millis: wire.cpu_millis.unsigned_abs(),
        memory_bytes: wire.memory_bytes.unsigned_abs(),
    };
    Ok(Resources { reservations: amounts(reservations), limits: amounts(limits) })
}

fn restart(wire: Option<v1::RestartPolicy>) -> Result<RestartPolicy, Invalid> {
    let Some(wire) = wire else { return Ok(DEFAULT_RESTART) };
    let Ok(condition) = v1::RestartCondition::try_from(wire.condition) else {
        return invalid("spec.restart.condition", format!("{} is not known", wire.condition));
    };
    let condition = match condition {
        v1::RestartCondition::Unspecified | v1::RestartCondition::Any => RestartCondition::Any,
        v1::RestartCondition::OnFailure => RestartCondition::OnFailure,
        v1::RestartCondition::Never => RestartCondition::Never,
    };
    let delay = wire.delay.as_ref().map_or(DEFAULT_RESTART.delay, convert::duration);
    if delay > MAX_TIMEOUT {
        return invalid("spec.restart.delay", "is longer than a day");
    }
    Ok(RestartPolicy { condition, delay, max_attempts: wire.max_attempts })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> v1::ServiceSpec {
        v1::ServiceSpec {
            name: "web".to_owned(),
            container: Some(v1::ContainerSpec { image: "nginx".to_owned(), ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn what_is_left_out_has_defaults() {
        let spec = service_spec(Some(spec()), &Policy::default()).expect("valid");
        assert_eq!(spec.mode, Mode::Replicated(1));
        assert_eq!(spec.restart, DEFAULT_RESTART);
    }

    #[test]
    fn ports_are_checked_and_named() {
        let port = v1::Port { name: "http".to_owned(), container_port: 80, host_port: 8080, ..Default::default() };
        let open = Policy { containers: warren_spec::Policy::everything(), ..Policy::default() };
        let refused = |ports: &[v1::Port], network: v1::NetworkMode| {
            let mut spec = v1::ServiceSpec { ports: ports.to_vec(), ..spec() };
            spec.container.get_or_insert_default().network = network.into();
            service_spec(Some(spec), &open).err().map(|error| error.field.into_owned())
        };
        let clustered = |ports: &[v1::Port]| refused(ports, v1::NetworkMode::Cluster);
        let udp = v1::Port { name: String::new(), protocol: v1::Protocol::Udp.into(), ..port.clone() };
        assert_eq!(clustered(&[port.clone(), udp.clone()]), None);
        for (change, field) in [
            (v1::Port { name: "Http".to_owned(), ..port.clone() }, "name"),
            (v1::Port { container_port: 0, ..port.clone() }, "container_port"),
            (v1::Port { container_port: 65536, ..port.clone() }, "container_port"),
            (v1::Port { host_port: 65536, ..port.clone() }, "host_port"),
            (v1::Port { protocol: 9, ..port.clone() }, "protocol"),
            (v1::Port { publish_mode: 9, ..port.clone() }, "publish_mode"),
        ] {
            assert_eq!(clustered(&[change]), Some(format!("spec.ports[0].{field}")));
        }
        let twice = v1::Port { name: String::new(), ..port.clone() };
        assert_eq!(clustered(&[port.clone(), twice]), Some("spec.ports[1].host_port".to_owned()));
        assert_eq!(
            clustered(&[port.clone(), v1::Port { host_port: 1, ..port.clone() }]),
            Some("spec.ports[1].name".to_owned())
        );
        for network in [v1::NetworkMode::Host, v1::NetworkMode::None] {
            assert_eq!(refused(std::slice::from_ref(&udp), network), Some("spec.ports[0].host_port".to_owned()));
        }
    }

    #[test]
    fn refusals_name_the_field() {
        let with = |change: fn(&mut v1::ServiceSpec)| {
            let mut spec = spec();
            change(&mut spec);
            service_spec(Some(spec), &Policy::default()).expect_err("invalid").field
        };
        assert_eq!(service_spec(None, &Policy::default()).expect_err("invalid").field, "spec");
        for name in ["", "Web", "a_b", "-a", "a-", "a.b", "über"] {
            let spec = v1::ServiceSpec { name: name.to_owned(), ..spec() };
            assert_eq!(service_spec(Some(spec), &Policy::default()).expect_err(name).field, "spec.name");
        }
        assert_eq!(with(|spec| spec.name = "a".repeat(64)), "spec.name");
        let negative = v1::Replicated { replicas: -1 };
        let spec_with = v1::ServiceSpec { mode: Some(v1::service_spec::Mode::Replicated(negative)), ..spec() };
        assert_eq!(
            service_spec(Some(spec_with), &Policy::default()).expect_err("negative").field,
            "spec.replicated.replicas"
        );
        let mut bad_limit = spec();
        bad_limit.resources = Some(v1::Resources {
            reservations: Some(v1::ResourceAmounts { cpu_millis: -1, memory_bytes: 0 }),
            limits: None,
        });
        let field = service_spec(Some(bad_limit), &Policy::default()).expect_err("limit").field;
        assert_eq!(field, "spec.resources.reservations.cpu_millis");
    }
}
