use std::{collections::HashSet, pin::Pin, time::Duration};

use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};
use warren_proto::v1::{self, stats_server};

use super::{Context, Error, lookup};
use crate::{
    agents::Relay,
    ids::{ContainerId, NodeId, ServiceId},
    messages::{convert, validate::Invalid},
    state::State,
};

#[derive(Clone, Debug)]
pub(super) struct Stats(pub(super) Context, pub(super) Relay);

/// Messages on their way to whoever asked.
const AHEAD: usize = 16;
const DEFAULT_INTERVAL: Duration = Duration::from_secs(1);
const MIN_INTERVAL: Duration = Duration::from_millis(100);
const MAX_INTERVAL: Duration = Duration::from_secs(3600);
/// How long a node that does not answer is left alone.
const AGAIN: Duration = Duration::from_secs(2);

/// What is looked at.
#[derive(Clone, Debug, Default)]
struct Filter {
    service: Option<ServiceId>,
    container: Option<ContainerId>,
    node: Option<NodeId>,
}

impl Filter {
    fn new(state: &State, request: &v1::StreamStatsRequest) -> Result<Self, Error> {
        let mut filter = Self::default();
        if !request.service.is_empty() {
            filter.service = Some(lookup::service(state, &request.service)?.id.clone());
        }
        if !request.container.is_empty() {
            let container = lookup::container(state, &request.container)?;
            let Some(node) = container.node.clone() else {
                return Err(Error::Precondition(format!("container {} is not on a node yet", container.id)));
            };
            (filter.container, filter.node) = (Some(container.id.clone()), Some(node));
        }
        if !request.node.is_empty() {
            let node = lookup::node(state, &request.node)?.id.clone();
            if filter.node.as_ref().is_some_and(|other| *other != node) {
                let why = "the container is on another node";
                return Err(Invalid::new("node", why).into());
            }
            filter.node = Some(node);
        }
        Ok(filter)
    }

    /// Adds what the agent does not know, and leaves out what is not asked for.
    fn complete(&self, state: &State, node: &NodeId, mut stats: v1::StreamStatsResponse) -> v1::StreamStatsResponse {
        if let Some(stats) = &mut stats.node {
            stats.node_id = node.to_string();
            stats.hostname = state.node(node).map(|node| node.description.hostname.clone()).unwrap_or_default();
        }
        stats.containers.retain_mut(|stats| {
            let Some(container) = state.container(&ContainerId::from(stats.container_id.clone())) else { return false };
            stats.service_name.clone_from(&container.service_name);
            stats.slot = container.slot;
            self.service.as_ref().is_none_or(|service| *service == container.service)
                && self.container.as_ref().is_none_or(|wanted| *wanted == container.id)
        });
        stats
    }
}

fn interval(request: &v1::StreamStatsRequest) -> Result<Duration, Invalid> {
    let interval = request.interval.as_ref().map_or(DEFAULT_INTERVAL, convert::duration);
    if (MIN_INTERVAL..=MAX_INTERVAL).contains(&interval) {
        Ok(interval)
    } else {
        Err(Invalid::new("interval", "it is 100 ms to 1 h"))
    }
}

type Sender = mpsc::Sender<Result<v1::StreamStatsResponse, Status>>;

impl Stats {
    /// Passes on what one node says, also after its agent has been away.
    async fn pass(self, node: NodeId, filter: Filter, interval: Duration, to: Sender) {
        while !to.is_closed() && self.0.store.view().node(&node).is_some() {
            let id = format!("{:032x}", self.0.environment.random());
            let wish = v1::StatsWish { id, interval: Some(convert::wire_duration(interval)) };
            if let Some(mut answers) = self.1.stats(&node, wish).await {
                loop {
                    tokio::select! {
                        () = to.closed() => return,
                        stats = answers.recv() => {
                            let Some(Ok(stats)) = stats else { break };
                            let stats = filter.complete(&self.0.store.view(), &node, stats);
                            if to.send(Ok(stats)).await.is_err() {
                                return;
                            }
                        }
                    }
                }
            }
            tokio::select! {
                () = to.closed() => return,
                () = tokio::time::sleep(AGAIN) => {}
            }
        }
    }

    /// Asks every node, those that come later too.
    async fn run(self, filter: Filter, interval: Duration, to: Sender) {
        let mut views = self.0.store.watch();
        let mut asked = HashSet::new();
        loop {
            let state = views.borrow_and_update().clone();
            asked.retain(|node| state.node(node).is_some());
            for node in state.nodes().map(|node| &node.id) {
                let wanted = filter.node.as_ref().is_none_or(|wanted| wanted == node);
                if wanted && asked.insert(node.clone()) {
                    tokio::spawn(self.clone().pass(node.clone(), filter.clone(), interval, to.clone()));
                }
            }
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                () = to.closed() => return,
            }
        }
    }
}

#[tonic::async_trait]
impl stats_server::Stats for Stats {
    type StreamStatsStream = Pin<Box<dyn Stream<Item = Result<v1::StreamStatsResponse, Status>> + Send>>;

    async fn stream_stats(
        &self,
        request: Request<v1::StreamStatsRequest>,
    ) -> Result<Response<Self::StreamStatsStream>, Status> {
        let request = request.into_inner();
        let interval = interval(&request).map_err(Error::from)?;
        let state = self.0.store.read().await.map_err(super::status)?;
        let filter = Filter::new(&state, &request)?;
        let (sender, receiver) = mpsc::channel(AHEAD);
        tokio::spawn(self.clone().run(filter, interval, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
