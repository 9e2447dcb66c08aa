//! Which addresses are whose: arithmetic on the cluster's networks, and the numbers that nodes and services hold in them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use imbl::OrdSet;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// Addresses of a node's containers, as a prefix length: 254 of them.
const NODE_PREFIX_V4: u8 = 24;
const NODE_PREFIX_V6: u8 = 64;

/// The networks of a cluster; fixed when it is founded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterNetwork {
    /// Containers' addresses: each node has a /24 of it.
    pub containers: Ipv4Net,
    /// Services' virtual addresses.
    pub services: Ipv4Net,
    /// Both again in IPv6: each node has a /64.
    pub v6: Option<NetworkV6>,
}

/// The networks of a cluster in IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkV6 {
    /// Containers' addresses.
    pub containers: Ipv6Net,
    /// Services' virtual addresses.
    pub services: Ipv6Net,
}

/// Why networks will not do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{network} {why}")]
pub struct InvalidNetwork {
    network: IpNet,
    why: &'static str,
}

impl ClusterNetwork {
    /// What clusters have unless they are told otherwise. Containers are in the upper part of 10.0.0.0/8, which fewer sites
    /// use; the IPv6 networks are a random prefix of a site's own (RFC 4193), made from `random`.
    #[must_use]
    pub fn of_random(random: u128) -> Self {
        let v4 = |octets: [u8; 4], prefix| Ipv4Net::new_assert(Ipv4Addr::from(octets), prefix);
        // fd, then 40 random bits, then 16 that say which subnet.
        let global_id = (random & ((1 << 40) - 1)) << 80;
        let v6 = |subnet: u128, prefix| {
            Ipv6Net::new_assert(Ipv6Addr::from((0xfd << 120) | global_id | (subnet << 64)), prefix)
        };
        Self {
            containers: v4([10, 128, 0, 0], 10),
            services: v4([10, 127, 0, 0], 16),
            v6: Some(NetworkV6 { containers: v6(0, 50), services: v6(0xffff, 112) }),
        }
    }

    /// Whether these networks can be used together.
    ///
    /// # Errors
    ///
    /// When one is too small, or not the beginning of its prefix, or two overlap.
    pub fn check(&self) -> Result<(), InvalidNetwork> {
        let fail = |network: IpNet, why| Err(InvalidNetwork { network, why });
        for (network, longest) in [(self.containers, NODE_PREFIX_V4), (self.services, 28)] {
            if network != network.trunc() {
                return fail(network.into(), "is an address within a network, not a network");
            }
            if network.prefix_len() > longest {
                return fail(network.into(), "is too small");
            }
        }
        if self.containers.contains(&self.services) || self.services.contains(&self.containers) {
            return fail(self.services.into(), "overlaps the containers' network");
        }
        if let Some(v6) = self.v6 {
            for (network, longest) in [(v6.containers, NODE_PREFIX_V6), (v6.services, 120)] {
                if network != network.trunc() {
                    return fail(network.into(), "is an address within a network, not a network");
                }
                if network.prefix_len() > longest {
                    return fail(network.into(), "is too small");
                }
            }
            if v6.containers.contains(&v6.services) || v6.services.contains(&v6.containers) {
                return fail(v6.services.into(), "overlaps the containers' network");
            }
        }
        Ok(())
    }

    /// All of them.
    #[must_use]
    pub fn prefixes(&self) -> Vec<IpNet> {
        let v6 = self.v6.map(|v6| [v6.containers, v6.services].map(IpNet::from));
        [self.containers, self.services].map(IpNet::from).into_iter().chain(v6.into_iter().flatten()).collect()
    }

    /// How many nodes can have a subnet.
    #[must_use]
    pub fn subnets(&self) -> u32 {
        let v6 = self.v6.map_or(u8::MAX, |v6| NODE_PREFIX_V6 - v6.containers.prefix_len());
        1 << (NODE_PREFIX_V4 - self.containers.prefix_len()).min(v6).min(31)
    }

    /// The subnets of the node with this number.
    #[must_use]
    pub fn node_subnets(&self, index: u32) -> Vec<IpNet> {
        let v4 = u32::from(self.containers.network()) | (index << (32 - NODE_PREFIX_V4));
        let v4 = Ipv4Net::new_assert(v4.into(), NODE_PREFIX_V4);
        let v6 = self.v6.map(|v6| {
            let network = u128::from(v6.containers.network()) | (u128::from(index) << (128 - NODE_PREFIX_V6));
            Ipv6Net::new_assert(network.into(), NODE_PREFIX_V6)
        });
        std::iter::once(IpNet::from(v4)).chain(v6.map(IpNet::from)).collect()
    }

    /// How many services can have a virtual address: neither the first nor the last address is one.
    #[must_use]
    pub fn virtual_addresses(&self) -> u32 {
        let bits = 32 - self.services.prefix_len();
        let v6 = self.v6.map_or(u8::MAX, |v6| 128 - v6.services.prefix_len());
        1 << bits.min(v6).min(31)
    }

    /// The addresses of the service with this number.
    #[must_use]
    pub fn service_addresses(&self, index: u32) -> Vec<IpAddr> {
        let v4 = Ipv4Addr::from(u32::from(self.services.network()) | index);
        let v6 = self.v6.map(|v6| Ipv6Addr::from(u128::from(v6.services.network()) | u128::from(index)));
        std::iter::once(IpAddr::from(v4)).chain(v6.map(IpAddr::from)).collect()
    }
}

/// Numbers that are given out one after the other, so that one that was given back is not at once another's. Snapshots hold where the
/// search goes on; who has which says the rest of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "u32", into = "u32")]
pub(super) struct Numbers {
    /// Where the search for a free one begins.
    next: u32,
    pub(super) taken: OrdSet<u32>,
}

impl From<u32> for Numbers {
    fn from(next: u32) -> Self {
        Self { next, taken: OrdSet::new() }
    }
}

impl From<Numbers> for u32 {
    fn from(numbers: Numbers) -> Self {
        numbers.next
    }
}

impl Numbers {
    /// Takes the next free number from `first` on and below `end`; `None` when there is none.
    pub(super) fn take(&mut self, first: u32, end: u32) -> Option<u32> {
        let begin = self.next.clamp(first, end);
        let number = (begin..end).chain(first..begin).find(|number| !self.taken.contains(number))?;
        self.taken.insert(number);
        self.next = number + 1;
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_and_services_have_addresses_of_their_own() {
        let network = ClusterNetwork::of_random(0x12_3456_789a);
        assert_eq!(network.check(), Ok(()));
        let text = |list: Vec<IpNet>| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(text(network.node_subnets(1)), ["10.128.1.0/24", "fd12:3456:789a:1::/64"]);
        assert_eq!(text(network.node_subnets(16383)), ["10.191.255.0/24", "fd12:3456:789a:3fff::/64"]);
        assert_eq!(network.subnets(), 16384);
        let addresses: Vec<_> = network.service_addresses(258).iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.127.1.2", "fd12:3456:789a:ffff::102"]);
        assert_eq!(network.virtual_addresses(), 1 << 16);
    }

    #[test]
    fn networks_that_cannot_be_are_refused() {
        let network = ClusterNetwork::of_random(0);
        let containers = |text: &str| ClusterNetwork { containers: text.parse().expect("a network"), ..network };
        assert!(containers("10.0.0.0/16").check().is_ok());
        for wrong in ["10.0.0.0/25", "10.0.0.1/16", "10.127.0.0/16", "10.0.0.0/8"] {
            assert!(containers(wrong).check().is_err(), "{wrong}");
        }
    }

    #[test]
    fn numbers_go_round() {
        let mut numbers = Numbers::default();
        let take = |numbers: &mut Numbers| numbers.take(1, 4);
        assert_eq!([take(&mut numbers), take(&mut numbers)], [Some(1), Some(2)]);
        numbers.taken.remove(&1);
        assert_eq!([take(&mut numbers), take(&mut numbers), take(&mut numbers)], [Some(3), Some(1), None]);
        numbers.taken.remove(&2);
        assert_eq!(take(&mut numbers), Some(2));
    }
}
