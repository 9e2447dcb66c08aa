//! The node's own side: what it forwards, and the rules of its packets.

use std::{collections::BTreeSet, fs, io, net::IpAddr, path::Path, process::Stdio};

use tokio::{io::AsyncWriteExt as _, process::Command};

use super::{CONTAINER_LINKS, Error, ruleset::TABLE};

fn write(path: &str, value: &str) -> Result<(), Error> {
    // Writing what is there already would fail on a read-only /proc/sys for no reason.
    if fs::read_to_string(path).is_ok_and(|known| known.trim() == value) {
        return Ok(());
    }
    fs::write(path, value).map_err(|source| Error::Io { action: format!("setting {path} to {value}"), source })
}

/// Lets the node forward packets. With IPv6 a node that forwards no longer listens to routers, unless it is told to.
pub(super) fn forward(v6: bool) -> Result<(), Error> {
    write("/proc/sys/net/ipv4/ip_forward", "1")?;
    if v6 {
        let links = fs::read_dir("/proc/sys/net/ipv6/conf").into_iter().flatten().flatten();
        // Links that are there, and that are no container's: those have no business with routers.
        let is_own = |name: &str| !matches!(name, "all" | "default") && !is_containers(name);
        let links = links.filter(|link| link.file_name().to_str().is_some_and(is_own));
        for link in links {
            let accept = link.path().join("accept_ra");
            if fs::read_to_string(&accept).is_ok_and(|accepts| accepts.trim() == "1") {
                write(&accept.to_string_lossy(), "2")?;
            }
        }
        write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
    }
    Ok(())
}

/// Whether the node forwards packets, as [`forward`] lets it.
pub(super) fn forwards(v6: bool) -> bool {
    let is_on = |path: &str| fs::read_to_string(path).is_ok_and(|said| said.trim() == "1");
    is_on("/proc/sys/net/ipv4/ip_forward") && (!v6 || is_on("/proc/sys/net/ipv6/conf/all/forwarding"))
}

/// Whether this machine has IPv6: it may be switched off at boot, or by sysctl.
pub(super) fn has_ipv6() -> bool {
    let is_off = |scope: &str| {
        let said = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"));
        said.map_or(true, |said| said.trim() != "0")
    };
    !["all", "default", "lo"].into_iter().any(is_off)
}

/// Lets what the node sends to its own loopback be led to containers on this link: a published port on 127.0.0.1. What
/// comes from the link to loopback addresses, the rules drop.
/// A link that is not there needs nothing.
pub(super) fn lead_loopback_to(link: &str) -> Result<(), Error> {
    let path = format!("/proc/sys/net/ipv4/conf/{link}/route_localnet");
    match write(&path, "1") {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The machine's own addresses.
pub(super) fn addresses() -> BTreeSet<IpAddr> {
    let address = |link: nix::ifaddrs::InterfaceAddress| {
        let address = link.address?;
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().into()))
    };
    nix::ifaddrs::getifaddrs().map(|links| links.filter_map(address).collect()).unwrap_or_default()
}

/// Whether a link is a container's.
pub(super) fn is_containers(link: &str) -> bool {
    link.starts_with(CONTAINER_LINKS)
}

/// The rules as the kernel has them; nothing if it has none.
pub(super) async fn list_rules() -> Result<Option<String>, Error> {
    // A map's elements are what it leads to: without names, ports stay numbers.
    let listed = Command::new("nft").args(["-n", "list", "table", "inet", TABLE]).kill_on_drop(true).output().await;
    let listed = listed.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => Error::NoNft,
        _ => Error::Io { action: "running nft".to_owned(), source },
    })?;
    Ok(listed.status.success().then(|| String::from_utf8_lossy(&listed.stdout).into_owned()))
}

/// Makes the rules these, all at once.
pub(super) async fn load_rules(rules: &str) -> Result<(), Error> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => Error::NoNft,
        _ => Error::Io { action: "running nft".to_owned(), source },
    };
    let mut nft = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = nft.stdin.take() {
        // If it ends before it has read all, its exit code says why.
        let _ = stdin.write_all(rules.as_bytes()).await;
    }
    let output = nft.wait_with_output().await.map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default().to_owned();
    Err(Error::Rules(said))
}

/// Whether a path is there, a mount point or not.
pub(super) fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}
