use std::time::Duration;

/// What was done with a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotOperation {
    /// Written from the state.
    Build,
    /// Taken from the leader, or read at start.
    Install,
}

/// Is told what consensus does and how long it takes.
pub trait Observer: Send + Sync + 'static {
    /// Appended entries are durable.
    fn log_synced(&self, took: Duration);
    /// One entry was applied.
    fn applied(&self, took: Duration);
    /// A snapshot was built or installed, or could not be; `bytes` is its file's size.
    fn snapshot(&self, operation: SnapshotOperation, succeeded: bool, took: Duration, bytes: u64);
}

/// Observes nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unobserved;

impl Observer for Unobserved {
    fn log_synced(&self, _: Duration) {}
    fn applied(&self, _: Duration) {}
    fn snapshot(&self, _: SnapshotOperation, _: bool, _: Duration, _: u64) {}
}
