//! Warren's node agent.
//!
//! It times containers and DNS in the kernel ([`probes`]), runs what a manager assigns to its node, and streams status and
//! telemetry back. [`observe`] is the probes alone, beside any container engine.

pub mod agent;
pub mod cli;
mod conditions;
pub mod dns;
mod exec;
mod health;
pub mod logs;
pub mod membership;
pub mod network;
pub mod node;
pub mod observe;
pub mod probes;
pub mod runtime;
pub mod secrets;
pub mod session;
mod stats;
pub mod tasks;
pub mod volumes;
