//! What goes wrong, in words, and the exit code that programs see.

use std::time::Duration;

use tonic::{Code, Status};
use warren_agent::membership;
use warren_manager::{
    VaultError,
    data::{backup, formation},
};
use warren_proto::v1;

/// Why a command failed.
///
/// | exit code | meaning |
/// |---|---|
/// | 0 | done |
/// | 1 | failed |
/// | 2 | wrong usage, or a field that the manager refuses |
/// | 3 | no such object |
/// | 4 | the manager or containerd does not answer |
/// | 5 | it exists already, or someone else changed it |
/// | 6 | not permitted |
/// | 7 | the address is in use |
/// | 8 | the data directory cannot be used |
///
/// `warren service wait` ends with the exit code of the service's containers where it waits for their end. `warren container exec` ends with the exit code of what it ran; with 127 when there is no such program, and 126 when it
/// cannot be started otherwise.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "no manager answers on {address}: run this where a manager does (`warren up`, or `warren-manager` in a cluster), or log in \
         to a cluster (`warren login`)"
    )]
    NoManager { address: String },
    #[error("the manager's socket {address} is not for this user; run as root, or log in (`warren login`)")]
    NotPermitted { address: String },
    #[error("the manager at {address} does not answer: {why}")]
    Unreachable { address: String, why: String },
    #[error("the manager at {address} is not believed: {why}; if the cluster's authority was replaced, log in again")]
    Disbelieved { address: String, why: String },
    #[error("no manager of the cluster is known: say one with --manager HOST:PORT")]
    NoManagerKnown,
    #[error("nobody has logged in here: `warren login` does, with a token of `warren operator create`")]
    NotLoggedIn,
    #[error("the certificate has run out: log in again, with a token of another `warren operator create`")]
    LoginRanOut,
    #[error("{} is logged in to cluster {cluster} already: --replace forgets that", directory.display())]
    LoggedIn { cluster: String, directory: std::path::PathBuf },
    #[error("there is no home directory to keep a login in: say where with --identity")]
    Homeless,
    #[error("{0:?} is not an address of a manager: use HOST:PORT or unix:///path")]
    BadAddress(String),
    #[error("{}", .0.message())]
    Refused(#[from] Box<Status>),
    #[error(
        "the connection to the manager broke before it answered, and whether it did what was asked is not known: {why}"
    )]
    Broken { why: String },
    #[error("{which}: {}", status.message())]
    Object { which: String, status: Box<Status> },
    #[error("{manager} cannot be joined: {why}")]
    NotJoined { manager: String, why: String },
    #[error(transparent)]
    Pki(#[from] warren_pki::Error),
    #[error(transparent)]
    Formation(#[from] warren_manager::data::formation::Error),
    #[error(transparent)]
    Membership(#[from] warren_agent::membership::Error),
    #[error("{0}")]
    Usage(String),
    #[error("service {service} is not ready after {} s ({ready} of {desired}): {why}", after.as_secs())]
    NotReady { service: String, ready: usize, desired: usize, after: Duration, why: String },
    #[error("service {service} exited with code {code}")]
    ServiceExited { service: String, code: i32 },
    #[error("service {service}: {why}")]
    ServiceFailed { service: String, why: String },
    #[error("service {service} has not ended after {} s: {why}", timeout.as_secs())]
    NotEnded { service: String, timeout: Duration, why: String },
    #[error("{what} of this machine is in its place, and not at work after {} s: {why}", timeout.as_secs())]
    NotSettled { what: &'static str, timeout: Duration, why: String },
    #[error("containers of {service} are still there after {} s: {left}", timeout.as_secs())]
    NotGone { service: String, timeout: Duration, left: String },
    #[error("{}", joined(.0))]
    Several(Vec<Error>),
    #[error("node {node} still has {containers} containers after {} s", timeout.as_secs())]
    NotEmpty { node: String, containers: u32, timeout: Duration },
    #[error("there is no manager {0:?}")]
    NoSuchManager(String),
    #[error("several managers are on {0:?}: name one by its number")]
    SeveralManagers(String),
    #[error("managers are not locked: `warren cluster autolock on` locks them")]
    NotLocked,
    #[error("the cluster is not as it should be")]
    Unhealthy,
    #[error(transparent)]
    Backup(#[from] warren_manager::data::backup::Error),
    #[error(transparent)]
    Vault(#[from] warren_manager::VaultError),
    #[error("the command cannot be started: {}", failed.message)]
    NotStarted { failed: v1::ExecFailed },
    #[error("{container} cannot be sent the signal: {why}")]
    NotSignalled { container: String, why: String },
    #[error("{container} has not ended after {} s: it is {state}", timeout.as_secs())]
    Running { container: String, state: String, timeout: Duration },
    #[error("{container} has no exit code: {why}")]
    NoExitCode { container: String, why: String },
    #[error("{0}")]
    Copy(String),
    #[error("the manager has no more to say, and no exit code")]
    NoAnswer,
    #[error("the command ended with exit code {0}")]
    Exited(u8),
    #[error("there is no image {0:?} on this node")]
    NoImage(String),
    #[error(transparent)]
    Runtime(#[from] warren_agent::runtime::Error),
    #[error(transparent)]
    Manager(#[from] warren_manager::Error),
    #[error(transparent)]
    Agent(#[from] warren_agent::agent::Error),
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{}: {source}", path.display())]
    File { path: std::path::PathBuf, source: std::io::Error },
    #[error("an answer cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("an answer cannot be written as YAML: {0}")]
    Yaml(#[from] serde_saphyr::SerializeError),
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        // A manager's own words have come over the wire, and have no cause here.
        match std::error::Error::source(&status) {
            Some(cause) => Self::Broken { why: warren_pki::reason(cause) },
            None => Self::Refused(Box::new(status)),
        }
    }
}

fn joined(errors: &[Error]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl Error {
    /// What went wrong of several things that were done together.
    pub(crate) fn all(outcomes: impl IntoIterator<Item = Result<(), Self>>) -> Result<(), Self> {
        let mut errors: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Self::Several(errors)),
        }
    }

    /// Whether a manager may answer later, or another one now.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Refused(status) => {
                matches!(status.code(), Code::Unavailable | Code::OutOfRange | Code::DeadlineExceeded)
            }
            Self::Broken { .. } | Self::Unreachable { .. } | Self::NoManager { .. } => true,
            _ => false,
        }
    }

    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::NoManager { .. }
            | Self::Broken { .. }
            | Self::NotJoined { .. }
            | Self::Unreachable { .. }
            | Self::NoManagerKnown => 4,
            Self::NotPermitted { .. } | Self::NotLoggedIn | Self::LoginRanOut | Self::Disbelieved { .. } => 6,
            Self::LoggedIn { .. } => 5,
            Self::Homeless => 2,
            Self::BadAddress(_) | Self::Usage(_) | Self::Pki(_) => 2,
            Self::Formation(formation::Error::Taken(_)) | Self::Membership(membership::Error::Taken(_)) => 5,
            Self::Formation(_) | Self::Membership(_) => 8,
            Self::Refused(status) | Self::Object { status, .. } => match status.code() {
                Code::InvalidArgument => 2,
                Code::NotFound => 3,
                Code::Unavailable => 4,
                Code::AlreadyExists | Code::Aborted => 5,
                Code::PermissionDenied => 6,
                _ => 1,
            },
            Self::NotLocked | Self::Unhealthy => 1,
            Self::NoSuchManager(_) => 3,
            Self::SeveralManagers(_) => 2,
            Self::Backup(backup::Error::Formation(formation::Error::Taken(_))) => 5,
            Self::Backup(backup::Error::Vault(VaultError::UnlockKey | VaultError::NoUnlockKey))
            | Self::Vault(VaultError::UnlockKey) => 6,
            Self::Backup(_) | Self::Vault(_) => 8,
            Self::NotEmpty { .. }
            | Self::NotReady { .. }
            | Self::NotGone { .. }
            | Self::NotSettled { .. }
            | Self::NotEnded { .. }
            | Self::ServiceFailed { .. }
            | Self::NotSignalled { .. }
            | Self::Running { .. }
            | Self::NoExitCode { .. }
            | Self::Copy(_)
            | Self::Io(_)
            | Self::File { .. }
            | Self::Json(_)
            | Self::Yaml(_) => 1,
            Self::NotStarted { failed } => {
                if failed.not_found {
                    127
                } else {
                    126
                }
            }
            Self::NoAnswer => 4,
            Self::ServiceExited { code, .. } => u8::try_from(*code).ok().filter(|code| *code != 0).unwrap_or(1),
            // Alike, or simply failed.
            Self::Several(errors) => match errors.first().map(Self::exit_code) {
                Some(code) if errors.iter().all(|error| error.exit_code() == code) => code,
                _ => 1,
            },
            Self::Exited(code) => *code,
            Self::NoImage(_) => 3,
            Self::Runtime(error) if error.is_transient() => 4,
            Self::Runtime(warren_agent::runtime::Error::NoSuchImage(_)) => 3,
            Self::Runtime(_) => 1,
            Self::Manager(error) => error.exit_code(),
            Self::Agent(error) => error.exit_code(),
        }
    }
}
