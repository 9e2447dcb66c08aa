//! The manager's command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, ValueEnum};
use ipnet::Ipv4Net;
use warren_raft::Profile;

use warren_registry::cli::RegistryArguments;
use warren_telemetry::cli::TelemetryArguments;

use crate::{
    control::liveness,
    core::Networks,
    messages::validate::Policy,
    process::{self, Options},
    state::{OLDEST_WRITTEN_SCHEMA, SCHEMA},
};

/// The file with a manager's settings, in the configuration's directory.
pub const FILE: &str = "manager.toml";

/// How far apart managers are.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ProfileArgument {
    /// One site, server disks: election timeout from 1 s.
    Lan,
    /// Several sites: election timeout from 3 s.
    Wan,
    /// Slow disks, like SD cards: election timeout from 7.5 s.
    Edge,
}

impl From<ProfileArgument> for Profile {
    fn from(argument: ProfileArgument) -> Self {
        match argument {
            ProfileArgument::Lan => Self::Lan,
            ProfileArgument::Wan => Self::Wan,
            ProfileArgument::Edge => Self::Edge,
        }
    }
}

/// How a manager works.
#[derive(Args, Clone, Debug)]
pub struct ManagerArguments {
    /// Directory of the manager's identity, Raft log and snapshots.
    #[arg(long, env = "WARREN_MANAGER_DATA_DIR", default_value = "/var/lib/warren/manager")]
    pub data_dir: PathBuf,
    /// Address for API, agents and Raft, with mutual TLS.
    #[arg(long, env = "WARREN_LISTEN_ADDR", default_value = "0.0.0.0:7443")]
    pub listen_addr: SocketAddr,
    /// Address at which other managers and agents reach this one, as HOST:PORT [default: this machine's address]
    #[arg(long, env = "WARREN_MANAGER_ADVERTISE_ADDR")]
    pub advertise_addr: Option<String>,
    /// Name of this machine, with `--bootstrap`; `warren cluster init` and `join` set it otherwise [default: the machine's]
    #[arg(long, env = "WARREN_HOSTNAME")]
    pub hostname: Option<String>,
    /// Initialize a new cluster if the data directory is empty. Otherwise the manager waits for `warren cluster init` or `warren cluster
    /// join`.
    #[arg(long, env = "WARREN_BOOTSTRAP")]
    pub bootstrap: bool,
    /// Unix socket of the API, for root.
    #[arg(long, env = "WARREN_SOCKET", default_value = "/run/warren/warren.sock")]
    pub socket: PathBuf,
    /// Address of the HTTP endpoint for /metrics, /health, /ready and /live.
    #[arg(long, env = "WARREN_METRICS_ADDR", default_value = "0.0.0.0:9464")]
    pub metrics_addr: SocketAddr,
    /// Maximum number of Raft log entries between snapshots.
    #[arg(long, env = "WARREN_SNAPSHOT_AFTER", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(10..))]
    pub snapshot_after: u64,
    /// Approximate size in MiB of the Raft log between snapshots.
    #[arg(long, env = "WARREN_SNAPSHOT_AFTER_MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=65536))]
    pub snapshot_after_mib: u64,
    /// Unlock key of an autolocked manager (`warren cluster autolock`). Without it the manager waits for `warren cluster unlock`.
    #[arg(long, env = "WARREN_UNLOCK_KEY", hide_env_values = true)]
    pub unlock_key: Option<String>,
    /// Raft timing: election timeout for managers on one LAN, across a WAN, or on slow edge disks. Must be the same on all managers.
    #[arg(long, env = "WARREN_PROFILE", value_enum, default_value = "lan")]
    pub profile: ProfileArgument,
    /// Newest schema of the state to read and write. While one manager is held at an earlier version's schema, all managers can be
    /// downgraded to that version.
    #[arg(long, env = "WARREN_MAX_SCHEMA", default_value_t = SCHEMA, value_parser = clap::value_parser!(u32).range(i64::from(OLDEST_WRITTEN_SCHEMA)..=i64::from(SCHEMA)))]
    pub max_schema: u32,
    /// What containers may have of their nodes. Agents have the same options.
    #[command(flatten)]
    pub policy: warren_spec::Policy,
    #[command(flatten)]
    /// Where images come from: what a service's image is, is settled when the service is created.
    pub registries: RegistryArguments,
    /// Network of containers for a new cluster; each node gets a /24 [default: 10.128.0.0/10]
    #[arg(long, env = "WARREN_CONTAINER_NETWORK")]
    pub container_network: Option<Ipv4Net>,
    /// Network of services' virtual addresses for a new cluster [default: 10.127.0.0/16]
    #[arg(long, env = "WARREN_SERVICE_NETWORK")]
    pub service_network: Option<Ipv4Net>,
    /// Do not assign IPv6 addresses in a new cluster.
    #[arg(long, env = "WARREN_NO_IPV6")]
    pub no_ipv6: bool,
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
            advertise_addr: self.advertise_addr.clone(),
            hostname: self.hostname.clone().unwrap_or_else(process::hostname),
            bootstrap: self.bootstrap,
            socket: self.socket.clone(),
            metrics_addr: self.metrics_addr,
            unlock_key: self.unlock_key.clone(),
            snapshot_after: self.snapshot_after,
            snapshot_after_bytes: self.snapshot_after_mib << 20,
            profile: self.profile.into(),
            liveness: liveness::Timing::default(),
            newest_schema: self.max_schema,
            policy: Policy {
                containers: self.policy.clone(),
                own_ports: [self.listen_addr.port(), self.metrics_addr.port()],
            },
            registries: self.registries.options(),
            networks: Networks {
                containers: self.container_network,
                services: self.service_network,
                no_v6: self.no_ipv6,
            },
            telemetry: self.telemetry.options(),
        }
    }
}
