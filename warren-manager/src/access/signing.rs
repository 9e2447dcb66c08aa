//! The cluster's authority at work: every manager has its key, and signs for whom the state knows.

use std::time::{Duration, SystemTime};

use warren_pki::{Authority, Identity, Role, Secret, Token};

use crate::{
    clock::Timestamp,
    error::Error,
    messages::validate::Invalid,
    state::{Cluster, State},
    trust::{
        founding::{CERTIFICATE_LIFETIME, TOKEN_LIFETIME},
        vault::Vault,
    },
};

/// A certificate, and the authorities to believe, in PEM.
pub(crate) struct Signed {
    pub certificate: String,
    pub authorities: String,
}

/// A token is for a day's work, not for good.
const MAX_TOKEN_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);

/// A token, and what the cluster keeps of it.
pub(crate) struct Invited {
    pub token: String,
    pub hash: String,
    pub expires_at: Timestamp,
}

/// The same instant, as certificates have it.
pub(crate) fn system_time(now: Timestamp) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(now.0)
}

/// The authority that signs now, and the id of its cluster.
///
/// # Errors
///
/// When there is none yet, or its key cannot be opened.
pub(crate) fn authority(state: &State, vault: &Vault) -> Result<(Authority, String), Error> {
    let cluster = state.cluster().ok_or_else(|| Error::Precondition("there is no cluster yet".to_owned()))?;
    let sealed = cluster.authority.as_ref();
    let sealed = sealed.ok_or_else(|| Error::Precondition("this cluster has no authority".to_owned()))?;
    let key = vault.open_authority(&cluster.id, &sealed.key)?;
    Ok((Authority::from_pem(&sealed.certificate, &key)?, cluster.id.clone()))
}

/// Signs a request for a member of the cluster.
///
/// # Errors
///
/// When there is no authority, or the request is none.
pub(crate) fn sign(
    state: &State,
    vault: &Vault,
    now: Timestamp,
    request: &str,
    role: Role,
    id: &str,
) -> Result<Signed, Error> {
    let (authority, cluster) = authority(state, vault)?;
    let identity = Identity { cluster, role, id: id.to_owned() };
    let certificate = authority.sign(request, &identity, system_time(now), CERTIFICATE_LIFETIME);
    let certificate = certificate.map_err(|error| Invalid::new("certificate_request", error.to_string()))?;
    Ok(Signed { certificate, authorities: state.cluster().map(Cluster::authorities).unwrap_or_default() })
}

/// Makes a token that is valid for so long, a day unless given.
///
/// # Errors
///
/// When that is too long, or there is no authority.
pub(crate) fn invite(
    state: &State,
    vault: &Vault,
    now: Timestamp,
    lifetime: Option<pbjson_types::Duration>,
) -> Result<Invited, Error> {
    let lifetime = match lifetime {
        None => TOKEN_LIFETIME,
        Some(lifetime) => Duration::try_from(lifetime).unwrap_or_default(),
    };
    if lifetime.is_zero() || lifetime > MAX_TOKEN_LIFETIME {
        return Err(Invalid::new("lifetime", "is not 1 s to 30 days").into());
    }
    let (authority, _) = authority(state, vault)?;
    let secret = Secret::random()?;
    let hash = secret.hash();
    let token = Token::new(authority.certificate_pem(), secret)?.to_string();
    Ok(Invited { token, hash, expires_at: now.after(lifetime) })
}
