mod authority;
mod joining;
mod managers;

use joining::token_role;

use std::pin::Pin;

use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use warren_proto::v1::{self, cluster_server};
use warren_telemetry::build;

use super::{Context, Error, health};
use crate::{
    access::signing::Signed,
    caller::Caller,
    data::backup,
    ids::{NodeId, OperatorId},
    messages::convert,
    state::{Change, JoinToken, State, TokenRole, Transaction},
    store, telemetry,
};

#[derive(Clone, Debug)]
pub(super) struct Cluster(pub(super) Context);

/// Bytes of a backup in one message.
const BACKUP_PART: usize = 1 << 20;
fn wire_role(role: TokenRole) -> v1::Role {
    match role {
        TokenRole::Manager => v1::Role::Manager,
        TokenRole::Worker => v1::Role::Worker,
    }
}

fn shown(token: &JoinToken) -> v1::JoinToken {
    v1::JoinToken {
        id: token.hash.chars().take(12).collect(),
        role: wire_role(token.role).into(),
        created_at: Some(token.created_at.to_proto()),
        expires_at: Some(token.expires_at.to_proto()),
    }
}

/// What the change of the authority waits for.
fn rotation(state: &State) -> Option<v1::Rotation> {
    let cluster = state.cluster()?;
    let phase = match cluster.rotation.as_ref()?.signs {
        false => v1::RotationPhase::Learning,
        true => v1::RotationPhase::Renewing,
    };
    let digest = warren_pki::authorities_digest(&cluster.authorities());
    let waits_for = state.uncertified(&digest).map(|member| named(state, member)).collect();
    Some(v1::Rotation { phase: phase.into(), waits_for, digest })
}

/// A member as people know it.
fn named(state: &State, member: String) -> String {
    let name = match member.split_once(' ') {
        Some(("node", id)) => state.node(&NodeId::from(id)).map(|node| node.description.hostname.clone()),
        Some(("operator", id)) => state.operator(&OperatorId::from(id)).map(|operator| operator.name.clone()),
        _ => None,
    };
    match (member.split_once(' '), name.filter(|name| !name.is_empty())) {
        (Some((kind, _)), Some(name)) => format!("{kind} {name}"),
        _ => member,
    }
}

fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    request.extensions().get().cloned().ok_or_else(|| Status::internal("who calls is not known"))
}

impl Cluster {
    async fn change(&self, changes: Vec<Change>) -> Result<(), store::Error> {
        self.0.store.transact(&Transaction { changes, ..Transaction::default() }).await.map(drop)
    }
}

/// Reading is no event; but whoever reads this can open every secret.
fn told_to_caller(what: &str) {
    let caller = Caller::current().map(|caller| caller.actor());
    let (by, address) = caller.map(|actor| (actor.id, actor.address)).unwrap_or_default();
    tracing::info!(by, address, "{what}");
}

#[tonic::async_trait]
impl cluster_server::Cluster for Cluster {
    async fn get_cluster_info(
        &self,
        _request: Request<v1::GetClusterInfoRequest>,
    ) -> Result<Response<v1::GetClusterInfoResponse>, Status> {
        // Answered by any manager from what it knows: it is what one looks at when there is no quorum.
        let status = self.0.store.raft().status();
        let state = self.0.store.view();
        let leader = telemetry::leader(&status);
        let managers = status.members.iter().map(|member| v1::Manager {
            id: member.id,
            address: member.address.clone(),
            voter: member.voter,
            hostname: state.manager(member.id).map(|manager| manager.hostname.clone()).unwrap_or_default(),
            leader: leader == Some(member.id),
            lag: status.lag.get(&member.id).copied().unwrap_or(0),
            silent_for: status
                .heard
                .get(&member.id)
                .filter(|_| status.is_leader)
                .map(|silent| convert::wire_duration(*silent)),
        });
        let has_come = |id| status.members.iter().any(|member| member.id == id);
        let awaited = state.managers().filter(|manager| !has_come(manager.id)).map(|manager| v1::Manager {
            id: manager.id,
            voter: manager.voter,
            hostname: manager.hostname.clone(),
            ..Default::default()
        });
        Ok(Response::new(v1::GetClusterInfoResponse {
            cluster_id: state.cluster().map(|cluster| cluster.id.clone()).unwrap_or_default(),
            manager_id: status.id,
            leader_id: leader.unwrap_or(0),
            term: status.term,
            last_log_index: status.last_log_index,
            applied_index: status.applied_index,
            managers: managers.collect(),
            awaited: awaited.collect(),
            version: build::LONG_VERSION.to_owned(),
            locked: state.cluster().is_some_and(|cluster| cluster.lock.is_some()),
            rotation: rotation(&state),
            schema: state.schema(),
        }))
    }

    async fn get_cluster_health(
        &self,
        _request: Request<v1::GetClusterHealthRequest>,
    ) -> Result<Response<v1::GetClusterHealthResponse>, Status> {
        // Waits for a majority: without one there is nothing to say but that.
        let state = self.0.store.read().await.map_err(super::status)?;
        let status = self.0.store.raft().status();
        let checks = health::checks(
            &status,
            &state,
            |node| self.0.liveness.health(node),
            |node| self.0.liveness.conditions(node),
        );
        Ok(Response::new(v1::GetClusterHealthResponse { checks }))
    }

    async fn generate_join_token(
        &self,
        request: Request<v1::GenerateJoinTokenRequest>,
    ) -> Result<Response<v1::GenerateJoinTokenResponse>, Status> {
        Ok(Response::new(self.generate(request.into_inner()).await?))
    }

    async fn list_join_tokens(
        &self,
        _request: Request<v1::ListJoinTokensRequest>,
    ) -> Result<Response<v1::ListJoinTokensResponse>, Status> {
        let state = self.0.store.read().await.map_err(super::status)?;
        let now = self.0.environment.now();
        let mut tokens: Vec<_> = state.tokens().filter(|token| token.expires_at > now).collect();
        tokens.sort_by_key(|token| (token.created_at, &token.hash));
        Ok(Response::new(v1::ListJoinTokensResponse { tokens: tokens.into_iter().map(|token| shown(token)).collect() }))
    }

    async fn revoke_join_tokens(
        &self,
        request: Request<v1::RevokeJoinTokensRequest>,
    ) -> Result<Response<v1::RevokeJoinTokensResponse>, Status> {
        let role = token_role(request.into_inner().role()).map_err(Error::from)?;
        let state = self.0.store.read().await.map_err(super::status)?;
        let revoked = state.tokens().filter(|token| token.role == role).count();
        self.change(vec![Change::RevokeTokens { role }]).await.map_err(super::status)?;
        Ok(Response::new(v1::RevokeJoinTokensResponse { revoked: u32::try_from(revoked).unwrap_or(u32::MAX) }))
    }

    async fn join_cluster(
        &self,
        request: Request<v1::JoinClusterRequest>,
    ) -> Result<Response<v1::JoinClusterResponse>, Status> {
        Ok(Response::new(self.join(request.into_inner()).await?))
    }

    async fn request_certificate(
        &self,
        request: Request<v1::RequestCertificateRequest>,
    ) -> Result<Response<v1::RequestCertificateResponse>, Status> {
        let caller = caller(&request)?;
        let role = caller.role.filter(|_| !caller.is_root());
        let role = role.ok_or_else(|| Status::permission_denied("root at a socket has no certificate"))?;
        let state = self.0.store.read().await.map_err(super::status)?;
        let request = request.into_inner();
        let Signed { certificate, authorities } = self.sign(&state, &request.certificate_request, role, &caller.id)?;
        Ok(Response::new(v1::RequestCertificateResponse { certificate, authorities }))
    }

    async fn enter_manager(
        &self,
        request: Request<v1::EnterManagerRequest>,
    ) -> Result<Response<v1::EnterManagerResponse>, Status> {
        let caller = caller(&request)?;
        self.enter(&caller, &request.into_inner().address).await?;
        Ok(Response::new(v1::EnterManagerResponse {}))
    }

    async fn remove_manager(
        &self,
        request: Request<v1::RemoveManagerRequest>,
    ) -> Result<Response<v1::RemoveManagerResponse>, Status> {
        self.remove(request.into_inner().id).await?;
        Ok(Response::new(v1::RemoveManagerResponse {}))
    }

    async fn update_manager(
        &self,
        request: Request<v1::UpdateManagerRequest>,
    ) -> Result<Response<v1::UpdateManagerResponse>, Status> {
        let v1::UpdateManagerRequest { id, voter } = request.into_inner();
        self.set_voter(id, voter).await?;
        Ok(Response::new(v1::UpdateManagerResponse {}))
    }

    async fn confirm_authorities(
        &self,
        request: Request<v1::ConfirmAuthoritiesRequest>,
    ) -> Result<Response<v1::ConfirmAuthoritiesResponse>, Status> {
        let caller = caller(&request)?;
        self.confirm(&caller, request.into_inner().digest).await?;
        Ok(Response::new(v1::ConfirmAuthoritiesResponse {}))
    }

    async fn rotate_authority(
        &self,
        _request: Request<v1::RotateAuthorityRequest>,
    ) -> Result<Response<v1::RotateAuthorityResponse>, Status> {
        self.rotate_authority().await?;
        Ok(Response::new(v1::RotateAuthorityResponse {}))
    }

    async fn set_lock(&self, request: Request<v1::SetLockRequest>) -> Result<Response<v1::SetLockResponse>, Status> {
        let unlock_key = self.set_lock(request.into_inner()).await?;
        Ok(Response::new(v1::SetLockResponse { unlock_key }))
    }

    async fn get_unlock_key(
        &self,
        _request: Request<v1::GetUnlockKeyRequest>,
    ) -> Result<Response<v1::GetUnlockKeyResponse>, Status> {
        let state = self.0.store.read().await.map_err(super::status)?;
        let key = backup::unlock_key(&state, &self.0.vault).map_err(Error::from)?;
        told_to_caller("the unlock key was told");
        let unlock_key = key.map(|key| key.to_string()).unwrap_or_default();
        Ok(Response::new(v1::GetUnlockKeyResponse { unlock_key }))
    }

    type BackupStream = Pin<Box<dyn Stream<Item = Result<v1::BackupResponse, Status>> + Send>>;

    async fn backup(&self, _request: Request<v1::BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        let state = self.0.store.read().await.map_err(super::status)?;
        told_to_caller("a backup is made, and told");
        let (vault, now) = (self.0.vault.clone(), self.0.environment.now());
        let made = tokio::task::spawn_blocking(move || backup::encode(&state, &vault, now)).await;
        let bytes = made.map_err(std::io::Error::other).flatten();
        let bytes = bytes.map_err(|error| Status::internal(error.to_string()))?;
        let parts = bytes.chunks(BACKUP_PART).map(|part| Ok(v1::BackupResponse { data: part.to_vec() }));
        let parts: Vec<_> = parts.collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }
}
