//! The words of a service's spec, and which of them are right: images' names, signals, users, capabilities, limits, sysctls
//! and paths. The manager refuses with them, the agent acts on them, and neither has a list of its own. No I/O.

mod capability;
mod image;
mod path;
mod policy;
mod secret;
mod signal;
mod sysctl;
mod ulimit;
mod user;

pub use capability::{CAPABILITIES, capability};
pub use image::{ImageName, InvalidImageName, Reference, is_digest};
pub use path::{absolute, inside};
pub use policy::{DEFAULT_CAPABILITIES, NotAllowed, Policy};
pub use secret::secret_name;
pub use signal::signal;
pub use sysctl::{SafeSysctl, sysctl};
pub use ulimit::{ULIMITS, ulimit};
pub use user::{InvalidUser, MAX_ID, Principal, User};

/// Bytes of one string that a process is started with, a variable with its name for one, without the NUL behind it (MAX_ARG_STRLEN in the
/// kernel's binfmts.h).
pub const MAX_STRING: usize = (128 << 10) - 1;
