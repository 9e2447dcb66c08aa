use tonic::{Request, Response, Status};
use warren_proto::v1::{self, cluster_server};
use warren_telemetry::build;

use super::Context;

#[derive(Clone, Debug)]
pub(super) struct Cluster(pub(super) Context);

#[tonic::async_trait]
impl cluster_server::Cluster for Cluster {
    async fn get_cluster_info(
        &self,
        _request: Request<v1::GetClusterInfoRequest>,
    ) -> Result<Response<v1::GetClusterInfoResponse>, Status> {
        // Answered by any manager from what it knows: it is what one looks at when there is no quorum.
        let status = self.0.store.raft().status();
        let state = self.0.store.view();
        Ok(Response::new(v1::GetClusterInfoResponse {
            cluster_id: state.cluster().map(|cluster| cluster.id.clone()).unwrap_or_default(),
            manager_id: status.id,
            leader_id: status.leader.unwrap_or(0),
            term: status.term,
            last_log_index: status.last_log_index,
            applied_index: status.applied_index,
            managers: status
                .members
                .into_iter()
                .map(|member| v1::Manager { id: member.id, address: member.address, voter: member.voter })
                .collect(),
            version: build::LONG_VERSION.to_owned(),
        }))
    }
}
