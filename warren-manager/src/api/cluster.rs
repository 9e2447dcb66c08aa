use std::{pin::Pin, sync::Arc, time::Duration};

use tokio_stream::Stream;
use tonic::{Request, Response, Status};
use warren_pki::{Authority, Role, Token};
use warren_proto::v1::{self, cluster_server};
use warren_telemetry::build;

use super::{Context, Error, health};
use crate::{
    access::signing::{self, Invited, Signed},
    caller::Caller,
    data::backup,
    ids::{NodeId, OperatorId},
    messages::{
        convert,
        validate::{self, Invalid},
    },
    state::{Change, JoinToken, Manager, OLDEST_WRITTEN_SCHEMA, SealedAuthority, State, TokenRole, Transaction},
    store, telemetry,
    trust::vault::UnlockKey,
};

#[derive(Clone, Debug)]
pub(super) struct Cluster(pub(super) Context);

const MAX_NAME: usize = 253;
/// How long a leader that is to go waits for its successor.
const HAND_OVER_PATIENCE: Duration = Duration::from_secs(5);
/// How long a leader waits to hear of those that would be left.
const ANSWER_PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of a backup in one message.
const BACKUP_PART: usize = 1 << 20;
/// Letting somebody in is repeated when somebody else came first.
const ATTEMPTS: usize = 10;

fn token_role(role: v1::Role) -> Result<TokenRole, Invalid> {
    match role {
        v1::Role::Manager => Ok(TokenRole::Manager),
        v1::Role::Worker => Ok(TokenRole::Worker),
        v1::Role::Admin => Err(Invalid::new("role", "is not for machines: CreateOperator invites operators")),
        v1::Role::Unspecified => Err(Invalid::new("role", "is not given")),
    }
}

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

/// Of the voters that would be left without one: how many answer this leader, and how many there are.
fn left_without(status: &warren_raft::Status, id: u64) -> (usize, usize) {
    let left = || status.members.iter().filter(|member| member.voter && member.id != id);
    (left().filter(|member| status.answers(member.id)).count(), left().count())
}

fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    request.extensions().get().cloned().ok_or_else(|| Status::internal("who calls is not known"))
}

fn too_old(who: &str, reads: u32, schema: u32) -> Error {
    let why = "is too old, or held to an earlier version's schema";
    Error::Precondition(format!(
        "{who} {why}: it reads the state up to schema {reads}, and the cluster's is of schema {schema}"
    ))
}

fn refused() -> Error {
    Error::Refused("the token is not valid, or no longer".to_owned())
}

impl Cluster {
    async fn change(&self, changes: Vec<Change>) -> Result<(), store::Error> {
        self.0.store.transact(&Transaction { changes, ..Transaction::default() }).await.map(drop)
    }

    fn sign(&self, state: &State, request: &str, role: Role, id: &str) -> Result<Signed, Error> {
        signing::sign(state, &self.0.vault, self.0.environment.now(), request, role, id)
    }

    async fn rotate_authority(&self) -> Result<(), Error> {
        let state = self.0.store.read().await?;
        let (_, cluster) = signing::authority(&state, &self.0.vault)?;
        if state.cluster().is_some_and(|cluster| cluster.rotation.is_some()) {
            return Err(Error::Precondition("the authority is being changed already".to_owned()));
        }
        let new = Authority::generate(&cluster, signing::system_time(self.0.environment.now()))?;
        let key = self.0.vault.seal_authority(&cluster, &new.key_pem())?;
        let new = SealedAuthority { certificate: new.certificate_pem().to_owned(), key };
        Ok(self.change(vec![Change::BeginRotation(new)]).await?)
    }

    async fn confirm(&self, caller: &Caller, digest: String) -> Result<(), Error> {
        let state = self.0.store.read().await?;
        let Some(cluster) = state.cluster().filter(|cluster| cluster.rotation.is_some()) else { return Ok(()) };
        // What was true a phase ago says nothing.
        let kind = match caller.role {
            Some(Role::Manager) => "manager",
            Some(Role::Worker) => "node",
            _ => "operator",
        };
        let member = format!("{kind} {}", caller.id);
        if warren_pki::authorities_digest(&cluster.authorities()) == digest
            && state.uncertified(&digest).any(|other| other == member)
        {
            self.change(vec![Change::Certify { member, digest }]).await?;
        }
        Ok(())
    }

    async fn set_lock(&self, request: v1::SetLockRequest) -> Result<String, Error> {
        let state = self.0.store.read().await?;
        let cluster = state.cluster().ok_or_else(|| Error::Precondition("there is no cluster yet".to_owned()))?;
        let known = backup::unlock_key(&state, &self.0.vault)?;
        let wanted = match (request.locked, known.clone()) {
            (false, _) => None,
            (true, Some(known)) if !request.rotate => Some(known),
            (true, _) => Some(UnlockKey::random()?),
        };
        if wanted != known {
            let seal = |key: &UnlockKey| self.0.vault.seal_unlock_key(&cluster.id, key);
            self.change(vec![Change::SetLock(wanted.as_ref().map(seal).transpose()?)]).await?;
        }
        Ok(wanted.map(|key| key.to_string()).unwrap_or_default())
    }

    async fn generate(&self, request: v1::GenerateJoinTokenRequest) -> Result<v1::GenerateJoinTokenResponse, Error> {
        let role = token_role(request.role())?;
        let (state, now) = (self.0.store.read().await?, self.0.environment.now());
        let Invited { token, hash, expires_at } = signing::invite(&state, &self.0.vault, now, request.lifetime)?;
        let about = JoinToken { hash, role, created_at: now, expires_at };
        self.change(vec![Change::PutToken(about.clone())]).await?;
        Ok(v1::GenerateJoinTokenResponse { token, about: Some(shown(&about)) })
    }

    /// Lets somebody in whose token is good: their role, and the id that they have from now on.
    async fn admit(&self, request: &v1::JoinClusterRequest) -> Result<(Role, String), Error> {
        let hash = Token::read_secret(&request.secret).map_err(|_| refused())?.hash();
        for _ in 0..ATTEMPTS {
            let state = self.0.store.read().await?;
            let now = self.0.environment.now();
            let (what, role, change, admitted) = match state.token(&hash).filter(|token| token.expires_at > now) {
                Some(token) if token.role == TokenRole::Manager => {
                    let id = state.next_manager();
                    let manager = Manager { id, hostname: request.hostname.clone(), created_at: now, voter: true };
                    let admitted = (Role::Manager, id.to_string());
                    ("a manager", v1::Role::Manager, Change::AdmitManager(manager), admitted)
                }
                Some(_) => {
                    let own = NodeId::from(request.node_id.as_str());
                    let keeps = super::nodes::is_id(&own) && state.is_new_node(&own);
                    let id = if keeps { own } else { NodeId::generate(&*self.0.environment) };
                    let admitted = (Role::Worker, id.to_string());
                    ("a node", v1::Role::Worker, Change::AdmitNode { id }, admitted)
                }
                None => {
                    let id = state.invited(&hash, now).ok_or_else(refused)?.id.clone();
                    let admitted = (Role::Admin, id.to_string());
                    ("an operator", v1::Role::Admin, Change::AdmitOperator { id, hash: hash.clone() }, admitted)
                }
            };
            if request.taken().any(|taken| taken == role) {
                return Err(Error::Precondition(format!("the token is for {what}")));
            }
            let reads = request.schema.max(OLDEST_WRITTEN_SCHEMA);
            if role == v1::Role::Manager && reads < state.schema() {
                return Err(too_old("the newcomer", reads, state.schema()));
            }
            match self.change(vec![change]).await {
                Err(store::Error::Rejected(crate::state::Rejection::Conflict(_))) => {}
                other => return other.map(|()| admitted).map_err(Error::from),
            }
        }
        Err(Error::Precondition("too many join at the same time; try again".to_owned()))
    }

    async fn join(&self, request: v1::JoinClusterRequest) -> Result<v1::JoinClusterResponse, Error> {
        // Whoever has no token makes no work.
        let state = self.0.store.read().await?;
        let known = Token::read_secret(&request.secret).map(|secret| secret.hash());
        if !known
            .is_ok_and(|hash| state.token(&hash).is_some() || state.invited(&hash, self.0.environment.now()).is_some())
        {
            return Err(refused());
        }
        if request.hostname.len() > MAX_NAME || !validate::is_printable(&request.hostname) {
            let why = format!("is longer than {MAX_NAME} bytes, or has other than printable ASCII characters in it");
            return Err(Invalid::new("hostname", why).into());
        }
        // What cannot be signed lets nobody in.
        self.sign(&state, &request.certificate_request, Role::Worker, "nobody")?;
        let (role, id) = self.admit(&request).await?;
        let state = self.0.store.view();
        let Signed { certificate, authorities } = self.sign(&state, &request.certificate_request, role, &id)?;
        tracing::info!(%role, id, hostname = request.hostname, "a machine has joined");
        let managers = self.0.store.raft().status().members.into_iter().map(|member| member.address);
        Ok(v1::JoinClusterResponse {
            role: match role {
                Role::Manager => v1::Role::Manager,
                Role::Worker => v1::Role::Worker,
                Role::Admin => v1::Role::Admin,
            }
            .into(),
            id,
            cluster_id: state.cluster().map(|cluster| cluster.id.clone()).unwrap_or_default(),
            certificate,
            authorities,
            managers: managers.collect(),
            key_of_secrets: if role == Role::Manager { self.0.vault.key() } else { Default::default() },
        })
    }

    async fn enter(&self, caller: &Caller, address: &str) -> Result<(), Error> {
        let id: u64 = caller.id.parse().map_err(|_| Error::Refused("a manager's id is a number".to_owned()))?;
        let state = self.0.store.read().await?;
        let Some(manager) = state.manager(id) else {
            return Err(Error::Refused(format!("manager {id} is not in this cluster")));
        };
        warren_pki::check_address(address).map_err(|error| Invalid::new("address", error.to_string()))?;
        let raft = self.0.store.raft();
        // What is started need not be what has joined. Of the oldest schema are managers that do not know the question.
        if state.schema() > OLDEST_WRITTEN_SCHEMA {
            match raft.reads_at(address).await {
                Some(reads) if reads < state.schema() => {
                    return Err(too_old(&format!("manager {id}"), reads, state.schema()));
                }
                Some(_) => {}
                None => {
                    return Err(Error::Precondition(format!(
                        "manager {id} does not say at {address} which schema it reads"
                    )));
                }
            }
        }
        let entered =
            if manager.voter { raft.add_voter(id, address).await } else { raft.add_learner(id, address).await };
        entered.map_err(store::Error::from)?;
        tracing::info!(manager = id, address, "a manager takes part");
        Ok(())
    }

    /// Whether a manager may go, or lose its vote. One that leads hands over first; then its successor is to be asked again.
    async fn let_go(&self, id: u64) -> Result<(), Error> {
        let raft = self.0.store.raft();
        let deadline = tokio::time::Instant::now() + ANSWER_PATIENCE;
        let status = loop {
            let status = raft.status();
            let (answer, all) = left_without(&status, id);
            if all == 0 {
                return Err(Error::Precondition(format!("manager {id} is the only one that votes")));
            }
            let is_voter = status.members.iter().any(|member| member.id == id && member.voter);
            if !is_voter || !status.is_leader || answer > all / 2 {
                break status;
            }
            // Who has just begun to lead has not heard everybody yet.
            if tokio::time::Instant::now() > deadline {
                return Err(Error::Precondition(format!(
                    "of the {all} managers that would be left to vote {answer} can be reached, which is no majority"
                )));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        if id != status.id {
            return Ok(());
        }
        raft.hand_over().await.map_err(store::Error::from)?;
        let deadline = tokio::time::Instant::now() + HAND_OVER_PATIENCE;
        while raft.status().is_leader && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Err(Error::Store(store::Error::Raft(warren_raft::Error::NotLeader { leader: raft.status().leader })))
    }

    fn manager(state: &State, id: u64) -> Result<&Arc<Manager>, Error> {
        state.manager(id).ok_or_else(|| Error::NotFound { kind: "manager", name: id.to_string() })
    }

    async fn remove(&self, id: u64) -> Result<(), Error> {
        let state = self.0.store.read().await?;
        Self::manager(&state, id)?;
        self.let_go(id).await?;
        self.0.store.raft().remove(id).await.map_err(store::Error::from)?;
        self.change(vec![Change::RemoveManager { id }]).await?;
        tracing::info!(manager = id, "a manager was removed");
        Ok(())
    }

    async fn set_voter(&self, id: u64, voter: bool) -> Result<(), Error> {
        let state = self.0.store.read().await?;
        let known = Self::manager(&state, id)?;
        if !voter {
            self.let_go(id).await?;
        }
        // What it is to be comes first: should this manager end in between, the leader makes it so.
        if known.voter != voter {
            self.change(vec![Change::SetManager { id, voter }]).await?;
        }
        let raft = self.0.store.raft();
        let member = raft.status().members.into_iter().find(|member| member.id == id);
        let changed = match member {
            Some(member) if voter && !member.voter => raft.add_voter(id, &member.address).await,
            Some(member) if !voter && member.voter => raft.demote(id).await,
            // One that has not taken part yet is told when it does.
            _ => Ok(()),
        };
        changed.map_err(store::Error::from)?;
        Ok(())
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
