use std::{
    fs,
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use hickory_resolver::{
    Resolver, TokioResolver,
    config::{NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    net::{DnsError, NetError, runtime::TokioRuntimeProvider},
};
use hickory_server::proto::{
    op::ResponseCode,
    rr::{LowerName, Name, Record, RecordType},
};
use lru::LruCache;

/// A resolver that does not answer within this time is asked again, and then the next one.
const TIMEOUT: Duration = Duration::from_millis(1000);
const ATTEMPTS: usize = 2;
/// How long all of them together may take: less than a client's five seconds, so that it hears of the failure.
const PATIENCE: Duration = Duration::from_secs(3);
/// Answers kept.
const CACHED: usize = 10_000;
/// How long an answer is kept at most, whatever it says, and one that there is nothing.
const MAX_TTL: Duration = Duration::from_secs(3600);
const MAX_NEGATIVE_TTL: Duration = Duration::from_secs(300);
/// How long it is kept that there is nothing, if the answer does not say.
const DEFAULT_NEGATIVE_TTL: Duration = Duration::from_secs(5);

/// The resolvers that are asked for everything else.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Upstreams(pub Vec<SocketAddr>);

impl Upstreams {
    /// Those of a resolv.conf(5), but for `own`, which is who asks.
    #[must_use]
    pub fn from_resolv_conf(path: &Path, own: IpAddr) -> Self {
        let text = fs::read_to_string(path).unwrap_or_default();
        let servers = text.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
            address.parse::<IpAddr>().ok()
        });
        Self(servers.filter(|address| *address != own).map(|address| SocketAddr::new(address, 53)).collect())
    }
}

/// What upstream says.
#[derive(Clone, Debug)]
pub(crate) struct Forwarded {
    pub(crate) code: ResponseCode,
    pub(crate) records: Vec<Record>,
    pub(crate) soa: Option<Record>,
}

impl Forwarded {
    /// The same after some time: what is kept grows old.
    fn aged(&self, age: Duration) -> Self {
        let age = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        let mut aged = self.clone();
        for record in aged.records.iter_mut().chain(&mut aged.soa) {
            record.ttl = record.ttl.saturating_sub(age);
        }
        aged
    }

    /// How long it may be kept; `None` for what is no answer.
    fn ttl(&self) -> Option<Duration> {
        let negative = self.records.is_empty();
        match self.code {
            ResponseCode::NoError if !negative => {
                let shortest = self.records.iter().map(|record| record.ttl).min().unwrap_or(0);
                Some(Duration::from_secs(shortest.into()).min(MAX_TTL))
            }
            ResponseCode::NoError | ResponseCode::NXDomain => {
                let said = self.soa.as_ref().map(|soa| Duration::from_secs(soa.ttl.into()));
                Some(said.unwrap_or(DEFAULT_NEGATIVE_TTL).min(MAX_NEGATIVE_TTL))
            }
            _ => None,
        }
    }
}

/// Why upstream was of no help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// Nobody to ask.
    NoUpstream,
    /// Nobody answered in time.
    Timeout,
    /// Something else.
    Other,
}

impl Failure {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::NoUpstream => "no_upstream",
            Self::Timeout => "timeout",
            Self::Other => "other",
        }
    }
}

struct Kept {
    answer: Forwarded,
    at: Instant,
    until: Instant,
}

/// Asks upstream, and remembers.
pub(crate) struct Forwarder {
    resolver: Option<TokioResolver>,
    cache: Mutex<LruCache<(LowerName, RecordType), Kept>>,
}

impl Forwarder {
    pub(crate) fn new(upstreams: &Upstreams) -> Self {
        let servers = upstreams.0.iter().map(|address| {
            // By UDP first; what does not fit comes by TCP.
            let mut server = NameServerConfig::udp_and_tcp(address.ip());
            for connection in &mut server.connections {
                connection.port = address.port();
            }
            server
        });
        let config = ResolverConfig::from_parts(None, Vec::new(), servers.collect());
        let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
        let options: &mut ResolverOpts = builder.options_mut();
        options.timeout = TIMEOUT;
        options.attempts = ATTEMPTS;
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        options.edns0 = true;
        options.preserve_intermediates = true;
        let resolver = if upstreams.0.is_empty() { None } else { builder.build().ok() };
        let size = NonZeroUsize::new(CACHED).unwrap_or(NonZeroUsize::MIN);
        Self { resolver, cache: Mutex::new(LruCache::new(size)) }
    }

    /// What is remembered.
    pub(crate) fn cached(&self, name: &LowerName, kind: RecordType) -> Option<Forwarded> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (name.clone(), kind);
        let kept = cache.get(&key)?;
        let now = Instant::now();
        if kept.until <= now {
            cache.pop(&key);
            return None;
        }
        Some(kept.answer.aged(now - kept.at))
    }

    /// Asks.
    pub(crate) async fn ask(&self, name: &LowerName, kind: RecordType) -> Result<Forwarded, Failure> {
        let resolver = self.resolver.as_ref().ok_or(Failure::NoUpstream)?;
        let mut fqdn = Name::from(name);
        fqdn.set_fqdn(true);
        let asked = tokio::time::timeout(PATIENCE, resolver.lookup(fqdn, kind)).await;
        let answer = match asked.unwrap_or(Err(NetError::Timeout)) {
            Ok(lookup) => Forwarded { code: ResponseCode::NoError, records: lookup.answers().to_vec(), soa: None },
            Err(NetError::Dns(DnsError::NoRecordsFound(nothing))) => Forwarded {
                code: nothing.response_code,
                records: Vec::new(),
                soa: nothing.soa.map(|soa| soa.into_record_of_rdata()),
            },
            Err(NetError::Dns(DnsError::ResponseCode(code))) => Forwarded { code, records: Vec::new(), soa: None },
            Err(NetError::Timeout) => return Err(Failure::Timeout),
            Err(error) => {
                tracing::debug!(%error, "a DNS query could not be forwarded");
                return Err(Failure::Other);
            }
        };
        if let Some(ttl) = answer.ttl().filter(|ttl| !ttl.is_zero()) {
            let at = Instant::now();
            let kept = Kept { answer: answer.clone(), at, until: at + ttl };
            self.cache.lock().unwrap_or_else(PoisonError::into_inner).put((name.clone(), kind), kept);
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nodes_resolvers_are_asked_and_not_this_one() {
        let file = std::env::temp_dir().join(format!("warren-dns-test-{}", std::process::id()));
        let text =
            "# comment\nnameserver 169.254.1.1\nsearch a b\nnameserver 192.0.2.1\nnameserver fd00::1\nnameserver x\n";
        fs::write(&file, text).expect("writable");
        let own = "169.254.1.1".parse().expect("an address");
        let found = Upstreams::from_resolv_conf(&file, own);
        fs::remove_file(&file).expect("removable");
        let expected = ["192.0.2.1:53", "[fd00::1]:53"].map(|text| text.parse().expect("an address"));
        assert_eq!(found.0, expected);
        assert!(Upstreams::from_resolv_conf(Path::new("/none"), own).0.is_empty());
    }
}
