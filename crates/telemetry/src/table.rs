//! Every metric that Warren emits. The instruments, the endpoint's HELP and TYPE lines, docs/metrics.md and the test that
//! compares them with a running system all come from here.

use std::fmt;

/// How a metric is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows, but for a restart.
    Counter,
    /// Goes both ways.
    Gauge,
    /// Counts observations by size.
    Histogram,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        })
    }
}

/// Which processes emit a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emitter {
    /// The manager, about itself and the cluster.
    Manager,
    /// The agent about its node; the leading manager too, for every node.
    Agent,
    /// The agent about what it does for its node; on its own endpoint only.
    Node,
    /// Both, about themselves.
    Both,
}

/// A metric's definition.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its Prometheus name, which is its OpenTelemetry name as well.
    pub name: &'static str,
    /// How it is read.
    pub kind: Kind,
    /// Who emits it.
    pub emitter: Emitter,
    /// Its unit in UCUM notation; metadata only, never appended to the name.
    pub unit: &'static str,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// Upper bounds of a histogram's buckets, in its unit.
    pub buckets: &'static [f64],
    /// What it says.
    pub help: &'static str,
}

/// Changes of state that pass through Raft and the scheduler: from a millisecond to half a minute.
const CONTROL: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
/// Raft commits: etcd's grid, with one bucket below a millisecond for fast disks.
const COMMIT: &[f64] =
    &[0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192];
/// Applying to memory: microseconds.
const APPLY: &[f64] = &[0.00001, 0.00005, 0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0];
/// API requests.
const REQUEST: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Batch sizes.
const BATCH: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 5000.0];
/// Powers of two, from `2^first` on.
const fn octaves<const N: usize>(first: i32) -> [f64; N] {
    let mut bounds = [1.0; N];
    let mut i = 0;
    while i < N {
        let mut exponent = first + i as i32;
        while exponent < 0 {
            bounds[i] /= 2.0;
            exponent += 1;
        }
        while exponent > 0 {
            bounds[i] *= 2.0;
            exponent -= 1;
        }
        i += 1;
    }
    bounds
}

/// What the kernel aggregates: bounds on powers of two seconds, which its exponential slots meet exactly. For packets: 30.5 us
/// to 8 s.
const KERNEL_FAST: &[f64] = &octaves::<19>(-15);
/// For answers from memory and from far away: 1 us to 8 s.
const RESOLVER: &[f64] = &octaves::<24>(-20);
/// For container operations: 1 ms to 512 s.
const KERNEL_SLOW: &[f64] = &octaves::<20>(-10);

use Emitter::{Agent, Both, Manager, Node};
use Kind::{Counter, Gauge, Histogram};

macro_rules! metrics {
    ($($name:ident $kind:ident $emitter:ident $unit:literal [$($label:literal)*] $buckets:expr; $help:literal)*) => {
        /// All of them, by area.
        pub const METRICS: &[Metric] = &[$(Metric {
            name: stringify!($name),
            kind: $kind,
            emitter: $emitter,
            unit: $unit,
            labels: &[$($label),*],
            buckets: $buckets,
            help: $help,
        }),*];
    };
}

metrics! {
    // Cluster
    warren_nodes_total Gauge Manager "{node}" ["role" "status"] &[]; "Nodes, by role and status"
    warren_node_condition Gauge Manager "1" ["node" "condition"] &[]; "1 while the node has this condition: see `warren node inspect`"
    warren_services_total Gauge Manager "{service}" [] &[]; "Services"
    warren_service_containers Gauge Manager "{container}" ["service" "state"] &[]; "Containers of a service: desired, running on nodes that are not down, and of those ready, which is healthy where that is checked"
    warren_secrets_total Gauge Manager "{secret}" [] &[]; "Secrets"
    warren_volumes_total Gauge Manager "{volume}" [] &[]; "Volumes"
    warren_containers_total Gauge Manager "{container}" ["state"] &[]; "Containers, by observed state"
    // API
    warren_api_requests_total Counter Manager "{request}" ["method" "status"] &[]; "API requests, by method and gRPC status code"
    warren_api_request_duration_seconds Histogram Manager "s" ["method"] REQUEST; "Time to serve an API request; for a stream, until it is set up"
    warren_service_create_duration_seconds Histogram Manager "s" [] CONTROL; "Time to create a service, durable in Raft"
    warren_service_update_duration_seconds Histogram Manager "s" [] CONTROL; "Time to update a service, durable in Raft"
    warren_service_delete_duration_seconds Histogram Manager "s" [] CONTROL; "Time to delete a service, durable in Raft"
    // Scheduler and reconciler
    warren_containers_scheduled_total Counter Manager "{container}" [] &[]; "Containers assigned to a node"
    warren_containers_failed_total Counter Manager "{container}" [] &[]; "Failed placements: no eligible node"
    warren_scheduling_latency_seconds Histogram Manager "s" [] CONTROL; "Time from the creation of a container to its placement"
    warren_scheduling_decisions_total Counter Manager "{decision}" ["result" "reason"] &[]; "Scheduling decisions, and for refusals why"
    warren_scheduling_pending Gauge Manager "{container}" [] &[]; "Containers waiting for a node"
    warren_scheduling_batch_size Histogram Manager "{container}" [] BATCH; "Containers considered in one round of scheduling"
    warren_reconciliation_cycles_total Counter Manager "{cycle}" [] &[]; "Rounds of the reconciler"
    warren_reconciliation_duration_seconds Histogram Manager "s" [] CONTROL; "Time of one round of the reconciler"
    warren_container_restarts_total Counter Manager "{restart}" ["service"] &[]; "Containers replaced because they ended, by service"
    warren_container_out_of_memory_total Counter Manager "{container}" ["service"] &[]; "Containers that the kernel's OOM killer ended, by service, counted by the leader"
    // Raft
    warren_raft_is_leader Gauge Manager "" [] &[]; "1 while this manager leads and a majority follows it"
    warren_raft_peers_total Gauge Manager "{manager}" [] &[]; "Members of the Raft group, this one included"
    warren_raft_log_index Gauge Manager "{entry}" [] &[]; "Index of the last log entry"
    warren_raft_applied_index Gauge Manager "{entry}" [] &[]; "Index of the last applied log entry"
    warren_raft_term Gauge Manager "{term}" [] &[]; "Current term"
    warren_raft_quorum_ok Gauge Manager "" [] &[]; "1 while a leader is known and, on the leader, a quorum is reachable"
    warren_raft_leader_changes_total Counter Manager "{change}" [] &[]; "Leader changes seen by this manager"
    warren_raft_apply_duration_seconds Histogram Manager "s" [] APPLY; "Time to apply one entry to the state"
    warren_raft_commit_duration_seconds Histogram Manager "s" [] COMMIT; "From proposal to the applied reply, on the leader"
    warren_raft_log_sync_duration_seconds Histogram Manager "s" [] COMMIT; "Time to make appended entries durable"
    warren_raft_snapshots_total Counter Manager "{snapshot}" ["operation" "result"] &[]; "Snapshots written and installed"
    warren_raft_snapshot_duration_seconds Histogram Manager "s" ["operation"] CONTROL; "Time to write or install a snapshot"
    warren_raft_snapshot_size_bytes Gauge Manager "By" [] &[]; "Size of the last snapshot's file"
    warren_raft_replication_lag_entries Gauge Manager "{entry}" ["peer"] &[]; "Log entries a peer has not acknowledged, on the leader"
    // Sessions
    warren_agent_sessions Gauge Manager "{session}" [] &[]; "Agents with an open session"
    warren_agent_session_reconnects_total Counter Manager "{session}" ["node"] &[]; "Sessions opened after a node's first"
    warren_telemetry_snapshots_total Counter Manager "{snapshot}" ["node" "result"] &[]; "Telemetry snapshots received: accepted, or rejected because a series was not known"
    warren_telemetry_age_seconds Gauge Manager "s" ["node"] &[]; "Age of a node's latest telemetry snapshot"
    warren_events_total Counter Manager "{event}" ["type"] &[]; "Events seen by the manager that led"
    warren_secret_deliveries_total Counter Manager "{secret}" ["result"] &[]; "Secrets and configs sent to nodes that need them"
    // Container lifecycle, timed in the kernel or, without probes, around the runtime's calls
    warren_container_create_duration_seconds Histogram Agent "s" ["node" "source"] KERNEL_SLOW; "From the execution of the runtime's create to its exit"
    warren_container_start_duration_seconds Histogram Agent "s" ["node" "source"] KERNEL_SLOW; "From the execution of the runtime's start to the execution of the container's process"
    warren_container_stop_duration_seconds Histogram Agent "s" ["node" "source"] KERNEL_SLOW; "From the first stop signal to the end of the container's last process"
    warren_container_phase_duration_seconds Histogram Agent "s" ["node" "phase"] KERNEL_SLOW; "Time of one phase of starting a container"
    warren_container_exits_total Counter Agent "{container}" ["node" "reason"] &[]; "Containers that ended, by reason"
    warren_container_start_failures_total Counter Agent "{container}" ["node" "reason"] &[]; "Containers that could not be created or started"
    warren_container_sigterm_ignored_total Counter Agent "{container}" ["node"] &[]; "Containers whose first process had no handler for the stop signal"
    warren_container_stop_escalations_total Counter Agent "{container}" ["node"] &[]; "Stops that needed SIGKILL"
    warren_container_cpu_seconds_total Counter Node "s" ["node" "service" "slot"] &[]; "Processor time of a slot's containers on the node, user and system; the slot is 0 for a global service"
    warren_container_memory_bytes Gauge Node "By" ["node" "service" "slot" "kind"] &[]; "Memory of a slot's containers on the node: their working_set, which is what the kernel cannot take back at once, and their limit where there is one"
    // DNS, seen in the kernel
    warren_dns_queries_total Counter Agent "{query}" ["node" "service" "type" "rcode" "transport"] &[]; "DNS queries that were answered or timed out"
    warren_dns_query_duration_seconds Histogram Agent "s" ["node" "service" "type" "rcode"] KERNEL_FAST; "From a query's first packet to its answer at the socket"
    warren_dns_failures_total Counter Agent "{query}" ["node" "service" "reason"] &[]; "DNS queries that failed"
    warren_dns_sent_total Counter Agent "{packet}" ["node"] &[]; "DNS queries sent, retransmissions included"
    warren_dns_retransmits_total Counter Agent "{packet}" ["node"] &[]; "DNS queries sent again before an answer"
    warren_dns_pending Gauge Agent "{query}" ["node"] &[]; "DNS queries waiting for an answer"
    warren_dns_unmatched_responses_total Counter Agent "{packet}" ["node"] &[]; "DNS answers that matched no query"
    // DNS, the node's resolver
    warren_dns_server_requests_total Counter Node "{request}" ["type" "rcode" "source"] &[]; "DNS requests answered: from the cluster's tables, by the node's resolvers, or from the cache"
    warren_dns_server_request_duration_seconds Histogram Node "s" ["source"] RESOLVER; "From a DNS request to its answer"
    warren_dns_server_upstream_failures_total Counter Node "{request}" ["reason"] &[]; "DNS requests that the node's resolvers did not answer"
    // Health checks
    warren_health_checks_total Counter Node "{check}" ["type" "result"] &[]; "Health checks, by kind and result: success or failure"
    warren_health_check_duration_seconds Histogram Node "s" ["type"] KERNEL_FAST; "Time of one health check"
    // Volumes
    warren_volume_operations_total Counter Node "{operation}" ["operation" "result"] &[]; "Operations on volumes: mount, unmount and remove, and whether they succeeded"
    warren_volume_operation_duration_seconds Histogram Node "s" ["operation"] KERNEL_FAST; "Time of an operation on a volume"
    // Logs
    warren_log_lines_lost_total Counter Node "{line}" [] &[]; "Lines of containers that could not be written to their logs, for example because the disk was full"
    // Probes
    warren_probe_up Gauge Agent "" ["node" "probe"] &[]; "1 while the probe is attached"
    warren_probe_events_lost_total Counter Agent "{event}" ["node" "probe" "reason"] &[]; "Events that a probe could not record"
    warren_probe_runs_total Counter Agent "{run}" ["node" "program"] &[]; "Runs of a BPF program; counted while the kernel's BPF statistics are on"
    warren_probe_run_seconds_total Counter Agent "s" ["node" "program"] &[]; "Time in a BPF program; counted while the kernel's BPF statistics are on"
    // Every process
    warren_otlp_exports_total Counter Both "{export}" ["result" "signal"] &[]; "Batches exported by OTLP: of metrics, traces and logs"
    warren_build_info Gauge Both "" ["version" "revision"] &[]; "1, with the version as labels"
    process_cpu_seconds_total Counter Both "s" [] &[]; "User and system CPU time"
    process_resident_memory_bytes Gauge Both "By" [] &[]; "Resident memory"
    process_virtual_memory_bytes Gauge Both "By" [] &[]; "Virtual memory"
    process_open_fds Gauge Both "{file}" [] &[]; "Open file descriptors"
    process_max_fds Gauge Both "{file}" [] &[]; "Limit of open file descriptors"
    process_start_time_seconds Gauge Both "s" [] &[]; "Start time since the Unix epoch"
    process_threads Gauge Both "{thread}" [] &[]; "Threads"
}

/// Finds a metric by name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Metric> {
    METRICS.iter().find(|metric| metric.name == name)
}

/// The table as a Markdown document: what docs/metrics.md holds.
#[must_use]
pub fn markdown() -> String {
    use fmt::Write as _;

    let mut out = String::from(
        "# Metrics\n\n\
         Generated from `crates/telemetry/src/table.rs`: `WARREN_BLESS=1 cargo test -p warren-telemetry` rewrites it, and \
         the same test without the variable compares.\n\n\
         `manager` and `agent` name the endpoint: 9464 and 9465 unless configured otherwise. The leader also \
         exports what every node's agent streams to it, under the agent's names. `node` is the node's hostname.\n\n\
         | metric | type | unit | labels | endpoint | description |\n|---|---|---|---|---|---|\n",
    );
    for metric in METRICS {
        let labels = metric.labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(" ");
        let emitter = match metric.emitter {
            Manager => "manager",
            Agent => "agent, manager",
            Node => "agent",
            Both => "both",
        };
        writeln!(
            out,
            "| `{}` | {} | {} | {labels} | {emitter} | {} |",
            metric.name, metric.kind, metric.unit, metric.help
        )
        .expect("writing to a string cannot fail");
    }
    out.push_str("\n## Buckets\n\nUpper bounds, in seconds unless the unit says otherwise.\n\n");
    for metric in METRICS.iter().filter(|metric| metric.kind == Histogram) {
        let bounds = metric.buckets.iter().map(f64::to_string).collect::<Vec<_>>().join(", ");
        writeln!(out, "- `{}`: {bounds}", metric.name).expect("writing to a string cannot fail");
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_unique_and_well_formed() {
        let mut seen = HashSet::new();
        for metric in METRICS {
            assert!(seen.insert(metric.name), "{} is defined twice", metric.name);
            assert!(metric.name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'));
            assert!(!metric.help.is_empty());
            assert_eq!(metric.kind == Histogram, !metric.buckets.is_empty(), "{}", metric.name);
            assert!(metric.buckets.is_sorted_by(|a, b| a < b), "{}", metric.name);
        }
    }

    #[test]
    fn the_documented_table_is_this_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/metrics.md");
        if std::env::var_os("WARREN_BLESS").is_some() {
            std::fs::write(path, markdown()).expect("docs/ is writable");
        }
        let documented = std::fs::read_to_string(path).expect("docs/metrics.md exists");
        assert!(
            documented == markdown(),
            "docs/metrics.md is out of date: run `WARREN_BLESS=1 cargo test -p warren-telemetry`"
        );
    }
}
