//! The API's messages: what they are in the state's terms, and which are valid.

pub(crate) mod convert;
pub(crate) mod validate;
