use std::sync::Arc;

use tonic::{Request, Response, Status};
use warren_proto::v1::{self, SecretKind, secrets_server};

use super::{Context, Error, lookup, pages::page};
use crate::{
    ids::SecretId,
    messages::validate::{Invalid, object_name},
    state::{Change, Expected, Secret, State, Transaction},
};

#[derive(Clone, Debug)]
pub(super) struct Secrets(pub(super) Context);

/// Docker's limit is the same; larger things are images and volumes.
const MAX_SIZE: usize = 500 << 10;
const MAX_LABELS: usize = 64 << 10;

fn kind_of(wire: i32) -> Result<SecretKind, Error> {
    match SecretKind::try_from(wire) {
        Ok(SecretKind::Config) => Ok(SecretKind::Config),
        Ok(SecretKind::Secret | SecretKind::Unspecified) => Ok(SecretKind::Secret),
        Err(_) => Err(Invalid::new("kind", format!("{wire} is not known")).into()),
    }
}

fn checked(data: &[u8]) -> Result<(), Error> {
    if data.is_empty() || data.len() > MAX_SIZE {
        let why = format!("is {} bytes long, not 1 to {MAX_SIZE}", data.len());
        return Err(Invalid::new("data", why).into());
    }
    Ok(())
}

impl Secrets {
    /// As callers see it: only of a config what it holds.
    fn shown(&self, secret: &Secret, whole: bool) -> Result<v1::Secret, Error> {
        let readable = whole && secret.kind == SecretKind::Config;
        let opened = || self.0.vault.open_sealed(&secret.id, secret.sequence, &secret.sealed);
        let data = if readable { opened()? } else { Vec::new() };
        Ok(v1::Secret {
            id: secret.id.to_string(),
            version: secret.version,
            kind: secret.kind.into(),
            name: secret.name.clone(),
            labels: secret.labels.clone(),
            created_at: Some(secret.created_at.to_proto()),
            updated_at: Some(secret.updated_at.to_proto()),
            sequence: secret.sequence,
            size_bytes: secret.size,
            data,
        })
    }

    fn shown_in(&self, state: &State, id: &SecretId) -> Result<v1::Secret, Error> {
        let missing = || Error::NotFound { kind: "secret", name: id.to_string() };
        self.shown(state.secret(id).ok_or_else(missing)?, false)
    }

    /// A new secret, checked.
    pub(super) fn first(&self, request: v1::CreateSecretRequest) -> Result<Secret, Error> {
        let kind = kind_of(request.kind)?;
        object_name(&request.name)?;
        if request.labels.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() > MAX_LABELS {
            return Err(Invalid::new("labels", format!("are longer than {MAX_LABELS} bytes together")).into());
        }
        checked(&request.data)?;
        let (id, now) = (SecretId::generate(&*self.0.environment), self.0.environment.now());
        let sealed = self.0.vault.seal(&id, 1, &request.data)?;
        Ok(Secret {
            id,
            version: 0,
            kind,
            name: request.name,
            labels: request.labels,
            created_at: now,
            updated_at: now,
            sequence: 1,
            size: request.data.len() as u64,
            sealed,
        })
    }

    async fn create(&self, mut request: v1::CreateSecretRequest) -> Result<v1::Secret, Error> {
        self.0.store.read().await?;
        let request_id = std::mem::take(&mut request.request_id);
        let secret = self.first(request)?;
        let (kind, name) = (secret.kind, secret.name.clone());
        let change = Change::PutSecret { secret: Box::new(secret), expected: Expected::Absent };
        self.0.store.transact(&Transaction { request_id, changes: vec![change], ..Transaction::default() }).await?;
        let state = self.0.store.view();
        self.shown(&*lookup::secret(&state, kind, &name)?, false)
    }

    async fn update(&self, request: v1::UpdateSecretRequest) -> Result<v1::Secret, Error> {
        checked(&request.data)?;
        let state = self.0.store.read().await?;
        let known = lookup::secret(&state, kind_of(request.kind)?, &request.secret)?;
        // The same value again is no news for anybody.
        let same =
            || Ok::<_, Error>(self.0.vault.open_sealed(&known.id, known.sequence, &known.sealed)? == request.data);
        if !state.has_done(&request.request_id) && !same()? {
            let sequence = known.sequence + 1;
            let secret = Secret {
                updated_at: self.0.environment.now(),
                sequence,
                size: request.data.len() as u64,
                sealed: self.0.vault.seal(&known.id, sequence, &request.data)?,
                ..Secret::clone(&known)
            };
            let change = Change::PutSecret { secret: Box::new(secret), expected: Expected::Version(known.version) };
            self.0
                .store
                .transact(&Transaction {
                    request_id: request.request_id,
                    changes: vec![change],
                    ..Transaction::default()
                })
                .await?;
        }
        self.shown_in(&self.0.store.view(), &known.id)
    }

    async fn delete(&self, request: v1::DeleteSecretRequest) -> Result<(), Error> {
        let state = self.0.store.read().await?;
        if state.has_done(&request.request_id) {
            return Ok(());
        }
        let known = lookup::secret(&state, kind_of(request.kind)?, &request.secret)?;
        let changes = vec![Change::DeleteSecret { id: known.id.clone() }];
        self.0
            .store
            .transact(&Transaction { request_id: request.request_id, changes, ..Transaction::default() })
            .await?;
        Ok(())
    }
}

#[tonic::async_trait]
impl secrets_server::Secrets for Secrets {
    async fn create_secret(
        &self,
        request: Request<v1::CreateSecretRequest>,
    ) -> Result<Response<v1::CreateSecretResponse>, Status> {
        let secret = self.create(request.into_inner()).await?;
        Ok(Response::new(v1::CreateSecretResponse { secret: Some(secret) }))
    }

    async fn update_secret(
        &self,
        request: Request<v1::UpdateSecretRequest>,
    ) -> Result<Response<v1::UpdateSecretResponse>, Status> {
        let secret = self.update(request.into_inner()).await?;
        Ok(Response::new(v1::UpdateSecretResponse { secret: Some(secret) }))
    }

    async fn get_secret_by_name(
        &self,
        request: Request<v1::GetSecretByNameRequest>,
    ) -> Result<Response<v1::GetSecretByNameResponse>, Status> {
        let request = request.into_inner();
        let state = self.0.store.read().await.map_err(super::status)?;
        let secret = lookup::secret(&state, kind_of(request.kind)?, &request.secret)?;
        let secret = self.shown(&secret, true)?;
        Ok(Response::new(v1::GetSecretByNameResponse { secret: Some(secret) }))
    }

    async fn list_secrets(
        &self,
        request: Request<v1::ListSecretsRequest>,
    ) -> Result<Response<v1::ListSecretsResponse>, Status> {
        let request = request.into_inner();
        let state = self.0.store.read().await.map_err(super::status)?;
        let kind = kind_of(request.kind)?;
        let mut secrets: Vec<_> = state.secrets().filter(|secret| secret.kind == kind).map(Arc::clone).collect();
        secrets.sort_by(|a, b| a.name.cmp(&b.name));
        let key = |secret: &Arc<Secret>| secret.name.clone();
        let shown = |secret: Arc<Secret>| self.shown(&secret, false);
        let (secrets, next_page_token) = page(secrets, key, (request.page_size, &request.page_token), shown)?;
        Ok(Response::new(v1::ListSecretsResponse { secrets, next_page_token }))
    }

    async fn delete_secret(
        &self,
        request: Request<v1::DeleteSecretRequest>,
    ) -> Result<Response<v1::DeleteSecretResponse>, Status> {
        self.delete(request.into_inner()).await?;
        Ok(Response::new(v1::DeleteSecretResponse {}))
    }
}
