//! What the manager says of services and nodes, as it was last heard. It is kept on disk, so that an agent that begins
//! while no manager answers connects containers as before.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use warren_proto::v1;

/// The node's own place in the cluster's network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The node's id.
    pub node_id: String,
    /// Its containers' addresses.
    pub subnets: Vec<IpNet>,
    /// All containers' addresses and all services' virtual ones.
    pub cluster: Vec<IpNet>,
}

impl Place {
    /// Leaves out all that is IPv6.
    pub(super) fn without_ipv6(&mut self) {
        let is_v4 = |network: &IpNet| matches!(network, IpNet::V4(_));
        self.subnets.retain(is_v4);
        self.cluster.retain(is_v4);
    }
}

/// Services and nodes by id. Two copies are equal if they say the same.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tables {
    /// The node's own place; `None` until a manager gave it one.
    pub place: Option<Place>,
    /// All services.
    pub services: BTreeMap<String, v1::ServiceEntry>,
    /// All nodes.
    pub nodes: BTreeMap<String, v1::NodeEntry>,
    /// Where managers serve their API.
    #[serde(default)]
    pub managers: BTreeSet<SocketAddr>,
}

/// An update of the tables of which some parts have come.
#[derive(Debug, Default)]
pub struct Parts(v1::NetworkUpdate);

impl Parts {
    /// Takes the next part; the whole update if it is the last.
    pub fn put_together(&mut self, part: v1::NetworkUpdate) -> Option<v1::NetworkUpdate> {
        let v1::NetworkUpdate { complete, services, removed_services, nodes, removed_nodes, more } = part;
        self.0.complete |= complete;
        self.0.services.extend(services);
        self.0.removed_services.extend(removed_services);
        self.0.nodes.extend(nodes);
        self.0.removed_nodes.extend(removed_nodes);
        (!more).then(|| std::mem::take(&mut self.0))
    }
}

impl Tables {
    /// Follows an update.
    pub fn apply(&mut self, update: v1::NetworkUpdate) {
        if update.complete {
            self.services.clear();
            self.nodes.clear();
        }
        for id in &update.removed_services {
            self.services.remove(id);
        }
        for id in &update.removed_nodes {
            self.nodes.remove(id);
        }
        let services = update.services.into_iter().map(|mut entry| {
            let is_machines = |address: &String| address.parse().is_ok_and(is_machines);
            entry.endpoints.iter_mut().for_each(|endpoint| endpoint.addresses.retain(is_machines));
            (entry.id.clone(), entry)
        });
        self.services.extend(services);
        self.nodes.extend(update.nodes.into_iter().map(|entry| (entry.id.clone(), entry)));
    }

    /// Whether others are still led to a container of a service that is to go, and whether there is anybody else to lead them to.
    pub(crate) fn leaving(&self, service: &str, container: &str) -> Leaving {
        let endpoints = self.services.get(service).map(|entry| entry.endpoints.as_slice()).unwrap_or_default();
        // As long as it is listed, whoever is to take its place may not be known yet.
        if endpoints.iter().any(|endpoint| endpoint.container_id == container) {
            Leaving::Listed
        } else if endpoints.iter().any(|endpoint| endpoint.healthy) {
            Leaving::Left
        } else {
            Leaving::Alone
        }
    }

    /// Leaves out all that is IPv6, on a node that has none.
    pub(super) fn without_ipv6(&mut self) {
        let is_v4 = |address: &String| !address.contains(':');
        if let Some(place) = &mut self.place {
            place.without_ipv6();
        }
        for service in self.services.values_mut() {
            service.virtual_addresses.retain(is_v4);
            service.endpoints.iter_mut().for_each(|endpoint| endpoint.addresses.retain(is_v4));
        }
        for node in self.nodes.values_mut() {
            node.subnets.retain(is_v4);
        }
    }

    /// Reads what was kept; nothing if there is nothing, or nothing that can be read.
    pub(super) fn load(path: &Path) -> Self {
        match fs::read(path).and_then(|bytes| serde_json::from_slice(&bytes).map_err(io::Error::other)) {
            Ok(tables) => tables,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::default(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the cached network cannot be read");
                Self::default()
            }
        }
    }

    pub(super) fn store(&self, path: &Path) {
        let bytes = serde_json::to_vec(self).map_err(io::Error::other);
        if let Err(error) = bytes.and_then(|bytes| warren_durable::replace(path, &bytes)) {
            tracing::warn!(path = %path.display(), %error, "the network cannot be cached");
        }
    }
}

/// What is known of a container that is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// Connections are led to it.
    Listed,
    /// They are led to others.
    Left,
    /// There are no others.
    Alone,
}

/// Whether an address may be a container's or a machine's. Whatever a manager says, nobody is led to a node's own loopback.
fn is_machines(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            !(v4.is_loopback() || v4.is_unspecified() || v4.is_multicast() || v4.is_broadcast() || v4.is_link_local())
        }
        IpAddr::V6(v6) => !(v6.is_loopback() || v6.is_unspecified() || v6.is_multicast() || v6.is_unicast_link_local()),
    }
}

/// An endpoint's addresses.
pub(super) fn addresses(endpoint: &v1::Endpoint) -> impl Iterator<Item = IpAddr> {
    endpoint.addresses.iter().filter_map(|address| address.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(id: &str, name: &str) -> v1::ServiceEntry {
        v1::ServiceEntry { id: id.to_owned(), name: name.to_owned(), ..Default::default() }
    }

    #[test]
    fn nobody_is_led_to_a_loopback() {
        let mut tables = Tables::default();
        let addresses = ["127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "255.255.255.255", "::1", "fe80::1"];
        let addresses = addresses.into_iter().chain(["::ffff:127.0.0.1", "nonsense", "10.128.0.2", "fd00::2"]);
        let endpoint = v1::Endpoint { addresses: addresses.map(str::to_owned).collect(), ..Default::default() };
        let web = v1::ServiceEntry { endpoints: vec![endpoint], ..service("1", "web") };
        tables.apply(v1::NetworkUpdate { services: vec![web], ..Default::default() });
        assert_eq!(tables.services["1"].endpoints[0].addresses, ["10.128.0.2", "fd00::2"]);
    }

    #[test]
    fn updates_replace_add_and_remove() {
        let mut tables = Tables::default();
        let names = |tables: &Tables| tables.services.values().map(|entry| entry.name.clone()).collect::<Vec<_>>();
        let services = vec![service("1", "a"), service("2", "b")];
        tables.apply(v1::NetworkUpdate { complete: true, services, ..Default::default() });
        assert_eq!(names(&tables), ["a", "b"]);
        let removed_services = vec!["2".to_owned()];
        let services = vec![service("1", "renamed"), service("3", "c")];
        tables.apply(v1::NetworkUpdate { services, removed_services, ..Default::default() });
        assert_eq!(names(&tables), ["renamed", "c"]);
        tables.apply(v1::NetworkUpdate { complete: true, ..Default::default() });
        assert!(tables.services.is_empty());
    }

    #[test]
    fn who_leaves_is_listed_left_or_alone() {
        let endpoint = |id: &str, healthy| v1::Endpoint { container_id: id.to_owned(), healthy, ..Default::default() };
        for (endpoints, leaving) in [
            (vec![endpoint("a", true), endpoint("b", true)], Leaving::Listed),
            (vec![endpoint("b", true)], Leaving::Left),
            (vec![endpoint("a", true), endpoint("b", false)], Leaving::Listed),
            (vec![endpoint("a", true)], Leaving::Listed),
            (vec![endpoint("b", false)], Leaving::Alone),
            (Vec::new(), Leaving::Alone),
        ] {
            let mut tables = Tables::default();
            let services = vec![v1::ServiceEntry { endpoints, ..service("1", "web") }];
            tables.apply(v1::NetworkUpdate { complete: true, services, ..Default::default() });
            assert_eq!(tables.leaving("1", "a"), leaving, "{tables:?}");
        }
        assert_eq!(Tables::default().leaving("1", "a"), Leaving::Alone, "the service is gone");
    }

    #[test]
    fn parts_are_one_update() {
        let mut parts = Parts::default();
        let first = v1::NetworkUpdate {
            complete: true,
            services: vec![service("1", "a")],
            removed_nodes: vec!["n1".to_owned()],
            more: true,
            ..Default::default()
        };
        let last = v1::NetworkUpdate {
            services: vec![service("2", "b")],
            removed_services: vec!["3".to_owned()],
            nodes: vec![v1::NodeEntry { id: "n2".to_owned(), ..Default::default() }],
            removed_nodes: vec!["n3".to_owned()],
            ..Default::default()
        };
        assert_eq!(parts.put_together(first), None);
        let whole = v1::NetworkUpdate {
            complete: true,
            services: vec![service("1", "a"), service("2", "b")],
            removed_services: vec!["3".to_owned()],
            nodes: vec![v1::NodeEntry { id: "n2".to_owned(), ..Default::default() }],
            removed_nodes: vec!["n1".to_owned(), "n3".to_owned()],
            more: false,
        };
        assert_eq!(parts.put_together(last), Some(whole));
        let alone = v1::NetworkUpdate { removed_services: vec!["1".to_owned()], ..Default::default() };
        assert_eq!(parts.put_together(alone.clone()), Some(alone), "nothing of before is left");
    }

    #[test]
    fn what_is_kept_is_read_again() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("network.json");
        assert_eq!(Tables::load(&path), Tables::default());
        let mut tables = Tables::default();
        tables.services.insert("1".to_owned(), service("1", "a"));
        tables.place = Some(Place { subnets: vec!["10.128.0.0/24".parse().expect("a net")], ..Place::default() });
        tables.store(&path);
        assert_eq!(Tables::load(&path), tables);
        fs::write(&path, "{").expect("writable");
        assert_eq!(Tables::load(&path), Tables::default());
    }
}
