//! Which containers there should be, and where: pure decisions, and the loop that carries them out.

pub(crate) mod controller;
pub mod liveness;
pub mod reconciler;
pub mod scheduler;
