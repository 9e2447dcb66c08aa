//! The manager's command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;

use warren_telemetry::cli::TelemetryArguments;

use crate::{liveness, manager::Options, validate::Policy};

/// The file with a manager's settings, in the configuration's directory.
pub const FILE: &str = "manager.toml";

/// How a manager works.
#[derive(Args, Clone, Debug)]
pub struct ManagerArguments {
    /// Holds the cluster's state.
    #[arg(long, env = "WARREN_MANAGER_DATA_DIR", default_value = "/var/lib/warren/manager")]
    pub data_dir: PathBuf,
    /// Where the API is served to this machine; loopback only.
    #[arg(long, env = "WARREN_LISTEN_ADDR", default_value = "127.0.0.1:7443")]
    pub listen_addr: SocketAddr,
    /// Where the API is served to root.
    #[arg(long, env = "WARREN_SOCKET", default_value = "/run/warren/warren.sock")]
    pub socket: PathBuf,
    /// Where /metrics, /health, /ready and /live are served.
    #[arg(long, env = "WARREN_METRICS_ADDR", default_value = "0.0.0.0:9464")]
    pub metrics_addr: SocketAddr,
    /// Log entries between snapshots.
    #[arg(long, env = "WARREN_SNAPSHOT_AFTER", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(10..))]
    pub snapshot_after: u64,
    /// Allow services whose containers are privileged: those can do to their node whatever root can.
    #[arg(long, env = "WARREN_ALLOW_PRIVILEGED")]
    pub allow_privileged: bool,
    /// How to log, and what becomes of telemetry.
    #[command(flatten)]
    pub telemetry: TelemetryArguments,
}

impl ManagerArguments {
    /// As the manager wants them.
    #[must_use]
    pub fn options(&self) -> Options {
        Options {
            data_dir: self.data_dir.clone(),
            listen_addr: self.listen_addr,
            socket: self.socket.clone(),
            metrics_addr: self.metrics_addr,
            snapshot_after: self.snapshot_after,
            liveness: liveness::Timing::default(),
            policy: Policy { privileged: self.allow_privileged },
            telemetry: self.telemetry.options(),
        }
    }
}
