use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The node's own place in its subnet.
const NODE: u8 = 1;
/// Containers' places: neither the subnet's first address, nor the node's, nor the broadcast address.
const CONTAINERS: std::ops::RangeInclusive<u8> = 2..=254;

/// The addresses of one node's containers. Places are taken in turn, so that an address that was given back is not at
/// once another container's.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    v4: Ipv4Net,
    v6: Option<Ipv6Net>,
    taken: BTreeMap<u8, String>,
    next: u8,
}

impl Pool {
    /// The pool of a node with these subnets; `None` without one of IPv4.
    pub(super) fn new(subnets: &[IpNet]) -> Option<Self> {
        let v4 = subnets.iter().find_map(|subnet| if let IpNet::V4(v4) = subnet { Some(*v4) } else { None })?;
        let v6 = subnets.iter().find_map(|subnet| if let IpNet::V6(v6) = subnet { Some(*v6) } else { None });
        Some(Self { v4, v6, taken: BTreeMap::new(), next: *CONTAINERS.start() })
    }

    fn addresses(&self, place: u8) -> Vec<IpAddr> {
        let v4 = Ipv4Addr::from(u32::from(self.v4.network()) | u32::from(place));
        let v6 = self.v6.map(|v6| Ipv6Addr::from(u128::from(v6.network()) | u128::from(place)));
        std::iter::once(IpAddr::from(v4)).chain(v6.map(IpAddr::from)).collect()
    }

    /// The node's own addresses, one of each family.
    pub(super) fn node(&self) -> Vec<IpAddr> {
        self.addresses(NODE)
    }

    /// Gives a container its addresses, one of each family: those that it has already, if it has. `None` when none is left.
    pub(super) fn take(&mut self, container: &str) -> Option<Vec<IpAddr>> {
        if let Some((place, _)) = self.taken.iter().find(|(_, owner)| *owner == container) {
            return Some(self.addresses(*place));
        }
        let (first, last) = (*CONTAINERS.start(), *CONTAINERS.end());
        let place = (self.next..=last).chain(first..self.next).find(|place| !self.taken.contains_key(place))?;
        self.taken.insert(place, container.to_owned());
        self.next = if place == last { first } else { place + 1 };
        Some(self.addresses(place))
    }

    /// Notes the addresses of a container that has them from an earlier agent. Those of another subnet are left alone.
    pub(super) fn keep(&mut self, container: &str, addresses: &[IpAddr]) {
        for address in addresses {
            if let IpAddr::V4(v4) = address
                && self.v4.contains(v4)
            {
                let place = v4.octets()[3];
                self.taken.insert(place, container.to_owned());
                self.next = self.next.max(place.saturating_add(1).min(*CONTAINERS.end()));
            }
        }
    }

    pub(super) fn give_back(&mut self, container: &str) {
        self.taken.retain(|_, owner| owner != container);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> Pool {
        let subnets = ["10.128.3.0/24", "fd00:0:0:3::/64"].map(|text| text.parse().expect("a subnet"));
        Pool::new(&subnets).expect("a pool")
    }

    #[test]
    fn containers_have_addresses_of_their_own() {
        let mut pool = pool();
        let text = |list: Vec<IpAddr>| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        assert_eq!(text(pool.node()), "10.128.3.1 fd00:0:0:3::1");
        assert_eq!(text(pool.take("a").expect("left")), "10.128.3.2 fd00:0:0:3::2");
        assert_eq!(text(pool.take("b").expect("left")), "10.128.3.3 fd00:0:0:3::3");
        assert_eq!(text(pool.take("a").expect("its own")), "10.128.3.2 fd00:0:0:3::2");
        pool.give_back("a");
        assert_eq!(text(pool.take("c").expect("left")), "10.128.3.4 fd00:0:0:3::4", "not the one just given back");
        for i in 0..251 {
            assert!(pool.take(&format!("x{i}")).is_some(), "{i}");
        }
        assert_eq!(pool.take("late"), None);
        pool.give_back("b");
        assert_eq!(text(pool.take("late").expect("left")), "10.128.3.3 fd00:0:0:3::3");
    }

    #[test]
    fn addresses_from_before_are_not_given_to_others() {
        let mut pool = pool();
        pool.keep("old", &["10.128.3.2".parse().expect("an address"), "fd00:0:0:3::2".parse().expect("an address")]);
        pool.keep("moved", &["10.128.9.3".parse().expect("an address")]);
        let given: Vec<_> = (0..252).filter_map(|i| pool.take(&format!("x{i}"))).map(|both| both[0]).collect();
        assert_eq!(given.len(), 252);
        assert!(!given.contains(&"10.128.3.2".parse().expect("an address")));
    }
}
