//! Volumes on this node. A driver makes a volume a path that containers can be given; what a driver has mounted is unmounted
//! when no container uses it any more, and a directory is removed when the manager no longer knows the volume.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::CString,
    fs, io,
    net::{IpAddr, ToSocketAddrs as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use warren_agent_ebpf::histogram::Histogram;
use warren_proto::v1;
use warren_spec::Policy;
use warren_telemetry::{Measurement, Series, Source};

use crate::{
    probes::exponential,
    runtime::{self, VolumePath, unfinished},
};

/// Why a volume is not to be had.
#[derive(Debug, thiserror::Error)]
#[error("volume {name:?}: {why}")]
pub struct Error {
    name: String,
    why: String,
}

/// Makes volumes paths.
trait Driver: Send + Sync {
    /// Makes the volume available and returns where; it may be already, and a directory may be still to be made.
    fn mount(&self, volume: &v1::Volume) -> io::Result<VolumePath>;
    /// No container uses it any more; returns whether there was something to unmount.
    fn unmount(&self, id: &str) -> io::Result<bool>;
    /// It does not exist any more: what there is of it goes.
    fn remove(&self, id: &str) -> io::Result<()>;
}

/// A directory for each volume.
struct Directories {
    directory: PathBuf,
}

impl Driver for Directories {
    fn mount(&self, volume: &v1::Volume) -> io::Result<VolumePath> {
        let path = self.directory.join(&volume.id);
        fs::create_dir_all(&self.directory)?;
        let is_new = !path.try_exists()?;
        Ok(VolumePath { path, is_new })
    }

    fn unmount(&self, _: &str) -> io::Result<bool> {
        Ok(false)
    }

    fn remove(&self, id: &str) -> io::Result<()> {
        let path = self.directory.join(id);
        for path in [unfinished(&path), path] {
            match fs::remove_dir_all(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A directory of the node that is there already.
struct Binds {
    policy: Policy,
}

impl Driver for Binds {
    fn mount(&self, volume: &v1::Volume) -> io::Result<VolumePath> {
        let device = volume.driver_options.get("device").map(PathBuf::from).unwrap_or_default();
        let path = runtime::host_path(&device, &self.policy).map_err(io::Error::other)?;
        Ok(VolumePath { path, is_new: false })
    }

    fn unmount(&self, _: &str) -> io::Result<bool> {
        Ok(false)
    }

    fn remove(&self, _: &str) -> io::Result<()> {
        Ok(())
    }
}

/// Memory, or another machine's files: what the kernel mounts.
struct Mounts {
    directory: PathBuf,
}

/// Mount options that are flags of mount(2); the others are the file system's.
const FLAGS: [(&str, MountFlags); 7] = [
    ("ro", MountFlags::RDONLY),
    ("nodev", MountFlags::NODEV),
    ("nosuid", MountFlags::NOSUID),
    ("noexec", MountFlags::NOEXEC),
    ("noatime", MountFlags::NOATIME),
    ("nodiratime", MountFlags::NODIRATIME),
    ("relatime", MountFlags::RELATIME),
];

/// Flags and data of a volume's option `o`.
fn parse(options: &str) -> (MountFlags, Vec<String>) {
    let mut flags = MountFlags::empty();
    let mut data = Vec::new();
    for option in options.split(',').filter(|option| !option.is_empty() && *option != "rw") {
        match FLAGS.iter().find(|(name, _)| *name == option) {
            Some((_, flag)) => flags |= *flag,
            None => data.push(option.to_owned()),
        }
    }
    (flags, data)
}

/// The kernel's NFS client wants its server's address as a number, which mount.nfs(8) would find out for it.
fn resolve(data: &mut [String]) -> io::Result<()> {
    for option in data {
        if let Some(host) = option.strip_prefix("addr=")
            && host.parse::<IpAddr>().is_err()
        {
            let found = (host, 2049).to_socket_addrs()?.next();
            let found = found.ok_or_else(|| io::Error::other(format!("{host} has no address")))?;
            *option = format!("addr={}", found.ip());
        }
    }
    Ok(())
}

impl Mounts {
    fn path(&self, id: &str) -> PathBuf {
        self.directory.join(id)
    }
}

impl Driver for Mounts {
    fn mount(&self, volume: &v1::Volume) -> io::Result<VolumePath> {
        let path = self.path(&volume.id);
        fs::create_dir_all(&path)?;
        if is_mount_point(&path)? {
            return Ok(VolumePath { path, is_new: false });
        }
        let option = |name: &str| volume.driver_options.get(name).map(String::as_str).unwrap_or_default();
        let (flags, mut data) = parse(option("o"));
        let kind = option("type");
        if kind.starts_with("nfs") {
            resolve(&mut data)?;
        }
        let device = if option("device").is_empty() { kind } else { option("device") };
        let data = CString::new(data.join(","))?;
        // What a file server, or whoever wrote there, says is no device and no other user's right here.
        let flags = flags | MountFlags::NODEV | MountFlags::NOSUID;
        mount(device, &path, kind, flags, data.as_c_str())?;
        Ok(VolumePath { path, is_new: false })
    }

    fn unmount(&self, id: &str) -> io::Result<bool> {
        let path = self.path(id);
        let mounted = match unmount(&path, UnmountFlags::DETACH) {
            Ok(()) => true,
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => false,
            Err(error) => return Err(error.into()),
        };
        match fs::remove_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(mounted),
        }
    }

    fn remove(&self, id: &str) -> io::Result<()> {
        self.unmount(id).map(drop)
    }
}

/// Whether something is mounted on a directory: then it is another file system than its parent.
pub(crate) fn is_mount_point(directory: &Path) -> io::Result<bool> {
    Ok(fs::metadata(directory)?.dev() != fs::metadata(directory.join(".."))?.dev())
}

#[derive(Debug, Default)]
struct Known {
    /// Containers by the volume that they use.
    users: BTreeMap<String, BTreeSet<String>>,
    operations: BTreeMap<(&'static str, &'static str), u64>,
    durations: BTreeMap<&'static str, Histogram>,
}

/// The node's volumes. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Volumes {
    directory: PathBuf,
    known: Arc<Mutex<Known>>,
    /// One for each volume, held while it is mounted, unmounted or removed: a file server that hangs holds up only what is on it.
    turns: Arc<Mutex<BTreeMap<String, Arc<Mutex<()>>>>>,
    policy: Policy,
}

impl Volumes {
    /// Keeps volumes below a directory; of the node's own files, they may be what the policy allows.
    #[must_use]
    pub fn new(directory: PathBuf, policy: Policy) -> Self {
        Self { directory, known: Arc::default(), turns: Arc::default(), policy }
    }

    /// What it counts.
    pub(crate) fn source(&self) -> Arc<dyn Source> {
        Arc::new(self.clone())
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` while nobody else does anything with the volume.
    fn in_turn<T>(&self, id: &str, work: impl FnOnce() -> T) -> T {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        let turn = Arc::clone(turns.entry(id.to_owned()).or_default());
        drop(turns);
        let _held = turn.lock().unwrap_or_else(PoisonError::into_inner);
        work()
    }

    fn driver(&self, volume: &v1::Volume) -> Box<dyn Driver> {
        match volume.driver_options.get("type").map(String::as_str).unwrap_or_default() {
            "" => Box::new(self.directories()),
            "bind" => Box::new(Binds { policy: self.policy.clone() }),
            _ => Box::new(self.mounts()),
        }
    }

    fn directories(&self) -> Directories {
        Directories { directory: self.directory.join("data") }
    }

    fn mounts(&self) -> Mounts {
        Mounts { directory: self.directory.join("mounts") }
    }

    fn counted<T>(&self, operation: &'static str, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let began = Instant::now();
        let result = run();
        let took: Duration = began.elapsed();
        let mut known = self.known();
        let outcome = if result.is_ok() { "success" } else { "failure" };
        *known.operations.entry((operation, outcome)).or_default() += 1;
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        known.durations.entry(operation).or_insert(Histogram::EMPTY).observe(nanos);
        result
    }

    /// A container of an earlier agent uses these.
    pub(crate) fn keep(&self, container: &str, volumes: &[v1::Volume]) {
        let mut known = self.known();
        for volume in volumes {
            known.users.entry(volume.id.clone()).or_default().insert(container.to_owned());
        }
    }

    /// Makes a container's volumes available, and says where each is, by its name. May take as long as a file server does.
    pub(crate) fn mount(&self, container: &str, volumes: &[v1::Volume]) -> Result<BTreeMap<String, VolumePath>, Error> {
        self.keep(container, volumes);
        let mut paths = BTreeMap::new();
        for volume in volumes {
            let mounted = self.in_turn(&volume.id, || self.counted("mount", || self.driver(volume).mount(volume)));
            let path = mounted.map_err(|error| Error { name: volume.name.clone(), why: error.to_string() })?;
            paths.insert(volume.name.clone(), path);
        }
        Ok(paths)
    }

    /// A container is gone: what nobody else uses is unmounted. May take as long as a file server does.
    pub(crate) fn release(&self, container: &str) {
        let unused: Vec<String> = {
            let mut known = self.known();
            let mut unused = Vec::new();
            known.users.retain(|volume, users| {
                if users.remove(container) && users.is_empty() {
                    unused.push(volume.clone());
                }
                !users.is_empty()
            });
            unused
        };
        for volume in &unused {
            let unmounted = self.in_turn(volume, || {
                // Another container may have come meanwhile. And of a directory there is nothing to unmount, which is no operation.
                if self.known().users.contains_key(volume) {
                    return Ok(false);
                }
                match self.mounts().unmount(volume) {
                    Ok(false) => Ok(false),
                    other => self.counted("unmount", || other),
                }
            });
            if let Err(error) = unmounted {
                tracing::warn!(volume, %error, "a volume could not be unmounted");
            }
        }
    }

    /// Removes what is here of these volumes, apart from those that containers use.
    pub(crate) fn remove(&self, ids: &BTreeSet<String>) {
        for id in ids {
            let path = self.directories().directory.join(id);
            let removed = self.in_turn(id, || {
                let here = path.exists() || unfinished(&path).exists();
                if !here || self.known().users.contains_key(id) {
                    return Ok(());
                }
                tracing::info!(volume = id, "removing a volume that was deleted");
                self.counted("remove", || {
                    self.mounts().remove(id)?;
                    self.directories().remove(id)
                })
            });
            if let Err(error) = removed {
                tracing::warn!(volume = id, %error, "a volume could not be removed");
            }
        }
    }
}

impl Source for Volumes {
    fn collect(&self) -> Vec<Series> {
        let known = self.known();
        let operations = known.operations.iter().map(|((operation, result), count)| {
            let labels = [("operation", *operation), ("result", *result)];
            Series::new("warren_volume_operations_total", &labels, Measurement::Counter(*count as f64))
        });
        let durations = known.durations.iter().map(|(operation, histogram)| {
            let value = Measurement::Histogram(exponential(histogram));
            Series::new("warren_volume_operation_duration_seconds", &[("operation", *operation)], value)
        });
        operations.chain(durations).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_or_the_file_systems() {
        let (flags, data) = parse("addr=192.0.2.1,ro,rw,nosuid,vers=4.2");
        assert_eq!(flags, MountFlags::RDONLY | MountFlags::NOSUID);
        assert_eq!(data, ["addr=192.0.2.1", "vers=4.2"]);
    }

    #[test]
    fn a_directory_lives_as_long_as_its_volume() {
        let directory = tempfile::tempdir().expect("a directory");
        let volumes = Volumes::new(directory.path().to_owned(), Policy::everything());
        let volume = v1::Volume { id: "v1".to_owned(), name: "data".to_owned(), ..Default::default() };
        let VolumePath { path, is_new } =
            volumes.mount("c1", std::slice::from_ref(&volume)).expect("mounted")["data"].clone();
        assert!(is_new, "whoever has the image makes it");
        fs::create_dir(&path).expect("made");
        assert!(!volumes.mount("c1", std::slice::from_ref(&volume)).expect("mounted")["data"].is_new);
        fs::write(path.join("file"), "kept").expect("writable");
        let deleted = BTreeSet::from(["v1".to_owned()]);
        volumes.remove(&deleted);
        assert!(path.exists(), "a container uses it");
        volumes.release("c1");
        volumes.remove(&BTreeSet::from(["another".to_owned()]));
        assert!(path.join("file").exists(), "nobody has said that it was deleted");
        volumes.remove(&deleted);
        assert!(!path.exists());
    }
}
