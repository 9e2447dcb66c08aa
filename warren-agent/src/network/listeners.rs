//! The ports that processes of the node listen on, from the kernel's own tables.

use std::{collections::BTreeSet, fs};

use warren_proto::v1;

/// `TCP_LISTEN`, as `/proc/net/tcp` shows it.
const LISTEN: &str = "0A";

/// Ports with their protocols. Those on loopback addresses alone are not among them: nobody else meets them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Listeners(BTreeSet<(u32, &'static str)>);

impl Listeners {
    /// Looks now.
    pub(super) fn here() -> Self {
        let mut found = BTreeSet::new();
        for (file, protocol) in [("tcp", "tcp"), ("tcp6", "tcp"), ("udp", "udp"), ("udp6", "udp")] {
            let table = fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
            let ports = table.lines().skip(1).filter_map(|line| port(line, protocol == "tcp"));
            found.extend(ports.map(|port| (port, protocol)));
        }
        Self(found)
    }

    /// As the manager is told.
    pub(super) fn to_proto(&self) -> Vec<v1::NodeListener> {
        let protocol = |word: &str| if word == "udp" { v1::Protocol::Udp } else { v1::Protocol::Tcp };
        self.0.iter().map(|(port, word)| v1::NodeListener { port: *port, protocol: protocol(word).into() }).collect()
    }

    #[cfg(test)]
    pub(super) fn of(ports: &[(u32, &'static str)]) -> Self {
        Self(ports.iter().copied().collect())
    }

    pub(super) fn contains(&self, port: u32, protocol: &str) -> bool {
        self.0.iter().any(|(known, of)| *known == port && *of == protocol)
    }

    /// Those of TCP, and those of UDP that were there before: whoever asks for something by UDP has a port for a moment.
    pub(super) fn settled(&self, before: &Self) -> Self {
        let stays = |listener: &&(u32, &'static str)| listener.1 == "tcp" || before.0.contains(*listener);
        Self(self.0.iter().filter(stays).copied().collect())
    }
}

/// The port of a line's local address, if something listens there, and not on loopback. An unconnected UDP socket does.
fn port(line: &str, is_tcp: bool) -> Option<u32> {
    let mut fields = line.split_whitespace().skip(1);
    let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    let (address, port) = local.split_once(':')?;
    let is_listening = if is_tcp { state == LISTEN } else { remote.ends_with(":0000") };
    // Words in the machine's order of bytes: on little-endian ones 127.x.y.z ends with 7F.
    let is_loopback = (address.len() == 8 && address.ends_with("7F"))
        || address == "00000000000000000000000001000000"
        || (address.len() == 32 && address.starts_with("0000000000000000FFFF0000") && address.ends_with("7F"));
    let port = u32::from_str_radix(port, 16).ok()?;
    (is_listening && !is_loopback && port != 0).then_some(port)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn lines_of_the_kernel_are_read() {
        let line =
            |local: &str, state: &str| format!("   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000");
        assert_eq!(port(&line("00000000:0016", "0A"), true), Some(22));
        assert_eq!(port(&line("0100007F:1F90", "0A"), true), None, "on loopback");
        assert_eq!(port(&line("010200C0:1F90", "01"), true), None, "a connection");
        assert_eq!(port(&line("00000000000000000000000000000000:0050", "0A"), true), Some(80));
        assert_eq!(port(&line("00000000000000000000000001000000:0050", "0A"), true), None, "::1");
        assert_eq!(port("junk", true), None);
        let (before, now) = (Listeners::of(&[(53, "udp")]), Listeners::of(&[(53, "udp"), (99, "udp"), (22, "tcp")]));
        assert_eq!(now.settled(&before), Listeners::of(&[(53, "udp"), (22, "tcp")]));
    }

    #[test]
    fn sockets_of_this_machine_are_found() {
        let (tcp, udp) =
            (TcpListener::bind("0.0.0.0:0").expect("a port"), UdpSocket::bind("0.0.0.0:0").expect("a port"));
        let number = |address: std::io::Result<std::net::SocketAddr>| u32::from(address.expect("an address").port());
        let found = Listeners::here();
        assert!(found.contains(number(tcp.local_addr()), "tcp") && found.contains(number(udp.local_addr()), "udp"));
    }
}
