//! Whether what operators were told could have happened one after the other: linearizability, by the search of Wing and Gong with
//! Lowe's memory of what was tried. Services do not depend on each other, so each is looked at by itself.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

/// What was asked of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Set to this: how many containers, of what.
    Create(u32),
    /// To be set to this.
    Set(u32),
    Delete,
    Read,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    /// Refused, as it exists already.
    Exists,
    /// Refused, as it does not exist.
    Absent,
    /// It is set to this.
    Read(Option<u32>),
    /// Refused, for certain.
    NotDone,
    /// Done by now, or some time, or never.
    Unknown,
}

impl Outcome {
    /// Whether it was answered.
    pub(crate) fn is_known(self) -> bool {
        !matches!(self, Self::NotDone | Self::Unknown)
    }
}

/// A call of an operator.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) key: String,
    pub(crate) operation: Operation,
    pub(crate) outcome: Outcome,
    pub(crate) called: Duration,
    pub(crate) returned: Duration,
}

impl Call {
    /// What the service is after this, if it could have had this outcome.
    fn apply(&self, state: Option<u32>) -> Option<Option<u32>> {
        match (self.operation, self.outcome) {
            (Operation::Create(n), Outcome::Done | Outcome::Unknown) => state.is_none().then_some(Some(n)),
            (Operation::Set(n), Outcome::Done | Outcome::Unknown) => state.is_some().then_some(Some(n)),
            (Operation::Delete, Outcome::Done | Outcome::Unknown) => state.is_some().then_some(None),
            (Operation::Create(_), Outcome::Exists) => state.is_some().then_some(state),
            (Operation::Set(_) | Operation::Delete | Operation::Read, Outcome::Absent) => {
                state.is_none().then_some(state)
            }
            (Operation::Read, Outcome::Read(seen)) => (seen.is_some() && seen == state).then_some(state),
            _ => None,
        }
    }

    /// Whether it tells anything.
    fn matters(&self) -> bool {
        !matches!((self.operation, self.outcome), (_, Outcome::NotDone) | (Operation::Read, Outcome::Unknown))
    }

    fn returned(&self) -> Duration {
        if self.outcome == Outcome::Unknown { Duration::MAX } else { self.returned }
    }
}

/// Finds the first service whose calls no order explains.
pub(crate) fn check(calls: &[Call]) -> Result<(), String> {
    let mut by_key = BTreeMap::<&str, Vec<&Call>>::new();
    for call in calls.iter().filter(|call| call.matters()) {
        by_key.entry(&call.key).or_default().push(call);
    }
    for (key, mut calls) in by_key {
        calls.sort_by_key(|call| call.called);
        if !is_linearizable(&calls) {
            let told: Vec<String> = calls
                .iter()
                .map(|c| format!("  {:?}..{:?} {:?} {:?}", c.called, c.returned, c.operation, c.outcome))
                .collect();
            return Err(format!("what operators were told of {key} cannot be:\n{}", told.join("\n")));
        }
    }
    Ok(())
}

fn is_linearizable(calls: &[&Call]) -> bool {
    let mut tried = HashSet::new();
    let mut stack = vec![(vec![false; calls.len()], None)];
    while let Some((done, state)) = stack.pop() {
        if calls.iter().zip(&done).all(|(call, done)| *done || call.outcome == Outcome::Unknown) {
            return true;
        }
        if !tried.insert((done.clone(), state)) {
            continue;
        }
        // Whatever returned before another was called came before it.
        let open = || calls.iter().zip(&done).enumerate().filter(|(_, (_, done))| !**done);
        let first_return = open().map(|(_, (call, _))| call.returned()).min().unwrap_or(Duration::MAX);
        for (at, (call, _)) in open() {
            if call.called > first_return {
                break;
            }
            if let Some(next) = call.apply(state) {
                let mut done = done.clone();
                done[at] = true;
                stack.push((done, next));
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(operation: Operation, outcome: Outcome, called: u64, returned: u64) -> Call {
        let ms = Duration::from_millis;
        Call { key: "s".to_owned(), operation, outcome, called: ms(called), returned: ms(returned) }
    }

    #[test]
    fn what_can_be_is_told_from_what_cannot() {
        use Operation as O;
        use Outcome as R;

        let create = call(O::Create(1), R::Done, 0, 10);
        let possible = [
            vec![],
            vec![create.clone(), call(O::Read, R::Read(Some(1)), 11, 12)],
            vec![create.clone(), call(O::Read, R::Absent, 5, 12)],
            vec![create.clone(), call(O::Create(2), R::Exists, 11, 12)],
            // It may have been done, or not, or later.
            vec![create.clone(), call(O::Set(3), R::Unknown, 11, 12), call(O::Read, R::Read(Some(1)), 13, 14)],
            vec![create.clone(), call(O::Set(3), R::Unknown, 11, 12), call(O::Read, R::Read(Some(3)), 13, 14)],
            vec![
                create.clone(),
                call(O::Delete, R::Unknown, 11, 12),
                call(O::Read, R::Read(Some(1)), 13, 14),
                call(O::Read, R::Absent, 15, 16),
            ],
            vec![create.clone(), call(O::Delete, R::Done, 11, 20), call(O::Create(2), R::Done, 12, 21)],
        ];
        for calls in possible {
            check(&calls).expect("possible");
        }
        let impossible = [
            vec![call(O::Read, R::Read(Some(1)), 0, 1)],
            // An acknowledged write that nobody sees.
            vec![create.clone(), call(O::Read, R::Absent, 11, 12)],
            // Seen, and then no longer.
            vec![
                create.clone(),
                call(O::Set(3), R::Done, 11, 20),
                call(O::Read, R::Read(Some(3)), 12, 13),
                call(O::Read, R::Read(Some(1)), 14, 15),
            ],
            vec![create.clone(), call(O::Create(2), R::Done, 11, 12)],
            vec![call(O::Delete, R::Done, 0, 1)],
        ];
        for calls in impossible {
            check(&calls).expect_err("impossible");
        }
    }
}
