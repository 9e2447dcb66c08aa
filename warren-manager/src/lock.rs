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
use tonic::{Status, body::Body, transport::Server};
use tower::{Layer, Service};
use warren_proto::v1::{
    self,
    lock_server::{Lock, LockServer},
};

use crate::vault::{self, UnlockKey, Vault};

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

/// Says of every other call that it is not answered, and why.
#[derive(Clone, Copy, Debug)]
struct OnlyUnlock;

#[derive(Clone, Debug)]
struct Refusing<S>(S);

impl<S> Layer<S> for OnlyUnlock {
    type Service = Refusing<S>;

    fn layer(&self, inner: S) -> Refusing<S> {
        Refusing(inner)
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
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if request.uri().path().starts_with("/warren.v1.Lock/") {
            return Box::pin(self.0.call(request));
        }
        let locked = Status::unavailable("this manager is locked: `warren cluster unlock` opens it");
        Box::pin(async move { Ok(locked.into_http()) })
    }
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
    let served = Server::builder().layer(OnlyUnlock).add_service(LockServer::new(lock)).serve_with_incoming_shutdown(
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
    // Whoever unlocked it is answered.
    served.await.map_err(io::Error::other)?;
    vault.ok_or_else(|| io::ErrorKind::BrokenPipe.into())
}
