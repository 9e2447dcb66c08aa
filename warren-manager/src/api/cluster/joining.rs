//! Join tokens, and who comes with one.

use warren_pki::{Role, Token};
use warren_proto::v1;

use super::{Cluster, shown};
use crate::{
    access::signing::{self, Invited, Signed},
    api::{Error, nodes},
    ids::NodeId,
    messages::validate::{self, Invalid},
    state::{Change, JoinToken, Manager, OLDEST_WRITTEN_SCHEMA, TokenRole},
    store,
};

const MAX_NAME: usize = 253;
/// Letting somebody in is repeated when somebody else came first.
const ATTEMPTS: usize = 10;

pub(super) fn token_role(role: v1::Role) -> Result<TokenRole, Invalid> {
    match role {
        v1::Role::Manager => Ok(TokenRole::Manager),
        v1::Role::Worker => Ok(TokenRole::Worker),
        v1::Role::Admin => Err(Invalid::new("role", "is not for machines: CreateOperator invites operators")),
        v1::Role::Unspecified => Err(Invalid::new("role", "is not given")),
    }
}

pub(super) fn too_old(who: &str, reads: u32, schema: u32) -> Error {
    let why = "is too old, or held to an earlier version's schema";
    Error::Precondition(format!(
        "{who} {why}: it reads the state up to schema {reads}, and the cluster's is of schema {schema}"
    ))
}

fn refused() -> Error {
    Error::Refused("the token is not valid, or no longer".to_owned())
}

impl Cluster {
    pub(super) async fn generate(
        &self,
        request: v1::GenerateJoinTokenRequest,
    ) -> Result<v1::GenerateJoinTokenResponse, Error> {
        let role = token_role(request.role())?;
        let (state, now) = (self.0.store.read().await?, self.0.environment.now());
        let Invited { token, hash, expires_at } = signing::invite(&state, &self.0.vault, now, request.lifetime)?;
        let about = JoinToken { hash, role, created_at: now, expires_at };
        self.change(vec![Change::PutToken(about.clone())]).await?;
        Ok(v1::GenerateJoinTokenResponse { token, about: Some(shown(&about)) })
    }

    /// Lets somebody in whose token is good: their role, and the id that they have from now on.
    pub(super) async fn admit(&self, request: &v1::JoinClusterRequest) -> Result<(Role, String), Error> {
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
                    let keeps = nodes::is_id(&own) && state.is_new_node(&own);
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

    pub(super) async fn join(&self, request: v1::JoinClusterRequest) -> Result<v1::JoinClusterResponse, Error> {
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
}
