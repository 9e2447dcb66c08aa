//! Who gets in: calls are authenticated, authorised and passed on to the leader; members get their certificates.

pub(crate) mod front;
pub(crate) mod peers;
pub(crate) mod signing;
