mod sockets;
mod turns;

pub use sockets::{BindError, Sockets};
use sockets::{receive, send, socket_address};
use turns::Answering;

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use hickory_server::{
    net::xfer::Protocol,
    proto::{
        op::{Edns, MessageType, Metadata, OpCode, ResponseCode},
        rr::{DNSClass, Record, RecordType},
        serialize::binary::BinEncoder,
    },
    server::Request,
    zone_handler::MessageResponseBuilder,
};
use nix::{
    errno::Errno,
    sys::socket::{MultiHeaders, SockaddrStorage},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    runtime::Handle,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;
use warren_connections::{Connections, at_most};

use crate::{
    fast::Question,
    forward::{Failure, Forwarded, Forwarder},
    zone::{Answer, Zone},
};

/// Where an answer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The cluster's own tables, or this server's refusal.
    Local,
    /// The node's resolvers.
    Forwarded,
    /// An earlier answer of theirs.
    Cached,
}

/// Hears of every answer. Called on the threads that answer: it must not wait.
pub trait Observer: Send + Sync + 'static {
    /// A request was answered.
    fn answered(&self, kind: RecordType, code: ResponseCode, source: Source, took: Duration);
    /// The node's resolvers were of no help: `no_upstream`, `timeout` or `other`.
    fn upstream_failed(&self, reason: &'static str);
}

/// What one source may ask.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests a second.
    pub rate: NonZeroU32,
    /// Requests at once.
    pub burst: NonZeroU32,
}

/// A connection without a request is closed after this time.
const TCP_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections at a time, in all and of one client: the oldest make room for new ones.
const CONNECTIONS: usize = 1024;
const OF_ONE_CLIENT: usize = 64;
/// What fits into a packet that no link on the way cuts up (DNS flag day 2020).
const MAX_UDP: u16 = 1232;
/// What every client takes.
const MIN_UDP: u16 = 512;
/// Bytes of a message's header.
const HEADER: usize = 12;
/// Sources that were quiet for a while are forgotten this often.
const FORGET: Duration = Duration::from_secs(60);

/// The same for those that need nobody else, when there are too many that do.
const LOCAL: usize = 1024;
/// Datagrams that are read and sent together.
const TOGETHER: usize = 32;
/// How long it may take until a thread hears that it is to stop.
const STOP: Duration = Duration::from_millis(500);
/// More than a request has.
const MAX_REQUEST: usize = 4096;

/// Answers DNS from the zone as it is at the time, until `shutdown`. `forwarder` is asked for what is not the zone's.
pub async fn serve(
    sockets: Sockets,
    zone: Arc<ArcSwap<Zone>>,
    forwarder: Arc<Forwarder>,
    limits: Limits,
    observer: Arc<dyn Observer>,
    shutdown: CancellationToken,
) {
    let limiter = Arc::new(RateLimiter::keyed(Quota::per_second(limits.rate).allow_burst(limits.burst)));
    let handler = Handler { zone, forwarder, limiter: Arc::clone(&limiter), answering: Answering::default(), observer };
    // Threads of their own, which wait in the kernel: what else goes on here does not hold answers up.
    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    let mut datagrams = JoinSet::new();
    for socket in sockets.udp {
        let (handler, runtime, stop) = (handler.clone(), Handle::current(), stop.clone());
        datagrams.spawn_blocking(move || handler.answer_datagrams(Arc::new(socket), &runtime, &stop));
    }
    let connections = handler.answer_connections(sockets.tcp);
    tracing::info!(address = %sockets.address, "names are answered");
    let forget = async {
        loop {
            tokio::time::sleep(FORGET).await;
            limiter.retain_recent();
        }
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = connections => {}
        Some(ended) = datagrams.join_next() => {
            let outcome = ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
            if let Err(error) = outcome {
                tracing::error!(%error, "names are no longer answered over UDP");
            }
        }
        () = forget => {}
    }
    // Requests that are being answered may be cut off: whoever asked asks again.
}

#[derive(Clone)]
struct Handler {
    zone: Arc<ArcSwap<Zone>>,
    forwarder: Arc<Forwarder>,
    limiter: Arc<DefaultKeyedRateLimiter<IpAddr>>,
    answering: Answering,
    observer: Arc<dyn Observer>,
}

/// As much as a client takes, and no more than the way does.
fn payload(asked: &Edns) -> u16 {
    asked.max_payload().clamp(MIN_UDP, MAX_UDP)
}

/// An answer as it goes out.
struct Reply {
    code: ResponseCode,
    authoritative: bool,
    records: Vec<Record>,
    additional: Vec<Record>,
    soa: Option<Record>,
    source: Source,
}

impl Reply {
    fn refusal(code: ResponseCode) -> Self {
        Self {
            code,
            authoritative: false,
            records: Vec::new(),
            additional: Vec::new(),
            soa: None,
            source: Source::Local,
        }
    }

    fn forwarded(answer: Forwarded, source: Source) -> Self {
        Self { records: answer.records, soa: answer.soa, source, ..Self::refusal(answer.code) }
    }
}

impl Handler {
    /// Answers what comes to a socket until `stop` or until it fails: plain questions at once, as many together as have come,
    /// others beside it. Blocks.
    fn answer_datagrams(&self, socket: Arc<UdpSocket>, runtime: &Handle, stop: &CancellationToken) -> io::Result<()> {
        let mut requests = vec![[0; MAX_REQUEST]; TOGETHER];
        let mut answers = vec![Vec::new(); TOGETHER];
        let (mut scratch, mut to) = (Vec::new(), Vec::with_capacity(TOGETHER));
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(TOGETHER, None);
        let mut outgoing = MultiHeaders::preallocate(TOGETHER, None);
        while !stop.is_cancelled() {
            let received = match receive(&socket, &mut headers, &mut requests) {
                Ok(received) => received,
                // Nothing for a while, or what a client's machine says about an earlier answer.
                Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNREFUSED) => continue,
                Err(error) => return Err(error.into()),
            };
            to.clear();
            for (request, (length, address)) in requests.iter().zip(received) {
                let Some((from, address)) = address.and_then(|address| Some((socket_address(&address)?, address)))
                else {
                    continue;
                };
                let request = &request[..length];
                let allowed = self.allows(from.ip());
                if allowed && self.answer_plain(request, &mut scratch, &mut answers[to.len()]) {
                    to.push(Some(address));
                } else if let Some(turn) = self.answering.turn(from.ip()) {
                    let (handler, request, socket) = (self.clone(), request.to_vec(), Arc::clone(&socket));
                    runtime.spawn(async move {
                        if let Some(answer) = handler.answer_other(request, from, allowed, turn.may_forward).await
                            && let Err(error) = socket.send_to(&answer, from)
                        {
                            // It waits only while the socket's buffer is full, which the kernel empties.
                            tracing::debug!(%error, "a DNS answer could not be sent");
                        }
                        drop(turn);
                    });
                }
            }
            send(&socket, &mut outgoing, &answers, &to);
        }
        Ok(())
    }

    /// Whether somebody has not asked too much. Every request is counted once.
    fn allows(&self, from: IpAddr) -> bool {
        self.limiter.check_key(&from).is_ok()
    }

    /// Answers a plain question; false if it is not for this.
    fn answer_plain(&self, request: &[u8], scratch: &mut Vec<IpAddr>, answer: &mut Vec<u8>) -> bool {
        let began = Instant::now();
        let Some(question) = Question::read(request) else { return false };
        let answered = question.answer(&self.zone.load(), MAX_UDP, scratch, answer);
        if answered {
            self.observer.answered(question.kind, ResponseCode::NoError, Source::Local, began.elapsed());
        }
        answered
    }

    /// The answer to any datagram; none to what is no request.
    async fn answer_other(
        &self,
        bytes: Vec<u8>,
        from: SocketAddr,
        allowed: bool,
        may_forward: bool,
    ) -> Option<Vec<u8>> {
        const RESPONSE: u8 = 0x80;
        let [id_high, id_low, flags, _] = *bytes.first_chunk().filter(|_| bytes.len() >= HEADER)?;
        // A response is nobody's question, and port 0 nobody's address.
        if flags & RESPONSE != 0 || from.port() == 0 {
            return None;
        }
        match Request::from_bytes(bytes, from, Protocol::Udp) {
            Ok(request) => {
                let limit = request.edns.as_ref().map_or(MIN_UDP, payload);
                self.respond(&request, limit, allowed, may_forward).await
            }
            Err(error) => {
                tracing::debug!(%error, "a malformed DNS request");
                let mut refusal = vec![0; HEADER];
                refusal[..4].copy_from_slice(&[id_high, id_low, flags | RESPONSE, ResponseCode::FormErr.low()]);
                self.observer.answered(RecordType::ZERO, ResponseCode::FormErr, Source::Local, Duration::ZERO);
                Some(refusal)
            }
        }
    }

    async fn reply(&self, request: &Request, allowed: bool, may_forward: bool) -> (RecordType, Reply) {
        let info = match request.request_info() {
            Ok(info) if request.metadata.op_code == OpCode::Query => info,
            Ok(_) => return (RecordType::ZERO, Reply::refusal(ResponseCode::NotImp)),
            Err(_) => return (RecordType::ZERO, Reply::refusal(ResponseCode::FormErr)),
        };
        let (name, kind) = (info.query.name(), info.query.query_type());
        if !allowed {
            return (kind, Reply::refusal(ResponseCode::Refused));
        }
        if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
            return (kind, Reply::refusal(ResponseCode::BADVERS));
        }
        // A zone transfer would be all the names at once.
        if matches!(kind, RecordType::AXFR | RecordType::IXFR) || info.query.query_class() != DNSClass::IN {
            return (kind, Reply::refusal(ResponseCode::Refused));
        }
        let zone = self.zone.load();
        if let Some(answer) = zone.answer(name, kind) {
            let mut reply = Reply { authoritative: true, ..Reply::refusal(ResponseCode::NoError) };
            match answer {
                Answer::Found { records, additional } => (reply.records, reply.additional) = (records, additional),
                Answer::NoData => reply.soa = Some(zone.soa().clone()),
                Answer::NoSuchName => {
                    (reply.code, reply.soa) = (ResponseCode::NXDomain, Some(zone.soa().clone()));
                }
            }
            return (kind, reply);
        }
        drop(zone);
        let (asked, source) = match self.forwarder.cached(name, kind).await {
            Some(cached) => (cached, Source::Cached),
            None if may_forward => (self.forwarder.ask(name, kind).await, Source::Forwarded),
            None => (Err(Failure::Overloaded), Source::Forwarded),
        };
        let reply = match asked {
            Ok(answer) => Reply::forwarded(answer, source),
            Err(failure) => {
                self.observer.upstream_failed(failure.label());
                Reply { source, ..Reply::refusal(ResponseCode::ServFail) }
            }
        };
        (kind, reply)
    }

    /// The answer to a request, cut off where it is longer than `limit`; none where it cannot be written.
    async fn respond(&self, request: &Request, limit: u16, allowed: bool, may_forward: bool) -> Option<Vec<u8>> {
        let began = Instant::now();
        let (kind, reply) = self.reply(request, allowed, may_forward).await;
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.response_code = reply.code;
        metadata.authoritative = reply.authoritative;
        metadata.recursion_available = true;
        let mut builder = MessageResponseBuilder::from_message_request(request);
        let mut edns = Edns::new();
        if let Some(asked) = &request.edns {
            edns.set_max_payload(payload(asked));
            builder.edns(&edns);
        }
        let message = builder.build(metadata, &reply.records, [], &reply.soa, &reply.additional);
        let mut bytes = Vec::with_capacity(usize::from(MIN_UDP));
        let mut encoder = BinEncoder::new(&mut bytes);
        encoder.set_max_size(limit);
        let written = message.destructive_emit(&mut encoder);
        self.observer.answered(kind, reply.code, reply.source, began.elapsed());
        written.inspect_err(|error| tracing::debug!(%error, "a DNS answer could not be written")).ok()?;
        Some(bytes)
    }
}

impl Handler {
    /// Answers what comes by connections. Never returns.
    async fn answer_connections(&self, listener: TcpListener) {
        let places = Connections::new(at_most(CONNECTIONS), OF_ONE_CLIENT);
        let mut answering = JoinSet::new();
        loop {
            let (stream, from, mut place) = tokio::select! {
                accepted = places.accept(&listener) => accepted,
                Some(_) = answering.join_next() => continue,
            };
            let handler = self.clone();
            answering.spawn(async move {
                tokio::select! {
                    // Whatever ends it, the client asks again.
                    _ = handler.answer_connection(stream, from) => {}
                    () = place.given_up() => {}
                }
            });
        }
    }

    /// Answers one connection's requests, one after the other, until it is silent for too long.
    async fn answer_connection(&self, mut stream: TcpStream, from: SocketAddr) -> io::Result<()> {
        stream.set_nodelay(true)?;
        loop {
            let request = async {
                let mut bytes = vec![0; stream.read_u16().await?.into()];
                stream.read_exact(&mut bytes).await?;
                Ok::<_, io::Error>(bytes)
            };
            let bytes = tokio::time::timeout(TCP_TIMEOUT, request).await??;
            let allowed = self.allows(from.ip());
            let Some(turn) = self.answering.turn(from.ip()) else { return Ok(()) };
            let answer = match Request::from_bytes(bytes, from, Protocol::Tcp) {
                // A response is nobody's question.
                Ok(request) if request.metadata.message_type == MessageType::Response => return Ok(()),
                Ok(request) => match self.respond(&request, u16::MAX, allowed, turn.may_forward).await {
                    Some(answer) => answer,
                    None => return Ok(()),
                },
                Err(error) => {
                    tracing::debug!(%error, "a malformed DNS request");
                    self.observer.answered(RecordType::ZERO, ResponseCode::FormErr, Source::Local, Duration::ZERO);
                    return Ok(());
                }
            };
            let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
            drop(turn);
            let answer = [&length.to_be_bytes()[..], &answer].concat();
            tokio::time::timeout(TCP_TIMEOUT, stream.write_all(&answer)).await??;
        }
    }
}
