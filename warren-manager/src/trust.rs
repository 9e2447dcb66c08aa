//! Keys: what seals secrets, what locks that, and the cluster's authority.

pub(crate) mod founding;
pub(crate) mod lock;
pub(crate) mod vault;
