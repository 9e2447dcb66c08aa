//! The encrypted way to other nodes' containers: WireGuard, of the kernel where it has it, else of a process of this program,
//! which goes on when the agent ends.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    os::unix::{net::UnixStream, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use defguard_boringtun::device::{DeviceConfig, DeviceHandle};
use defguard_wireguard_rs::{
    InterfaceConfiguration, Kernel, Userspace, WGApi, WireguardInterfaceApi, error::WireguardInterfaceError, key::Key,
    net::IpAddrMask, peer::Peer as WireGuardPeer,
};
use rustix::{
    io::Errno,
    net::sockopt::socket_peercred,
    process::{Signal, kill_process},
};

use super::{Error, netlink::Netlink, peer::Peer};

/// The usual port.
const PORT: u16 = 51820;
/// What it adds to a packet: outer IPv6, UDP, its own header and the authenticator.
pub(super) const OVERHEAD: u32 = 80;
/// What the link's name begins with. The rest is the node's: it names a socket too, which all of a machine's network namespaces
/// share.
const LINKS: &str = "wg-";
/// Characters of the node's id in it, of which the kernel allows 15 in all.
const NODE_ID: usize = 12;

/// A node's key, made once and kept.
pub(super) fn key(directory: &Path) -> io::Result<Key> {
    let path = directory.join("wireguard.key");
    match fs::read_to_string(&path) {
        Ok(text) => text
            .trim()
            .parse()
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("{} is no key", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = Key::generate();
            // Readable by its owner alone, as all that is written so.
            warren_durable::replace(&path, key.to_string().as_bytes())?;
            Ok(key)
        }
        Err(error) => Err(error),
    }
}

/// The first argument of the program that makes it the process which encrypts.
pub(crate) const COMMAND: &str = "wireguard-device";
/// How long that process may take to be there.
const START: Duration = Duration::from_secs(5);

/// Where a link's process is told what to do; without it, it ends.
fn socket(name: &str) -> PathBuf {
    Path::new("/var/run/wireguard").join(format!("{name}.sock"))
}

/// The name of a node's link.
fn link_name(node_id: &str) -> String {
    format!("{LINKS}{node_id:.NODE_ID$}")
}

/// Encrypts what goes through a link, until it is told to end or its socket is removed.
#[must_use]
pub(crate) fn device(name: &str) -> ExitCode {
    match DeviceHandle::new(name, DeviceConfig::default()) {
        Ok(mut device) => {
            device.wait();
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Starts that process and waits until it listens.
fn start_device(name: &str) -> io::Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .args([COMMAND, name])
        .stdin(Stdio::null())
        // A signal from a terminal is not for it.
        .process_group(0)
        .spawn()?;
    let deadline = Instant::now() + START;
    while UnixStream::connect(socket(name)).is_err() {
        if let Some(status) = child.try_wait()? {
            return Err(io::Error::other(format!("the process for it ended with {status}")));
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    let name = name.to_owned();
    thread::Builder::new().name("wireguard".to_owned()).spawn(move || {
        if let Ok(status) = child.wait() {
            tracing::warn!(link = name, %status, "the process that encrypts has ended");
        }
    })?;
    Ok(())
}

/// Ends that process, if there is one, whoever started it.
fn end_device(name: &str) -> io::Result<()> {
    let path = socket(name);
    if let Ok(stream) = UnixStream::connect(&path) {
        let process = socket_peercred(&stream)?.pid;
        match kill_process(process, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

type Interface = Arc<dyn WireguardInterfaceApi + Send + Sync>;

/// Tunnels between nodes that have each other's keys from the manager's tables.
pub(super) struct WireGuard {
    interface: Interface,
    pub(super) name: String,
    pub(super) link: u32,
    own: Vec<IpAddr>,
}

impl std::fmt::Debug for WireGuard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WireGuard").field("name", &self.name).finish_non_exhaustive()
    }
}

fn failed(error: WireguardInterfaceError) -> Error {
    Error::WireGuard(error.to_string())
}

/// The library waits in system calls.
async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, WireguardInterfaceError> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())).map_err(failed)
}

/// Makes an interface, in the kernel if that can be. A process that is there already goes on.
fn interface(name: &str) -> Result<Interface, WireguardInterfaceError> {
    let userspace = || Ok(Arc::new(WGApi::<Userspace>::new(name)?) as Interface);
    if UnixStream::connect(socket(name)).is_ok() {
        return userspace();
    }
    let mut kernel = WGApi::<Kernel>::new(name)?;
    match kernel.create_interface() {
        Ok(()) => Ok(Arc::new(kernel)),
        Err(error) => {
            tracing::warn!(%error, "this kernel has no WireGuard: a process of the agent's encrypts, which is slower");
            start_device(name)?;
            userspace()
        }
    }
}

impl WireGuard {
    /// Removes a node's link, if it has one.
    pub(super) async fn remove(netlink: &Netlink, node_id: &str) -> Result<(), Error> {
        let name = link_name(node_id);
        end_device(&name).map_err(|source| Error::Io { action: format!("ending the process of {name}"), source })?;
        netlink.remove_link(&name).await
    }

    /// Makes the link, without peers. `own` is the source of what the node itself sends.
    pub(super) async fn create(
        netlink: &Netlink,
        node_id: &str,
        key: &Key,
        mtu: u32,
        own: Vec<IpAddr>,
    ) -> Result<Self, Error> {
        let name = link_name(node_id);
        let goes_on = UnixStream::connect(socket(&name)).is_ok() && netlink.index(&name).await?.is_some();
        if !goes_on {
            Self::remove(netlink, node_id).await?;
        }
        let (named, private) = (name.clone(), key.to_string());
        let interface = apart(move || {
            let interface = interface(&named)?;
            interface.configure_interface(&InterfaceConfiguration {
                name: named,
                prvkey: private,
                addresses: Vec::new(),
                port: PORT,
                peers: Vec::new(),
                mtu: Some(mtu),
                fwmark: None,
            })?;
            Ok(interface)
        });
        let interface = interface.await?;
        let link = netlink.set_up(&name).await?;
        Ok(Self { interface, name, link, own })
    }

    /// A peer's packets come from its subnets only, and for each of these there is a route. One without a key is none.
    pub(super) async fn add(&self, netlink: &Netlink, peer: &Peer) -> Result<(), Error> {
        let Some(public) = public(peer) else { return Ok(()) };
        let mut added = WireGuardPeer::new(public);
        added.endpoint = Some(SocketAddr::new(peer.address, PORT));
        added.allowed_ips =
            peer.subnets.iter().map(|subnet| IpAddrMask::new(subnet.network(), subnet.prefix_len())).collect();
        let interface = Arc::clone(&self.interface);
        apart(move || interface.configure_peer(&added)).await?;
        for subnet in &peer.subnets {
            let source = self.own.iter().copied().find(|own| own.is_ipv4() == subnet.network().is_ipv4());
            netlink.add_route(*subnet, self.link, None, source).await?;
        }
        Ok(())
    }

    pub(super) async fn remove_peer(&self, netlink: &Netlink, peer: &Peer) -> Result<(), Error> {
        let Some(public) = public(peer) else { return Ok(()) };
        for subnet in &peer.subnets {
            netlink.remove_route(*subnet, self.link).await?;
        }
        let interface = Arc::clone(&self.interface);
        apart(move || interface.remove_peer(&public)).await
    }
}

/// A peer's key. One that is none is that peer's trouble, and not the others'.
fn public(peer: &Peer) -> Option<Key> {
    let key = peer.public_key.as_ref()?;
    key.parse().map_err(|_| tracing::warn!(key, address = %peer.address, "a node's public key is none")).ok()
}
