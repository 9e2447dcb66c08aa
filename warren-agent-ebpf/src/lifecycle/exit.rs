//! Exits: of runtimes, which end a create, and of containers' first processes.

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::{btf_tracepoint, map},
    maps::PerCpuArray,
    programs::BtfTracePointContext,
};
use warren_agent_ebpf::abi::{
    ID_LEN,
    container::{Container, Operation, duration, event, flag, operation, state},
    counter,
};

use super::{clear, container_of, current_cgroup, current_tgid, emit};
use crate::{
    kernel::{Task, pointer_argument},
    maps::{CONTAINERS, OPERATIONS, count, observe_duration},
};

/// Stands for a container whose cgroup was gone before its failed create could be reported.
#[map]
static FAILED_SCRATCH: PerCpuArray<Container> = PerCpuArray::with_max_entries(1, 0);

/// Low seven bits of a wait status: the signal that ended the process.
pub(super) const STATUS_SIGNAL: u32 = 0x7f;
const SIGKILL: u32 = 9;

/// How soon after another process of its the first one ends because of it.
const SOON_NS: u64 = 10_000_000_000;

#[btf_tracepoint(function = "sched_process_exit")]
pub(crate) fn on_exit(ctx: BtfTracePointContext) -> i32 {
    let task = Task(pointer_argument(&ctx, 0));
    if !task.is_last_thread() {
        return 0;
    }
    let tgid = current_tgid();
    if let Some(operation) = OPERATIONS.get_ptr(tgid) {
        // SAFETY: a map value, copied at once.
        let operation = unsafe { *operation };
        // The threads of a process may all look like the last when they exit together: who removes the entry is.
        if OPERATIONS.remove(tgid).is_ok() {
            // SAFETY: a local.
            unsafe { runtime_exited(task, &raw const operation) };
        }
        return 0;
    }
    let Some((cgroup, container)) = container_of(current_cgroup()) else { return 0 };
    // SAFETY: a map value; the helper has no requirements.
    unsafe {
        if (*container).init_tgid != tgid {
            return 0;
        }
        let now = bpf_ktime_get_ns();
        (*container).exited_ns = now;
        (*container).exit_status = task.exit_status();
        (*container).flags |= flag::EXIT_SEEN;
        let stopping = (*container).stop_began_ns;
        let status = (*container).exit_status;
        let taken = (*container).flags & flag::OOM_FIRST != 0 && status & STATUS_SIGNAL == SIGKILL;
        let followed = (*container).flags & flag::OOM_OTHER != 0
            && status != 0
            && status & STATUS_SIGNAL == 0
            && stopping == 0
            && now - (*container).oom_ns < SOON_NS;
        if taken || followed {
            (*container).flags |= flag::OOM;
        }
        emit(event::EXITED, now, cgroup, if stopping != 0 { now - stopping } else { 0 }, container);
    }
    0
}

#[inline(always)]
unsafe fn runtime_exited(task: Task, operation: *const Operation) -> Option<()> {
    // SAFETY: the caller passes a valid operation; the containers below are map values.
    unsafe {
        let now = bpf_ktime_get_ns();
        let cgroup = (*operation).cgroup;
        let took = now - (*operation).began_ns;
        let status = task.exit_status();
        let known = CONTAINERS.get_ptr_mut(cgroup);

        if status == 0 {
            let container = known?;
            // `runc run` made its container and ran it; what it took is its start.
            if (*operation).kind == operation::CREATE && (*container).state == state::CREATING {
                (*container).state = state::CREATED;
                (*container).create_ended_ns = now;
                observe_duration(duration::CREATE, took);
                emit(event::CREATED, now, cgroup, took, container);
            }
            return Some(());
        }

        // `runc run` in the foreground exits with its container's code: a failure only if the payload never ran.
        if let Some(container) = known
            && (*operation).kind == operation::RUN
            && (*container).payload_ns != 0
        {
            return Some(());
        }
        count(counter::CREATE_FAILURES);
        let container = match known {
            Some(container) => container,
            None => {
                let container = FAILED_SCRATCH.get_ptr_mut(0)?;
                clear(container);
                (*container).create_began_ns = (*operation).began_ns;
                (*container).operation = (*operation).kind;
                (*container).group = (*operation).group;
                core::ptr::copy_nonoverlapping(
                    (&raw const (*operation).id).cast::<[u64; ID_LEN / 8]>(),
                    (&raw mut (*container).id).cast::<[u64; ID_LEN / 8]>(),
                    1,
                );
                container
            }
        };
        (*container).create_ended_ns = now;
        (*container).exit_status = status;
        (*container).flags |= flag::CREATE_FAILED;
        (*container).state = state::EXITED;
        emit(event::CREATED, now, cgroup, took, container);
    }
    Some(())
}
