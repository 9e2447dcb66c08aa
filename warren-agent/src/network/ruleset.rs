//! The node's packet rules, as one nftables table that is made from the tables of services and nodes. A pure function.
//!
//! - A service's virtual address leads to one of its healthy endpoints, chosen at random for each connection.
//! - A published port leads there too: in `host` mode on the nodes that run an endpoint, in `ingress` mode on every node.
//! - What a container sends out of the cluster leaves under the node's address.
//! - Connections are not tracked for questions to the node's resolver: nothing about them is translated, and a table that is
//!   full of them has no room for others.
//! - A container cannot send under an address that is not its own, nor reach the node's loopback, nor what of the cluster's own is closed to
//!   it.
//! - Whoever is neither a container, nor another node, nor this node itself reaches published ports and nothing else of the cluster's network.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;
use warren_proto::v1;

use super::{
    CONTAINER_LINKS, RESOLVER,
    listeners::Listeners,
    tables::{Place, Tables, addresses},
};

/// The table. Nobody else's rules are touched.
pub(super) const TABLE: &str = "warren";
/// On connections that came in through a published port: the answer must leave through the same node.
const PUBLISHED: &str = "0x57000000";

/// A destination of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Target {
    address: IpAddr,
    /// `None` leaves the port as it is.
    port: Option<u32>,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "{} . {port}", self.address),
            None => write!(f, "{}", self.address),
        }
    }
}

/// What of the cluster's own containers cannot connect to, by TCP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Closed {
    /// Ports of this node, at any of its addresses.
    pub(super) here: BTreeSet<u16>,
    /// Of other machines.
    pub(super) elsewhere: BTreeSet<SocketAddr>,
}

/// What was left out, because two services publish the same port or a process of the node listens on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Conflict {
    pub(super) port: u32,
    pub(super) protocol: &'static str,
    pub(super) service: String,
    /// The service that has it instead; `None` for a process of the node.
    pub(super) other: Option<String>,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { port, protocol, service, other } = self;
        match other {
            Some(other) => write!(f, "{port}/{protocol} of service {service} is published by service {other} too"),
            None => write!(f, "a process of this node listens on {port}/{protocol}, which service {service} publishes"),
        }
    }
}

/// Renders the table. `node` is the node's own addresses in its subnets, `overlay` the link to other nodes, `listeners` the ports that
/// processes of the node listen on: those are left to them. One entry that cannot be keeps none of the others.
pub(super) fn render(
    place: &Place,
    node: &[IpAddr],
    tables: &Tables,
    overlay: Option<&str>,
    listeners: &Listeners,
    closed: &Closed,
) -> (String, Vec<Conflict>) {
    let mut conflicts = Vec::new();
    let mut owners = BTreeMap::<(u32, &'static str), &str>::new();
    let mut out = String::new();
    // Declared first, so that deleting it cannot fail; all of it is one transaction.
    let _ = write!(out, "table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n");
    let mut virtuals = BTreeMap::from([(4, Vec::new()), (6, Vec::new())]);
    let mut published = Vec::new();
    for (number, service) in tables.services.values().enumerate() {
        let chain = format!("service-{number}");
        let healthy: Vec<_> = service.endpoints.iter().filter(|endpoint| endpoint.healthy).collect();
        let everywhere: Vec<IpAddr> = healthy.iter().flat_map(|endpoint| addresses(endpoint)).collect();
        let targets: Vec<_> = everywhere.iter().map(|address| Target { address: *address, port: None }).collect();
        let _ = writeln!(out, "  chain {chain} {{ # {}", service.name);
        forward(&mut out, None, &targets);
        let _ = writeln!(out, "  }}");
        for address in service.virtual_addresses.iter().filter_map(|address| address.parse::<IpAddr>().ok()) {
            let family = if address.is_ipv4() { 4 } else { 6 };
            virtuals.entry(family).or_default().push(format!("{address} : goto {chain}"));
        }
        for (i, port) in service.ports.iter().enumerate().filter(|(_, port)| port.host_port != 0) {
            let here = |endpoint: &&&v1::Endpoint| {
                port.publish_mode() != v1::PublishMode::Host || endpoint.node_id == place.node_id
            };
            let targets: Vec<_> = healthy
                .iter()
                .filter(here)
                .filter_map(|endpoint| Some((endpoint, endpoint.port(port)?.container_port)))
                .flat_map(|(endpoint, port)| addresses(endpoint).map(move |address| (address, port)))
                .map(|(address, port)| Target { address, port: Some(port) })
                .collect();
            let protocol = if port.protocol() == v1::Protocol::Udp { "udp" } else { "tcp" };
            let conflict = |other| Conflict { port: port.host_port, protocol, service: service.name.clone(), other };
            if !targets.is_empty() && listeners.contains(port.host_port, protocol) {
                conflicts.push(conflict(None));
            } else if let Some(other) = owners.get(&(port.host_port, protocol)).filter(|_| !targets.is_empty()) {
                conflicts.push(conflict(Some((*other).to_owned())));
            } else if !targets.is_empty() {
                owners.insert((port.host_port, protocol), &service.name);
                let chain = format!("publish-{number}-{i}");
                let _ = writeln!(out, "  chain {chain} {{ # {}\n    ct mark set ct mark or {PUBLISHED}", service.name);
                forward(&mut out, Some(protocol), &targets);
                let _ = writeln!(out, "  }}");
                published.push(format!("{protocol} . {} : goto {chain}", port.host_port));
            }
        }
    }
    let elements = |list: &[String]| {
        if list.is_empty() { String::new() } else { format!("\n    elements = {{ {} }}", list.join(", ")) }
    };
    let hairpins = |want_v4: bool| {
        let own = tables.services.values().flat_map(|service| &service.endpoints);
        let own = own.filter(|endpoint| endpoint.node_id == place.node_id).flat_map(addresses);
        let mut own: Vec<_> = own.filter(|address| address.is_ipv4() == want_v4).collect();
        own.sort();
        own.dedup();
        own.iter().map(|address| format!("{address} . {address}")).collect::<Vec<_>>()
    };
    for (family, kind) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
        let _ = writeln!(
            out,
            "  map virtual{family} {{\n    type {kind} : verdict{}\n  }}\n  set hairpin{family} {{\n    type {kind} . {kind}{}\n  }}",
            elements(&virtuals[&family]),
            elements(&hairpins(family == 4)),
        );
    }
    let _ =
        writeln!(out, "  map published {{\n    type inet_proto . inet_service : verdict{}\n  }}", elements(&published));
    let _ = write!(
        out,
        "  chain services {{
    ip daddr {RESOLVER} return
    ip6 daddr ::1 return comment \"an answer would not find its way back: refused at once instead\"
    ip daddr vmap @virtual4
    ip6 daddr vmap @virtual6
    fib daddr type local meta l4proto . th dport vmap @published
  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    jump services
  }}
  chain output {{
    type nat hook output priority -100; policy accept;
    jump services
  }}
"
    );
    postrouting(&mut out, place, node, overlay);
    guards(&mut out, place, tables, overlay);
    containers_guard(&mut out, overlay, closed);
    untracked(&mut out);
    out.push_str("}\n");
    (out, conflicts)
}

/// Sends a connection to one of the targets, each as likely as the next.
fn forward(out: &mut String, protocol: Option<&str>, targets: &[Target]) {
    for (family, word, is_v4) in [("ipv4", "ip", true), ("ipv6", "ip6", false)] {
        let of_family: Vec<_> = targets.iter().filter(|target| target.address.is_ipv4() == is_v4).collect();
        let protocol = protocol.map(|protocol| format!("meta l4proto {protocol} ")).unwrap_or_default();
        match of_family.as_slice() {
            [] => {}
            // A map of one needs no dice.
            [one] => {
                let port = one.port.map(|port| format!(":{port}")).unwrap_or_default();
                let address =
                    if is_v4 || port.is_empty() { one.address.to_string() } else { format!("[{}]", one.address) };
                let _ = writeln!(out, "    meta nfproto {family} {protocol}dnat {word} to {address}{port}");
            }
            several => {
                let elements: Vec<_> =
                    several.iter().enumerate().map(|(i, target)| format!("{i} : {target}")).collect();
                let _ = writeln!(
                    out,
                    "    meta nfproto {family} {protocol}dnat {word} to numgen random mod {} map {{ {} }}",
                    several.len(),
                    elements.join(", ")
                );
            }
        }
    }
}

/// Under which address connections leave.
fn postrouting(out: &mut String, place: &Place, node: &[IpAddr], overlay: Option<&str>) {
    out.push_str("  chain postrouting {\n    type nat hook postrouting priority srcnat; policy accept;\n");
    for (is_v4, word, hairpin) in [(true, "ip", "hairpin4"), (false, "ip6", "hairpin6")] {
        let Some(own) = node.iter().find(|address| address.is_ipv4() == is_v4) else { continue };
        // A container that reaches itself through its service: the answer must come back here to be translated.
        let _ = writeln!(out, "    ct status dnat {word} saddr . {word} daddr @{hairpin} snat {word} to {own}");
        if overlay.is_some() {
            // Another node's container would answer by its own node's way out. Whatever the routes are at the moment: a connection is
            // translated when it begins, or never.
            let _ = writeln!(
                out,
                "    ct mark and {PUBLISHED} == {PUBLISHED} {word} daddr {} {word} daddr != {} {word} saddr != {} snat {word} to {own}",
                networks(&place.cluster, is_v4),
                networks(&place.subnets, is_v4),
                networks(&place.cluster, is_v4)
            );
        }
        let loopback = if is_v4 { "127.0.0.0/8" } else { "::1" };
        let _ = writeln!(out, "    oifname \"{CONTAINER_LINKS}*\" {word} saddr {loopback} snat {word} to {own}");
        let subnets = networks(&place.subnets, is_v4);
        let _ =
            writeln!(out, "    {word} saddr {subnets} {word} daddr != {} masquerade", networks(&place.cluster, is_v4));
    }
    out.push_str("  }\n");
}

fn networks(all: &[IpNet], is_v4: bool) -> String {
    let of_family: Vec<_> = all.iter().filter(|net| net.addr().is_ipv4() == is_v4).map(ToString::to_string).collect();
    format!("{{ {} }}", of_family.join(", "))
}

/// What is dropped.
fn guards(out: &mut String, place: &Place, tables: &Tables, overlay: Option<&str>) {
    // Other networks may use the same port.
    let (port, vni) = (super::overlay::VXLAN_PORT, super::overlay::VXLAN_ID);
    let has_v6 = place.subnets.iter().any(|subnet| subnet.addr().is_ipv6());
    let _ = write!(
        out,
        "  chain guard {{
    type filter hook prerouting priority raw; policy accept;
    iifname \"{CONTAINER_LINKS}*\" ip daddr 127.0.0.0/8 drop
    iifname \"{CONTAINER_LINKS}*\" udp dport {port} @th,96,24 {vni} drop comment \"not into other nodes' overlay\"
    iifname != \"lo\" iifname != \"{CONTAINER_LINKS}*\" ip daddr {RESOLVER} drop comment \"only containers of this node\"
    iifname \"{CONTAINER_LINKS}*\" meta nfproto ipv4 fib saddr . iif oif missing drop
"
    );
    if let Some(overlay) = overlay {
        let _ = writeln!(out, "    iifname \"{overlay}\" ip daddr 127.0.0.0/8 drop");
        // Other nodes' containers are whom it leads to, and nobody else sends from there.
        let _ = writeln!(out, "    iifname \"{overlay}\" ip6 saddr != fe80::/10 fib saddr . iif oif missing drop");
        let _ = writeln!(out, "    iifname \"{overlay}\" meta nfproto ipv4 fib saddr . iif oif missing drop");
    }
    if has_v6 {
        let _ = write!(
            out,
            "    iifname \"{CONTAINER_LINKS}*\" icmpv6 type {{ nd-router-advert, nd-redirect }} drop comment \"a container is no router\"
    iifname \"{CONTAINER_LINKS}*\" meta nfproto ipv6 ip6 saddr != fe80::/10 fib saddr . iif oif missing drop
"
        );
    } else {
        let _ =
            writeln!(out, "    iifname \"{CONTAINER_LINKS}*\" meta nfproto ipv6 drop comment \"they have no address\"");
    }
    let containers = format!("{CONTAINER_LINKS}*");
    let from_outside = [Some("lo"), Some(&*containers), overlay].into_iter().flatten();
    let from_outside: String = from_outside.map(|link| format!("iifname != \"{link}\" ")).collect();
    for (is_v4, word) in [(true, "ip"), (false, "ip6")] {
        if place.cluster.iter().any(|network| network.addr().is_ipv4() == is_v4) {
            let cluster = networks(&place.cluster, is_v4);
            let _ = writeln!(out, "    {from_outside}{word} daddr {cluster} drop comment \"not published\"");
            let _ = writeln!(out, "    {from_outside}{word} saddr {cluster} drop comment \"not a container's\"");
        }
    }
    let members: Vec<_> = tables.nodes.values().filter_map(|node| node.address.parse::<IpAddr>().ok()).collect();
    for (is_v4, word) in [(true, "ip"), (false, "ip6")] {
        let of_family: Vec<_> =
            members.iter().filter(|address| address.is_ipv4() == is_v4).map(ToString::to_string).collect();
        if !of_family.is_empty() {
            // Only members of the cluster may put packets into its network.
            let _ = writeln!(
                out,
                "    udp dport {port} @th,96,24 {vni} {word} saddr != {{ {} }} drop",
                of_family.join(", ")
            );
        }
    }
    out.push_str("  }\n");
    // A virtual address with nobody behind it: refused at once, and never sent out into the world.
    let refuse = |out: &mut String, hook: &str| {
        let _ = writeln!(out, "  chain refuse-{hook} {{\n    type filter hook {hook} priority filter; policy accept;");
        for network in services(place) {
            let word = if network.addr().is_ipv4() { "ip" } else { "ip6" };
            let _ = writeln!(out, "    {word} daddr {network} meta l4proto tcp reject with tcp reset");
            let _ = writeln!(out, "    {word} daddr {network} reject");
        }
        out.push_str("  }\n");
    };
    refuse(out, "forward");
    refuse(out, "output");
}

/// What containers cannot connect to, wherever their packets are led.
fn containers_guard(out: &mut String, overlay: Option<&str>, closed: &Closed) {
    out.push_str("  chain guard-input {\n    type filter hook input priority filter; policy accept;\n");
    for link in [Some(&*format!("{CONTAINER_LINKS}*")), overlay].into_iter().flatten() {
        // Answers to what came in through a published port of the loopback go back there.
        let _ = writeln!(out, "    iifname \"{link}\" ip daddr 127.0.0.0/8 ct direction original drop");
    }
    let containers = format!("iifname \"{CONTAINER_LINKS}*\" ct direction original");
    if !closed.here.is_empty() {
        let ports: Vec<_> = closed.here.iter().map(ToString::to_string).collect();
        let _ = writeln!(out, "    {containers} tcp dport {{ {} }} reject with tcp reset", ports.join(", "));
    }
    out.push_str("  }\n  chain guard-forward {\n    type filter hook forward priority filter; policy accept;\n");
    for (is_v4, word) in [(true, "ip"), (false, "ip6")] {
        let of_family = closed.elsewhere.iter().filter(|at| at.is_ipv4() == is_v4);
        let places: Vec<_> = of_family.map(|at| format!("{} . {}", at.ip(), at.port())).collect();
        if !places.is_empty() {
            let places = places.join(", ");
            let _ = writeln!(out, "    {containers} {word} daddr . tcp dport {{ {places} }} reject with tcp reset");
        }
    }
    out.push_str("  }\n");
}

/// What needs no connection in the kernel's table: DNS between the resolver and whoever is on this node.
fn untracked(out: &mut String) {
    for hook in ["prerouting", "output"] {
        let _ = write!(
            out,
            "  chain untracked-{hook} {{
    type filter hook {hook} priority raw; policy accept;
    ip daddr {RESOLVER} meta l4proto {{ tcp, udp }} th dport 53 notrack
    ip saddr {RESOLVER} meta l4proto {{ tcp, udp }} th sport 53 notrack
  }}
"
        );
    }
}

/// The networks of virtual addresses: those of the cluster's that hold none of this node's subnets.
pub(super) fn services(place: &Place) -> impl Iterator<Item = &IpNet> {
    place.cluster.iter().filter(|network| !place.subnets.iter().any(|subnet| network.contains(subnet)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        let nets = |list: &[&str]| list.iter().map(|net| net.parse().expect("a network")).collect();
        Place {
            node_id: "here".to_owned(),
            subnets: nets(&["10.128.0.0/24", "fd00::/64"]),
            cluster: nets(&["10.128.0.0/10", "10.127.0.0/16", "fd00::/50", "fd00:0:0:ffff::/112"]),
        }
    }

    fn endpoint(node: &str, address: &str, healthy: bool) -> v1::Endpoint {
        v1::Endpoint { node_id: node.to_owned(), addresses: vec![address.to_owned()], healthy, ..Default::default() }
    }

    fn tables() -> Tables {
        let port = |host_port, publish_mode: v1::PublishMode| v1::Port {
            container_port: 80,
            host_port,
            publish_mode: publish_mode.into(),
            ..Default::default()
        };
        let service = v1::ServiceEntry {
            id: "s".to_owned(),
            name: "web".to_owned(),
            virtual_addresses: vec!["10.127.0.1".to_owned(), "fd00:0:0:ffff::1".to_owned()],
            ports: vec![
                port(8080, v1::PublishMode::Ingress),
                port(9090, v1::PublishMode::Host),
                port(0, v1::PublishMode::Ingress),
            ],
            endpoints: vec![
                endpoint("here", "10.128.0.2", true),
                endpoint("there", "10.128.1.2", true),
                endpoint("here", "10.128.0.9", false),
                endpoint("here", "fd00::2", true),
            ],
            ..Default::default()
        };
        Tables { services: [("s".to_owned(), service)].into(), ..Tables::default() }
    }

    #[test]
    fn connections_go_to_healthy_endpoints_and_to_nobody_else() {
        let closed = Closed {
            here: [7443].into(),
            elsewhere: ["192.0.2.1:7443", "[2001:db8::1]:7443"].map(|at| at.parse().expect("an address")).into(),
        };
        let node = ["10.128.0.1", "fd00::1"].map(|address| address.parse().expect("an address"));
        let (rules, conflicts) = render(&place(), &node, &tables(), Some("overlay"), &Listeners::default(), &closed);
        assert!(conflicts.is_empty(), "{conflicts:?}");
        for expected in [
            "meta nfproto ipv4 dnat ip to numgen random mod 2 map { 0 : 10.128.0.2, 1 : 10.128.1.2 }",
            "meta nfproto ipv6 dnat ip6 to fd00::2\n",
            "10.127.0.1 : goto service-0",
            "fd00:0:0:ffff::1 : goto service-0",
            "meta l4proto tcp dnat ip to numgen random mod 2 map { 0 : 10.128.0.2 . 80, 1 : 10.128.1.2 . 80 }",
            "tcp . 8080 : goto publish-0-0, tcp . 9090 : goto publish-0-1 }",
            "meta nfproto ipv4 meta l4proto tcp dnat ip to 10.128.0.2:80\n",
            "meta nfproto ipv6 meta l4proto tcp dnat ip6 to [fd00::2]:80\n",
            "10.128.0.2 . 10.128.0.2",
            "ip saddr { 10.128.0.0/24 } ip daddr != { 10.128.0.0/10, 10.127.0.0/16 } masquerade",
            "ip daddr 10.127.0.0/16 meta l4proto tcp reject with tcp reset",
            "iifname != \"lo\" iifname != \"wrn*\" iifname != \"overlay\" ip daddr { 10.128.0.0/10, 10.127.0.0/16 } drop",
            "iifname \"overlay\" meta nfproto ipv4 fib saddr . iif oif missing drop",
            "ct direction original tcp dport { 7443 } reject with tcp reset",
            "ct direction original ip daddr . tcp dport { 192.0.2.1 . 7443 } reject with tcp reset",
            "ct direction original ip6 daddr . tcp dport { 2001:db8::1 . 7443 } reject with tcp reset",
        ] {
            assert!(rules.contains(expected), "{expected} is not in\n{rules}");
        }
        // One that was made when the service's port was another is reached at that.
        let mut older = tables();
        let service = older.services.get_mut("s").expect("there");
        let own = vec![v1::Port { container_port: 8000, host_port: 8080, ..Default::default() }];
        service.endpoints[1].own_ports = Some(v1::EndpointPorts { ports: own });
        let (older, _) = render(&place(), &node, &older, Some("overlay"), &Listeners::default(), &closed);
        let mixed = "mod 2 map { 0 : 10.128.0.2 . 80, 1 : 10.128.1.2 . 8000 }";
        assert!(older.contains(mixed), "{mixed} is not in\n{older}");
        assert!(!rules.contains("to 10.128.0.9") && !rules.contains(": 10.128.0.9"), "{rules}");
        assert!(!rules.contains(" . 0 :"), "{rules}");
    }

    #[test]
    fn a_port_that_cannot_be_published_keeps_none_of_the_others() {
        let mut tables = tables();
        let mut twin = tables.services["s"].clone();
        twin.name = "twin".to_owned();
        twin.virtual_addresses = vec!["10.127.0.2".to_owned()];
        tables.services.insert("t".to_owned(), twin);
        let (rules, conflicts) =
            render(&place(), &[], &tables, None, &Listeners::of(&[(9090, "tcp"), (8080, "udp")]), &Closed::default());
        assert_eq!(rules.matches("tcp . 8080 : goto").count(), 1, "{rules}");
        assert!(!rules.contains("tcp . 9090"), "{rules}");
        assert!(rules.contains("10.127.0.2 : goto service-1"), "{rules}");
        let said: Vec<_> = conflicts.iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            [
                "a process of this node listens on 9090/tcp, which service web publishes",
                "8080/tcp of service twin is published by service web too",
                "a process of this node listens on 9090/tcp, which service twin publishes",
            ]
        );
    }
}
