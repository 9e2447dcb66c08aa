//! Snapshots as checked blocks. One that does not match its checksum is an error, never ignored: the log behind it is gone.

use std::{
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

use crate::{storage::Snapshots, types::SnapshotMeta};

const MAGIC: &[u8; 8] = b"WRNSNAP1";
const COMPRESSION_LEVEL: i32 = 3;

/// What a snapshot is of; the file's head.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Head {
    meta: SnapshotMeta,
}

/// A snapshot's bytes as they travel and as they are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SnapshotBytes(pub(crate) Vec<u8>);

/// Keeps the latest snapshot.
#[derive(Clone)]
pub(crate) struct SnapshotStore {
    // One is built while another is installed: they take turns.
    snapshots: Arc<Mutex<Box<dyn Snapshots>>>,
}

impl fmt::Debug for SnapshotStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotStore").finish_non_exhaustive()
    }
}

fn damaged(why: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the snapshot is damaged: {why}"))
}

/// Puts a state's bytes and their description into one checked block.
pub(crate) fn encode(meta: &SnapshotMeta, state: &[u8]) -> io::Result<SnapshotBytes> {
    let head = serde_json::to_vec(&Head { meta: meta.clone() }).map_err(io::Error::other)?;
    Ok(SnapshotBytes(warren_durable::pack(MAGIC, &head, &zstd::encode_all(state, COMPRESSION_LEVEL)?)))
}

/// Checks a block and takes it apart.
pub(crate) fn decode(snapshot: &SnapshotBytes) -> io::Result<(SnapshotMeta, Vec<u8>)> {
    let (head, state) = warren_durable::unpack(MAGIC, &snapshot.0).map_err(damaged)?;
    let head: Head = serde_json::from_slice(head).map_err(damaged)?;
    Ok((head.meta, zstd::decode_all(state).map_err(damaged)?))
}

impl SnapshotStore {
    pub(crate) fn new(snapshots: Box<dyn Snapshots>) -> Self {
        Self { snapshots: Arc::new(Mutex::new(snapshots)) }
    }

    /// Replaces the snapshot, unless the one that is there reaches further. Durable when this returns.
    pub(crate) fn save(&self, snapshot: &SnapshotBytes) -> io::Result<()> {
        let snapshots = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        let reaches = |bytes: &SnapshotBytes| decode(bytes).ok().and_then(|(meta, _)| meta.last_log_id);
        if let Some(known) = snapshots.load()?.map(SnapshotBytes)
            && reaches(&known) > reaches(snapshot)
        {
            return Ok(());
        }
        snapshots.save(&snapshot.0)
    }

    /// The snapshot, if there is one.
    pub(crate) fn load(&self) -> io::Result<Option<SnapshotBytes>> {
        let snapshots = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(snapshots.load()?.map(SnapshotBytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_damaged_byte_is_noticed() {
        let meta = SnapshotMeta { last_log_id: None, last_membership: Default::default() };
        let good = encode(&meta, b"some state").expect("encodes");
        assert_eq!(decode(&good).expect("decodes").1, b"some state");
        for i in 0..good.0.len() {
            let mut bad = good.clone();
            bad.0[i] ^= 1;
            assert!(decode(&bad).is_err(), "byte {i}");
        }
        for len in 0..good.0.len() {
            assert!(decode(&SnapshotBytes(good.0[..len].to_vec())).is_err(), "cut at {len}");
        }
    }

    #[test]
    fn the_latest_snapshot_is_found() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = crate::files::SnapshotFile::open(directory.path()).expect("opens");
        let store = SnapshotStore::new(Box::new(file));
        assert_eq!(store.load().expect("loads"), None);
        for content in [b"one", b"two"] {
            store.save(&SnapshotBytes(content.to_vec())).expect("saves");
        }
        assert_eq!(store.load().expect("loads"), Some(SnapshotBytes(b"two".to_vec())));
    }
}
