//! Looking into the files of a container that does not run.

use std::{io, path::Path, thread};

use containerd_client::types::Mount;
use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    thread::{UnshareFlags, unshare_unsafe},
};

/// Runs `work` with the directory below which a container's files are. They are mounted in a mount namespace of a thread's own:
/// nobody else sees them, and the mounts end with the thread.
pub(super) fn inside<T: Send + 'static>(
    mounts: Vec<Mount>,
    work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let worker = thread::Builder::new().name("container files".to_owned()).spawn(move || {
        // SAFETY: the thread is new and ends with this closure: nothing shares its file system state or depends on it.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        // Any directory that every machine has: what is covered there is covered for this thread alone.
        let root = Path::new("/tmp");
        for layer in &mounts {
            mount_layer(layer, root)?;
        }
        work(root)
    })?;
    worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The longest directory that all of these are below.
fn common_directory(paths: &[&str]) -> String {
    let Some((first, rest)) = paths.split_first() else { return String::new() };
    let mut end = first.rfind('/').map_or(0, |at| at + 1);
    while !rest.iter().all(|path| path.starts_with(&first[..end])) {
        end = first[..end.saturating_sub(1)].rfind('/').map_or(0, |at| at + 1);
    }
    first[..end].to_owned()
}

/// Mounts in this thread's namespaces, which are its own. The kernel takes a page of options, and an image may have many layers:
/// they are named from the directory that they have in common.
fn mount_layer(layer: &Mount, target: &Path) -> io::Result<()> {
    let mut flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID;
    let mut data = Vec::new();
    for option in &layer.options {
        match option.as_str() {
            "bind" => flags |= MountFlags::BIND,
            "rbind" => flags |= MountFlags::BIND | MountFlags::REC,
            "ro" | "rw" => {}
            other => match other.strip_prefix("lowerdir=") {
                Some(layers) => {
                    let layers: Vec<_> = layers.split(':').collect();
                    let common = common_directory(&layers);
                    if !common.is_empty() {
                        rustix::process::chdir(common.as_str())?;
                    }
                    let short: Vec<_> = layers.iter().map(|layer| &layer[common.len()..]).collect();
                    data.push(format!("lowerdir={}", short.join(":")));
                }
                None => data.push(other.to_owned()),
            },
        }
    }
    let data = std::ffi::CString::new(data.join(","))?;
    mount(layer.source.as_str(), target, layer.r#type.as_str(), flags, data.as_c_str())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_named_from_what_they_have_in_common() {
        assert_eq!(common_directory(&["/a/b/1/fs", "/a/b/22/fs"]), "/a/b/");
        assert_eq!(common_directory(&["/a/b/1/fs"]), "/a/b/1/");
        assert_eq!(common_directory(&["/a/x", "/b/x"]), "/");
        assert_eq!(common_directory(&["relative", "/b/x"]), "");
        assert_eq!(common_directory(&[]), "");
    }
}
