//! The manager's command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, ValueEnum};
use ipnet::Ipv4Net;
use warren_raft::Profile;

use warren_registry::cli::RegistryArguments;
use warren_telemetry::cli::TelemetryArguments;

use crate::{
    core::Networks,
    liveness,
    manager::Options,
    state::{OLDEST_WRITTEN_SCHEMA, SCHEMA},
    validate::Policy,
};

/// The file with a manager's settings, in the configuration's directory.
pub const FILE: &str = "manager.toml";

/// How far apart managers are.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ProfileArgument {
    /// One site, disks of servers: elections begin a second after the leader was heard last.
    Lan,
    /// Several sites: after 3 seconds.
    Wan,
    /// Slow or worn disks, like SD cards: after 7.5 seconds.
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
    /// Holds the cluster's state.
    #[arg(long, env = "WARREN_MANAGER_DATA_DIR", default_value = "/var/lib/warren/manager")]
    pub data_dir: PathBuf,
    /// Where API, agents' sessions and consensus are served, with mutual TLS.
    #[arg(long, env = "WARREN_LISTEN_ADDR", default_value = "0.0.0.0:7443")]
    pub listen_addr: SocketAddr,
    /// Where other managers and agents reach it, as HOST:PORT; this machine's address unless given.
    #[arg(long, env = "WARREN_MANAGER_ADVERTISE_ADDR")]
    pub advertise_addr: Option<String>,
    /// This machine's name, with `--bootstrap`; its own unless given. Elsewhere `warren cluster init` and `join` say it.
    #[arg(long, env = "WARREN_HOSTNAME")]
    pub hostname: Option<String>,
    /// Found a cluster if the data directory is nobody's yet. Otherwise the manager waits for `warren cluster init` or `warren
    /// cluster join`.
    #[arg(long, env = "WARREN_BOOTSTRAP")]
    pub bootstrap: bool,
    /// Where the API is served to root.
    #[arg(long, env = "WARREN_SOCKET", default_value = "/run/warren/warren.sock")]
    pub socket: PathBuf,
    /// Where /metrics, /health, /ready and /live are served.
    #[arg(long, env = "WARREN_METRICS_ADDR", default_value = "0.0.0.0:9464")]
    pub metrics_addr: SocketAddr,
    /// Log entries between snapshots, at most.
    #[arg(long, env = "WARREN_SNAPSHOT_AFTER", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(10..))]
    pub snapshot_after: u64,
    /// MiB of the log between snapshots, about.
    #[arg(long, env = "WARREN_SNAPSHOT_AFTER_MIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=65536))]
    pub snapshot_after_mib: u64,
    /// Opens this manager's key of secrets, where it is locked (`warren cluster autolock`). Without it a manager that is started
    /// waits for `warren cluster unlock`.
    #[arg(long, env = "WARREN_UNLOCK_KEY", hide_env_values = true)]
    pub unlock_key: Option<String>,
    /// How far apart the managers are, and on what disks: how long a leader may be silent before another is elected. The same
    /// for all of them.
    #[arg(long, env = "WARREN_PROFILE", value_enum, default_value = "lan")]
    pub profile: ProfileArgument,
    /// The newest schema of the state to read and write. While one manager of a cluster is held to an earlier version's, all of them
    /// can go back to that version.
    #[arg(long, env = "WARREN_MAX_SCHEMA", default_value_t = SCHEMA, value_parser = clap::value_parser!(u32).range(i64::from(OLDEST_WRITTEN_SCHEMA)..=i64::from(SCHEMA)))]
    pub max_schema: u32,
    /// What containers may have of their nodes. Agents have the same options.
    #[command(flatten)]
    pub policy: warren_spec::Policy,
    #[command(flatten)]
    /// Where images come from: what a service's image is, is settled when the service is created.
    pub registries: RegistryArguments,
    /// The network of containers' addresses, of a cluster that begins: each node has a /24 of it. 10.128.0.0/10 unless given.
    #[arg(long, env = "WARREN_CONTAINER_NETWORK")]
    pub container_network: Option<Ipv4Net>,
    /// The network of services' virtual addresses, of a cluster that begins. 10.127.0.0/16 unless given.
    #[arg(long, env = "WARREN_SERVICE_NETWORK")]
    pub service_network: Option<Ipv4Net>,
    /// Give containers and services of a cluster that begins no IPv6 addresses.
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
            hostname: self.hostname.clone().unwrap_or_else(crate::hostname),
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
