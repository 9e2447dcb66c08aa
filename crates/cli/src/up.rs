//! `warren up`: a manager and an agent in one process.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use warren_agent::{
    agent,
    cli::{AgentArguments, NodeArguments, cancelled_by_signals},
};
use warren_manager::cli::{ManagerArguments, ProfileArgument};
use warren_telemetry::{cli::TelemetryArguments, signals::Identity};

use crate::error::Error;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Parent of the manager's and the agent's data directories.
    #[arg(long, env = "WARREN_DATA_DIR", default_value = "/var/lib/warren")]
    data_dir: PathBuf,
    /// Address for API, agents and Raft, with mutual TLS.
    #[arg(long, env = "WARREN_LISTEN_ADDR", default_value = "0.0.0.0:7443")]
    listen_addr: SocketAddr,
    /// Address at which other managers and agents reach this manager, as HOST:PORT [default: this machine's address]
    #[arg(long, env = "WARREN_MANAGER_ADVERTISE_ADDR")]
    manager_advertise_addr: Option<String>,
    /// Unix socket of the API, for root.
    #[arg(long, env = "WARREN_SOCKET", default_value = "/run/warren/warren.sock")]
    socket: PathBuf,
    /// Address of the manager's HTTP endpoint for /metrics, /health, /ready and /live.
    #[arg(long, env = "WARREN_METRICS_ADDR", default_value = "0.0.0.0:9464")]
    metrics_addr: SocketAddr,
    /// Address of the agent's HTTP endpoint for /metrics, /health, /ready and /live.
    #[arg(long, env = "WARREN_AGENT_METRICS_ADDR", default_value = "0.0.0.0:9465")]
    agent_metrics_addr: SocketAddr,
    /// Hostname of the node [default: the machine's]
    #[arg(long, env = "WARREN_HOSTNAME")]
    hostname: Option<String>,
    #[command(flatten)]
    node: NodeArguments,
    #[command(flatten)]
    telemetry: TelemetryArguments,
}

pub(crate) async fn run(arguments: Arguments) -> Result<(), Error> {
    let manager = ManagerArguments {
        data_dir: arguments.data_dir.join("manager"),
        listen_addr: arguments.listen_addr,
        advertise_addr: arguments.manager_advertise_addr,
        hostname: arguments.hostname.clone(),
        bootstrap: true,
        socket: arguments.socket.clone(),
        metrics_addr: arguments.metrics_addr,
        snapshot_after: 5000,
        snapshot_after_mib: 64,
        unlock_key: None,
        profile: ProfileArgument::Lan,
        max_schema: warren_manager::state::SCHEMA,
        policy: arguments.node.policy.clone(),
        registries: arguments.node.registries.clone(),
        container_network: None,
        service_network: None,
        no_ipv6: false,
        telemetry: arguments.telemetry.clone(),
    };
    let agent = AgentArguments {
        data_dir: arguments.data_dir.join("agent"),
        socket: arguments.socket,
        hostname: arguments.hostname,
        labels: Vec::new(),
        metrics_addr: arguments.agent_metrics_addr,
        node: arguments.node,
        telemetry: arguments.telemetry,
    };
    // One process, one subscriber: its spans and records are both parts'.
    let instance = agent::identity(&agent.data_dir).instance;
    let signals = agent.telemetry.start(&Identity { service: "warren", instance }).map_err(agent::Error::from)?;
    let outcome = run_both(&manager, &agent).await;
    signals.shutdown().await;
    outcome
}

async fn run_both(manager: &ManagerArguments, agent: &AgentArguments) -> Result<(), Error> {
    let shutdown = cancelled_by_signals()?;
    // The agent goes first, so that its session is over when the manager ends.
    let manager_shutdown = CancellationToken::new();
    let (started, manager_started) = oneshot::channel();
    let manager_runs = warren_manager::run(manager.options(), manager_shutdown.clone(), || {
        // The agent waits for it, or is gone.
        let _ = started.send(());
    });
    let agent_runs = async {
        let outcome = match manager_started.await {
            Ok(()) => warren_agent::agent::run(agent.options(), shutdown.clone(), || {
                tracing::info!("Warren is up");
            })
            .await
            .map_err(Error::from),
            // The manager could not start and says why itself.
            Err(_) => Ok(()),
        };
        manager_shutdown.cancel();
        outcome
    };
    let (manager_outcome, agent_outcome) = tokio::join!(manager_runs, agent_runs);
    manager_outcome?;
    agent_outcome
}
