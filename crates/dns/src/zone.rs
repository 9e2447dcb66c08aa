use std::{
    net::IpAddr,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use hickory_server::proto::{
    ProtoError,
    rr::{
        LowerName, Name, RData, Record, RecordType,
        rdata::{A, AAAA, PTR, SOA, SRV},
    },
};
use imbl::{HashMap, OrdMap};
use ipnet::IpNet;
use rand::seq::SliceRandom as _;
use warren_proto::v1;

/// How long others may keep an answer, in seconds: containers come and go.
pub(crate) const TTL: u32 = 5;

/// What the zone knows of a service.
#[derive(Debug)]
struct Service {
    name: String,
    entry: v1::ServiceEntry,
    virtuals: Vec<IpAddr>,
    /// Healthy ones.
    endpoints: Vec<Endpoint>,
}

#[derive(Debug)]
struct Endpoint {
    slot: u32,
    healthy: bool,
    addresses: Vec<IpAddr>,
    /// What is known of it, where its ports are not its service's.
    wire: Option<Box<v1::Endpoint>>,
}

impl Endpoint {
    /// The number of one of its service's ports, if it has it.
    fn port(&self, of_service: &v1::Port) -> Option<u16> {
        let own = self.wire.as_ref().map_or(Some(of_service), |wire| wire.port(of_service))?;
        u16::try_from(own.container_port).ok()
    }
}

/// An answer for one of the cluster's names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// There are records, and others that go with them.
    Found {
        /// Of the type that was asked for.
        records: Vec<Record>,
        /// Addresses of what the records name.
        additional: Vec<Record>,
    },
    /// There is such a name, but nothing of the type.
    NoData,
    /// There is no such name.
    NoSuchName,
}

/// The names of a cluster's services at one moment. A copy costs a few pointers.
#[derive(Clone, Debug)]
pub struct Zone {
    domain: LowerName,
    /// As it is in a message.
    domain_bytes: Vec<u8>,
    /// The cluster's addresses: their reverse names are the zone's.
    networks: Vec<IpNet>,
    services: HashMap<String, Arc<Service>>,
    /// Ids to names, to find what a service was called before.
    names: OrdMap<String, String>,
    /// Names by address.
    reverse: HashMap<IpAddr, String>,
    soa: Record,
}

impl Zone {
    /// A zone without services, for this domain and the cluster's addresses.
    ///
    /// # Errors
    ///
    /// When the domain is no domain name.
    pub fn new(domain: &str, networks: &[IpNet]) -> Result<Self, ProtoError> {
        let mut domain = Name::from_ascii(domain)?;
        domain.set_fqdn(true);
        let soa = soa(&domain, 1)?;
        let mut domain_bytes = Vec::new();
        for label in &domain {
            domain_bytes.push(label.len() as u8);
            domain_bytes.extend_from_slice(label);
        }
        domain_bytes.push(0);
        Ok(Self {
            domain_bytes,
            domain: LowerName::new(&domain),
            networks: networks.to_vec(),
            services: HashMap::new(),
            names: OrdMap::new(),
            reverse: HashMap::new(),
            soa,
        })
    }

    /// Follows the tables: afterwards its services are these. What did not change costs a comparison.
    pub fn update<'a>(&mut self, networks: &[IpNet], services: impl Iterator<Item = &'a v1::ServiceEntry> + Clone) {
        self.networks = networks.to_vec();
        let ids: std::collections::BTreeSet<&str> = services.clone().map(|entry| entry.id.as_str()).collect();
        let gone: Vec<_> = self.names.keys().filter(|id| !ids.contains(id.as_str())).cloned().collect();
        for id in gone {
            self.remove(&id);
        }
        let is_news = |zone: &Self, entry: &v1::ServiceEntry| {
            let known = zone.names.get(&entry.id).and_then(|name| zone.services.get(name));
            known.is_none_or(|known| known.entry != *entry)
        };
        let news: Vec<_> = services.filter(|entry| is_news(self, entry)).collect();
        // All of them first: a name or an address may pass from one service to another.
        for entry in &news {
            self.remove(&entry.id);
        }
        for entry in news {
            self.insert(entry);
        }
        let serial = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        // Made from parts that made one before.
        if let Ok(soa) = soa(&Name::from(&self.domain), serial as u32) {
            self.soa = soa;
        }
    }

    fn remove(&mut self, id: &str) {
        let Some(service) = self.names.remove(id).and_then(|name| self.services.remove(&name)) else { return };
        let endpoints = service.endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
        for address in endpoints.chain(&service.virtuals) {
            self.reverse.remove(address);
        }
    }

    fn insert(&mut self, entry: &v1::ServiceEntry) {
        let parse = |list: &[String]| list.iter().filter_map(|address| address.parse().ok()).collect::<Vec<IpAddr>>();
        let endpoint = |e: &v1::Endpoint| Endpoint {
            slot: e.slot,
            addresses: parse(&e.addresses),
            healthy: e.healthy,
            wire: e.own_ports.is_some().then(|| Box::new(e.clone())),
        };
        let endpoints = entry.endpoints.iter().map(endpoint).collect();
        let name = entry.name.to_ascii_lowercase();
        let service =
            Service { name: name.clone(), entry: entry.clone(), virtuals: parse(&entry.virtual_addresses), endpoints };
        for endpoint in &service.endpoints {
            for address in &endpoint.addresses {
                self.reverse.insert(*address, service.instance(endpoint));
            }
        }
        for address in &service.virtuals {
            self.reverse.insert(*address, name.clone());
        }
        self.names.insert(entry.id.clone(), name.clone());
        self.services.insert(name, Arc::new(service));
    }

    /// The start of authority, which goes with answers that there is nothing.
    #[must_use]
    pub fn soa(&self) -> &Record {
        &self.soa
    }

    /// Answers a question for one of the cluster's names; `None` for a name that is not.
    #[must_use]
    pub fn answer(&self, name: &LowerName, kind: RecordType) -> Option<Answer> {
        let own = Name::from(name);
        if name.num_labels() > 2
            && let Ok(network) = own.parse_arpa_name()
        {
            return self.answer_reverse(&own, network, kind);
        }
        let below = self.domain.zone_of(name);
        let labels: Vec<String> = own.iter().map(|label| String::from_utf8_lossy(label).into_owned()).collect();
        let labels = match labels.as_slice() {
            [] => return None,
            all if below => &all[..all.len() - usize::from(self.domain.num_labels())],
            // Names without the domain are the cluster's too if they look like it: nobody else knows names of one label.
            all @ [_] => all,
            all @ [first, .., last]
                if (first.starts_with('_') || first == "vip") && self.services.contains_key(last) =>
            {
                all
            }
            _ => return None,
        };
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        Some(match labels.as_slice() {
            [] if kind == RecordType::SOA => Answer::Found { records: vec![self.soa.clone()], additional: Vec::new() },
            [] => Answer::NoData,
            [service] => {
                let mut addresses = Vec::new();
                let known = self.addresses(service, &mut addresses);
                self.answer_addresses(&own, kind, known.then_some(addresses))
            }
            ["vip", service] => {
                let virtuals = self.services.get(*service).map(|service| service.virtuals.clone());
                self.answer_addresses(&own, kind, virtuals)
            }
            [protocol, service] if protocol.starts_with('_') => {
                let known = self.services.get(*service).is_some_and(|service| service.has_protocol(protocol));
                if known { Answer::NoData } else { Answer::NoSuchName }
            }
            [port, protocol, service] => self.answer_port(&own, kind, port, protocol, service),
            _ => Answer::NoSuchName,
        })
    }

    /// The domain as it is in a message, in lower case or not.
    pub(crate) fn domain_bytes(&self) -> &[u8] {
        &self.domain_bytes
    }

    /// Adds the addresses that a name of one label stands for; false if it stands for nothing.
    pub(crate) fn addresses(&self, name: &str, into: &mut Vec<IpAddr>) -> bool {
        if let Some(service) = self.services.get(name) {
            match service.entry.endpoint_mode() {
                v1::EndpointMode::Vip => into.extend_from_slice(&service.virtuals),
                _ => into.extend(service.healthy().flat_map(|endpoint| &endpoint.addresses)),
            }
            return true;
        }
        let Some((service, slot)) = name.rsplit_once('-') else { return false };
        let (Some(service), Ok(slot)) = (self.services.get(service), slot.parse::<u32>()) else { return false };
        let in_slot = service.endpoints.iter().filter(|endpoint| endpoint.slot == slot);
        into.extend(in_slot.flat_map(|endpoint| &endpoint.addresses));
        // Containers of one service find each other before they are healthy, and to become so. A slot that has no container that runs is
        // no name at all: there is no telling it from one that never was.
        !into.is_empty()
    }

    fn answer_addresses(&self, name: &Name, kind: RecordType, addresses: Option<Vec<IpAddr>>) -> Answer {
        let Some(mut addresses) = addresses else { return Answer::NoSuchName };
        addresses.retain(|address| kind == RecordType::ANY || is_of(*address, kind));
        if addresses.is_empty() {
            return Answer::NoData;
        }
        addresses.shuffle(&mut rand::rng());
        let records = addresses.into_iter().map(|address| record(name, address)).collect();
        Answer::Found { records, additional: Vec::new() }
    }

    fn answer_port(&self, own: &Name, kind: RecordType, port: &str, protocol: &str, service: &str) -> Answer {
        let Some(service) = self.services.get(service) else { return Answer::NoSuchName };
        let is_it = |known: &&v1::Port| {
            !known.name.is_empty()
                && port.strip_prefix('_') == Some(known.name.as_str())
                && protocol == protocol_label(known)
        };
        let Some(port) = service.entry.ports.iter().find(is_it) else { return Answer::NoSuchName };
        if kind != RecordType::SRV || service.healthy().next().is_none() {
            return Answer::NoData;
        }
        let (mut records, mut additional) = (Vec::new(), Vec::new());
        let mut order: Vec<_> = service.healthy().collect();
        order.shuffle(&mut rand::rng());
        for endpoint in order {
            let Ok(target) = self.name_of(&service.instance(endpoint)) else { continue };
            let Some(number) = endpoint.port(port) else { continue };
            let srv = SRV::new(0, 10, number, target.clone());
            records.push(Record::from_rdata(own.clone(), TTL, RData::SRV(srv)));
            additional.extend(endpoint.addresses.iter().map(|address| record(&target, *address)));
        }
        Answer::Found { records, additional }
    }

    fn answer_reverse(&self, own: &Name, network: IpNet, kind: RecordType) -> Option<Answer> {
        let ours = self.networks.iter().any(|known| known.contains(&network));
        if !ours {
            return None;
        }
        let full = network.prefix_len() == network.max_prefix_len();
        let found = full.then(|| self.reverse.get(&network.addr())).flatten();
        Some(match found.and_then(|name| self.name_of(name).ok()) {
            Some(target) if kind == RecordType::PTR => {
                let records = vec![Record::from_rdata(own.clone(), TTL, RData::PTR(PTR(target)))];
                Answer::Found { records, additional: Vec::new() }
            }
            Some(_) => Answer::NoData,
            // Above a name that there may be.
            None if !full => Answer::NoData,
            None => Answer::NoSuchName,
        })
    }

    /// A label as a name below the domain.
    fn name_of(&self, label: &str) -> Result<Name, ProtoError> {
        Name::from_ascii(label)?.append_domain(&Name::from(&self.domain))
    }
}

impl Service {
    /// Those that its name stands for.
    fn healthy(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.iter().filter(|endpoint| endpoint.healthy)
    }

    /// What an endpoint is called. Those of a global service have no slot and share its name.
    fn instance(&self, endpoint: &Endpoint) -> String {
        if endpoint.slot == 0 { self.name.clone() } else { format!("{}-{}", self.name, endpoint.slot) }
    }

    fn has_protocol(&self, label: &str) -> bool {
        self.entry.ports.iter().any(|port| !port.name.is_empty() && protocol_label(port) == label)
    }
}

fn protocol_label(port: &v1::Port) -> &'static str {
    if port.protocol() == v1::Protocol::Udp { "_udp" } else { "_tcp" }
}

fn is_of(address: IpAddr, kind: RecordType) -> bool {
    matches!((address, kind), (IpAddr::V4(_), RecordType::A) | (IpAddr::V6(_), RecordType::AAAA))
}

fn record(name: &Name, address: IpAddr) -> Record {
    let data = match address {
        IpAddr::V4(v4) => RData::A(A(v4)),
        IpAddr::V6(v6) => RData::AAAA(AAAA(v6)),
    };
    Record::from_rdata(name.clone(), TTL, data)
}

/// Nobody transfers the zone: but for the last, the numbers say so. The last is how long it is known that there is nothing.
fn soa(domain: &Name, serial: u32) -> Result<Record, ProtoError> {
    let [server, contact] = ["ns", "hostmaster"].map(|label| Name::from_ascii(label)?.append_domain(domain));
    let data = SOA::new(server?, contact?, serial, 3600, 600, 86_400, TTL);
    Ok(Record::from_rdata(domain.clone(), TTL, RData::SOA(data)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(slot: u32, addresses: &[&str], healthy: bool) -> v1::Endpoint {
        let addresses = addresses.iter().map(|address| (*address).to_owned()).collect();
        v1::Endpoint { slot, addresses, healthy, ..Default::default() }
    }

    fn web() -> v1::ServiceEntry {
        let port = |name: &str, container_port, protocol: v1::Protocol| v1::Port {
            name: name.to_owned(),
            container_port,
            protocol: protocol.into(),
            ..Default::default()
        };
        v1::ServiceEntry {
            id: "1".to_owned(),
            name: "web".to_owned(),
            virtual_addresses: vec!["10.127.0.1".to_owned(), "fd00::1:1".to_owned()],
            ports: vec![port("http", 80, v1::Protocol::Tcp), port("", 81, v1::Protocol::Tcp)],
            endpoints: vec![
                endpoint(1, &["10.128.0.2", "fd00::2"], true),
                endpoint(2, &["10.128.0.3"], true),
                endpoint(3, &["10.128.0.4"], false),
            ],
            ..Default::default()
        }
    }

    fn zone(services: &[v1::ServiceEntry]) -> Zone {
        let networks = ["10.128.0.0/10", "10.127.0.0/16", "fd00::/48"].map(|text| text.parse().expect("a network"));
        let mut zone = Zone::new("warren", &networks).expect("a zone");
        zone.update(&networks, services.iter());
        zone
    }

    /// An answer as text: records sorted, NODATA, NXDOMAIN, or FORWARD for somebody else's name.
    fn ask(zone: &Zone, name: &str, kind: RecordType) -> String {
        let mut name = Name::from_ascii(name).expect("a name");
        name.set_fqdn(true);
        match zone.answer(&LowerName::new(&name), kind) {
            None => "FORWARD".to_owned(),
            Some(Answer::NoData) => "NODATA".to_owned(),
            Some(Answer::NoSuchName) => "NXDOMAIN".to_owned(),
            Some(Answer::Found { records, .. }) => {
                let mut data: Vec<_> = records.iter().map(|record| record.data.to_string()).collect();
                data.sort();
                data.join(" ")
            }
        }
    }

    #[test]
    fn a_name_is_answered_by_what_it_is() {
        use RecordType as T;
        let vip = v1::ServiceEntry {
            id: "2".to_owned(),
            name: "db".to_owned(),
            endpoint_mode: v1::EndpointMode::Vip.into(),
            virtual_addresses: vec!["10.127.0.2".to_owned()],
            endpoints: vec![endpoint(1, &["10.128.0.9"], true)],
            ..Default::default()
        };
        let empty = v1::ServiceEntry { id: "3".to_owned(), name: "empty".to_owned(), ..Default::default() };
        let zone = zone(&[web(), vip, empty]);
        for (name, kind, answer) in [
            ("web", T::A, "10.128.0.2 10.128.0.3"),
            ("web.warren", T::A, "10.128.0.2 10.128.0.3"),
            ("WeB.WARREN", T::A, "10.128.0.2 10.128.0.3"),
            ("web", T::AAAA, "fd00::2"),
            ("web", T::TXT, "NODATA"),
            ("web-2", T::A, "10.128.0.3"),
            ("web-2.warren", T::AAAA, "NODATA"),
            ("web-3", T::A, "10.128.0.4"),
            ("web-9", T::A, "NXDOMAIN"),
            ("vip.web", T::A, "10.127.0.1"),
            ("vip.web.warren", T::AAAA, "fd00::1:1"),
            ("db", T::A, "10.127.0.2"),
            ("db-1", T::A, "10.128.0.9"),
            ("empty", T::A, "NODATA"),
            ("empty-1", T::A, "NXDOMAIN"),
            ("_http._tcp.web", T::SRV, "0 10 80 web-1.warren. 0 10 80 web-2.warren."),
            ("_http._tcp.web.warren", T::SRV, "0 10 80 web-1.warren. 0 10 80 web-2.warren."),
            ("_http._tcp.web", T::A, "NODATA"),
            ("_tcp.web.warren", T::A, "NODATA"),
            ("_udp.web.warren", T::A, "NXDOMAIN"),
            ("_http._udp.web", T::SRV, "NXDOMAIN"),
            ("_._tcp.web", T::SRV, "NXDOMAIN"),
            ("nobody", T::A, "NXDOMAIN"),
            ("nobody.warren", T::AAAA, "NXDOMAIN"),
            ("a.b.web.warren", T::A, "NXDOMAIN"),
            ("warren", T::A, "NODATA"),
            ("2.0.128.10.in-addr.arpa", T::PTR, "web-1.warren."),
            ("1.0.127.10.in-addr.arpa", T::PTR, "web.warren."),
            ("4.0.128.10.in-addr.arpa", T::PTR, "web-3.warren."),
            ("77.0.128.10.in-addr.arpa", T::PTR, "NXDOMAIN"),
            ("0.128.10.in-addr.arpa", T::PTR, "NODATA"),
            ("2.0.128.10.in-addr.arpa", T::A, "NODATA"),
            ("2.0.0.192.in-addr.arpa", T::PTR, "FORWARD"),
            ("web.example.com", T::A, "FORWARD"),
            ("_http._tcp.example.com", T::SRV, "FORWARD"),
            ("vip.example", T::A, "FORWARD"),
        ] {
            assert_eq!(ask(&zone, name, kind), answer, "{name} {kind}");
        }
        assert_eq!(ask(&zone, "web", T::ANY), "10.128.0.2 10.128.0.3 fd00::2");
        assert!(ask(&zone, "warren", T::SOA).starts_with("ns.warren. hostmaster.warren. "));
    }

    #[test]
    fn services_come_change_and_go() {
        let mut zone = zone(&[web()]);
        let networks = zone.networks.clone();
        let renamed =
            v1::ServiceEntry { name: "site".to_owned(), endpoints: vec![endpoint(1, &["10.128.0.7"], true)], ..web() };
        zone.update(&networks, std::iter::once(&renamed));
        assert_eq!(ask(&zone, "web", RecordType::A), "NXDOMAIN");
        assert_eq!(ask(&zone, "site", RecordType::A), "10.128.0.7");
        assert_eq!(ask(&zone, "2.0.128.10.in-addr.arpa", RecordType::PTR), "NXDOMAIN");
        // Names and addresses pass from one to the other.
        let [mut one, mut two] = [renamed.clone(), v1::ServiceEntry { id: "0".to_owned(), ..web() }];
        (two.endpoints, two.virtual_addresses) = (Vec::new(), Vec::new());
        zone.update(&networks, [&one, &two].into_iter());
        std::mem::swap(&mut one.name, &mut two.name);
        std::mem::swap(&mut one.endpoints, &mut two.endpoints);
        zone.update(&networks, [&one, &two].into_iter());
        assert_eq!(ask(&zone, "site", RecordType::A), "10.128.0.7");
        assert_eq!(ask(&zone, "7.0.128.10.in-addr.arpa", RecordType::PTR), "site-1.warren.");
        zone.update(&networks, std::iter::empty());
        assert_eq!(ask(&zone, "site", RecordType::A), "NXDOMAIN");
        assert!(zone.reverse.is_empty());
    }

    #[test]
    fn addresses_come_in_changing_order() {
        let zone = zone(&[web()]);
        let first = || match zone.answer(&LowerName::new(&Name::from_ascii("web.").expect("a name")), RecordType::A) {
            Some(Answer::Found { records, .. }) => records[0].data.to_string(),
            other => panic!("{other:?}"),
        };
        let seen: std::collections::BTreeSet<_> = (0..100).map(|_| first()).collect();
        assert_eq!(seen.len(), 2, "a hundred answers began alike: {seen:?}");
    }
}
