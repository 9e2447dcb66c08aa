//! Cgroups: the link from a container to its runtime's operation, its emptiness, its removal.

use aya_ebpf::{
    bindings::BPF_ANY, helpers::bpf_ktime_get_ns, macros::btf_tracepoint, macros::map, maps::PerCpuArray,
    programs::BtfTracePointContext,
};
use warren_agent_ebpf::abi::{
    ID_LEN,
    container::{Container, DEFAULT_STOP_SIGNALS, Operation, duration, event, flag, operation, state},
    counter,
};

use super::{clear, container_of, current_tgid, emit, exit::STATUS_SIGNAL};
use crate::{
    kernel::{Cgroup, Task, int_argument, pointer_argument},
    maps::{ALIASES, CONTAINERS, GROUPS, IDS, OPERATIONS, count, observe_duration},
};

/// Too large for the stack. The kernel holds its cgroup lock around both users.
#[map]
static CONTAINER_SCRATCH: PerCpuArray<Container> = PerCpuArray::with_max_entries(1, 0);

/// With the cgroupfs driver the runtime makes the directory itself. One that then clones its container straight into it,
/// as crun does, never raises `cgroup_attach_task`.
#[btf_tracepoint(function = "cgroup_mkdir")]
pub(crate) fn on_cgroup_mkdir(ctx: BtfTracePointContext) -> i32 {
    let cgroup = Cgroup(pointer_argument(&ctx, 0));
    if !cgroup.is_v2() {
        return 0;
    }
    match OPERATIONS.get_ptr_mut(current_tgid()) {
        // SAFETY: a map value.
        Some(operation) => unsafe { link(operation, cgroup) },
        None => inherit(cgroup),
    }
    0
}

/// With the systemd driver another process makes the directory and moves the task: only the task's parent tells whose
/// container it is.
#[btf_tracepoint(function = "cgroup_attach_task")]
pub(crate) fn on_cgroup_attach(ctx: BtfTracePointContext) -> i32 {
    let cgroup = Cgroup(pointer_argument(&ctx, 0));
    if !cgroup.is_v2() || CONTAINERS.get_ptr(cgroup.id()).is_some() {
        return 0;
    }
    let Some(parent) = Task(pointer_argument(&ctx, 2)).real_parent() else { return 0 };
    if let Some(operation) = OPERATIONS.get_ptr_mut(parent.tgid()) {
        // SAFETY: a map value.
        unsafe { link(operation, cgroup) };
    }
    0
}

/// Makes `cgroup` the container of `operation`. A runtime may make parents on the way: the deepest wins.
#[inline(always)]
unsafe fn link(operation: *mut Operation, cgroup: Cgroup) {
    let id = cgroup.id();
    let level = cgroup.level();
    let Some(container) = CONTAINER_SCRATCH.get_ptr_mut(0) else { return };
    // SAFETY: both are map values, and the scratch is this CPU's.
    unsafe {
        let earlier = (*operation).cgroup;
        if earlier != 0 {
            if level <= (*operation).level {
                return;
            }
            let _ = CONTAINERS.remove(earlier);
            let _ = GROUPS.remove(earlier);
        }
        (*operation).cgroup = id;
        (*operation).level = level;

        clear(container);
        (*container).create_began_ns = (*operation).began_ns;
        (*container).cgroup_made_ns = bpf_ktime_get_ns();
        (*container).state = state::CREATING;
        (*container).operation = (*operation).kind;
        (*container).group = (*operation).group;
        (*container).flags = (*operation).flags;
        (*container).stop_signals =
            if (*operation).stop_signals == 0 { DEFAULT_STOP_SIGNALS } else { (*operation).stop_signals };
        core::ptr::copy_nonoverlapping(
            (&raw const (*operation).id).cast::<[u64; ID_LEN / 8]>(),
            (&raw mut (*container).id).cast::<[u64; ID_LEN / 8]>(),
            1,
        );
        let stored = CONTAINERS.insert(id, *container, BPF_ANY.into()).is_ok()
            && IDS.insert((*operation).id, id, BPF_ANY.into()).is_ok()
            && GROUPS.insert(id, (*operation).group, BPF_ANY.into()).is_ok();
        if !stored {
            count(counter::LIFECYCLE_MAP_FULL);
        }
    }
}

/// A cgroup made inside a container's, by systemd in a container for one, belongs to the container.
#[inline(always)]
fn inherit(cgroup: Cgroup) {
    let Some(parent) = cgroup.parent() else { return };
    let Some((owner, container)) = container_of(parent.id()) else { return };
    let id = cgroup.id();
    // The agent may have named it since it was made.
    // SAFETY: map values.
    let group = unsafe { GROUPS.get(owner).copied().unwrap_or((*container).group) };
    if ALIASES.insert(id, owner, BPF_ANY.into()).is_err() || GROUPS.insert(id, group, BPF_ANY.into()).is_err() {
        count(counter::LIFECYCLE_MAP_FULL);
    }
}

#[btf_tracepoint(function = "cgroup_notify_populated")]
pub(crate) fn on_cgroup_populated(ctx: BtfTracePointContext) -> i32 {
    if int_argument(&ctx, 2) != 0 {
        return 0;
    }
    let cgroup = Cgroup(pointer_argument(&ctx, 0));
    if !cgroup.is_v2() {
        return 0;
    }
    let id = cgroup.id();
    let Some(container) = CONTAINERS.get_ptr_mut(id) else { return 0 };
    // SAFETY: a map value.
    unsafe { emptied(id, container) };
    0
}

#[inline(always)]
unsafe fn emptied(id: u64, container: *mut Container) {
    // SAFETY: the caller passes a map value.
    unsafe {
        if (*container).state == state::EXITED {
            return;
        }
        let now = bpf_ktime_get_ns();
        (*container).emptied_ns = now;
        let mut took = 0;
        if (*container).payload_ns == 0 && (*container).flags & flag::SEEDED == 0 {
            // The operation that creates it still runs and will report the failure when it exits.
            if (*container).state == state::CREATING {
                return;
            }
            if (*container).flags & flag::SANDBOXED == 0 {
                (*container).flags |= flag::START_FAILED;
                count(counter::START_FAILURES);
            }
        } else {
            let status = (*container).exit_status;
            if (*container).flags & flag::OOM != 0 {
                count(counter::EXITS_OOM);
            } else if status == 0 {
                count(counter::EXITS_COMPLETED);
            } else if (*container).stop_began_ns != 0 && status & STATUS_SIGNAL != 0 {
                count(counter::EXITS_KILLED);
            } else {
                count(counter::EXITS_ERROR);
            }
            if (*container).stop_began_ns != 0 {
                took = now - (*container).stop_began_ns;
                observe_duration(duration::STOP, took);
            }
        }
        (*container).state = state::EXITED;
        emit(event::STOPPED, now, id, took, container);
    }
}

#[btf_tracepoint(function = "cgroup_rmdir")]
pub(crate) fn on_cgroup_rmdir(ctx: BtfTracePointContext) -> i32 {
    let cgroup = Cgroup(pointer_argument(&ctx, 0));
    if !cgroup.is_v2() {
        return 0;
    }
    let id = cgroup.id();
    let _ = GROUPS.remove(id);
    if ALIASES.remove(id).is_ok() {
        return 0;
    }
    let Some(container) = CONTAINERS.get_ptr_mut(id) else { return 0 };
    // SAFETY: a map value.
    unsafe {
        // A create that fails removes its cgroup before the runtime exits; the exit reports it.
        if (*container).state != state::CREATING || (*container).operation != operation::CREATE {
            let now = bpf_ktime_get_ns();
            emit(event::REMOVED, now, id, 0, container);
        }
        // A restart reuses the id with another cgroup.
        if IDS.get((*container).id).is_some_and(|current| *current == id) {
            let _ = IDS.remove((*container).id);
        }
    }
    let _ = CONTAINERS.remove(id);
    0
}
