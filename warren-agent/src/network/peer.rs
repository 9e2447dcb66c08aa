//! Another node, as the overlay reaches it.

use std::net::IpAddr;

use ipnet::IpNet;

/// Another node, as the overlay needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    /// Where it is reached outside the overlay.
    pub(super) address: IpAddr,
    /// Its containers' addresses.
    pub(super) subnets: Vec<IpNet>,
    /// Of WireGuard, if that is how it is reached.
    pub(super) public_key: Option<String>,
}

impl Peer {
    /// What tells it from others.
    pub(super) fn end(&self) -> (IpAddr, Option<String>) {
        (self.address, self.public_key.clone())
    }
}
