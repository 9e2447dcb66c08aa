//! Log and snapshots as files.

mod log;
mod wal;

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::storage::{Opened, Snapshots, Storage};

pub(crate) use log::open as open_log;
#[cfg(test)]
pub(crate) use log::{open, wal_config};
#[cfg(test)]
pub(crate) use wal::Wal;

/// A directory with the log, on `raft-log`, and the snapshot.
#[derive(Clone, Debug)]
pub struct Files {
    directory: PathBuf,
}

impl Files {
    /// The storage in this directory, which is made when it is opened.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into() }
    }
}

impl Storage for Files {
    fn place(&self) -> String {
        self.directory.display().to_string()
    }

    fn open(&self) -> io::Result<Opened> {
        fs::create_dir_all(&self.directory)?;
        let sync = measure_sync(&self.directory)?;
        let log = log::open(&self.directory.join("log"))?;
        let snapshots = SnapshotFile::open(&self.directory.join("snapshot"))?;
        Ok(Opened { log: Box::new(log), snapshots: Box::new(snapshots), sync })
    }
}

/// Appends timed to learn how fast the disk is.
const SYNC_SAMPLES: usize = 5;

/// How long this directory's disk takes to make a small write durable: the slowest of a few.
fn measure_sync(directory: &Path) -> io::Result<Duration> {
    let path = directory.join("sync-probe");
    let mut file = File::create(&path)?;
    let mut slowest = Duration::ZERO;
    for _ in 0..SYNC_SAMPLES {
        let began = Instant::now();
        file.write_all(&[0; 256])?;
        file.sync_data()?;
        slowest = slowest.max(began.elapsed());
    }
    fs::remove_file(path)?;
    Ok(slowest)
}

/// The snapshot's file: written beside, made durable, then renamed into place.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotFile {
    path: PathBuf,
}

impl SnapshotFile {
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        Ok(Self { path: directory.join("current.snapshot") })
    }
}

impl Snapshots for SnapshotFile {
    fn save(&self, bytes: &[u8]) -> io::Result<()> {
        warren_durable::replace(&self.path, bytes)
    }

    fn load(&self) -> io::Result<Option<Vec<u8>>> {
        match fs::read(&self.path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}
