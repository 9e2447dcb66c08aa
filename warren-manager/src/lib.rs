//! Warren's manager: keeps the cluster's intent in Raft, decides where containers run, and tells the agents.
//!
//! The state machine, the scheduler and the reconciler are pure functions; the loops around them are thin. Liveness and
//! telemetry stay in the leader's memory: an idle cluster writes nothing.

pub mod api;
pub mod backup;
pub mod cli;
pub mod clock;
mod controller;
mod convert;
pub mod core;
pub mod data_dir;
mod dispatcher;
mod error;
mod feed;
pub mod formation;
mod founding;
mod front;
pub mod ids;
pub mod liveness;
mod lock;
pub mod manager;
mod metrics;
mod pace;
mod peers;
pub mod pinning;
pub mod reconciler;
pub mod scheduler;
mod signing;
pub mod state;
mod store;
mod telemetry;
mod validate;
mod vault;

pub use front::as_root;
pub use manager::{Error, Options, WAITS, hostname, identity, run, socket_of};
pub use validate::Policy;
pub use vault::{Error as VaultError, UnlockKey, Vault};
