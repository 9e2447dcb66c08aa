//! Talking to other managers. Messages are consensus's own, as JSON; how they travel is the [`Transport`]'s business.

use std::{future::Future, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use openraft::{
    BasicNode, OptionalSend, RaftNetworkFactory, RaftNetworkV2,
    errors::{RPCError, ReplicationClosed, StreamingError, Unreachable},
    network::RPCOption,
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest, TransferLeaderResponse,
        VoteRequest, VoteResponse,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    snapshot::SnapshotBytes,
    transfer::{self, Taken},
    types::{Config, Vote},
};

/// How long a part of a snapshot, or the last one's installation, may take.
const PART_PATIENCE: Duration = Duration::from_secs(60);

/// A message could not be delivered, or its answer not be had.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TransportError(pub String);

/// Carries messages between managers. An answer may come late or never; nothing may come twice in one call.
pub trait Transport: Send + Sync + 'static {
    /// Delivers `message` to the manager at `address` and returns its answer, within `patience`.
    fn call<'a>(
        &'a self,
        address: &'a str,
        message: Vec<u8>,
        patience: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, TransportError>>;
}

/// Reaches nobody: the transport of a manager that is alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disconnected;

impl Transport for Disconnected {
    fn call<'a>(
        &'a self,
        address: &'a str,
        _message: Vec<u8>,
        _patience: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, TransportError>> {
        Box::pin(async move { Err(TransportError(format!("no transport leads to {address}"))) })
    }
}

/// A message between managers.
#[derive(Serialize, Deserialize)]
pub(crate) enum Message {
    Append(AppendEntriesRequest<Config>),
    Vote(VoteRequest<Config>),
    PreVote(VoteRequest<Config>),
    TransferLeader(TransferLeaderRequest<Config>),
    /// Asks which versions of commands a member's state machine reads; who does not know the question reads none of those that it
    /// is asked about for.
    Reads,
}

pub(crate) struct Network {
    pub(crate) transport: Arc<dyn Transport>,
}

impl RaftNetworkFactory<Config> for Network {
    type Network = Connection;

    async fn new_client(&mut self, _target: u64, node: &BasicNode) -> Self::Network {
        Connection { transport: Arc::clone(&self.transport), address: node.addr.clone() }
    }
}

pub(crate) struct Connection {
    transport: Arc<dyn Transport>,
    address: String,
}

impl Connection {
    async fn call<A: DeserializeOwned>(&self, message: &Message, option: &RPCOption) -> Result<A, RPCError<Config>> {
        let unreachable = |why: String| RPCError::Unreachable(Unreachable::new(&TransportError(why)));
        let payload = serde_json::to_vec(message).map_err(|error| unreachable(error.to_string()))?;
        self.exchange(payload, option.hard_ttl()).await
    }

    async fn exchange<A: DeserializeOwned>(&self, payload: Vec<u8>, patience: Duration) -> Result<A, RPCError<Config>> {
        let unreachable = |why: String| RPCError::Unreachable(Unreachable::new(&TransportError(why)));
        let answer = self.transport.call(&self.address, payload, patience).await;
        let answer = answer.map_err(|error| unreachable(error.0))?;
        // The other side's refusal travels as its words.
        let answer: Result<A, String> =
            serde_json::from_slice(&answer).map_err(|error| unreachable(error.to_string()))?;
        answer.map_err(unreachable)
    }
}

impl RaftNetworkV2<Config> for Connection {
    type SnapshotData = SnapshotBytes;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Config>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Config>, RPCError<Config>> {
        self.call(&Message::Append(rpc), &option).await
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<Config>,
        option: RPCOption,
    ) -> Result<VoteResponse<Config>, RPCError<Config>> {
        self.call(&Message::Vote(rpc), &option).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Config>,
        option: RPCOption,
    ) -> Result<VoteResponse<Config>, RPCError<Config>> {
        self.call(&Message::PreVote(rpc), &option).await
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<Config>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Config>, RPCError<Config>> {
        self.call(&Message::TransferLeader(rpc), &option).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: openraft::alias::SnapshotOf<Config, SnapshotBytes>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<Config>, StreamingError<Config>> {
        let send = async {
            let (meta, bytes) = (&snapshot.meta, &snapshot.snapshot.0);
            for part in transfer::parts(vote, meta, bytes) {
                let part = part.map_err(|error| Unreachable::new(&TransportError(error.to_string())))?;
                let taken: Taken = self.exchange(part, PART_PATIENCE.min(option.hard_ttl())).await?;
                if let Some(response) = taken.installed {
                    return Ok(response);
                }
            }
            let why = "the other manager has every part of the snapshot, and has not installed it".to_owned();
            Err(StreamingError::Unreachable(Unreachable::new(&TransportError(why))))
        };
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            response = send => response,
        }
    }
}
