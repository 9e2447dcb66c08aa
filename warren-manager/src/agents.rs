//! Agents' sessions: assignments down; heartbeats, status and telemetry up.

mod assignments;
mod directory;
pub(crate) mod pace;
mod relay;
mod reports;

use std::{collections::HashSet, sync::Arc, time::Duration};

use opentelemetry::KeyValue;
use prost::Message as _;
use tokio::sync::{Mutex, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use warren_proto::v1::{self, agent_message, dispatcher_server, manager_message};

use crate::{
    agents::pace::{Allowance, Pace},
    caller::Caller,
    clock::Timestamp,
    control::liveness::Liveness,
    ids::NodeId,
    metrics::ManagerMetrics,
    state::{Secret, State},
    store::Store,
    telemetry::{Collected, NotAccepted, SessionNumber},
    trust::vault::Vault,
};
use assignments::Assigned;
use directory::Directory;
pub(crate) use relay::Relay;
use reports::Reports;

/// Messages to an agent that wait to be sent.
const QUEUE: usize = 16;
/// Messages of one agent, each of so many bytes at most; a larger one counts as several. An agent that starts hundreds of containers a second
/// sends no more.
const MESSAGES: Pace = Pace { burst: 2000, pause: Duration::from_millis(2) };
const BYTES_OF_ONE: usize = 16 << 10;

/// Serves agents.
#[derive(Clone, Debug)]
pub(crate) struct Dispatcher {
    store: Store,
    liveness: Liveness,
    collected: Collected,
    metrics: Arc<ManagerMetrics>,
    reports: Reports,
    directory: watch::Receiver<Directory>,
    vault: Vault,
    relay: Relay,
    leads: watch::Receiver<bool>,
    seen: Arc<Mutex<HashSet<NodeId>>>,
}

impl Dispatcher {
    /// A dispatcher of this manager's store.
    #[must_use]
    pub(crate) fn new(
        store: Store,
        liveness: Liveness,
        collected: Collected,
        metrics: Arc<ManagerMetrics>,
        vault: Vault,
        relay: Relay,
        leads: watch::Receiver<bool>,
    ) -> Self {
        let reports = Reports::start(store.clone());
        let directory = directory::keep(&store, liveness.clone(), leads.clone());
        Self { store, liveness, collected, metrics, reports, directory, vault, relay, leads, seen: Arc::default() }
    }

    /// A secret's value, for a node that needs it.
    fn open(&self, secret: &Secret) -> Option<v1::SecretValue> {
        let opened = self.vault.open_sealed(&secret.id, secret.sequence, &secret.sealed);
        let result = if opened.is_ok() { "delivered" } else { "failed" };
        self.metrics.secret_deliveries.add(1, &[KeyValue::new("result", result)]);
        match opened {
            Ok(data) => Some(v1::SecretValue {
                id: secret.id.to_string(),
                kind: secret.kind.into(),
                name: secret.name.clone(),
                sequence: secret.sequence,
                data,
            }),
            Err(error) => {
                tracing::error!(secret = secret.name, %error, "a node cannot be given what it needs");
                None
            }
        }
    }

    async fn opened(&self, node: &NodeId, hostname: &str) {
        if !self.seen.lock().await.insert(node.clone()) {
            self.metrics.session_reconnects.add(1, &[KeyValue::new("node", hostname.to_owned())]);
        }
    }

    /// Sends assignments as the state changes, until the agent or the leadership is gone.
    async fn send(self, node: NodeId, to: mpsc::Sender<Result<v1::ManagerMessage, Status>>) {
        let mut state = self.store.watch();
        let mut assigned = Assigned::default();
        let mut period = self.liveness.period();
        let mut directory = self.directory.clone();
        let mut position = None;
        let mut leads = self.leads.clone();
        let (mut believed, mut told) = (None, None);
        loop {
            let view = state.borrow_and_update().clone();
            if view.node(&node).is_none() {
                // The agent registers again, if it is still there.
                let _ = to.send(Err(Status::not_found("this node was removed from the cluster"))).await;
                return;
            }
            let revision = view.assignments_revision(&node);
            // A cluster's changes are mostly other nodes'.
            if told.replace(revision) != Some(revision)
                && let Some(message) = assigned.next(&view, &node, |secret| self.open(secret))
                && to.send(Ok(wrap(manager_message::Message::Assignments(message)))).await.is_err()
            {
                return;
            }
            let authorities = view.is_admitted(&node).then(|| authorities(&view)).flatten();
            if authorities != believed {
                believed.clone_from(&authorities);
                if let Some(message) = authorities
                    && to.send(Ok(wrap(manager_message::Message::Authorities(message)))).await.is_err()
                {
                    return;
                }
            }
            if self.liveness.period() != period {
                period = self.liveness.period();
                let message = v1::HeartbeatPeriod { period: Some(period.into()) };
                if to.send(Ok(wrap(manager_message::Message::HeartbeatPeriod(message)))).await.is_err() {
                    return;
                }
            }
            let known = directory.borrow_and_update().clone();
            for part in known.news(position) {
                if to.send(Ok(wrap(manager_message::Message::Network(part)))).await.is_err() {
                    return;
                }
            }
            position = Some(known.position());
            tokio::select! {
                changed = state.changed() => if changed.is_err() { return },
                changed = directory.changed() => if changed.is_err() { return },
                changed = leads.changed() => if changed.is_err() { return },
                () = to.closed() => return,
            }
            if !*leads.borrow_and_update() {
                // The agent looks for the new leader.
                let _ = to.send(Err(Status::unavailable("this manager no longer leads"))).await;
                return;
            }
        }
    }

    async fn receive(
        self,
        session: SessionNumber,
        node: &NodeId,
        hostname: &str,
        mut from: Streaming<v1::AgentMessage>,
    ) -> Option<Status> {
        let mut allowance = Allowance::new(MESSAGES);
        loop {
            let message = match from.message().await {
                Ok(Some(message)) => {
                    // Who sends more is read more slowly.
                    let weight = 1 + message.encoded_len() / BYTES_OF_ONE;
                    allowance.wait_for(u32::try_from(weight).unwrap_or(u32::MAX)).await;
                    message.message
                }
                Ok(None) => return None,
                Err(status) => {
                    tracing::info!(node = hostname, message = status.message(), "an agent's session broke");
                    // Where the connection is still there, its agent hears why.
                    return Some(Status::new(status.code(), format!("a message was refused: {}", status.message())));
                }
            };
            self.liveness.heard(node);
            match message {
                Some(agent_message::Message::Status(report)) => {
                    self.compare_clock(node, report.sent_at);
                    if let Err(why) = self.reports.add(node, report, self.liveness.clock_shift(node)) {
                        self.liveness.set_refused(node, &why, self.store.now());
                    }
                }
                Some(agent_message::Message::Telemetry(snapshot)) => {
                    self.compare_clock(node, snapshot.taken_at);
                    let accepted = self.collected.accept(session, node, hostname, snapshot);
                    if accepted == Err(NotAccepted::TooMuch) {
                        self.liveness.set_refused(
                            node,
                            "it has more series of metrics than are kept",
                            self.store.now(),
                        );
                    }
                    let result = if accepted.is_ok() { "accepted" } else { "rejected" };
                    let labels = [KeyValue::new("node", hostname.to_owned()), KeyValue::new("result", result)];
                    self.metrics.telemetry_snapshots.add(1, &labels);
                }
                Some(agent_message::Message::Conditions(said)) => {
                    self.liveness.set_listeners(node, &said.listeners);
                    self.liveness.set_conditions(node, said.conditions, self.store.now());
                }
                Some(agent_message::Message::Heartbeat(heartbeat)) => self.compare_clock(node, heartbeat.sent_at),
                Some(agent_message::Message::Hello(_)) | None => {}
            }
        }
    }

    fn compare_clock(&self, node: &NodeId, clock: Option<pbjson_types::Timestamp>) {
        if let Some(clock) = clock {
            self.liveness.set_clock(node, Timestamp::from_proto(&clock), self.store.now());
        }
    }

    /// Keeps a session until either side ends it: a node that was removed is not listened to either.
    async fn keep(
        self,
        session: SessionNumber,
        (node, hostname): (NodeId, String),
        to: mpsc::Sender<Result<v1::ManagerMessage, Status>>,
        from: Streaming<v1::AgentMessage>,
    ) {
        let why = tokio::select! {
            () = self.clone().send(node.clone(), to.clone()) => None,
            why = self.clone().receive(session, &node, &hostname, from) => why,
        };
        self.relay.closed(&node, &to);
        if let Some(why) = why {
            // A queue that is full belongs to an agent that does not read.
            let _ = to.try_send(Err(why));
        }
        self.collected.closed(&node);
        tracing::info!(node = hostname, "an agent's session ended");
    }
}

/// Whom members are to believe, in a cluster with an authority.
fn authorities(state: &State) -> Option<v1::Authorities> {
    let cluster = state.cluster().filter(|cluster| cluster.authority.is_some())?;
    let digest = warren_pki::authorities_digest(&cluster.authorities());
    Some(v1::Authorities { digest, confirm: cluster.rotation.is_some() })
}

fn wrap(message: manager_message::Message) -> v1::ManagerMessage {
    v1::ManagerMessage { message: Some(message) }
}

#[tonic::async_trait]
impl dispatcher_server::Dispatcher for Dispatcher {
    type SessionStream = ReceiverStream<Result<v1::ManagerMessage, Status>>;
    type ServeExecStream = ReceiverStream<Result<v1::ExecRequest, Status>>;

    async fn upload_logs(
        &self,
        request: Request<Streaming<v1::UploadLogsRequest>>,
    ) -> Result<Response<v1::UploadLogsResponse>, Status> {
        self.relay.receive_logs(request).await?;
        Ok(Response::new(v1::UploadLogsResponse {}))
    }

    async fn upload_stats(
        &self,
        request: Request<Streaming<v1::UploadStatsRequest>>,
    ) -> Result<Response<v1::UploadStatsResponse>, Status> {
        self.relay.receive_stats(request).await?;
        Ok(Response::new(v1::UploadStatsResponse {}))
    }

    async fn serve_exec(
        &self,
        request: Request<Streaming<v1::ServeExecRequest>>,
    ) -> Result<Response<Self::ServeExecStream>, Status> {
        Ok(Response::new(self.relay.serve_exec(request).await?))
    }

    async fn session(
        &self,
        request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let caller = Caller::of(&request)?.clone();
        let mut from = request.into_inner();
        let first = from.message().await?.and_then(|message| message.message);
        let Some(agent_message::Message::Hello(hello)) = first else {
            return Err(Status::invalid_argument("a session begins with a hello"));
        };
        let node = NodeId::from(hello.node_id);
        caller.check_node(&node)?;
        let state = self.store.read().await.map_err(crate::error::status)?;
        let Some(known) = state.node(&node) else {
            return Err(Status::not_found(format!("node {node} is not registered")));
        };
        let hostname = known.description.hostname.clone();
        self.liveness.heard(&node);
        self.opened(&node, &hostname).await;
        let session = self.collected.opened(&node);
        tracing::info!(node = hostname, "an agent's session began");

        let (to, outgoing) = mpsc::channel(QUEUE);
        let welcome = v1::Welcome {
            term: self.store.raft().status().term,
            heartbeat_period: Some(self.liveness.period().into()),
            incremental_telemetry: true,
        };
        // The queue is empty: this cannot wait.
        let _ = to.send(Ok(wrap(manager_message::Message::Welcome(welcome)))).await;
        if let Some(before) = self.relay.opened(&node, to.clone()) {
            // It is broken, and nobody has noticed yet; or another machine has a copy of this one's data directory.
            let _ = before.try_send(Err(Status::aborted("another session of this node has begun")));
            tracing::info!(node = hostname, "an agent's session before this one is ended");
        }
        tokio::spawn(self.clone().keep(session, (node, hostname), to, from));
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}
