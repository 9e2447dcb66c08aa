//! Assignments and statuses on disk, so that a restarted agent goes on where it was, with or without a manager.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use warren_proto::v1;

/// One container's file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CachedContainer {
    /// What is to run.
    pub assignment: v1::Assignment,
    /// What became of it so far.
    pub status: v1::ContainerStatus,
}

/// A directory with one file a container.
#[derive(Clone, Debug)]
pub struct Cache {
    directory: PathBuf,
}

impl Cache {
    /// The cache in this directory, which is made if need be.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn open(directory: &Path) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        Ok(Self { directory: directory.to_owned() })
    }

    fn path(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    /// Reads all containers. Files that cannot be read are named in the log and left.
    #[must_use]
    pub fn load(&self) -> Vec<CachedContainer> {
        let Ok(entries) = fs::read_dir(&self.directory) else { return Vec::new() };
        let read = |entry: fs::DirEntry| {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                return None;
            }
            let cached = fs::read(&path).map_err(io::Error::other);
            match cached.and_then(|bytes| serde_json::from_slice(&bytes).map_err(io::Error::other)) {
                Ok(container) => Some(container),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "a cached container cannot be read");
                    None
                }
            }
        };
        entries.flatten().filter_map(read).collect()
    }

    /// Writes a container, over what was there.
    pub fn store(&self, container: &CachedContainer) {
        let path = self.path(&container.assignment.container_id);
        let bytes = serde_json::to_vec(container).map_err(io::Error::other);
        let written = bytes.and_then(|bytes| warren_durable::replace(&path, &bytes));
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "a container cannot be cached");
        }
    }

    /// Forgets a container.
    pub fn remove(&self, id: &str) {
        // One that is not there is what is wanted.
        let _ = fs::remove_file(self.path(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_loaded_and_damage_is_skipped() {
        let directory = tempfile::tempdir().expect("a directory");
        let cache = Cache::open(directory.path()).expect("opens");
        let assignment = v1::Assignment { container_id: "a".to_owned(), slot: 3, ..Default::default() };
        let status = v1::ContainerStatus { exit_code: Some(7), pid: 42, ..Default::default() };
        cache.store(&CachedContainer { assignment: assignment.clone(), status: status.clone() });
        fs::write(directory.path().join("b.json"), "{").expect("writable");
        let loaded = cache.load();
        assert_eq!(loaded.len(), 1);
        assert_eq!((&loaded[0].assignment, &loaded[0].status), (&assignment, &status));
        cache.remove("a");
        assert!(cache.load().is_empty());
    }
}
