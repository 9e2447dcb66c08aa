//! A container's life as the kernel sees it. Times are `CLOCK_MONOTONIC` nanoseconds; 0 means "not yet".

use super::ContainerId;

/// What a runtime was asked to do, from its command line.
pub mod operation {
    /// `runc create`
    pub const CREATE: u32 = 1;
    /// `runc start`
    pub const START: u32 = 2;
    /// `runc run`: create and start in one process.
    pub const RUN: u32 = 3;
}

/// Where a container is in its life.
pub mod state {
    /// The runtime is building it.
    pub const CREATING: u32 = 1;
    /// Built, waiting for its start.
    pub const CREATED: u32 = 2;
    /// The runtime was asked to start it.
    pub const STARTING: u32 = 3;
    /// The payload runs.
    pub const RUNNING: u32 = 4;
    /// A stop signal was sent.
    pub const STOPPING: u32 = 5;
    /// Its cgroup is empty.
    pub const EXITED: u32 = 6;
}

/// What happened to a container on the way; bits of [`Container::flags`].
pub mod flag {
    /// Its first process had no handler for the stop signal, and the kernel dropped it.
    pub const SIGNAL_IGNORED: u32 = 1 << 0;
    /// SIGKILL came from outside.
    pub const KILLED: u32 = 1 << 1;
    /// It ended for want of memory: the OOM killer took its first process, or another one, and soon after that the first process
    /// failed, unasked.
    pub const OOM: u32 = 1 << 2;
    /// The runtime failed to create it.
    pub const CREATE_FAILED: u32 = 1 << 3;
    /// It was created, and its payload never ran.
    pub const START_FAILED: u32 = 1 << 4;
    /// The exit of its first process was seen.
    pub const EXIT_SEEN: u32 = 1 << 5;
    /// It ran before the probes did; the agent entered it.
    pub const SEEDED: u32 = 1 << 6;
    /// The OOM killer chose its first process.
    pub const OOM_FIRST: u32 = 1 << 7;
    /// The OOM killer chose another of its processes, which it may well survive.
    pub const OOM_OTHER: u32 = 1 << 8;
    /// Its processes are not the host's, as gVisor's are: nothing but its creation can be seen.
    pub const SANDBOXED: u32 = 1 << 9;
}

/// Kinds of [`Event`].
pub mod event {
    /// The runtime's create ended, well or not.
    pub const CREATED: u32 = 1;
    /// The payload was executed.
    pub const STARTED: u32 = 2;
    /// The first stop signal was sent.
    pub const STOP_BEGAN: u32 = 3;
    /// SIGKILL followed a stop signal.
    pub const ESCALATED: u32 = 4;
    /// The first process exited.
    pub const EXITED: u32 = 5;
    /// The last process is gone.
    pub const STOPPED: u32 = 6;
    /// The cgroup was removed.
    pub const REMOVED: u32 = 7;
}

/// Which durations have a histogram; indices into the map of them.
pub mod duration {
    /// Execution of `runc create` until it exits with 0.
    pub const CREATE: u32 = 0;
    /// Execution of `runc start` (or `runc run`) until the payload's.
    pub const START: u32 = 1;
    /// First stop signal from outside until the cgroup is empty.
    pub const STOP: u32 = 2;
}
/// How many durations have a histogram.
pub const DURATIONS: usize = 3;

/// INT, QUIT, KILL, TERM: what begins a stop unless the container's image names another signal.
pub const DEFAULT_STOP_SIGNALS: u64 = 1 << 2 | 1 << 3 | 1 << 9 | 1 << 15;

/// A running invocation of a runtime.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// When the runtime was executed.
    pub began_ns: u64,
    /// The container's cgroup, 0 until known.
    pub cgroup: u64,
    /// Copied into the container; see [`super::Registration::stop_signals`].
    pub stop_signals: u64,
    /// One of [`operation`].
    pub kind: u32,
    /// Whom the container is accounted to.
    pub group: u32,
    /// Depth of the container's cgroup.
    pub level: u32,
    /// Bits of [`flag`] that its container begins with.
    pub flags: u32,
    /// The container's id.
    pub id: ContainerId,
}

/// One container instance; its key is the id of its v2 cgroup.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Container {
    /// Execution of the runtime that creates it.
    pub create_began_ns: u64,
    /// Its cgroup was made, or the first task was attached.
    pub cgroup_made_ns: u64,
    /// The runtime's create exited.
    pub create_ended_ns: u64,
    /// Execution of the runtime that starts it.
    pub start_began_ns: u64,
    /// Execution of the payload.
    pub payload_ns: u64,
    /// First stop signal.
    pub stop_began_ns: u64,
    /// First SIGKILL from outside.
    pub kill_ns: u64,
    /// Exit of its first process.
    pub exited_ns: u64,
    /// Its cgroup became empty.
    pub emptied_ns: u64,
    /// The OOM killer chose one of its processes.
    pub oom_ns: u64,
    /// Signals that begin a stop, one bit per number.
    pub stop_signals: u64,
    /// One of [`state`].
    pub state: u32,
    /// Process id of its first process, in the initial namespace.
    pub init_tgid: u32,
    /// Bits of [`flag`].
    pub flags: u32,
    /// The signal that began the stop.
    pub stop_signal: u32,
    /// Wait status of its first process: exit code in bits 8 to 15, signal in bits 0 to 6.
    pub exit_status: u32,
    /// Whom it is accounted to.
    pub group: u32,
    /// One of [`operation`]: how it was made.
    pub operation: u32,
    /// Always 0.
    pub _reserved: u32,
    /// Its id.
    pub id: ContainerId,
}

/// Words of a [`Container`]; the programs clear it word by word.
pub const CONTAINER_WORDS: usize = size_of::<Container>() / 8;

/// A record of the lifecycle ring.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub at_ns: u64,
    /// The container's cgroup; 0 when a create failed before it had one.
    pub cgroup: u64,
    /// The duration that this event ends, 0 if none.
    pub duration_ns: u64,
    /// One of [`event`].
    pub kind: u32,
    /// Always 0.
    pub _reserved: u32,
    /// The container after the event.
    pub container: Container,
}
