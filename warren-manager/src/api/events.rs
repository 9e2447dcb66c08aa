use std::{pin::Pin, sync::Arc, time::Duration};

use tokio::sync::{broadcast::error::RecvError, mpsc};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};
use warren_proto::v1::{self, events_server};

use super::Context;
use crate::{
    messages::validate::Invalid,
    telemetry::feed::{Feed, REMEMBERED},
};

#[derive(Clone, Debug)]
pub(super) struct Events(pub(super) Context, pub(super) Feed);

/// Events that wait for a slow follower.
const QUEUE: usize = 256;
const MAX_TYPES: usize = 100;

fn is_asked_for(types: &[String], event: &v1::Event) -> bool {
    types.is_empty() || types.iter().any(|asked| event.r#type.starts_with(asked.as_str()))
}

/// The oldest revision that whoever wants all since another may go on from, when what is remembered does not reach back so far.
fn forgotten(remembered: &[Arc<v1::Event>], since: u64, most: usize) -> Option<u64> {
    let oldest = remembered.first().filter(|_| remembered.len() >= most)?.revision;
    (0 < since && since < oldest).then_some(oldest)
}

type Sent = Result<v1::StreamEventsResponse, Status>;

/// How long a leader takes to begin to watch, at most.
const BEGIN_PATIENCE: Duration = Duration::from_secs(2);

/// Fails when nobody follows any more.
async fn send(to: &mpsc::Sender<Sent>, event: Arc<v1::Event>) -> Result<(), ()> {
    let event = Some(v1::Event::clone(&event));
    to.send(Ok(v1::StreamEventsResponse { event })).await.map_err(drop)
}

#[tonic::async_trait]
impl events_server::Events for Events {
    type StreamEventsStream = Pin<Box<dyn Stream<Item = Sent> + Send>>;

    async fn stream_events(
        &self,
        request: Request<v1::StreamEventsRequest>,
    ) -> Result<Response<Self::StreamEventsStream>, Status> {
        let v1::StreamEventsRequest { event_types, follow, since_revision, tail } = request.into_inner();
        if event_types.len() > MAX_TYPES {
            let why = format!("are more than {MAX_TYPES}");
            return Err(super::Error::from(Invalid::new("event_types", why)).into());
        }
        self.0.store.read().await.map_err(super::status)?;
        let followed = tokio::time::timeout(BEGIN_PATIENCE, self.1.follow()).await;
        let (remembered, mut news) = followed.map_err(|_| Status::unavailable("this manager no longer leads"))?;
        if let Some(oldest) = forgotten(&remembered, since_revision, REMEMBERED) {
            let why = format!("what came after revision {since_revision} is not all remembered: ask from {oldest} on");
            return Err(Status::out_of_range(why));
        }
        let mut leads = self.1.leads();
        let (sender, receiver) = mpsc::channel(QUEUE);
        let wanted = move |event: &Arc<v1::Event>| is_asked_for(&event_types, event);
        tokio::spawn(async move {
            // What happens from now on is news, whatever the revision: that of a node's silence is no other than before.
            let since = |event: &Arc<v1::Event>| event.revision > since_revision && wanted(event);
            let remembered: Vec<_> = remembered.into_iter().filter(since).collect();
            let skipped = tail.map_or(0, |tail| remembered.len().saturating_sub(tail as usize));
            for event in remembered.into_iter().skip(skipped) {
                if send(&sender, event).await.is_err() {
                    return;
                }
            }
            if !follow {
                return;
            }
            loop {
                let event = tokio::select! {
                    event = news.recv() => event,
                    // What happens from now on, another manager sees.
                    () = async { drop(leads.wait_for(|leads| !*leads).await) } => {
                        let _ = sender.send(Err(Status::unavailable("this manager no longer leads"))).await;
                        return;
                    }
                    () = sender.closed() => return,
                };
                let sent = match event {
                    Ok(event) if wanted(&event) => send(&sender, event).await,
                    Ok(_) => Ok(()),
                    Err(RecvError::Lagged(missed)) => {
                        let why = format!("{missed} events came faster than they were read: follow again");
                        let _ = sender.send(Err(Status::data_loss(why))).await;
                        return;
                    }
                    Err(RecvError::Closed) => return,
                };
                if sent.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_wants_more_than_is_remembered_is_told() {
        let event = |revision| Arc::new(v1::Event { revision, ..Default::default() });
        let all: Vec<_> = (5..8).map(event).collect();
        assert_eq!(forgotten(&all, 0, 3), None, "whatever there is");
        assert_eq!(forgotten(&all, 4, 3), Some(5));
        assert_eq!(forgotten(&all, 5, 3), None);
        assert_eq!(forgotten(&all, 4, 4), None, "nothing was forgotten yet");
        assert_eq!(forgotten(&[], 4, 3), None);
    }
}
