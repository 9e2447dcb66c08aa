//! Between the wire's messages and the state's types.

use std::{sync::Arc, time::Duration};

use warren_proto::v1;

use crate::{
    clock::Timestamp,
    control::{
        liveness::{Condition, Health, Standing},
        reconciler,
    },
    ids::NodeId,
    state::{
        Amounts, Availability, Container, ContainerState, Description, Desired, Mode, Node, Probes, Resources,
        RestartCondition, RestartPolicy, Service, ServiceSpec, State, Status, Timing, Volume,
    },
};

/// Durations on the wire are not negative, or they are zero.
#[must_use]
pub(crate) fn duration(wire: &pbjson_types::Duration) -> Duration {
    let seconds = u64::try_from(wire.seconds).unwrap_or(0);
    Duration::new(seconds, u32::try_from(wire.nanos).unwrap_or(0).min(999_999_999))
}

pub(crate) fn wire_duration(duration: Duration) -> pbjson_types::Duration {
    pbjson_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: duration.subsec_nanos() as i32,
    }
}

fn wire_amounts(amounts: Amounts) -> v1::ResourceAmounts {
    v1::ResourceAmounts {
        cpu_millis: i64::try_from(amounts.cpu_millis).unwrap_or(i64::MAX),
        memory_bytes: i64::try_from(amounts.memory_bytes).unwrap_or(i64::MAX),
    }
}

fn amounts(wire: &v1::ResourceAmounts) -> Amounts {
    Amounts {
        cpu_millis: u64::try_from(wire.cpu_millis).unwrap_or(0),
        memory_bytes: u64::try_from(wire.memory_bytes).unwrap_or(0),
    }
}

fn wire_resources(resources: &Resources) -> v1::Resources {
    v1::Resources {
        reservations: Some(wire_amounts(resources.reservations)),
        limits: Some(wire_amounts(resources.limits)),
    }
}

/// As text, one by one.
pub(crate) fn text(list: impl IntoIterator<Item = impl ToString>) -> Vec<String> {
    list.into_iter().map(|item| item.to_string()).collect()
}

fn wire_spec(spec: &ServiceSpec) -> v1::ServiceSpec {
    let condition = match spec.restart.condition {
        RestartCondition::Any => v1::RestartCondition::Any,
        RestartCondition::OnFailure => v1::RestartCondition::OnFailure,
        RestartCondition::Never => v1::RestartCondition::Never,
    };
    v1::ServiceSpec {
        name: spec.name.clone(),
        labels: spec.labels.clone(),
        mode: Some(match spec.mode {
            Mode::Replicated(replicas) => {
                v1::service_spec::Mode::Replicated(v1::Replicated { replicas: replicas.into() })
            }
            Mode::Global => v1::service_spec::Mode::Global(v1::Global {}),
        }),
        container: Some(v1::ContainerSpec::clone(&spec.container)),
        resources: Some(wire_resources(&spec.resources)),
        restart: Some(v1::RestartPolicy {
            condition: condition.into(),
            delay: Some(wire_duration(spec.restart.delay)),
            max_attempts: spec.restart.max_attempts,
        }),
        ports: spec.ports.clone(),
        endpoint_mode: spec.endpoint_mode.into(),
        constraints: text(&spec.constraints),
        lost_after: Some(spec.lost_after).filter(|after| !after.is_zero()).map(wire_duration),
    }
}

/// How many containers a service is to have.
#[must_use]
pub(crate) fn desired(service: &Service, state: &State) -> u32 {
    match service.spec.mode {
        Mode::Replicated(replicas) => replicas,
        Mode::Global => {
            // A cordoned node keeps what it has, and is missed by nobody if it has none.
            let has = |node: &Node| {
                let mut own = state.containers_on(&node.id).filter(|container| container.service == service.id);
                own.any(|container| container.desired == Desired::Running && !container.status.state.is_terminal())
            };
            let wanted = |node: &&Arc<Node>| {
                reconciler::is_for(node, &service.spec.constraints)
                    && (node.availability == Availability::Active || has(node))
            };
            u32::try_from(state.nodes().filter(wanted).count()).unwrap_or(u32::MAX)
        }
    }
}

/// A service with its containers counted. Of those on a node that is down nobody knows whether they run.
#[must_use]
pub(crate) fn service(service: &Service, state: &State, health: impl Fn(&NodeId) -> Health) -> v1::Service {
    let desired = desired(service, state);
    let is_down = |container: &Container| container.node.as_ref().is_some_and(|node| health(node) == Health::Down);
    let running = state
        .containers_of(&service.id)
        .filter(|container| container.status.state == ContainerState::Running && container.desired == Desired::Running)
        .filter(|container| !is_down(container))
        .count();
    v1::Service {
        id: service.id.to_string(),
        version: service.version,
        created_at: Some(service.created_at.to_proto()),
        updated_at: Some(service.updated_at.to_proto()),
        spec: Some(wire_spec(&service.spec)),
        status: Some(v1::ServiceStatus { desired, running: u32::try_from(running).unwrap_or(u32::MAX) }),
        virtual_addresses: text(state.virtual_addresses_of(service)),
        revision: service.generation,
    }
}

fn wire_state(state: ContainerState) -> v1::ContainerState {
    match state {
        ContainerState::New => v1::ContainerState::New,
        ContainerState::Pending => v1::ContainerState::Pending,
        ContainerState::Assigned => v1::ContainerState::Assigned,
        ContainerState::Accepted => v1::ContainerState::Accepted,
        ContainerState::Preparing => v1::ContainerState::Preparing,
        ContainerState::Starting => v1::ContainerState::Starting,
        ContainerState::Running => v1::ContainerState::Running,
        ContainerState::Complete => v1::ContainerState::Complete,
        ContainerState::Shutdown => v1::ContainerState::Shutdown,
        ContainerState::Failed => v1::ContainerState::Failed,
        ContainerState::Rejected => v1::ContainerState::Rejected,
    }
}

fn timing(wire: Option<v1::Timing>) -> Timing {
    wire.map_or_else(Timing::default, |wire| Timing {
        create_ns: wire.create_nanos,
        start_ns: wire.start_nanos,
        stop_ns: wire.stop_nanos,
    })
}

fn wire_timing(timing: Timing) -> v1::Timing {
    v1::Timing { create_nanos: timing.create_ns, start_nanos: timing.start_ns, stop_nanos: timing.stop_ns }
}

/// Bytes of what an agent says in words about a container: it is kept in the log, and told to everybody.
const MAX_WORDS: usize = 1024;

/// The beginning of what an agent says.
fn beginning(mut words: String) -> String {
    if words.len() > MAX_WORDS {
        words.truncate(words.floor_char_boundary(MAX_WORDS));
        words.push('\u{2026}');
    }
    words
}

/// A status that an agent may report; `None` for states that are the manager's to set.
#[must_use]
pub(crate) fn observed_status(wire: v1::ContainerStatus) -> Option<Status> {
    let state = match wire.state() {
        v1::ContainerState::Accepted => ContainerState::Accepted,
        v1::ContainerState::Preparing => ContainerState::Preparing,
        v1::ContainerState::Starting => ContainerState::Starting,
        v1::ContainerState::Running => ContainerState::Running,
        v1::ContainerState::Complete => ContainerState::Complete,
        v1::ContainerState::Shutdown => ContainerState::Shutdown,
        v1::ContainerState::Failed => ContainerState::Failed,
        v1::ContainerState::Rejected => ContainerState::Rejected,
        _ => return None,
    };
    let time = |wire: Option<pbjson_types::Timestamp>| wire.as_ref().map(Timestamp::from_proto);
    Some(Status {
        state,
        message: beginning(wire.message),
        changed_at: time(wire.changed_at).unwrap_or_default(),
        exit_code: wire.exit_code,
        started_at: time(wire.started_at),
        finished_at: time(wire.finished_at),
        pid: wire.pid,
        kernel: timing(wire.kernel),
        runtime: timing(wire.runtime),
        oom_killed: wire.oom_killed,
        signal_ignored: wire.signal_ignored,
        addresses: wire.addresses.iter().filter_map(|address| address.parse().ok()).collect(),
        health: v1::Health::try_from(wire.health).unwrap_or_default(),
        health_message: beginning(wire.health_message),
    })
}

fn wire_status(status: &Status) -> v1::ContainerStatus {
    v1::ContainerStatus {
        state: wire_state(status.state).into(),
        message: status.message.clone(),
        changed_at: Some(status.changed_at.to_proto()),
        exit_code: status.exit_code,
        started_at: status.started_at.map(Timestamp::to_proto),
        finished_at: status.finished_at.map(Timestamp::to_proto),
        pid: status.pid,
        kernel: Some(wire_timing(status.kernel)),
        runtime: Some(wire_timing(status.runtime)),
        oom_killed: status.oom_killed,
        signal_ignored: status.signal_ignored,
        addresses: text(&status.addresses),
        health: status.health.into(),
        health_message: status.health_message.clone(),
    }
}

fn wire_desired(desired: Desired) -> v1::ContainerState {
    match desired {
        Desired::Running => v1::ContainerState::Running,
        Desired::Removed => v1::ContainerState::Removed,
    }
}

/// A container.
#[must_use]
pub(crate) fn container(container: &Container) -> v1::Container {
    v1::Container {
        id: container.id.to_string(),
        version: container.version,
        service_id: container.service.to_string(),
        service_name: container.service_name.clone(),
        slot: container.slot,
        node_id: container.node.as_ref().map(ToString::to_string).unwrap_or_default(),
        created_at: Some(container.created_at.to_proto()),
        desired_state: wire_desired(container.desired).into(),
        status: Some(wire_status(&container.status)),
        spec: Some(v1::ContainerSpec::clone(&container.revision.spec)),
        resources: Some(wire_resources(&container.revision.resources)),
        revision: container.revision.number,
        failures: container.failures,
        // Who asks for it knows what time it is.
        next_try_at: None,
    }
}

/// A container as its agent gets it.
#[must_use]
pub(crate) fn assignment(container: &Container, state: &State) -> v1::Assignment {
    v1::Assignment {
        container_id: container.id.to_string(),
        service_id: container.service.to_string(),
        service_name: container.service_name.clone(),
        slot: container.slot,
        // To stop it, its agent needs no spec.
        spec: (container.desired == Desired::Running).then(|| v1::ContainerSpec::clone(&container.revision.spec)),
        resources: Some(wire_resources(&container.revision.resources)),
        desired_state: wire_desired(container.desired).into(),
        volumes: state.volumes_of(&container.revision.spec).map(|volume| self::volume(volume, &[])).collect(),
    }
}

/// A volume, and the services that use it.
#[must_use]
pub(crate) fn volume(volume: &Volume, used_by: &[String]) -> v1::Volume {
    v1::Volume {
        id: volume.id.to_string(),
        version: volume.version,
        name: volume.name.clone(),
        driver: "local".to_owned(),
        driver_options: volume.options.clone(),
        labels: volume.labels.clone(),
        created_at: Some(volume.created_at.to_proto()),
        node_id: volume.node.as_ref().map(ToString::to_string).unwrap_or_default(),
        exclusive: volume.exclusive,
        used_by: used_by.to_vec(),
    }
}

/// What an agent says of its node.
#[must_use]
pub(crate) fn description(wire: v1::NodeDescription) -> Description {
    let probes = wire.probes.unwrap_or_default();
    Description {
        hostname: wire.hostname,
        labels: wire.labels,
        resources: wire.resources.as_ref().map(amounts).unwrap_or_default(),
        agent_version: wire.agent_version,
        architecture: wire.architecture,
        kernel: wire.kernel,
        probes: Probes { lifecycle: probes.lifecycle, dns: probes.dns, message: probes.message },
        address: wire.address.parse().ok(),
        wireguard_public_key: wire.wireguard_public_key,
    }
}

/// A node with what is reserved on it.
#[must_use]
pub(crate) fn node(node: &Node, state: &State, standing: Standing, conditions: &[Condition]) -> v1::Node {
    let (mut reserved, mut containers) = (Amounts::default(), 0);
    for container in state.containers_on(&node.id).filter(|container| container.holds_resources()) {
        reserved.cpu_millis += container.revision.resources.reservations.cpu_millis;
        reserved.memory_bytes += container.revision.resources.reservations.memory_bytes;
        containers += 1;
    }
    let (status, status_message) = match standing.health {
        Health::Unknown => (v1::NodeStatus::Unspecified, "not heard of since the leader changed".to_owned()),
        Health::Ready => (v1::NodeStatus::Ready, String::new()),
        Health::Unsteady => (v1::NodeStatus::Ready, "it went down too often lately to be given more".to_owned()),
        Health::NotReady => (v1::NodeStatus::NotReady, described(conditions.iter().filter(|it| it.blocks))),
        Health::Down => {
            let seconds = standing.down_for.as_secs();
            (v1::NodeStatus::Down, format!("its agent is silent; down for {seconds} s as this leader knows"))
        }
    };
    let description = &node.description;
    v1::Node {
        id: node.id.to_string(),
        version: node.version,
        created_at: Some(node.created_at.to_proto()),
        description: Some(v1::NodeDescription {
            hostname: description.hostname.clone(),
            labels: description.labels.clone(),
            resources: Some(wire_amounts(description.resources)),
            agent_version: description.agent_version.clone(),
            architecture: description.architecture.clone(),
            kernel: description.kernel.clone(),
            probes: Some(v1::ProbeReport {
                lifecycle: description.probes.lifecycle,
                dns: description.probes.dns,
                message: description.probes.message.clone(),
            }),
            address: description.address.map(|address| address.to_string()).unwrap_or_default(),
            wireguard_public_key: description.wireguard_public_key.clone(),
        }),
        status: status.into(),
        status_message,
        reserved: Some(wire_amounts(reserved)),
        containers,
        subnets: text(state.subnets_of(node)),
        availability: match node.availability {
            Availability::Active => v1::Availability::Active,
            Availability::Cordoned => v1::Availability::Cordoned,
            Availability::Drained => v1::Availability::Drained,
        }
        .into(),
        labels: node.all_labels(),
        conditions: conditions.iter().map(condition).collect(),
    }
}

fn condition(condition: &Condition) -> v1::NodeCondition {
    v1::NodeCondition {
        r#type: condition.kind.clone(),
        message: condition.message.clone(),
        since: Some(condition.since.to_proto()),
        blocks_scheduling: condition.blocks,
    }
}

/// What is wrong with a node, in words.
pub(crate) fn described<'a>(conditions: impl IntoIterator<Item = &'a Condition>) -> String {
    let words = conditions.into_iter().map(|condition| match condition.message.as_str() {
        "" => condition.kind.clone(),
        message => format!("{}: {message}", condition.kind),
    });
    words.collect::<Vec<_>>().join("; ")
}

/// The restart policy of a service that says nothing about it.
pub(crate) const DEFAULT_RESTART: RestartPolicy =
    RestartPolicy { condition: RestartCondition::Any, delay: Duration::from_secs(1), max_attempts: 0 };

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::messages::validate;

    /// What agents and newcomers send, and operators.
    #[test]
    fn whatever_comes_is_read_or_refused() {
        let status = v1::ContainerStatus {
            state: v1::ContainerState::Running.into(),
            message: "it runs".to_owned(),
            changed_at: Some(pbjson_types::Timestamp { seconds: 1, nanos: 2 }),
            addresses: vec!["10.128.0.2".to_owned(), "fd00::2".to_owned()],
            ..Default::default()
        };
        let resources = v1::ResourceAmounts { cpu_millis: 1000, memory_bytes: 1 << 30 };
        let node = v1::NodeDescription {
            hostname: "node-1".to_owned(),
            labels: [("zone".to_owned(), "eu".to_owned())].into(),
            resources: Some(resources),
            address: "192.0.2.1".to_owned(),
            ..Default::default()
        };
        let container = v1::ContainerSpec {
            image: "registry.example/web:1".to_owned(),
            command: vec!["sh".to_owned()],
            env: [("A".to_owned(), "b".to_owned())].into(),
            stop_timeout: Some(pbjson_types::Duration { seconds: 3, nanos: 4 }),
            user: "1:2".to_owned(),
            mounts: vec![v1::Mount {
                r#type: 2,
                source: "/srv".to_owned(),
                target: "/x".to_owned(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let service = v1::ServiceSpec {
            name: "web".to_owned(),
            container: Some(container),
            ports: vec![v1::Port { container_port: 80, host_port: 8080, ..Default::default() }],
            constraints: vec!["node.labels.zone==eu".to_owned()],
            ..Default::default()
        };
        let good = [status.encode_to_vec(), node.encode_to_vec(), service.encode_to_vec()];
        let good: Vec<_> = good.iter().map(Vec::as_slice).collect();
        let policy = validate::Policy::default();
        warren_fuzz::fuzz(&good, |bytes| {
            if let Ok(status) = v1::ContainerStatus::decode(bytes)
                && let Some(status) = observed_status(status)
            {
                assert!(status.message.len() <= MAX_WORDS + 3 && status.health_message.len() <= MAX_WORDS + 3);
                let _ = status.changed_at.shifted(i64::MIN).to_proto();
                let _ = status.changed_at.shifted(i64::MAX).to_proto();
            }
            if let Ok(wire) = v1::NodeDescription::decode(bytes) {
                let _ = validate::description(&description(wire), None);
            }
            if let Ok(spec) = v1::ServiceSpec::decode(bytes) {
                let _ = validate::service_spec(Some(spec), &policy);
            }
        });
    }
}
