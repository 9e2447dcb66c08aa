//! Network namespaces by path: made in a thread of their own, kept by a bind mount, gone when that is.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd as _,
    path::Path,
    thread,
};

use rtnetlink::sys::{AsyncSocket as _, TokioSocket, protocols::NETLINK_ROUTE};
use rustix::{
    mount::{UnmountFlags, mount_bind, unmount},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};
use tokio::net::TcpSocket;

/// Makes a namespace and keeps it at `path`, which must not be there yet. It ends when it is unmounted and its last
/// process is gone.
pub(super) fn create(path: &Path) -> io::Result<File> {
    File::options().create_new(true).write(true).open(path)?;
    let kept = path.to_owned();
    let made = in_thread(move || {
        // SAFETY: the thread is new and ends with this closure: nothing else runs on it that another network could confuse.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
        Ok(mount_bind("/proc/thread-self/ns/net", &kept)?)
    });
    match made.and_then(|()| File::open(path)) {
        Ok(namespace) => Ok(namespace),
        Err(error) => {
            remove(path)?;
            Err(error)
        }
    }
}

/// Lets go of a namespace; one that is not there is what is wanted.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match unmount(path, UnmountFlags::DETACH) {
        // Not mounted: left by an attempt that was cut short. Not there: as it should be.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// A netlink socket in a namespace: it stays there whichever thread uses it.
pub(super) fn netlink(namespace: &File) -> io::Result<TokioSocket> {
    let namespace = namespace.try_clone()?;
    let runtime = tokio::runtime::Handle::current();
    in_thread(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        let _reactor = runtime.enter();
        TokioSocket::new(NETLINK_ROUTE)
    })
}

/// A socket in the namespace at `path`, which may be a process's.
pub(crate) fn tcp_socket(path: &Path, is_v4: bool) -> io::Result<TcpSocket> {
    let namespace = File::open(path)?;
    let runtime = tokio::runtime::Handle::current();
    in_thread(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        let _reactor = runtime.enter();
        if is_v4 { TcpSocket::new_v4() } else { TcpSocket::new_v6() }
    })
}

/// Runs something on a thread that nothing else uses, because it changes what the thread sees.
fn in_thread<T: Send + 'static>(run: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let thread = thread::Builder::new().name("network namespace".to_owned()).spawn(run)?;
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
