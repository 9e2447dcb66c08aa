//! Between whoever wants to see a container's log and the node that has it: a request goes down the agent's session, the
//! lines come up in a call of their own.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::mpsc;
use tonic::{Status, Streaming};
use warren_proto::v1::{self, manager_message};

use crate::ids::NodeId;

/// Lines on their way; whoever does not read holds the agent's reading up, and nothing else.
const LINES_AHEAD: usize = 256;

type Session = mpsc::Sender<Result<v1::ManagerMessage, Status>>;

#[derive(Debug, Default)]
struct Known {
    sessions: HashMap<NodeId, Session>,
    waiting: HashMap<String, mpsc::Sender<v1::LogLine>>,
}

/// Requests for logs. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct LogBroker(Arc<Mutex<Known>>);

impl LogBroker {
    fn known(&self) -> MutexGuard<'_, Known> {
        // Every change is one insertion or removal: a panic leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node's session is this now.
    pub(super) fn opened(&self, node: &NodeId, session: Session) {
        self.known().sessions.insert(node.clone(), session);
    }

    /// Asks a node for a container's lines; `None` when it has no session.
    pub(crate) async fn request(&self, node: &NodeId, request: v1::LogRequest) -> Option<mpsc::Receiver<v1::LogLine>> {
        let (sender, lines) = mpsc::channel(LINES_AHEAD);
        let session = {
            let mut known = self.known();
            known.waiting.retain(|_, waiting| !waiting.is_closed());
            known.waiting.insert(request.id.clone(), sender);
            known.sessions.get(node).cloned()
        };
        let message = v1::ManagerMessage { message: Some(manager_message::Message::Logs(request)) };
        session?.send(Ok(message)).await.ok()?;
        Some(lines)
    }

    /// Passes an agent's lines on, until they end or nobody reads them.
    pub(super) async fn receive(&self, mut from: Streaming<v1::UploadLogsRequest>) -> Result<(), Status> {
        let id = from.message().await?.map(|first| first.id).unwrap_or_default();
        let waiting = self.known().waiting.remove(&id);
        let to = waiting.ok_or_else(|| Status::not_found("nobody waits for this log"))?;
        loop {
            tokio::select! {
                () = to.closed() => return Ok(()),
                message = from.message() => {
                    let Some(message) = message? else { return Ok(()) };
                    for line in message.lines {
                        if to.send(line).await.is_err() {
                            return Ok(());
                        }
                    }
                }
            }
        }
    }
}
