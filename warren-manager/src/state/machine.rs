//! The state as consensus drives it.

use std::io;

use tokio::sync::watch;
use warren_raft::{Freeze, StateMachine};

use super::{OLDEST_SCHEMA, Reply, SCHEMA, State, Transaction};

/// Applies transactions and shows every new state to whoever looks.
#[derive(Debug)]
pub struct Machine {
    state: State,
    view: watch::Sender<State>,
    newest: u32,
}

impl Machine {
    /// An empty state, and where to see what becomes of it.
    #[must_use]
    pub fn new() -> (Self, watch::Receiver<State>) {
        Self::of_schema(SCHEMA)
    }

    /// One that reads no newer schema than this, like that of an earlier version.
    #[must_use]
    pub fn of_schema(newest: u32) -> (Self, watch::Receiver<State>) {
        let (view, receiver) = watch::channel(State::default());
        (Self { state: State::default(), view, newest: newest.min(SCHEMA) }, receiver)
    }
}

impl StateMachine for Machine {
    fn reads(&self) -> u32 {
        self.newest
    }

    fn apply(&mut self, index: u64, command: &str) -> io::Result<String> {
        let transaction = decode(command, self.newest)?;
        let reply: Reply = self.state.apply(index, &transaction);
        self.view.send_replace(self.state.clone());
        serde_json::to_string(&reply).map_err(io::Error::other)
    }

    fn freeze(&self) -> Freeze {
        let state = self.state.clone();
        Box::new(move || state.to_bytes())
    }

    fn restore(&mut self, state: &[u8]) -> io::Result<()> {
        self.state = State::of_schema(state, self.newest)?;
        self.view.send_replace(self.state.clone());
        Ok(())
    }
}

/// A transaction as the log of a cluster with this schema holds it: the schema's number, and then JSON.
///
/// # Errors
///
/// When it holds what a manager that reads no later schema does not know.
pub fn encode(transaction: &Transaction, schema: u32) -> serde_json::Result<String> {
    let schema = schema.max(transaction.raises_schema_to());
    let since = transaction.since();
    if since > schema {
        let why = format!("it needs schema {since}, and the cluster's log is of schema {schema}");
        return Err(serde::ser::Error::custom(why));
    }
    Ok(format!("{schema} {}", serde_json::to_string(transaction)?))
}

/// A transaction that any version since the oldest known schema has written, up to the newest that is read here.
fn decode(command: &str, newest: u32) -> io::Result<Transaction> {
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    // The oldest schema's had no number.
    let (schema, json) = match command.split_once(' ') {
        Some((number, json)) if !number.starts_with('{') => (number.parse().unwrap_or(u32::MAX), json),
        _ => (OLDEST_SCHEMA, command),
    };
    if !(OLDEST_SCHEMA..=newest).contains(&schema) {
        let known = format!("this manager reads {OLDEST_SCHEMA} to {newest}");
        return Err(invalid(format!(
            "the log holds a transaction of schema {schema}, {known}: another version wrote it"
        )));
    }
    serde_json::from_str(json)
        .map_err(|error| invalid(format!("the log holds a transaction that this version cannot read: {error}")))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use warren_proto::v1;

    use super::*;
    use crate::state::{Change, Expected, SECRETS_IN_ENV, tests::service};

    #[test]
    fn transactions_of_other_schemas_are_read_or_named() {
        let transaction = Transaction { request_id: "a b".to_owned(), ..Transaction::default() };
        let encoded = encode(&transaction, 5).expect("encodes");
        assert!(encoded.starts_with("5 {"), "{encoded}");
        assert_eq!(decode(&encoded, SCHEMA).expect("reads what it wrote"), transaction);
        let json = serde_json::to_string(&transaction).expect("encodes");
        assert_eq!(decode(&json, SCHEMA).expect("reads the oldest"), transaction);
        let refused = decode(&format!("99 {json}"), SCHEMA).expect_err("is of the future").to_string();
        assert!(refused.contains("schema 99"), "{refused}");
        assert!(decode("4 {", SCHEMA).expect_err("is cut").to_string().contains("cannot read"));
        assert!(decode("x {}", SCHEMA).is_err());
    }

    #[test]
    fn what_a_member_may_not_know_is_not_written() {
        let mut service = service("s", "web", 1);
        let mount = v1::SecretMount { source: "key".to_owned(), env: "KEY".to_owned(), ..Default::default() };
        Arc::make_mut(&mut service.spec.container).secrets.push(mount);
        let change = Change::PutService { service: Box::new(service), expected: Expected::Absent };
        let transaction = Transaction { changes: vec![change.clone()], ..Transaction::default() };
        let refused =
            encode(&transaction, SECRETS_IN_ENV - 1).expect_err("an earlier version's member does not know it");
        assert!(refused.to_string().contains("needs schema 7, and the cluster's log is of schema 6"), "{refused}");
        assert!(encode(&transaction, SECRETS_IN_ENV).is_ok());
        // Nobody reads this who does not read what it raises the schema to.
        let changes = vec![Change::RaiseSchema(SECRETS_IN_ENV), change];
        assert!(encode(&Transaction { changes, ..Transaction::default() }, OLDEST_SCHEMA).is_ok());
    }

    #[test]
    fn a_cluster_writes_what_its_members_read_until_its_schema_is_raised() {
        let (mut old, _) = Machine::of_schema(5);
        let (mut new, _) = Machine::new();
        assert_eq!((old.reads(), new.reads()), (5, SCHEMA));
        let any = encode(&Transaction::default(), State::default().schema()).expect("encodes");
        assert!(old.apply(1, &any).is_ok() && new.apply(1, &any).is_ok());
        let both = new.freeze()().expect("bytes");
        assert!(old.restore(&both).is_ok());
        let raise = Transaction { changes: vec![Change::RaiseSchema(SCHEMA)], ..Transaction::default() };
        let raise = encode(&raise, new.state.schema()).expect("encodes");
        assert!(raise.starts_with(&format!("{SCHEMA} ")), "{raise}");
        assert!(new.apply(2, &raise).is_ok());
        assert_eq!(new.state.schema(), SCHEMA);
        let refused = old.apply(2, &raise).expect_err("is of a later version").to_string();
        assert!(refused.contains(&format!("schema {SCHEMA}, this manager reads 3 to 5")), "{refused}");
        let refused = old.restore(&new.freeze()().expect("bytes")).expect_err("is of a later version").to_string();
        assert!(refused.contains(&format!("schema {SCHEMA}, this manager reads 3 to 5")), "{refused}");
        // It is never lowered.
        let lower = Transaction { changes: vec![Change::RaiseSchema(5)], ..Transaction::default() };
        assert!(new.apply(3, &encode(&lower, new.state.schema()).expect("encodes")).is_ok());
        assert_eq!(new.state.schema(), SCHEMA);
    }
}
