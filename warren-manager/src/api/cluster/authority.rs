//! The authority that signs members' certificates, how it changes, and the key that locks it.

use warren_pki::{Authority, Role};
use warren_proto::v1;

use super::Cluster;
use crate::{
    access::signing::{self, Signed},
    api::Error,
    caller::Caller,
    data::backup,
    state::{Change, SealedAuthority, State},
    trust::vault::UnlockKey,
};

impl Cluster {
    pub(super) fn sign(&self, state: &State, request: &str, role: Role, id: &str) -> Result<Signed, Error> {
        signing::sign(state, &self.0.vault, self.0.environment.now(), request, role, id)
    }

    pub(super) async fn rotate_authority(&self) -> Result<(), Error> {
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

    pub(super) async fn confirm(&self, caller: &Caller, digest: String) -> Result<(), Error> {
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

    pub(super) async fn set_lock(&self, request: v1::SetLockRequest) -> Result<String, Error> {
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
}
