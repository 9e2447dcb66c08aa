//! The kernel's links, addresses, neighbours and routes, as far as containers need them.

use std::{
    collections::{BTreeSet, HashSet},
    fs::File,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::AsRawFd as _,
};

use futures::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        address::{AddressAttribute, AddressHeaderFlags, AddressProtocol, AddressScope},
        link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo},
        neighbour::{NeighbourFlags, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteScope},
    },
};
use tokio_util::task::AbortOnDropHandle;

use super::Error;

/// A netlink connection in one namespace; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Netlink {
    handle: Handle,
    _connection: AbortOnDropHandle<()>,
}

/// What the kernel answers when something is there already, or is not.
const EEXIST: i32 = 17;
const ENOENT: i32 = 2;
const ESRCH: i32 = 3;
const ENODEV: i32 = 19;
const EADDRNOTAVAIL: i32 = 99;

/// By which addresses are known that an agent gave. Routing daemons use other numbers.
const GIVEN: AddressProtocol = AddressProtocol::Other(b'W');

fn failed(action: &'static str) -> impl FnOnce(rtnetlink::Error) -> Error {
    move |source| Error::Netlink { action, source: Box::new(source) }
}

fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|code| -code.get()),
        _ => None,
    }
}

/// A link, as far as anybody asks.
#[derive(Clone, Debug, Default)]
pub(super) struct Link {
    pub(super) mtu: u32,
    pub(super) mac: Vec<u8>,
    pub(super) is_up: bool,
    pub(super) is_vxlan: bool,
}

/// A pair of connected interfaces: one on the node, one in a container.
pub(super) struct Veth<'a> {
    /// Its name on the node.
    pub(super) name: &'a str,
    pub(super) node_mac: [u8; 6],
    pub(super) container_mac: [u8; 6],
    pub(super) mtu: u32,
}

impl Netlink {
    /// A connection in the namespace of this process.
    pub(super) fn here() -> Result<Self, Error> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(|source| Error::Io { action: "opening a netlink socket".to_owned(), source })?;
        Ok(Self { handle, _connection: AbortOnDropHandle::new(tokio::spawn(connection)) })
    }

    /// A connection in another namespace.
    pub(super) fn inside(namespace: &File) -> Result<Self, Error> {
        let socket = super::namespace::netlink(namespace)
            .map_err(|source| Error::Io { action: "opening a netlink socket in a container".to_owned(), source })?;
        let (connection, handle, _) = rtnetlink::from_socket(socket);
        Ok(Self { handle, _connection: AbortOnDropHandle::new(tokio::spawn(connection)) })
    }

    /// The index of a link; `None` when there is none of this name.
    pub(super) async fn index(&self, name: &str) -> Result<Option<u32>, Error> {
        let found = self.handle.link().get().match_name(name.to_owned()).execute().try_next().await;
        match found {
            Ok(link) => Ok(link.map(|link| link.header.index)),
            Err(error) if errno(&error) == Some(ENODEV) => Ok(None),
            Err(error) => Err(failed("looking for a link")(error)),
        }
    }

    async fn required(&self, name: &str) -> Result<u32, Error> {
        self.index(name).await?.ok_or_else(|| Error::NoLink(name.to_owned()))
    }

    /// Names and MTUs of all links, by index.
    pub(super) async fn links(&self) -> Result<Vec<(u32, String, u32)>, Error> {
        let listed =
            self.handle.link().get().execute().try_collect::<Vec<_>>().await.map_err(failed("listing links"))?;
        let entry = |link: rtnetlink::packet_route::link::LinkMessage| {
            let mut entry = (link.header.index, String::new(), 0);
            for attribute in link.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => entry.1 = name,
                    LinkAttribute::Mtu(mtu) => entry.2 = mtu,
                    _ => {}
                }
            }
            entry
        };
        Ok(listed.into_iter().map(entry).collect())
    }

    /// Finds a link by name.
    pub(super) async fn link(&self, name: &str) -> Result<Option<Link>, Error> {
        let found = self.handle.link().get().match_name(name.to_owned()).execute().try_next().await;
        let message = match found {
            Ok(Some(message)) => message,
            Ok(None) => return Ok(None),
            Err(error) if errno(&error) == Some(ENODEV) => return Ok(None),
            Err(error) => return Err(failed("looking for a link")(error)),
        };
        let mut link = Link { is_up: message.header.flags.contains(LinkFlags::Up), ..Link::default() };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Address(mac) => link.mac = mac,
                LinkAttribute::LinkInfo(info) => link.is_vxlan = info.contains(&LinkInfo::Kind(InfoKind::Vxlan)),
                _ => {}
            }
        }
        Ok(Some(link))
    }

    /// The networks that are routed to a link, in the main table.
    pub(super) async fn routes(&self) -> Result<HashSet<(IpNet, u32)>, Error> {
        let mut routes = HashSet::new();
        let (v4, v6) = (RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build());
        for family in [v4, v6] {
            let listed = self.handle.route().get(family).execute().try_collect::<Vec<_>>().await;
            for message in listed.map_err(failed("listing routes"))? {
                if message.header.table != RouteHeader::RT_TABLE_MAIN {
                    continue;
                }
                let (mut address, mut link) = (None, None);
                for attribute in &message.attributes {
                    match attribute {
                        RouteAttribute::Destination(RouteAddress::Inet(v4)) => address = Some(IpAddr::from(*v4)),
                        RouteAttribute::Destination(RouteAddress::Inet6(v6)) => address = Some(IpAddr::from(*v6)),
                        RouteAttribute::Oif(index) => link = Some(*index),
                        _ => {}
                    }
                }
                if let (Some(address), Some(link)) = (address, link)
                    && let Ok(network) = IpNet::new(address, message.header.destination_prefix_length)
                {
                    routes.insert((network, link));
                }
            }
        }
        Ok(routes)
    }

    /// All addresses of this machine.
    pub(super) async fn addresses(&self) -> Result<BTreeSet<IpAddr>, Error> {
        let listed = self.handle.address().get().execute().try_collect::<Vec<_>>().await;
        let own = |attribute: AddressAttribute| match attribute {
            AddressAttribute::Address(address) | AddressAttribute::Local(address) => Some(address),
            _ => None,
        };
        let all = listed.map_err(failed("listing addresses"))?.into_iter().flat_map(|message| message.attributes);
        Ok(all.filter_map(own).collect())
    }

    /// The link that has an address.
    pub(super) async fn link_with(&self, address: IpAddr) -> Result<Option<u32>, Error> {
        let listed = self.handle.address().get().execute().try_collect::<Vec<_>>().await;
        let has = |attribute: &AddressAttribute| matches!(attribute, AddressAttribute::Address(known) | AddressAttribute::Local(known) if *known == address);
        let mut found = listed.map_err(failed("listing addresses"))?.into_iter();
        Ok(found.find(|message| message.attributes.iter().any(has)).map(|message| message.header.index))
    }

    /// Removes a link, and with it its routes and neighbours; one that is not there is what is wanted.
    pub(super) async fn remove_link(&self, name: &str) -> Result<(), Error> {
        let Some(index) = self.index(name).await? else { return Ok(()) };
        match self.handle.link().del(index).execute().await {
            Err(error) if errno(&error) != Some(ENODEV) => Err(failed("removing a link")(error)),
            _ => Ok(()),
        }
    }

    /// Makes a veth pair whose other end is in `namespace` under the name `inside`. Returns the index of the node's end.
    pub(super) async fn add_veth(&self, veth: &Veth<'_>, namespace: &File, inside: &str) -> Result<u32, Error> {
        let mut peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(inside)
            .mtu(veth.mtu)
            .address(veth.container_mac.to_vec())
            .build();
        // The kernel makes the far end there at once. Its being up is another call: the pair is not yet linked here.
        peer.attributes.push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
        let pair = LinkMessageBuilder::<LinkVeth>::new(veth.name, inside)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .mtu(veth.mtu)
            .address(veth.node_mac.to_vec())
            .up()
            .build();
        self.handle.link().add(pair).execute().await.map_err(failed("making a veth pair"))?;
        self.required(veth.name).await
    }

    /// Sets a link up and returns its index.
    pub(super) async fn set_up(&self, name: &str) -> Result<u32, Error> {
        let index = self.required(name).await?;
        let up = LinkMessageBuilder::<LinkUnspec>::new().index(index).up().build();
        self.handle.link().set(up).execute().await.map_err(failed("setting a link up"))?;
        Ok(index)
    }

    /// Gives a link an address of its own; it may have it already.
    pub(super) async fn add_address(&self, link: u32, address: IpAddr, scope: AddressScope) -> Result<(), Error> {
        let mut request = self.handle.address().add(link, address, full_prefix(address));
        let message = request.message_mut();
        message.header.scope = scope;
        message.attributes.push(AddressAttribute::Protocol(GIVEN));
        if address.is_ipv6() {
            // It is nobody else's: there is nothing to detect, and it works at once.
            message.header.flags |= AddressHeaderFlags::Nodad;
        }
        tolerate(request.execute().await, EEXIST, "adding an address")
    }

    /// Takes from a link what [`Netlink::add_address`] gave it at any time, but for these. Kernels before 5.18 do not keep who gave
    /// an address, and nothing is taken.
    pub(super) async fn keep_addresses(&self, link: u32, kept: &[IpAddr]) -> Result<(), Error> {
        let listed = self.handle.address().get().set_link_index_filter(link).execute().try_collect::<Vec<_>>().await;
        for message in listed.map_err(failed("listing addresses"))? {
            let is_kept = |attribute: &AddressAttribute| matches!(attribute, AddressAttribute::Address(known) if kept.contains(known));
            let is_given = |attribute: &AddressAttribute| *attribute == AddressAttribute::Protocol(GIVEN);
            if message.attributes.iter().any(is_given) && !message.attributes.iter().any(is_kept) {
                let removed = self.handle.address().del(message).execute().await;
                tolerate(removed, EADDRNOTAVAIL, "removing an address")?;
            }
        }
        Ok(())
    }

    /// Says for good which link-layer address a neighbour has.
    pub(super) async fn add_neighbour(&self, link: u32, address: IpAddr, mac: [u8; 6]) -> Result<(), Error> {
        let request = self.handle.neighbours().add(link, address).link_layer_address(&mac);
        let request = request.state(NeighbourState::Permanent).replace();
        request.execute().await.map_err(failed("adding a neighbour"))
    }

    /// Routes a network to a link, over `gateway` if there is one, as a neighbour of that link. What routed it elsewhere
    /// before is replaced.
    pub(super) async fn add_route(
        &self,
        network: IpNet,
        link: u32,
        gateway: Option<IpAddr>,
        source: Option<IpAddr>,
    ) -> Result<(), Error> {
        let message = route(network, link, gateway, source);
        self.handle.route().add(message).replace().execute().await.map_err(failed("adding a route"))
    }

    /// Removes what [`Netlink::add_route`] added; it may be gone already.
    pub(super) async fn remove_route(&self, network: IpNet, link: u32) -> Result<(), Error> {
        let mut message = route(network, link, None, None);
        // Whichever scope it has.
        message.header.scope = RouteScope::NoWhere;
        tolerate(self.handle.route().del(message).execute().await, ESRCH, "removing a route")
    }

    /// Removes what [`Netlink::add_neighbour`] added; it may be gone already.
    pub(super) async fn remove_neighbour(&self, link: u32, address: IpAddr) -> Result<(), Error> {
        let message = self.handle.neighbours().add(link, address).message_mut().clone();
        tolerate(self.handle.neighbours().del(message).execute().await, ENOENT, "removing a neighbour")
    }

    /// Says where frames for a link-layer address leave a tunnel.
    pub(super) async fn add_forwarding(&self, link: u32, mac: [u8; 6], to: IpAddr) -> Result<(), Error> {
        let mut request = self.handle.neighbours().add_bridge(link, &mac).destination(to);
        request.message_mut().header.flags = NeighbourFlags::Own;
        request.replace().execute().await.map_err(failed("adding a forwarding entry"))
    }

    /// Removes what [`Netlink::add_forwarding`] added; it may be gone already.
    pub(super) async fn remove_forwarding(&self, link: u32, mac: [u8; 6], to: IpAddr) -> Result<(), Error> {
        let mut request = self.handle.neighbours().add_bridge(link, &mac).destination(to);
        request.message_mut().header.flags = NeighbourFlags::Own;
        let message = request.message_mut().clone();
        tolerate(self.handle.neighbours().del(message).execute().await, ENOENT, "removing a forwarding entry")
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }
}

fn tolerate(outcome: Result<(), rtnetlink::Error>, tolerated: i32, action: &'static str) -> Result<(), Error> {
    match outcome {
        Err(error) if errno(&error) != Some(tolerated) => Err(failed(action)(error)),
        _ => Ok(()),
    }
}

fn route(network: IpNet, link: u32, gateway: Option<IpAddr>, source: Option<IpAddr>) -> RouteMessage {
    match network {
        IpNet::V4(network) => {
            let mut builder = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(network.network(), network.prefix_len())
                .output_interface(link);
            builder = match gateway {
                Some(IpAddr::V4(gateway)) => builder.gateway(gateway).onlink(),
                _ => builder.scope(RouteScope::Link),
            };
            if let Some(IpAddr::V4(source)) = source {
                builder = builder.pref_source(source);
            }
            builder.build()
        }
        IpNet::V6(network) => {
            let mut builder = RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(network.network(), network.prefix_len())
                .output_interface(link);
            if let Some(IpAddr::V6(gateway)) = gateway {
                builder = builder.gateway(gateway).onlink();
            }
            if let Some(IpAddr::V6(source)) = source {
                builder = builder.pref_source(source);
            }
            builder.build()
        }
    }
}

/// The prefix length that means one address.
pub(super) fn full_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The family's default route.
pub(super) fn everything(address: IpAddr) -> IpNet {
    let zero: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    IpNet::new_assert(zero, 0)
}
