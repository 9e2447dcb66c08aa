use std::{
    fs,
    net::{IpAddr, SocketAddr, SocketAddrV6},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use hickory_server::proto::{
    op::ResponseCode,
    rr::{LowerName, Name, RData, Record, RecordType},
};
use moka::{Expiry, future::Cache};

use crate::exchange::{Problem, Servers};

/// How long all of them together may take: less than a client's five seconds, so that it hears of the failure.
const PATIENCE: Duration = Duration::from_secs(3);
/// Memory that answers take at most, in bytes, and one of them.
const CACHED_BYTES: u64 = 16 << 20;
const MAX_CACHED: u32 = 64 << 10;
/// What a byte of an answer takes in memory, and what each answer does besides, as measured: about.
const MEMORY_A_BYTE: u32 = 4;
const OVERHEAD: u32 = 512;
/// How long an answer is kept at most, whatever it says, and one that there is nothing.
const MAX_TTL: Duration = Duration::from_secs(3600);
const MAX_NEGATIVE_TTL: Duration = Duration::from_secs(300);
/// How long it is kept that upstream was of no help (RFC 9520).
const FAILURE_TTL: Duration = Duration::from_secs(1);
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

    /// How long it may be kept; `None` for what is no answer. `negative` is one without a record of the type that was asked for, be
    /// there aliases or not.
    fn ttl(&self, negative: bool) -> Option<Duration> {
        let shortest = self.records.iter().map(|record| record.ttl).min();
        let shortest = Duration::from_secs(shortest.map_or(u64::MAX, u64::from));
        match self.code {
            ResponseCode::NoError if !negative => Some(shortest.min(MAX_TTL)),
            ResponseCode::NoError | ResponseCode::NXDomain => {
                let said = self.soa.as_ref().map(|soa| Duration::from_secs(soa.ttl.into()));
                Some(said.unwrap_or(DEFAULT_NEGATIVE_TTL).min(MAX_NEGATIVE_TTL).min(shortest))
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

/// An answer that is remembered, or that there was none.
#[derive(Clone)]
struct Kept {
    answer: Result<Arc<Forwarded>, Failure>,
    at: Instant,
    /// Time to live; with zero it is for the requests that wait for it now, and not cached.
    ttl: Duration,
    /// What it takes in memory.
    bytes: u32,
}

/// Keeps answers as long as they say.
struct UntilTheirEnd;

impl Expiry<Key, Kept> for UntilTheirEnd {
    fn expire_after_create(&self, _: &Key, kept: &Kept, _: Instant) -> Option<Duration> {
        Some(kept.ttl)
    }
}

type Key = (LowerName, RecordType);

/// Asks upstream, and remembers. Whom it asks may change.
pub struct Forwarder {
    servers: ArcSwap<Servers>,
    cache: Cache<Key, Kept>,
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
        let cache = Cache::builder()
            .max_capacity(CACHED_BYTES)
            .weigher(|_, kept: &Kept| kept.bytes)
            .expire_after(UntilTheirEnd)
            .build();
        Self { servers: ArcSwap::from_pointee(Servers::new(upstreams.0.clone())), cache }
    }

    /// Asks others from now on. What is remembered stays.
    pub fn set_upstreams(&self, upstreams: &Upstreams) {
        self.servers.store(Arc::new(Servers::new(upstreams.0.clone())));
    }

    /// What is remembered.
    pub(crate) async fn cached(&self, name: &LowerName, kind: RecordType) -> Option<Result<Forwarded, Failure>> {
        Some(self.cache.get(&(name.clone(), kind)).await?.answer())
    }

    /// Asks upstream. Concurrent requests for the same name and type share one upstream query, which is not cancelled with them: parallel
    /// queries would give an off-path attacker as many chances to forge an answer.
    pub(crate) async fn ask(&self, name: &LowerName, kind: RecordType) -> Result<Forwarded, Failure> {
        let servers = self.servers.load_full();
        let (cache, key, name) = (self.cache.clone(), (name.clone(), kind), name.clone());
        let asked = tokio::spawn(async move { cache.get_with(key, ask_upstream(servers, &name, kind)).await });
        asked.await.map_or(Err(Failure::Other), |kept| kept.answer())
    }
}

impl Kept {
    fn new(answer: Result<Arc<Forwarded>, Failure>, ttl: Duration, bytes: u32) -> Self {
        Self { answer, at: Instant::now(), ttl, bytes }
    }

    fn answer(&self) -> Result<Forwarded, Failure> {
        self.answer.as_ref().map(|answer| answer.aged(self.at.elapsed())).map_err(|failure| *failure)
    }
}

async fn ask_upstream(servers: Arc<Servers>, name: &LowerName, kind: RecordType) -> Kept {
    if servers.is_empty() {
        // There may be some in a moment.
        return Kept::new(Err(Failure::NoUpstream), Duration::ZERO, OVERHEAD);
    }
    let mut fqdn = Name::from(name);
    fqdn.set_fqdn(true);
    let asked = tokio::time::timeout(PATIENCE, servers.ask(&fqdn, kind)).await;
    let mut message = match asked.unwrap_or(Err(Problem::Timeout)) {
        Ok(message) => message,
        Err(Problem::Timeout) => return Kept::new(Err(Failure::Timeout), FAILURE_TTL, OVERHEAD),
        Err(Problem::Unreachable) => return Kept::new(Err(Failure::Other), FAILURE_TTL, OVERHEAD),
    };
    let end = keep_chain(&fqdn, &mut message.answers);
    message.authorities.retain(|record| record.name.zone_of(&end));
    let bytes = message.to_vec().map_or(u32::MAX, |bytes| bytes.len() as u32 * MEMORY_A_BYTE + OVERHEAD);
    let soa = message.authorities.into_iter().find(|record| record.record_type() == RecordType::SOA);
    let negative = !message.answers.iter().any(|record| kind == RecordType::ANY || record.record_type() == kind);
    let answer = Forwarded {
        code: message.metadata.response_code,
        records: message.answers,
        soa: soa.filter(|_| negative).map(negative_ttl),
    };
    // A large one would take the place of too many others.
    let ttl = answer.ttl(negative).filter(|_| bytes <= MAX_CACHED).unwrap_or_default();
    Kept::new(Ok(Arc::new(answer)), ttl, bytes)
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
    use hickory_server::proto::rr::rdata::SOA;

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
    fn an_alias_alone_is_no_answer_and_is_kept_as_its_zone_says() {
        use hickory_server::proto::rr::rdata::CNAME;

        let name = |text: &str| Name::from_ascii(text).expect("a name");
        let alias = Record::from_rdata(name("a.example."), 300, RData::CNAME(CNAME(name("b.example."))));
        let soa = |ttl| SOA::new(name("ns.example."), name("me.example."), 1, 2, 3, 4, ttl);
        let soa = negative_ttl(Record::from_rdata(name("example."), 3600, RData::SOA(soa(20))));
        let answer = |code, soa| Forwarded { code, records: vec![alias.clone()], soa };
        let seconds = |answer: Forwarded, negative| answer.ttl(negative).map(|ttl| ttl.as_secs());
        assert_eq!(seconds(answer(ResponseCode::NoError, Some(soa.clone())), true), Some(20));
        assert_eq!(seconds(answer(ResponseCode::NXDomain, Some(soa)), true), Some(20));
        assert_eq!(seconds(answer(ResponseCode::NoError, None), true), Some(5));
        assert_eq!(seconds(answer(ResponseCode::NoError, None), false), Some(300));
        assert_eq!(seconds(answer(ResponseCode::ServFail, None), true), None);
    }

    fn kept(bytes: u32, ttl: Duration) -> Kept {
        let answer = Forwarded { code: ResponseCode::NoError, records: Vec::new(), soa: None };
        Kept::new(Ok(Arc::new(answer)), ttl, bytes)
    }

    fn key(i: usize) -> Key {
        (LowerName::from(Name::from_ascii(format!("n{i}.example.")).expect("a name")), RecordType::TXT)
    }

    #[tokio::test]
    async fn what_is_remembered_is_bounded_in_bytes_and_in_time() {
        let cache = Forwarder::new(&Upstreams::default()).cache;
        for i in 0..1000 {
            cache.insert(key(i), kept(CACHED_BYTES as u32 / 20, MAX_TTL)).await;
        }
        cache.run_pending_tasks().await;
        assert_eq!((cache.entry_count(), cache.weighted_size() <= CACHED_BYTES), (20, true));
        cache.insert(key(2000), kept(1, Duration::from_millis(50))).await;
        assert!(cache.get(&key(2000)).await.is_some());
        tokio::time::sleep(Duration::from_millis(60)).await;
        assert!(cache.get(&key(2000)).await.is_none());
    }

    #[tokio::test]
    async fn one_question_is_asked_once_whoever_waits_for_it() {
        use hickory_server::proto::{op::Message, rr::rdata::A};

        let server = tokio::net::UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let forwarder = Arc::new(Forwarder::new(&Upstreams(vec![server.local_addr().expect("an address")])));
        let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let answering = tokio::spawn({
            let asked = Arc::clone(&asked);
            async move {
                let mut buffer = [0; 512];
                loop {
                    let (length, from) = server.recv_from(&mut buffer).await.expect("a question");
                    asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    // Long enough for all of them to come.
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    let question = Message::from_vec(&buffer[..length]).expect("a message");
                    let mut answer = question.clone();
                    answer.metadata.message_type = hickory_server::proto::op::MessageType::Response;
                    let name = question.queries[0].name().clone();
                    answer.add_answer(Record::from_rdata(name, 0, RData::A(A::new(192, 0, 2, 1))));
                    server.send_to(&answer.to_vec().expect("bytes"), from).await.expect("sent");
                }
            }
        });
        let name = LowerName::from(Name::from_ascii("one.example.").expect("a name"));
        let ask = || {
            let (forwarder, name) = (Arc::clone(&forwarder), name.clone());
            tokio::spawn(async move { forwarder.ask(&name, RecordType::A).await })
        };
        let waiting: Vec<_> = (0..50).map(|_| ask()).collect();
        for asking in waiting {
            assert_eq!(asking.await.expect("no panic").expect("an answer").records.len(), 1);
        }
        assert_eq!(asked.load(std::sync::atomic::Ordering::Relaxed), 1);
        // Whoever goes away takes nothing with him: the next one has the answer that is on its way.
        let first = ask();
        tokio::time::sleep(Duration::from_millis(50)).await;
        first.abort();
        ask().await.expect("no panic").expect("an answer");
        assert_eq!(asked.load(std::sync::atomic::Ordering::Relaxed), 2);
        // It may not be kept: the next one is another question.
        ask().await.expect("no panic").expect("an answer");
        assert_eq!(asked.load(std::sync::atomic::Ordering::Relaxed), 3);
        answering.abort();
        // Nor is one that does not answer asked by everybody anew.
        let silent = Forwarder::new(&Upstreams(vec!["127.0.0.1:9".parse().expect("an address")]));
        let name = LowerName::from(Name::from_ascii("silent.example.").expect("a name"));
        assert!(silent.ask(&name, RecordType::A).await.is_err());
        assert!(silent.cached(&name, RecordType::A).await.is_some_and(|known| known.is_err()));
        tokio::time::sleep(FAILURE_TTL + Duration::from_millis(50)).await;
        assert!(silent.cached(&name, RecordType::A).await.is_none());
    }
}
