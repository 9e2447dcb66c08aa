//! What was changed, and by whom: kept with the state, the latest of it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{EVENTS, State};
use crate::clock::Timestamp;

/// Who changes something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// `root`, an operator's name, a node's id or a manager's; empty for who has no certificate yet.
    pub id: String,
    /// What they are, as certificates have it; empty for who has none.
    pub role: String,
    /// From where.
    pub address: String,
}

/// Who asked for a transaction, and when.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Who.
    pub actor: Actor,
    /// When.
    pub at: Timestamp,
}

/// A change that somebody made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The log entry that made it.
    pub revision: u64,
    /// What was done, like `service.updated`.
    pub kind: String,
    /// To which object.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What changed, in words.
    pub message: String,
    /// Who did it, and when.
    pub origin: Origin,
}

/// What there is to tell about a change that was made.
#[derive(Clone, Debug)]
pub(super) struct Told {
    kind: String,
    id: String,
    name: String,
    message: String,
}

impl Told {
    /// Of which kind, like `service.updated`; about which object; and what changed, in words.
    pub(super) fn new(
        kind: impl Into<String>,
        id: impl ToString,
        name: impl ToString,
        message: impl Into<String>,
    ) -> Self {
        Self { kind: kind.into(), id: id.to_string(), name: name.to_string(), message: message.into() }
    }

    pub(super) fn event(self, revision: u64, origin: Origin) -> Event {
        let Self { kind, id, name, message } = self;
        Event { revision, kind, id, name, message, origin }
    }
}

impl State {
    /// The latest changes that somebody made, oldest first.
    pub fn events(&self) -> impl DoubleEndedIterator<Item = &Arc<Event>> {
        self.events.iter()
    }

    /// Adds to the history of changes, of which the latest are kept.
    pub(crate) fn record(&mut self, event: Event) {
        self.events.push_back(Arc::new(event));
        while self.events.len() > EVENTS {
            self.events.pop_front();
        }
    }
}
