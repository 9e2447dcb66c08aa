//! What a cluster has, as managers tell of it: one object, all of a kind, and what they are called.

pub(crate) mod container;
pub(crate) mod node;
pub(crate) mod secret;
pub(crate) mod service;
pub(crate) mod volume;

/// Chosen anew for each call that changes something: one that is repeated after a lost answer does its work once.
pub(crate) fn request_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}
