//! Notifications of the kernel: packet rules, links, addresses or routes have changed, whoever changed them.

use std::{io, sync::Arc, time::Duration};

use rtnetlink::sys::{
    AsyncSocket, AsyncSocketExt as _, SocketAddr, TokioSocket,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Groups of `NETLINK_NETFILTER`: nftables (linux/netfilter/nfnetlink.h).
const NFTABLES: [u32; 1] = [7];
/// Groups of `NETLINK_ROUTE`: links, addresses and routes of both families (linux/rtnetlink.h).
const ROUTE: [u32; 5] = [1, 5, 7, 9, 11];
/// Before listening again after what listens failed.
const RETRY: Duration = Duration::from_secs(5);

fn listen(protocol: isize, groups: &[u32]) -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(protocol)?;
    socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
    for group in groups {
        socket.socket_mut().add_membership(*group)?;
    }
    Ok(socket)
}

async fn follow(protocol: isize, groups: &[u32], changed: &Notify) -> io::Result<()> {
    let socket = listen(protocol, groups)?;
    loop {
        match socket.recv_from_full().await {
            Ok(_) => {}
            // More has changed than there was room for.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
            Err(error) => return Err(error),
        }
        changed.notify_one();
    }
}

/// Notifies of changes until `shutdown`. Without notifications, the slow look from time to time is what is left.
pub(super) async fn watch(changed: Arc<Notify>, shutdown: CancellationToken) {
    let both = async {
        tokio::join!(again(NETLINK_NETFILTER, &NFTABLES, &changed), again(NETLINK_ROUTE, &ROUTE, &changed));
    };
    shutdown.run_until_cancelled(both).await;
}

async fn again(protocol: isize, groups: &[u32], changed: &Notify) {
    loop {
        if let Err(error) = follow(protocol, groups, changed).await {
            tracing::debug!(%error, "the kernel's notifications cannot be followed; trying again");
        }
        tokio::time::sleep(RETRY).await;
    }
}
