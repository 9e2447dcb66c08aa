use std::{collections::HashSet, pin::Pin, sync::Arc, time::Duration};

use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};
use warren_proto::v1::{self, logs_server};

use super::{Context, Error, lookup};
use crate::{
    agents::Relay,
    ids::{ContainerId, NodeId},
    messages::validate::Invalid,
    state::{Container, ContainerState, Service, State},
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

    /// Passes one container's lines on until they end. Of a service that is followed, a container whose node goes away, as with its
    /// agent's restart, goes on where it was once the node is back.
    async fn pass(
        self,
        container: Arc<Container>,
        node: NodeId,
        request: v1::StreamLogsRequest,
        to: Sender,
    ) -> Result<(), Status> {
        let wanted = v1::LogRequest {
            container_id: container.id.to_string(),
            follow: request.follow,
            tail: request.tail,
            since: request.since,
            ..Default::default()
        };
        let about = v1::StreamLogsResponse {
            container_id: container.id.to_string(),
            service_name: container.service_name.clone(),
            slot: container.slot,
            ..Default::default()
        };
        /// Between attempts.
        const AGAIN: Duration = Duration::from_secs(1);
        let is_service = !request.service.is_empty();
        let mut wanted = wanted;
        loop {
            let mut last = None;
            let passed = self.pass_lines(&node, wanted.clone(), about.clone(), &to, &mut last).await;
            let runs = || {
                let state = self.0.store.view();
                state.container(&container.id).is_some_and(|known| !known.status.state.is_terminal())
            };
            if request.follow && is_service && !matches!(passed, Some(Ok(()))) && !to.is_closed() && runs() {
                if let Some(mut since) = last {
                    // What comes after the last line that was passed on.
                    since.nanos += 1;
                    if since.nanos == 1_000_000_000 {
                        (since.seconds, since.nanos) = (since.seconds + 1, 0);
                    }
                    (wanted.since, wanted.tail) = (Some(since), None);
                }
                tokio::time::sleep(AGAIN).await;
                continue;
            }
            return passed.unwrap_or_else(|| {
                let node = self.hostname(&node);
                let why = format!("node {node} has no session: the logs of container {} are there", container.id);
                Err(Status::unavailable(why))
            });
        }
    }

    /// Passes on what a node keeps of a service's containers that the cluster does not know any more. A node without a session
    /// has nothing to say.
    async fn pass_kept(
        self,
        service: Arc<Service>,
        node: NodeId,
        request: v1::StreamLogsRequest,
        to: Sender,
    ) -> Result<(), Status> {
        let known = self.0.store.view();
        let wanted = v1::LogRequest {
            service_id: service.id.to_string(),
            except: known.containers_of(&service.id).map(|container| container.id.to_string()).collect(),
            tail: request.tail,
            since: request.since,
            ..Default::default()
        };
        let about = v1::StreamLogsResponse { service_name: service.spec.name.clone(), ..Default::default() };
        self.pass_lines(&node, wanted, about, &to, &mut None).await.unwrap_or(Ok(()))
    }

    fn hostname(&self, node: &NodeId) -> String {
        self.0.store.view().node(node).map(|node| node.description.hostname.clone()).unwrap_or_default()
    }

    /// Passes lines on until they end, with what is known about them; `None` when the node has no session. Notes when the last of
    /// them was written.
    async fn pass_lines(
        &self,
        node: &NodeId,
        wanted: v1::LogRequest,
        about: v1::StreamLogsResponse,
        to: &Sender,
        last: &mut Option<pbjson_types::Timestamp>,
    ) -> Option<Result<(), Status>> {
        let wanted = v1::LogRequest { id: format!("{:032x}", self.0.environment.random()), ..wanted };
        let hostname = self.hostname(node);
        let mut lines = self.1.logs(node, wanted).await?;
        loop {
            let line = tokio::select! {
                line = lines.recv() => match line {
                    Some(Ok(line)) => line,
                    Some(Err(status)) => return Some(Err(status)),
                    None => return Some(Ok(())),
                },
                () = to.closed() => return Some(Ok(())),
            };
            let mut response = v1::StreamLogsResponse { hostname: hostname.clone(), line: line.line, ..about.clone() };
            if response.container_id.is_empty() {
                (response.container_id, response.slot) = (line.container_id, line.slot);
            }
            let at = response.line.as_ref().and_then(|line| line.time);
            if to.send(Ok(response)).await.is_err() {
                return Some(Ok(()));
            }
            *last = at.or(*last);
        }
    }

    /// Passes on what all of them write. Followers hear of containers that come later, too. What cannot be had of one is said at
    /// the end: it takes nothing from the others.
    async fn run(self, whose: Whose, mut request: v1::StreamLogsRequest, to: Sender) {
        let mut views = self.0.store.watch();
        let mut begun = HashSet::new();
        let mut passing = JoinSet::new();
        if let Whose::Service(id) = &whose {
            let state = views.borrow().clone();
            for (node, service) in state.nodes().filter_map(|node| Some((node, state.service(id)?))) {
                let (service, node) = (Arc::clone(service), node.id.clone());
                passing.spawn(self.clone().pass_kept(service, node, request.clone(), to.clone()));
            }
        }
        loop {
            let state = views.borrow_and_update().clone();
            for container in Self::containers(&whose, &state) {
                let Some(node) = container.node.clone().filter(|_| begun.insert(container.id.clone())) else {
                    continue;
                };
                passing.spawn(self.clone().pass(container, node, request.clone(), to.clone()));
            }
            // Of one that comes later, everything.
            request.tail = None;
            let over = match &whose {
                Whose::Container(_) => !begun.is_empty(),
                Whose::Service(id) => state.service(id).is_none(),
            };
            if !request.follow || over {
                break;
            }
            tokio::select! {
                changed = views.changed() => if changed.is_err() { break },
                () = to.closed() => return,
            }
        }
        let mut failed = None;
        while let Some(passed) = passing.join_next().await {
            failed = failed.or(passed.ok().and_then(Result::err));
        }
        if let Some(status) = failed {
            // Whoever asked has gone, or hears it.
            let _ = to.send(Err(status)).await;
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
