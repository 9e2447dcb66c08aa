//! What a node is: its name, its resources, its software.

use std::{collections::BTreeMap, fs, sync::Arc};

use warren_proto::v1;
use warren_telemetry::{Measurement, Meters, Series, Source};

/// This build's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The commit it was built from.
pub const REVISION: &str = env!("WARREN_REVISION");

struct BuildInfo;

impl Source for BuildInfo {
    fn collect(&self) -> Vec<Series> {
        let labels = [("version", VERSION), ("revision", REVISION)];
        vec![Series::new("warren_build_info", &labels, Measurement::Gauge(1.0))]
    }
}

/// Exports version and commit as `warren_build_info`.
pub fn export_build_info(meters: &Meters) {
    meters.add_source(Arc::new(BuildInfo));
}

/// The machine's name.
#[must_use]
pub fn hostname() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Describes this machine; memory is what the kernel manages, cores are those this process may use.
#[must_use]
pub fn describe(hostname: &str, labels: BTreeMap<String, String>, probes: v1::ProbeReport) -> v1::NodeDescription {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let uname = rustix::system::uname();
    v1::NodeDescription {
        hostname: hostname.to_owned(),
        labels,
        resources: Some(v1::ResourceAmounts { cpu_millis: cores as i64 * 1000, memory_bytes: memory_bytes() }),
        agent_version: format!("{VERSION} ({REVISION})"),
        architecture: std::env::consts::ARCH.to_owned(),
        kernel: uname.release().to_string_lossy().into_owned(),
        probes: Some(probes),
    }
}

fn memory_bytes() -> i64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<i64>().ok());
    kib.unwrap_or(0) * 1024
}
