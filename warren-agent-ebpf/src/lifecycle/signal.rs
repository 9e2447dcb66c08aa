//! Stop signals and the OOM killer.

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::{btf_tracepoint, map},
    maps::PerCpuArray,
    programs::BtfTracePointContext,
};
use warren_agent_ebpf::abi::{
    container::{Container, event, flag, state},
    counter,
};

use super::{container_cgroup, container_of, current_cgroup, emit};
use crate::{
    kernel::{Task, constant, int_argument, pointer_argument},
    maps::{CONFIG, count},
};

const SIGKILL: i32 = 9;
const SIGCHLD: i32 = 17;
const SIGURG: i32 = 23;
/// `TRACE_SIGNAL_IGNORED`: the target has no handler for it, or is pid 1 of its namespace and has none.
const IGNORED: i32 = 1;

/// Whom the OOM killer is about to name: `[pid, tgid, cgroup]`. On 5.10 the OOM tracepoint carries only a pid, but the victim's
/// SIGKILL was generated just before, on this CPU and under a spin lock.
#[map]
static OOM_VICTIM: PerCpuArray<[u64; 3]> = PerCpuArray::with_max_entries(1, 0);

#[btf_tracepoint(function = "signal_generate")]
pub(crate) fn on_signal(ctx: BtfTracePointContext) -> i32 {
    let signal = int_argument(&ctx, 0);
    // The bulk of all signals: children's exits, and the preemption of Go's scheduler.
    if signal == SIGCHLD || signal == SIGURG || !(1..=63).contains(&signal) {
        return 0;
    }
    let task = Task(pointer_argument(&ctx, 2));
    let target = task.cgroup_id();
    if signal == SIGKILL
        && constant(&CONFIG.oom_argument_is_pid) != 0
        && let Some(victim) = OOM_VICTIM.get_ptr_mut(0)
    {
        // SAFETY: this CPU's map value.
        unsafe { *victim = [task.pid().into(), task.tgid().into(), target] };
    }
    let Some((cgroup, container)) = container_of(target) else { return 0 };
    // SAFETY: a map value.
    unsafe { signalled(signal, int_argument(&ctx, 4), task, cgroup, container) };
    0
}

#[inline(always)]
unsafe fn signalled(signal: i32, result: i32, task: Task, cgroup: u64, container: *mut Container) {
    // SAFETY: the caller passes a map value.
    unsafe {
        let begins_stop = signal == SIGKILL || ((*container).stop_signals >> (signal as u32 & 63)) & 1 == 1;
        if !begins_stop
            || (*container).init_tgid == 0
            || task.tgid() != (*container).init_tgid
            || (*container).flags & flag::EXIT_SEEN != 0
            // What a container does to itself is not a stop.
            || container_cgroup(current_cgroup()) == cgroup
        {
            return;
        }
        let now = bpf_ktime_get_ns();
        if result == IGNORED && (*container).flags & flag::SIGNAL_IGNORED == 0 {
            (*container).flags |= flag::SIGNAL_IGNORED;
            count(counter::SIGNALS_IGNORED);
        }
        let first = (*container).stop_began_ns == 0;
        if first {
            (*container).stop_began_ns = now;
            (*container).stop_signal = signal as u32;
            (*container).state = state::STOPPING;
        }
        if signal == SIGKILL {
            let again = (*container).flags & flag::KILLED != 0;
            (*container).flags |= flag::KILLED;
            if !again {
                (*container).kill_ns = now;
            }
            if !first && !again {
                count(counter::STOP_ESCALATIONS);
                emit(event::ESCALATED, now, cgroup, now - (*container).stop_began_ns, container);
            }
        }
        if first {
            emit(event::STOP_BEGAN, now, cgroup, 0, container);
        }
    }
}

#[btf_tracepoint(function = "mark_victim")]
pub(crate) fn on_oom(ctx: BtfTracePointContext) -> i32 {
    let (tgid, target) = if constant(&CONFIG.oom_argument_is_pid) != 0 {
        let Some(victim) = OOM_VICTIM.get_ptr(0) else { return 0 };
        // SAFETY: this CPU's map value.
        let [pid, tgid, cgroup] = unsafe { *victim };
        if pid != int_argument(&ctx, 0) as u64 {
            return 0;
        }
        (tgid as u32, cgroup)
    } else {
        let victim = Task(pointer_argument(&ctx, 0));
        (victim.tgid(), victim.cgroup_id())
    };
    if let Some((_, container)) = container_of(target) {
        // SAFETY: a map value; the helper has no requirements.
        unsafe {
            (*container).flags |= if tgid == (*container).init_tgid { flag::OOM_FIRST } else { flag::OOM_OTHER };
            (*container).oom_ns = bpf_ktime_get_ns();
        }
    }
    0
}
