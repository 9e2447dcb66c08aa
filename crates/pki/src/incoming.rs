//! Being called.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Sleep,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

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
#[derive(Debug)]
pub struct Incoming {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    /// Of one who has shown no certificate.
    visit: Option<Visit>,
}

/// A stay that is limited in time, and counts among those that there are.
#[derive(Debug)]
struct Visit {
    ends: Pin<Box<Sleep>>,
    _place: OwnedSemaphorePermit,
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
        if self.visit.as_mut().is_some_and(|visit| visit.ends.as_mut().poll(cx).is_ready()) {
            // As if the other end had closed it.
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Incoming {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

/// Whoever has not said hello in this time is not listened to any longer.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at a time; others wait to be accepted.
const HANDSHAKES: usize = 256;
/// Connections at a time of those who show no certificate, who want to join or ask for health, and how long each may be: members are not
/// to be kept out by whoever can reach the port.
pub(crate) const VISITORS: usize = 128;
pub(crate) const VISIT: Duration = Duration::from_secs(60);
/// Such errors of accept, as too many open files, do not go away at once.
const PAUSE: Duration = Duration::from_millis(50);

/// Connections to a manager, each when it is known who is at the other end. One whose certificate is not of the cluster, or has
/// run out, is not among them.
#[must_use]
pub fn incoming(listener: TcpListener, credentials: Credentials) -> ReceiverStream<io::Result<Incoming>> {
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
        let visitors = Arc::new(Semaphore::new(VISITORS));
        while !sender.is_closed() {
            let Ok(turn) = Arc::clone(&handshakes).acquire_owned().await else { return };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let (sender, credentials, visitors) = (sender.clone(), credentials.clone(), Arc::clone(&visitors));
            tokio::spawn(async move {
                let greeted =
                    tokio::time::timeout(HANDSHAKE_TIMEOUT, greet(stream, address, &credentials, visitors)).await;
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

async fn greet(
    stream: TcpStream,
    address: SocketAddr,
    credentials: &Credentials,
    visitors: Arc<Semaphore>,
) -> io::Result<Incoming> {
    stream.set_nodelay(true)?;
    let config = credentials.server().ok_or_else(|| io::Error::other("only managers are called"))?;
    let stream = TlsAcceptor::from(config).accept(stream).await?;
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let identity = shown.map(|certificate| tls::read(certificate)).transpose().map_err(io::Error::other)?;
    let identity = identity.map(|(identity, ..)| identity);
    let visit = if identity.is_some() {
        None
    } else {
        let place =
            visitors.try_acquire_owned().map_err(|_| io::Error::other("too many callers without a certificate"))?;
        Some(Visit { ends: Box::pin(tokio::time::sleep(VISIT)), _place: place })
    };
    Ok(Incoming { stream, peer: Peer { address, identity }, visit })
}
