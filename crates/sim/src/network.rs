//! Wires: consensus's messages, and gRPC, over turmoil's TCP.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tonic::transport::{Channel, Endpoint, Uri, server::Connected};
use turmoil::net::{TcpListener, TcpStream};
use warren_raft::{Node, Transport, TransportError};

/// Where managers hear each other, and everybody else.
const RAFT_PORT: u16 = 7444;
const API_PORT: u16 = 7443;

/// Consensus's messages, each on a connection of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wires;

async fn exchange(address: &str, message: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect((address, RAFT_PORT)).await?;
    write_frame(&mut stream, message).await?;
    read_frame(&mut stream).await
}

async fn write_frame(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_u32(bytes.len() as u32).await?;
    stream.write_all(bytes).await
}

async fn read_frame(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let len = stream.read_u32().await?;
    let mut bytes = vec![0; len as usize];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

impl Transport for Wires {
    fn call<'a>(
        &'a self,
        address: &'a str,
        message: Vec<u8>,
        patience: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, TransportError>> {
        Box::pin(async move {
            let answer = tokio::time::timeout(patience, exchange(address, &message)).await;
            let answer = answer.map_err(|_| TransportError("no answer".to_owned()))?;
            answer.map_err(|error| TransportError(error.to_string()))
        })
    }
}

/// Answers other managers.
pub(crate) async fn serve_raft(raft: Node) -> io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", RAFT_PORT)).await?;
    loop {
        let (mut stream, _) = listener.accept().await?;
        let raft = raft.clone();
        tokio::spawn(async move {
            let Ok(message) = read_frame(&mut stream).await else { return };
            if let Ok(answer) = raft.handle(&message).await {
                // Who asked may be gone.
                let _ = write_frame(&mut stream, &answer).await;
            }
        });
    }
}

/// A connection as tonic wants it.
#[derive(Debug)]
pub(crate) struct Wire(TcpStream);

impl Connected for Wire {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Connections to a manager's API.
pub(crate) async fn incoming() -> io::Result<tokio_stream::wrappers::ReceiverStream<io::Result<Wire>>> {
    let listener = TcpListener::bind(("0.0.0.0", API_PORT)).await?;
    let (sender, receiver) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            if sender.send(Ok(Wire(stream))).await.is_err() {
                return;
            }
        }
    });
    Ok(tokio_stream::wrappers::ReceiverStream::new(receiver))
}

/// How long connecting may take, and how long a peer may be silent before it is asked and before it is given up.
const PATIENCE: Duration = Duration::from_secs(1);

/// Connects to a manager's API.
pub(crate) async fn connect(manager: &str) -> Result<Channel, tonic::transport::Error> {
    let address = manager.to_owned();
    let endpoint = Endpoint::from_shared(format!("http://{manager}:{API_PORT}"))?
        .connect_timeout(PATIENCE)
        .http2_keep_alive_interval(PATIENCE)
        .keep_alive_timeout(PATIENCE)
        .keep_alive_while_idle(true);
    let connector = tower::service_fn(move |_: Uri| {
        let address = address.clone();
        async move { TcpStream::connect((address.as_str(), API_PORT)).await.map(TokioIo::new) }
    });
    endpoint.connect_with_connector(connector).await
}
