//! Waiting for services, woken by the manager's watch.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use clap::Args;
use tonic::Streaming;
use warren_proto::v1::{
    self, ContainerState, Health, RestartCondition, WatchContainersResponse, watch_containers_response::Change,
};

use crate::{client::ClientArguments, container, error::Error, service};

#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct WaitArguments {
    /// Wait until it is so: all containers run, or have completed if they are not to be restarted then. One that fails later has
    /// run nevertheless.
    #[arg(long)]
    pub(crate) wait: bool,
    /// Seconds to wait at most.
    #[arg(long, default_value_t = 60, requires = "wait", value_parser = clap::value_parser!(u64).range(..=86_400))]
    pub(crate) timeout: u64,
}

/// A service's containers, followed from a list on.
pub(crate) struct Follower {
    containers: BTreeMap<String, v1::Container>,
    changes: Streaming<WatchContainersResponse>,
}

impl Follower {
    pub(crate) async fn start(client: &ClientArguments, service: &str) -> Result<Self, Error> {
        let (containers, since_revision) = container::list(client, service.to_owned(), String::new()).await?;
        let request = v1::WatchContainersRequest { service: service.to_owned(), since_revision };
        let changes = client.containers().await?.watch_containers(request).await?.into_inner();
        let containers = containers.into_iter().map(|container| (container.id.clone(), container)).collect();
        Ok(Self { containers, changes })
    }

    /// Waits for a change, until `deadline` at most.
    async fn changed(&mut self, deadline: Instant) -> Result<(), Error> {
        let Ok(message) = tokio::time::timeout_at(deadline.into(), self.changes.message()).await else { return Ok(()) };
        match message?.and_then(|message| message.change) {
            Some(Change::Changed(container)) => drop(self.containers.insert(container.id.clone(), container)),
            Some(Change::Deleted(id)) => drop(self.containers.remove(&id)),
            None => return Err(tonic::Status::unavailable("the manager ended the watch").into()),
        }
        Ok(())
    }
}

/// How far a service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Ready,
    Underway,
    /// It will not get further.
    Stuck,
}

fn progress(service: &v1::Service, containers: &BTreeMap<String, v1::Container>) -> Progress {
    let desired = service.status.unwrap_or_default().desired as usize;
    let restart = service.spec.as_ref().and_then(|spec| spec.restart).unwrap_or_default().condition();
    let count = |wanted: &dyn Fn(&v1::Container) -> bool| containers.values().filter(|c| wanted(c)).count();
    let state = |container: &v1::Container| container::status(container).state();
    let live = count(&|container| !container::has_ended(container));
    let running = count(&|container| {
        let health = container::status(container).health();
        state(container) == ContainerState::Running
            && container.desired_state() == ContainerState::Running
            && matches!(health, Health::Unspecified | Health::Healthy)
    });
    // What may end has done what it was for.
    let may_end = matches!(restart, RestartCondition::Never | RestartCondition::OnFailure);
    let complete = if may_end { count(&|container| state(container) == ContainerState::Complete) } else { 0 };
    if live == running && running + complete >= desired && live <= desired {
        Progress::Ready
    } else if restart == RestartCondition::Never && live == 0 && containers.len() >= desired {
        Progress::Stuck
    } else {
        Progress::Underway
    }
}

/// Looks at the service itself this often: its size may change while somebody waits.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Waits until all of a service's containers run, and no others.
pub(crate) async fn running(
    client: &ClientArguments,
    mut service: v1::Service,
    wait: WaitArguments,
) -> Result<(), Error> {
    if !wait.wait {
        return Ok(());
    }
    let began = Instant::now();
    let deadline = began + Duration::from_secs(wait.timeout);
    let id = service.id.clone();
    let mut follower = Follower::start(client, &id).await?;
    let mut looked = Instant::now();
    loop {
        let progress = progress(&service, &follower.containers);
        match progress {
            Progress::Ready => return Ok(()),
            Progress::Underway if Instant::now() < deadline => {}
            Progress::Underway | Progress::Stuck => {
                let mut containers: Vec<_> = follower.containers.values().collect();
                containers.sort_by_key(|c| c.created_at.as_ref().map(|at| (at.seconds, at.nanos)));
                let mut messages = containers.iter().rev().map(|container| {
                    let status = container::status(container);
                    if status.message.is_empty() { status.health_message } else { status.message }
                });
                let why = messages.find(|message| !message.is_empty());
                let starting =
                    containers.iter().any(|container| container::status(container).health() == Health::Starting);
                let why = why.or_else(|| starting.then(|| "not all of them have answered a health check".to_owned()));
                let service = service::get(client, &id).await?;
                let status = service.status.unwrap_or_default();
                return Err(Error::NotReady {
                    service: service.spec.unwrap_or_default().name,
                    running: status.running,
                    desired: status.desired,
                    after: began.elapsed(),
                    why: why.map(|why| format!(": {why}")).unwrap_or_default(),
                });
            }
        }
        follower.changed(deadline.min(looked + LOOK_AGAIN)).await?;
        if looked.elapsed() >= LOOK_AGAIN {
            service = service::get(client, &id).await?;
            looked = Instant::now();
        }
    }
}

/// Waits until none of a service's containers is left.
pub(crate) async fn gone(mut follower: Follower, name: &str, wait: WaitArguments) -> Result<(), Error> {
    let timeout = Duration::from_secs(wait.timeout);
    let deadline = Instant::now() + timeout;
    while !follower.containers.is_empty() {
        if Instant::now() >= deadline {
            return Err(Error::NotGone { service: name.to_owned(), timeout });
        }
        follower.changed(deadline).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(desired: u32, condition: RestartCondition) -> v1::Service {
        let restart = v1::RestartPolicy { condition: condition.into(), ..Default::default() };
        v1::Service {
            spec: Some(v1::ServiceSpec { restart: Some(restart), ..Default::default() }),
            status: Some(v1::ServiceStatus { desired, running: 0 }),
            ..Default::default()
        }
    }

    fn containers(states: &[ContainerState]) -> BTreeMap<String, v1::Container> {
        let container = |(id, state): (usize, &ContainerState)| {
            let status = v1::ContainerStatus { state: (*state).into(), ..Default::default() };
            let container = v1::Container {
                id: id.to_string(),
                desired_state: ContainerState::Running.into(),
                status: Some(status),
                ..Default::default()
            };
            (container.id.clone(), container)
        };
        states.iter().enumerate().map(container).collect()
    }

    #[test]
    fn a_service_is_ready_when_all_of_it_runs_or_has_done_its_work() {
        use ContainerState::{Complete, Failed, Running, Starting};
        use RestartCondition::{Any, Never, OnFailure};
        for (desired, restart, states, expected) in [
            (2, Any, &[Running, Running][..], Progress::Ready),
            (2, Any, &[Running, Starting], Progress::Underway),
            (2, Any, &[Running, Running, Running], Progress::Underway),
            (2, Any, &[Running, Running, Failed], Progress::Ready),
            (0, Any, &[], Progress::Ready),
            (1, Any, &[], Progress::Underway),
            (1, Any, &[Complete], Progress::Underway),
            (1, Never, &[Complete], Progress::Ready),
            (1, OnFailure, &[Complete], Progress::Ready),
            (2, Never, &[Complete, Running], Progress::Ready),
            (1, Never, &[Failed], Progress::Stuck),
            (1, OnFailure, &[Failed], Progress::Underway),
        ] {
            let found = progress(&service(desired, restart), &containers(states));
            assert_eq!(found, expected, "{desired} {restart:?} {states:?}");
        }
    }
}
