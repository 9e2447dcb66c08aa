//! What containers and the node use, as the kernel accounts for it.

mod cgroup;
mod used;

use std::{fs, sync::Arc, time::Duration};

use warren_proto::v1;
use warren_telemetry::Source;

use crate::tasks::{Running, now};
use cgroup::Hierarchies;
pub(crate) use cgroup::{join_cpu, limit, limit_cpu};
pub(crate) use used::Used;

/// Of what the probes count, what people look at.
const SERIES: [&str; 5] = [
    "warren_container_create_duration_seconds",
    "warren_container_start_duration_seconds",
    "warren_container_stop_duration_seconds",
    "warren_dns_query_duration_seconds",
    "warren_dns_failures_total",
];
/// The kernel tells processors' time in these whatever its own clock is.
const TICK: Duration = Duration::from_millis(10);

/// Looks at the node and its containers. One that ends meanwhile is left out.
pub(crate) fn read(running: &[Running], sources: &[Arc<dyn Source>]) -> v1::StreamStatsResponse {
    let hierarchies = Hierarchies::of_this_process();
    let containers = running.iter().filter_map(|container| of_container(container, &hierarchies)).collect();
    let series = sources.iter().flat_map(|source| source.collect());
    let series = series.filter(|series| SERIES.contains(&series.metric)).map(|series| series.to_proto()).collect();
    v1::StreamStatsResponse { node: Some(v1::NodeStats { series, ..of_node() }), containers }
}

/// The processes of a process's cgroup, itself among them; host's ids.
pub(crate) fn processes_with(pid: u32) -> Vec<u32> {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    Hierarchies::of_this_process().processes(&cgroups)
}

fn of_node() -> v1::NodeStats {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let (cpus, cpu_usage_nanos) = processors(&stat);
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let memory_total_bytes = kib("MemTotal") * 1024;
    v1::NodeStats {
        taken_at: Some(now()),
        cpus,
        cpu_usage_nanos,
        memory_bytes: memory_total_bytes.saturating_sub(kib("MemAvailable") * 1024),
        memory_total_bytes,
        ..Default::default()
    }
}

/// How many there are, and how long they have worked.
fn processors(stat: &str) -> (u32, u64) {
    let numbered = |line: &&str| line.starts_with("cpu") && !line.starts_with("cpu ");
    let cpus = stat.lines().filter(numbered).count() as u32;
    let all = stat.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = all.split_whitespace().skip(1).filter_map(|ticks| ticks.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal; guests' time is in user's.
    let busy: u64 =
        ticks.iter().take(7).enumerate().filter(|(at, _)| *at != 3 && *at != 4).map(|(_, ticks)| ticks).sum();
    (cpus, busy * TICK.as_nanos() as u64)
}

fn of_container(container: &Running, hierarchies: &Hierarchies) -> Option<v1::ContainerStats> {
    let proc = format!("/proc/{}", container.pid);
    let cgroups = fs::read_to_string(format!("{proc}/cgroup")).ok()?;
    // The process that had this number is another by now.
    if !cgroups.contains(&container.id) {
        return None;
    }
    let own_network = fs::read_link(format!("{proc}/ns/net")).ok() != fs::read_link("/proc/self/ns/net").ok();
    let (received, sent) =
        if own_network { traffic(&fs::read_to_string(format!("{proc}/net/dev")).unwrap_or_default()) } else { (0, 0) };
    Some(v1::ContainerStats {
        container_id: container.id.clone(),
        taken_at: Some(now()),
        network_receive_bytes: received,
        network_transmit_bytes: sent,
        ..hierarchies.usage(&cgroups)
    })
}

/// Bytes in and out of all interfaces but loopback, of a file like /proc/net/dev.
fn traffic(dev: &str) -> (u64, u64) {
    let interfaces = dev.lines().filter_map(|line| line.trim().split_once(':')).filter(|(name, _)| *name != "lo");
    interfaces.fold((0, 0), |(received, sent), (_, columns)| {
        let mut columns = columns.split_whitespace().map(|column| column.parse::<u64>().unwrap_or(0));
        (received + columns.next().unwrap_or(0), sent + columns.nth(7).unwrap_or(0))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_time_is_what_they_did_not_wait() {
        let stat = "cpu  100 20 30 4000 500 6 7 9 50 0\ncpu0 1 2 3 4\ncpu1 1 2 3 4\nintr 5 1\n";
        assert_eq!(processors(stat), (2, (100 + 20 + 30 + 6 + 7) * 10_000_000));
        assert_eq!(processors(""), (0, 0));
    }

    #[test]
    fn traffic_is_that_of_all_interfaces_but_loopback() {
        let dev = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
            lo:     999      1    0    0    0     0          0         0      999       1    0    0    0     0       0          0\n  \
            eth0:    1234     12    1    2    3     4          5         6    5678      13    0    0    0     0       0          0\n  \
            eth1:1000 1 0 0 0 0 0 0 2000 1 0 0 0 0 0 0\n";
        assert_eq!(traffic(dev), (2234, 7678));
    }
}
