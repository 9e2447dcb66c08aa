//! The probes alone: timing every container and every DNS query of a host that something else runs.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio_util::{sync::CancellationToken, task::TaskTracker};
use warren_telemetry::{Checks, Meters, ProcessSource, build::BuildInfo, endpoint, otlp, table::Emitter};

use crate::{
    agent,
    probes::{
        self, Events, Groups, Labelled, LifecycleEvent, Maps, Phase, ProbeSource, log_dns, log_lifecycle, read_events,
        sweep,
    },
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

    let tracker = TaskTracker::new();
    let events = read_events(&maps, &tracker)?;
    tracker.spawn(sweep(Arc::clone(&maps), Arc::clone(&groups), options.dns_timeout, shutdown.clone()));
    match tokio::time::timeout(NAMING_TIMEOUT, runtime::all_containers(&options.containerd_socket)).await {
        Ok(found) => tasks::seed(&maps, &groups, &found),
        Err(_) => tracing::warn!("containerd does not answer: stops of containers that run already are not timed"),
    }
    let namer = Namer { maps, groups, containerd: options.containerd_socket };
    tracker.spawn(report(namer, events, shutdown.clone()));

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

async fn report(namer: Namer, Events { mut lifecycle, mut dns }: Events, shutdown: CancellationToken) {
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
