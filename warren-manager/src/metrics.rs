//! The manager's instruments.

use std::{sync::Mutex, time::Duration};

use warren_raft::{Observer, SnapshotOperation};
use warren_telemetry::Meters;

use opentelemetry::{
    KeyValue,
    metrics::{BoundCounter, BoundHistogram, Counter, Histogram},
};

/// Every counter and histogram that the manager records: bound to their labels where these are known beforehand, which spares
/// a look-up at each observation. Gauges are read from the state when someone scrapes.
#[derive(Debug)]
pub struct ManagerMetrics {
    pub(crate) api_requests: Counter<u64>,
    pub(crate) api_duration: Histogram<f64>,
    pub(crate) rpc_duration: Histogram<f64>,
    pub(crate) service_create: BoundHistogram<f64>,
    pub(crate) service_update: BoundHistogram<f64>,
    pub(crate) service_delete: BoundHistogram<f64>,
    pub(crate) scheduled: BoundCounter<u64>,
    pub(crate) placements_failed: Counter<u64>,
    pub(crate) scheduling_latency: BoundHistogram<f64>,
    pub(crate) scheduling_decisions: Counter<u64>,
    pub(crate) scheduling_batch: BoundHistogram<f64>,
    pub(crate) reconciliations: BoundCounter<u64>,
    pub(crate) reconciliation_duration: BoundHistogram<f64>,
    pub(crate) restarts: Counter<u64>,
    pub(crate) out_of_memory: Counter<u64>,
    pub(crate) leader_changes: BoundCounter<u64>,
    pub(crate) commit_duration: BoundHistogram<f64>,
    pub(crate) session_reconnects: Counter<u64>,
    pub(crate) telemetry_snapshots: Counter<u64>,
    pub(crate) secret_deliveries: Counter<u64>,
    pub(crate) events: Counter<u64>,
    apply_duration: BoundHistogram<f64>,
    log_sync_duration: BoundHistogram<f64>,
    snapshots: Counter<u64>,
    snapshot_duration: Histogram<f64>,
    snapshot_size: Mutex<u64>,
}

impl ManagerMetrics {
    /// The instruments, at zero.
    #[must_use]
    pub fn new(meters: &Meters) -> Self {
        let metrics = Self {
            api_requests: meters.counter("warren_api_requests_total"),
            api_duration: meters.histogram("warren_api_request_duration_seconds"),
            rpc_duration: meters.rpc_server_call_duration(),
            service_create: meters.histogram("warren_service_create_duration_seconds").bind(&[]),
            service_update: meters.histogram("warren_service_update_duration_seconds").bind(&[]),
            service_delete: meters.histogram("warren_service_delete_duration_seconds").bind(&[]),
            scheduled: meters.counter("warren_containers_scheduled_total").bind(&[]),
            placements_failed: meters.counter("warren_containers_failed_total"),
            scheduling_latency: meters.histogram("warren_scheduling_latency_seconds").bind(&[]),
            scheduling_decisions: meters.counter("warren_scheduling_decisions_total"),
            scheduling_batch: meters.histogram("warren_scheduling_batch_size").bind(&[]),
            reconciliations: meters.counter("warren_reconciliation_cycles_total").bind(&[]),
            reconciliation_duration: meters.histogram("warren_reconciliation_duration_seconds").bind(&[]),
            restarts: meters.counter("warren_container_restarts_total"),
            out_of_memory: meters.counter("warren_container_out_of_memory_total"),
            leader_changes: meters.counter("warren_raft_leader_changes_total").bind(&[]),
            commit_duration: meters.histogram("warren_raft_commit_duration_seconds").bind(&[]),
            session_reconnects: meters.counter("warren_agent_session_reconnects_total"),
            telemetry_snapshots: meters.counter("warren_telemetry_snapshots_total"),
            secret_deliveries: meters.counter("warren_secret_deliveries_total"),
            events: meters.counter("warren_events_total"),
            apply_duration: meters.histogram("warren_raft_apply_duration_seconds").bind(&[]),
            log_sync_duration: meters.histogram("warren_raft_log_sync_duration_seconds").bind(&[]),
            snapshots: meters.counter("warren_raft_snapshots_total"),
            snapshot_duration: meters.histogram("warren_raft_snapshot_duration_seconds"),
            snapshot_size: Mutex::new(0),
        };
        for operation in ["build", "install"] {
            for result in ["success", "failure"] {
                metrics.snapshots.add(0, &snapshot_labels(operation, result));
            }
        }
        metrics
    }

    pub(crate) fn snapshot_size(&self) -> u64 {
        self.snapshot_size.lock().map(|size| *size).unwrap_or(0)
    }
}

fn snapshot_labels(operation: &'static str, result: &'static str) -> [KeyValue; 2] {
    [KeyValue::new("operation", operation), KeyValue::new("result", result)]
}

impl Observer for ManagerMetrics {
    fn log_synced(&self, took: Duration) {
        self.log_sync_duration.record(took.as_secs_f64());
    }

    fn applied(&self, took: Duration) {
        self.apply_duration.record(took.as_secs_f64());
    }

    fn snapshot(&self, operation: SnapshotOperation, succeeded: bool, took: Duration, bytes: u64) {
        let operation = match operation {
            SnapshotOperation::Build => "build",
            SnapshotOperation::Install => "install",
        };
        let result = if succeeded { "success" } else { "failure" };
        self.snapshots.add(1, &snapshot_labels(operation, result));
        self.snapshot_duration.record(took.as_secs_f64(), &[KeyValue::new("operation", operation)]);
        if succeeded && let Ok(mut size) = self.snapshot_size.lock() {
            *size = bytes;
        }
    }
}
