//! Who is who in a cluster.
//!
//! A cluster is its own certificate authority. Whoever takes part has a certificate that says in which cluster, in which role
//! and under which id ([`Identity`]); its key never leaves the machine that made it, only a request to be signed does. A
//! newcomer proves itself with a [`Token`], which also tells it which authority to believe. Every connection is TLS 1.3, and
//! both sides are who they say ([`Dialer`], [`incoming()`]).

mod authority;
mod credentials;
mod dialer;
mod incoming;
mod renewal;
mod request;
mod tls;
mod token;

use std::{fmt, io, str::FromStr};

pub use authority::Authority;
pub use credentials::{Credentials, authorities_digest};
pub use dialer::{Dialer, check_address, own_address, reason};
pub use incoming::{Incoming, Peer, incoming};
pub use renewal::{Asked, keep_valid};
pub use request::Request;
pub use token::{Secret, Token};

/// Why somebody cannot be believed, or cannot be heard.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A certificate, key or request that is none.
    #[error("{what} cannot be used: {why}")]
    Unusable {
        /// What.
        what: &'static str,
        /// Why.
        why: String,
    },
    /// A join token that is none.
    #[error("the token cannot be used: {0}")]
    Token(&'static str),
    /// Files.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file that does not hold what it should.
    #[error("{path} is damaged: {why}")]
    Damaged {
        /// Which.
        path: String,
        /// How.
        why: String,
    },
    /// The machine has no randomness.
    #[error("there is no randomness to make a key of")]
    Random,
    /// An address that is none.
    #[error("{0:?} is no address of a manager: HOST:PORT")]
    Address(String),
}

impl Error {
    fn unusable(what: &'static str, why: impl ToString) -> Self {
        Self::Unusable { what, why: why.to_string() }
    }
}

/// What somebody is in a cluster, and so what they may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Takes part in consensus.
    Manager,
    /// Runs containers.
    Worker,
    /// An operator.
    Admin,
}

impl Role {
    /// As certificates and tables show it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Manager => "manager",
            Self::Worker => "worker",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let known = [Self::Manager, Self::Worker, Self::Admin].into_iter().find(|role| role.name() == name);
        known.ok_or_else(|| Error::unusable("the role", format!("{name:?} is not manager, worker or admin")))
    }
}

/// Who somebody is: the subject of a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The cluster's id; O.
    pub cluster: String,
    /// OU.
    pub role: Role,
    /// Unique in the cluster, and never another's; CN.
    pub id: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.role, self.id)
    }
}

#[cfg(test)]
mod tests;
