//! Between whoever wants something of a node's containers and the agent that has them: the wish goes down the agent's
//! session, the answer comes up in a call of its own.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming};
use warren_proto::v1::{self, manager_message::Message};

use crate::{caller::Caller, ids::NodeId};

/// Messages on their way; whoever does not read holds the agent's answer up, and nothing else.
const AHEAD: usize = 256;
/// How long an agent may take to begin with an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

type Session = mpsc::Sender<Result<v1::ManagerMessage, Status>>;
type Answers<T> = mpsc::Sender<Result<T, Status>>;

/// Somebody who waits for an answer.
#[derive(Debug)]
struct Wish<T, B> {
    /// Whose agent is to answer.
    node: NodeId,
    answers: Answers<T>,
    /// What they brought along for it.
    brought: B,
}

/// Who waits for answers to wishes, by the wishes' ids.
#[derive(Debug)]
struct Waiting<T, B = ()>(Mutex<HashMap<String, Wish<T, B>>>);

impl<T, B> Default for Waiting<T, B> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T, B> Waiting<T, B> {
    fn take(&self, id: &str) -> Option<Wish<T, B>> {
        whole(&self.0).remove(id)
    }

    /// For an agent that answers: the wish, if it was for this one's node.
    fn take_by(&self, caller: &Caller, id: &str) -> Option<Wish<T, B>> {
        let mut waiting = whole(&self.0);
        let wish = waiting.get(id)?;
        caller.check_node(&wish.node).ok()?;
        waiting.remove(id)
    }
}

/// Every change is one insertion or removal: a panic leaves it whole.
fn whole<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Default)]
struct Inner {
    sessions: Mutex<HashMap<NodeId, Session>>,
    logs: Waiting<v1::StreamLogsResponse>,
    stats: Waiting<v1::StreamStatsResponse>,
    execs: Waiting<v1::ExecResponse, Streaming<v1::ExecRequest>>,
}

/// Passes wishes to agents and their answers back. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Relay(Arc<Inner>);

impl Relay {
    /// A node's session is this now; the one before, if that has not ended.
    pub(super) fn opened(&self, node: &NodeId, session: Session) -> Option<Session> {
        whole(&self.0.sessions).insert(node.clone(), session)
    }

    /// A session has ended: nothing is sent to it any more, and its stream ends. The node may have begun another.
    pub(super) fn closed(&self, node: &NodeId, session: &Session) {
        let mut sessions = whole(&self.0.sessions);
        if sessions.get(node).is_some_and(|known| known.same_channel(session)) {
            sessions.remove(node);
        }
    }

    async fn send(&self, node: &NodeId, wish: Message) -> Option<()> {
        let session = whole(&self.0.sessions).get(node).cloned();
        session?.send(Ok(v1::ManagerMessage { message: Some(wish) })).await.ok()
    }

    /// Sends a wish. What comes of it comes out of the receiver, an error at least.
    async fn wish<T: Send + 'static, B: Send + 'static>(
        &self,
        node: &NodeId,
        (id, wish): (String, Message),
        waiting: fn(&Inner) -> &Waiting<T, B>,
        brought: B,
    ) -> Option<mpsc::Receiver<Result<T, Status>>> {
        let (answers, receiver) = mpsc::channel(AHEAD);
        whole(&waiting(&self.0).0).insert(id.clone(), Wish { node: node.clone(), answers, brought });
        if self.send(node, wish).await.is_none() {
            waiting(&self.0).take(&id);
            return None;
        }
        let relay = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(ANSWER_TIMEOUT).await;
            if let Some(wish) = waiting(&relay.0).take(&id) {
                let _ = wish.answers.send(Err(Status::unavailable("the container's node does not answer"))).await;
            }
        });
        Some(receiver)
    }

    /// Asks a node for a container's lines; `None` when it has no session.
    pub(crate) async fn logs(
        &self,
        node: &NodeId,
        wish: v1::LogRequest,
    ) -> Option<mpsc::Receiver<Result<v1::StreamLogsResponse, Status>>> {
        self.wish(node, (wish.id.clone(), Message::Logs(wish)), |inner| &inner.logs, ()).await
    }

    /// Asks a node what its containers use; `None` when it has no session.
    pub(crate) async fn stats(
        &self,
        node: &NodeId,
        wish: v1::StatsWish,
    ) -> Option<mpsc::Receiver<Result<v1::StreamStatsResponse, Status>>> {
        self.wish(node, (wish.id.clone(), Message::Stats(wish)), |inner| &inner.stats, ()).await
    }

    /// Asks a node to run something in a container; `None` when it has no session.
    pub(crate) async fn exec(
        &self,
        node: NodeId,
        wish: v1::ExecWish,
        requests: Streaming<v1::ExecRequest>,
    ) -> Option<ReceiverStream<Result<v1::ExecResponse, Status>>> {
        let id = wish.id.clone();
        let wish = (id.clone(), Message::Exec(wish));
        let mut answers = self.wish(&node, wish, |inner| &inner.execs, requests).await?;
        let (to_caller, receiver) = mpsc::channel(1);
        let relay = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = to_caller.closed() => break,
                    answer = answers.recv() => {
                        let Some(answer) = answer else { return };
                        if to_caller.send(answer).await.is_err() {
                            break;
                        }
                    }
                }
            }
            // Said beside the call itself, whose queues may be full of input that the command does not read. One that has
            // ended is not known any more.
            relay.0.execs.take(&id);
            let _ = relay.send(&node, Message::Exec(v1::ExecWish { id, start: None })).await;
        });
        Some(ReceiverStream::new(receiver))
    }

    /// Passes an agent's lines on, until they end or nobody reads them.
    pub(super) async fn receive_logs(&self, request: Request<Streaming<v1::UploadLogsRequest>>) -> Result<(), Status> {
        let (caller, mut from) = answering(request)?;
        let id = from.message().await?.map(|first| first.id).unwrap_or_default();
        let wish = self.0.logs.take_by(&caller, &id);
        let wish = wish.ok_or_else(|| Status::not_found("nobody waits for this log"))?;
        pass(from, &wish.answers, |message| {
            let about =
                v1::StreamLogsResponse { container_id: message.container_id, slot: message.slot, ..Default::default() };
            message.lines.into_iter().map(move |line| v1::StreamLogsResponse { line: Some(line), ..about.clone() })
        })
        .await
    }

    /// Passes on what an agent says of its containers, until nobody looks any more.
    pub(super) async fn receive_stats(
        &self,
        request: Request<Streaming<v1::UploadStatsRequest>>,
    ) -> Result<(), Status> {
        let (caller, mut from) = answering(request)?;
        let id = from.message().await?.map(|first| first.id).unwrap_or_default();
        let wish = self.0.stats.take_by(&caller, &id);
        let wish = wish.ok_or_else(|| Status::not_found("nobody waits for these statistics"))?;
        pass(from, &wish.answers, |message| message.stats).await
    }

    /// Connects an agent with the caller whose command it runs. Each direction goes at its own pace: a command that does not
    /// read must not keep what it writes.
    pub(super) async fn serve_exec(
        &self,
        request: Request<Streaming<v1::ServeExecRequest>>,
    ) -> Result<ReceiverStream<Result<v1::ExecRequest, Status>>, Status> {
        let (caller, mut from) = answering(request)?;
        let id = from.message().await?.map(|first| first.id).unwrap_or_default();
        let wish = self.0.execs.take_by(&caller, &id);
        let wish = wish.ok_or_else(|| Status::not_found("nobody waits for this command"))?;
        let Wish { answers: responses, brought: mut requests, .. } = wish;
        let (to_agent, input) = mpsc::channel(AHEAD);
        tokio::spawn(async move {
            // When the caller's stream ends, so does the command's input.
            while let Ok(Some(request)) = requests.message().await {
                if to_agent.send(Ok(request)).await.is_err() {
                    return;
                }
            }
        });
        tokio::spawn(async move {
            loop {
                let response = match from.message().await {
                    Ok(Some(message)) => Ok(message.response.unwrap_or_default()),
                    Ok(None) => return,
                    Err(_) => Err(Status::unavailable("the container's node went away")),
                };
                let over = response.is_err();
                if responses.send(response).await.is_err() || over {
                    return;
                }
            }
        });
        Ok(ReceiverStream::new(input))
    }
}

/// Who answers, and what.
fn answering<T>(request: Request<T>) -> Result<(Caller, T), Status> {
    let caller = Caller::of(&request)?.clone();
    Ok((caller, request.into_inner()))
}

/// Passes parts of messages on, until there are no more or nobody takes them.
async fn pass<M, P: IntoIterator>(
    mut from: Streaming<M>,
    to: &Answers<P::Item>,
    parts: impl Fn(M) -> P,
) -> Result<(), Status> {
    loop {
        tokio::select! {
            () = to.closed() => return Ok(()),
            message = from.message() => {
                let message = match message {
                    Ok(Some(message)) => message,
                    Ok(None) => return Ok(()),
                    Err(status) => {
                        let _ = to.send(Err(Status::unavailable("the container's node went away"))).await;
                        return Err(status);
                    }
                };
                for part in parts(message) {
                    if to.send(Ok(part)).await.is_err() {
                        return Ok(());
                    }
                }
            }
        }
    }
}
