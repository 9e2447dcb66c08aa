//! Warren's wire contract: the gRPC package `warren.v1`, its messages with their canonical JSON form, its clients and
//! servers. The `.proto` files beside this crate are the documentation of each.

/// The only version of the contract so far.
pub mod v1 {
    #![expect(missing_docs, reason = "generated; the .proto files hold the documentation")]

    tonic::include_proto!("warren.v1");
    include!(concat!(env!("OUT_DIR"), "/warren.v1.serde.rs"));
}

/// What gRPC reflection serves.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("descriptors");

/// A method of the API.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    /// The path of its requests, like `/warren.v1.Nodes/ListNodes`.
    pub path: &'static str,
    /// Who may call it.
    pub access: v1::Access,
    /// Whether every manager answers it itself.
    pub local: bool,
}

impl Method {
    /// All of them, in the order of their paths.
    pub const ALL: &'static [Self] = &include!(concat!(env!("OUT_DIR"), "/methods.rs"));

    /// The one whose requests have this path.
    #[must_use]
    pub fn of(path: &str) -> Option<&'static Self> {
        Self::ALL.binary_search_by_key(&path, |method| method.path).ok().map(|index| &Self::ALL[index])
    }
}

impl v1::Endpoint {
    /// One of its service's ports as it is at this endpoint, which may have been made before the service was changed: the one that is published
    /// alike or, where that is not published, has the same name. `None` where it has no such port.
    #[must_use]
    pub fn port<'a>(&'a self, of_service: &'a v1::Port) -> Option<&'a v1::Port> {
        let Some(own) = &self.own_ports else { return Some(of_service) };
        let is_alike = |own: &&v1::Port| {
            let same = match of_service.host_port {
                0 => own.name == of_service.name,
                published => own.host_port == published,
            };
            same && (own.protocol() == v1::Protocol::Udp) == (of_service.protocol() == v1::Protocol::Udp)
        };
        own.ports.iter().find(is_alike)
    }
}
