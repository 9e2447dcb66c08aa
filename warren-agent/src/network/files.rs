use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use super::RESOLVER;

/// The files of `/etc` that say where a container is: who it is, and whom to ask for names. One directory a container.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    directory: PathBuf,
    domain: String,
}

/// A file and where it is in the container.
pub(crate) type Mounted = (PathBuf, &'static str);

impl Files {
    pub(super) fn new(directory: PathBuf, domain: &str) -> Self {
        Self { directory, domain: domain.to_owned() }
    }

    /// Writes the files of a container in the cluster's network, or with `addresses` empty of one without any.
    pub(crate) fn write(&self, container: &str, hostname: &str, addresses: &[IpAddr]) -> io::Result<Vec<Mounted>> {
        let directory = self.directory.join(container);
        fs::create_dir_all(&directory)?;
        let mut hosts = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
        for address in addresses {
            hosts += &format!("{address}\t{hostname}\n");
        }
        let mut files = vec![("hosts", "/etc/hosts", hosts), ("hostname", "/etc/hostname", format!("{hostname}\n"))];
        if !addresses.is_empty() {
            // A name without dots is a service first; five seconds is what resolvers wait unless told otherwise.
            let resolv =
                format!("nameserver {RESOLVER}\nsearch {}\noptions ndots:1 timeout:2 attempts:2\n", self.domain);
            files.push(("resolv.conf", "/etc/resolv.conf", resolv));
        }
        let mut mounted = Vec::new();
        for (name, target, text) in files {
            let path = directory.join(name);
            fs::write(&path, text)?;
            mounted.push((path, target));
        }
        Ok(mounted)
    }

    pub(super) fn remove(&self, container: &str) {
        // A container of another kind of network has none.
        let _ = fs::remove_dir_all(self.directory.join(container));
    }

    pub(super) fn keep_only(&self, keep: impl Fn(&str) -> bool) {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
            if !keep(&name) {
                self.remove(&name);
            }
        }
    }

    /// The node's own files, for a container in the node's network.
    pub(crate) fn of_the_node() -> Vec<Mounted> {
        let files = ["/etc/hosts", "/etc/resolv.conf"];
        files.into_iter().filter(|file| Path::new(file).exists()).map(|file| (PathBuf::from(file), file)).collect()
    }
}
