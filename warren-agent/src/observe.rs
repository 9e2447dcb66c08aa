//! The probes alone: timing every container and every DNS query of a host that something else runs.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::mpsc;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use warren_telemetry::{
    Checks, Meters, ProcessSource, Series, Source, build::BuildInfo, endpoint, otlp, table::Emitter,
};

use crate::{
    agent,
    probes::{self, DnsEvent, Groups, LifecycleEvent, Maps, Phase, ProbeSource, Sweep, drain_dns, drain_lifecycle},
    runtime, tasks,
};

/// How to observe.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where to serve `/metrics` and the health checks.
    pub metrics_addr: SocketAddr,
    /// The node's name in metrics.
    pub hostname: String,
    /// The probes'.
    pub probes: probes::Options,
    /// Asked for the labels that name a container's service; need not be there.
    pub containerd_socket: PathBuf,
    /// How long a DNS query may wait before it counts as unanswered.
    pub dns_timeout: Duration,
    /// What becomes of metrics.
    pub telemetry: warren_telemetry::Options,
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

/// Observes until `shutdown` is cancelled. The probes stay in the kernel and go on counting.
///
/// # Errors
///
/// When the probes cannot be loaded or the address not be bound.
pub async fn run(options: Options, shutdown: CancellationToken) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(agent::Error::NotRoot.into());
    }
    agent::check_ports(&options.probes)?;
    warren_connections::raise_open_files();
    let listener = endpoint::bind(options.metrics_addr, &options.telemetry.access).await?;
    let probe_options = options.probes.clone();
    let maps = Arc::new(tokio::task::spawn_blocking(move || Maps::open(&probe_options)).await??);
    let groups = Arc::new(Mutex::new(Groups::load(&maps)));

    let meters = Meters::new(&agent::own_identity(&options.hostname), &[Emitter::Agent, Emitter::Both]);
    meters.add_source(Arc::new(ProcessSource));
    meters.add_source(Arc::new(BuildInfo));
    let source = ProbeSource::new(Arc::clone(&maps), Arc::clone(&groups));
    meters.add_source(Arc::new(Labelled { hostname: options.hostname.clone(), source }));

    let (lifecycle_sender, lifecycle) = mpsc::channel(agent::EVENTS_AHEAD);
    let (dns_sender, dns) = mpsc::channel(agent::EVENTS_AHEAD);
    let (lifecycle_ring, dns_ring) = maps.rings()?;
    let tracker = TaskTracker::new();
    tracker.spawn(drain_lifecycle(lifecycle_ring, lifecycle_sender));
    tracker.spawn(drain_dns(dns_ring, dns_sender));
    tracker.spawn(sweep(Arc::clone(&maps), Arc::clone(&groups), options.dns_timeout, shutdown.clone()));
    match tokio::time::timeout(NAMING_TIMEOUT, runtime::all_containers(&options.containerd_socket)).await {
        Ok(found) => tasks::seed(&maps, &groups, &found),
        Err(_) => tracing::warn!("containerd does not answer: stops of containers that run already are not timed"),
    }
    let namer = Namer { maps, groups, containerd: options.containerd_socket };
    tracker.spawn(report(namer, lifecycle, dns, shutdown.clone()));

    if let Some(otlp) = &options.telemetry.otlp {
        tracker.spawn(otlp::exporter(otlp, meters.clone(), shutdown.clone().cancelled_owned())?);
    }

    let mut ready = Checks::default();
    ready.add("probes", || Ok(()));
    tracing::info!(address = %listener.local_addr()?, "observing");
    let native_histograms = options.telemetry.native_histograms;
    let endpoint = endpoint::Endpoint { meters, native_histograms, health: Checks::default(), ready };
    endpoint.serve(listener, shutdown.clone().cancelled_owned()).await;
    shutdown.cancel();
    tracker.close();
    tracker.wait().await;
    Ok(())
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
            let now = probes::monotonic_now();
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
            Ok::<_, probes::Error>(())
        });
        if let Ok(Err(error)) = swept.await {
            tracing::warn!(error = probes::describe(&error), "unanswered DNS queries could not be counted");
        }
    }
}

/// Longest that a daemon is asked for a container's labels.
const NAMING_TIMEOUT: Duration = Duration::from_secs(2);

/// Finds out which service a container belongs to.
struct Namer {
    maps: Arc<Maps>,
    groups: Arc<Mutex<Groups>>,
    containerd: PathBuf,
}

impl Namer {
    async fn name(&self, event: &LifecycleEvent) {
        if event.cgroup == 0 {
            return;
        }
        let asked = tokio::time::timeout(NAMING_TIMEOUT, runtime::service_of(&self.containerd, &event.id)).await;
        let Ok(Some(service)) = asked else { return };
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let named = groups.number(&self.maps, &service).and_then(|number| self.maps.set_group(event.cgroup, number));
        if let Err(error) = named {
            tracing::warn!(container = event.id, error = probes::describe(&error), "DNS queries stay unassigned");
        }
    }
}

async fn report(
    namer: Namer,
    mut lifecycle: mpsc::Receiver<LifecycleEvent>,
    mut dns: mpsc::Receiver<DnsEvent>,
    shutdown: CancellationToken,
) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            Some(event) = lifecycle.recv() => {
                log_lifecycle(&event);
                // `runc run` says nothing of a create.
                if matches!(event.phase, Phase::Created | Phase::Started)
                    && shutdown.run_until_cancelled(namer.name(&event)).await.is_none()
                {
                    return;
                }
            }
            Some(event) = dns.recv() => log_dns(&event),
            else => return,
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
