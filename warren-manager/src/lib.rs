//! Warren's manager: keeps the cluster's intent in Raft, decides where containers run, and tells the agents.
//!
//! The state machine, the scheduler and the reconciler are pure functions; the loops around them are thin. Liveness and
//! telemetry stay in the leader's memory: an idle cluster writes nothing.
//!
//! Modules use those below them in this list, and none above:
//!
//! | module | what it is |
//! |---|---|
//! | [`process`], [`cli`] | a manager on a machine: its files, sockets and options |
//! | [`core`] | a manager without a machine, which the simulation runs too |
//! | [`api`] | what the gRPC API answers, a file a resource |
//! | `agents` | sessions of nodes' agents: what they are told, and what they report |
//! | `access` | who may call, calls that are the leader's to answer, members' certificates |
//! | `error` | why calls are refused |
//! | `telemetry` | metrics of the cluster, and its events as they happen |
//! | `messages` | what the API's messages mean, and which are valid |
//! | [`control`] | who is alive, which containers there should be, and where |
//! | `store` | reads and writes of the state |
//! | `caller`, `metrics` | whose call is being answered; the manager's instruments |
//! | [`data`] | a manager's directory: what is founded, joined, restored and backed up |
//! | `trust` | keys: of secrets, of the authority |
//! | [`state`] | what the cluster agrees on, and the changes that there can be |
//! | [`ids`], [`clock`] | names, time and chance |

mod access;
mod agents;
pub mod api;
mod caller;
pub mod cli;
pub mod clock;
pub mod control;
pub mod core;
pub mod data;
mod error;
#[macro_use]
pub mod ids;
mod messages;
mod metrics;
pub mod process;
pub mod state;
mod store;
mod telemetry;
mod trust;

pub use caller::as_root;
pub use messages::validate::Policy;
pub use process::{Error, Options, WAITS, hostname, identity, run, socket_of};
pub use trust::vault::{Error as VaultError, UnlockKey, Vault};
