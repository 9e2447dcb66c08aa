//! What a node is: its name, its resources, its software.

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use warren_proto::v1;
use warren_telemetry::build;

use crate::stats;

/// The machine's name.
#[must_use]
pub fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Describes this machine, which others reach at `address`, encrypted if there is a key; memory is what the kernel manages, cores are those this process may use.
#[must_use]
pub fn describe(
    hostname: &str,
    labels: BTreeMap<String, String>,
    probes: v1::ProbeReport,
    address: Option<IpAddr>,
    wireguard_public_key: Option<String>,
) -> v1::NodeDescription {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let uname = rustix::system::uname();
    v1::NodeDescription {
        hostname: hostname.to_owned(),
        labels,
        resources: Some(v1::ResourceAmounts { cpu_millis: cores as i64 * 1000, memory_bytes: memory_bytes() }),
        agent_version: build::LONG_VERSION.to_owned(),
        architecture: std::env::consts::ARCH.to_owned(),
        kernel: uname.release().to_string_lossy().into_owned(),
        probes: Some(probes),
        address: address.map(|address| address.to_string()).unwrap_or_default(),
        wireguard_public_key: wireguard_public_key.unwrap_or_default(),
    }
}

/// Of the processes that the machine may have, all containers together may have so many hundredths: the rest is for whoever comes to see
/// what is wrong.
const CONTAINERS_PROCESSES: u64 = 80;

/// Bounds the processes of all containers together. A machine whose cgroups do not count processes is left as it is.
pub(crate) fn limit_processes(cgroup_parent: &Path) {
    let number = |path: &str| fs::read_to_string(path).ok().and_then(|said| said.trim().parse::<u64>().ok());
    let most = ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"].into_iter().filter_map(number).min();
    let Some(most) = most else { return };
    let limited = stats::limit(cgroup_parent, "pids", "pids.max", &(most * CONTAINERS_PROCESSES / 100).to_string());
    if let Err(error) = limited {
        tracing::warn!(%error, "nothing bounds the processes of all containers together");
    }
}

/// An init program for containers, where the packages tini, catatonit and docker put theirs.
#[must_use]
pub fn init() -> Option<PathBuf> {
    const CANDIDATES: [&str; 5] = [
        "/usr/bin/tini-static",
        "/usr/bin/catatonit",
        "/usr/libexec/catatonit/catatonit",
        "/usr/libexec/docker/docker-init",
        "/usr/bin/docker-init",
    ];
    CANDIDATES.into_iter().map(PathBuf::from).find(|candidate| candidate.is_file())
}

fn memory_bytes() -> i64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<i64>().ok());
    kib.unwrap_or(0) * 1024
}
