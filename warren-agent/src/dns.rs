//! The node's resolver: names of services for its containers, on an address that is the same on every node. It works on the
//! tables that were last heard, with or without a manager.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use hickory_proto::{ProtoError, op::ResponseCode, rr::RecordType};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use warren_agent_ebpf::histogram::Histogram;
use warren_dns::{Forwarder, Limits, Observer, Sockets, Source as Origin, Upstreams, Zone, serve};
use warren_telemetry::{Measurement, Series, Source};

use crate::{
    network::{RESOLVER, Tables},
    probes::exponential,
};

/// DNS's port: another would hide queries from the probes.
const PORT: u16 = 53;
/// Before trying again to use the address.
const RETRY: Duration = Duration::from_secs(2);
/// Whom the machine itself asks.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Between looks at it.
const LOOK: Duration = Duration::from_secs(2);
/// What a container may ask at once, in seconds of its rate.
const BURST: NonZeroU32 = NonZeroU32::new(2).unwrap();

/// How the resolver works.
#[derive(Clone, Debug)]
pub struct Options {
    /// The domain of services' names.
    pub domain: String,
    /// Who is asked for everything else; the node's own resolvers if empty.
    pub upstreams: Vec<SocketAddr>,
    /// Requests a second that one container may make.
    pub rate: NonZeroU32,
}

/// The node's resolver. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Resolver {
    options: Options,
    zone: Arc<ArcSwap<Zone>>,
    counts: Arc<Counts>,
    problem: Arc<Mutex<Option<String>>>,
}

impl Resolver {
    /// A resolver that knows no names yet.
    ///
    /// # Errors
    ///
    /// When the domain is no domain name.
    pub fn new(options: Options) -> Result<Self, ProtoError> {
        let zone = Zone::new(&options.domain, &[])?;
        Ok(Self {
            options,
            zone: Arc::new(ArcSwap::from_pointee(zone)),
            counts: Arc::default(),
            problem: Arc::new(Mutex::new(Some("not yet".to_owned()))),
        })
    }

    /// What it counts.
    #[must_use]
    pub fn source(&self) -> Arc<dyn Source> {
        Arc::clone(&self.counts) as Arc<dyn Source>
    }

    /// Nothing wrong, or what is.
    ///
    /// # Errors
    ///
    /// What keeps names from being answered.
    pub fn check(&self) -> Result<(), String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone().map_or(Ok(()), Err)
    }

    fn set_problem(&self, problem: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// Answers until `shutdown`, by the tables as they are at the time.
    pub async fn run(self, tables: watch::Receiver<Tables>, shutdown: CancellationToken) {
        let follow = self.clone().follow(tables);
        let forwarder = Arc::new(Forwarder::new(&self.upstreams()));
        let upstreams = self.clone().follow_upstreams(Arc::clone(&forwarder));
        let answer = self.answer(forwarder, shutdown.clone());
        let all = async { tokio::join!(follow, upstreams, answer) };
        shutdown.run_until_cancelled(all).await;
    }

    async fn follow(self, mut tables: watch::Receiver<Tables>) {
        let mut zone = Zone::clone(&self.zone.load());
        loop {
            {
                let tables = tables.borrow_and_update();
                let networks = tables.place.as_ref().map(|place| place.cluster.clone()).unwrap_or_default();
                zone.update(&networks, tables.services.values());
            }
            self.zone.store(Arc::new(zone.clone()));
            if tables.changed().await.is_err() {
                return;
            }
        }
    }

    /// Whom to ask, by the settings or else by the machine's own.
    fn upstreams(&self) -> Upstreams {
        if self.options.upstreams.is_empty() {
            Upstreams::from_resolv_conf(Path::new(RESOLV_CONF), IpAddr::from(RESOLVER))
        } else {
            Upstreams(self.options.upstreams.clone())
        }
    }

    /// Whom the machine asks changes: by DHCP, by a VPN, by hand.
    async fn follow_upstreams(self, forwarder: Arc<Forwarder>) {
        let mut known = self.upstreams();
        loop {
            tokio::time::sleep(LOOK).await;
            let resolver = self.clone();
            // A small file, which may be on a disk that hangs.
            let Ok(found) = tokio::task::spawn_blocking(move || resolver.upstreams()).await else { return };
            if found != known {
                let servers: Vec<_> = found.0.iter().map(ToString::to_string).collect();
                tracing::info!(servers = servers.join(" "), "upstream resolvers changed");
                forwarder.set_upstreams(&found);
                known = found;
            }
        }
    }

    async fn answer(&self, forwarder: Arc<Forwarder>, shutdown: CancellationToken) {
        let address = SocketAddr::new(RESOLVER.into(), PORT);
        let rate = self.options.rate;
        let limits = Limits { rate, burst: rate.saturating_mul(BURST) };
        while !shutdown.is_cancelled() {
            let problem = match Sockets::bind(address) {
                Ok(sockets) => {
                    self.set_problem(None);
                    let observer = Arc::clone(&self.counts) as Arc<dyn Observer>;
                    let zone = Arc::clone(&self.zone);
                    serve(sockets, zone, Arc::clone(&forwarder), limits, observer, shutdown.clone()).await;
                    if shutdown.is_cancelled() {
                        return;
                    }
                    "the server ended".to_owned()
                }
                Err(error) => error.to_string(),
            };
            tracing::warn!(problem, "names of services are not answered; trying again");
            self.set_problem(Some(problem));
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Types and codes that have a label of their own; others share "other".
const TYPES: [(RecordType, &str); 5] = [
    (RecordType::A, "A"),
    (RecordType::AAAA, "AAAA"),
    (RecordType::SRV, "SRV"),
    (RecordType::PTR, "PTR"),
    (RecordType::TXT, "TXT"),
];
const CODES: [(ResponseCode, &str); 5] = [
    (ResponseCode::NoError, "noerror"),
    (ResponseCode::NXDomain, "nxdomain"),
    (ResponseCode::ServFail, "servfail"),
    (ResponseCode::Refused, "refused"),
    (ResponseCode::FormErr, "formerr"),
];
const ORIGINS: [(Origin, &str); 3] =
    [(Origin::Local, "local"), (Origin::Forwarded, "forwarded"), (Origin::Cached, "cached")];
const REASONS: [&str; 4] = ["no_upstream", "timeout", "overloaded", "other"];
const OTHER: &str = "other";

/// What the resolver has done: plain counters, because it does it a hundred thousand times a second.
#[derive(Debug, Default)]
struct Counts {
    requests: [[[AtomicU64; TYPES.len() + 1]; CODES.len() + 1]; ORIGINS.len()],
    durations: [Mutex<Option<Histogram>>; ORIGINS.len()],
    failures: [AtomicU64; REASONS.len()],
}

/// Where a value is in a list; just behind it if it is not.
fn place<T: PartialEq>(list: &[(T, &str)], value: &T) -> usize {
    list.iter().position(|(known, _)| known == value).unwrap_or(list.len())
}

fn label<T>(list: &[(T, &'static str)], place: usize) -> &'static str {
    list.get(place).map_or(OTHER, |(_, label)| label)
}

impl Observer for Counts {
    fn answered(&self, kind: RecordType, code: ResponseCode, source: Origin, took: Duration) {
        let origin = place(&ORIGINS, &source).min(ORIGINS.len() - 1);
        self.requests[origin][place(&CODES, &code)][place(&TYPES, &kind)].fetch_add(1, Ordering::Relaxed);
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let mut durations = self.durations[origin].lock().unwrap_or_else(PoisonError::into_inner);
        durations.get_or_insert(Histogram::EMPTY).observe(nanos);
    }

    fn upstream_failed(&self, reason: &'static str) {
        let reason = REASONS.iter().position(|known| *known == reason).unwrap_or(REASONS.len() - 1);
        self.failures[reason].fetch_add(1, Ordering::Relaxed);
    }
}

impl Source for Counts {
    fn collect(&self) -> Vec<Series> {
        let mut series = Vec::new();
        let mut count = |metric, labels: &[(&str, &str)], counter: &AtomicU64| {
            let count = counter.load(Ordering::Relaxed);
            if count > 0 {
                series.push(Series::new(metric, labels, Measurement::Counter(count as f64)));
            }
        };
        for (origin, by_code) in self.requests.iter().enumerate() {
            for (code, by_type) in by_code.iter().enumerate() {
                for (kind, counter) in by_type.iter().enumerate() {
                    let labels = [
                        ("type", label(&TYPES, kind)),
                        ("rcode", label(&CODES, code)),
                        ("source", label(&ORIGINS, origin)),
                    ];
                    count("warren_dns_server_requests_total", &labels, counter);
                }
            }
        }
        for (reason, counter) in REASONS.iter().zip(&self.failures) {
            count("warren_dns_server_upstream_failures_total", &[("reason", reason)], counter);
        }
        for ((_, origin), durations) in ORIGINS.iter().zip(&self.durations) {
            if let Some(histogram) = durations.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
                series.push(Series::new(
                    "warren_dns_server_request_duration_seconds",
                    &[("source", origin)],
                    Measurement::Histogram(exponential(histogram)),
                ));
            }
        }
        series
    }
}
