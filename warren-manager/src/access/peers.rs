//! Other managers, by their addresses: consensus's messages to them, and calls that only a leader answers.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::future::BoxFuture;
use tonic::transport::Channel;
use warren_pki::{Credentials, Dialer};
use warren_proto::v1::{RaftMessage, raft_client::RaftClient};
use warren_raft::{Transport, TransportError};

/// Many entries may come in one message, each of up to 8 MiB.
pub(crate) const MAX_MESSAGE: usize = 1 << 30;

/// Connections to other managers, kept. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Peers {
    credentials: Credentials,
    channels: Arc<Mutex<HashMap<String, Channel>>>,
}

impl Peers {
    /// Nobody is connected yet.
    pub(crate) fn new(credentials: Credentials) -> Self {
        Self { credentials, channels: Arc::default() }
    }

    /// The connection to the manager at `HOST:PORT`. It connects when it is used, and again when it is lost.
    ///
    /// # Errors
    ///
    /// When that is no address.
    pub(crate) fn channel(&self, address: &str) -> Result<Channel, warren_pki::Error> {
        // Every change is one insertion: a panic leaves it whole.
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let channel = Dialer::new(address, &self.credentials)?.lazy();
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }
}

impl Transport for Peers {
    fn call<'a>(
        &'a self,
        address: &'a str,
        message: Vec<u8>,
        patience: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, TransportError>> {
        Box::pin(async move {
            let failed = |why: String| TransportError(why);
            let channel = self.channel(address).map_err(|error| failed(error.to_string()))?;
            let mut client =
                RaftClient::new(channel).max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE);
            let exchanged = client.exchange(RaftMessage { payload: message });
            match tokio::time::timeout(patience, exchanged).await {
                Ok(Ok(answer)) => Ok(answer.into_inner().payload),
                Ok(Err(status)) => Err(failed(status.message().to_owned())),
                Err(_) => Err(failed(format!("no answer within {patience:?}"))),
            }
        })
    }
}
