//! Reading the kernel's structures by the offsets the agent found.

use core::ffi::c_void;

use aya_ebpf::{EbpfContext as _, helpers::bpf_probe_read_kernel, programs::BtfTracePointContext};
use warren_agent_ebpf::abi::Offsets;

/// Set by the agent before loading.
#[unsafe(no_mangle)]
static OFFSETS: Offsets = Offsets {
    task_real_parent: 0,
    task_tgid: 0,
    task_pid: 0,
    task_exit_code: 0,
    task_signal: 0,
    task_mm: 0,
    task_cgroups: 0,
    task_thread_pid: 0,
    task_cred: 0,
    cred_cap_effective: 0,
    pid_level: 0,
    signal_live: 0,
    mm_arg_start: 0,
    mm_arg_end: 0,
    css_set_dfl_cgrp: 0,
    cgroup_kn: 0,
    cgroup_root: 0,
    cgroup_level: 0,
    cgroup_parent: 0,
    root_hierarchy_id: 0,
    kernfs_id: 0,
};

/// Reads a constant that the agent wrote into the read-only data. Volatile, or the compiler would use the zeros it sees.
#[inline(always)]
pub(crate) fn constant<T: Copy>(field: &'static T) -> T {
    // SAFETY: a valid reference to data that nobody writes once the program is loaded.
    unsafe { core::ptr::read_volatile(field) }
}

/// A field's offset.
macro_rules! offset {
    ($field:ident) => {
        constant(&OFFSETS.$field) as usize
    };
}

/// An address in the kernel.
pub(crate) type Address = *const u8;

/// Reads a field; `None` when the kernel refuses the address.
#[inline(always)]
pub(crate) fn read<T: Copy>(base: Address, offset: usize) -> Option<T> {
    // SAFETY: the helper checks the address itself.
    unsafe { bpf_probe_read_kernel(base.wrapping_add(offset).cast::<T>()).ok() }
}

/// Argument `n` of a BTF tracepoint as a pointer; the context is an array of 64-bit words.
#[inline(always)]
pub(crate) fn pointer_argument(ctx: &BtfTracePointContext, n: usize) -> Address {
    // SAFETY: the verifier knows how many words the tracepoint has and rejects others.
    unsafe { *ctx.as_ptr().cast::<u64>().add(n) as Address }
}

/// Argument `n` of a BTF tracepoint as a C `int`.
#[inline(always)]
pub(crate) fn int_argument(ctx: &BtfTracePointContext, n: usize) -> i32 {
    // SAFETY: as above.
    unsafe { *ctx.as_ptr().cast::<u64>().add(n) as i32 }
}

/// A process, by its `task_struct`.
#[derive(Clone, Copy)]
pub(crate) struct Task(pub(crate) Address);

impl Task {
    #[inline(always)]
    pub(crate) fn tgid(self) -> u32 {
        read(self.0, offset!(task_tgid)).unwrap_or(0)
    }

    #[inline(always)]
    pub(crate) fn pid(self) -> u32 {
        read(self.0, offset!(task_pid)).unwrap_or(0)
    }

    #[inline(always)]
    pub(crate) fn real_parent(self) -> Option<Self> {
        read::<Address>(self.0, offset!(task_real_parent)).map(Self)
    }

    /// Wait status so far.
    #[inline(always)]
    pub(crate) fn exit_status(self) -> u32 {
        read(self.0, offset!(task_exit_code)).unwrap_or(0)
    }

    /// Whether this exit ends its process. The thread-group leader may go first, so its pid says nothing; and the
    /// tracepoint's own argument exists only in newer kernels.
    #[inline(always)]
    pub(crate) fn is_last_thread(self) -> bool {
        let Some(signal) = read::<Address>(self.0, offset!(task_signal)) else { return false };
        read::<i32>(signal, offset!(signal_live)) == Some(0)
    }

    /// Id of its cgroup in the v2 hierarchy; 0 when unknown.
    #[inline(always)]
    pub(crate) fn cgroup_id(self) -> u64 {
        let Some(set) = read::<Address>(self.0, offset!(task_cgroups)) else { return 0 };
        let Some(cgroup) = read::<Address>(set, offset!(css_set_dfl_cgrp)) else { return 0 };
        Cgroup(cgroup).id()
    }

    /// Depth of its PID namespace.
    #[inline(always)]
    pub(crate) fn pid_namespace_level(self) -> Option<u32> {
        let pid = read::<Address>(self.0, offset!(task_thread_pid))?;
        read(pid, offset!(pid_level))
    }

    /// Whether it may administer the system, as a runtime must to make a container.
    #[inline(always)]
    pub(crate) fn may_make_containers(self) -> bool {
        const CAP_SYS_ADMIN: u32 = 21;
        let Some(cred) = read::<Address>(self.0, offset!(task_cred)) else { return false };
        let effective = read::<u64>(cred, offset!(cred_cap_effective)).unwrap_or(0);
        (effective >> CAP_SYS_ADMIN) & 1 == 1
    }

    /// Start and end of its command line in its own memory.
    #[inline(always)]
    pub(crate) fn arguments(self) -> Option<(u64, u64)> {
        let mm = read::<Address>(self.0, offset!(task_mm))?;
        Some((read(mm, offset!(mm_arg_start))?, read(mm, offset!(mm_arg_end))?))
    }
}

/// A `struct cgroup` of any hierarchy.
#[derive(Clone, Copy)]
pub(crate) struct Cgroup(pub(crate) Address);

impl Cgroup {
    /// The directory's inode number; 0 when unknown.
    #[inline(always)]
    pub(crate) fn id(self) -> u64 {
        let Some(node) = read::<Address>(self.0, offset!(cgroup_kn)) else { return 0 };
        read(node, offset!(kernfs_id)).unwrap_or(0)
    }

    /// Whether it belongs to the v2 hierarchy. In hybrid mode every event comes once a hierarchy.
    #[inline(always)]
    pub(crate) fn is_v2(self) -> bool {
        let Some(root) = read::<Address>(self.0, offset!(cgroup_root)) else { return false };
        read::<i32>(root, offset!(root_hierarchy_id)) == Some(0)
    }

    #[inline(always)]
    pub(crate) fn level(self) -> u32 {
        read(self.0, offset!(cgroup_level)).unwrap_or(0)
    }

    #[inline(always)]
    pub(crate) fn parent(self) -> Option<Self> {
        read::<Address>(self.0, offset!(cgroup_parent)).filter(|parent| !parent.is_null()).map(Self)
    }
}

/// As helpers want their pointers.
#[inline(always)]
pub(crate) fn untyped<T>(to: *mut T) -> *mut c_void {
    to.cast()
}
