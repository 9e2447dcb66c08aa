//! Keeping the node's network as it should be, whoever else changes it.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use rtnetlink::packet_route::address::AddressScope;
use tokio::{sync::Notify, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;
use warren_proto::v1;

use super::{
    Error, Network, Options, RESOLVER, Reach,
    attach::{container_mac, link_name},
    conntrack, drift, host,
    listeners::Listeners,
    netlink,
    overlay::{Overlay, Vxlan, Way},
    overlay_mtu,
    peer::Peer,
    pool::Pool,
    ruleset::{self, Closed},
    tables::{Place, Tables},
    wireguard::WireGuard,
};

/// Changes of the tables that come within this time are one change of the rules.
const QUIET: Duration = Duration::from_millis(50);
/// Between looks whether all is as it was made, without the kernel's saying that something has changed.
const REPAIR: Duration = Duration::from_secs(5);
/// The least time between looks, however much changes.
const SETTLE: Duration = Duration::from_secs(1);
/// Before trying again what could not be done.
const RETRY: Duration = Duration::from_secs(2);

/// What was made, to be compared with what is there.
#[derive(Debug, Default)]
struct Made {
    /// The place that the node was prepared for.
    place: Option<Place>,
    /// The rules as they were rendered, and as the kernel shows them.
    rules: Option<(String, String)>,
    listeners: Listeners,
    flows: Option<conntrack::Expected>,
    /// Whether it was said that the kernel's flows cannot be looked at.
    flows_unknown: bool,
}

/// What tells that the kernel's rules are those that an agent loaded.
fn digest(rules: &str, shown: &str) -> String {
    use sha2::{Digest as _, Sha256};

    let hash = Sha256::new().chain_update(rules).chain_update([0]).chain_update(shown).finalize();
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Network {
    /// Keeps rules, addresses, routes and the copy on disk as the tables say, whoever else changes them, until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut tables = self.0.tables.subscribe();
        let drifted = Arc::new(Notify::new());
        tokio::spawn(drift::watch(Arc::clone(&drifted), shutdown.clone()));
        let mut made = Made::default();
        let mut stored = None;
        let mut storing: Option<JoinHandle<()>> = None;
        // Whether the kernel is looked at, or only the tables have changed.
        let mut look = true;
        loop {
            let current = tables.borrow_and_update().clone();
            let mut pause = REPAIR;
            if let Some(place) = current.place.clone() {
                let problems = self.reconcile(&mut made, &place, &current, look).await;
                let problem = problems.first().map(ToString::to_string);
                if let Some(problem) = &problem {
                    tracing::warn!(problem, others = problems.len() - 1, "network reconcile failed; retrying");
                    pause = RETRY;
                }
                self.changing().problem = problem;
                // A disk that hangs holds up nothing else. One copy after the other: the last is the one that stays.
                if stored.as_ref() != Some(&current) && storing.as_ref().is_none_or(JoinHandle::is_finished) {
                    let (path, kept) = (self.0.options.data_dir.join("tables.json"), current.clone());
                    storing = Some(tokio::task::spawn_blocking(move || kept.store(&path)));
                    stored = Some(current.clone());
                }
                if stored.as_ref() != Some(&current) {
                    pause = pause.min(SETTLE);
                }
            }
            let woken = async {
                let (began, mut noticed) = (Instant::now(), false);
                let mut until = began + pause;
                loop {
                    tokio::select! {
                        _ = tables.changed() => {
                            tokio::time::sleep(QUIET).await;
                            return noticed;
                        }
                        () = drifted.notified(), if !noticed => {
                            noticed = true;
                            until = until.min(began + SETTLE);
                        }
                        () = tokio::time::sleep_until(until) => return true,
                    }
                }
            };
            match shutdown.run_until_cancelled(woken).await {
                Some(is_due) => look = is_due,
                None => return,
            }
        }
    }

    /// Makes everything as it should be. What fails keeps nothing else from being made.
    async fn reconcile(&self, made: &mut Made, place: &Place, tables: &Tables, look: bool) -> Vec<Error> {
        let mut problems = Vec::new();
        if look && made.place.as_ref() == Some(place) && !self.has_overlay().await {
            tracing::warn!("the link to other nodes is gone: it is made anew");
            made.place = None;
        }
        if made.place.as_ref() == Some(place) {
            if look {
                problems.extend(self.repair(place).await.err());
            }
        } else {
            match self.prepare_node(place).await {
                Ok(()) => made.place = Some(place.clone()),
                Err(error) => problems.push(error),
            }
        }
        problems.extend(self.set_peers(place, tables, look).await.err());
        match self.set_rules(made, place, tables, look).await {
            // Only now: what comes from a link to loopback addresses, the rules drop.
            Ok(()) => problems.extend(self.lead_loopback().err()),
            Err(error) => problems.push(error),
        }
        if problems.is_empty() {
            self.forget_stale_flows(made, place, tables).await;
        }
        problems
    }

    /// Whether the link to other nodes is there, where there was one.
    async fn has_overlay(&self) -> bool {
        let link = self.changing().overlay.as_ref().map(|overlay| (overlay.link().to_owned(), overlay.index()));
        match link {
            // Who cannot say does not make it anew.
            Some((name, index)) => self.0.netlink.index(&name).await.map_or(true, |found| found == Some(index)),
            None => true,
        }
    }

    /// What the node needs once: forwarding, its own addresses, the overlay's link.
    async fn prepare_node(&self, place: &Place) -> Result<(), Error> {
        let netlink = &self.0.netlink;
        let own = self.changing().pool.as_ref().map(Pool::node).unwrap_or_default();
        let loopback = self.set_own_addresses(place, &own).await?;
        // Those of an earlier place may be another node's by now.
        let kept: Vec<IpAddr> = own.iter().copied().chain([RESOLVER.into()]).collect();
        netlink.keep_addresses(loopback, &kept).await?;
        let mtu = overlay_mtu(netlink, self.0.address, self.0.options.overlay).await?;
        let overlay = match (self.0.address, &self.0.key) {
            (Some(_), Some(key)) => {
                Some(Way::WireGuard(WireGuard::create(netlink, &place.node_id, key, mtu, own).await?))
            }
            (Some(address), None) => {
                // Of an agent that was told otherwise.
                WireGuard::remove(netlink, &place.node_id).await?;
                Some(Way::Vxlan(Vxlan::create(netlink, address, mtu, own).await?))
            }
            (None, _) => None,
        };
        let mut changing = self.changing();
        (changing.mtu, changing.overlay) = (mtu, overlay.map(Overlay::new));
        Ok(())
    }

    /// Forwarding, and the node's own addresses with what leads to them. Returns the loopback link.
    async fn set_own_addresses(&self, place: &Place, own: &[IpAddr]) -> Result<u32, Error> {
        let netlink = &self.0.netlink;
        host::forward(self.0.v6)?;
        let loopback = netlink.set_up("lo").await?;
        // Only this machine may use it: of link scope, it is never a source of what leaves.
        netlink.add_address(loopback, RESOLVER.into(), AddressScope::Link).await?;
        for address in own {
            netlink.add_address(loopback, *address, AddressScope::Universe).await?;
        }
        // The rules lead virtual addresses elsewhere; for the node's own packets to get as far as the rules, there must be a
        // way.
        for network in ruleset::services(place) {
            let source = own.iter().copied().find(|own| own.is_ipv4() == network.addr().is_ipv4());
            netlink.add_route(*network, loopback, None, source).await?;
        }
        Ok(loopback)
    }

    /// Compares what the node needs with what is there, and makes what is missing.
    async fn repair(&self, place: &Place) -> Result<(), Error> {
        let netlink = &self.0.netlink;
        let (own, owners) = {
            let changing = self.changing();
            let connected = changing.owners.iter().filter(|(container, _)| changing.connected.contains(*container));
            let connected: Vec<_> = connected.map(|(id, addresses)| (id.clone(), addresses.clone())).collect();
            (changing.pool.as_ref().map(Pool::node).unwrap_or_default(), connected)
        };
        let (addresses, routes) = (netlink.addresses().await?, netlink.routes().await?);
        let links: HashMap<String, u32> =
            netlink.links().await?.into_iter().map(|(index, name, _)| (name, index)).collect();
        let loopback = links.get("lo").copied().unwrap_or_default();
        let has_addresses = own.iter().chain([&RESOLVER.into()]).all(|address| addresses.contains(address));
        let has_routes = ruleset::services(place).all(|network| routes.contains(&(*network, loopback)));
        if !has_addresses || !has_routes {
            self.drifted("the node's own addresses or routes");
        }
        if !has_addresses || !has_routes || !host::forwards(self.0.v6) {
            self.set_own_addresses(place, &own).await?;
        }
        for (container, addresses) in &owners {
            let Some(link) = links.get(&link_name(container)) else {
                // Of a container with a network of its own; others have none.
                if !addresses.is_empty() && host::exists(&self.namespace(container)) && self.is_connected(container) {
                    self.drifted(&format!("the link of container {container}"));
                    self.wire(container, &self.namespace(container), addresses).await?;
                }
                continue;
            };
            for address in addresses {
                let way = IpNet::new_assert(*address, netlink::full_prefix(*address));
                if !routes.contains(&(way, *link)) && self.is_connected(container) {
                    self.drifted(&format!("the way to {address}"));
                    netlink.set_up(&link_name(container)).await?;
                    netlink.add_neighbour(*link, *address, container_mac(addresses)).await?;
                    netlink.add_route(way, *link, None, None).await?;
                }
            }
        }
        let overlay =
            self.changing().overlay.as_ref().map(|overlay| (overlay.link().to_owned(), overlay.has_routes(&routes)));
        if let Some((name, has_routes)) = overlay {
            let is_up = netlink.link(&name).await?.is_some_and(|link| link.is_up);
            if !is_up || !has_routes {
                self.drifted("the way to other nodes");
                netlink.set_up(&name).await?;
                if let Some(overlay) = &mut self.changing().overlay {
                    overlay.forget();
                }
            }
        }
        Ok(())
    }

    fn is_connected(&self, container: &str) -> bool {
        self.changing().connected.contains(container)
    }

    /// Something that was made is not there any more.
    fn drifted(&self, what: &str) {
        tracing::warn!(what, "network state was changed by another program; restoring");
        self.changing().problem = Some(format!("another program changed {what}"));
    }

    async fn set_peers(&self, place: &Place, tables: &Tables, look: bool) -> Result<(), Error> {
        let Some(mut overlay) = self.changing().overlay.take() else { return Ok(()) };
        let others = tables.nodes.values().filter(|node| node.id != place.node_id);
        // Others do it the other way: to send them what is to be encrypted as it is would be worse than nothing.
        let others = others.filter(|node| node.wireguard_public_key.is_empty() == self.0.key.is_none());
        // A machine that was installed anew may be there twice: what leads to its address leads to both.
        let mut peers = BTreeMap::<_, Peer>::new();
        for found in others.filter_map(peer).filter(|peer| Some(peer.address) != self.0.address) {
            let peer = peers.entry(found.end()).or_insert(Peer { subnets: Vec::new(), ..found });
            peer.subnets.extend(found.subnets);
        }
        let peers: Vec<_> = peers.into_values().collect();
        let mut outcome = overlay.set_peers(&self.0.netlink, &peers).await;
        // An agent that has just started knows of no others; before the managers say who is there, nobody is a stranger.
        if look && outcome.is_ok() && !tables.nodes.is_empty() {
            outcome = match self.0.netlink.routes().await {
                Ok(routes) => overlay.remove_others(&self.0.netlink, &routes).await,
                Err(error) => Err(error),
            };
        }
        self.changing().overlay = Some(overlay);
        outcome
    }

    /// What containers may not connect to.
    fn closed(&self, tables: &Tables) -> Closed {
        let Options { reach, metrics_port, managers_metrics_port, .. } = &self.0.options;
        let mut closed = Closed::default();
        let own = host::addresses();
        let managers = tables.managers.iter();
        if !reach.contains(&Reach::Managers) {
            closed.elsewhere.extend(managers.clone());
            closed.here.extend(managers.clone().filter(|at| own.contains(&at.ip())).map(SocketAddr::port));
        }
        if !reach.contains(&Reach::Metrics) {
            let nodes = tables.nodes.values().filter_map(|node| node.address.parse::<IpAddr>().ok());
            let agents = nodes.map(|node| SocketAddr::new(node, *metrics_port));
            closed.elsewhere.extend(managers.map(|at| SocketAddr::new(at.ip(), *managers_metrics_port)).chain(agents));
            closed.here.extend([*managers_metrics_port, *metrics_port]);
        }
        closed
    }

    /// Loads the rules, unless the kernel has just these.
    async fn set_rules(&self, made: &mut Made, place: &Place, tables: &Tables, look: bool) -> Result<(), Error> {
        let own = self.changing().pool.as_ref().map(Pool::node).unwrap_or_default();
        let link = self.changing().overlay.as_ref().map(|overlay| overlay.link().to_owned());
        let listeners = Listeners::here();
        let settled = listeners.settled(&made.listeners);
        if look {
            made.listeners = listeners;
            self.changing().listeners = settled.clone();
        }
        let closed = self.closed(tables);
        let (rules, conflicts) = ruleset::render(place, &own, tables, link.as_deref(), &settled, &closed);
        let conflicts: Vec<_> = conflicts.iter().map(ToString::to_string).collect();
        if conflicts != self.changing().conflicts {
            for conflict in &conflicts {
                tracing::warn!(conflict, "a port is not published");
            }
            self.changing().conflicts = conflicts;
        }
        let is_same = made.rules.as_ref().is_none_or(|(known, _)| *known == rules);
        if is_same && !look {
            return Ok(());
        }
        // What is loaded in any case need not be compared.
        let listed = if is_same { host::list_rules().await? } else { None };
        if made.rules.as_ref().is_some_and(|(known, shown)| *known == rules && listed.as_ref() == Some(shown)) {
            return Ok(());
        }
        let kept = self.0.options.data_dir.join("rules");
        if made.rules.is_none()
            && let Some(shown) = &listed
            && fs::read_to_string(&kept).is_ok_and(|known| known == digest(&rules, shown))
        {
            // An earlier agent loaded them, and nobody has touched them.
            made.rules = Some((rules, shown.clone()));
            return Ok(());
        }
        if let Some((known, _)) = &made.rules
            && *known == rules
        {
            self.drifted("the packet rules");
        }
        host::load_rules(&rules).await?;
        let shown = host::list_rules().await?.unwrap_or_default();
        if let Err(error) = fs::write(&kept, digest(&rules, &shown)) {
            tracing::debug!(%error, "could not note which rules are loaded");
        }
        made.rules = Some((rules, shown));
        Ok(())
    }

    /// Lets published ports on 127.0.0.1 lead to containers, here and on other nodes.
    fn lead_loopback(&self) -> Result<(), Error> {
        let (overlay, containers) = {
            let changing = self.changing();
            let overlay = changing.overlay.as_ref().map(|overlay| overlay.link().to_owned());
            (overlay, changing.owners.keys().map(|container| link_name(container)).collect::<Vec<_>>())
        };
        for link in overlay.into_iter().chain(containers) {
            host::lead_loopback_to(&link)?;
        }
        Ok(())
    }

    /// UDP senders that never pause are led to what is there now.
    async fn forget_stale_flows(&self, made: &mut Made, place: &Place, tables: &Tables) {
        let expected = conntrack::Expected::new(place, tables);
        if made.flows.as_ref() == Some(&expected) {
            return;
        }
        let Ok(own) = self.0.netlink.addresses().await else { return };
        let wanted = expected.clone();
        let forgotten = tokio::task::spawn_blocking(move || conntrack::forget_stale(&wanted, &own)).await;
        match forgotten.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())) {
            Ok(flows) => {
                if flows > 0 {
                    tracing::debug!(flows, "UDP flows that led nowhere are led anew");
                }
                made.flows_unknown = false;
            }
            Err(error) if !made.flows_unknown => {
                tracing::warn!(
                    %error,
                    "UDP senders that never pause may keep sending to containers that have ended; \
                     is the kernel's module nf_conntrack_netlink there?"
                );
                made.flows_unknown = true;
            }
            Err(_) => {}
        }
        made.flows = Some(expected);
    }
}

fn peer(node: &v1::NodeEntry) -> Option<Peer> {
    let subnets = node.subnets.iter().filter_map(|subnet| subnet.parse().ok()).collect();
    let public_key = Some(node.wireguard_public_key.clone()).filter(|key| !key.is_empty());
    Some(Peer { address: node.address.parse().ok()?, subnets, public_key })
}
