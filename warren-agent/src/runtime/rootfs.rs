//! A container's files before it runs: who its users are, and what its new volumes begin with.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, Metadata},
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, fchown, lchown, symlink},
    },
    path::{Path, PathBuf},
};

use containerd_client::types::Mount;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, ResolveFlags, Timespec, Timestamps, XattrFlags, lgetxattr,
    llistxattr, lsetxattr, mkdirat, mknodat, openat, openat2, renameat_with, utimensat,
};
use warren_proto::v1;

use super::{Containerd, Error, LocalImage, layers::inside, users};

/// A volume of a container: where it is on the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumePath {
    /// The directory.
    pub path: PathBuf,
    /// It is not there yet: it begins as what the image has where it is mounted.
    pub is_new: bool,
}

/// The files of a container that is being made. A lease keeps its snapshot until the container's record does.
pub struct RootFs {
    leased: Containerd,
    id: String,
    mounts: Vec<Mount>,
    users: users::Users,
    pub(super) identity: users::Identity,
}

impl std::fmt::Debug for RootFs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RootFs").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for RootFs {
    fn drop(&mut self) {
        // Nobody waits for its end.
        tokio::spawn(self.leased.clone().end_lease());
    }
}

impl RootFs {
    /// Makes the snapshot, and finds out who the container's user is.
    pub(super) async fn new(
        containerd: &Containerd,
        image: &LocalImage,
        id: &str,
        spec: &v1::ContainerSpec,
    ) -> Result<Self, Error> {
        let leased = containerd.with_lease().await?;
        let mut made = Self {
            leased: leased.clone(),
            id: id.to_owned(),
            mounts: Vec::new(),
            users: users::Users::default(),
            identity: users::Identity::ROOT,
        };
        let parent = leased.unpack(image).await?;
        leased.prepare_snapshot(id, parent).await?;
        made.mounts = leased.mounts(id).await?;
        let of_image = image.config.user().as_deref().unwrap_or_default();
        let user = if spec.user.is_empty() { of_image } else { &spec.user };
        // Also for root: the runtime reads them whoever the user is.
        made.users = users::Users::mounted(made.mounts.clone()).await?;
        made.identity = made.users.identity(user)?;
        Ok(made)
    }

    /// The connection under whose lease the snapshot is.
    pub(super) fn leased(&self) -> &Containerd {
        &self.leased
    }

    /// The container's own user and group.
    #[must_use]
    pub fn user(&self) -> (u32, u32) {
        (self.identity.uid, self.identity.gid)
    }

    /// Who a secret's or config's file belongs to: whom its mount names, else the container's user.
    ///
    /// # Errors
    ///
    /// When the image has no such user or group.
    pub fn owner(&self, mount: &v1::SecretMount) -> Result<(u32, u32), Error> {
        let user = match mount.user.as_str() {
            "" if mount.uid != 0 => mount.uid.to_string(),
            named => named.to_owned(),
        };
        let owner = if user.is_empty() { self.identity.clone() } else { self.users.identity(&user)? };
        let gid = match mount.group.as_str() {
            "" if mount.gid != 0 => mount.gid,
            "" => owner.gid,
            group => self.users.identity(&format!("{}:{group}", owner.uid))?.gid,
        };
        Ok((owner.uid, gid))
    }

    /// Makes the container's new volumes: each begins as what the image has where it is mounted first, with its owner, mode and
    /// content; where the image has nothing, as an empty directory of the container's user.
    ///
    /// # Errors
    ///
    /// When they cannot be written. Nothing is left of one that could not.
    pub async fn fill(&self, spec: &v1::ContainerSpec, volumes: &BTreeMap<String, VolumePath>) -> Result<(), Error> {
        for (name, volume) in volumes.iter().filter(|(_, volume)| volume.is_new) {
            // Other containers of the service want the same one.
            let slot = self.leased.filling().slot(&volume.path.to_string_lossy());
            let _turn = slot.turn.lock().await;
            let mounted = |mount: &&v1::Mount| mount.r#type() == v1::MountType::Volume && mount.source == *name;
            let target = spec.mounts.iter().find(mounted).map(|mount| mount.target.clone());
            let (mounts, path, owner) =
                (self.mounts.clone(), volume.path.clone(), (self.identity.uid, self.identity.gid));
            let filled = tokio::task::spawn_blocking(move || fill(mounts, target.as_deref(), &path, owner)).await;
            filled
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
                .map_err(|error| Error::BadSpec(format!("volume {name:?} cannot be made: {error}")))?;
        }
        Ok(())
    }
}

/// Where a volume is made before it has its own name.
pub(crate) fn unfinished(volume: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".new-");
    name.push(volume.file_name().unwrap_or_default());
    volume.with_file_name(name)
}

/// Makes a volume, whole or not at all: it gets its name once it is complete, unless another container's was first.
fn fill(mounts: Vec<Mount>, target: Option<&str>, volume: &Path, owner: (u32, u32)) -> io::Result<()> {
    if volume.try_exists()? {
        return Ok(());
    }
    let draft = unfinished(volume);
    let parent = volume.parent().unwrap_or(volume);
    fs::create_dir_all(parent)?;
    // Held open: below the mounts, the path may be covered.
    let parent = File::open(parent)?;
    let name = |path: &Path| path.file_name().unwrap_or_default().to_owned();
    let (draft_name, final_name) = (name(&draft), name(volume));
    if let Err(error) = fs::remove_dir_all(&draft)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    mkdirat(&parent, &draft_name, Mode::from_raw_mode(0o755))?;
    let to = openat(&parent, &draft_name, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let path = target.unwrap_or("/").trim_start_matches('/').to_owned();
    let copied = inside(mounts, move |root| {
        let root = open_directory(root)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match openat2(&root, path.as_str(), flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS) {
            Ok(from) if !path.is_empty() => copy_directory(&held(&from), &held(&to), &mut HashMap::new()),
            Ok(_) | Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {
                lchown(held(&to), Some(owner.0), Some(owner.1))
            }
            Err(error) => Err(error.into()),
        }
    });
    // What has its name is on the disk whole, also when the power goes.
    let synced = copied.and_then(|()| Ok(rustix::fs::syncfs(&parent)?));
    let made =
        synced.and_then(|()| match renameat_with(&parent, &draft_name, &parent, &final_name, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::EXIST) => fs::remove_dir_all(&draft),
            Err(error) => Err(error.into()),
        });
    if made.is_err() {
        // The first error is what counts.
        let _ = fs::remove_dir_all(&draft);
    }
    made
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    Ok(openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// A path of an open directory, whatever covers its name.
fn held(directory: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/.", directory.as_raw_fd()))
}

/// Copies what is in a directory, and how the directory is. Nobody else changes either meanwhile, and no symbolic link is followed.
/// `linked` are files with several names, by device and inode.
fn copy_directory(from: &Path, to: &Path, linked: &mut HashMap<(u64, u64), PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let found = fs::symlink_metadata(&source)?;
        let kind = found.file_type();
        if kind.is_dir() {
            fs::create_dir(&target)?;
            copy_directory(&source, &target, linked)?;
            continue;
        }
        let key = (found.dev(), found.ino());
        if found.nlink() > 1
            && let Some(first) = linked.get(&key)
        {
            fs::hard_link(first, &target)?;
            continue;
        }
        if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
            lchown(&target, Some(found.uid()), Some(found.gid()))?;
        } else if kind.is_file() {
            let mut written = File::options().write(true).create_new(true).open(&target)?;
            io::copy(&mut File::open(&source)?, &mut written)?;
            fchown(&written, Some(found.uid()), Some(found.gid()))?;
            copy_attributes(&source, &target, &found)?;
        } else if !kind.is_fifo() {
            // A socket is of a server that is not there. A device is not made here with the agent's rights for others to open.
            continue;
        } else {
            mknodat(CWD, &target, FileType::Fifo, Mode::from_raw_mode(found.mode() & 0o7777), 0)?;
            lchown(&target, Some(found.uid()), Some(found.gid()))?;
            copy_attributes(&source, &target, &found)?;
        }
        if found.nlink() > 1 {
            let _ = linked.insert(key, target);
        }
    }
    let found = fs::symlink_metadata(from)?;
    lchown(to, Some(found.uid()), Some(found.gid()))?;
    copy_attributes(from, to, &found)
}

/// Mode, extended attributes and times. The owner comes before: a change of it clears some bits.
fn copy_attributes(from: &Path, to: &Path, found: &Metadata) -> io::Result<()> {
    fs::set_permissions(to, fs::Permissions::from_mode(found.mode() & 0o7777))?;
    let mut names = vec![0_u8; 64 << 10];
    let length = match llistxattr(from, &mut names[..]) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => 0,
        Err(error) => return Err(error.into()),
    };
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        // The snapshotter's own are about layers.
        if name.starts_with(b"trusted.overlay.") {
            continue;
        }
        let name = std::ffi::CString::new(name)?;
        let mut value = vec![0_u8; 64 << 10];
        let length = lgetxattr(from, &name, &mut value[..])?;
        match lsetxattr(to, &name, &value[..length], XattrFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOTSUP) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let time = |seconds: i64, nanos: i64| Timespec { tv_sec: seconds, tv_nsec: nanos };
    let times = Timestamps {
        last_access: time(found.atime(), found.atime_nsec()),
        last_modification: time(found.mtime(), found.mtime_nsec()),
    };
    Ok(utimensat(CWD, to, &times, AtFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_copied_as_it_is() {
        let place = tempfile::tempdir().expect("a directory");
        let (from, to) = (place.path().join("from"), place.path().join("to"));
        fs::create_dir_all(from.join("sub")).expect("made");
        fs::create_dir(&to).expect("made");
        fs::write(from.join("sub/file"), "content").expect("written");
        fs::hard_link(from.join("sub/file"), from.join("again")).expect("linked");
        symlink("/nowhere", from.join("link")).expect("linked");
        fs::set_permissions(from.join("sub"), fs::Permissions::from_mode(0o2750)).expect("changed");
        fs::set_permissions(&from, fs::Permissions::from_mode(0o711)).expect("changed");
        copy_directory(&from, &to, &mut HashMap::new()).expect("copied");
        let at = |path: &str| fs::symlink_metadata(to.join(path)).expect("there");
        assert_eq!(fs::read_to_string(to.join("sub/file")).ok().as_deref(), Some("content"));
        assert_eq!((at("").mode() & 0o7777, at("sub").mode() & 0o7777), (0o711, 0o2750));
        assert_eq!(at("again").ino(), at("sub/file").ino());
        assert_eq!(fs::read_link(to.join("link")).ok().as_deref(), Some(Path::new("/nowhere")));
        assert_eq!(at("sub/file").mtime(), fs::metadata(from.join("sub/file")).expect("there").mtime());
    }
}
