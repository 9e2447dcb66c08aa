use std::{pin::Pin, sync::Arc};

use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};
use warren_proto::v1::{self, containers_server, watch_containers_response};

use super::{Context, Error, lookup, pages::page};
use crate::{
    clock::Timestamp,
    control::reconciler,
    ids::ServiceId,
    messages::convert,
    state::{Container, ContainerChange, State},
};

#[derive(Clone, Debug)]
pub(super) struct Containers(pub(super) Context);

/// Changes that wait for a slow watcher; a slower one is cut off and lists again.
const QUEUE: usize = 1000;

fn sort_key(container: &Arc<Container>) -> String {
    // Numbers sort as text when they have the same length.
    format!("{}\0{:010}\0{:020}\0{}", container.service_name, container.slot, container.created_at.0, container.id)
}

impl Containers {
    async fn list(&self, request: v1::ListContainersRequest) -> Result<v1::ListContainersResponse, Error> {
        let state = self.0.store.read().await?;
        let mut containers: Vec<_> = match (request.service.as_str(), request.node.as_str()) {
            ("", "") => state.containers().map(Arc::clone).collect(),
            ("", node) => state.containers_on(&lookup::node(&state, node)?.id).map(Arc::clone).collect(),
            (service, _) => state.containers_of(&lookup::service(&state, service)?.id).map(Arc::clone).collect(),
        };
        if !request.service.is_empty() && !request.node.is_empty() {
            let node = lookup::node(&state, &request.node)?;
            containers.retain(|container| container.node.as_ref() == Some(&node.id));
        }
        containers.sort_by_cached_key(sort_key);
        let now = self.0.store.now();
        let shown = |container: Arc<Container>| Ok(as_read(&state, &container, now));
        let (containers, next_page_token) =
            page(containers, sort_key, (request.page_size, &request.page_token), shown)?;
        Ok(v1::ListContainersResponse { containers, next_page_token, revision: state.revision() })
    }
}

/// With what is known of it at this moment.
fn as_read(state: &State, container: &Container, now: Timestamp) -> v1::Container {
    let next_try = state.service(&container.service).and_then(|service| reconciler::next_try(service, container, now));
    v1::Container { next_try_at: next_try.map(Timestamp::to_proto), ..convert::container(container) }
}

fn changed(revision: u64, container: &Container) -> v1::WatchContainersResponse {
    let change = watch_containers_response::Change::Changed(convert::container(container));
    v1::WatchContainersResponse { revision, change: Some(change) }
}

/// What happened after `revision`, of one service's containers or of all.
fn news(state: &State, revision: u64, service: Option<&ServiceId>) -> Result<Vec<v1::WatchContainersResponse>, Error> {
    let changes = state.changes_since(revision).ok_or(Error::TooOld(revision))?;
    let news = changes.filter_map(|(at, change)| match change {
        ContainerChange::Changed(container) if service.is_none_or(|service| *service == container.service) => {
            Some(changed(*at, container))
        }
        ContainerChange::Deleted(id, owner) if service.is_none_or(|service| service == owner) => {
            let change = watch_containers_response::Change::Deleted(id.to_string());
            Some(v1::WatchContainersResponse { revision: *at, change: Some(change) })
        }
        _ => None,
    });
    Ok(news.collect())
}

#[tonic::async_trait]
impl containers_server::Containers for Containers {
    async fn list_containers(
        &self,
        request: Request<v1::ListContainersRequest>,
    ) -> Result<Response<v1::ListContainersResponse>, Status> {
        Ok(Response::new(self.list(request.into_inner()).await?))
    }

    async fn get_container(
        &self,
        request: Request<v1::GetContainerRequest>,
    ) -> Result<Response<v1::GetContainerResponse>, Status> {
        let state = self.0.store.read().await.map_err(super::status)?;
        let container = lookup::container(&state, &request.into_inner().container)?;
        let container = as_read(&state, &container, self.0.store.now());
        Ok(Response::new(v1::GetContainerResponse { container: Some(container) }))
    }

    type WatchContainersStream = Pin<Box<dyn Stream<Item = Result<v1::WatchContainersResponse, Status>> + Send>>;

    async fn watch_containers(
        &self,
        request: Request<v1::WatchContainersRequest>,
    ) -> Result<Response<Self::WatchContainersStream>, Status> {
        let request = request.into_inner();
        let state = self.0.store.read().await.map_err(super::status)?;
        let service = match request.service.as_str() {
            "" => None,
            name => Some(lookup::service(&state, name)?.id.clone()),
        };
        let (sender, receiver) = mpsc::channel(QUEUE);
        let mut revision = request.since_revision;
        let first = if revision == 0 {
            revision = state.revision();
            let all = state.containers().filter(|c| service.as_ref().is_none_or(|service| *service == c.service));
            all.map(|container| changed(revision, container)).collect()
        } else {
            news(&state, revision, service.as_ref())?
        };
        let mut views = self.0.store.watch();
        tokio::spawn(async move {
            let mut pending = first;
            loop {
                for response in pending {
                    revision = revision.max(response.revision);
                    if sender.send(Ok(response)).await.is_err() {
                        return;
                    }
                }
                tokio::select! {
                    changed = views.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                }
                let state = views.borrow_and_update().clone();
                pending = match news(&state, revision, service.as_ref()) {
                    Ok(pending) => pending,
                    Err(error) => {
                        // Nobody to tell if the watcher is gone as well.
                        let _ = sender.send(Err(error.into())).await;
                        return;
                    }
                };
                revision = revision.max(state.revision());
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
