use tonic::{Request, Response, Status};
use warren_proto::v1::{self, raft_server};
use warren_raft::Node;

/// Consensus's messages from other managers.
#[derive(Clone, Debug)]
pub(super) struct Raft(pub(super) Node);

#[tonic::async_trait]
impl raft_server::Raft for Raft {
    async fn exchange(&self, request: Request<v1::RaftMessage>) -> Result<Response<v1::RaftMessage>, Status> {
        let answer = self.0.handle(&request.into_inner().payload).await;
        let answer = answer.map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Response::new(v1::RaftMessage { payload: answer }))
    }
}
