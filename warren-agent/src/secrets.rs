//! Secrets and configs of this node's containers: in memory, and as files on a tmpfs that nobody but root sees. A value is
//! never written to a disk, and never to a log.
//!
//! Those that are wanted as variables are in a file as well. The container begins with a helper that reads it and becomes the container's
//! command with them, so that they are in no spec: containerd keeps specs on the disk.

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::mount::{MountFlags, mount};
use warren_proto::v1::{self, OnUpdate, SecretKind, SecretValue};

use crate::{runtime, volumes::is_mount_point};

/// Where a container finds its files unless its service says otherwise.
const SECRETS: &str = "/run/secrets";
const CONFIGS: &str = "/run/configs";

/// What can go wrong with them; no value is in it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The manager has not sent it.
    #[error("{kind} {name:?} has not been delivered to this node")]
    Missing {
        /// Secret or config.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// It is to belong to somebody whom the image does not know.
    #[error("{kind} {name:?}: {why}")]
    Owner {
        /// Secret or config.
        kind: &'static str,
        /// Its name.
        name: String,
        /// Who is missing.
        why: String,
    },
    /// It cannot be a variable.
    #[error("{kind} {name:?} cannot be an environment variable: {why}")]
    NoVariable {
        /// Secret or config.
        kind: &'static str,
        /// Its name.
        name: String,
        /// Why not.
        why: &'static str,
    },
    /// A file.
    #[error("{action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
}

fn io(action: String) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { action, source }
}

/// The program that puts values into the environment of the one that it becomes.
static HELPER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/env"));
/// What holds a container's variables.
const ENV: &str = "env";

/// Puts the helper where containers have it from. Those that run keep the one that they began with.
pub(crate) fn install_helper(path: &Path) -> io::Result<()> {
    if fs::read(path).is_ok_and(|there| there == HELPER) {
        return Ok(());
    }
    let new = path.with_extension("new");
    fs::write(&new, HELPER)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
    fs::rename(&new, path)
}

fn kind_name(kind: SecretKind) -> &'static str {
    if kind == SecretKind::Config { "config" } else { "secret" }
}

/// The node's secrets. Cheap to clone; does not show what they hold.
#[derive(Clone)]
pub struct Secrets {
    directory: PathBuf,
    values: Arc<Mutex<BTreeMap<(bool, String), SecretValue>>>,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secrets").field("directory", &self.directory).finish_non_exhaustive()
    }
}

/// Something of the node that a container has: a directory or a file, and where.
pub(crate) type Mounted = (PathBuf, String);

/// Where a file is: below a directory that the container has as a whole, or by itself.
struct Place {
    file: PathBuf,
    mounted: Mounted,
}

impl Secrets {
    /// Uses a directory, which becomes a tmpfs unless it is one; `keep` says whose files stay.
    ///
    /// # Errors
    ///
    /// When the tmpfs cannot be made.
    pub fn start(directory: &Path, keep: impl Fn(&str) -> bool) -> Result<Self, Error> {
        let action = || format!("making {} a tmpfs", directory.display());
        fs::create_dir_all(directory).map_err(io(action()))?;
        if !is_mount_point(directory).map_err(io(action()))? {
            let flags = MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOSUID;
            // Memory that is not swapped out either, where the kernel knows how (6.4).
            let mounted = [c"mode=0700,noswap", c"mode=0700"]
                .into_iter()
                .map(|options| mount("warren-secrets", directory, "tmpfs", flags, options))
                .find(|mounted| !matches!(mounted, Err(rustix::io::Errno::INVAL)));
            mounted.unwrap_or(Err(rustix::io::Errno::INVAL)).map_err(|error| io(action())(error.into()))?;
        }
        let secrets = Self { directory: directory.to_owned(), values: Arc::default() };
        for entry in fs::read_dir(directory).map_err(io(action()))?.flatten() {
            if entry.file_name().to_str().is_some_and(|name| !keep(name)) {
                secrets.remove(&entry.file_name().to_string_lossy());
            }
        }
        Ok(secrets)
    }

    fn values(&self) -> MutexGuard<'_, BTreeMap<(bool, String), SecretValue>> {
        // Every change is one insertion or removal: a panic leaves it whole.
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of what a manager sends; of a `complete` set what is not in it is forgotten. Returns those whose value is
    /// another than before, or was not known.
    pub(crate) fn update(
        &self,
        complete: bool,
        changed: Vec<SecretValue>,
        removed: &[String],
    ) -> Vec<(SecretKind, String)> {
        let mut values = self.values();
        let listed = |id: &String| changed.iter().any(|value| value.id == *id);
        values.retain(|_, value| !removed.contains(&value.id) && (!complete || listed(&value.id)));
        let mut news = Vec::new();
        for value in changed {
            let kind = value.kind();
            let key = (kind == SecretKind::Config, value.name.clone());
            let (id, sequence, name) = (value.id.clone(), value.sequence, value.name.clone());
            let before = values.insert(key, value);
            if before.is_none_or(|before| (before.id, before.sequence) != (id, sequence)) {
                news.push((kind, name));
            }
        }
        news
    }

    /// A value, for the agent's own use.
    pub(crate) fn value(&self, kind: SecretKind, name: &str) -> Result<Vec<u8>, Error> {
        let key = (kind == SecretKind::Config, name.to_owned());
        let missing = || Error::Missing { kind: kind_name(kind), name: name.to_owned() };
        self.values().get(&key).map(|value| value.data.clone()).ok_or_else(missing)
    }

    /// Where a container's file is on the node, and how it gets there.
    fn place(&self, container: &str, kind: SecretKind, i: usize, mounted: &v1::SecretMount) -> Place {
        let (name, usual) = if kind == SecretKind::Config { ("configs", CONFIGS) } else { ("secrets", SECRETS) };
        let own = self.directory.join(container);
        let target = if mounted.target.is_empty() { &mounted.source } else { &mounted.target };
        if target.starts_with('/') {
            let file = own.join(format!("{name}-{i}"));
            Place { mounted: (file.clone(), target.clone()), file }
        } else {
            // As a directory: a file in it can be replaced by another at once.
            Place { file: own.join(name).join(target), mounted: (own.join(name), usual.to_owned()) }
        }
    }

    fn all(spec: &v1::ContainerSpec) -> impl Iterator<Item = (SecretKind, usize, &v1::SecretMount)> {
        let secrets = spec.secrets.iter().enumerate().map(|(i, mount)| (SecretKind::Secret, i, mount));
        secrets.chain(spec.configs.iter().enumerate().map(|(i, mount)| (SecretKind::Config, i, mount)))
    }

    /// Those that are files.
    fn mounts(spec: &v1::ContainerSpec) -> impl Iterator<Item = (SecretKind, usize, &v1::SecretMount)> {
        Self::all(spec).filter(|(_, _, mount)| mount.env.is_empty())
    }

    /// Writes the file with a container's variables, if it has any, and says where it is.
    pub(crate) fn write_env(
        &self,
        container: &str,
        spec: &v1::ContainerSpec,
        (uid, gid): (u32, u32),
    ) -> Result<Option<PathBuf>, Error> {
        let mut entries = Vec::new();
        for (kind, _, mount) in Self::all(spec).filter(|(_, _, mount)| !mount.env.is_empty()) {
            let value = self.value(kind, &mount.source)?;
            let problem = match &value {
                value if value.contains(&0) => Some("it has a zero byte"),
                value if mount.env.len() + 1 + value.len() > warren_spec::MAX_STRING => {
                    Some("it is longer than 128 KiB, which is the most that the kernel takes")
                }
                _ => None,
            };
            if let Some(why) = problem {
                return Err(Error::NoVariable { kind: kind_name(kind), name: mount.source.clone(), why });
            }
            entries.extend([mount.env.as_bytes(), b"=", &value, b"\0"].concat());
        }
        if entries.is_empty() {
            return Ok(None);
        }
        let file = self.directory.join(container).join(ENV);
        let write = || {
            fs::create_dir_all(self.directory.join(container))?;
            let mut opened = fs::File::options().write(true).create(true).truncate(true).mode(0o400).open(&file)?;
            chown(&file, Some(uid), Some(gid))?;
            opened.write_all(&entries)
        };
        write().map_err(io("writing the secrets that are variables".to_owned()))?;
        Ok(Some(file))
    }

    /// Writes a container's files and says where it is to have them. `owner` says whose each is.
    pub(crate) fn write(
        &self,
        container: &str,
        spec: &v1::ContainerSpec,
        owner: impl Fn(&v1::SecretMount) -> Result<(u32, u32), runtime::Error>,
    ) -> Result<Vec<Mounted>, Error> {
        let mut mounted: Vec<Mounted> = Vec::new();
        for (kind, i, mount) in Self::mounts(spec) {
            let place = self.place(container, kind, i, mount);
            let owner = owner(mount).map_err(|error| Error::Owner {
                kind: kind_name(kind),
                name: mount.source.clone(),
                why: error.to_string(),
            })?;
            self.write_file(&place.file, kind, mount, owner)?;
            if !mounted.contains(&place.mounted) {
                mounted.push(place.mounted);
            }
        }
        Ok(mounted)
    }

    fn write_file(
        &self,
        file: &Path,
        kind: SecretKind,
        mounted: &v1::SecretMount,
        (uid, gid): (u32, u32),
    ) -> Result<(), Error> {
        let value = self.value(kind, &mounted.source)?;
        let action = || format!("writing {} {:?}", kind_name(kind), mounted.source);
        let write = || {
            if let Some(directory) = file.parent() {
                fs::create_dir_all(directory)?;
            }
            let usual = if kind == SecretKind::Config { 0o444 } else { 0o400 };
            let mode = if mounted.mode == 0 { usual } else { mounted.mode };
            // Whole and with its owner before it is there; what is mounted by itself stays the same file.
            let in_place = file.exists() && mounted.target.starts_with('/');
            let new = if in_place { file.to_owned() } else { file.with_file_name(".new") };
            let opened = fs::File::options().write(true).create(true).truncate(false).mode(0o600).open(&new)?;
            // Never empty in between, for whoever reads the file that stays the same.
            opened.write_all_at(&value, 0)?;
            opened.set_len(value.len() as u64)?;
            chown(&new, Some(uid), Some(gid))?;
            fs::set_permissions(&new, fs::Permissions::from_mode(mode))?;
            if in_place { Ok(()) } else { fs::rename(&new, file) }
        };
        write().map_err(io(action()))
    }

    /// Brings a running container's files up to date with a changed value, where its service wants it, and says which signal
    /// to send it then.
    pub(crate) fn renew(
        &self,
        container: &str,
        spec: &v1::ContainerSpec,
        changed: &[(SecretKind, String)],
    ) -> (Option<u32>, Vec<Error>) {
        const SIGHUP: u32 = 1;
        let (mut signal, mut errors) = (None, Vec::new());
        for (kind, i, mount) in Self::mounts(spec) {
            let is_news = changed.iter().any(|(of, name)| *of == kind && *name == mount.source);
            if is_news && mount.on_update() == OnUpdate::Signal {
                let file = self.place(container, kind, i, mount).file;
                // After an agent's restart all values are news to it, and few to the container.
                if fs::read(&file).is_ok_and(|known| self.value(kind, &mount.source).is_ok_and(|value| known == value))
                {
                    continue;
                }
                // Whose it was when the container was made.
                let owner = fs::metadata(&file).map(|found| (found.uid(), found.gid()));
                let owner = owner.map_err(io(format!("looking at {} {:?}", kind_name(kind), mount.source)));
                match owner.and_then(|owner| self.write_file(&file, kind, mount, owner)) {
                    Ok(()) => signal = Some(warren_spec::signal(&mount.signal).unwrap_or(SIGHUP)),
                    Err(error) => errors.push(error),
                }
            }
        }
        (signal, errors)
    }

    /// Removes a container's files; it may have none.
    pub(crate) fn remove(&self, container: &str) {
        let _ = fs::remove_dir_all(self.directory.join(container));
    }
}
