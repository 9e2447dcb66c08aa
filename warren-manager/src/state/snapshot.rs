//! Snapshots: the state as bytes, in the layout of every schema that is read.

use std::{io, sync::Arc};

use imbl::{OrdMap, OrdSet};
use serde::{Deserialize, Serialize};

use super::{
    Cluster, Event, JoinToken, Manager, Node, OLDEST_SCHEMA, OLDEST_WRITTEN_SCHEMA, Operator, Reply, SCHEMA, Schema,
    Secret, Service, State, Table, Volume,
    network::Numbers,
    revisions::{StoredContainer, StoredRevision},
};
use crate::ids::{NodeId, VolumeId};

#[derive(Deserialize)]
struct OfSchema {
    schema: u32,
}

/// The state as a snapshot holds it.
#[derive(Serialize, Deserialize)]
struct Stored {
    /// Of this layout.
    schema: u32,
    revision: u64,
    cluster: Option<Arc<Cluster>>,
    services: Table<Service>,
    nodes: Table<Node>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    revisions: Vec<StoredRevision>,
    containers: Vec<StoredContainer>,
    secrets: Table<Secret>,
    volumes: Table<Volume>,
    deleted_volumes: OrdSet<(u64, VolumeId)>,
    managers: Table<Manager>,
    next_manager: u64,
    tokens: Table<JoinToken>,
    admitted: OrdSet<NodeId>,
    departed: OrdSet<NodeId>,
    requests: OrdMap<u64, String>,
    replies: OrdMap<String, Reply>,
    next_subnet: u32,
    next_virtual_address: u32,
    #[serde(default)]
    events: Vec<Arc<Event>>,
    #[serde(default)]
    certified: OrdMap<String, String>,
    #[serde(default)]
    operators: Table<Operator>,
}

impl State {
    /// The state as bytes: the same bytes for the same state, on every manager.
    ///
    /// # Errors
    ///
    /// Never for a state that transactions made.
    pub fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let stored = Stored {
            schema: self.schema(),
            revision: self.revision,
            cluster: self.cluster.clone(),
            services: self.services.clone(),
            nodes: self.nodes.clone(),
            revisions: self.stored_revisions(),
            containers: self.stored_containers(),
            secrets: self.secrets.clone(),
            volumes: self.volumes.clone(),
            deleted_volumes: self.deleted_volumes.clone(),
            managers: self.managers.clone(),
            next_manager: self.next_manager,
            tokens: self.tokens.clone(),
            admitted: self.admitted.clone(),
            departed: self.departed.clone(),
            requests: self.requests.clone(),
            replies: self.replies.clone(),
            next_subnet: self.subnets.next,
            next_virtual_address: self.virtual_addresses.next,
            events: self.events.iter().cloned().collect(),
            certified: self.certified.clone(),
            operators: self.operators.clone(),
        };
        serde_json::to_vec(&stored).map_err(io::Error::other)
    }

    /// The state of these bytes.
    ///
    /// # Errors
    ///
    /// When they are of another schema or damaged.
    pub fn from_bytes(bytes: &[u8]) -> io::Result<Self> {
        Self::of_schema(bytes, SCHEMA)
    }

    /// The state of these bytes, if it is of this schema or an earlier one.
    pub(super) fn of_schema(bytes: &[u8], newest: u32) -> io::Result<Self> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
        // First of all: what another version wrote may have another shape.
        let OfSchema { schema } = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        if !(OLDEST_SCHEMA..=newest).contains(&schema) {
            let known = format!("this manager reads {OLDEST_SCHEMA} to {newest}");
            return Err(invalid(format!("the state is of schema {schema}, {known}")));
        }
        let stored: Stored = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        let mut state = Self {
            schema: Schema(schema.max(OLDEST_WRITTEN_SCHEMA)),
            revision: stored.revision,
            cluster: stored.cluster,
            subnets: Numbers::new(stored.next_subnet, stored.nodes.values().map(|node| node.subnet_index)),
            virtual_addresses: Numbers::new(
                stored.next_virtual_address,
                stored.services.values().map(|service| service.virtual_index),
            ),
            services: stored.services,
            nodes: stored.nodes,
            secrets: stored.secrets,
            volumes: stored.volumes,
            deleted_volumes: stored.deleted_volumes,
            managers: stored.managers,
            next_manager: stored.next_manager,
            tokens: stored.tokens,
            operators: stored.operators,
            certified: stored.certified,
            admitted: stored.admitted,
            departed: stored.departed,
            requests: stored.requests,
            replies: stored.replies,
            events: stored.events.into(),
            ..Self::default()
        };
        for revision in stored.revisions {
            let service = state.services.get(&revision.service);
            let key = (revision.service.clone(), revision.number);
            let revision = Arc::new(revision.with(service.map(Arc::as_ref)));
            state.revisions.insert(key, revision);
        }
        // Those that a snapshot from before revisions tells of, as far as it does.
        for service in state.services.clone().values() {
            state.insert_revision(service, 0);
        }
        for container in stored.containers {
            let revision = state.restored_revision(&container)?;
            state.put_container(container.with(revision));
        }
        state.shared_revision = state.revision;
        state.history.clear();
        state.forgotten = state.revision;
        Ok(state)
    }
}
