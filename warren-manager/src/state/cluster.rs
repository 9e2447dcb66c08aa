//! The cluster itself: what it is called, its networks, its authority, and the schema of its log.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{ClusterNetwork, Record as _, Rejection, State, events::Told};
use crate::clock::Timestamp;

/// The cluster's identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Random; told apart from other clusters.
    pub id: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// The addresses of its containers and services.
    pub network: ClusterNetwork,
    /// What signs its members' certificates; none in a cluster that nobody can join.
    pub authority: Option<SealedAuthority>,
    /// The unlock key, where managers' keys of secrets are locked.
    #[serde(default)]
    pub lock: Option<Sealed>,
    /// The change of the authority that is under way.
    #[serde(default)]
    pub rotation: Option<Rotation>,
}

impl Cluster {
    /// The certificates of the authorities that members are to believe, in PEM; the one that signs is the first.
    #[must_use]
    pub fn authorities(&self) -> String {
        let signs = self.authority.iter().map(|authority| authority.certificate.as_str());
        let other = self.rotation.iter().map(|rotation| rotation.other.certificate.as_str());
        signs.chain(other).map(str::trim).collect::<Vec<_>>().join("\n")
    }
}

/// A change of the authority: first every member learns of the new one, then every member has a certificate of it, and then
/// every member forgets the old one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotation {
    /// The authority that does not sign: the new one at first, and then the old one.
    pub other: SealedAuthority,
    /// Whether the new one signs.
    pub signs: bool,
}

/// The cluster's certificate authority.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedAuthority {
    /// Its certificate, in PEM.
    pub certificate: String,
    /// Its key.
    pub key: Sealed,
}

/// What a secret is sealed as: only who holds the key of keys can open it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// The key that the value is encrypted with, encrypted; in base64, as the log is text.
    pub key: String,
    /// The value, encrypted; in base64.
    pub value: String,
}

impl State {
    /// The cluster's identity, once it has one.
    #[must_use]
    pub fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_deref()
    }

    /// The members of the cluster that have certificates, like `manager 2`, `node x` and `operator y`, which are not known to believe
    /// the authorities of this digest.
    pub fn uncertified<'a>(&'a self, digest: &'a str) -> impl Iterator<Item = String> + 'a {
        let managers = self.managers.values().map(|manager| manager.label());
        let nodes = self.admitted.iter().map(|id| format!("node {id}"));
        let operators = self.operators.values().filter(|operator| operator.invitation.is_none());
        let operators = operators.map(|operator| format!("operator {}", operator.id));
        managers
            .chain(nodes)
            .chain(operators)
            .filter(move |member| self.certified.get(member).is_none_or(|known| known != digest))
    }

    fn change_cluster(&mut self, change: impl FnOnce(&mut Cluster)) -> Result<(), Rejection> {
        let cluster = self.cluster.as_mut().ok_or_else(|| Rejection::NotFound("cluster".to_owned()))?;
        change(Arc::make_mut(cluster));
        Ok(())
    }

    pub(super) fn found_cluster(&mut self, cluster: &Cluster) -> Told {
        self.cluster.get_or_insert_with(|| Arc::new(cluster.clone()));
        Told::new("cluster.founded", &cluster.id, "", "")
    }

    /// One that begins has had no other schema: nobody is told.
    pub(super) fn raise_schema(&mut self, schema: u32) -> Option<Told> {
        self.schema = super::Schema(self.schema().max(schema));
        self.cluster.is_some().then(|| Told::new("cluster.schema_raised", "", "", format!("to {schema}")))
    }

    pub(super) fn set_lock(&mut self, lock: Option<&Sealed>) -> Result<Told, Rejection> {
        let was_locked = self.cluster().is_some_and(|cluster| cluster.lock.is_some());
        self.change_cluster(|cluster| cluster.lock = lock.cloned())?;
        let kind = if lock.is_some() { "cluster.locked" } else { "cluster.unlocked" };
        let words = if lock.is_some() && was_locked { "with another unlock key" } else { "" };
        Ok(Told::new(kind, "", "", words))
    }

    pub(super) fn begin_rotation(&mut self, new: &SealedAuthority) -> Result<Told, Rejection> {
        if self.is_rotating() {
            return Err(Rejection::Conflict("the authority".to_owned()));
        }
        self.certified.clear();
        self.change_cluster(|cluster| {
            cluster.rotation = Some(Rotation { other: new.clone(), signs: false });
        })?;
        Ok(Told::new("authority.changing", "", "", "members learn of the new one"))
    }

    fn is_rotating(&self) -> bool {
        self.cluster().is_some_and(|cluster| cluster.rotation.is_some())
    }

    pub(super) fn advance_rotation(&mut self, signs: bool) -> Result<Told, Rejection> {
        let is_there = |cluster: &Arc<Cluster>| cluster.rotation.as_ref().is_some_and(|known| known.signs == signs);
        if !self.cluster.as_ref().is_some_and(is_there) {
            return Err(Rejection::Conflict("the authority".to_owned()));
        }
        self.certified.clear();
        if !signs {
            // They name the old one: who joins by them would be refused.
            self.tokens = super::Table::default();
            self.operators.retain(|operator| operator.invitation.is_none());
        }
        self.change_cluster(|cluster| {
            let Some(rotation) = cluster.rotation.take() else { return };
            if !signs {
                let old = cluster.authority.replace(rotation.other);
                cluster.rotation = old.map(|other| Rotation { other, signs: true });
            }
        })?;
        Ok(if signs {
            Told::new("authority.changed", "", "", "")
        } else {
            Told::new("authority.changing", "", "", "the new one signs; tokens are no longer valid")
        })
    }

    pub(super) fn certify(&mut self, member: &str, digest: &str) {
        if self.is_rotating() {
            self.certified.insert(member.to_owned(), digest.to_owned());
        }
    }
}
