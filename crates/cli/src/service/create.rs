//! `warren service create`: flags to a spec. What is wrong with it, the manager says.

use clap::{Args, ValueEnum};
use warren_manifest::parse;
use warren_proto::v1::{self, service_spec::Mode};

use crate::{
    client::ClientArguments,
    error::Error,
    objects::request_id,
    output::say,
    wait::{self, WaitArguments},
};

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Restart {
    /// Restart whenever it ends.
    Any,
    /// Restart when it fails.
    OnFailure,
    /// Do not restart.
    Never,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Network {
    /// Own IP addresses for each container.
    Cluster,
    /// The node's network namespace.
    Host,
    /// Loopback only.
    None,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Pull {
    /// Pull the image if it is not on the node.
    IfNotPresent,
    /// Pull at each container start.
    Always,
    /// Do not pull; fail if the image is not on the node.
    Never,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum EndpointMode {
    /// The addresses of the healthy containers, in varying order.
    Dnsrr,
    /// The service's virtual IP addresses.
    Vip,
}

/// For who learns by looking.
const EXAMPLES: &str = "\
Examples:
  warren service create web --image nginx:1.27 --replicas 3 --publish 8080:80 --wait
  warren service create db --image postgres:17 --mount source=data,target=/var/lib/postgresql/data \\
      --secret source=db-password,env=POSTGRES_PASSWORD --health tcp://:5432
  warren service create job --image busybox --restart never -- sh -c 'echo done'";

#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Name of the service; must be a DNS label.
    name: String,
    /// Image to run.
    #[arg(long)]
    image: String,
    /// Number of replicas.
    #[arg(
        long,
        default_value_t = 1,
        allow_negative_numbers = true,
        conflicts_with = "global",
        value_name = "N",
        help_heading = "Scheduling"
    )]
    replicas: i64,
    /// Run one container on every eligible node.
    #[arg(long, help_heading = "Scheduling")]
    global: bool,
    /// Override the image's entrypoint; repeat for each word.
    #[arg(long, value_name = "WORD", help_heading = "Process")]
    command: Vec<String>,
    /// Environment variable, as NAME=VALUE; may be repeated.
    #[arg(long, short, value_parser = parse::pair, value_name = "NAME=VALUE", help_heading = "Process")]
    env: Vec<(String, String)>,
    /// Service label, as NAME=VALUE; may be repeated.
    #[arg(long, value_parser = parse::pair, value_name = "NAME=VALUE", help_heading = "Metadata")]
    label: Vec<(String, String)>,
    /// CPU limit of each container, in cores.
    #[arg(long, value_parser = parse::millis, value_name = "CORES", help_heading = "Limits")]
    limit_cpu: Option<i64>,
    /// Memory limit of each container, like 64M or 1G.
    #[arg(long, value_parser = parse::memory, value_name = "BYTES", help_heading = "Limits")]
    limit_memory: Option<i64>,
    /// CPU reservation of each container, in cores.
    #[arg(long, value_parser = parse::millis, value_name = "CORES", help_heading = "Scheduling")]
    reserve_cpu: Option<i64>,
    /// Memory reservation of each container, like 64M or 1G.
    #[arg(long, value_parser = parse::memory, value_name = "BYTES", help_heading = "Scheduling")]
    reserve_memory: Option<i64>,
    /// Restart policy: when to replace a container that ended.
    #[arg(long, value_enum, default_value = "any", help_heading = "Process")]
    restart: Restart,
    /// Backoff before the first restart, like 5s; doubles with each consecutive failure.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration, help_heading = "Process")]
    restart_delay: Option<pbjson_types::Duration>,
    /// Backoff before the first restart, in milliseconds.
    #[arg(long, hide = true, conflicts_with = "restart_delay", help_heading = "Process")]
    restart_delay_ms: Option<u64>,
    /// Consecutive failures after which a container is not restarted any more; 0 is no limit.
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Process")]
    restart_max_attempts: u32,
    /// Stop signal [default: the image's, or SIGTERM]
    #[arg(long, default_value = "", hide_default_value = true, value_name = "SIGNAL", help_heading = "Process")]
    stop_signal: String,
    /// Time from the stop signal to SIGKILL, like 30s or 2m, or a number of seconds [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = parse::duration, help_heading = "Process")]
    stop_timeout: Option<pbjson_types::Duration>,
    /// Limit of processes and threads [default: the agent's --limit-pids, 4096]
    #[arg(
        long,
        default_value_t = 0,
        allow_negative_numbers = true,
        hide_default_value = true,
        value_name = "N",
        help_heading = "Limits"
    )]
    limit_pids: i64,
    /// Working directory [default: the image's]
    #[arg(long, default_value = "", hide_default_value = true, value_name = "DIRECTORY", help_heading = "Process")]
    workdir: String,
    /// User name or UID, optionally with :GROUP or :GID [default: the image's]
    #[arg(long, default_value = "", hide_default_value = true, value_name = "USER", help_heading = "Process")]
    user: String,
    /// Container label, as NAME=VALUE; may be repeated.
    #[arg(long, value_parser = parse::pair, value_name = "NAME=VALUE", help_heading = "Metadata")]
    container_label: Vec<(String, String)>,
    /// Container hostname [default: the beginning of its id]
    #[arg(long, default_value = "", hide_default_value = true, value_name = "NAME", help_heading = "Process")]
    hostname: String,
    /// Mount the root filesystem read-only.
    #[arg(long, help_heading = "Storage, secrets and configs")]
    read_only: bool,
    /// Run an init process that reaps zombies and forwards signals.
    #[arg(long, help_heading = "Process")]
    init: bool,
    /// Capability to add, like NET_ADMIN, or ALL; may be repeated.
    #[arg(long, value_name = "CAPABILITY", help_heading = "Security")]
    cap_add: Vec<String>,
    /// Capability to drop, or ALL; may be repeated. --cap-add takes precedence.
    #[arg(long, value_name = "CAPABILITY", help_heading = "Security")]
    cap_drop: Vec<String>,
    /// Ulimit, like nofile=1024:4096 (soft:hard), -1 is unlimited; may be repeated.
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = parse::ulimit, help_heading = "Limits")]
    ulimit: Vec<(String, v1::Ulimit)>,
    /// Namespaced sysctl, like net.core.somaxconn=1024; may be repeated.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse::pair, help_heading = "Security")]
    sysctl: Vec<(String, String)>,
    /// Device of the node, like /dev/fuse or /dev/sda:/dev/disk:r; may be repeated.
    #[arg(long, value_name = "SOURCE[:TARGET[:rwm]]", value_parser = parse::device, help_heading = "Security")]
    device: Vec<v1::Device>,
    /// Run privileged: every capability and device. Managers and agents must allow it (--allow-privileged).
    #[arg(long, help_heading = "Security")]
    privileged: bool,
    /// Set no_new_privs: setuid programs and file capabilities gain nothing [default: true]
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = "Security")]
    no_new_privileges: Option<bool>,
    /// Mount: type=volume,source=NAME,target=/data,readonly or type=bind,source=/srv,target=/data,readonly or
    /// type=tmpfs,target=/tmp,size=64M,mode=1777; may be repeated.
    #[arg(long, value_name = "OPTIONS", value_parser = parse::mount, help_heading = "Storage, secrets and configs")]
    mount: Vec<v1::Mount>,
    /// Port to publish, as 8080:80, 8080:80/udp, or published=8080,target=80,protocol=tcp,mode=ingress,name=http; may be
    /// repeated. In mode ingress (default) every node listens; in mode host only nodes that run a container. Without
    /// published, the port is only named.
    #[arg(long, short, value_name = "PORT", value_parser = parse::port, help_heading = "Network")]
    publish: Vec<v1::Port>,
    /// DNS answers for the service's name: container addresses (dnsrr) or its virtual address (vip).
    #[arg(long, value_enum, default_value = "dnsrr", help_heading = "Network")]
    endpoint_mode: EndpointMode,
    /// Secret to mount below /run/secrets: NAME, or source=NAME,target=FILE,mode=0400,uid=USER,gid=GROUP,on-update=restart|signal|none,
    /// or as an environment variable: source=NAME,env=VARIABLE; may be repeated. Files are owned by the container's user unless uid
    /// is set; a new value restarts the containers unless on-update is set.
    #[arg(long, value_name = "SECRET", value_parser = parse::secret, help_heading = "Storage, secrets and configs")]
    secret: Vec<v1::SecretMount>,
    /// Config to mount below /run/configs, with the same options; may be repeated.
    #[arg(long, value_name = "CONFIG", value_parser = parse::secret, help_heading = "Storage, secrets and configs")]
    config: Vec<v1::SecretMount>,
    /// Secret with the registry's credentials: user:password, or a Docker config.json.
    #[arg(long, value_name = "SECRET", default_value = "", hide_default_value = true, help_heading = "Image")]
    registry_secret: String,
    /// Health check: http://:8080/PATH, https://:8443/PATH, tcp://:5432, grpc://:50051/SERVICE, or exec:COMMAND, run by a
    /// shell in the container.
    #[arg(long, value_name = "CHECK", value_parser = parse::health, help_heading = "Health check")]
    health: Option<v1::health_check::Check>,
    /// Time between health checks, like 10s or 500ms [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = parse::duration, requires = "health", help_heading = "Health check")]
    health_interval: Option<pbjson_types::Duration>,
    /// Timeout of a health check [default: 5s]
    #[arg(long, value_name = "DURATION", value_parser = parse::duration, requires = "health", help_heading = "Health check")]
    health_timeout: Option<pbjson_types::Duration>,
    /// Consecutive failures after which a container is unhealthy and replaced [default: 3]
    #[arg(long, value_name = "N", requires = "health", help_heading = "Health check")]
    health_retries: Option<u32>,
    /// Grace period after start in which failures do not count, until the first success.
    #[arg(long, value_name = "DURATION", value_parser = parse::duration, requires = "health", help_heading = "Health check")]
    health_start_period: Option<pbjson_types::Duration>,
    /// Placement constraint: node.labels.NAME==VALUE, node.hostname==NAME, node.id==ID or node.architecture==NAME, or with !=;
    /// may be repeated, and all must match.
    #[arg(long, value_name = "CONSTRAINT", help_heading = "Scheduling")]
    constraint: Vec<String>,
    /// How long a node must be down before its containers are replaced elsewhere, like 5m [default: at once]
    #[arg(long, value_name = "DURATION", value_parser = parse::duration, help_heading = "Scheduling")]
    lost_after: Option<pbjson_types::Duration>,
    /// Image pull policy.
    #[arg(long, value_enum, default_value = "if-not-present", help_heading = "Image")]
    pull: Pull,
    /// Network mode.
    #[arg(long, value_enum, default_value = "cluster", help_heading = "Network")]
    network: Network,
    #[command(flatten)]
    wait: WaitArguments,
    /// Override the image's command (CMD).
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
