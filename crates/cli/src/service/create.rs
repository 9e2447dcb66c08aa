//! `warren service create`: flags to a spec. What is wrong with it, the manager says.

use clap::{Args, ValueEnum};
use warren_proto::v1::{self, service_spec::Mode};

use super::request_id;
use crate::{
    client::ClientArguments,
    error::Error,
    output::say,
    parse,
    wait::{self, WaitArguments},
};

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Restart {
    /// Whenever it ends.
    Any,
    /// When it fails.
    OnFailure,
    /// Never.
    Never,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Network {
    /// An address of its own for each.
    Cluster,
    /// The node's own addresses and ports.
    Host,
    /// Nothing but loopback.
    None,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Pull {
    /// What is on the node is taken; what is not is pulled.
    IfNotPresent,
    /// Each time.
    Always,
    /// What is not on the node cannot be run.
    Never,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum EndpointMode {
    /// The addresses of its healthy containers, in changing order.
    Dnsrr,
    /// Its virtual address.
    Vip,
}

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// The service's name: a DNS label.
    name: String,
    /// What to run.
    #[arg(long)]
    image: String,
    /// How many containers.
    #[arg(long, default_value_t = 1, allow_negative_numbers = true, conflicts_with = "global")]
    replicas: i64,
    /// One container on every node.
    #[arg(long)]
    global: bool,
    /// Replaces the image's entrypoint; repeat for each word.
    #[arg(long)]
    command: Vec<String>,
    /// A variable, as NAME=value; may be repeated.
    #[arg(long, short, value_parser = parse::pair)]
    env: Vec<(String, String)>,
    /// A label, as name=value; may be repeated.
    #[arg(long, value_parser = parse::pair)]
    label: Vec<(String, String)>,
    /// Cores that a container may use at most.
    #[arg(long, value_parser = parse::millis)]
    limit_cpu: Option<i64>,
    /// Memory that a container may use at most, like 64M or 1G.
    #[arg(long, value_parser = parse::memory)]
    limit_memory: Option<i64>,
    /// Cores set aside for each container.
    #[arg(long, value_parser = parse::millis)]
    reserve_cpu: Option<i64>,
    /// Memory set aside for each container, like 64M or 1G.
    #[arg(long, value_parser = parse::memory)]
    reserve_memory: Option<i64>,
    /// When a container that ended is replaced.
    #[arg(long, value_enum, default_value = "any")]
    restart: Restart,
    /// How long before the first replacement, like 5s; doubles with each failure in a row.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    restart_delay: Option<pbjson_types::Duration>,
    /// The same in milliseconds.
    #[arg(long, hide = true, conflicts_with = "restart_delay")]
    restart_delay_ms: Option<u64>,
    /// Failures in a row after which a container is no longer replaced; 0 is no limit.
    #[arg(long, default_value_t = 0)]
    restart_max_attempts: u32,
    /// The signal that stops a container; the image's, or SIGTERM, unless given.
    #[arg(long, default_value = "")]
    stop_signal: String,
    /// From that signal to SIGKILL, like 30s or 2m, or a number of seconds; 10s unless given.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    stop_timeout: Option<pbjson_types::Duration>,
    /// Processes and threads that a container may have; what its node's agent says (--limit-pids, 4096) unless given.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    limit_pids: i64,
    /// The directory in which the command runs; the image's unless given.
    #[arg(long, default_value = "")]
    workdir: String,
    /// Who runs the command: a user of the image by name or number, and with a colon a group; the image's unless given.
    #[arg(long, default_value = "")]
    user: String,
    /// A label of each container, as name=value; may be repeated.
    #[arg(long, value_parser = parse::pair)]
    container_label: Vec<(String, String)>,
    /// Each container's hostname; the beginning of its id unless given.
    #[arg(long, default_value = "")]
    hostname: String,
    /// Keep the image's files from being changed.
    #[arg(long)]
    read_only: bool,
    /// Run the command under an init, which reaps orphans and forwards signals.
    #[arg(long)]
    init: bool,
    /// A capability to add, like NET_ADMIN, or ALL; may be repeated.
    #[arg(long, value_name = "CAPABILITY")]
    cap_add: Vec<String>,
    /// A capability to drop, or ALL; may be repeated. What is added counts more.
    #[arg(long, value_name = "CAPABILITY")]
    cap_drop: Vec<String>,
    /// A process limit, like nofile=1024:4096 (soft:hard), -1 being none; may be repeated.
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = parse::ulimit)]
    ulimit: Vec<(String, v1::Ulimit)>,
    /// A kernel parameter of the container's own, like net.core.somaxconn=1024; may be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse::pair)]
    sysctl: Vec<(String, String)>,
    /// A device of the node, like /dev/fuse or /dev/sda:/dev/disk:r; may be repeated.
    #[arg(long, value_name = "SOURCE[:TARGET[:rwm]]", value_parser = parse::device)]
    device: Vec<v1::Device>,
    /// Give the containers every capability and device; the cluster's policy must allow it.
    #[arg(long)]
    privileged: bool,
    /// Whether setuid programs, and those with file capabilities, leave their user and rights as they are.
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    no_new_privileges: Option<bool>,
    /// A mount: type=volume,source=NAME,target=/data,readonly or type=bind,source=/srv,target=/data,readonly or type=tmpfs,target=/tmp,size=64M,mode=1777; may be repeated.
    #[arg(long, value_name = "OPTIONS", value_parser = parse::mount)]
    mount: Vec<v1::Mount>,
    /// A port, as 8080:80, 8080:80/udp, or published=8080,target=80,protocol=tcp,mode=host,name=http; may be repeated. In
    /// mode ingress, which is the usual one, every node answers; in mode host those that run a container. Without
    /// published it is only named.
    #[arg(long, short, value_name = "PORT", value_parser = parse::port)]
    publish: Vec<v1::Port>,
    /// What its name is answered with.
    #[arg(long, value_enum, default_value = "dnsrr")]
    endpoint_mode: EndpointMode,
    /// A secret as a file below /run/secrets: NAME, or source=NAME,target=FILE,mode=0400,uid=USER,gid=GROUP,on-update=restart|signal|none;
    /// may be repeated. The file belongs to the container's user unless uid names another; a new value replaces the containers
    /// unless on-update says otherwise. With source=NAME,env=VARIABLE it is an environment variable instead.
    #[arg(long, value_name = "SECRET", value_parser = parse::secret)]
    secret: Vec<v1::SecretMount>,
    /// A config as a file below /run/configs, in the same words; may be repeated.
    #[arg(long, value_name = "CONFIG", value_parser = parse::secret)]
    config: Vec<v1::SecretMount>,
    /// The secret with the credentials for the image's registry: user:password, or what `docker login` writes.
    #[arg(long, value_name = "SECRET", default_value = "")]
    registry_secret: String,
    /// How to find out whether a container does its work: http://:8080/path, https://:8443/path, tcp://:5432,
    /// grpc://:50051/service, or exec:COMMAND, which a shell runs in the container.
    #[arg(long, value_name = "CHECK", value_parser = parse::health)]
    health: Option<v1::health_check::Check>,
    /// Between checks, like 10s or 500ms.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration, requires = "health")]
    health_interval: Option<pbjson_types::Duration>,
    /// How long a check may take; 5s unless given.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration, requires = "health")]
    health_timeout: Option<pbjson_types::Duration>,
    /// Failures in a row after which a container is replaced; 3 unless given.
    #[arg(long, value_name = "N", requires = "health")]
    health_retries: Option<u32>,
    /// How long failures do not count, until a container has answered once.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration, requires = "health")]
    health_start_period: Option<pbjson_types::Duration>,
    /// Which nodes may run it, as node.labels.NAME==VALUE, node.hostname==NAME, node.id==ID or node.architecture==NAME, each
    /// also with !=; may be repeated, and all must hold.
    #[arg(long, value_name = "CONSTRAINT")]
    constraint: Vec<String>,
    /// How long a node must have been down before its containers are replaced elsewhere, like 5m; at once unless given.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    lost_after: Option<pbjson_types::Duration>,
    /// When nodes ask the image's registry.
    #[arg(long, value_enum, default_value = "if-not-present")]
    pull: Pull,
    /// The containers' network.
    #[arg(long, value_enum, default_value = "cluster")]
    network: Network,
    #[command(flatten)]
    wait: WaitArguments,
    /// Replaces the image's command.
    #[arg(last = true)]
    args: Vec<String>,
}

fn spec(arguments: &Arguments) -> v1::ServiceSpec {
    let amounts = |cpu: Option<i64>, memory: Option<i64>| {
        Some(v1::ResourceAmounts { cpu_millis: cpu.unwrap_or(0), memory_bytes: memory.unwrap_or(0) })
    };
    let condition = match arguments.restart {
        Restart::Any => v1::RestartCondition::Any,
        Restart::OnFailure => v1::RestartCondition::OnFailure,
        Restart::Never => v1::RestartCondition::Never,
    };
    let network = match arguments.network {
        Network::Cluster => v1::NetworkMode::Cluster,
        Network::Host => v1::NetworkMode::Host,
        Network::None => v1::NetworkMode::None,
    };
    let pull_policy = match arguments.pull {
        Pull::IfNotPresent => v1::PullPolicy::IfNotPresent,
        Pull::Always => v1::PullPolicy::Always,
        Pull::Never => v1::PullPolicy::Never,
    };
    let endpoint_mode = match arguments.endpoint_mode {
        EndpointMode::Dnsrr => v1::EndpointMode::Dnsrr,
        EndpointMode::Vip => v1::EndpointMode::Vip,
    };
    let of_ms = |ms| pbjson_types::Duration { seconds: (ms / 1000) as i64, nanos: (ms % 1000) as i32 * 1_000_000 };
    let delay = arguments.restart_delay.or(arguments.restart_delay_ms.map(of_ms));
    v1::ServiceSpec {
        name: arguments.name.clone(),
        labels: arguments.label.iter().cloned().collect(),
        mode: Some(if arguments.global {
            Mode::Global(v1::Global {})
        } else {
            Mode::Replicated(v1::Replicated { replicas: arguments.replicas })
        }),
        container: Some(v1::ContainerSpec {
            image: arguments.image.clone(),
            command: arguments.command.clone(),
            args: arguments.args.clone(),
            env: arguments.env.iter().cloned().collect(),
            stop_signal: arguments.stop_signal.clone(),
            stop_timeout: arguments.stop_timeout,
            working_dir: arguments.workdir.clone(),
            user: arguments.user.clone(),
            labels: arguments.container_label.iter().cloned().collect(),
            hostname: arguments.hostname.clone(),
            read_only: arguments.read_only,
            init: arguments.init,
            capabilities_add: arguments.cap_add.clone(),
            capabilities_drop: arguments.cap_drop.clone(),
            ulimits: arguments.ulimit.iter().cloned().collect(),
            sysctls: arguments.sysctl.iter().cloned().collect(),
            devices: arguments.device.clone(),
            privileged: arguments.privileged,
            no_new_privileges: arguments.no_new_privileges,
            pids_limit: arguments.limit_pids,
            mounts: arguments.mount.clone(),
            network: network.into(),
            pull_policy: pull_policy.into(),
            image_digest: String::new(),
            secrets: arguments.secret.clone(),
            configs: arguments.config.clone(),
            registry_secret: arguments.registry_secret.clone(),
            health_check: arguments.health.clone().map(|check| v1::HealthCheck {
                check: Some(check),
                interval: arguments.health_interval,
                timeout: arguments.health_timeout,
                retries: arguments.health_retries.unwrap_or(0),
                start_period: arguments.health_start_period,
            }),
        }),
        resources: Some(v1::Resources {
            reservations: amounts(arguments.reserve_cpu, arguments.reserve_memory),
            limits: amounts(arguments.limit_cpu, arguments.limit_memory),
        }),
        restart: Some(v1::RestartPolicy {
            condition: condition.into(),
            delay,
            max_attempts: arguments.restart_max_attempts,
        }),
        ports: arguments.publish.clone(),
        endpoint_mode: endpoint_mode.into(),
        constraints: arguments.constraint.clone(),
        lost_after: arguments.lost_after,
    }
}

pub(super) async fn run(arguments: Arguments, client: &ClientArguments) -> Result<(), Error> {
    let request = v1::CreateServiceRequest { spec: Some(spec(&arguments)), request_id: request_id() };
    let service = client.services().await?.create_service(request).await?.into_inner().service.unwrap_or_default();
    say!("{}", service.id);
    wait::ready(client, vec![service], arguments.wait).await
}
