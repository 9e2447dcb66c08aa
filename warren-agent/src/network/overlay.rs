//! The way to other nodes' containers: a link, and for each node what leads over it to the node's subnets.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use rtnetlink::LinkVxlan;

use super::{Error, netlink::Netlink, wireguard::WireGuard};

/// Another node, as the overlay needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    /// Where it is reached outside the overlay.
    pub(super) address: IpAddr,
    /// Its containers' addresses.
    pub(super) subnets: Vec<IpNet>,
    /// Of WireGuard, if that is how it is reached.
    pub(super) public_key: Option<String>,
}

/// Either way to other nodes.
#[derive(Debug)]
pub(super) enum Overlay {
    Vxlan(Vxlan),
    WireGuard(WireGuard),
}

impl Overlay {
    /// Its link's name.
    pub(super) fn link(&self) -> &str {
        match self {
            Self::Vxlan(_) => VXLAN_LINK,
            Self::WireGuard(wireguard) => &wireguard.name,
        }
    }

    /// Its link's number.
    pub(super) fn index(&self) -> u32 {
        match self {
            Self::Vxlan(vxlan) => vxlan.link,
            Self::WireGuard(wireguard) => wireguard.link,
        }
    }

    /// Makes the peers these and no others.
    pub(super) async fn set_peers(&mut self, netlink: &Netlink, peers: &[Peer]) -> Result<(), Error> {
        match self {
            Self::Vxlan(vxlan) => vxlan.set_peers(netlink, peers).await,
            Self::WireGuard(wireguard) => wireguard.set_peers(netlink, peers).await,
        }
    }
}

/// IANA's port for VXLAN.
pub(super) const VXLAN_PORT: u16 = 4789;
/// The cluster's network among others on the same wire.
const VXLAN_ID: u32 = 0x57_41;
/// The link's name.
pub(super) const VXLAN_LINK: &str = "warren-vxlan";
/// What VXLAN adds to a packet: outer IPv6, UDP, VXLAN and the inner Ethernet header, rounded as all others do.
pub(super) const VXLAN_OVERHEAD: u32 = 70;

/// A network of tunnels between nodes, without learning, flooding or gossip: what leads where, the manager's tables say.
#[derive(Debug)]
pub(super) struct Vxlan {
    link: u32,
    own: Vec<IpAddr>,
    peers: BTreeMap<IpAddr, Peer>,
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
    /// Makes the link anew, on the node's address `local`. `own` is the source of what the node itself sends.
    pub(super) async fn create(netlink: &Netlink, local: IpAddr, mtu: u32, own: Vec<IpAddr>) -> Result<Self, Error> {
        netlink.remove_link(VXLAN_LINK).await?;
        let link = LinkVxlan::new(VXLAN_LINK, VXLAN_ID).port(VXLAN_PORT).learning(false);
        let link = match local {
            IpAddr::V4(v4) => link.local(v4),
            IpAddr::V6(v6) => link.local6(v6),
        };
        let link = link.mtu(mtu).address(mac(local).to_vec()).up().build();
        let made = netlink.handle().link().add(link).execute().await;
        made.map_err(|source| Error::Netlink { action: "making the overlay's link", source: Box::new(source) })?;
        let link = netlink.index(VXLAN_LINK).await?.ok_or_else(|| Error::NoLink(VXLAN_LINK.to_owned()))?;
        Ok(Self { link, own, peers: BTreeMap::new() })
    }

    /// Makes the peers these and no others.
    pub(super) async fn set_peers(&mut self, netlink: &Netlink, peers: &[Peer]) -> Result<(), Error> {
        let wanted: BTreeMap<_, _> = peers.iter().map(|peer| (peer.address, peer.clone())).collect();
        let gone: Vec<_> =
            self.peers.values().filter(|peer| wanted.get(&peer.address) != Some(peer)).cloned().collect();
        for peer in gone {
            for subnet in &peer.subnets {
                netlink.remove_route(*subnet, self.link).await?;
                netlink.remove_neighbour(self.link, subnet.network()).await?;
            }
            netlink.remove_forwarding(self.link, mac(peer.address), peer.address).await?;
            self.peers.remove(&peer.address);
        }
        for (address, peer) in wanted {
            if !self.peers.contains_key(&address) {
                self.add(netlink, &peer).await?;
                self.peers.insert(address, peer);
            }
        }
        Ok(())
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
