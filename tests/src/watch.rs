use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use warren_pki::Dialer;
use warren_proto::v1::{self, containers_client::ContainersClient, watch_containers_response::Change};

/// Follows the containers of a manager through its API, and remembers the last that it said of each, of those that are gone
/// as well. Ends with its value.
#[derive(Debug)]
pub struct Watch {
    runtime: Option<tokio::runtime::Runtime>,
    seen: Arc<Mutex<BTreeMap<String, v1::Container>>>,
}

impl Watch {
    /// Watches the manager behind `socket`, beginning with what there is.
    #[must_use]
    pub fn start(socket: &Path) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let seen = Arc::<Mutex<BTreeMap<_, _>>>::default();
        let stream = runtime.block_on(async {
            let channel = Dialer::socket(socket).expect("a path").connect().await.expect("the API answers");
            let mut client = ContainersClient::new(channel);
            client.watch_containers(v1::WatchContainersRequest::default()).await.expect("a watch").into_inner()
        });
        runtime.spawn(follow(stream, Arc::clone(&seen)));
        Self { runtime: Some(runtime), seen }
    }

    /// The last that was said of each container, by id.
    #[must_use]
    pub fn seen(&self) -> BTreeMap<String, v1::Container> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn follow(
    mut stream: tonic::Streaming<v1::WatchContainersResponse>,
    seen: Arc<Mutex<BTreeMap<String, v1::Container>>>,
) {
    while let Ok(Some(message)) = stream.message().await {
        if let Some(Change::Changed(container)) = message.change {
            seen.lock().unwrap_or_else(PoisonError::into_inner).insert(container.id.clone(), container);
        }
    }
}
