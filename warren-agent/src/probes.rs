//! The kernel probes: loading, pinning and re-opening them, and reading what they have counted.
//!
//! Programs, their attachments and their maps are pinned, so they outlive the agent: a restarted agent opens what is
//! there and goes on counting where the kernel is. Only when the programs themselves or their configuration have changed
//! are they replaced; the maps stay, unless their layout changed: then what they counted is taken over.

mod btf;
mod events;
mod groups;
mod loader;
mod maps;
mod migrate;
mod object;
mod offsets;
mod service;
mod source;
mod sweep;

pub use events::{DnsEvent, LifecycleEvent, Phase, decode_name, drain_dns, drain_lifecycle};
pub use groups::Groups;
pub use loader::{MAX_DNS_PORTS, Options, PROGRAMS};
pub use maps::{DnsStatistics, Maps};
pub use object::OBJECT;
pub(crate) use service::{Events, Labelled, log_dns, log_lifecycle, read_events, sweep};
pub use source::ProbeSource;
pub(crate) use source::exponential;
pub use sweep::{Sweep, monotonic_now};

use std::{fs, io, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};

/// Why the probes do not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent was built without the kernel programs.
    #[error("this agent was built without its kernel programs: run `cargo xtask build-ebpf` and build it again")]
    NotBuilt,
    /// No BTF, or not what it should hold.
    #[error("the running kernel's type information (/sys/kernel/btf/vmlinux) is unusable: {0}")]
    Btf(String),
    /// The v2 cgroup hierarchy is not mounted.
    #[error("no cgroup2 filesystem is mounted: containers cannot be told apart in the kernel")]
    NoCgroup2,
    /// A file or directory of the agent or the kernel.
    #[error("{action} {path}", path = path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Pins live on bpffs only.
    #[error("{} is not on a BPF filesystem, where pins must be: use a directory below /sys/fs/bpf", .0.display())]
    NotBpffs(PathBuf),
    /// Another agent uses the same pins.
    #[error("another agent uses the pins in {}", .0.display())]
    InUse(PathBuf),
    /// The object could not be loaded.
    #[error("loading the kernel programs")]
    Load(#[from] Box<EbpfError>),
    /// A program could not be loaded or attached.
    #[error("attaching the kernel program {program}")]
    Program {
        /// Which.
        program: &'static str,
        /// Why.
        #[source]
        source: Box<ProgramError>,
    },
    /// A pin could not be made.
    #[error("pinning {}", path.display())]
    Pin {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Counts are in a form that this version does not know.
    #[error("counts of form {0}")]
    Form(u64),
    /// A map could not be read or written.
    #[error("the map {map}")]
    Map {
        /// Which.
        map: &'static str,
        /// Why.
        #[source]
        source: MapError,
    },
}

/// An error with all its causes, for a log line.
#[must_use]
pub fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // The verifier's log, when there is one, is long and of no use to an operator.
        let first_line = next.lines().next().unwrap_or_default();
        text.push_str(": ");
        text.push_str(first_line);
        cause = error.source();
    }
    text
}

/// The id of a process's cgroup in the v2 hierarchy: its directory's inode number.
#[must_use]
pub fn cgroup_of(pid: u32) -> Option<u64> {
    let membership = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = membership.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let directory = loader::cgroup2_mount()?.join(path);
    fs::metadata(directory).ok().map(|metadata| std::os::unix::fs::MetadataExt::ino(&metadata))
}
