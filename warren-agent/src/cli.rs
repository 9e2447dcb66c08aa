//! The agent's command line.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use tokio_util::sync::CancellationToken;
use warren_registry::cli::RegistryArguments;
use warren_telemetry::{build, cli::TelemetryArguments, otlp::InvalidEndpoint};

use crate::{agent, dns, logs, network, node, observe, probes, tasks::NodeSettings};

/// The file with an agent's settings, in the configuration's directory.
pub const FILE: &str = "agent.toml";

/// Warren's node agent: runs containers and measures them and their DNS queries in the kernel.
#[derive(Debug, Parser)]
#[command(name = "warren-agent", args_override_self = true, version = build::LONG_VERSION)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the containers that the managers assign to this node.
    Run(Box<AgentArguments>),
    /// Measure all containers and DNS queries of this host, under any orchestrator, and serve /metrics. Needs no
    /// manager.
    Observe(Box<ObserveArguments>),
}

/// How to time things in the kernel.
#[derive(Args, Clone, Debug)]
pub struct ProbeArguments {
    /// BPF filesystem directory where probes are pinned, so that they outlive the agent.
    #[arg(long, env = "WARREN_BPF_PIN_DIR", default_value = "/sys/fs/bpf/warren")]
    pub bpf_pin_dir: PathBuf,
    /// Log failed DNS queries and those slower than this many milliseconds; 0 disables both.
    #[arg(long, env = "WARREN_DNS_SLOW_MS", default_value_t = 0)]
    pub dns_slow_ms: u64,
    /// Ports treated as DNS, comma-separated; at most four.
    #[arg(long, env = "WARREN_DNS_PORTS", default_value = "53", value_delimiter = ',', num_args = 1..=4)]
    pub dns_ports: Vec<u16>,
    /// Timeout in seconds after which a DNS query counts as unanswered.
    #[arg(long, env = "WARREN_DNS_TIMEOUT_S", default_value_t = 5)]
    pub dns_timeout_s: u64,
}

impl ProbeArguments {
    /// As the probes want them.
    #[must_use]
    pub fn options(&self, dns_cgroup: PathBuf, registered_only: bool) -> probes::Options {
        probes::Options {
            pin_dir: self.bpf_pin_dir.clone(),
            dns_cgroup,
            registered_only,
            dns_timeout: self.dns_timeout(),
            dns_slow: Duration::from_millis(self.dns_slow_ms),
            dns_ports: self.dns_ports.clone(),
        }
    }

    /// How long a query may wait.
    #[must_use]
    pub fn dns_timeout(&self) -> Duration {
        Duration::from_secs(self.dns_timeout_s)
    }
}

/// How an agent works.
#[derive(Args, Clone, Debug)]
pub struct AgentArguments {
    /// Directory of the node's identity and state.
    #[arg(long, env = "WARREN_AGENT_DATA_DIR", default_value = "/var/lib/warren/agent")]
    pub data_dir: PathBuf,
    /// Socket of the local manager, used if the node has not joined a cluster.
    #[arg(long, env = "WARREN_SOCKET", default_value = "/run/warren/warren.sock")]
    pub socket: PathBuf,
    /// Hostname of the node [default: the machine's]
    #[arg(long, env = "WARREN_HOSTNAME")]
    pub hostname: Option<String>,
    /// Node label, as NAME=VALUE; may be repeated or comma-separated. In constraints it is node.labels.agent/NAME.
    #[arg(long = "label", env = "WARREN_LABELS", value_delimiter = ',', value_parser = parse_label)]
    pub labels: Vec<(String, String)>,
    /// Address of the HTTP endpoint for /metrics, /health, /ready and /live.
    #[arg(long, env = "WARREN_AGENT_METRICS_ADDR", default_value = "0.0.0.0:9465")]
    pub metrics_addr: SocketAddr,
    #[command(flatten)]
    /// What it uses on its node.
    pub node: NodeArguments,
    /// How to log, and what becomes of telemetry.
    #[command(flatten)]
    pub telemetry: TelemetryArguments,
}

/// What the agent uses on its node.
#[derive(Args, Clone, Debug)]
pub struct NodeArguments {
    /// containerd socket.
    #[arg(long, env = "WARREN_CONTAINERD_SOCKET", default_value = "/run/containerd/containerd.sock")]
    pub containerd_socket: PathBuf,
    /// containerd namespace. The agent owns it and removes containers that are not assigned to this node.
    #[arg(long, env = "WARREN_CONTAINERD_NAMESPACE", default_value = "warren")]
    pub containerd_namespace: String,
    /// Parent cgroup of containers.
    #[arg(long, env = "WARREN_CGROUP_PARENT", default_value = "/warren")]
    pub cgroup_parent: PathBuf,
    /// What containers may have of this node. Managers have the same options.
    #[command(flatten)]
    pub policy: warren_spec::Policy,
    /// Default limit of processes and threads of a container; 0 is no limit.
    #[arg(long, env = "WARREN_LIMIT_PIDS", default_value_t = 4096, value_parser = clap::value_parser!(i64).range(0..))]
    pub limit_pids: i64,
    /// Init program for containers with --init: static, run as `PROGRAM -- COMMAND` [default: tini or catatonit, where packages
    /// install them]
    #[arg(long, env = "WARREN_INIT_PATH")]
    pub init_path: Option<PathBuf>,
    /// Address at which other nodes reach this one [default: the source address of the default route]
    #[arg(long, env = "WARREN_ADVERTISE_ADDR")]
    pub advertise_addr: Option<IpAddr>,
    /// Overlay between nodes; must be the same on all nodes.
    #[arg(long, env = "WARREN_OVERLAY", value_enum, default_value_t)]
    pub overlay: network::OverlayKind,
    /// Cluster endpoints that containers may connect to: managers (their API), metrics (of managers and agents), nothing.
    #[arg(
        long,
        env = "WARREN_CONTAINERS_REACH",
        value_enum,
        value_delimiter = ',',
        default_value = "metrics",
        hide_possible_values = true
    )]
    pub containers_reach: Vec<network::Reach>,
    /// Port of the managers' metrics, for --containers-reach.
    #[arg(long, env = "WARREN_MANAGERS_METRICS_PORT", default_value_t = 9464)]
    pub managers_metrics_port: u16,
    /// DNS domain of services.
    #[arg(long, env = "WARREN_DNS_DOMAIN", default_value = "warren")]
    pub dns_domain: String,
    /// Upstream DNS servers for other names, as ADDRESS:PORT [default: the node's resolv.conf]
    #[arg(long, env = "WARREN_DNS_UPSTREAMS", value_delimiter = ',')]
    pub dns_upstreams: Vec<SocketAddr>,
    /// DNS queries per second that a container may send; the burst is twice that.
    #[arg(long, env = "WARREN_DNS_RATE", default_value = "1000")]
    pub dns_rate: NonZeroU32,
    /// Hours after which an unused pulled image is removed; 0 keeps images forever.
    #[arg(long, env = "WARREN_KEEP_IMAGES_H", default_value_t = 168.0, value_parser = hours)]
    pub keep_images_h: f64,
    /// Maximum size of an image in GB, compressed and unpacked.
    #[arg(long, env = "WARREN_MAX_IMAGE_GB", default_value_t = 32.0, value_parser = positive)]
    pub max_image_gb: f64,
    #[command(flatten)]
    /// Where images come from.
    pub registries: RegistryArguments,
    /// Directory of containers' network namespaces; must be empty after a reboot, like /run.
    #[arg(long, env = "WARREN_RUN_DIR", default_value = "/run/warren/network")]
    pub run_dir: PathBuf,
    /// Size in MB at which a container's log file is rotated.
    #[arg(long, env = "WARREN_LOG_MAX_MB", default_value_t = 10.0, value_parser = positive)]
    pub log_max_mb: f64,
    /// Number of log files kept per container.
    #[arg(long, env = "WARREN_LOG_FILES", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub log_files: u32,
    /// Hours for which logs of an ended container are kept.
    #[arg(long, env = "WARREN_KEEP_LOGS_H", default_value_t = 24.0, value_parser = hours)]
    pub keep_logs_h: f64,
    /// Total size in MB of logs of ended containers; beyond it, and when the disk is full, the oldest are removed.
    #[arg(long, env = "WARREN_ENDED_LOGS_MAX_MB", default_value_t = 1000.0, value_parser = positive)]
    pub ended_logs_max_mb: f64,
    /// Timeout in seconds of the container runtime, to create, start or delete a container.
    #[arg(long, env = "WARREN_RUNTIME_TIMEOUT_S", default_value_t = 120.0, value_parser = positive)]
    pub runtime_timeout_s: f64,
    /// Directory of containers' secrets; a tmpfs is mounted there.
    #[arg(long, env = "WARREN_SECRETS_DIR", default_value = "/run/warren/secrets")]
    pub secrets_dir: PathBuf,
    /// Do not load kernel probes; time containers around runtime calls instead.
    #[arg(long, env = "WARREN_NO_PROBES")]
    pub no_probes: bool,
    /// Seconds between telemetry snapshots; at least the heartbeat interval (2 s, longer with more than a thousand
    /// nodes).
    #[arg(long, env = "WARREN_TELEMETRY_INTERVAL_S", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    pub telemetry_interval_s: u64,
    #[command(flatten)]
    /// The probes.
    pub probes: ProbeArguments,
}

/// A number of hours: fractions are for trying things out.
fn hours(text: &str) -> Result<f64, String> {
    let hours: f64 = text.parse().map_err(|_| "not a number of hours".to_owned())?;
    if (0.0..1e6).contains(&hours) { Ok(hours) } else { Err("not between 0 and a million hours".to_owned()) }
}

/// A number above zero, and not beyond reason.
fn positive(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if (0.001..1e6).contains(&number) { Ok(number) } else { Err("not between 0.001 and a million".to_owned()) }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("a label is name=value")?;
    if name.is_empty() {
        return Err("a label has a name".to_owned());
    }
    Ok((name.to_owned(), value.to_owned()))
}

impl AgentArguments {
    /// As the agent wants them.
    #[must_use]
    pub fn options(&self) -> agent::Options {
        let node = &self.node;
        // The containers' queries, not the host's: those would pay for nothing.
        let probes = node.probes.options(node.cgroup_parent.clone(), true);
        agent::Options {
            data_dir: self.data_dir.clone(),
            socket: self.socket.clone(),
            hostname: (self.hostname.clone())
                .or_else(|| crate::membership::given_hostname(&self.data_dir))
                .unwrap_or_else(node::hostname),
            labels: self.labels.iter().cloned().collect(),
            metrics_addr: self.metrics_addr,
            containerd_socket: node.containerd_socket.clone(),
            containerd_namespace: node.containerd_namespace.clone(),
            node: NodeSettings {
                cgroup_parent: node.cgroup_parent.clone(),
                init: node.init_path.clone().or_else(node::init),
                env_helper: self.data_dir.join("env"),
                runtime_timeout: Duration::from_secs_f64(node.runtime_timeout_s),
                policy: node.policy.clone(),
                pids_limit: node.limit_pids,
            },
            network: network::Options {
                run_dir: node.run_dir.clone(),
                data_dir: self.data_dir.join("network"),
                address: node.advertise_addr,
                overlay: node.overlay,
                domain: node.dns_domain.clone(),
                reach: node.containers_reach.clone(),
                metrics_port: self.metrics_addr.port(),
                managers_metrics_port: node.managers_metrics_port,
            },
            dns: dns::Options {
                domain: node.dns_domain.clone(),
                upstreams: node.dns_upstreams.clone(),
                rate: node.dns_rate,
            },
            logs: logs::Options {
                directory: self.data_dir.join("logs"),
                max_bytes: (node.log_max_mb * 1e6) as u64,
                files: node.log_files,
                keep: Duration::from_secs_f64(node.keep_logs_h * 3600.0),
                max_ended_bytes: (node.ended_logs_max_mb * 1e6) as u64,
                cgroup: with_suffix(&node.cgroup_parent, "-logs"),
            },
            secrets_dir: node.secrets_dir.clone(),
            registries: node.registries.options(),
            max_image: (node.max_image_gb * 1e9) as u64,
            keep_images: Duration::from_secs_f64(node.keep_images_h * 3600.0),
            probes: (!node.no_probes).then_some(probes),
            dns_timeout: node.probes.dns_timeout(),
            telemetry_interval: Duration::from_secs(node.telemetry_interval_s),
            telemetry: self.telemetry.options(),
        }
    }
}

#[derive(Args, Debug)]
struct ObserveArguments {
    /// Address of the HTTP endpoint for /metrics, /health, /ready and /live.
    #[arg(long, env = "WARREN_AGENT_METRICS_ADDR", default_value = "0.0.0.0:9465")]
    metrics_addr: SocketAddr,
    /// Value of the node label in metrics [default: the machine's hostname]
    #[arg(long, env = "WARREN_HOSTNAME")]
    hostname: Option<String>,
    /// The cgroup whose processes' DNS queries are timed, below the cgroup2 mount; / is the whole host.
    #[arg(long, env = "WARREN_DNS_CGROUP", default_value = "/")]
    dns_cgroup: PathBuf,
    /// containerd socket, to read the labels with a container's service.
    #[arg(long, env = "WARREN_CONTAINERD_SOCKET", default_value = "/run/containerd/containerd.sock")]
    containerd_socket: PathBuf,
    /// Detach the probes and discard their counts on exit.
    #[arg(long, env = "WARREN_DETACH")]
    detach: bool,
    #[command(flatten)]
    probes: ProbeArguments,
    #[command(flatten)]
    telemetry: TelemetryArguments,
}

/// Does what this program was started for beside an agent, if it was: takes what a container writes, or encrypts what goes to
/// other nodes.
#[must_use]
pub fn beside_an_agent() -> Option<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    let run: fn(&str) -> ExitCode = match arguments.next()?.as_str() {
        logs::COMMAND => logs::write,
        network::wireguard::COMMAND => network::wireguard::device,
        _ => return None,
    };
    Some(run(&arguments.next().unwrap_or_default()))
}

/// How long a process that ends waits for its threads.
pub const LAST_THREADS: std::time::Duration = std::time::Duration::from_secs(3);

/// Runs a command; what goes wrong is one line on stderr. Exit codes are those of [`agent::Error::exit_code`].
#[must_use]
pub fn main(arguments: Arguments) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into()),
    };
    let outcome = runtime.block_on(run(arguments.command));
    // What is being written is; but a thread that a file server holds up, which may be gone for good, does not hold up the end.
    runtime.shutdown_timeout(LAST_THREADS);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {}", probes::describe(error.as_ref()));
    if let Some(error) = error.downcast_ref::<warren_telemetry::endpoint::BindError>() {
        return error.exit_code().into();
    }
    if error.is::<InvalidEndpoint>() {
        return agent::USAGE.into();
    }
    error.downcast_ref::<agent::Error>().map_or(ExitCode::FAILURE, |error| error.exit_code().into())
}

async fn run(command: Command) -> anyhow::Result<()> {
    let shutdown = cancelled_by_signals()?;
    match command {
        Command::Run(arguments) => {
            let signals = arguments.telemetry.start(&agent::identity(&arguments.data_dir))?;
            let outcome = agent::run(arguments.options(), shutdown, || ()).await;
            signals.shutdown().await;
            outcome?;
        }
        Command::Observe(arguments) => {
            let hostname = arguments.hostname.unwrap_or_else(node::hostname);
            let signals = arguments.telemetry.start(&agent::own_identity(&hostname))?;
            let detach = arguments.detach.then(|| arguments.probes.bpf_pin_dir.clone());
            let options = observe::Options {
                metrics_addr: arguments.metrics_addr,
                hostname,
                dns_timeout: arguments.probes.dns_timeout(),
                probes: arguments.probes.options(arguments.dns_cgroup, false),
                containerd_socket: arguments.containerd_socket,
                telemetry: arguments.telemetry.options(),
            };
            let outcome = observe::run(options, shutdown).await;
            signals.shutdown().await;
            outcome?;
            if let Some(pin_dir) = detach {
                probes::Maps::remove(&pin_dir)?;
            }
        }
    }
    Ok(())
}

/// A token that SIGTERM and SIGINT cancel.
///
/// # Errors
///
/// When the process may not handle signals.
pub fn cancelled_by_signals() -> std::io::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};

    let token = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let cancel = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        cancel.cancel();
    });
    Ok(token)
}
