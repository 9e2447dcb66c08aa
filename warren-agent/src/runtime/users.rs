//! Who a container's first process is: what the image's own files say of users and groups.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
};

use containerd_client::types::Mount;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2};
use warren_spec::{Principal, User};

use super::{Error, layers};

/// A user as the kernel knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// More groups than that one.
    pub(super) groups: Vec<u32>,
    /// Where its files are.
    pub(super) home: String,
}

impl Identity {
    /// Root, as every image has it.
    pub(super) const ROOT: Self = Self { uid: 0, gid: 0, groups: Vec::new(), home: String::new() };

    fn root() -> Self {
        Self { home: "/root".to_owned(), ..Self::ROOT }
    }
}

/// What an image's files say of users and groups.
#[derive(Clone, Debug, Default)]
pub(super) struct Users {
    passwd: String,
    group: String,
}

impl Users {
    /// Reads those of a container whose files these mounts are.
    pub(super) async fn mounted(mounts: Vec<Mount>) -> Result<Self, Error> {
        let read = move || layers::inside(mounts, read_files);
        Self::read(read).await
    }

    /// Reads those of a container that runs, with this process in it.
    async fn of_process(pid: u32) -> Result<Self, Error> {
        Self::read(move || read_files(Path::new(&format!("/proc/{pid}/root")))).await
    }

    async fn read(read: impl FnOnce() -> io::Result<Self> + Send + 'static) -> Result<Self, Error> {
        tokio::task::spawn_blocking(read)
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
            .map_err(|error| Error::BadSpec(format!("the image's users cannot be read: {error}")))
    }

    /// Who `user` is: "name" or "uid", and either with ":group" or ":gid" behind it. Empty is root.
    pub(super) fn identity(&self, user: &str) -> Result<Identity, Error> {
        if is_root(user) {
            return Ok(Identity::root());
        }
        let parsed: User = user.parse().map_err(|error: warren_spec::InvalidUser| Error::BadSpec(error.to_string()))?;
        identify(&parsed, &self.passwd, &self.group)
    }
}

/// Whether that is root, whatever the image's files say.
pub(super) fn is_root(user: &str) -> bool {
    matches!(user, "" | "root" | "0" | "0:0")
}

/// Finds a user of a container that runs, with this process in it. Empty is root.
pub(super) async fn resolve_inside(user: &str, pid: u32) -> Result<Identity, Error> {
    let users = if is_root(user) { Users::default() } else { Users::of_process(pid).await? };
    users.identity(user)
}

/// The rule is Docker's: a number need not be in the files, a name must. Without a group it is the user's own, else 0; the
/// groups that list the user come besides.
fn identify(user: &User, passwd: &str, group: &str) -> Result<Identity, Error> {
    let missing = |what, name: &str| Error::BadSpec(format!("user: the image has no {what} {name:?}"));
    let fields = |line: &str| line.split(':').map(str::to_owned).collect::<Vec<_>>();
    let number = |fields: &[String], at: usize| fields.get(at).and_then(|field| field.parse::<u32>().ok());
    let entry = passwd.lines().map(fields).find(|fields| match &user.user {
        Principal::Id(id) => number(fields, 2) == Some(*id),
        Principal::Name(name) => fields.first() == Some(name),
    });
    let uid = match (&user.user, entry.as_ref().and_then(|entry| number(entry, 2))) {
        (Principal::Id(id), _) => *id,
        (Principal::Name(_), Some(id)) => id,
        (Principal::Name(name), None) => return Err(missing("user", name)),
    };
    let gid = match &user.group {
        None => entry.as_ref().and_then(|entry| number(entry, 3)).unwrap_or(0),
        Some(Principal::Id(id)) => *id,
        Some(Principal::Name(name)) => {
            let known = group.lines().map(fields).find(|fields| fields.first() == Some(name));
            known.and_then(|fields| number(&fields, 2)).ok_or_else(|| missing("group", name))?
        }
    };
    let name = entry.as_ref().and_then(|entry| entry.first());
    let lists = |fields: &Vec<String>| {
        let members = fields.get(3).map(String::as_str).unwrap_or_default();
        name.is_some_and(|name| members.split(',').any(|member| member == name))
    };
    let listed = group.lines().map(fields).filter(lists);
    let groups = listed.filter_map(|fields| number(&fields, 2)).filter(|id| *id != gid && *id <= warren_spec::MAX_ID);
    let groups = groups.collect();
    if let Some(id) = [uid, gid].into_iter().find(|id| *id > warren_spec::MAX_ID) {
        return Err(Error::BadSpec(format!(
            "user: the image's files say {id}, and {} is the most",
            warren_spec::MAX_ID
        )));
    }
    let home = entry.and_then(|entry| entry.get(5).filter(|home| !home.is_empty()).cloned());
    Ok(Identity { uid, gid, groups, home: home.unwrap_or_else(|| "/".to_owned()) })
}

/// More than any such file has.
const MAX_FILE: u64 = 1 << 20;

/// Reads `/etc/passwd` and `/etc/group` below a directory; one that is not there is empty. Paths below it cannot lead out of
/// it. What is no file is refused: the runtime reads them too, and would wait for ever for who writes to a pipe.
fn read_files(root: &Path) -> io::Result<Users> {
    let root = openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let read = |path: &str| -> io::Result<String> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS) {
            Ok(file) => {
                if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
                    return Err(io::Error::other(format!("its /{path} is no file")));
                }
                let mut bytes = Vec::new();
                File::from(file).take(MAX_FILE).read_to_end(&mut bytes)?;
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(String::new()),
            Err(error) => Err(error.into()),
        }
    };
    Ok(Users { passwd: read("etc/passwd")?, group: read("etc/group")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/var/www:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nlogs:x:40:web,other\nmine:x:34:web\n";

    fn identity(user: &str) -> Result<Identity, String> {
        let user = user.parse().expect("a user");
        identify(&user, PASSWD, GROUP).map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let root = tempfile::tempdir().expect("a directory");
        assert!(read_files(root.path()).is_ok(), "there need be none");
        std::fs::create_dir(root.path().join("etc")).expect("writable");
        std::fs::write(root.path().join("etc/passwd"), PASSWD).expect("writable");
        let pipe = root.path().join("etc/group");
        rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).expect("writable");
        let refused = read_files(root.path()).expect_err("a pipe").to_string();
        assert_eq!(refused, "its /etc/group is no file");
    }

    #[test]
    fn the_images_files_say_who_is_who() {
        let web = Identity { uid: 33, gid: 34, groups: vec![40], home: "/var/www".to_owned() };
        assert_eq!(identity("web"), Ok(web.clone()));
        assert_eq!(identity("33"), Ok(web.clone()));
        assert_eq!(identity("web:logs"), Ok(Identity { gid: 40, groups: vec![34], ..web.clone() }));
        assert_eq!(identity("web:7"), Ok(Identity { gid: 7, groups: vec![40, 34], ..web }));
        let unknown = Identity { uid: 1000, gid: 0, groups: Vec::new(), home: "/".to_owned() };
        assert_eq!(identity("1000"), Ok(unknown.clone()));
        assert_eq!(identity("1000:1000"), Ok(Identity { gid: 1000, ..unknown }));
        assert_eq!(identity("nobody"), Err("user: the image has no user \"nobody\"".to_owned()));
        // What counts with a sign would take them for root, or for nobody at all.
        let large = identify(&"big".parse().expect("a user"), "big:x:4294967296:0::/:\nbig:x:2147483648:0::/:\n", "");
        assert!(large.is_err(), "{large:?}");
        let large = identify(&"big".parse().expect("a user"), "big:x:2147483648:0::/:\n", "");
        assert_eq!(
            large.map_err(|error| error.to_string()),
            Err("user: the image's files say 2147483648, and 2147483647 is the most".to_owned())
        );
        assert_eq!(identity("web:nobody"), Err("user: the image has no group \"nobody\"".to_owned()));
    }
}
