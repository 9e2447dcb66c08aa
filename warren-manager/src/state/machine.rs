//! The state as consensus drives it.

use std::io;

use tokio::sync::watch;
use warren_raft::{Freeze, StateMachine};

use super::{Rejection, Reply, State, Transaction};

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
    fn apply(&mut self, index: u64, command: &str) -> String {
        let reply: Reply = match serde_json::from_str::<Transaction>(command) {
            Ok(transaction) => self.state.apply(index, &transaction),
            Err(error) => Err(Rejection::Unreadable(error.to_string())),
        };
        self.view.send_replace(self.state.clone());
        serde_json::to_string(&reply).unwrap_or_default()
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
