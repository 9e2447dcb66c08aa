//! The state as consensus drives it.

use std::io;

use tokio::sync::watch;
use warren_raft::{Freeze, StateMachine};

use super::{Reply, State, Transaction};

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
        let unreadable = |error: serde_json::Error| {
            let why = format!("the log holds a command that this version cannot read: {error}");
            io::Error::new(io::ErrorKind::InvalidData, why)
        };
        let transaction: Transaction = serde_json::from_str(command).map_err(unreadable)?;
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
