//! The manager's instruments.

use std::{sync::Mutex, time::Duration};

use warren_raft::{Observer, SnapshotOperation};
use warren_telemetry::Meters;

use opentelemetry::{
    KeyValue,
    metrics::{Counter, Histogram},
};

/// Every counter and histogram that the manager records. Gauges are read from the state when someone scrapes.
#[derive(Debug)]
pub struct ManagerMetrics {
    pub(crate) api_requests: Counter<u64>,
    pub(crate) api_duration: Histogram<f64>,
    pub(crate) service_create: Histogram<f64>,
    pub(crate) service_update: Histogram<f64>,
    pub(crate) service_delete: Histogram<f64>,
    pub(crate) scheduled: Counter<u64>,
    pub(crate) placements_failed: Counter<u64>,
    pub(crate) scheduling_latency: Histogram<f64>,
    pub(crate) scheduling_decisions: Counter<u64>,
    pub(crate) scheduling_batch: Histogram<f64>,
    pub(crate) reconciliations: Counter<u64>,
    pub(crate) reconciliation_duration: Histogram<f64>,
    pub(crate) restarts: Counter<u64>,
    pub(crate) leader_changes: Counter<u64>,
    pub(crate) commit_duration: Histogram<f64>,
    pub(crate) session_reconnects: Counter<u64>,
    pub(crate) telemetry_snapshots: Counter<u64>,
    apply_duration: Histogram<f64>,
    log_sync_duration: Histogram<f64>,
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
            service_create: meters.histogram("warren_service_create_duration_seconds"),
            service_update: meters.histogram("warren_service_update_duration_seconds"),
            service_delete: meters.histogram("warren_service_delete_duration_seconds"),
            scheduled: meters.counter("warren_containers_scheduled_total"),
            placements_failed: meters.counter("warren_containers_failed_total"),
            scheduling_latency: meters.histogram("warren_scheduling_latency_seconds"),
            scheduling_decisions: meters.counter("warren_scheduling_decisions_total"),
            scheduling_batch: meters.histogram("warren_scheduling_batch_size"),
            reconciliations: meters.counter("warren_reconciliation_cycles_total"),
            reconciliation_duration: meters.histogram("warren_reconciliation_duration_seconds"),
            restarts: meters.counter("warren_container_restarts_total"),
            leader_changes: meters.counter("warren_raft_leader_changes_total"),
            commit_duration: meters.histogram("warren_raft_commit_duration_seconds"),
            session_reconnects: meters.counter("warren_agent_session_reconnects_total"),
            telemetry_snapshots: meters.counter("warren_telemetry_snapshots_total"),
            apply_duration: meters.histogram("warren_raft_apply_duration_seconds"),
            log_sync_duration: meters.histogram("warren_raft_log_sync_duration_seconds"),
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
        self.log_sync_duration.record(took.as_secs_f64(), &[]);
    }

    fn applied(&self, took: Duration) {
        self.apply_duration.record(took.as_secs_f64(), &[]);
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
