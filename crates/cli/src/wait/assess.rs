//! How far a service is, from its record and its containers. Pure: no clock, no network.

use std::collections::{BTreeMap, BTreeSet};

use warren_proto::v1::{self, ContainerState, Health, RestartCondition};

use crate::objects::container;

/// How far a service is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Assessment {
    /// Containers that are to run or to have completed.
    pub(super) desired: usize,
    /// Containers of the current revision that run and, where they are checked, are healthy, or that have completed what they were for.
    pub(super) ready: usize,
    /// Ids of those among them of which only their running says that they are well.
    pub(super) unproven: BTreeSet<String>,
    /// Why the service is not ready, failures first; of the unproven, why they are not to be trusted.
    pub(super) reasons: Vec<String>,
    /// Containers of earlier revisions or other slots that are still there.
    pub(super) leaving: usize,
    /// It will not get further.
    pub(super) is_stuck: bool,
}

impl Assessment {
    /// Whether everything is as it should be, as far as can be seen at this moment.
    pub(super) fn is_ready(&self) -> bool {
        self.ready == self.desired && self.leaving == 0
    }
}

/// What a restart policy makes of a container that ended.
fn is_final(policy: v1::RestartPolicy, ended: &v1::Container) -> bool {
    let failed = container::status(ended).state() >= ContainerState::Failed;
    match policy.condition() {
        RestartCondition::Never => true,
        RestartCondition::OnFailure if !failed => true,
        _ => failed && policy.max_attempts > 0 && ended.failures + 1 >= policy.max_attempts,
    }
}

/// Why a container failed, in words.
fn failure(container: &v1::Container) -> String {
    let status = container::status(container);
    let oom = if status.oom_killed { " (out of memory)" } else { "" };
    match (status.message.as_str(), status.exit_code) {
        ("", Some(code)) => format!("exited with code {code}{oom}"),
        ("", None) => format!("{}{oom}", container::state_name(status.state())),
        (message, _) => format!("{message}{oom}"),
    }
}

/// The containers of a service by slot; a global service's by node. Newest last.
pub(crate) fn slots<'a>(
    containers: impl IntoIterator<Item = &'a v1::Container>,
) -> BTreeMap<(u32, &'a str), Vec<&'a v1::Container>> {
    let mut slots = BTreeMap::<_, Vec<&v1::Container>>::new();
    for container in containers {
        let node = if container.slot == 0 { container.node_id.as_str() } else { "" };
        slots.entry((container.slot, node)).or_default().push(container);
    }
    let created = |container: &v1::Container| container.created_at.map(|at| (at.seconds, at.nanos));
    for slot in slots.values_mut() {
        slot.sort_by(|a, b| (a.revision, created(a), &a.id).cmp(&(b.revision, created(b), &b.id)));
    }
    slots
}

/// How far a service is.
pub(super) fn assess<'a>(service: &v1::Service, containers: impl IntoIterator<Item = &'a v1::Container>) -> Assessment {
    let desired = service.status.unwrap_or_default().desired as usize;
    let policy = service.spec.as_ref().and_then(|spec| spec.restart).unwrap_or_default();
    let slots = slots(containers);
    let is_wanted = |slot: u32| slot == 0 || slot as usize <= desired;
    let mut assessment = Assessment { desired, ..Assessment::default() };
    let (mut failures, mut waits) = (Vec::new(), Vec::new());
    for ((number, _), slot) in &slots {
        let Some((newest, older)) = slot.split_last() else { continue };
        assessment.leaving += older.iter().filter(|container| !container::has_ended(container)).count();
        if !is_wanted(*number) {
            if !container::has_ended(newest) {
                assessment.leaving += 1;
                waits.push(format!("{} is stopping", container::name(newest)));
            }
            continue;
        }
        let is_current = newest.revision == service.revision;
        let before = older.last().filter(|it| is_current && it.revision == newest.revision && newest.failures > 0);
        match look(service, policy, newest) {
            Look::Ready => assessment.ready += 1,
            Look::Unproven => {
                assessment.ready += 1;
                assessment.unproven.insert(newest.id.clone());
                if let Some(before) = before {
                    failures.push(again(newest, before));
                }
            }
            Look::Failed(why) => {
                failures.push(why);
                assessment.is_stuck |= is_final(policy, newest);
            }
            Look::Waits(why) => match before {
                Some(before) => failures.push(again(newest, before)),
                None => waits.push(why),
            },
        }
    }
    let seen = slots.keys().filter(|(slot, _)| is_wanted(*slot)).count();
    if seen < desired {
        waits.push(format!("{} not created yet", desired - seen));
    }
    failures.extend(waits);
    assessment.reasons = failures;
    assessment
}

fn again(newest: &v1::Container, before: &v1::Container) -> String {
    let times = if newest.failures == 1 { "once".to_owned() } else { format!("{} times in a row", newest.failures) };
    format!("{} failed {times}, last: {}", container::name(newest), failure(before))
}

/// What the newest container of a slot is worth.
enum Look {
    Ready,
    /// It runs, and nothing else says that it does its work.
    Unproven,
    Failed(String),
    Waits(String),
}

fn look(service: &v1::Service, policy: v1::RestartPolicy, newest: &v1::Container) -> Look {
    let (name, status) = (container::name(newest), container::status(newest));
    // What may end has done what it was for.
    let may_end = matches!(policy.condition(), RestartCondition::Never | RestartCondition::OnFailure);
    if newest.revision != service.revision {
        return Look::Waits(format!("{name} is of the previous revision"));
    }
    if newest.desired_state() != ContainerState::Running {
        return Look::Waits(format!("{name} is being replaced"));
    }
    match (status.state(), status.health()) {
        (ContainerState::Running, Health::Unspecified) => Look::Unproven,
        (ContainerState::Running, Health::Healthy) => Look::Ready,
        (ContainerState::Running, Health::Starting) => {
            let why = Some(status.health_message).filter(|why| !why.is_empty());
            Look::Waits(format!(
                "{name} has not passed a health check{}",
                why.map_or(String::new(), |why| format!(": {why}"))
            ))
        }
        (ContainerState::Running, Health::Unhealthy) => {
            Look::Failed(format!("{name} is unhealthy: {}", status.health_message))
        }
        (ContainerState::Complete, _) if may_end => Look::Ready,
        (state, _) if state >= ContainerState::Complete => Look::Failed(format!("{name} failed: {}", failure(newest))),
        (state, _) => {
            let why = if status.message.is_empty() { String::new() } else { format!(": {}", status.message) };
            Look::Waits(format!("{name} is {}{why}", container::state_name(state)))
        }
    }
}

/// How a service that is to end has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Some of its containers have not.
    NotYet(String),
    /// All have: the first exit code that is not 0, if any.
    Exited(i32),
    /// One could not be run.
    Failed(String),
}

/// How a service that is to end has ended.
pub(super) fn end<'a>(service: &v1::Service, containers: impl IntoIterator<Item = &'a v1::Container>) -> End {
    let desired = service.status.unwrap_or_default().desired as usize;
    let policy = service.spec.as_ref().and_then(|spec| spec.restart).unwrap_or_default();
    let slots = slots(containers);
    let (mut code, mut ended) = (0, 0);
    for ((number, _), slot) in &slots {
        let Some(newest) = slot.last().filter(|_| *number == 0 || *number as usize <= desired) else { continue };
        if newest.revision != service.revision || !container::has_ended(newest) || !is_final(policy, newest) {
            let state = container::state_name(container::status(newest).state());
            return End::NotYet(format!("{} is {state}", container::name(newest)));
        }
        ended += 1;
        match container::status(newest).exit_code {
            Some(own) if code == 0 => code = own,
            Some(_) => {}
            None => return End::Failed(format!("{} failed: {}", container::name(newest), failure(newest))),
        }
    }
    if ended < desired { End::NotYet(format!("{} not created yet", desired - ended)) } else { End::Exited(code) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ContainerState::{Assigned, Complete, Failed, Rejected, Running, Starting};

    fn service(desired: u32, condition: RestartCondition) -> v1::Service {
        let restart = v1::RestartPolicy { condition: condition.into(), ..Default::default() };
        v1::Service {
            spec: Some(v1::ServiceSpec { restart: Some(restart), ..Default::default() }),
            status: Some(v1::ServiceStatus { desired, running: 0 }),
            revision: 2,
            ..Default::default()
        }
    }

    /// A container: its slot, revision and state.
    fn one((slot, revision, state): (u32, u64, ContainerState)) -> v1::Container {
        let status = v1::ContainerStatus { state: state.into(), ..Default::default() };
        v1::Container {
            id: format!("{slot}-{revision}-{}", state as i32),
            service_name: "web".to_owned(),
            slot,
            revision,
            desired_state: Running.into(),
            status: Some(status),
            ..Default::default()
        }
    }

    #[test]
    fn a_service_is_ready_when_all_of_it_runs_the_current_revision_or_has_done_its_work() {
        use RestartCondition::{Any, Never, OnFailure};
        for (desired, restart, states, ready, stuck) in [
            (2, Any, &[(1, 2, Running), (2, 2, Running)][..], true, false),
            (2, Any, &[(1, 2, Running), (2, 2, Starting)], false, false),
            (2, Any, &[(1, 2, Running), (2, 2, Running), (3, 2, Running)], false, false),
            (2, Any, &[(1, 2, Running), (2, 2, Running), (3, 2, Failed)], true, false),
            (2, Any, &[(1, 1, Running), (2, 1, Running)], false, false),
            (2, Any, &[(1, 2, Running), (2, 1, Running)], false, false),
            (1, Any, &[(1, 2, Running), (1, 1, Running)], false, false),
            (1, Any, &[(1, 2, Running), (1, 1, Failed)], true, false),
            (0, Any, &[], true, false),
            (1, Any, &[], false, false),
            (1, Any, &[(1, 2, Complete)], false, false),
            (1, Any, &[(1, 2, Failed)], false, false),
            (1, Never, &[(1, 2, Complete)], true, false),
            (1, Never, &[(1, 1, Complete), (1, 2, Failed)], false, true),
            (1, Never, &[(1, 1, Failed)], false, false),
            (1, OnFailure, &[(1, 2, Complete)], true, false),
            (2, Never, &[(1, 2, Complete), (2, 2, Running)], true, false),
            (2, Never, &[(1, 2, Rejected), (2, 2, Running)], false, true),
            (1, OnFailure, &[(1, 2, Failed)], false, false),
        ] {
            let containers: Vec<_> = states.iter().copied().map(one).collect();
            let found = assess(&service(desired, restart), &containers);
            assert_eq!(
                (found.is_ready(), found.is_stuck),
                (ready, stuck),
                "{desired} {restart:?} {states:?} {found:?}"
            );
            let explained = !found.reasons.is_empty() || found.leaving > 0;
            assert_eq!(explained, !ready, "{found:?}");
        }
    }

    #[test]
    fn attempts_that_are_used_up_are_final_and_failures_are_told() {
        let mut web = service(1, RestartCondition::Any);
        web.spec.as_mut().and_then(|spec| spec.restart.as_mut()).expect("a policy").max_attempts = 3;
        let mut failed = one((1, 2, Failed));
        failed.status.as_mut().expect("a status").exit_code = Some(3);
        failed.failures = 1;
        assert!(!assess(&web, [&failed]).is_stuck);
        failed.failures = 2;
        let found = assess(&web, [&failed]);
        assert!(found.is_stuck);
        assert_eq!(found.reasons, ["web-1 failed: exited with code 3"]);
        let mut next = one((1, 2, Running));
        next.failures = 2;
        next.created_at = Some(pbjson_types::Timestamp { seconds: 9, nanos: 0 });
        let found = assess(&web, [&failed, &next]);
        assert!(found.is_ready() && found.unproven.contains(&next.id));
        assert_eq!(found.reasons, ["web-1 failed 2 times in a row, last: exited with code 3"]);
        next.status.as_mut().expect("a status").health = Health::Healthy.into();
        let found = assess(&web, [&failed, &next]);
        assert!(found.is_ready() && found.unproven.is_empty() && found.reasons.is_empty(), "{found:?}");
    }

    #[test]
    fn what_is_to_end_ends_with_the_first_exit_code_that_is_not_0() {
        let job = service(2, RestartCondition::Never);
        let exited = |slot, code| {
            let mut container = one((slot, 2, if code == 0 { Complete } else { Failed }));
            container.status.as_mut().expect("a status").exit_code = Some(code);
            container
        };
        let not_yet = |why: &str| End::NotYet(why.to_owned());
        assert_eq!(end(&job, [&exited(1, 0)]), not_yet("1 not created yet"));
        assert_eq!(end(&job, [&exited(1, 0), &one((2, 2, Assigned))]), not_yet("web-2 is assigned"));
        assert_eq!(end(&job, [&exited(1, 0), &exited(2, 0)]), End::Exited(0));
        assert_eq!(end(&job, [&exited(1, 4), &exited(2, 5)]), End::Exited(4));
        let mut rejected = one((2, 2, Rejected));
        rejected.status.as_mut().expect("a status").message = "no such image".to_owned();
        assert_eq!(end(&job, [&exited(1, 0), &rejected]), End::Failed("web-2 failed: no such image".to_owned()));
        let restarted = service(2, RestartCondition::OnFailure);
        assert_eq!(end(&restarted, [&exited(1, 0), &exited(2, 1)]), not_yet("web-2 is failed"));
    }
}
