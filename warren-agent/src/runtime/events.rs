//! containerd's events. They are hints: after every (re)connection the containers are listed, which is the truth.

use containerd_client::{events::TaskExit, services::v1 as api};
use prost::Message as _;
use tokio::sync::mpsc;

use super::{Containerd, Error};

/// A task's first process exited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitEvent {
    /// The container.
    pub id: String,
    /// 128 + signal for a signal.
    pub exit_code: i32,
}

/// Sends the exits of the namespace's tasks to `exits` until the receiver or the daemon is gone.
///
/// # Errors
///
/// When the daemon goes away.
pub async fn watch_exits(containerd: &Containerd, exits: &mpsc::UnboundedSender<ExitEvent>) -> Result<(), Error> {
    let filter = format!("namespace=={},topic==\"/tasks/exit\"", containerd.namespace());
    let request = containerd.unlimited_request(api::SubscribeRequest { filters: vec![filter] });
    let failed = Error::call("subscribing to events");
    let mut stream = containerd.client().events().subscribe(request).await.map_err(failed)?.into_inner();
    while let Some(envelope) = stream.message().await.map_err(Error::call("receiving events"))? {
        let Some(event) = envelope.event else { continue };
        // containerd's type names have no slash, so `Any::to_msg` would refuse them.
        let Ok(exit) = TaskExit::decode(event.value.as_slice()) else { continue };
        // An exec's exit carries the exec's id.
        if exit.id == exit.container_id {
            let event = ExitEvent { id: exit.container_id, exit_code: exit.exit_status as i32 };
            if exits.send(event).is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}
