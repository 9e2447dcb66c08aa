//! Secrets and configs: small files for containers.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};
use warren_proto::v1;

use super::{Expected, Record, Rejection, Sealed, Service, State, events::Told};
use crate::{clock::Timestamp, ids::SecretId};

/// A small file for containers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Secret {
    /// Its id.
    pub id: SecretId,
    /// The revision of its last write.
    pub version: u64,
    /// Secret or config.
    pub kind: v1::SecretKind,
    /// Unique among its kind.
    pub name: String,
    /// The user's own.
    pub labels: BTreeMap<String, String>,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it got its value.
    pub updated_at: Timestamp,
    /// Counts values, from 1.
    pub sequence: u32,
    /// Bytes of the value.
    pub size: u64,
    /// The value.
    pub sealed: Sealed,
}

impl Record for Secret {
    type Id = SecretId;
    type Name = (bool, String);
    const KIND: &'static str = "secret";

    fn id(&self) -> &SecretId {
        &self.id
    }

    fn name(&self) -> Option<(bool, String)> {
        Some(secret_key(self.kind, &self.name))
    }

    fn label(&self) -> String {
        format!("{} {:?}", kind_name(self.kind), self.name)
    }

    fn version(&self) -> u64 {
        self.version
    }

    fn set_version(&mut self, revision: u64) {
        self.version = revision;
    }
}

/// As errors show it.
pub(crate) fn kind_name(kind: v1::SecretKind) -> &'static str {
    if kind == v1::SecretKind::Config { "config" } else { "secret" }
}

/// Secrets and configs have names of their own each.
fn secret_key(kind: v1::SecretKind, name: &str) -> (bool, String) {
    (kind == v1::SecretKind::Config, name.to_owned())
}

/// The secrets and configs that a container needs, by kind and name.
pub(crate) fn needed_secrets(spec: &v1::ContainerSpec) -> impl Iterator<Item = (v1::SecretKind, &str)> {
    let secrets = spec.secrets.iter().map(|mount| (v1::SecretKind::Secret, mount.source.as_str()));
    let configs = spec.configs.iter().map(|mount| (v1::SecretKind::Config, mount.source.as_str()));
    let registry = Some((v1::SecretKind::Secret, spec.registry_secret.as_str())).filter(|(_, name)| !name.is_empty());
    secrets.chain(configs).chain(registry)
}

impl State {
    /// All secrets and configs, by id.
    pub fn secrets(&self) -> impl Iterator<Item = &Arc<Secret>> {
        self.secrets.values()
    }

    /// A secret or config by id.
    #[must_use]
    pub fn secret(&self, id: &SecretId) -> Option<&Arc<Secret>> {
        self.secrets.get(id)
    }

    /// A secret or config by name.
    #[must_use]
    pub fn secret_named(&self, kind: v1::SecretKind, name: &str) -> Option<&Arc<Secret>> {
        self.secrets.named(&secret_key(kind, name))
    }

    pub(super) fn put_secret(&mut self, secret: &Secret, expected: Expected) -> Result<Told, Rejection> {
        let is_update = self.secrets.check(secret, expected)?.is_some();
        self.secrets.put(secret.clone(), self.revision);
        self.shared_revision = self.revision;
        if is_update {
            self.renew_containers_with(secret.kind, &secret.name);
        }
        let verb = if is_update { "updated" } else { "created" };
        let kind = format!("{}.{verb}", kind_name(secret.kind));
        Ok(Told::new(kind, &secret.id, &secret.name, format!("value {}", secret.sequence)))
    }

    /// Services whose containers are to be replaced when this secret changes begin another generation.
    fn renew_containers_with(&mut self, kind: v1::SecretKind, name: &str) {
        let asks = |service: &&Arc<Service>| {
            let container = &service.spec.container;
            let mounts = if kind == v1::SecretKind::Config { &container.configs } else { &container.secrets };
            mounts.iter().any(|mount| mount.source == name && mount.on_update() == v1::OnUpdate::Restart)
        };
        let services: Vec<_> = self.services.values().filter(asks).cloned().collect();
        for service in services {
            let mut service = Service::clone(&service);
            service.generation += 1;
            self.insert_revision(&service, self.revision);
            let id = service.id.clone();
            self.services.put(service, self.revision);
            self.prune_revisions(&id);
        }
    }

    pub(super) fn delete_secret(&mut self, id: &SecretId) -> Result<Told, Rejection> {
        let known = self.secrets.remove(id)?;
        let users = self.users(|spec| needed_secrets(spec).any(|needed| needed == (known.kind, known.name.as_str())));
        if !users.is_empty() {
            return Err(Rejection::InUse { what: known.label(), users });
        }
        self.shared_revision = self.revision;
        Ok(Told::new(format!("{}.deleted", kind_name(known.kind)), id, &known.name, ""))
    }

    /// The names of the services for which this holds, in order.
    pub(super) fn users(&self, uses: impl Fn(&v1::ContainerSpec) -> bool) -> Vec<String> {
        let users = self.services.values().filter(|service| uses(&service.spec.container));
        let mut users: Vec<_> = users.map(|service| service.spec.name.clone()).collect();
        users.sort();
        users
    }
}
