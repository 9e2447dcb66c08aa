use std::{
    fs,
    net::{IpAddr, SocketAddr, SocketAddrV6},
    num::NonZeroUsize,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use hickory_server::proto::{
    op::ResponseCode,
    rr::{LowerName, Name, RData, Record, RecordType},
};
use lru::LruCache;

use crate::exchange::{Problem, Servers};

/// How long all of them together may take: less than a client's five seconds, so that it hears of the failure.
const PATIENCE: Duration = Duration::from_secs(3);
/// Answers kept.
const CACHED: usize = 10_000;
/// Memory that they take at most, in bytes.
const CACHED_BYTES: usize = 16 << 20;
/// What a byte of an answer takes in memory, and what each answer does besides, as measured: about.
const MEMORY_A_BYTE: usize = 4;
const OVERHEAD: usize = 512;
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
            server(address)
        });
        Self(servers.filter(|address| address.ip() != own).collect())
    }
}

/// An address, which may say by which link it is reached: `fe80::1%eth0`.
fn server(text: &str) -> Option<SocketAddr> {
    const PORT: u16 = 53;
    let Some((address, link)) = text.split_once('%') else {
        return Some(SocketAddr::new(text.parse().ok()?, PORT));
    };
    let index = match link.parse() {
        Ok(index) => index,
        Err(_) => {
            fs::read_to_string(Path::new("/sys/class/net").join(link).join("ifindex")).ok()?.trim().parse().ok()?
        }
    };
    Some(SocketAddrV6::new(address.parse().ok()?, PORT, 0, index).into())
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
    /// Too many questions wait already.
    Overloaded,
    /// Something else.
    Other,
}

impl Failure {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::NoUpstream => "no_upstream",
            Self::Timeout => "timeout",
            Self::Overloaded => "overloaded",
            Self::Other => "other",
        }
    }
}

struct Kept {
    answer: Forwarded,
    at: Instant,
    until: Instant,
    bytes: usize,
}

/// What is remembered, the latest used first; bounded in bytes as well as in number.
struct Cache {
    kept: LruCache<(LowerName, RecordType), Kept>,
    bytes: usize,
}

impl Cache {
    fn get(&mut self, key: &(LowerName, RecordType), now: Instant) -> Option<Forwarded> {
        let kept = self.kept.get(key)?;
        if kept.until <= now {
            self.remove(key);
            return None;
        }
        Some(kept.answer.aged(now - kept.at))
    }

    fn remove(&mut self, key: &(LowerName, RecordType)) {
        if let Some(kept) = self.kept.pop(key) {
            self.bytes -= kept.bytes;
        }
    }

    fn put(&mut self, key: (LowerName, RecordType), kept: Kept) {
        self.remove(&key);
        if kept.bytes > CACHED_BYTES / 16 {
            // It would take the place of too many others.
            return;
        }
        self.bytes += kept.bytes;
        if let Some((_, oldest)) = self.kept.push(key, kept) {
            self.bytes -= oldest.bytes;
        }
        while self.bytes > CACHED_BYTES {
            let Some((_, oldest)) = self.kept.pop_lru() else { return };
            self.bytes -= oldest.bytes;
        }
    }
}

/// Asks upstream, and remembers. Whom it asks may change.
pub struct Forwarder {
    servers: ArcSwap<Servers>,
    cache: Mutex<Cache>,
}

impl std::fmt::Debug for Forwarder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forwarder").field("servers", &self.servers.load()).finish_non_exhaustive()
    }
}

impl Forwarder {
    /// Asks these.
    #[must_use]
    pub fn new(upstreams: &Upstreams) -> Self {
        let size = NonZeroUsize::new(CACHED).unwrap_or(NonZeroUsize::MIN);
        Self {
            servers: ArcSwap::from_pointee(Servers::new(upstreams.0.clone())),
            cache: Mutex::new(Cache { kept: LruCache::new(size), bytes: 0 }),
        }
    }

    /// Asks others from now on. What is remembered stays.
    pub fn set_upstreams(&self, upstreams: &Upstreams) {
        self.servers.store(Arc::new(Servers::new(upstreams.0.clone())));
    }

    /// What is remembered.
    pub(crate) fn cached(&self, name: &LowerName, kind: RecordType) -> Option<Forwarded> {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.get(&(name.clone(), kind), Instant::now())
    }

    /// Asks.
    pub(crate) async fn ask(&self, name: &LowerName, kind: RecordType) -> Result<Forwarded, Failure> {
        let servers = self.servers.load_full();
        if servers.is_empty() {
            return Err(Failure::NoUpstream);
        }
        let mut fqdn = Name::from(name);
        fqdn.set_fqdn(true);
        let asked = tokio::time::timeout(PATIENCE, servers.ask(&fqdn, kind)).await;
        let message = asked.unwrap_or(Err(Problem::Timeout)).map_err(|problem| match problem {
            Problem::Timeout => Failure::Timeout,
            Problem::Unreachable => Failure::Other,
        })?;
        let mut message = message;
        let end = keep_chain(&fqdn, &mut message.answers);
        message.authorities.retain(|record| record.name.zone_of(&end));
        let bytes = message.to_vec().map_or(usize::MAX, |bytes| bytes.len() * MEMORY_A_BYTE + OVERHEAD);
        let soa = message.authorities.into_iter().find(|record| record.record_type() == RecordType::SOA);
        let negative = message.answers.is_empty();
        let answer = Forwarded {
            code: message.metadata.response_code,
            records: message.answers,
            soa: soa.filter(|_| negative).map(negative_ttl),
        };
        if let Some(ttl) = answer.ttl().filter(|ttl| !ttl.is_zero()) {
            let at = Instant::now();
            let kept = Kept { answer: answer.clone(), at, until: at + ttl, bytes };
            self.cache.lock().unwrap_or_else(PoisonError::into_inner).put((name.clone(), kind), kept);
        }
        Ok(answer)
    }
}

/// Keeps those records of an answer that are about the name that was asked for, or about one that it is an alias of, and returns the last of
/// these. Whatever else a server says there, nobody has asked, and it may be a lie about others' names.
fn keep_chain(name: &Name, records: &mut Vec<Record>) -> Name {
    let mut end = name.clone();
    let mut chain = vec![name.clone()];
    // Servers put aliases in order; those that do not are followed as well, as long as there are any.
    while let Some(target) = records.iter().find_map(|record| match &record.data {
        RData::CNAME(target) if record.name == end && !chain.contains(&target.0) => Some(target.0.clone()),
        _ => None,
    }) {
        chain.push(target.clone());
        end = target;
    }
    records.retain(|record| chain.contains(&record.name));
    end
}

/// That there is nothing is true for the lesser of two times (RFC 2308, 5).
fn negative_ttl(mut soa: Record) -> Record {
    if let RData::SOA(data) = &soa.data {
        soa.ttl = soa.ttl.min(data.minimum);
    }
    soa
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_others_are_nobodys() {
        use hickory_server::proto::rr::rdata::{A, CNAME};

        let name = |text: &str| Name::from_ascii(text).expect("a name");
        let alias = |from: &str, to: &str| Record::from_rdata(name(from), 60, RData::CNAME(CNAME(name(to))));
        let address = |of: &str| Record::from_rdata(name(of), 60, RData::A(A::new(192, 0, 2, 1)));
        let kept = |asked: &str, records: &[Record]| {
            let mut records = records.to_vec();
            let end = keep_chain(&name(asked), &mut records);
            let names: Vec<_> = records.iter().map(|record| record.name.to_string()).collect();
            (names.join(" "), end.to_string())
        };
        let foreign = [address("a.example."), address("bank.example."), alias("other.", "a.example.")];
        assert_eq!(kept("a.example.", &foreign), ("a.example.".to_owned(), "a.example.".to_owned()));
        let chain =
            [address("c.net."), alias("b.org.", "c.net."), alias("A.example.", "b.org."), address("bank.example.")];
        assert_eq!(kept("a.example.", &chain).1, "c.net.");
        assert_eq!(kept("a.example.", &chain).0.split(' ').count(), 3);
        let round = [alias("a.example.", "b.org."), alias("b.org.", "a.example.")];
        assert_eq!(kept("a.example.", &round).1, "b.org.", "it ends");
    }

    #[test]
    fn the_nodes_resolvers_are_asked_and_not_this_one() {
        let file = std::env::temp_dir().join(format!("warren-dns-test-{}", std::process::id()));
        let text = "# comment\nnameserver 169.254.1.1\nsearch a b\nnameserver 192.0.2.1\nnameserver fd00::1\nnameserver fe80::1%lo\nnameserver x\n";
        fs::write(&file, text).expect("writable");
        let own = "169.254.1.1".parse().expect("an address");
        let found = Upstreams::from_resolv_conf(&file, own);
        fs::remove_file(&file).expect("removable");
        let expected = ["192.0.2.1:53", "[fd00::1]:53", "[fe80::1%1]:53"].map(|text| text.parse().expect("an address"));
        assert_eq!(found.0, expected);
        assert!(Upstreams::from_resolv_conf(Path::new("/none"), own).0.is_empty());
    }

    #[test]
    fn what_is_remembered_is_bounded_in_bytes() {
        let mut cache = Cache { kept: LruCache::new(NonZeroUsize::new(CACHED).expect("not zero")), bytes: 0 };
        let key =
            |i: usize| (LowerName::from(Name::from_ascii(format!("n{i}.example.")).expect("a name")), RecordType::TXT);
        let now = Instant::now();
        let kept = |bytes| Kept {
            answer: Forwarded { code: ResponseCode::NoError, records: Vec::new(), soa: None },
            at: now,
            until: now + MAX_TTL,
            bytes,
        };
        let large = CACHED_BYTES / 20;
        for i in 0..1000 {
            cache.put(key(i), kept(large));
            assert!(cache.bytes <= CACHED_BYTES);
        }
        assert_eq!((cache.kept.len(), cache.bytes), (20, 20 * large));
        assert!(cache.get(&key(999), now).is_some() && cache.get(&key(0), now).is_none());
        cache.put(key(999), kept(1));
        assert_eq!(cache.bytes, 19 * large + 1);
        cache.put(key(5), kept(CACHED_BYTES));
        assert!(cache.get(&key(5), now).is_none());
        assert!(cache.get(&key(999), now + MAX_TTL).is_none());
        assert_eq!(cache.bytes, 19 * large);
    }
}
