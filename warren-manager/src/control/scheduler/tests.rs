use std::collections::BTreeMap;

use proptest::prelude::*;
use warren_proto::v1;

use super::*;
use crate::{
    clock::Timestamp,
    state::{
        Change, ContainerState, Expected, Status,
        tests::{apply, container, founded, node, put, service},
    },
};

fn cluster(nodes: &[(&str, u64, u64)]) -> State {
    let mut state = founded();
    apply(&mut state, nodes.iter().map(|(id, cpu, memory)| Change::PutNode(Box::new(node(id, *cpu, *memory)))));
    state
}

fn add(state: &mut State, name: &str, count: u32, reservations: Amounts) {
    let mut service = service(name, name, count);
    service.spec.resources.reservations = reservations;
    let containers = (1..=count).map(|slot| container(&format!("{name}-{slot:03}"), &service, slot, 1));
    let containers: Vec<_> = containers.map(|c| Change::CreateContainer(Box::new(c))).collect();
    apply(state, [put(service)]);
    apply(state, containers);
}

fn ready(_: &NodeId) -> Health {
    Health::Ready
}

fn by_node(plan: &Plan) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for (_, node) in &plan.assignments {
        *counts.entry(node.as_str()).or_default() += 1;
    }
    counts
}

const NOTHING: Amounts = Amounts { cpu_millis: 0, memory_bytes: 0 };

#[test]
fn replicas_are_spread_over_the_nodes_in_one_round() {
    let mut state = cluster(&[("a", 1000, 1000), ("b", 1000, 1000), ("c", 1000, 1000)]);
    add(&mut state, "web", 7, NOTHING);
    let plan = plan(&state, ready);
    assert_eq!(by_node(&plan), BTreeMap::from([("a", 3), ("b", 2), ("c", 2)]));
}

#[test]
fn single_containers_of_many_services_do_not_pile_up() {
    let mut state = cluster(&[("a", 1000, 1000), ("b", 1000, 1000)]);
    for i in 0..6 {
        add(&mut state, &format!("s{i}"), 1, NOTHING);
    }
    assert_eq!(by_node(&plan(&state, ready)), BTreeMap::from([("a", 3), ("b", 3)]));
}

#[test]
fn the_less_loaded_node_is_preferred() {
    let mut state = cluster(&[("a", 1000, 1000), ("b", 4000, 4000)]);
    add(&mut state, "web", 1, Amounts { cpu_millis: 500, memory_bytes: 0 });
    apply(&mut state, [Change::Assign { id: "web-001".into(), node: "b".into(), at: Timestamp(1) }]);
    // b has more reserved, and still less of what it has.
    add(&mut state, "other", 1, Amounts { cpu_millis: 500, memory_bytes: 0 });
    apply(&mut state, [Change::Assign { id: "other-001".into(), node: "a".into(), at: Timestamp(1) }]);
    add(&mut state, "new", 1, NOTHING);
    assert_eq!(by_node(&plan(&state, ready)), BTreeMap::from([("b", 1)]));
}

#[test]
fn nodes_that_go_down_again_and_again_keep_what_they_have_and_get_no_more() {
    let mut state = cluster(&[("a", 1000, 1000), ("b", 1000, 1000)]);
    let unsteady = |node: &NodeId| if node.as_str() == "a" { Health::Unsteady } else { Health::Ready };
    add(&mut state, "web", 4, NOTHING);
    assert_eq!(by_node(&plan(&state, unsteady)), BTreeMap::from([("b", 4)]));
    let all = plan(&state, |_| Health::Unsteady);
    assert!(all.assignments.is_empty());
    assert_eq!(all.refusals[0].1, "no suitable node (2 nodes: 2 went down too often lately)");
}

#[test]
fn refusals_say_why_in_words() {
    let mut state = cluster(&[("a", 1000, 100), ("b", 100, 1000), ("c", 9000, 9000)]);
    add(&mut state, "web", 1, Amounts { cpu_millis: 500, memory_bytes: 500 });
    let down = |node: &NodeId| if node.as_str() == "c" { Health::Down } else { Health::Ready };
    let plan = plan(&state, down);
    assert!(plan.assignments.is_empty());
    let words = "no suitable node (3 nodes: 1 not heard of; 1 not enough CPU left; 1 not enough memory left)";
    assert_eq!(plan.refusals[0].1, words);
    let empty = super::plan(
        &{
            let mut state = cluster(&[]);
            add(&mut state, "web", 1, NOTHING);
            state
        },
        ready,
    );
    assert_eq!(empty.refusals[0].1, "no node has joined the cluster");
}

/// A service with some containers that wait, each of which needs port 80 of its node.
fn add_with_port(state: &mut State, id: &str, replicas: u32) {
    let mut web = service(id, "web", replicas);
    let publish_mode = v1::PublishMode::Host.into();
    web.spec.ports = vec![v1::Port { container_port: 80, host_port: 80, publish_mode, ..Default::default() }];
    let containers = (1..=replicas).map(|slot| container(&format!("{id}-{slot}"), &web, slot, 1));
    let containers: Vec<_> = containers.map(|c| Change::CreateContainer(Box::new(c))).collect();
    apply(state, [put(web)]);
    apply(state, containers);
}

#[test]
fn a_port_of_the_node_is_one_containers() {
    let mut state = cluster(&[("a", 1000, 1000), ("b", 1000, 1000)]);
    add_with_port(&mut state, "web", 3);
    let plan = plan(&state, ready);
    assert_eq!(by_node(&plan), BTreeMap::from([("a", 1), ("b", 1)]));
    assert_eq!(plan.refusals[0].1, "no suitable node (2 nodes: 2 a host port is taken)");
}

#[test]
fn a_port_of_the_node_is_a_containers_until_it_ends_though_its_service_is_gone() {
    let mut state = cluster(&[("a", 1000, 1000)]);
    add_with_port(&mut state, "old", 1);
    let id = ContainerId::from("old-1");
    let node = NodeId::from("a");
    apply(
        &mut state,
        [
            Change::Assign { id: id.clone(), node: node.clone(), at: Timestamp(2) },
            Change::DeleteService { id: "old".into(), expected: Expected::Any, ports_stay: true },
            Change::Remove { id: id.clone() },
        ],
    );
    add_with_port(&mut state, "new", 1);
    // Also by a manager that begins with a snapshot.
    let mut state = State::from_bytes(&state.to_bytes().expect("bytes")).expect("a state");
    let refused = plan(&state, ready);
    assert_eq!(refused.refusals[0].1, "no suitable node (1 node: 1 a host port is taken)");
    let ended = Status::new(ContainerState::Shutdown, "", Timestamp(3));
    apply(&mut state, [Change::Observe { id, node, status: Box::new(ended) }]);
    assert_eq!(by_node(&plan(&state, ready)), BTreeMap::from([("a", 1)]));
}

#[test]
fn a_node_runs_as_many_containers_as_it_has_addresses() {
    let mut state = cluster(&[("a", 1000, 1000)]);
    add(&mut state, "web", ADDRESSES + 1, NOTHING);
    let plan = plan(&state, ready);
    assert_eq!(plan.assignments.len(), ADDRESSES as usize);
    assert_eq!(plan.refusals[0].1, "no suitable node (1 node: 1 no container address left)");
}

/// Places containers one by one, looking at every node for each: slow, and plainly what the module's documentation says.
fn slow_plan(state: &State, health: impl Fn(&NodeId) -> Health) -> Vec<(ContainerId, Option<NodeId>)> {
    let mut waiting: Vec<_> = state.waiting().collect();
    waiting.sort_by(|a, b| (a.created_at, &a.service, a.slot, &a.id).cmp(&(b.created_at, &b.service, b.slot, &b.id)));
    let mut round = Round::begin(state, &waiting, health);
    round.avoid_failures(state, &waiting);
    for container in &waiting {
        let wanted = Wanted::new(state, container);
        let ranks = round.candidates.iter().enumerate().filter_map(|(at, candidate)| {
            let is_own = container.pinned.as_ref().is_none_or(|pinned| *pinned == candidate.node.id);
            let takes = is_own && candidate.refuses(&wanted, &round.claims).is_none();
            takes.then(|| (round.count(&container.service, at), candidate.load(), at))
        });
        match ranks.min() {
            Some((_, _, at)) => round.give(container, &wanted, at),
            None => round.refuse(&[container], &wanted),
        }
    }
    decided(&round.plan)
}

fn decided(plan: &Plan) -> Vec<(ContainerId, Option<NodeId>)> {
    let placed = plan.assignments.iter().map(|(id, node)| (id.clone(), Some(node.clone())));
    let refused = plan.refusals.iter().map(|(id, ..)| (id.clone(), None));
    let mut all: Vec<_> = placed.chain(refused).collect();
    all.sort();
    all
}

proptest! {
    #[test]
    fn decides_as_looking_at_every_node_would(
        nodes in prop::collection::vec((500u64..4000, 500u64..4000, 0u8..4, 0u8..3), 1..8),
        services in prop::collection::vec((1u32..9, 0u64..900, 0u64..900, 0u8..4, 0u32..6), 1..10),
    ) {
        let mut state = founded();
        apply(&mut state, nodes.iter().enumerate().map(|(i, (cpu, memory, ..))| {
            Change::PutNode(Box::new(node(&format!("n{i}"), *cpu, *memory)))
        }));
        apply(&mut state, nodes.iter().enumerate().map(|(i, (_, _, availability, zone))| Change::SetNode {
            id: format!("n{i}").into(),
            availability: Some(match availability {
                0 => Availability::Cordoned,
                1 => Availability::Drained,
                _ => Availability::Active,
            }),
            labels: BTreeMap::from([("zone".to_owned(), Some(zone.to_string()))]),
        }));
        let health = |node: &NodeId| if node.as_str() == "n3" { Health::Down } else { Health::Ready };
        for (i, (count, cpu_millis, memory_bytes, kind, before)) in services.iter().enumerate() {
            let name = format!("s{i}");
            let mut service = service(&name, &name, *count);
            service.spec.resources.reservations = Amounts { cpu_millis: *cpu_millis, memory_bytes: *memory_bytes };
            match kind {
                0 => service.spec.constraints = vec!["node.labels.zone==1".parse().expect("a constraint")],
                1 => {
                    let publish_mode = v1::PublishMode::Host.into();
                    let port = v1::Port { container_port: 80, host_port: 80, publish_mode, ..Default::default() };
                    service.spec.ports = vec![port];
                }
                _ => {}
            }
            let mut made: Vec<_> = (1..=*count).map(|slot| container(&format!("{name}-{slot}"), &service, slot, slot.into())).collect();
            if *kind == 3 {
                made[0].pinned = Some("n0".into());
            }
            apply(&mut state, [put(service)]);
            apply(&mut state, made.into_iter().map(|c| Change::CreateContainer(Box::new(c))));
            // Some are there already.
            let placed = plan(&state, health).assignments.into_iter().take(*before as usize);
            apply(&mut state, placed.map(|(id, node)| Change::Assign { id, node, at: Timestamp(1) }).collect::<Vec<_>>());
        }
        prop_assert_eq!(decided(&plan(&state, health)), slow_plan(&state, health));
    }

    #[test]
    fn no_node_is_promised_more_than_it_has(
        nodes in prop::collection::vec((500u64..4000, 500u64..4000), 1..6),
        services in prop::collection::vec((1u32..8, 0u64..1200, 0u64..1200), 1..6),
    ) {
        let named: Vec<_> = nodes.iter().enumerate().map(|(i, (cpu, memory))| (format!("n{i}"), *cpu, *memory)).collect();
        let mut state = cluster(&named.iter().map(|(id, cpu, memory)| (id.as_str(), *cpu, *memory)).collect::<Vec<_>>());
        for (i, (count, cpu_millis, memory_bytes)) in services.iter().enumerate() {
            add(&mut state, &format!("s{i}"), *count, Amounts { cpu_millis: *cpu_millis, memory_bytes: *memory_bytes });
        }
        let first = plan(&state, ready);
        prop_assert_eq!(&first, &plan(&state, ready), "the same state gives the same plan");
        let decided = first.assignments.len() + first.refusals.len();
        prop_assert_eq!(decided, services.iter().map(|(count, ..)| *count as usize).sum::<usize>());
        apply(&mut state, first.assignments.iter().map(|(id, node)| {
            Change::Assign { id: id.clone(), node: node.clone(), at: Timestamp(2) }
        }));
        for node in state.nodes() {
            let mut used = Amounts::default();
            for container in state.containers_on(&node.id) {
                used.cpu_millis += container.revision.resources.reservations.cpu_millis;
                used.memory_bytes += container.revision.resources.reservations.memory_bytes;
            }
            let has = node.description.resources;
            prop_assert!(used.cpu_millis <= has.cpu_millis && used.memory_bytes <= has.memory_bytes);
        }
        // Who was refused fits nowhere now.
        let again = plan(&state, ready);
        prop_assert!(again.assignments.is_empty());
    }
}
