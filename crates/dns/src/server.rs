use std::{
    io,
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use hickory_server::{
    Server,
    net::runtime::Time,
    proto::{
        op::{Edns, Header, HeaderCounts, Metadata, OpCode, ResponseCode},
        rr::{DNSClass, Record, RecordType},
    },
    server::{Request, RequestHandler, ResponseHandler, ResponseInfo},
    zone_handler::MessageResponseBuilder,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, UdpSocket};
use tokio_util::sync::CancellationToken;

use crate::{
    forward::{Forwarded, Forwarder, Upstreams},
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

/// Why names cannot be answered.
#[derive(Debug, thiserror::Error)]
#[error("cannot answer DNS on {address}: {source}")]
pub struct BindError {
    /// Where.
    address: SocketAddr,
    /// Why not.
    source: io::Error,
}

/// UDP sockets that share the address: the kernel spreads requests over them, which keeps the slowest answers quick.
const SOCKETS: usize = 2;
/// What a socket may hold before it is read, in bytes.
const RECEIVE_BUFFER: usize = 4 << 20;
/// A connection without a request is closed after this time.
const TCP_TIMEOUT: Duration = Duration::from_secs(5);
/// Responses waiting on one connection.
const TCP_RESPONSES: usize = 128;
/// Connections waiting to be accepted.
const BACKLOG: i32 = 1024;
/// What fits into a packet that no link on the way cuts up (DNS flag day 2020).
const MAX_UDP: u16 = 1232;
/// Sources that were quiet for a while are forgotten this often.
const FORGET: Duration = Duration::from_secs(60);

/// Sockets of an address, UDP and TCP.
#[derive(Debug)]
pub struct Sockets {
    address: SocketAddr,
    udp: Vec<UdpSocket>,
    tcp: TcpListener,
}

impl Sockets {
    /// Takes an address, which need not be the machine's yet.
    ///
    /// # Errors
    ///
    /// When it cannot be used: another server does, for one.
    pub fn bind(address: SocketAddr) -> Result<Self, BindError> {
        let failed = |source| BindError { address, source };
        // First, because it shares the address with nobody: another server there is found out.
        let tcp = tcp(address).map_err(failed)?;
        let udp = (0..SOCKETS).map(|_| udp(address).map_err(failed)).collect::<Result<_, _>>()?;
        Ok(Self { address, udp, tcp })
    }
}

/// Answers DNS from the zone as it is at the time, until `shutdown`. `upstreams` are asked for what is not the zone's.
pub async fn serve(
    sockets: Sockets,
    zone: Arc<ArcSwap<Zone>>,
    upstreams: &Upstreams,
    limits: Limits,
    observer: Arc<dyn Observer>,
    shutdown: CancellationToken,
) {
    let limiter = Arc::new(RateLimiter::keyed(Quota::per_second(limits.rate).allow_burst(limits.burst)));
    let handler = Handler { zone, forwarder: Forwarder::new(upstreams), limiter: Arc::clone(&limiter), observer };
    let mut server = Server::new(handler);
    for socket in sockets.udp {
        server.register_socket(socket);
    }
    server.register_listener(sockets.tcp, TCP_TIMEOUT, TCP_RESPONSES);
    tracing::info!(address = %sockets.address, "names are answered");
    let forget = async {
        loop {
            tokio::time::sleep(FORGET).await;
            limiter.retain_recent();
        }
    };
    tokio::select! {
        () = shutdown.cancelled() => {}
        outcome = server.block_until_done() => if let Err(error) = outcome {
            tracing::error!(%error, "names are no longer answered");
        },
        () = forget => {}
    }
    // Requests that are being answered may be cut off: whoever asked asks again.
    server.shutdown_token().cancel();
}

fn socket(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    if address.is_ipv4() {
        socket.set_freebind_v4(true)?;
    } else {
        socket.set_freebind_v6(true)?;
    }
    Ok(socket)
}

fn udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = socket(address, Type::DGRAM, Protocol::UDP)?;
    socket.set_reuse_port(true)?;
    // A smaller one will do.
    let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER);
    socket.bind(&address.into())?;
    UdpSocket::from_std(socket.into())
}

fn tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket(address, Type::STREAM, Protocol::TCP)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

struct Handler {
    zone: Arc<ArcSwap<Zone>>,
    forwarder: Forwarder,
    limiter: Arc<DefaultKeyedRateLimiter<IpAddr>>,
    observer: Arc<dyn Observer>,
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
    async fn reply(&self, request: &Request) -> (RecordType, Reply) {
        let info = match request.request_info() {
            Ok(info) if request.metadata.op_code == OpCode::Query => info,
            Ok(_) => return (RecordType::ZERO, Reply::refusal(ResponseCode::NotImp)),
            Err(_) => return (RecordType::ZERO, Reply::refusal(ResponseCode::FormErr)),
        };
        let (name, kind) = (info.query.name(), info.query.query_type());
        if self.limiter.check_key(&request.src().ip()).is_err() {
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
        if let Some(cached) = self.forwarder.cached(name, kind) {
            return (kind, Reply::forwarded(cached, Source::Cached));
        }
        let reply = match self.forwarder.ask(name, kind).await {
            Ok(answer) => Reply::forwarded(answer, Source::Forwarded),
            Err(failure) => {
                self.observer.upstream_failed(failure.label());
                Reply { source: Source::Forwarded, ..Reply::refusal(ResponseCode::ServFail) }
            }
        };
        (kind, reply)
    }
}

#[async_trait::async_trait]
impl RequestHandler for Handler {
    async fn handle_request<R: ResponseHandler, T: Time>(&self, request: &Request, mut handle: R) -> ResponseInfo {
        let began = Instant::now();
        let (kind, reply) = self.reply(request).await;
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.response_code = reply.code;
        metadata.authoritative = reply.authoritative;
        metadata.recursion_available = true;
        let mut builder = MessageResponseBuilder::from_message_request(request);
        let mut edns = Edns::new();
        if let Some(asked) = &request.edns {
            // As much as the client takes, and no more than the way does.
            edns.set_max_payload(asked.max_payload().clamp(512, MAX_UDP));
            builder.edns(&edns);
        }
        let message = builder.build(metadata, &reply.records, [], &reply.soa, &reply.additional);
        let sent = handle.send_response(message).await;
        self.observer.answered(kind, reply.code, reply.source, began.elapsed());
        sent.unwrap_or_else(|error| {
            tracing::debug!(%error, "a DNS answer could not be sent");
            metadata.response_code = ResponseCode::ServFail;
            Header { metadata, counts: HeaderCounts::default() }.into()
        })
    }
}
