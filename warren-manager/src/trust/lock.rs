//! A manager whose key of secrets is locked: it waits at its socket for the unlock key, and answers nothing else.

use std::{
    io,
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll},
};

use http::{Request, Response};
use tokio::{net::UnixListener, sync::mpsc};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Status, body::Body, service::Routes, transport::Server};
use tower::{Layer, Service};
use warren_proto::v1::{
    self,
    lock_server::{Lock, LockServer},
};

use crate::trust::vault::{self, UnlockKey, Vault};

/// How long answers may take when the socket is no longer served.
const ANSWERED: std::time::Duration = std::time::Duration::from_secs(2);

#[derive(Clone, Debug)]
struct Locked {
    directory: PathBuf,
    unlocked: mpsc::Sender<Vault>,
}

#[tonic::async_trait]
impl Lock for Locked {
    async fn unlock(
        &self,
        request: tonic::Request<v1::UnlockRequest>,
    ) -> Result<tonic::Response<v1::UnlockResponse>, Status> {
        let key: UnlockKey = request.into_inner().unlock_key.parse().map_err(refused)?;
        let vault = Vault::unlock(&self.directory, &key).map_err(refused)?;
        // Somebody else may have been first.
        let _ = self.unlocked.try_send(vault);
        Ok(tonic::Response::new(v1::UnlockResponse {}))
    }
}

fn refused(error: vault::Error) -> Status {
    match error {
        vault::Error::UnlockKey => Status::permission_denied(error.to_string()),
        error => Status::internal(error.to_string()),
    }
}

/// Says of every call that it is not answered, and why, but for those of one service.
#[derive(Clone, Copy, Debug)]
struct Refuse {
    why: &'static str,
    but: Option<&'static str>,
}

#[derive(Clone, Debug)]
struct Refusing<S>(Refuse, S);

const ONLY_UNLOCK: Refuse =
    Refuse { why: "this manager is locked: `warren cluster unlock` opens it", but: Some("/warren.v1.Lock/") };

impl<S> Layer<S> for Refuse {
    type Service = Refusing<S>;

    fn layer(&self, inner: S) -> Refusing<S> {
        Refusing(*self, inner)
    }
}

impl<S> Service<Request<Body>> for Refusing<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.1.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if self.0.but.is_some_and(|but| request.uri().path().starts_with(but)) {
            return Box::pin(self.1.call(request));
        }
        let refused = Status::unavailable(self.0.why);
        Box::pin(async move { Ok(refused.into_http()) })
    }
}

/// Refuses every call at a socket, until `end`.
///
/// # Errors
///
/// When the socket cannot be served.
pub(crate) async fn refuse(
    socket: UnixListener,
    why: &'static str,
    end: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    let nothing = Routes::builder().routes();
    let server = Server::builder().layer(Refuse { why, but: None }).add_routes(nothing);
    server.serve_with_incoming_shutdown(UnixListenerStream::new(socket), end).await
}

/// Waits for the unlock key of the manager of `directory`.
///
/// # Errors
///
/// When the socket cannot be served.
pub(crate) async fn wait(directory: &Path, socket: UnixListener) -> io::Result<Vault> {
    let (unlocked, mut received) = mpsc::channel(1);
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let lock = Locked { directory: directory.to_owned(), unlocked };
    let served = Server::builder().layer(ONLY_UNLOCK).add_service(LockServer::new(lock)).serve_with_incoming_shutdown(
        UnixListenerStream::new(socket),
        async {
            // Also when nobody waits any more.
            let _ = ended.await;
        },
    );
    tokio::pin!(served);
    let vault = tokio::select! {
        vault = received.recv() => vault,
        served = &mut served => return Err(served.map_or_else(io::Error::other, |()| io::ErrorKind::BrokenPipe.into())),
    };
    drop(end);
    // Whoever unlocked it is answered; who says nothing is not waited for.
    if let Ok(served) = tokio::time::timeout(ANSWERED, served).await {
        served.map_err(io::Error::other)?;
    }
    vault.ok_or_else(|| io::ErrorKind::BrokenPipe.into())
}
