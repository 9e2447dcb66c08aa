//! The manager's data directory: whose it is and of which layout, in one small file beside what consensus keeps.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use warren_pki::{Credentials, Role};

/// Where a member's key and certificate are, below its data directory.
pub const IDENTITY: &str = "identity";
/// The layout that this version writes, and the oldest that it reads.
const FORMAT: u32 = 5;
const OLDEST_FORMAT: u32 = 3;
/// The first whose certificates have a checksum.
const CHECKED_FORMAT: u32 = 4;
const FILE: &str = "manager.json";
/// Holds the log and its snapshots.
pub(crate) const RAFT: &str = "raft";

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It was written by another version.
    #[error(
        "the data directory {} has format {found}, this version reads {OLDEST_FORMAT} to {FORMAT}: use the version that wrote it",
        directory.display()
    )]
    Format {
        /// Which.
        directory: PathBuf,
        /// What it says.
        found: u32,
    },
    /// Its file says nothing.
    #[error("{} is damaged: {why}", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// How.
        why: String,
    },
    /// It cannot be read or written.
    #[error("the data directory {} cannot be used: {source}", directory.display())]
    Io {
        /// Which.
        directory: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What the file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Identity {
    format: u32,
    /// This manager's id in consensus.
    pub id: u64,
    /// Whether it has had a log.
    #[serde(default)]
    pub has_log: bool,
}

/// Just the format: all that versions must agree on.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// Reads whose directory it is; `None` when it is nobody's yet.
///
/// # Errors
///
/// When another version wrote it, or it cannot be read.
pub(crate) fn open(directory: &Path) -> Result<Option<Identity>, Error> {
    let io_error = |source| Error::Io { directory: directory.to_owned(), source };
    let path = directory.join(FILE);
    match fs::read(&path) {
        Ok(bytes) => {
            let damaged = |error: serde_json::Error| Error::Damaged { path: path.clone(), why: error.to_string() };
            let Format { format } = serde_json::from_slice(&bytes).map_err(damaged)?;
            if !(OLDEST_FORMAT..=FORMAT).contains(&format) {
                return Err(Error::Format { directory: directory.to_owned(), found: format });
            }
            let identity: Identity = serde_json::from_slice(&bytes).map_err(damaged)?;
            prepare(directory)?;
            if format < CHECKED_FORMAT {
                let path = directory.join(IDENTITY);
                Credentials::complete(&path).map_err(|error| Error::Damaged { path, why: error.to_string() })?;
            }
            if format != FORMAT {
                // What is written from now on, an older version must not take for its own.
                write(directory, &Identity { format: FORMAT, ..identity.clone() })?;
            }
            Ok(Some(identity))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::exists(directory.join(RAFT)) {
            Ok(true) => {
                let why = format!("it is missing, and {RAFT} beside it is somebody's: move both away");
                Err(Error::Damaged { path, why })
            }
            Ok(false) => Ok(None),
            Err(error) => Err(io_error(error)),
        },
        Err(error) => Err(io_error(error)),
    }
}

/// Checks that the directory and the certificate in it are the same manager's.
///
/// # Errors
///
/// When they are not: one of them is damaged, or from elsewhere.
pub(crate) fn check_owner(directory: &Path, id: u64, credentials: &Credentials) -> Result<(), Error> {
    let owner = credentials.identity();
    if (owner.role, owner.id.as_str()) == (Role::Manager, id.to_string().as_str()) {
        return Ok(());
    }
    let why = format!("it says manager {id}, and the certificate in {IDENTITY} beside it is of {owner}");
    Err(Error::Damaged { path: directory.join(FILE), why })
}

/// Whose directory it is, if that can be read.
pub(crate) fn known_id(directory: &Path) -> Option<u64> {
    let identity: Identity = serde_json::from_slice(&fs::read(directory.join(FILE)).ok()?).ok()?;
    Some(identity.id)
}

/// Makes the directory, for nobody but root; one that was there already is nobody else's any more.
///
/// # Errors
///
/// When it cannot be made.
pub(crate) fn prepare(directory: &Path) -> Result<(), Error> {
    // What is in it says what the cluster's secrets are.
    let was_open = warren_durable::private_directory(directory);
    if was_open.map_err(|source| Error::Io { directory: directory.to_owned(), source })? {
        tracing::warn!(directory = %directory.display(), "the data directory was open to others than root, and is not any more");
    }
    Ok(())
}

/// Makes the directory this manager's: whatever else is to be in it must be there by now.
///
/// # Errors
///
/// When it cannot be written.
pub(crate) fn settle(directory: &Path, id: u64) -> Result<(), Error> {
    write(directory, &Identity { format: FORMAT, id, has_log: false })
}

/// Notes that the directory's manager has a log from now on: that it has none is damage.
///
/// # Errors
///
/// When it cannot be written.
pub(crate) fn has_log(directory: &Path, id: u64) -> Result<(), Error> {
    write(directory, &Identity { format: FORMAT, id, has_log: true })
}

fn write(directory: &Path, identity: &Identity) -> Result<(), Error> {
    let failed = |source| Error::Io { directory: directory.to_owned(), source };
    let identity = serde_json::to_vec_pretty(identity).map_err(|error| failed(error.into()))?;
    warren_durable::replace(&directory.join(FILE), &identity).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_directory_keeps_its_identity() {
        let directory = tempfile::tempdir().expect("a directory");
        assert_eq!(open(directory.path()).expect("opens"), None);
        settle(directory.path(), 7).expect("writable");
        assert_eq!(open(directory.path()).expect("opens").map(|identity| identity.id), Some(7));
        assert_eq!(known_id(directory.path()), Some(7));
    }

    #[test]
    fn a_directory_that_others_could_read_is_closed_to_them() {
        let directory = tempfile::tempdir().expect("a directory");
        let mode = || fs::metadata(directory.path()).expect("there").permissions().mode() & 0o777;
        let open_to_all = || fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("ours");
        open_to_all();
        prepare(directory.path()).expect("ours");
        assert_eq!(mode(), 0o700);
        settle(directory.path(), 7).expect("writable");
        open_to_all();
        assert!(open(directory.path()).expect("opens").is_some());
        assert_eq!(mode(), 0o700);
    }

    #[test]
    fn a_directory_of_the_version_before_becomes_one_of_this() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join(FILE);
        fs::write(&path, r#"{"format": 3, "id": 5}"#).expect("writable");
        assert_eq!(open(directory.path()).expect("opens").map(|identity| identity.id), Some(5));
        let Format { format } = serde_json::from_slice(&fs::read(&path).expect("readable")).expect("JSON");
        assert_eq!(format, FORMAT);
    }

    #[test]
    fn other_versions_and_damage_are_named() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join(FILE);
        fs::write(&path, r#"{"format": 99, "new": {}}"#).expect("writable");
        assert!(matches!(open(directory.path()), Err(Error::Format { found: 99, .. })));
        fs::write(&path, "{").expect("writable");
        assert!(matches!(open(directory.path()), Err(Error::Damaged { .. })));
    }
}
