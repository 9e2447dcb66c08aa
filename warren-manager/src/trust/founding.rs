//! What a cluster is founded with.

use std::time::Duration;

use ipnet::Ipv4Net;

use crate::state::{ClusterNetwork, InvalidNetwork, SealedAuthority, TokenRole};

/// How long certificates are valid.
pub(crate) const CERTIFICATE_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);

/// How long a join token is valid unless somebody says otherwise.
pub(crate) const TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// A cluster that begins.
#[derive(Clone, Debug, Default)]
pub struct Founding {
    /// Its id; random unless given.
    pub cluster_id: Option<String>,
    /// Its networks; later they stay.
    pub networks: Networks,
    /// What signs its members' certificates.
    pub authority: Option<SealedAuthority>,
    /// The hashes of the secrets of its first join tokens, and what they are for.
    pub tokens: Vec<(String, TokenRole)>,
    /// The founding manager's machine.
    pub hostname: String,
}

/// Networks that a cluster is founded with; one that is not given is the usual one.
#[derive(Clone, Copy, Debug, Default)]
pub struct Networks {
    /// Containers' addresses.
    pub containers: Option<Ipv4Net>,
    /// Services' virtual addresses.
    pub services: Option<Ipv4Net>,
    /// Without IPv6.
    pub no_v6: bool,
}

impl Networks {
    pub(crate) fn complete(self, usual: ClusterNetwork) -> Result<ClusterNetwork, InvalidNetwork> {
        let network = ClusterNetwork {
            containers: self.containers.unwrap_or(usual.containers),
            services: self.services.unwrap_or(usual.services),
            v6: usual.v6.filter(|_| !self.no_v6),
        };
        network.check().map(|()| network)
    }
}
