//! Being called.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use warren_connections::{Connections, at_most, client};

use crate::{Credentials, Identity, tls};

/// Who is at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// From where.
    pub address: SocketAddr,
    /// Who, if they have shown a certificate of the cluster.
    pub identity: Option<Identity>,
}

/// A connection whose other end is known.
pub struct Incoming {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    /// When it is over, whatever the other end wants.
    over: Over,
    /// What it may send, if it is a visitor's.
    budget: Option<(Arc<DefaultKeyedRateLimiter<IpAddr>>, IpAddr)>,
}

type Over = Pin<Box<dyn Future<Output = ()> + Send>>;

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Incoming").field(&self.peer).finish()
    }
}

impl Incoming {
    /// Also for one who does not read, and so keeps the connection busy with writing.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.over.as_mut().poll(cx) {
            Poll::Ready(()) => {
                self.over = Box::pin(std::future::ready(()));
                Err(io::Error::new(io::ErrorKind::ConnectionAborted, "it has been open for long enough"))
            }
            Poll::Pending => Ok(()),
        }
    }
}

#[cfg(test)]
impl Incoming {
    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }
}

impl Connected for Incoming {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Incoming {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        let read = u32::try_from(buf.filled().len() - before).ok().and_then(NonZeroU32::new);
        if let (Some((budget, client)), Some(read)) = (&self.budget, read)
            && !matches!(budget.check_key_n(client, read), Ok(Ok(())))
        {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, "it has sent too much")));
        }
        polled
    }
}

impl AsyncWrite for Incoming {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check(cx)?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// Whoever has not said hello in this time is not listened to any longer.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at a time in all, and with one client, who are not known yet. One takes milliseconds: the oldest make room for new ones.
const HANDSHAKES: usize = 512;
const HANDSHAKES_OF_ONE: usize = 128;
/// Who is being answered when an authority is forgotten has so long to hear the rest of it.
const FORGOTTEN: Duration = Duration::from_secs(2);
/// Between looks at the clock.
const CLOCK_LOOK: Duration = Duration::from_secs(600);
/// Connections at a time of those who show no certificate, who want to join or ask for health: in all, of one client, and how long each
/// may be. Members do not count among them.
const VISITORS: usize = 128;
pub(crate) const VISITORS_OF_ONE: usize = 32;
pub(crate) const VISIT: Duration = Duration::from_secs(60);
/// Connections at a time of one member: an agent has two, a manager four with each other, an operator one for each command.
pub(crate) const OF_ONE_MEMBER: usize = 256;
/// Whether somebody silent is still there is looked at after this time.
const SILENCE: Duration = Duration::from_secs(60);
/// Bytes that the visitors of one client may send at once, and in a second after that, however often they connect. A request to join has
/// 64 KiB at the most; more would be a flood of frames, each of which takes time to answer.
const VISITORS_BURST: NonZeroU32 = NonZeroU32::new(192 << 10).unwrap();
const VISITORS_RATE: NonZeroU32 = NonZeroU32::new(16 << 10).unwrap();
/// So many clients are remembered before those that have been quiet are forgotten.
const REMEMBERED: usize = 1024;

/// Connections to a manager, each when it is known who is at the other end. One whose certificate is not of the cluster, or has
/// run out, is not among them.
#[must_use]
pub fn incoming(listener: TcpListener, credentials: Credentials) -> ReceiverStream<io::Result<Incoming>> {
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        let handshakes = Connections::new(at_most(HANDSHAKES), HANDSHAKES_OF_ONE);
        let known = Known {
            visitors: Connections::new(at_most(VISITORS), VISITORS_OF_ONE),
            budget: Arc::new(RateLimiter::keyed(Quota::per_second(VISITORS_RATE).allow_burst(VISITORS_BURST))),
            members: Connections::new(usize::MAX, OF_ONE_MEMBER),
        };
        while !sender.is_closed() {
            let (stream, address, mut turn) = tokio::select! {
                accepted = handshakes.accept(&listener) => accepted,
                () = sender.closed() => return,
            };
            let (sender, credentials, known) = (sender.clone(), credentials.clone(), known.clone());
            tokio::spawn(async move {
                let greeted = tokio::select! {
                    greeted = tokio::time::timeout(HANDSHAKE_TIMEOUT, greet(stream, address, &credentials, &known)) => greeted,
                    () = turn.given_up() => Ok(Err(io::Error::other("it made room for others"))),
                };
                drop(turn);
                match greeted {
                    Ok(Ok(incoming)) => drop(sender.send(Ok(incoming)).await),
                    Ok(Err(error)) => tracing::debug!(%address, %error, "a caller was not let in"),
                    Err(_) => tracing::debug!(%address, "a caller did not say hello in time"),
                }
            });
        }
    });
    ReceiverStream::new(receiver)
}

/// The connections with those whose handshake is done.
#[derive(Clone)]
struct Known {
    visitors: Connections<IpAddr>,
    budget: Arc<DefaultKeyedRateLimiter<IpAddr>>,
    members: Connections<Identity>,
}

async fn greet(
    stream: TcpStream,
    address: SocketAddr,
    credentials: &Credentials,
    known: &Known,
) -> io::Result<Incoming> {
    stream.set_nodelay(true)?;
    // Else a machine that has gone without a word keeps its connections for ever.
    SockRef::from(&stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(SILENCE))?;
    let config = credentials.server().ok_or_else(|| io::Error::other("only managers are called"))?;
    let stream = TlsAcceptor::from(config).accept(stream).await?;
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let Some((identity, _, not_after)) = shown.map(|own| tls::read(own)).transpose().map_err(io::Error::other)? else {
        let mut place = known.visitors.enter(client(address.ip()));
        // From now on, and not from when it is first waited for.
        let visit = tokio::time::sleep(VISIT);
        let over = Box::pin(async move {
            tokio::select! {
                () = visit => {}
                () = place.given_up() => {}
            }
        });
        if known.budget.len() > REMEMBERED {
            known.budget.retain_recent();
        }
        let budget = Some((Arc::clone(&known.budget), client(address.ip())));
        return Ok(Incoming { stream, peer: Peer { address, identity: None }, over, budget });
    };
    let credentials = credentials.clone();
    let mut place = known.members.enter(identity.clone());
    let over = Box::pin(async move {
        tokio::select! {
            () = place.given_up() => {}
            () = run_out(not_after) => {}
            // Who signed it may not be believed any more; whoever is of the cluster still connects anew.
            () = async {
                credentials.forget_one().await;
                tokio::time::sleep(FORGOTTEN).await;
            } => {}
        }
    });
    Ok(Incoming { stream, peer: Peer { address, identity: Some(identity) }, over, budget: None })
}

/// Returns when a certificate that is valid until then, in seconds since the epoch, is not any more; clocks may be set meanwhile.
async fn run_out(not_after: i64) {
    let end = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(not_after).unwrap_or(0));
    while let Ok(left) = end.duration_since(SystemTime::now()) {
        tokio::time::sleep(left.clamp(Duration::from_secs(1), CLOCK_LOOK)).await;
    }
}
