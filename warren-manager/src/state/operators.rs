//! Operators: who works with the cluster from elsewhere.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Expected, Record, Rejection, State, events::Told};
use crate::{clock::Timestamp, ids::OperatorId};

/// Somebody who works with the cluster from elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operator {
    /// Theirs in certificates, and never another's: one that is removed and comes again has another.
    pub id: OperatorId,
    /// Unique; as events name them.
    pub name: String,
    /// When they were invited.
    pub created_at: Timestamp,
    /// With which they may log in, until they have.
    pub invitation: Option<Invitation>,
}

impl Record for Operator {
    type Id = OperatorId;
    type Name = String;
    const KIND: &'static str = "operator";

    fn id(&self) -> &OperatorId {
        &self.id
    }

    fn name(&self) -> Option<String> {
        Some(self.name.clone())
    }

    fn label(&self) -> String {
        format!("operator {:?}", self.name)
    }
}

/// A token for one login, without what is secret of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    /// Of its secret.
    pub hash: String,
    /// When it ends to be valid.
    pub expires_at: Timestamp,
}

impl State {
    /// All operators that have a certificate or may get one, by id.
    pub fn operators(&self) -> impl Iterator<Item = &Arc<Operator>> {
        self.operators.values()
    }

    /// An operator by id.
    #[must_use]
    pub fn operator(&self, id: &OperatorId) -> Option<&Arc<Operator>> {
        self.operators.get(id)
    }

    /// An operator by name.
    #[must_use]
    pub fn operator_named(&self, name: &str) -> Option<&Arc<Operator>> {
        self.operators.named(name)
    }

    /// The operator whom an unused token invites, by its hash, while it is valid.
    #[must_use]
    pub fn invited(&self, hash: &str, now: Timestamp) -> Option<&Arc<Operator>> {
        self.operators.values().find(|operator| {
            let invitation = operator.invitation.as_ref();
            invitation.is_some_and(|invitation| invitation.hash == hash && invitation.expires_at > now)
        })
    }

    pub(super) fn create_operator(&mut self, operator: &Operator) -> Result<Told, Rejection> {
        self.operators.check(operator, Expected::Any)?;
        self.operators.put(operator.clone(), self.revision);
        Ok(Told::new("operator.invited", &operator.id, &operator.name, ""))
    }

    pub(super) fn admit_operator(&mut self, id: &OperatorId, hash: &str) -> Result<Told, Rejection> {
        let invites =
            |operator: &&Arc<Operator>| operator.invitation.as_ref().is_some_and(|invitation| invitation.hash == hash);
        let invited = self.operators.get(id).filter(invites);
        let invited = invited.ok_or_else(|| Rejection::Conflict(format!("operator {id}")))?;
        let operator = Operator { invitation: None, ..Operator::clone(invited) };
        let told = Told::new("operator.admitted", id, &operator.name, "");
        self.operators.put(operator, self.revision);
        Ok(told)
    }

    pub(super) fn delete_operator(&mut self, id: &OperatorId) -> Result<Told, Rejection> {
        let operator = self.operators.remove(id)?;
        Ok(Told::new("operator.removed", id, &operator.name, ""))
    }
}
