//! What an agent does with the probes, with and without a manager: reading single events, counting what is never answered, tidying up.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use warren_telemetry::{Series, Source};

use super::{
    DnsEvent, Error, Groups, LifecycleEvent, Maps, Sweep, describe, drain_dns, drain_lifecycle, monotonic_now,
};

/// Events read from the rings ahead of their use. When nobody keeps up, the rings fill and the kernel counts what it drops.
const EVENTS_AHEAD: usize = 1024;

/// Single events, as they come.
#[derive(Debug)]
pub(crate) struct Events {
    pub(crate) lifecycle: mpsc::Receiver<LifecycleEvent>,
    pub(crate) dns: mpsc::Receiver<DnsEvent>,
}

/// Begins to read single events, until their receivers are gone.
///
/// # Errors
///
/// When the rings cannot be opened: counts and histograms do not need them.
pub(crate) fn read_events(maps: &Maps, tasks: &TaskTracker) -> Result<Events, Error> {
    let (lifecycle_ring, dns_ring) = maps.rings()?;
    let (lifecycle_sender, lifecycle) = mpsc::channel(EVENTS_AHEAD);
    let (dns_sender, dns) = mpsc::channel(EVENTS_AHEAD);
    tasks.spawn(drain_lifecycle(lifecycle_ring, lifecycle_sender));
    tasks.spawn(drain_dns(dns_ring, dns_sender));
    Ok(Events { lifecycle, dns })
}

/// Adds the `node` label to what a source contributes.
#[derive(Debug)]
pub(crate) struct Labelled<S> {
    pub(crate) hostname: String,
    pub(crate) source: S,
}

impl<S: Source> Source for Labelled<S> {
    fn collect(&self) -> Vec<Series> {
        self.source.collect().into_iter().map(|series| series.with_label("node", &self.hostname)).collect()
    }
}

/// Counts unanswered DNS queries, once a second, and tidies the maps up once a minute.
pub(crate) async fn sweep(maps: Arc<Maps>, groups: Arc<Mutex<Groups>>, timeout: Duration, shutdown: CancellationToken) {
    const TIDY: u32 = 60;
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    let mut ticks: u32 = 0;
    while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
        let (maps, groups) = (Arc::clone(&maps), Arc::clone(&groups));
        ticks = ticks.wrapping_add(1);
        let swept = tokio::task::spawn_blocking(move || {
            let now = monotonic_now();
            Sweep { timeout }.run(&maps, now)?;
            if ticks.is_multiple_of(TIDY) {
                maps.remove_stale_operations(now);
                let forgotten = groups.lock().unwrap_or_else(PoisonError::into_inner).forget_unused(&maps)?;
                if forgotten > 0 {
                    tracing::info!(
                        services = forgotten,
                        "DNS counts of services that are gone from the node make room"
                    );
                }
            }
            Ok::<_, Error>(())
        });
        if let Ok(Err(error)) = swept.await {
            tracing::warn!(error = describe(&error), "unanswered DNS queries could not be counted");
        }
    }
}

/// One line an event.
pub(crate) fn log_lifecycle(event: &LifecycleEvent) {
    tracing::info!(
        container = event.id,
        phase = ?event.phase,
        took_ms = event.duration_ns as f64 / 1e6,
        exit_code = event.exit_code(),
        flags = event.container.flags,
        "container"
    );
}

/// One line an event.
pub(crate) fn log_dns(event: &DnsEvent) {
    tracing::info!(
        name = event.name,
        qtype = event.qtype,
        rcode = event.rcode,
        took_ms = event.duration_ns as f64 / 1e6,
        retransmits = event.retransmits,
        "slow or failed DNS query"
    );
}
