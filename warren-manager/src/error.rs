//! Why calls are refused, and what that is to a caller.

use tonic::Status;

use crate::{messages::validate::Invalid, store, trust::vault};

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field is wrong.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// No such object.
    #[error("there is no {kind} {name:?}")]
    NotFound {
        /// Of what kind.
        kind: &'static str,
        /// As the caller named it.
        name: String,
    },
    /// A prefix of several ids.
    #[error("{name:?} is the beginning of several {kind} ids; give more of it")]
    Ambiguous {
        /// Of what kind.
        kind: &'static str,
        /// As the caller named it.
        name: String,
    },
    /// The object is not in a state for this.
    #[error("{0}")]
    Precondition(String),
    /// The caller does something too often.
    #[error("{0}")]
    TooOften(String),
    /// The caller may not.
    #[error("{0}")]
    Refused(String),
    /// Keys and certificates.
    #[error(transparent)]
    Pki(#[from] warren_pki::Error),
    /// A page token that no list gave out.
    #[error("page_token: it is not one of this list's")]
    PageToken,
    /// The history does not reach back that far.
    #[error("changes since revision {0} are no longer known: list again and watch from there")]
    TooOld(u64),
    /// A secret could not be sealed or opened.
    #[error(transparent)]
    Vault(#[from] vault::Error),
    /// The state could not be read or written.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// What an error of the store is to a caller.
#[must_use]
pub fn status(error: store::Error) -> Status {
    Error::Store(error).into()
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        use crate::state::Rejection;

        let message = error.to_string();
        match error {
            Error::Invalid(_) | Error::PageToken | Error::Ambiguous { .. } => Self::invalid_argument(message),
            Error::NotFound { .. } => Self::not_found(message),
            Error::Precondition(_) => Self::failed_precondition(message),
            Error::TooOld(_) => Self::out_of_range(message),
            Error::TooOften(_) => Self::resource_exhausted(message),
            Error::Refused(_) => Self::permission_denied(message),
            Error::Vault(_) | Error::Pki(_) => Self::internal(message),
            Error::Store(store::Error::Rejected(Rejection::NameTaken(_))) => Self::already_exists(message),
            Error::Store(store::Error::Rejected(Rejection::Exists(_))) => Self::already_exists(message),
            Error::Store(store::Error::Rejected(Rejection::InUse { .. })) => Self::failed_precondition(message),
            Error::Store(store::Error::Rejected(Rejection::Conflict(_))) => Self::aborted(message),
            Error::Store(store::Error::Rejected(Rejection::NotFound(_))) => Self::not_found(message),
            Error::Store(store::Error::Rejected(Rejection::Unknown { .. })) => Self::invalid_argument(message),
            Error::Store(store::Error::Rejected(Rejection::PortTaken { .. })) => {
                Self::already_exists(format!("spec.ports: {message}"))
            }
            Error::Store(store::Error::Rejected(Rejection::Exhausted(_))) => Self::resource_exhausted(message),
            Error::Store(store::Error::Encoding(_)) => Self::internal(message),
            Error::Store(store::Error::Raft(warren_raft::Error::TooLarge(_))) => Self::invalid_argument(message),
            Error::Store(store::Error::Raft(warren_raft::Error::Membership(_))) => Self::failed_precondition(message),
            Error::Store(store::Error::Raft(_)) => Self::unavailable(message),
        }
    }
}
