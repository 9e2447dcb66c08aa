//! Volumes: directories that outlive containers.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};
use warren_proto::v1;

use super::{Container, DELETED_VOLUMES, Expected, Record, Rejection, State, events::Told};
use crate::{
    clock::Timestamp,
    ids::{NodeId, VolumeId},
};

/// A directory that outlives containers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// The revision of its last write.
    pub version: u64,
    /// Unique.
    pub name: String,
    /// Options of the driver `local`, which is the only one.
    pub options: BTreeMap<String, String>,
    /// The user's own.
    pub labels: BTreeMap<String, String>,
    /// When it was created.
    pub created_at: Timestamp,
    /// Where its data is: given by the user, or by the first container that uses it.
    pub node: Option<NodeId>,
    /// One container at a time.
    pub exclusive: bool,
}

impl Record for Volume {
    type Id = VolumeId;
    type Name = String;
    const KIND: &'static str = "volume";

    fn id(&self) -> &VolumeId {
        &self.id
    }

    fn name(&self) -> Option<String> {
        Some(self.name.clone())
    }

    fn label(&self) -> String {
        format!("volume {:?}", self.name)
    }

    fn version(&self) -> u64 {
        self.version
    }

    fn set_version(&mut self, revision: u64) {
        self.version = revision;
    }
}

impl Volume {
    /// Whether its data is on one node.
    #[must_use]
    pub fn is_local(&self) -> bool {
        !self.options.get("type").is_some_and(|kind| kind.starts_with("nfs"))
    }
}

/// The volumes that a container needs, by name.
pub(crate) fn needed_volumes(spec: &v1::ContainerSpec) -> impl Iterator<Item = &str> {
    let volumes = spec.mounts.iter().filter(|mount| mount.r#type() == v1::MountType::Volume);
    volumes.map(|mount| mount.source.as_str())
}

impl State {
    /// All volumes, by id.
    pub fn volumes(&self) -> impl Iterator<Item = &Arc<Volume>> {
        self.volumes.values()
    }

    /// A volume by name.
    #[must_use]
    pub fn volume_named(&self, name: &str) -> Option<&Arc<Volume>> {
        self.volumes.named(name)
    }

    /// Volumes that were deleted after a revision, as far back as they are remembered.
    pub fn volumes_deleted_since(&self, revision: u64) -> impl Iterator<Item = &VolumeId> {
        self.deleted_volumes.iter().filter(move |(at, _)| *at > revision).map(|(_, id)| id)
    }

    /// The volumes that a container's spec names, as far as there are such.
    pub fn volumes_of<'a>(&'a self, spec: &'a v1::ContainerSpec) -> impl Iterator<Item = &'a Arc<Volume>> {
        needed_volumes(spec).filter_map(|name| self.volume_named(name))
    }

    /// Whether a container that is on a node and has not ended uses a volume.
    #[must_use]
    pub fn is_held(&self, volume: &Volume) -> bool {
        let uses = |container: &&Arc<Container>| {
            container.holds_resources() && needed_volumes(&container.revision.spec).any(|name| name == volume.name)
        };
        self.containers.values().any(|container| uses(&container))
    }

    pub(super) fn create_volume(&mut self, volume: &Volume) -> Result<Told, Rejection> {
        self.volumes.check(volume, Expected::Any)?;
        self.volumes.put(volume.clone(), self.revision);
        self.shared_revision = self.revision;
        Ok(Told::new("volume.created", &volume.id, &volume.name, ""))
    }

    pub(super) fn delete_volume(&mut self, id: &VolumeId, force: bool) -> Result<Told, Rejection> {
        let known = self.volumes.remove(id)?;
        let users = self.users(|spec| needed_volumes(spec).any(|name| name == known.name));
        if !users.is_empty() && !force {
            return Err(Rejection::InUse { what: known.label(), users });
        }
        self.shared_revision = self.revision;
        self.deleted_volumes.insert((self.revision, id.clone()));
        while self.deleted_volumes.len() > DELETED_VOLUMES {
            if let Some(oldest) = self.deleted_volumes.get_min().cloned() {
                self.deleted_volumes.remove(&oldest);
            }
        }
        Ok(Told::new("volume.deleted", id, &known.name, if force { "by force" } else { "" }))
    }
}
