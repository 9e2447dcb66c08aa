//! What a node is to run, as a complete set and then as differences.

use std::{collections::BTreeMap, sync::Arc};

use warren_proto::v1::{self, AssignmentKind};

use crate::{
    ids::{ContainerId, NodeId, SecretId},
    messages::convert,
    state::{Container, Desired, Secret, State, needed_secrets},
};

/// What was sent to an agent so far.
#[derive(Debug, Default)]
pub(super) struct Assigned {
    sent: Option<BTreeMap<ContainerId, Arc<Container>>>,
    /// Secrets that the agent has, and which value of each.
    secrets: BTreeMap<SecretId, u32>,
    /// Volumes that were deleted up to this revision are known to the agent.
    deleted_up_to: u64,
    sequence: u64,
}

/// Whether an agent is told of this container: until it has ended, be it to run or to be removed. An agent answers for each
/// of them, also for one it knows nothing of, so no container waits for news for ever. Containers are one-shot: one that
/// ended is of no more use on its node.
fn is_assigned(container: &Container) -> bool {
    !container.status.state.is_terminal()
}

impl Assigned {
    /// The message that brings the agent from what it has to what the state wants; `None` when it has it.
    pub(super) fn next(
        &mut self,
        state: &State,
        node: &NodeId,
        open: impl Fn(&Secret) -> Option<v1::SecretValue>,
    ) -> Option<v1::Assignments> {
        let wanted: BTreeMap<_, _> = state
            .containers_on(node)
            .filter(|container| is_assigned(container))
            .map(|container| (container.id.clone(), Arc::clone(container)))
            .collect();
        let empty = BTreeMap::new();
        let known = self.sent.as_ref().unwrap_or(&empty);
        let is_news = |container: &Arc<Container>| {
            known.get(&container.id).is_none_or(|known| known.desired != container.desired)
        };
        let changed: Vec<_> =
            wanted.values().filter(|container| is_news(container)).map(|c| convert::assignment(c, state)).collect();
        let removed: Vec<_> = known.keys().filter(|id| !wanted.contains_key(*id)).map(ToString::to_string).collect();
        let kind = if self.sent.is_none() { AssignmentKind::Complete } else { AssignmentKind::Incremental };
        let needed = needed(state, wanted.values());
        let news = needed.values().filter(|secret| self.secrets.get(&secret.id) != Some(&secret.sequence));
        let secrets: Vec<_> = news.filter_map(|secret| open(secret)).collect();
        let removed_secrets: Vec<_> =
            self.secrets.keys().filter(|id| !needed.contains_key(*id)).map(ToString::to_string).collect();
        let deleted_volumes: Vec<_> =
            state.volumes_deleted_since(self.deleted_up_to).map(ToString::to_string).collect();
        self.deleted_up_to = state.revision();
        let nothing = deleted_volumes.is_empty()
            && changed.is_empty()
            && removed.is_empty()
            && secrets.is_empty()
            && removed_secrets.is_empty();
        if kind == AssignmentKind::Incremental && nothing {
            return None;
        }
        self.secrets = needed.into_iter().map(|(id, secret)| (id, secret.sequence)).collect();
        let applies_to = self.sequence;
        self.sequence += 1;
        self.sent = Some(wanted);
        Some(v1::Assignments {
            kind: kind.into(),
            applies_to,
            results_in: self.sequence,
            changed,
            removed,
            secrets,
            removed_secrets,
            deleted_volumes,
        })
    }
}

/// The secrets and configs that containers need which are to run.
fn needed<'a>(state: &State, containers: impl Iterator<Item = &'a Arc<Container>>) -> BTreeMap<SecretId, Arc<Secret>> {
    let running = containers.filter(|container| container.desired == Desired::Running);
    let names = running.flat_map(|container| needed_secrets(&container.revision.spec));
    let found = names.filter_map(|(kind, name)| state.secret_named(kind, name));
    found.map(|secret| (secret.id.clone(), Arc::clone(secret))).collect()
}
