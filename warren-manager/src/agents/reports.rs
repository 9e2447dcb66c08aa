//! Status reports, put together so that many containers' news is one log entry.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use ipnet::IpNet;
use tokio::sync::Notify;
use warren_proto::v1;

use crate::{
    agents::pace::{Pace, Paces},
    ids::{ContainerId, NodeId},
    messages::convert,
    state::{Change, Container, State, Status},
    store::Store,
};

/// News waits this long for more of it; while it is written, more comes together by itself.
const QUIET: Duration = Duration::from_millis(1);
/// Before trying again what consensus would not take.
const RETRY: Duration = Duration::from_millis(500);

/// How often a container's status may be another while its state is the same: a health check that is well and ill by turns, or an agent that
/// means harm. A state follows another only so often anyway.
const WORDS: Pace = Pace { burst: 20, pause: Duration::from_secs(1) };
/// What came too often is looked at again after this time.
const LATER: Duration = Duration::from_millis(200);

/// By who reports, and of which container: nobody's report takes the place of another's.
type Pending = HashMap<(NodeId, ContainerId), Status>;

/// Collects reports, the latest of each container, and writes them.
#[derive(Clone, Debug)]
pub(super) struct Reports {
    pending: Arc<Mutex<Pending>>,
    news: Arc<Notify>,
    store: Store,
}

impl Reports {
    /// Begins to write what is added; ends when the last clone is gone.
    pub(super) fn start(store: Store) -> Self {
        let reports = Self { pending: Arc::default(), news: Arc::default(), store: store.clone() };
        let (pending, news) = (Arc::downgrade(&reports.pending), Arc::clone(&reports.news));
        let paces = Paces::new(WORDS);
        tokio::spawn(async move {
            let mut some_later = false;
            loop {
                tokio::select! {
                    () = news.notified() => tokio::time::sleep(QUIET).await,
                    () = tokio::time::sleep(LATER), if some_later => {}
                }
                let Some(pending) = pending.upgrade() else { return };
                let mut taken = std::mem::take(&mut *pending.lock().unwrap_or_else(PoisonError::into_inner));
                let later = too_often(&store.view(), &mut taken, &paces);
                some_later = !later.is_empty();
                put_back(&pending, later);
                if taken.is_empty() || !store.raft().status().is_leader {
                    // The agent reports anew to whoever leads.
                    continue;
                }
                if let Err(error) = store.transact_each(changes(&store, &taken)).await {
                    tracing::warn!(%error, "agents' reports could not be written; trying again");
                    tokio::time::sleep(RETRY).await;
                    put_back(&pending, taken);
                    news.notify_one();
                }
            }
        });
        reports
    }

    /// Takes a node's report; `clock_shift` makes its times the leader's, in milliseconds.
    ///
    /// # Errors
    ///
    /// What of it cannot be, and is left out.
    pub(super) fn add(&self, node: &NodeId, report: v1::StatusReport, clock_shift: i64) -> Result<(), String> {
        let state = self.store.view();
        let mut refused = Ok(());
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        for reported in report.statuses {
            let id = ContainerId::from(reported.container_id);
            // It may be gone.
            let Some(container) = state.container(&id) else { continue };
            if container.node.as_ref() != Some(node) {
                refused = refused.and(Err(format!(
                    "a container of service {} is not on this node: what it says of it is not believed",
                    container.service_name
                )));
                continue;
            }
            let Some(mut status) = reported.status.and_then(convert::observed_status) else { continue };
            status.changed_at = status.changed_at.shifted(clock_shift);
            status.started_at = status.started_at.map(|at| at.shifted(clock_shift));
            status.finished_at = status.finished_at.map(|at| at.shifted(clock_shift));
            refused = refused.and(keep_own_addresses(&state, container, &mut status.addresses));
            pending.insert((node.clone(), id), status);
        }
        self.news.notify_one();
        refused
    }
}

/// Leaves a container those addresses that are its node's to give, one of each family: everybody is led to them.
fn keep_own_addresses(state: &State, container: &Container, addresses: &mut Vec<IpAddr>) -> Result<(), String> {
    let node = container.node.as_ref().and_then(|node| state.node(node));
    let subnets = node.map(|node| state.subnets_of(node)).unwrap_or_default();
    let has_own = matches!(container.revision.spec.network(), v1::NetworkMode::Cluster | v1::NetworkMode::Unspecified);
    let (mut families, mut refused) = (Vec::new(), None);
    addresses.retain(|address| {
        let is_containers = subnets.iter().any(|subnet| is_containers(*subnet, *address));
        let own = has_own && is_containers && !families.contains(&address.is_ipv4());
        if own {
            families.push(address.is_ipv4());
        } else {
            refused = Some(*address);
        }
        own
    });
    match refused {
        None => Ok(()),
        Some(address) => {
            let service = &container.service_name;
            Err(format!("{address} of a container of service {service} is not an address of this node's containers"))
        }
    }
}

/// Whether an address is a container's in a node's subnet: not the subnet's, the node's own or the broadcast address.
fn is_containers(subnet: IpNet, address: IpAddr) -> bool {
    let place = match (subnet, address) {
        (IpNet::V4(net), IpAddr::V4(v4)) if net.contains(&v4) => u128::from(u32::from(v4) - u32::from(net.network())),
        (IpNet::V6(net), IpAddr::V6(v6)) if net.contains(&v6) => u128::from(v6) - u128::from(net.network()),
        _ => return false,
    };
    (2..255).contains(&place)
}

/// Takes those out that have to wait: others of the same container, in the same state, came just before.
fn too_often(state: &State, taken: &mut Pending, paces: &Paces<ContainerId>) -> Pending {
    let has_to_wait = |(_, id): &(NodeId, ContainerId), status: &mut Status| {
        let known = state.container(id).map(|container| &container.status);
        known.is_some_and(|known| known.state == status.state && *known != *status && !paces.allows(id))
    };
    taken.extract_if(has_to_wait).collect()
}

/// What is not written yet waits with what has come since, which is newer.
fn put_back(pending: &Mutex<Pending>, taken: Pending) {
    let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
    for (whose, status) in taken {
        pending.entry(whose).or_insert(status);
    }
}

/// What of the reports is news: repeating the known costs no log entry.
fn changes(store: &Store, pending: &Pending) -> Vec<Change> {
    let state = store.view();
    let is_news = |node: &NodeId, id: &ContainerId, status: &Status| {
        state.container(id).is_some_and(|known| {
            known.node.as_ref() == Some(node) && known.status != *status && status.state >= known.status.state
        })
    };
    let news = pending.iter().filter(|((node, id), status)| is_news(node, id, status));
    news.map(|((node, id), status)| Change::Observe {
        id: id.clone(),
        node: node.clone(),
        status: Box::new(status.clone()),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::{apply, container, founded, node, put, service};

    fn state() -> State {
        let mut state = founded();
        apply(&mut state, [Change::PutNode(Box::new(node("n", 1000, 1000)))]);
        state
    }

    #[test]
    fn a_container_has_addresses_of_its_node_alone() {
        let state = state();
        let own = state.subnets_of(state.node(&NodeId::from("n")).expect("there"));
        let (v4, v6) = (own[0].network(), own[1].network());
        let at = |network: IpAddr, place: u128| match network {
            IpAddr::V4(v4) => IpAddr::from(std::net::Ipv4Addr::from(u32::from(v4) + place as u32)),
            IpAddr::V6(v6) => IpAddr::from(std::net::Ipv6Addr::from(u128::from(v6) + place)),
        };
        let mut container = container("c", &service("s", "web", 1), 1, 1);
        container.node = Some("n".into());
        let keep = |container: &Container, addresses: &[IpAddr]| {
            let mut addresses = addresses.to_vec();
            let said = keep_own_addresses(&state, container, &mut addresses);
            (addresses, said.is_ok())
        };
        let good = [at(v4, 2), at(v6, 2)];
        assert_eq!(keep(&container, &good), (good.to_vec(), true));
        let foreign =
            ["169.254.169.254", "127.0.0.1", "192.0.2.1", "::1"].map(|text| text.parse().expect("an address"));
        let foreign =
            foreign.into_iter().chain([at(v4, 0), at(v4, 1), at(v4, 255), at(v4, 258), at(v6, 1), at(v6, 1 << 64)]);
        for address in foreign {
            assert_eq!(keep(&container, &[address, good[1]]), (vec![good[1]], false), "{address}");
        }
        assert_eq!(keep(&container, &[good[0], at(v4, 3)]), (vec![good[0]], false), "one of a family");
        let revision = Arc::make_mut(&mut container.revision);
        Arc::make_mut(&mut revision.spec).set_network(v1::NetworkMode::Host);
        assert_eq!(keep(&container, &good), (Vec::new(), false), "it has its node's");
    }

    #[tokio::test(start_paused = true)]
    async fn what_changes_too_often_waits() {
        let mut state = state();
        let web = service("s", "web", 1);
        apply(&mut state, [put(web.clone())]);
        let mut running = container("c", &web, 1, 1);
        running.node = Some("n".into());
        running.status.state = crate::state::ContainerState::Running;
        apply(&mut state, [Change::CreateContainer(Box::new(running.clone()))]);
        let observed =
            Change::Observe { id: running.id.clone(), node: "n".into(), status: Box::new(running.status.clone()) };
        apply(&mut state, [observed]);
        assert_eq!(state.container(&running.id).expect("there").status, running.status);
        let paces = Paces::new(WORDS);
        let said = |message: &str| {
            let status = Status { message: message.to_owned(), ..running.status.clone() };
            Pending::from([((NodeId::from("n"), ContainerId::from("c")), status)])
        };
        let waits = |mut pending: Pending| !too_often(&state, &mut pending, &paces).is_empty() && pending.is_empty();
        for number in 0..WORDS.burst {
            assert!(!waits(said(&number.to_string())));
        }
        assert!(waits(said("once more")));
        let mut ended = said("it has ended");
        ended.values_mut().for_each(|status| status.state = crate::state::ContainerState::Failed);
        assert!(!waits(ended), "what it has become is said at once");
        tokio::time::advance(WORDS.pause).await;
        assert!(!waits(said("once more")));
    }
}
