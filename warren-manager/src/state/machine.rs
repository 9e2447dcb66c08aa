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
}

impl Machine {
    /// An empty state, and where to see what becomes of it.
    #[must_use]
    pub fn new() -> (Self, watch::Receiver<State>) {
        let (view, receiver) = watch::channel(State::default());
        (Self { state: State::default(), view }, receiver)
    }
}

impl StateMachine for Machine {
    fn apply(&mut self, index: u64, command: &str) -> io::Result<String> {
        let transaction = decode(command)?;
        let reply: Reply = self.state.apply(index, &transaction);
        self.view.send_replace(self.state.clone());
        serde_json::to_string(&reply).map_err(io::Error::other)
    }

    fn freeze(&self) -> Freeze {
        let state = self.state.clone();
        Box::new(move || state.to_bytes())
    }

    fn restore(&mut self, state: &[u8]) -> io::Result<()> {
        self.state = State::from_bytes(state)?;
        self.view.send_replace(self.state.clone());
        Ok(())
    }
}

/// A transaction as the log holds it: the schema's number, and then JSON.
///
/// # Errors
///
/// Never for a transaction that this program made.
pub fn encode(transaction: &Transaction) -> serde_json::Result<String> {
    Ok(format!("{SCHEMA} {}", serde_json::to_string(transaction)?))
}

/// A transaction that any version since the oldest known schema has written.
fn decode(command: &str) -> io::Result<Transaction> {
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    // The oldest schema's had no number.
    let (schema, json) = match command.split_once(' ') {
        Some((number, json)) if !number.starts_with('{') => (number.parse().unwrap_or(u32::MAX), json),
        _ => (OLDEST_SCHEMA, command),
    };
    if !(OLDEST_SCHEMA..=SCHEMA).contains(&schema) {
        let known = format!("this manager reads {OLDEST_SCHEMA} to {SCHEMA}");
        return Err(invalid(format!(
            "the log holds a transaction of schema {schema}, {known}: another version wrote it"
        )));
    }
    serde_json::from_str(json)
        .map_err(|error| invalid(format!("the log holds a transaction that this version cannot read: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transactions_of_other_schemas_are_read_or_named() {
        let transaction = Transaction { request_id: "a b".to_owned(), ..Transaction::default() };
        let encoded = encode(&transaction).expect("encodes");
        assert_eq!(decode(&encoded).expect("reads what it wrote"), transaction);
        let json = serde_json::to_string(&transaction).expect("encodes");
        assert_eq!(decode(&json).expect("reads the oldest"), transaction);
        let refused = decode(&format!("99 {json}")).expect_err("is of the future").to_string();
        assert!(refused.contains("schema 99"), "{refused}");
        assert!(decode("4 {").expect_err("is cut").to_string().contains("cannot read"));
        assert!(decode("x {}").is_err());
    }
}
