//! The agent's command line. Flags are stronger than `WARREN_*` variables.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

use clap::{Args, Parser, Subcommand};
use tokio_util::sync::CancellationToken;
use warren_telemetry::logs::{self, Style};

use crate::{node, observe, probes};

/// Warren's node agent: runs containers, times them and their DNS queries in the kernel.
#[derive(Debug, Parser)]
#[command(name = "warren-agent", version = concat!(env!("CARGO_PKG_VERSION"), " (", env!("WARREN_REVISION"), ")"))]
pub struct Arguments {
    #[command(flatten)]
    logs: LogOptions,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Times every container and DNS query of this host, whoever runs them, and serves /metrics. Needs no manager.
    Observe(ObserveArguments),
}

/// How to log.
#[derive(Args, Clone, Debug)]
pub struct LogOptions {
    /// What to log, as `level` or `module=level,...`.
    #[arg(long, env = "WARREN_LOG", default_value = "info", global = true)]
    pub log: String,
    /// Log JSON objects, one a line.
    #[arg(long, env = "WARREN_LOG_JSON", global = true)]
    pub log_json: bool,
}

impl LogOptions {
    /// Starts logging.
    pub fn init(&self) {
        logs::init(&self.log, if self.log_json { Style::Json } else { Style::Text });
    }
}

/// How to time things in the kernel.
#[derive(Args, Clone, Debug)]
pub struct ProbeArguments {
    /// Where the probes are pinned, so that they outlive the agent.
    #[arg(long, env = "WARREN_BPF_PIN_DIR", default_value = "/sys/fs/bpf/warren")]
    pub bpf_pin_dir: PathBuf,
    /// DNS answers slower than this many milliseconds are logged, as are failed ones; 0 logs none.
    #[arg(long, env = "WARREN_DNS_SLOW_MS", default_value_t = 0)]
    pub dns_slow_ms: u64,
    /// Ports taken for DNS; at most four.
    #[arg(long, env = "WARREN_DNS_PORTS", default_value = "53", value_delimiter = ',', num_args = 1..=4)]
    pub dns_ports: Vec<u16>,
    /// Seconds after which a DNS query counts as unanswered.
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

#[derive(Args, Debug)]
struct ObserveArguments {
    /// Where to serve /metrics, /health, /ready and /live.
    #[arg(long, env = "WARREN_METRICS_ADDR", default_value = "0.0.0.0:9465")]
    metrics_addr: SocketAddr,
    /// The node's name in metrics; the machine's unless given.
    #[arg(long, env = "WARREN_HOSTNAME")]
    hostname: Option<String>,
    /// The cgroup whose processes' DNS queries are timed; all of the host's unless given.
    #[arg(long, env = "WARREN_DNS_CGROUP", default_value = "/")]
    dns_cgroup: PathBuf,
    /// containerd's socket; asked for the labels that name a container's service.
    #[arg(long, env = "WARREN_CONTAINERD_SOCKET", default_value = "/run/containerd/containerd.sock")]
    containerd_socket: PathBuf,
    /// Detach the probes and forget their counts when observing ends.
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    probes: ProbeArguments,
}

/// Runs a command; what goes wrong is one line on stderr.
#[must_use]
pub fn main(arguments: Arguments) -> ExitCode {
    arguments.logs.init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error.into()),
    };
    match runtime.block_on(run(arguments.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {}", probes::describe(error.as_ref()));
    ExitCode::FAILURE
}

async fn run(command: Command) -> anyhow::Result<()> {
    let shutdown = cancelled_by_signals()?;
    match command {
        Command::Observe(arguments) => {
            let detach = arguments.detach.then(|| arguments.probes.bpf_pin_dir.clone());
            let options = observe::Options {
                metrics_addr: arguments.metrics_addr,
                hostname: arguments.hostname.unwrap_or_else(node::hostname),
                dns_timeout: arguments.probes.dns_timeout(),
                probes: arguments.probes.options(arguments.dns_cgroup, false),
                containerd_socket: arguments.containerd_socket,
            };
            observe::run(options, shutdown).await?;
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
