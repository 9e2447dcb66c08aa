use tonic::{Request, Response, Status};
use warren_proto::v1::{self, lock_server};

/// The lock of a manager that is open.
#[derive(Clone, Copy, Debug)]
pub(super) struct Open;

#[tonic::async_trait]
impl lock_server::Lock for Open {
    async fn unlock(&self, _request: Request<v1::UnlockRequest>) -> Result<Response<v1::UnlockResponse>, Status> {
        Err(Status::failed_precondition("this manager is not locked"))
    }
}
