//! Containers on containerd: what its generated client lacks to be used.
//!
//! Only plain services are called, in the forms that containerd 1.6, 1.7 and 2.1 share; the Transfer service is not among
//! them. Every request carries the namespace; requests that make garbage-collected things carry a lease.

mod archive;
mod client;
mod content;
mod events;
mod exec;
mod image;
mod images;
mod keyed;
mod layers;
mod manifest;
mod pull;
mod rootfs;
mod spec;
mod task;
mod users;

pub use archive::import;
pub use client::{Containerd, all_containers, connect, service_label, service_of};
pub use events::watch_starts;
pub(crate) use exec::{Execution, Streams};
pub use image::LocalImage;
pub use images::{Images, Wanted};
pub use pull::Progress;
pub(crate) use rootfs::unfinished;
pub use rootfs::{RootFs, VolumePath};
pub use spec::{ContainerOptions, NetworkNamespace};
pub(crate) use spec::{host_path, hostname};
pub(crate) use task::kill_shim;
pub use task::{Found, TaskState};

use std::{io, path::PathBuf, sync::Arc};

use containerd_client::tonic::{self, Code};

/// Why something could not be done with containerd.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing listens on the socket.
    #[error("containerd does not answer on {}; is it running?", socket.display())]
    Unavailable {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// It refused a call.
    #[error("containerd: {action}: {}", status.message())]
    Call {
        /// What was tried.
        action: &'static str,
        /// Its answer.
        status: Box<tonic::Status>,
    },
    /// No such image here, and none to be pulled.
    #[error("image {0} is not on this node, and its service says never to pull it")]
    NoSuchImage(String),
    /// What a registry has, or has not.
    #[error(transparent)]
    Registry(#[from] warren_registry::Error),
    /// Nobody wants it any more.
    #[error("cancelled")]
    Cancelled,
    /// A pull that others wait for too.
    #[error(transparent)]
    Shared(Arc<Error>),
    /// An image or archive that is not what it should be.
    #[error("{what} is not a usable image: {why}")]
    BadImage {
        /// Which.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// A disk that would be full.
    #[error("there is no room for the image: {0}")]
    NoRoom(String),
    /// A spec that cannot be run.
    #[error("{0}")]
    BadSpec(String),
    /// A file.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl Error {
    fn call(action: &'static str) -> impl FnOnce(tonic::Status) -> Self {
        move |status| Self::Call { action, status: Box::new(status) }
    }

    fn image_too_large(what: &str, most: u64) -> Self {
        Self::bad_image(what, format!("it takes more than {:.1} GB (the agent's --max-image-gb)", most as f64 / 1e9))
    }

    fn bad_image(what: impl Into<String>, why: impl ToString) -> Self {
        Self::BadImage { what: what.into(), why: why.to_string() }
    }

    /// Whether trying again later may help: the daemon is away, busy or restarting.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::NoRoom(_) => true,
            Self::Registry(error) => error.is_transient(),
            Self::Shared(error) => error.is_transient(),
            Self::Call { status, .. } => {
                matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded | Code::Internal)
            }
            _ => false,
        }
    }

    /// Whether containerd says that the thing is not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Call { status, .. } if status.code() == Code::NotFound)
    }
}
