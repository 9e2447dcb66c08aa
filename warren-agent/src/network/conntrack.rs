//! The kernel's table of connections, as far as it outlives what it was made from: a UDP sender that never pauses keeps its entry, and
//! with it the container that is gone, or none at all.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    net::IpAddr,
};

use ipnet::IpNet;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol, Tuple},
};
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload},
    sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER},
};
use warren_proto::v1;

use super::tables::{Place, Tables, addresses};

/// Where UDP flows through services are to lead.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Expected {
    /// By published port.
    published: HashMap<u16, BTreeSet<IpAddr>>,
    /// By virtual address.
    virtuals: HashMap<IpAddr, BTreeSet<IpAddr>>,
    /// All containers' and virtual addresses.
    cluster: Vec<IpNet>,
}

/// A UDP flow as the kernel tracks it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Flow {
    /// Where its first packet was sent.
    destination: IpAddr,
    port: u16,
    /// Who answers: the destination, or what it was translated to.
    target: IpAddr,
}

impl Expected {
    pub(super) fn new(place: &Place, tables: &Tables) -> Self {
        let mut expected = Self { cluster: place.cluster.clone(), ..Self::default() };
        for service in tables.services.values() {
            let healthy: Vec<_> = service.endpoints.iter().filter(|endpoint| endpoint.healthy).collect();
            let all: BTreeSet<IpAddr> = healthy.iter().flat_map(|endpoint| addresses(endpoint)).collect();
            for address in service.virtual_addresses.iter().filter_map(|address| address.parse().ok()) {
                expected.virtuals.insert(address, all.clone());
            }
            let udp = service.ports.iter().filter(|port| port.protocol() == v1::Protocol::Udp && port.host_port != 0);
            for port in udp {
                let here = |endpoint: &&&v1::Endpoint| {
                    port.publish_mode() != v1::PublishMode::Host || endpoint.node_id == place.node_id
                };
                let here = healthy.iter().filter(here).filter(|endpoint| endpoint.port(port).is_some());
                let targets = here.flat_map(|endpoint| addresses(endpoint));
                let number = u16::try_from(port.host_port).unwrap_or_default();
                expected.published.entry(number).or_default().extend(targets);
            }
        }
        expected
    }

    /// Whether a flow leads where nothing of its kind is to lead any more. `own` are the node's addresses.
    fn is_stale(&self, flow: &Flow, own: &BTreeSet<IpAddr>) -> bool {
        let of_family =
            |targets: &BTreeSet<IpAddr>| targets.iter().any(|target| target.is_ipv4() == flow.destination.is_ipv4());
        let is_wrong = |targets: &BTreeSet<IpAddr>| {
            // One that is not translated is as well as none, where there is nowhere to lead it.
            if flow.target == flow.destination { of_family(targets) } else { !targets.contains(&flow.target) }
        };
        if let Some(targets) = self.virtuals.get(&flow.destination) {
            return is_wrong(targets);
        }
        let is_ours = |address: &IpAddr| self.cluster.iter().any(|network| network.contains(address));
        match self.published.get(&flow.port) {
            Some(targets) if own.contains(&flow.destination) => is_wrong(targets),
            // It was published, and is no more.
            None if own.contains(&flow.destination) => flow.target != flow.destination && is_ours(&flow.target),
            _ => false,
        }
    }
}

fn failed(what: impl std::fmt::Display) -> io::Error {
    io::Error::other(what.to_string())
}

fn ask(
    socket: &Socket,
    family: NetfilterProtoFamily,
    flags: u16,
    message: ConntrackMessage,
    mut each: impl FnMut(Vec<ConntrackAttribute>),
) -> io::Result<()> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message);
    let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    loop {
        let (received, _) = socket.recv_from_full()?;
        let mut rest = received.as_slice();
        while !rest.is_empty() {
            let packet = NetlinkMessage::<NetfilterMessage>::deserialize(rest).map_err(failed)?;
            match packet.payload {
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) if error.code.is_none() => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(NetfilterMessage {
                    inner: NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)),
                    ..
                }) => each(attributes),
                _ => {}
            }
            let length = (packet.header.length as usize).next_multiple_of(4);
            rest = rest.get(length.max(4)..).unwrap_or_default();
        }
    }
}

/// Source and destination of one direction, and its destination port; UDP only.
fn direction(tuples: &[Tuple]) -> Option<(IpAddr, IpAddr, u16)> {
    let (mut source, mut destination, mut port, mut is_udp) = (None, None, None, false);
    for tuple in tuples {
        match tuple {
            Tuple::Ip(parts) => {
                for part in parts {
                    match part {
                        IPTuple::SourceAddress(address) => source = Some(*address),
                        IPTuple::DestinationAddress(address) => destination = Some(*address),
                        _ => {}
                    }
                }
            }
            Tuple::Proto(parts) => {
                for part in parts {
                    match part {
                        ProtoTuple::Protocol(protocol) => is_udp = *protocol == Protocol::Udp,
                        ProtoTuple::DestinationPort(number) => port = Some(*number),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    is_udp.then_some((source?, destination?, port?))
}

/// Has the kernel forget UDP flows that lead where they are not to lead any more: their next packet is led anew. Returns how many.
///
/// # Errors
///
/// When the kernel's table cannot be read.
pub(super) fn forget_stale(expected: &Expected, own: &BTreeSet<IpAddr>) -> io::Result<usize> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut forgotten = 0;
    for family in [NetfilterProtoFamily::IPv4, NetfilterProtoFamily::IPv6] {
        let mut stale = Vec::new();
        ask(&socket, family, NLM_F_DUMP, ConntrackMessage::Get(Vec::new()), |attributes| {
            let (mut sent, mut answer) = (None, None);
            for attribute in &attributes {
                match attribute {
                    ConntrackAttribute::CtaTupleOrig(tuples) => sent = direction(tuples).map(|found| (found, tuples)),
                    ConntrackAttribute::CtaTupleReply(tuples) => answer = direction(tuples),
                    _ => {}
                }
            }
            if let (Some(((_, destination, port), tuples)), Some((target, ..))) = (sent, answer)
                && expected.is_stale(&Flow { destination, port, target }, own)
            {
                stale.push(tuples.clone());
            }
        })?;
        for tuples in stale {
            let delete = ConntrackMessage::Delete(vec![ConntrackAttribute::CtaTupleOrig(tuples)]);
            // It may have ended by itself.
            if ask(&socket, family, NLM_F_ACK, delete, |_| {}).is_ok() {
                forgotten += 1;
            }
        }
    }
    Ok(forgotten)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    fn flow(destination: &str, port: u16, target: &str) -> Flow {
        Flow { destination: address(destination), port, target: address(target) }
    }

    #[test]
    fn flows_that_lead_where_nothing_is_any_more_are_stale() {
        let set = |list: &[&str]| list.iter().map(|text| address(text)).collect::<BTreeSet<_>>();
        let expected = Expected {
            published: HashMap::from([(5300, set(&["10.128.0.2", "10.128.1.2"])), (5301, BTreeSet::new())]),
            virtuals: HashMap::from([(address("10.127.0.1"), set(&["10.128.0.2"]))]),
            cluster: ["10.128.0.0/10", "10.127.0.0/16"].map(|net| net.parse().expect("a network")).into(),
        };
        let own = set(&["192.0.2.1", "127.0.0.1", "fd00::1"]);
        for (flow, stale, why) in [
            (flow("192.0.2.1", 5300, "10.128.0.2"), false, "it leads to a container"),
            (flow("192.0.2.1", 5300, "10.128.1.2"), false, "on another node"),
            (flow("192.0.2.1", 5300, "10.128.0.9"), true, "the container is gone"),
            (flow("192.0.2.1", 5300, "192.0.2.1"), true, "it began before the service"),
            (flow("fd00::1", 5300, "fd00::1"), false, "there is nowhere to lead it in IPv6"),
            (flow("192.0.2.1", 5301, "192.0.2.1"), false, "there is nowhere to lead it"),
            (flow("192.0.2.1", 5301, "10.128.0.9"), true, "it leads to what is gone"),
            (flow("192.0.2.1", 53, "192.0.2.1"), false, "it is the node's own"),
            (flow("192.0.2.1", 53, "10.128.0.9"), true, "the port is published no more"),
            (flow("198.51.100.1", 5300, "198.51.100.1"), false, "it is for another machine"),
            (flow("10.127.0.1", 7000, "10.128.0.2"), false, "it leads to a container"),
            (flow("10.127.0.1", 7000, "10.128.0.3"), true, "the container is gone"),
            (flow("10.127.0.1", 7000, "10.127.0.1"), true, "it began before there was one"),
            (flow("10.128.0.2", 7000, "10.128.0.2"), false, "it is a container's own"),
        ] {
            assert_eq!(expected.is_stale(&flow, &own), stale, "{flow:?}: {why}");
        }
    }
}
