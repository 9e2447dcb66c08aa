//! The way to other nodes' containers: a link, and for each node what leads over it to the node's subnets.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
};

use ipnet::IpNet;
use rtnetlink::LinkVxlan;

use super::{Error, netlink::Netlink, peer::Peer, wireguard::WireGuard};

/// Either way to other nodes.
#[derive(Debug)]
pub(super) enum Way {
    Vxlan(Vxlan),
    WireGuard(WireGuard),
}

/// The way to other nodes, and those that it leads to.
#[derive(Debug)]
pub(super) struct Overlay {
    way: Way,
    /// By what tells them apart.
    peers: BTreeMap<(IpAddr, Option<String>), Peer>,
}

impl Overlay {
    /// A way that leads to nobody yet.
    pub(super) fn new(way: Way) -> Self {
        Self { way, peers: BTreeMap::new() }
    }

    /// Its link's name.
    pub(super) fn link(&self) -> &str {
        match &self.way {
            Way::Vxlan(_) => VXLAN_LINK,
            Way::WireGuard(wireguard) => &wireguard.name,
        }
    }

    /// Its link's number.
    pub(super) fn index(&self) -> u32 {
        match &self.way {
            Way::Vxlan(vxlan) => vxlan.link,
            Way::WireGuard(wireguard) => wireguard.link,
        }
    }

    /// What it made is not all there any more: the next peers are made anew.
    pub(super) fn forget(&mut self) {
        self.peers.clear();
    }

    /// Whether the kernel has the routes to all peers, among these routes.
    pub(super) fn has_routes(&self, routes: &HashSet<(IpNet, u32)>) -> bool {
        let link = self.index();
        self.peers.values().flat_map(|peer| &peer.subnets).all(|subnet| routes.contains(&(*subnet, link)))
    }

    /// Removes routes over it that lead to no peer: of an earlier agent, perhaps.
    pub(super) async fn remove_others(&self, netlink: &Netlink, routes: &HashSet<(IpNet, u32)>) -> Result<(), Error> {
        let wanted: HashSet<_> = self.peers.values().flat_map(|peer| &peer.subnets).collect();
        let own = routes.iter().filter(|(_, link)| *link == self.index()).map(|(network, _)| network);
        for network in own.filter(|network| !wanted.contains(network) && !is_link_local(network)) {
            netlink.remove_route(*network, self.index()).await?;
        }
        Ok(())
    }

    /// Makes the peers these and no others. One that cannot be made keeps none of the others; it is tried again the next time.
    ///
    /// # Errors
    ///
    /// That of the first peer that cannot be made.
    pub(super) async fn set_peers(&mut self, netlink: &Netlink, peers: &[Peer]) -> Result<(), Error> {
        let mut outcome = Ok(());
        let wanted: BTreeMap<_, _> = peers.iter().map(|peer| (peer.end(), peer.clone())).collect();
        let gone: Vec<_> = self.peers.values().filter(|peer| wanted.get(&peer.end()) != Some(peer)).cloned().collect();
        for peer in gone {
            match &self.way {
                Way::Vxlan(vxlan) => vxlan.remove_peer(netlink, &peer).await?,
                Way::WireGuard(wireguard) => wireguard.remove_peer(netlink, &peer).await?,
            }
            self.peers.remove(&peer.end());
        }
        for (end, peer) in wanted {
            if !self.peers.contains_key(&end) {
                let added = match &self.way {
                    Way::Vxlan(vxlan) => vxlan.add(netlink, &peer).await,
                    Way::WireGuard(wireguard) => wireguard.add(netlink, &peer).await,
                };
                match added {
                    Ok(()) => drop(self.peers.insert(end, peer)),
                    Err(error) => {
                        tracing::warn!(address = %peer.address, %error, "no way to a node");
                        outcome = outcome.and(Err(error));
                    }
                }
            }
        }
        outcome
    }
}

fn is_link_local(network: &IpNet) -> bool {
    matches!(network, IpNet::V6(v6) if v6.network().segments()[0] & 0xff00 >= 0xfe00)
}

/// IANA's port for VXLAN.
pub(super) const VXLAN_PORT: u16 = 4789;
/// The cluster's network among others on the same wire.
pub(super) const VXLAN_ID: u32 = 0x57_41;
/// The link's name.
pub(super) const VXLAN_LINK: &str = "warren-vxlan";
/// What VXLAN adds to a packet: outer IPv6, UDP, VXLAN and the inner Ethernet header, rounded as all others do.
pub(super) const VXLAN_OVERHEAD: u32 = 70;

/// A network of tunnels between nodes, without learning, flooding or gossip: what leads where, the manager's tables say.
#[derive(Debug)]
pub(super) struct Vxlan {
    link: u32,
    own: Vec<IpAddr>,
}

/// A node's link-layer address in the overlay, made from its address outside: every node knows every other's.
fn mac(address: IpAddr) -> [u8; 6] {
    let octets = match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(v6) => {
            let octets = v6.octets();
            std::array::from_fn(|i| octets[i] ^ octets[i + 4] ^ octets[i + 8] ^ octets[i + 12])
        }
    };
    // Locally administered, and nobody else's prefix.
    [0x02, 0x57, octets[0], octets[1], octets[2], octets[3]]
}

impl Vxlan {
    /// Makes the link, on the node's address `local`; one that is as it should be stays, with all that goes through it. `own` is the
    /// source of what the node itself sends.
    pub(super) async fn create(netlink: &Netlink, local: IpAddr, mtu: u32, own: Vec<IpAddr>) -> Result<Self, Error> {
        if let Some(link) = netlink.link(VXLAN_LINK).await? {
            // Its address is made from the node's.
            if link.mac == mac(local) && link.mtu == mtu && link.is_vxlan {
                return Ok(Self { link: netlink.set_up(VXLAN_LINK).await?, own });
            }
            netlink.remove_link(VXLAN_LINK).await?;
        }
        let link = LinkVxlan::new(VXLAN_LINK, VXLAN_ID).port(VXLAN_PORT).learning(false);
        let link = match local {
            IpAddr::V4(v4) => link.local(v4),
            IpAddr::V6(v6) => link.local6(v6),
        };
        let link = link.mtu(mtu).address(mac(local).to_vec()).up().build();
        let made = netlink.handle().link().add(link).execute().await;
        made.map_err(|source| Error::Netlink { action: "making the overlay's link", source: Box::new(source) })?;
        let link = netlink.index(VXLAN_LINK).await?.ok_or_else(|| Error::NoLink(VXLAN_LINK.to_owned()))?;
        Ok(Self { link, own })
    }

    async fn remove_peer(&self, netlink: &Netlink, peer: &Peer) -> Result<(), Error> {
        for subnet in &peer.subnets {
            netlink.remove_route(*subnet, self.link).await?;
            netlink.remove_neighbour(self.link, subnet.network()).await?;
        }
        netlink.remove_forwarding(self.link, mac(peer.address), peer.address).await
    }

    /// A peer is one forwarding entry, and for each subnet a neighbour, which is the subnet's own first address, and a
    /// route over it.
    async fn add(&self, netlink: &Netlink, peer: &Peer) -> Result<(), Error> {
        let mac = mac(peer.address);
        netlink.add_forwarding(self.link, mac, peer.address).await?;
        for subnet in &peer.subnets {
            let gateway = subnet.network();
            netlink.add_neighbour(self.link, gateway, mac).await?;
            let source = self.own.iter().copied().find(|own| own.is_ipv4() == gateway.is_ipv4());
            netlink.add_route(*subnet, self.link, Some(gateway), source).await?;
        }
        Ok(())
    }
}
