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
    sync::{Semaphore, mpsc},
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
}

impl Connected for Incoming {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Incoming {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
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
/// Such errors of accept, as too many open files, do not go away at once.
const PAUSE: Duration = Duration::from_millis(50);

/// Connections to a manager, each when it is known who is at the other end. One whose certificate is not of the cluster, or has
/// run out, is not among them.
#[must_use]
pub fn incoming(listener: TcpListener, credentials: Credentials) -> ReceiverStream<io::Result<Incoming>> {
    let (sender, receiver) = mpsc::channel(16);
    tokio::spawn(async move {
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
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
            let (sender, credentials) = (sender.clone(), credentials.clone());
            tokio::spawn(async move {
                let greeted = tokio::time::timeout(HANDSHAKE_TIMEOUT, greet(stream, address, &credentials)).await;
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

async fn greet(stream: TcpStream, address: SocketAddr, credentials: &Credentials) -> io::Result<Incoming> {
    stream.set_nodelay(true)?;
    let config = credentials.server().ok_or_else(|| io::Error::other("only managers are called"))?;
    let stream = TlsAcceptor::from(config).accept(stream).await?;
    let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let identity = shown.map(|certificate| tls::read(certificate)).transpose().map_err(io::Error::other)?;
    let identity = identity.map(|(identity, ..)| identity);
    Ok(Incoming { stream, peer: Peer { address, identity } })
}
