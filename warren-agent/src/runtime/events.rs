//! containerd's events. They are hints, which may be lost or late: whoever gets one looks at what is there.

use containerd_client::services::v1 as api;
use tokio::sync::mpsc;

use super::{Containerd, Error};

/// Sends a hint whenever a task of the namespace was started, until the receiver or the daemon is gone. Hints that nobody has
/// taken yet are one.
///
/// # Errors
///
/// When the daemon goes away.
pub async fn watch_starts(containerd: &Containerd, hints: &mpsc::Sender<()>) -> Result<(), Error> {
    let filter = format!("namespace=={},topic==\"/tasks/start\"", containerd.namespace());
    let request = containerd.unlimited_request(api::SubscribeRequest { filters: vec![filter] });
    // This returns with the first event only: the daemon sends no headers before.
    let subscribed = containerd.client().events().subscribe(request).await;
    let mut stream = subscribed.map_err(Error::call("subscribing to events"))?.into_inner();
    while stream.message().await.map_err(Error::call("receiving events"))?.is_some() {
        if let Err(mpsc::error::TrySendError::Closed(())) = hints.try_send(()) {
            return Ok(());
        }
    }
    Ok(())
}
