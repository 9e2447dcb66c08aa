//! Managers, and the tokens with which machines join.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Record, Rejection, State, events::Told};
use crate::clock::Timestamp;

/// A member of consensus, or one that is to become one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manager {
    /// Its id in consensus; never another's.
    pub id: u64,
    /// The machine's name.
    pub hostname: String,
    /// When it was let in.
    pub created_at: Timestamp,
    /// Whether it is to vote; one that is not follows all the same.
    #[serde(default = "votes")]
    pub voter: bool,
}

fn votes() -> bool {
    true
}

impl Record for Manager {
    type Id = u64;
    type Name = String;
    const KIND: &'static str = "manager";

    fn id(&self) -> &u64 {
        &self.id
    }

    fn name(&self) -> Option<String> {
        None
    }

    fn label(&self) -> String {
        format!("manager {}", self.id)
    }
}

/// What a token lets its holder become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenRole {
    /// A member of consensus.
    Manager,
    /// A node with an agent.
    Worker,
}

impl TokenRole {
    fn name(self) -> &'static str {
        match self {
            Self::Manager => "manager",
            Self::Worker => "worker",
        }
    }
}

/// A join token, without what is secret of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    /// Of its secret.
    pub hash: String,
    /// What it is for.
    pub role: TokenRole,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it ends to be valid.
    pub expires_at: Timestamp,
}

impl Record for JoinToken {
    type Id = String;
    type Name = String;
    const KIND: &'static str = "token";

    fn id(&self) -> &String {
        &self.hash
    }

    fn name(&self) -> Option<String> {
        None
    }

    fn label(&self) -> String {
        "token".to_owned()
    }
}

impl State {
    /// All managers, by id.
    pub fn managers(&self) -> impl Iterator<Item = &Arc<Manager>> {
        self.managers.values()
    }

    /// A manager by id.
    #[must_use]
    pub fn manager(&self, id: u64) -> Option<&Arc<Manager>> {
        self.managers.get(&id)
    }

    /// The id of the next manager.
    #[must_use]
    pub fn next_manager(&self) -> u64 {
        self.next_manager.max(1)
    }

    /// Has the next managers' numbers be no manager's.
    pub(crate) fn skip_managers(&mut self, count: u64) {
        self.next_manager = self.next_manager() + count;
    }

    /// All join tokens, by hash.
    pub fn tokens(&self) -> impl Iterator<Item = &Arc<JoinToken>> {
        self.tokens.values()
    }

    /// A join token by hash.
    #[must_use]
    pub fn token(&self, hash: &str) -> Option<&Arc<JoinToken>> {
        self.tokens.get(&hash.to_owned())
    }

    pub(super) fn admit_manager(&mut self, manager: &Manager) -> Result<Told, Rejection> {
        if manager.id != self.next_manager() {
            return Err(Rejection::Conflict(format!("the id of manager {}", manager.id)));
        }
        self.next_manager = manager.id + 1;
        self.managers.put(manager.clone(), self.revision);
        Ok(Told::new("manager.admitted", manager.id, &manager.hostname, ""))
    }

    pub(super) fn set_manager(&mut self, id: u64, voter: bool) -> Result<Told, Rejection> {
        let manager = Manager { voter, ..Manager::clone(self.managers.find(&id)?) };
        let told = Told::new(if voter { "manager.promoted" } else { "manager.demoted" }, id, &manager.hostname, "");
        self.managers.put(manager, self.revision);
        Ok(told)
    }

    pub(super) fn remove_manager(&mut self, id: u64) -> Result<Told, Rejection> {
        let manager = self.managers.remove(&id)?;
        Ok(Told::new("manager.removed", id, &manager.hostname, ""))
    }

    pub(super) fn put_token(&mut self, token: &JoinToken) -> Told {
        self.tokens.retain(|known| known.expires_at > token.created_at);
        self.tokens.put(token.clone(), self.revision);
        let beginning: String = token.hash.chars().take(12).collect();
        Told::new("token.created", beginning, "", token.role.name())
    }

    pub(super) fn revoke_tokens(&mut self, role: TokenRole) -> Told {
        self.tokens.retain(|token| token.role != role);
        Told::new("token.revoked", "", "", format!("all of role {}", role.name()))
    }
}
