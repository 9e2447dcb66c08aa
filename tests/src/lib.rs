//! The harness of the end-to-end tests. Every test has its own containerd, directories, ports, cgroup and pins, and takes
//! all of it away again, also when it fails.

pub mod cluster;
mod dns;
mod front;
mod hostile;
mod hosts;
mod inside;
mod load;
mod metrics;
mod outside;
mod process;
mod registry;
mod terminal;
mod tokens;
mod watch;
mod world;

pub use dns::{Answer, DnsServer, Transport, ask, ask_silently, framed_query, script_that_asks};
pub use front::{Front, Trouble};
pub use hostile::{Harm, Hostile, zeros};
pub use hosts::Hosts;
pub use inside::Inside;
pub use load::Load;
pub use metrics::{Metrics, Prometheus};
pub use outside::{Outside, both_ready, start_second, two_nodes};
pub use process::{Process, find, find_program, free_port, until, until_within};
pub use registry::{Registry, RegistryOptions};
pub use terminal::Terminal;
pub use tokens::TokenServer;
pub use watch::Watch;
/// A shell script that runs until it is told to stop, and then does.
pub const WELL_BEHAVED: &str = "trap 'exit 0' TERM; while :; do sleep 0.05; done";

pub use world::{Output, World, image_name, run};
