use std::{collections::HashSet, pin::Pin, sync::Arc};

use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};
use warren_proto::v1::{self, logs_server};

use super::{Context, Error, lookup};
use crate::{
    dispatcher::Relay,
    ids::{ContainerId, NodeId},
    state::{Container, ContainerState, State},
    validate::Invalid,
};

#[derive(Clone, Debug)]
pub(super) struct Logs(pub(super) Context, pub(super) Relay);

/// Lines on their way to whoever asked.
const AHEAD: usize = 256;

/// Whose lines are wanted.
enum Whose {
    Container(ContainerId),
    Service(crate::ids::ServiceId),
}

type Sender = mpsc::Sender<Result<v1::StreamLogsResponse, Status>>;

impl Logs {
    fn containers(whose: &Whose, state: &State) -> Vec<Arc<Container>> {
        // What has not started has written nothing.
        let started = |container: &&Arc<Container>| container.status.state >= ContainerState::Starting;
        match whose {
            Whose::Container(id) => state.container(id).into_iter().filter(started).cloned().collect(),
            Whose::Service(id) => state.containers_of(id).filter(started).cloned().collect(),
        }
    }

    /// Passes one container's lines on until they end.
    async fn pass(self, container: Arc<Container>, node: NodeId, request: v1::StreamLogsRequest, to: Sender) {
        let hostname =
            self.0.store.view().node(&node).map(|node| node.description.hostname.clone()).unwrap_or_default();
        let wanted = v1::LogRequest {
            id: format!("{:032x}", self.0.environment.random()),
            container_id: container.id.to_string(),
            follow: request.follow,
            tail: request.tail,
            since: request.since,
        };
        let Some(mut lines) = self.1.logs(&node, wanted).await else {
            let message = format!("node {hostname} has no session: what {} wrote is not to be had", container.id);
            let _ = to.send(Err(Status::unavailable(message))).await;
            return;
        };
        loop {
            let line = tokio::select! {
                line = lines.recv() => match line {
                    Some(Ok(line)) => line,
                    Some(Err(status)) => {
                        let _ = to.send(Err(status)).await;
                        return;
                    }
                    None => return,
                },
                () = to.closed() => return,
            };
            let response = v1::StreamLogsResponse {
                container_id: container.id.to_string(),
                service_name: container.service_name.clone(),
                slot: container.slot,
                hostname: hostname.clone(),
                line: Some(line),
            };
            if to.send(Ok(response)).await.is_err() {
                return;
            }
        }
    }

    /// Passes on what all of them write. Followers hear of containers that come later, too.
    async fn run(self, whose: Whose, request: v1::StreamLogsRequest, to: Sender) {
        let mut views = self.0.store.watch();
        let mut begun = HashSet::new();
        loop {
            let state = views.borrow_and_update().clone();
            for container in Self::containers(&whose, &state) {
                let Some(node) = container.node.clone().filter(|_| begun.insert(container.id.clone())) else {
                    continue;
                };
                // Of one that comes later, everything.
                tokio::spawn(self.clone().pass(container, node, request.clone(), to.clone()));
            }
            let over = match &whose {
                Whose::Container(_) => !begun.is_empty(),
                Whose::Service(id) => state.service(id).is_none(),
            };
            if !request.follow || over {
                return;
            }
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                () = to.closed() => return,
            }
        }
    }
}

#[tonic::async_trait]
impl logs_server::Logs for Logs {
    type StreamLogsStream = Pin<Box<dyn Stream<Item = Result<v1::StreamLogsResponse, Status>> + Send>>;

    async fn stream_logs(
        &self,
        request: Request<v1::StreamLogsRequest>,
    ) -> Result<Response<Self::StreamLogsStream>, Status> {
        let request = request.into_inner();
        let state = self.0.store.read().await.map_err(super::status)?;
        let whose = match (request.service.as_str(), request.container.as_str()) {
            ("", "") => {
                let why = "or container is missing: one of the two is to be given";
                return Err(Error::from(Invalid::new("service", why)).into());
            }
            ("", container) => Whose::Container(lookup::container(&state, container)?.id.clone()),
            (service, _) => Whose::Service(lookup::service(&state, service)?.id.clone()),
        };
        let (sender, receiver) = mpsc::channel(AHEAD);
        tokio::spawn(self.clone().run(whose, request, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
