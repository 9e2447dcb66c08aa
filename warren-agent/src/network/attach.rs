//! Containers in the network: their addresses, links, and routes.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    net::{IpAddr, Ipv6Addr},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use ipnet::IpNet;
use rtnetlink::packet_route::address::AddressScope;

use super::{
    CONTAINER_LINKS, DEFAULT_MTU, Error, Network, RESOLVER, host, namespace,
    netlink::{self, Netlink, Veth},
    pool::Lack,
};

/// Characters of a container's id in its link's name, of which the kernel allows 15 in all.
const LINK_ID: usize = 12;
/// The interface in a container.
const INTERFACE: &str = "eth0";
/// The link-layer address of every container's gateway.
const GATEWAY_MAC: [u8; 6] = [0xee; 6];
/// Containers' way out in IPv6.
const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// A container's place in the network.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// The namespace that its processes join.
    pub namespace: PathBuf,
    /// One of each family.
    pub addresses: Vec<IpAddr>,
}

pub(super) fn link_name(container: &str) -> String {
    let id: String = container.chars().take(LINK_ID).collect();
    format!("{CONTAINER_LINKS}{id}")
}

/// A container's link-layer address: unique on its node, as its first address is.
pub(super) fn container_mac(addresses: &[IpAddr]) -> [u8; 6] {
    let mut mac = [0x02, 0x57, 0, 0, 0, 0];
    if let Some(IpAddr::V4(v4)) = addresses.first() {
        mac[2..].copy_from_slice(&v4.octets());
    }
    mac
}

impl Network {
    pub(super) fn namespace(&self, container: &str) -> PathBuf {
        self.0.options.run_dir.join(container)
    }

    /// A container's addresses, or for how long the next ones still rest.
    pub(super) fn take_addresses(&self, container: &str) -> Result<Result<Vec<IpAddr>, Duration>, Error> {
        let mut changing = self.changing();
        let pool = changing.pool.as_mut().ok_or(Error::NoSubnet)?;
        match pool.take(container, Instant::now()) {
            Ok(addresses) => {
                changing.owners.insert(container.to_owned(), addresses.clone());
                Ok(Ok(addresses))
            }
            Err(Lack::Resting(left)) => Ok(Err(left)),
            Err(Lack::Taken) => Err(Error::Exhausted),
        }
    }

    /// Gives a container its namespace and addresses. What an attempt that was cut short left is made anew.
    ///
    /// # Errors
    ///
    /// When there is no address, or the kernel refuses; nothing is left then.
    pub async fn attach(&self, container: &str) -> Result<Attachment, Error> {
        let addresses = loop {
            match self.take_addresses(container)? {
                Ok(addresses) => break addresses,
                // Nobody else's names lead to it then.
                Err(left) => tokio::time::sleep(left).await,
            }
        };
        let namespace = self.namespace(container);
        if host::exists(&namespace) {
            self.disconnect(container).await?;
        }
        let made = self.connect(container, &namespace, &addresses).await;
        if let Err(error) = made {
            self.detach(container).await?;
            return Err(error);
        }
        self.changing().connected.insert(container.to_owned());
        Ok(Attachment { namespace, addresses })
    }

    pub(super) async fn connect(&self, container: &str, path: &Path, addresses: &[IpAddr]) -> Result<(), Error> {
        let made = namespace::create(path);
        drop(made.map_err(|source| Error::Io { action: format!("making {}", path.display()), source })?);
        self.wire(container, path, addresses).await
    }

    /// Makes a container's link, and what leads over it, in a namespace that is there.
    pub(super) async fn wire(&self, container: &str, path: &Path, addresses: &[IpAddr]) -> Result<(), Error> {
        let opened = fs::File::open(path);
        let namespace = opened.map_err(|source| Error::Io { action: format!("opening {}", path.display()), source })?;
        let usual = DEFAULT_MTU - self.0.options.overlay.overhead();
        let mtu = Some(self.changing().mtu).filter(|mtu| *mtu != 0).unwrap_or(usual);
        let name = link_name(container);
        let container_mac = container_mac(addresses);
        let netlink = &self.0.netlink;
        let veth = Veth { name: &name, node_mac: GATEWAY_MAC, container_mac, mtu };
        let link = netlink.add_veth(&veth, &namespace, INTERFACE).await?;
        if self.has_rules() {
            host::lead_loopback_to(&name)?;
        }
        let inside = Netlink::inside(&namespace)?;
        inside.set_up("lo").await?;
        let interface = inside.set_up(INTERFACE).await?;
        for address in addresses {
            let gateway = if address.is_ipv4() { IpAddr::from(RESOLVER) } else { IpAddr::from(GATEWAY_V6) };
            inside.add_address(interface, *address, AddressScope::Universe).await?;
            inside.add_neighbour(interface, gateway, GATEWAY_MAC).await?;
            inside.add_route(netlink::everything(*address), interface, Some(gateway), None).await?;
            netlink.add_neighbour(link, *address, container_mac).await?;
            let own = IpNet::new_assert(*address, netlink::full_prefix(*address));
            netlink.add_route(own, link, None, None).await?;
        }
        Ok(())
    }

    /// Takes a container's namespace, link and addresses away; it may have none.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub async fn detach(&self, container: &str) -> Result<(), Error> {
        self.disconnect(container).await?;
        self.0.files.remove(container);
        let mut changing = self.changing();
        changing.owners.remove(container);
        if let Some(pool) = &mut changing.pool {
            pool.give_back(container, Instant::now());
        }
        Ok(())
    }

    pub(super) async fn disconnect(&self, container: &str) -> Result<(), Error> {
        self.changing().connected.remove(container);
        let path = self.namespace(container);
        if !host::exists(&path) {
            return Ok(());
        }
        // The kernel removes the pair with the namespace, in its own time; the name must be free at once.
        self.0.netlink.remove_link(&link_name(container)).await?;
        let removed = namespace::remove(&path);
        removed.map_err(|source| Error::Io { action: format!("removing {}", path.display()), source })
    }

    /// Removes namespaces, links and files of containers that are not among these.
    pub(super) async fn remove_others(&self, kept: &HashMap<String, Vec<IpAddr>>) -> Result<(), Error> {
        let entries = fs::read_dir(&self.0.options.run_dir).into_iter().flatten().flatten();
        let here: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        for container in here.iter().filter(|container| !kept.contains_key(*container)) {
            tracing::info!(container, "removing the network of a container that is not there");
            self.disconnect(container).await?;
        }
        let names: BTreeSet<_> = kept.keys().map(|container| link_name(container)).collect();
        for (_, link, _) in self.0.netlink.links().await? {
            if host::is_containers(&link) && !names.contains(&link) {
                self.0.netlink.remove_link(&link).await?;
            }
        }
        self.0.files.keep_only(|container| kept.contains_key(container));
        Ok(())
    }
}
