//! Layouts and numbers that the kernel programs and the agent must agree on.
//!
//! [`HASH`] names this agreement. It is part of the path under which maps are pinned, so programs never write to maps that
//! another layout filled: aya does not compare an existing pin with the definition at hand. Counts are taken over: see [`COUNTS`].

pub mod container;
pub mod counter;
pub mod dns;

use core::mem::{align_of, size_of};

/// Bytes of a container id as the maps key it, zero-padded. containerd allows 76.
pub const ID_LEN: usize = 80;
/// A container id, zero-padded.
pub type ContainerId = [u8; ID_LEN];

/// Whom DNS queries and containers are accounted to. The agent hands the numbers out; these are reserved.
pub mod group {
    /// Processes outside any container.
    pub const HOST: u32 = 0;
    /// Containers that nobody has named yet.
    pub const UNASSIGNED: u32 = 1;
    /// What no longer fits in the histogram map.
    pub const OVERFLOW: u32 = 2;
    /// First number the agent hands out.
    pub const FIRST_ASSIGNED: u32 = 3;
}

/// Field offsets of the running kernel's structures, in bytes. The agent reads them from the kernel's BTF and writes
/// them into the programs' read-only data before loading, so that the verifier sees constants: Rust has no CO-RE.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    /// `task_struct.real_parent`
    pub task_real_parent: u32,
    /// `task_struct.tgid`
    pub task_tgid: u32,
    /// `task_struct.pid`
    pub task_pid: u32,
    /// `task_struct.exit_code`
    pub task_exit_code: u32,
    /// `task_struct.signal`
    pub task_signal: u32,
    /// `task_struct.mm`
    pub task_mm: u32,
    /// `task_struct.cgroups`
    pub task_cgroups: u32,
    /// `task_struct.thread_pid`
    pub task_thread_pid: u32,
    /// `task_struct.cred`
    pub task_cred: u32,
    /// `cred.cap_effective`: 64 bits, whether as two words (before 6.3) or one.
    pub cred_cap_effective: u32,
    /// `pid.level`: depth of the PID namespace.
    pub pid_level: u32,
    /// `signal_struct.live`: threads of the group still alive.
    pub signal_live: u32,
    /// `mm_struct.arg_start`
    pub mm_arg_start: u32,
    /// `mm_struct.arg_end`
    pub mm_arg_end: u32,
    /// `css_set.dfl_cgrp`: the task's cgroup in the v2 hierarchy.
    pub css_set_dfl_cgrp: u32,
    /// `cgroup.kn`
    pub cgroup_kn: u32,
    /// `cgroup.root`
    pub cgroup_root: u32,
    /// `cgroup.level`
    pub cgroup_level: u32,
    /// `cgroup.self.parent`. `self` is the first member, so this also leads to the parent's `struct cgroup`.
    pub cgroup_parent: u32,
    /// `cgroup_root.hierarchy_id`: 0 is the v2 hierarchy.
    pub root_hierarchy_id: u32,
    /// `kernfs_node.id`: what user space sees as the directory's inode number.
    pub kernfs_id: u32,
}

/// What the agent decides before the programs are loaded.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// A DNS answer slower than this is reported on the ring, in nanoseconds. 0 reports none.
    pub dns_slow_ns: u64,
    /// A DNS query that waited longer is the agent's to count, whatever comes; in nanoseconds, 0 is no limit.
    pub dns_timeout_ns: u64,
    /// Ports taken for DNS, in network byte order; 0 is unused.
    pub dns_ports: [u16; 4],
    /// 1: only containers in the registry count. 0: every container of a known runtime.
    pub registered_only: u32,
    /// 1: the OOM tracepoint's argument is a PID (5.10), not a task (6.1 and later).
    pub oom_argument_is_pid: u32,
}

/// What the agent tells the programs of a container before the runtime creates it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registration {
    /// Signals that begin a stop, one bit per number; 0 stands for [`container::DEFAULT_STOP_SIGNALS`].
    pub stop_signals: u64,
    /// Whom the container is accounted to; see [`group`].
    pub group: u32,
    /// Always 0.
    pub _reserved: u32,
}

/// What the agent notes beside the maps: whose counts they hold, and which programs fill them. The programs never look.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Random; names this set of maps.
    pub epoch: u64,
    /// Hash of the programs and their configuration.
    pub programs: u64,
    /// Rises with each layout that took over another's counts: those of the highest hold. Counts from 1.
    pub generation: u64,
    /// The form of the counts: [`COUNTS`].
    pub counts: u64,
}

/// The form of counts, which agents of other layouts read: counters and durations keep their numbers (new ones follow the last), histograms
/// keep their slots, and keys keep their fields. What breaks this is another form, and needs code that reads the one before.
pub const COUNTS: u64 = 1;

/// Bytes of a group's name: a service's name is a DNS label.
pub const GROUP_NAME_LEN: usize = 64;
/// A group's name, zero-padded.
pub type GroupName = [u8; GROUP_NAME_LEN];

/// A query that the agent is about to count as timed out; see its sweep. All zeros when there is none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SweepIntent {
    /// The query.
    pub query: dns::PendingKey,
    /// When it was sent; 0 when there is no intent.
    pub sent_ns: u64,
    /// The counter.
    pub key: dns::HistogramKey,
    /// The counter's value with this query.
    pub count: u64,
}

/// Command names of container runtimes, as the first eight bytes of a task's name.
pub const RUNTIMES: [&str; 4] = ["runc", "crun", "youki", "runsc"];

/// Changes whenever a layout keeps its size but not its meaning.
const REVISION: u64 = 2;

const fn fnv1a(hash: u64, value: u64) -> u64 {
    let bytes = value.to_le_bytes();
    let mut hash = hash;
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0100_0000_01b3);
        i += 1;
    }
    hash
}

const fn layout<T>(hash: u64) -> u64 {
    fnv1a(fnv1a(hash, size_of::<T>() as u64), align_of::<T>() as u64)
}

/// FNV-1a over the sizes, alignments and limits of everything that crosses the kernel boundary.
pub const HASH: u64 = {
    let mut hash = fnv1a(0xcbf2_9ce4_8422_2325, REVISION);
    hash = layout::<container::Container>(hash);
    hash = layout::<container::Event>(hash);
    hash = layout::<container::Operation>(hash);
    hash = layout::<dns::HistogramKey>(hash);
    hash = layout::<dns::PendingKey>(hash);
    hash = layout::<dns::Pending>(hash);
    hash = layout::<dns::Event>(hash);
    hash = layout::<Registration>(hash);
    hash = layout::<Meta>(hash);
    hash = layout::<SweepIntent>(hash);
    hash = layout::<Offsets>(hash);
    hash = layout::<Config>(hash);
    hash = layout::<crate::histogram::Histogram>(hash);
    hash = fnv1a(hash, crate::histogram::FIRST_INDEX as u64);
    hash = fnv1a(hash, counter::COUNT as u64);
    hash = fnv1a(hash, container::DURATIONS as u64);
    hash
};

#[cfg(feature = "user")]
mod user {
    //! Why each of these may be read from and written to a map as bytes: `repr(C)`, `Copy`, integers only, every byte of
    //! padding a named field.

    use aya::Pod;

    use super::{Config, Meta, Offsets, Registration, SweepIntent, container, dns};
    use crate::histogram::Histogram;

    // SAFETY: see the module.
    unsafe impl Pod for Config {}
    // SAFETY: see the module.
    unsafe impl Pod for Meta {}
    // SAFETY: see the module.
    unsafe impl Pod for Offsets {}
    // SAFETY: see the module.
    unsafe impl Pod for Registration {}
    // SAFETY: see the module.
    unsafe impl Pod for SweepIntent {}
    // SAFETY: see the module.
    unsafe impl Pod for container::Container {}
    // SAFETY: see the module.
    unsafe impl Pod for container::Operation {}
    // SAFETY: see the module.
    unsafe impl Pod for dns::HistogramKey {}
    // SAFETY: see the module.
    unsafe impl Pod for dns::Pending {}
    // SAFETY: see the module.
    unsafe impl Pod for dns::PendingKey {}
    // SAFETY: see the module.
    unsafe impl Pod for Histogram {}
}
