//! Containers' network: an address for each, the way to it from everywhere in the cluster, and names for services.
//!
//! A container has a network namespace of its own with one interface and a /32 (and a /128) on it. Everything it sends goes
//! to the node by a permanent neighbour entry; the node has a route to it. There is no bridge, no ARP and no state but the
//! kernel's: what the manager says of services and nodes becomes one nftables table and the overlay's routes, and either is
//! made anew from that at any time. Nothing here decides where a container runs.

mod attach;
mod conntrack;
mod drift;
mod files;
mod host;
mod listeners;
mod namespace;
mod netlink;
mod overlay;
mod peer;
mod pool;
mod reconcile;
mod ruleset;
mod tables;
pub(crate) mod wireguard;

pub use attach::Attachment;
pub(crate) use namespace::tcp_socket;
pub(crate) use tables::Leaving;
pub use tables::{Parts, Place, Tables};

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use defguard_wireguard_rs::key::Key;
use tokio::sync::watch;
use warren_proto::v1;

pub(crate) use files::{Files, Mounted};
use listeners::Listeners;
use netlink::Netlink;
use overlay::{Overlay, VXLAN_OVERHEAD};
use pool::Pool;

/// Where every node's resolver answers, and containers' way out: the same on all nodes, so that every container's
/// configuration is the same.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// What the names of containers' links on the node begin with.
const CONTAINER_LINKS: &str = "wrn";
/// What a wire carries that does not say otherwise.
const DEFAULT_MTU: u32 = 1500;
/// IPv6 needs links that carry this much (RFC 8200, 5).
const MIN_MTU_V6: u32 = 1280;

/// Why containers cannot be connected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused.
    #[error("{action}: {source}")]
    Netlink {
        /// What was tried.
        action: &'static str,
        /// Its answer.
        source: Box<rtnetlink::Error>,
    },
    /// A link that should be there is not.
    #[error("there is no link {0}")]
    NoLink(String),
    /// A file or a process.
    #[error("{action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The program that loads rules is not installed.
    #[error("the program nft is missing: install the package nftables")]
    NoNft,
    /// Rules that the kernel does not take.
    #[error("the packet rules are refused: {0}")]
    Rules(String),
    /// No manager has said yet which addresses are this node's.
    #[error("this node has no subnet yet")]
    NoSubnet,
    /// As many containers as there are addresses.
    #[error("this node has no container address left")]
    Exhausted,
    /// The encrypted overlay.
    #[error("WireGuard: {0}")]
    WireGuard(String),
}

/// How a node's containers are connected.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where namespaces are kept; gone with a restart of the machine, like them.
    pub run_dir: PathBuf,
    /// Where the tables and containers' own files are kept.
    pub data_dir: PathBuf,
    /// Where other nodes reach this one; `None` is found out.
    pub address: Option<IpAddr>,
    /// How packets travel to other nodes' containers.
    pub overlay: OverlayKind,
    /// The domain of services' names.
    pub domain: String,
    /// What of the cluster's own containers may connect to.
    pub reach: Vec<Reach>,
    /// The port of the agents' metrics.
    pub metrics_port: u16,
    /// The port of managers' metrics.
    pub managers_metrics_port: u16,
}

/// What of the cluster's own containers may connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Reach {
    /// The managers' API.
    Managers,
    /// The metrics of managers and agents.
    Metrics,
    /// Neither.
    Nothing,
}

/// How packets travel between nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OverlayKind {
    /// VXLAN, unencrypted.
    #[default]
    Vxlan,
    /// WireGuard, encrypted; in userspace if the kernel does not support it.
    Wireguard,
}

impl OverlayKind {
    fn overhead(self) -> u32 {
        match self {
            Self::Vxlan => VXLAN_OVERHEAD,
            Self::Wireguard => wireguard::OVERHEAD,
        }
    }
}

#[derive(Debug, Default)]
struct Changing {
    pool: Option<Pool>,
    /// Addresses of containers that are there, whichever subnet they are of.
    owners: HashMap<String, Vec<IpAddr>>,
    /// Those whose links and routes are all made.
    connected: BTreeSet<String>,
    overlay: Option<Overlay>,
    mtu: u32,
    /// What is wrong with it as a whole.
    problem: Option<String>,
    /// What cannot be published, and why.
    conflicts: Vec<String>,
    /// What processes of the node listen on.
    listeners: Listeners,
}

#[derive(Debug)]
struct Inner {
    options: Options,
    netlink: Netlink,
    /// Where other nodes reach this one, if they do.
    address: Option<IpAddr>,
    /// Of WireGuard, where it is used.
    key: Option<Key>,
    /// Whether containers have IPv6 here.
    v6: bool,
    changing: Mutex<Changing>,
    tables: watch::Sender<Tables>,
    files: Files,
}

/// A node's network. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Network(Arc<Inner>);

impl Network {
    /// Begins with what was known before; `kept` are the addresses of containers that are there already. What is left of
    /// others is removed.
    ///
    /// # Errors
    ///
    /// When the kernel's network cannot be talked to at all.
    pub async fn start(options: Options, kept: &HashMap<String, Vec<IpAddr>>) -> Result<Self, Error> {
        let io = |action: String| move |source| Error::Io { action, source };
        for directory in [&options.run_dir, &options.data_dir] {
            let action = format!("making {}", directory.display());
            fs::create_dir_all(directory).map_err(io(action))?;
        }
        let address = options.address.or_else(warren_pki::own_address);
        let key = match options.overlay {
            OverlayKind::Vxlan => None,
            OverlayKind::Wireguard => {
                Some(wireguard::key(&options.data_dir).map_err(io("reading WireGuard's key".to_owned()))?)
            }
        };
        let mut tables = Tables::load(&options.data_dir.join("tables.json"));
        let netlink = Netlink::here()?;
        let mtu = overlay_mtu(&netlink, address, options.overlay).await?;
        let v6 = host::has_ipv6() && mtu >= MIN_MTU_V6;
        if !v6 {
            let why = if host::has_ipv6() { "its network carries packets too small for it" } else { "it is off" };
            tracing::info!(why, mtu, "no IPv6 on this node: containers have IPv4 alone");
            tables.without_ipv6();
        }
        let place = tables.place.clone();
        let network = Self(Arc::new(Inner {
            netlink,
            v6,
            address,
            key,
            changing: Mutex::default(),
            tables: watch::channel(tables).0,
            files: Files::new(options.data_dir.join("files"), &options.domain),
            options,
        }));
        network.remove_others(kept).await?;
        network.changing().owners.clone_from(kept);
        network.changing().connected.extend(kept.keys().cloned());
        if let Some(place) = place {
            network.set_pool(&place);
        }
        network.changing().problem = Some("this node has no place in the cluster's network yet".to_owned());
        Ok(network)
    }

    fn changing(&self) -> MutexGuard<'_, Changing> {
        // Every change is one assignment: a panic leaves it whole.
        self.0.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where other nodes reach this one, if they do.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        self.0.address
    }

    /// What other nodes encrypt with, if they are to.
    #[must_use]
    pub fn public_key(&self) -> Option<String> {
        self.0.key.as_ref().map(|key| key.public_key().to_string())
    }

    /// Follows the tables of services and nodes.
    #[must_use]
    pub fn tables(&self) -> watch::Receiver<Tables> {
        self.0.tables.subscribe()
    }

    /// Containers' own configuration files.
    pub(crate) fn files(&self) -> &Files {
        &self.0.files
    }

    /// Whether the rules are loaded, which guard the node's loopback.
    fn has_rules(&self) -> bool {
        self.changing().problem.is_none()
    }

    /// Nothing wrong with the node's rules and routes, or what is.
    ///
    /// # Errors
    ///
    /// What keeps services from being reached.
    pub fn check(&self) -> Result<(), String> {
        self.changing().problem.clone().map_or(Ok(()), Err)
    }

    /// What cannot be published on this node.
    ///
    /// # Errors
    ///
    /// The ports, each with its owner.
    pub fn check_ports(&self) -> Result<(), String> {
        let conflicts = self.changing().conflicts.join("; ");
        if conflicts.is_empty() { Ok(()) } else { Err(conflicts) }
    }

    /// The ports that processes of the node listen on, as the manager is told.
    #[must_use]
    pub(crate) fn listeners(&self) -> Vec<v1::NodeListener> {
        self.changing().listeners.to_proto()
    }

    fn set_pool(&self, place: &Place) {
        let mut changing = self.changing();
        let mut pool = Pool::new(&place.subnets);
        for (container, addresses) in &changing.owners {
            if let Some(pool) = &mut pool {
                pool.keep(container, addresses);
            }
        }
        changing.pool = pool;
    }

    /// Takes note of the node's place in the cluster, as a manager gave it. Containers of an earlier place keep theirs.
    pub fn set_place(&self, mut place: Place) {
        if !self.0.v6 {
            place.without_ipv6();
        }
        let known = self.0.tables.borrow().place.clone();
        if known.as_ref() != Some(&place) {
            if known.as_ref().is_none_or(|known| known.subnets != place.subnets) {
                self.set_pool(&place);
            }
            self.0.tables.send_modify(|tables| tables.place = Some(place));
        }
    }

    /// Takes note of where managers are.
    pub(crate) async fn set_managers(&self, managers: &[v1::Manager]) {
        let mut addresses = BTreeSet::new();
        for manager in managers.iter().map(|manager| &manager.address) {
            match tokio::net::lookup_host(manager).await {
                Ok(found) => addresses.extend(found.map(|at| SocketAddr::new(at.ip().to_canonical(), at.port()))),
                Err(error) => tracing::debug!(manager, %error, "where a manager is cannot be found out"),
            }
        }
        self.0.tables.send_if_modified(|tables| {
            let is_news = !addresses.is_empty() && tables.managers != addresses;
            if is_news {
                tables.managers = addresses;
            }
            is_news
        });
    }

    /// Takes note of what a manager says of services and nodes.
    pub fn update(&self, update: v1::NetworkUpdate) {
        self.0.tables.send_if_modified(|tables| {
            let before = tables.clone();
            tables.apply(update);
            if !self.0.v6 {
                tables.without_ipv6();
            }
            *tables != before
        });
    }
}

/// What a packet between containers of different nodes may have, in bytes.
async fn overlay_mtu(netlink: &Netlink, address: Option<IpAddr>, overlay: OverlayKind) -> Result<u32, Error> {
    let Some(address) = address else { return Ok(DEFAULT_MTU - overlay.overhead()) };
    let link = netlink.link_with(address).await?;
    let links = netlink.links().await?;
    let mtu = links.iter().find(|(index, ..)| Some(*index) == link).map(|(_, _, mtu)| *mtu);
    Ok(mtu.unwrap_or(DEFAULT_MTU).min(u32::from(u16::MAX)).saturating_sub(overlay.overhead()))
}
