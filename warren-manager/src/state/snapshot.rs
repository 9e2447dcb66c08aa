//! Snapshots: the state as bytes, in the layout of every schema that is read.

use std::{io, sync::Arc};

use serde::{Deserialize, Serialize};

use super::{
    OLDEST_SCHEMA, OLDEST_WRITTEN_SCHEMA, SCHEMA, Schema, State,
    revisions::{StoredContainer, StoredRevision},
};

#[derive(Deserialize)]
struct OfSchema {
    schema: u32,
}

/// A state as a snapshot holds it.
#[derive(Serialize)]
struct Stored<'a> {
    #[serde(flatten)]
    state: &'a State,
    #[serde(flatten)]
    containers: StoredContainers,
}

/// What a snapshot holds in a form of its own.
#[derive(Serialize, Deserialize)]
struct StoredContainers {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    revisions: Vec<StoredRevision>,
    containers: Vec<StoredContainer>,
}

impl State {
    /// The state as bytes: the same bytes for the same state, on every manager.
    ///
    /// # Errors
    ///
    /// Never for a state that transactions made.
    pub fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let containers = StoredContainers { revisions: self.stored_revisions(), containers: self.stored_containers() };
        let stored = Stored { state: self, containers };
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
        let damaged = |error: serde_json::Error| invalid(error.to_string());
        // Each takes what is its own: to read it once and take it apart would need room for all of it twice.
        let mut state: Self = serde_json::from_slice(bytes).map_err(damaged)?;
        let stored: StoredContainers = serde_json::from_slice(bytes).map_err(damaged)?;
        state.schema = Schema(schema.max(OLDEST_WRITTEN_SCHEMA));
        state.subnets.taken = state.nodes.values().map(|node| node.subnet_index).collect();
        state.virtual_addresses.taken = state.services.values().map(|service| service.virtual_index).collect();
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
