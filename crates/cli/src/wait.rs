//! Waiting for services, woken by the manager's watch. What is said to be so is so at the end: every container is of the current
//! revision, and runs long enough to be believed, or is healthy, or has completed.

mod assess;

use std::{
    collections::{BTreeMap, HashMap},
    io::{IsTerminal as _, Write as _},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use clap::Args;
use futures::{StreamExt as _, future::join_all, stream::FuturesOrdered};
use tonic::Streaming;
use warren_manifest::parse;
use warren_proto::v1::{self, RestartCondition, WatchContainersResponse, watch_containers_response::Change};

use crate::{
    client::ClientArguments,
    complete,
    error::Error,
    objects::{container, node, service},
    output::{printable, say},
};
pub(crate) use assess::slots;
use assess::{Assessment, End, assess};

#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct WaitArguments {
    /// Wait until every container runs the current spec and is ready, or has completed and is not restarted; exits 1
    /// with the reason on timeout or failure
    #[arg(long)]
    pub(crate) wait: bool,
    /// Timeout of --wait, in total: a number of seconds, or 90s, 5m
    #[arg(long, default_value = "60", value_name = "DURATION", requires = "wait", value_parser = parse::seconds)]
    pub(crate) timeout: u64,
    /// How long a container without a health check must run to count as ready: a number of seconds, or 10s, 1m
    #[arg(long, default_value = "5", env = "WARREN_STABLE_S", value_name = "DURATION", value_parser = parse::seconds)]
    pub(crate) stable: u64,
}

/// As [`WaitArguments`], for what is removed.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct RemovalArguments {
    /// Wait until all containers are removed; exits 1 on timeout.
    #[arg(long)]
    pub(crate) wait: bool,
    /// Timeout of --wait, in total: a number of seconds, or 90s, 5m
    #[arg(long, default_value = "60", value_name = "DURATION", requires = "wait", value_parser = parse::seconds)]
    pub(crate) timeout: u64,
}

impl WaitArguments {
    fn deadline(self, began: Instant) -> Option<Instant> {
        Some(began + Duration::from_secs(self.timeout))
    }
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

    /// Waits for a change, until `until` at most.
    async fn changed(&mut self, until: Instant) -> Result<(), Error> {
        let Ok(message) = tokio::time::timeout_at(until.into(), self.changes.message()).await else { return Ok(()) };
        match message?.and_then(|message| message.change) {
            Some(Change::Changed(container)) => drop(self.containers.insert(container.id.clone(), container)),
            Some(Change::Deleted(id)) => drop(self.containers.remove(&id)),
            None => return Err(tonic::Status::unavailable("the manager ended the watch").into()),
        }
        Ok(())
    }
}

/// Looks at the service itself this often: its size may change while somebody waits.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// Before the managers are asked again that did not answer.
const RETRY: Duration = Duration::from_millis(500);

/// Repeats a call while managers do not answer, as in an election, until the deadline.
async fn patiently<T>(deadline: Option<Instant>, call: impl AsyncFn() -> Result<T, Error>) -> Result<T, Error> {
    loop {
        match call().await {
            Err(error) if error.is_transient() && !is_over(deadline) => tokio::time::sleep(RETRY).await,
            other => return other,
        }
    }
}

fn is_over(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| Instant::now() >= deadline)
}

/// Shows how far services are, on one line of a terminal.
struct Display {
    lines: Mutex<BTreeMap<String, String>>,
    is_shown: bool,
}

impl Display {
    fn new() -> Self {
        Self { lines: Mutex::default(), is_shown: std::io::stderr().is_terminal() }
    }

    fn show(&self, service: &str, line: String) {
        /// A line that wraps cannot be taken back.
        const WIDTH: usize = 79;
        if !self.is_shown {
            return;
        }
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.insert(service.to_owned(), line.clone()).as_ref() != Some(&line) {
            let all: Vec<_> = lines.iter().map(|(service, line)| format!("{service} {line}")).collect();
            let line: String = printable(&all.join(", ")).chars().take(WIDTH).collect();
            let mut stderr = std::io::stderr();
            // Whoever has closed it does not look.
            let _ = write!(stderr, "\r\x1b[K{line}");
            let _ = stderr.flush();
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if self.is_shown && !self.lines.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            eprint!("\r\x1b[K");
        }
    }
}

/// Waits until all of these services are ready, together.
pub(crate) async fn ready(
    client: &ClientArguments,
    services: Vec<v1::Service>,
    wait: WaitArguments,
) -> Result<(), Error> {
    if !wait.wait {
        return Ok(());
    }
    let began = Instant::now();
    all_ready(client, services, began, wait.deadline(began), Duration::from_secs(wait.stable)).await
}

async fn all_ready(
    client: &ClientArguments,
    services: Vec<v1::Service>,
    began: Instant,
    deadline: Option<Instant>,
    stable: Duration,
) -> Result<(), Error> {
    let display = Display::new();
    let waits = services.into_iter().map(|service| {
        let wait = Wait { client, began, deadline, stable, display: &display, seen: HashMap::new() };
        wait.until_ready(service)
    });
    let outcomes = join_all(waits).await;
    drop(display);
    Error::all(outcomes)
}

/// One service that is waited for.
struct Wait<'a> {
    client: &'a ClientArguments,
    began: Instant,
    deadline: Option<Instant>,
    stable: Duration,
    display: &'a Display,
    /// Since when containers were seen to run.
    seen: HashMap<String, Instant>,
}

impl Wait<'_> {
    async fn until_ready(mut self, mut service: v1::Service) -> Result<(), Error> {
        let id = service.id.clone();
        let name = service.spec.clone().unwrap_or_default().name;
        loop {
            let followed = patiently(self.deadline, async || Follower::start(self.client, &id).await).await?;
            match self.follow(followed, &mut service, &name).await {
                // The manager that was asked is gone; another goes on.
                Err(error) if error.is_transient() && !is_over(self.deadline) => tokio::time::sleep(RETRY).await,
                other => return other,
            }
        }
    }

    async fn follow(&mut self, mut follower: Follower, service: &mut v1::Service, name: &str) -> Result<(), Error> {
        let mut looked = Instant::now();
        loop {
            let assessment = assess(service, follower.containers.values());
            let unproven_for = self.unproven_for(&assessment, service, &follower.containers);
            let line = format!("{}/{}", assessment.ready, assessment.desired);
            let reason = assessment.reasons.first().map(|reason| format!("{line} ({reason})"));
            self.display.show(name, reason.unwrap_or(line));
            if assessment.is_ready() && unproven_for.is_zero() {
                // Nodes that are down are the manager's to know.
                let fresh = service::get(self.client, &service.id).await?;
                let running = fresh.status.unwrap_or_default().running as usize;
                let is_down = running < follower.containers.values().filter(|container| runs(container)).count();
                if fresh.revision == service.revision && !is_down {
                    return Ok(());
                }
                *service = fresh;
                if is_over(self.deadline) {
                    return Err(self.not_ready(name, &assessment, is_down.then_some("a node is down")));
                }
            } else if assessment.is_stuck || is_over(self.deadline) {
                return Err(self.not_ready(name, &assessment, None));
            }
            let mut until = looked + LOOK_AGAIN;
            if assessment.is_ready() && !unproven_for.is_zero() {
                until = until.min(Instant::now() + unproven_for);
            }
            follower.changed(self.deadline.map_or(until, |deadline| until.min(deadline))).await?;
            if looked.elapsed() >= LOOK_AGAIN {
                *service = service::get(self.client, &service.id).await?;
                looked = Instant::now();
            }
        }
    }

    /// For how long those containers must go on running that nothing but their running speaks for.
    fn unproven_for(
        &mut self,
        assessment: &Assessment,
        service: &v1::Service,
        containers: &BTreeMap<String, v1::Container>,
    ) -> Duration {
        let now = Instant::now();
        self.seen.retain(|id, _| assessment.unproven.contains(id));
        let mut longest = Duration::ZERO;
        for id in &assessment.unproven {
            let since = *self.seen.entry(id.clone()).or_insert(now);
            // One that was there before the spec was last written is not what is waited for. Both times are the leader's.
            let created = |at: Option<pbjson_types::Timestamp>| at.map(|at| (at.seconds, at.nanos));
            let is_older = containers.get(id).is_some_and(|container| {
                container.failures == 0 && created(container.created_at) < created(service.updated_at)
            });
            if !is_older {
                longest = longest.max(self.stable.saturating_sub(now - since));
            }
        }
        longest
    }

    fn not_ready(&self, name: &str, assessment: &Assessment, more: Option<&str>) -> Error {
        /// More would not be read.
        const REASONS: usize = 3;
        let mut reasons: Vec<&str> = more.into_iter().chain(assessment.reasons.iter().map(String::as_str)).collect();
        let rest = reasons.len().saturating_sub(REASONS);
        reasons.truncate(REASONS);
        let mut why = reasons.join("; ");
        if rest > 0 {
            why = format!("{why}; and {rest} more");
        }
        if why.is_empty() && !assessment.is_ready() {
            why = format!("{} containers of before are still there", assessment.leaving);
        } else if why.is_empty() {
            why = format!("they have not run for {} s yet", self.stable.as_secs());
        }
        let ready = assessment.ready.min(assessment.desired);
        Error::NotReady {
            service: name.to_owned(),
            ready,
            desired: assessment.desired,
            after: self.began.elapsed(),
            why,
        }
    }
}

fn runs(container: &v1::Container) -> bool {
    container::status(container).state() == v1::ContainerState::Running
        && container.desired_state() == v1::ContainerState::Running
}

/// What a service is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Until {
    /// Every container runs the current spec and is ready
    Ready,
    /// Every container has ended and is not restarted; exits with the first nonzero exit code
    Ended,
}

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Name, ID or unique ID prefix
    #[arg(add = complete::services())]
    service: String,
    /// Condition to wait for [default: ready, or ended if the restart policy is never or on-failure]
    #[arg(long = "for", value_name = "WHAT")]
    until: Option<Until>,
    /// Timeout: a number of seconds, or 90s, 5m [default: no limit]
    #[arg(long, value_name = "DURATION", value_parser = parse::seconds)]
    timeout: Option<u64>,
    /// How long a container without a health check must run to count as ready: a number of seconds, or 10s, 1m
    #[arg(long, default_value = "5", env = "WARREN_STABLE_S", value_name = "DURATION", value_parser = parse::seconds)]
    stable: u64,
}

/// `warren service wait`.
pub(crate) async fn run(arguments: Arguments, client: &ClientArguments) -> Result<(), Error> {
    let service = service::get(client, &arguments.service).await?;
    let policy = service.spec.as_ref().and_then(|spec| spec.restart).unwrap_or_default();
    let may_end = matches!(policy.condition(), RestartCondition::Never | RestartCondition::OnFailure);
    let until = arguments.until.unwrap_or(if may_end { Until::Ended } else { Until::Ready });
    let began = Instant::now();
    let deadline = arguments.timeout.map(|timeout| began + Duration::from_secs(timeout));
    match until {
        Until::Ready => all_ready(client, vec![service], began, deadline, Duration::from_secs(arguments.stable)).await,
        Until::Ended => ended(client, service, deadline, arguments.timeout.unwrap_or_default()).await,
    }
}

async fn ended(
    client: &ClientArguments,
    mut service: v1::Service,
    deadline: Option<Instant>,
    timeout: u64,
) -> Result<(), Error> {
    let id = service.id.clone();
    loop {
        let mut follower = patiently(deadline, async || Follower::start(client, &id).await).await?;
        loop {
            service = match service::get(client, &id).await {
                Err(error) if error.is_transient() && !is_over(deadline) => break,
                other => other?,
            };
            let name = service.spec.clone().unwrap_or_default().name;
            match assess::end(&service, follower.containers.values()) {
                End::Exited(0) => return Ok(()),
                End::Exited(code) => return Err(Error::ServiceExited { service: name, code }),
                End::Failed(why) => return Err(Error::ServiceFailed { service: name, why }),
                End::NotYet(why) if is_over(deadline) => {
                    return Err(Error::NotEnded { service: name, timeout: Duration::from_secs(timeout), why });
                }
                End::NotYet(_) => {}
            }
            let until = Instant::now() + LOOK_AGAIN;
            match follower.changed(deadline.map_or(until, |deadline| until.min(deadline))).await {
                Err(error) if error.is_transient() && !is_over(deadline) => break,
                other => other?,
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Waits until these containers have ended, and writes the exit code of each.
pub(crate) async fn containers_end(
    client: &ClientArguments,
    containers: Vec<String>,
    timeout: Option<u64>,
) -> Result<(), Error> {
    let timeout = timeout.map(Duration::from_secs);
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    // A name means another container once this one is replaced.
    let mut known = Vec::new();
    for container in containers {
        known.push(patiently(deadline, async || container::get(client, container.clone()).await).await?);
    }
    // Each is told as soon as those before it are.
    let mut ends: FuturesOrdered<_> = known.into_iter().map(|it| container_ends(client, it, deadline)).collect();
    let mut outcomes = Vec::new();
    while let Some(end) = ends.next().await {
        outcomes.push(end.and_then(|container| {
            let (status, name) = (container::status(&container), container::name(&container));
            match status.exit_code {
                Some(code) => say!("{code}"),
                None if container::has_ended(&container) => {
                    return Err(Error::NoExitCode { container: name, why: status.message });
                }
                None => {
                    let state = container::state_name(status.state());
                    return Err(Error::Running { container: name, state, timeout: timeout.unwrap_or_default() });
                }
            }
            Ok(())
        }));
    }
    Error::all(outcomes)
}

/// A container as it is at its end, or at the deadline.
async fn container_ends(
    client: &ClientArguments,
    mut container: v1::Container,
    deadline: Option<Instant>,
) -> Result<v1::Container, Error> {
    let id = container.id.clone();
    // Its record goes with its service, or when there are enough newer ones.
    let forgotten = |container: &v1::Container| Error::NoExitCode {
        container: container::name(container),
        why: "it is gone, and nobody remembers its end".to_owned(),
    };
    loop {
        if container::has_ended(&container) || is_over(deadline) {
            return Ok(container);
        }
        let started = patiently(deadline, async || Follower::start(client, &container.service_id).await).await;
        let mut follower = match started {
            Err(Error::Refused(status)) if status.code() == tonic::Code::NotFound => return Err(forgotten(&container)),
            other => other?,
        };
        loop {
            match follower.containers.get(&id) {
                Some(known) => container = known.clone(),
                None => return Err(forgotten(&container)),
            }
            if container::has_ended(&container) || is_over(deadline) {
                return Ok(container);
            }
            let until = Instant::now() + LOOK_AGAIN;
            match follower.changed(deadline.map_or(until, |deadline| until.min(deadline))).await {
                Err(error) if error.is_transient() && !is_over(deadline) => break,
                other => other?,
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Waits until none of these services' containers is left, together.
pub(crate) async fn gone(
    client: &ClientArguments,
    services: Vec<(String, Follower)>,
    wait: RemovalArguments,
) -> Result<(), Error> {
    let deadline = Instant::now() + Duration::from_secs(wait.timeout);
    let display = Display::new();
    let waits = services.into_iter().map(|(name, follower)| one_gone(client, name, follower, deadline, wait, &display));
    let outcomes = join_all(waits).await;
    drop(display);
    Error::all(outcomes)
}

async fn one_gone(
    client: &ClientArguments,
    name: String,
    mut follower: Follower,
    deadline: Instant,
    wait: RemovalArguments,
    display: &Display,
) -> Result<(), Error> {
    while !follower.containers.is_empty() {
        display.show(&name, format!("{} left", follower.containers.len()));
        if Instant::now() >= deadline {
            let nodes = node::list(client).await.unwrap_or_default();
            let left = follower.containers.values().map(|container| {
                let node = nodes.iter().find(|node| node.id == container.node_id);
                let hostname = node.and_then(|node| node.description.as_ref()).map(|it| it.hostname.clone());
                let down =
                    if node.is_some_and(|node| node.status() == v1::NodeStatus::Down) { ", which is down" } else { "" };
                match hostname {
                    Some(hostname) => format!("{} on {hostname}{down}", container::name(container)),
                    None => container::name(container),
                }
            });
            let mut left: Vec<_> = left.collect();
            left.sort();
            left.truncate(3);
            let left = left.join("; ");
            return Err(Error::NotGone { service: name, timeout: Duration::from_secs(wait.timeout), left });
        }
        match follower.changed(deadline).await {
            Err(error) if error.is_transient() && Instant::now() < deadline => {
                tokio::time::sleep(RETRY).await;
                // The service is gone by name, and its containers are still listed by its id's.
                let left: Vec<String> = follower.containers.keys().cloned().collect();
                let all =
                    patiently(Some(deadline), async || container::list(client, String::new(), String::new()).await);
                let (all, since_revision) = all.await?;
                let request = v1::WatchContainersRequest { service: String::new(), since_revision };
                follower.changes = client.containers().await?.watch_containers(request).await?.into_inner();
                follower.containers =
                    all.into_iter().filter(|it| left.contains(&it.id)).map(|it| (it.id.clone(), it)).collect();
            }
            other => other?,
        }
    }
    Ok(())
}
