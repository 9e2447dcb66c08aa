use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The node's own place in its subnet.
const NODE: u8 = 1;
/// Containers' places: neither the subnet's first address, nor the node's, nor the broadcast address.
const CONTAINERS: std::ops::RangeInclusive<u8> = 2..=254;

/// For how long an address that was given back is nobody's: longer than names lead to it that were answered before (five seconds).
const REST: Duration = Duration::from_secs(10);

/// Why there is no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    /// All are containers'.
    Taken,
    /// One has rested by then.
    Resting(Duration),
}

/// The addresses of one node's containers. Places are taken in turn, and rest after they were given back: whoever has looked a
/// name up before would reach another service.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    v4: Ipv4Net,
    v6: Option<Ipv6Net>,
    taken: BTreeMap<u8, String>,
    /// When those were given back that rest.
    resting: BTreeMap<u8, Instant>,
    next: u8,
}

impl Pool {
    /// The pool of a node with these subnets; `None` without one of IPv4.
    pub(super) fn new(subnets: &[IpNet]) -> Option<Self> {
        let v4 = subnets.iter().find_map(|subnet| if let IpNet::V4(v4) = subnet { Some(*v4) } else { None })?;
        let v6 = subnets.iter().find_map(|subnet| if let IpNet::V6(v6) = subnet { Some(*v6) } else { None });
        Some(Self { v4, v6, taken: BTreeMap::new(), resting: BTreeMap::new(), next: *CONTAINERS.start() })
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

    /// Gives a container its addresses, one of each family: those that it has already, if it has.
    pub(super) fn take(&mut self, container: &str, now: Instant) -> Result<Vec<IpAddr>, Lack> {
        if let Some((place, _)) = self.taken.iter().find(|(_, owner)| *owner == container) {
            return Ok(self.addresses(*place));
        }
        self.resting.retain(|_, since| now.saturating_duration_since(*since) < REST);
        let (first, last) = (*CONTAINERS.start(), *CONTAINERS.end());
        let is_free = |place: &u8| !self.taken.contains_key(place) && !self.resting.contains_key(place);
        let Some(place) = (self.next..=last).chain(first..self.next).find(is_free) else {
            let first_back = self.resting.values().min().ok_or(Lack::Taken)?;
            return Err(Lack::Resting(REST.saturating_sub(now.saturating_duration_since(*first_back))));
        };
        self.taken.insert(place, container.to_owned());
        self.next = if place == last { first } else { place + 1 };
        Ok(self.addresses(place))
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

    pub(super) fn give_back(&mut self, container: &str, now: Instant) {
        let places: Vec<_> =
            self.taken.iter().filter(|(_, owner)| *owner == container).map(|(place, _)| *place).collect();
        for place in places {
            self.taken.remove(&place);
            self.resting.insert(place, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> Pool {
        let subnets = ["10.128.3.0/24", "fd00:0:0:3::/64"].map(|text| text.parse().expect("a subnet"));
        Pool::new(&subnets).expect("a pool")
    }

    fn text(list: Vec<IpAddr>) -> String {
        list.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn containers_have_addresses_of_their_own() {
        let (mut pool, now) = (pool(), Instant::now());
        let take = |pool: &mut Pool, container: &str, now| pool.take(container, now).map(text);
        let shown = |place: u8| Ok(format!("10.128.3.{place} fd00:0:0:3::{place}"));
        assert_eq!(text(pool.node()), "10.128.3.1 fd00:0:0:3::1");
        assert_eq!(take(&mut pool, "a", now), shown(2));
        assert_eq!(take(&mut pool, "b", now), shown(3));
        assert_eq!(take(&mut pool, "a", now), shown(2), "its own");
        pool.give_back("a", now);
        assert_eq!(take(&mut pool, "c", now), shown(4), "not the one just given back");
        for i in 0..250 {
            assert!(pool.take(&format!("x{i}"), now).is_ok(), "{i}");
        }
        assert_eq!(take(&mut pool, "late", now), Err(Lack::Resting(REST)));
        let later = now + Duration::from_secs(7);
        assert_eq!(take(&mut pool, "late", later), Err(Lack::Resting(REST - Duration::from_secs(7))));
        assert_eq!(take(&mut pool, "late", now + REST), shown(2));
        assert_eq!(take(&mut pool, "later", now + REST), Err(Lack::Taken));
    }

    #[test]
    fn addresses_from_before_are_not_given_to_others() {
        let mut pool = pool();
        pool.keep("old", &["10.128.3.2".parse().expect("an address"), "fd00:0:0:3::2".parse().expect("an address")]);
        pool.keep("moved", &["10.128.9.3".parse().expect("an address")]);
        let given = (0..252).filter_map(|i| pool.take(&format!("x{i}"), Instant::now()).ok());
        let given: Vec<_> = given.map(|both| both[0]).collect();
        assert_eq!(given.len(), 252);
        assert!(!given.contains(&"10.128.3.2".parse().expect("an address")));
    }
}
