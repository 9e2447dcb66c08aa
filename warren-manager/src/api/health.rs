//! Whether a cluster is as it should be, in a few words.

use std::{collections::BTreeMap, sync::Arc};

use warren_proto::v1;
use warren_raft::Status;

use crate::{
    control::liveness::{Condition, Health},
    ids::NodeId,
    messages::convert,
    state::{Container, ContainerState, Desired, RestartCondition, State},
};

/// Entries that a manager may be behind in passing.
const BEHIND: u64 = 1000;
/// So many are named; of more, how many they are.
const NAMED: usize = 5;

/// What the leader finds.
pub(super) fn checks(
    status: &Status,
    state: &State,
    health: impl Fn(&NodeId) -> Health,
    conditions: impl Fn(&NodeId) -> Vec<Condition>,
) -> Vec<v1::ClusterCheck> {
    vec![managers(status, state), nodes(state, &health, conditions), services(state, &health)]
}

fn check(name: &str, well: String, troubles: &[String]) -> v1::ClusterCheck {
    let mut message = well;
    for trouble in troubles.iter().take(NAMED) {
        message = format!("{message}; {trouble}");
    }
    if troubles.len() > NAMED {
        message = format!("{message}; and {} more", troubles.len() - NAMED);
    }
    v1::ClusterCheck { name: name.to_owned(), ok: troubles.is_empty(), message }
}

fn managers(status: &Status, state: &State) -> v1::ClusterCheck {
    let (mut voters, mut answering) = (0, 0);
    let mut troubles = Vec::new();
    for member in &status.members {
        let hostname = state.manager(member.id).map_or("", |manager| manager.hostname.as_str());
        let named = format!("manager {} ({hostname})", member.id);
        let silent_for = status.heard.get(&member.id).copied();
        let answers = status.answers(member.id);
        let behind = status.lag.get(&member.id).copied().unwrap_or(0);
        match silent_for {
            _ if answers && behind > BEHIND => troubles.push(format!("{named} is {behind} entries behind")),
            _ if answers => {}
            None => troubles.push(format!("{named} has not answered this leader yet")),
            Some(silent) => troubles.push(format!("{named} has been silent for {} s", silent.as_secs())),
        }
        if member.voter {
            voters += 1;
            answering += usize::from(answers);
        }
    }
    if status.is_joint {
        troubles.push("a change of the voters is half done".to_owned());
    }
    let spare = answering.saturating_sub(voters / 2 + 1);
    let spare = if spare == 0 { "none".to_owned() } else { spare.to_string() };
    check("managers", format!("{answering} of {voters} voters answer, {spare} of them may fail"), &troubles)
}

fn nodes(
    state: &State,
    health: impl Fn(&NodeId) -> Health,
    conditions: impl Fn(&NodeId) -> Vec<Condition>,
) -> v1::ClusterCheck {
    let (mut ready, mut unknown) = (0, 0);
    let mut troubles = Vec::new();
    for node in state.nodes() {
        let (hostname, conditions) = (&node.description.hostname, conditions(&node.id));
        match health(&node.id) {
            Health::Ready => {
                ready += 1;
                if !conditions.is_empty() {
                    troubles.push(format!("{hostname} has {}", convert::described(&conditions)));
                }
            }
            // A leader that has just begun knows no better, and that is nobody's fault.
            Health::Unknown => unknown += 1,
            Health::NotReady => {
                troubles.push(format!("{hostname} is not ready ({})", convert::described(&conditions)));
            }
            other => troubles.push(format!("{hostname} is {}", other.name())),
        }
    }
    troubles.sort();
    let not_yet = if unknown == 0 { String::new() } else { format!(", {unknown} not heard from yet") };
    let awaited = match state.awaited_nodes().count() {
        0 => String::new(),
        awaited => format!(", {awaited} joined and never started"),
    };
    check("nodes", format!("{ready} of {} are ready{not_yet}{awaited}", state.nodes().count()), &troubles)
}

/// The containers that do what their service is for, or have done it.
fn services(state: &State, health: impl Fn(&NodeId) -> Health) -> v1::ClusterCheck {
    let (mut whole, mut all) = (0, 0);
    let mut troubles = Vec::new();
    for service in state.services() {
        // Of each slot the newest.
        let mut slots = BTreeMap::new();
        for container in state.containers_of(&service.id) {
            let newest = slots.entry((container.slot, &container.pinned)).or_insert(container);
            if (container.created_at, &container.id) > (newest.created_at, &newest.id) {
                *newest = container;
            }
        }
        let is_well = |container: &&&Arc<Container>| match container.status.state {
            ContainerState::Running => {
                container.desired == Desired::Running
                    && container.status.serves()
                    // As everywhere: what runs on a node that is not known to be down runs.
                    && container.node.as_ref().is_some_and(|node| health(node) != Health::Down)
            }
            ContainerState::Complete => {
                container.desired == Desired::Running && service.spec.restart.condition != RestartCondition::Any
            }
            _ => false,
        };
        let (serving, desired) = (slots.values().filter(is_well).count(), convert::desired(service, state) as usize);
        all += 1;
        if serving < desired {
            troubles.push(format!("{} has {serving} of {desired} containers", service.spec.name));
        } else {
            whole += 1;
        }
    }
    troubles.sort();
    check("services", format!("{whole} of {all} have all their containers"), &troubles)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use warren_raft::Member;

    use super::*;
    use crate::{
        clock::Timestamp,
        state::{
            Change,
            tests::{apply, container, founded, node, observe, put, service},
        },
    };

    fn leader(heard: &[(u64, u64)], lag: u64) -> Status {
        let member = |id| Member { id, address: format!("{id}:7443"), voter: id != 4 };
        Status {
            id: 1,
            term: 1,
            leader: Some(1),
            is_leader: true,
            last_log_index: 5000,
            applied_index: 5000,
            quorum_age: Some(Duration::ZERO),
            members: (1..=4).map(member).collect(),
            is_joint: false,
            lag: BTreeMap::from([(2, lag)]),
            leader_silent_for: None,
            heard: heard.iter().map(|(id, seconds)| (*id, Duration::from_secs(*seconds))).collect(),
            failure: None,
        }
    }

    #[test]
    fn managers_that_are_silent_or_behind_are_named() {
        let state = State::default();
        let said = |heard: &[(u64, u64)], lag| {
            let check = managers(&leader(heard, lag), &state);
            (check.ok, check.message)
        };
        let well = (true, "3 of 3 voters answer, 1 of them may fail".to_owned());
        assert_eq!(said(&[(2, 0), (3, 1), (4, 0)], 1000), well);
        let behind = "3 of 3 voters answer, 1 of them may fail; manager 2 () is 1001 entries behind";
        assert_eq!(said(&[(2, 0), (3, 1), (4, 0)], 1001), (false, behind.to_owned()));
        let silent = "2 of 3 voters answer, none of them may fail; manager 3 () has been silent for 7 s; \
                      manager 4 () has not answered this leader yet";
        assert_eq!(said(&[(2, 0), (3, 7)], 0), (false, silent.to_owned()));
        let joint = Status { is_joint: true, ..leader(&[(2, 0), (3, 0), (4, 0)], 0) };
        assert!(!managers(&joint, &state).ok);
    }
    #[test]
    fn nodes_and_services_that_are_not_well_are_named() {
        let mut state = founded();
        let (web, mut job) = (service("s1", "web", 2), service("s2", "job", 1));
        job.spec.restart.condition = RestartCondition::Never;
        let (running, done) = (container("c1", &web, 1, 1), container("c2", &job, 1, 1));
        let nodes = ["a", "b", "c", "d", "e", "f", "g"];
        let added = nodes.iter().map(|id| Change::PutNode(Box::new(node(id, 1000, 1))));
        apply(&mut state, added.chain([put(web), put(job)]));
        apply(&mut state, [running, done].map(|container| Change::CreateContainer(Box::new(container))));
        apply(&mut state, ["c1", "c2"].map(|id| Change::Assign { id: id.into(), node: "a".into(), at: Timestamp(1) }));
        apply(
            &mut state,
            [observe("c1", "a", ContainerState::Running, 2), observe("c2", "a", ContainerState::Complete, 2)],
        );
        let found = services(&state, |_| Health::Ready);
        assert!(!found.ok);
        assert_eq!(found.message, "1 of 2 have all their containers; web has 1 of 2 containers");
        let found = services(&state, |_| Health::Down);
        assert_eq!(found.message, "1 of 2 have all their containers; web has 0 of 2 containers", "nobody knows of it");

        let found =
            super::nodes(&state, |id| if id.as_str() == "a" { Health::Ready } else { Health::Down }, |_| vec![]);
        assert!(!found.ok && found.message.starts_with("1 of 7 are ready; "), "{}", found.message);
        assert!(found.message.ends_with(" is down; and 1 more"), "{}", found.message);
        assert!(super::nodes(&state, |_| Health::Ready, |_| vec![]).ok);
        let full = || Condition {
            kind: "disk_full".to_owned(),
            message: "3 MiB left".to_owned(),
            since: Timestamp(1),
            blocks: true,
        };
        let of_a = |id: &NodeId| if id.as_str() == "a" { vec![full()] } else { vec![] };
        let health = |id: &NodeId| if id.as_str() == "a" { Health::NotReady } else { Health::Ready };
        let found = super::nodes(&state, health, of_a);
        let hostname = &state.node(&"a".into()).expect("a node").description.hostname;
        let said = format!("6 of 7 are ready; {hostname} is not ready (disk_full: 3 MiB left)");
        assert_eq!((found.ok, found.message), (false, said));
        let found = super::nodes(&state, |_| Health::Ready, of_a);
        assert!(!found.ok && found.message.contains(" has disk_full: "), "{}", found.message);
        // After a change of leader nobody has been heard from, and nothing is known to be wrong.
        let found = super::nodes(&state, |_| Health::Unknown, |_| vec![]);
        assert_eq!((found.ok, found.message.as_str()), (true, "0 of 7 are ready, 7 not heard from yet"));
        let found = services(&state, |_| Health::Unknown);
        assert_eq!(found.message, "1 of 2 have all their containers; web has 1 of 2 containers");
    }
}
