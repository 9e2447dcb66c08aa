//! Running what is assigned: one worker a container, each driven by a pure state machine.

mod board;
mod cache;
mod lifecycle;
mod supervisor;
mod timings;
mod worker;

pub use board::Board;
pub(crate) use board::Running;
pub use cache::{Cache, CachedContainer};
pub use lifecycle::{Action, Ending, Event, Lifecycle, Phase};
pub(crate) use supervisor::seed;
pub use supervisor::{Actions, Options, OutOfSequence, Supervisor, handle_kernel_event};
pub use timings::{RuntimePhase, Timings};
pub use worker::NodeSettings;
pub(crate) use worker::now;
