//! Executions: of runtimes, whose command line says what they do to which container, and of payloads.

use aya_ebpf::{
    helpers::{bpf_get_current_comm, bpf_get_current_uid_gid, bpf_ktime_get_ns, generated::bpf_probe_read_user_str},
    macros::{btf_tracepoint, map},
    maps::PerCpuArray,
    programs::BtfTracePointContext,
};
use warren_agent_ebpf::abi::{
    ContainerId, ID_LEN, RUNTIMES as RUNTIME_NAMES,
    container::{Operation, duration, event, flag, operation, state},
    counter, group,
};

use super::{container_cgroup, container_of, current_cgroup, current_tgid, emit};
use crate::{
    kernel::{Task, constant, pointer_argument, untyped},
    maps::{CONFIG, CONTAINERS, IDS, OPERATIONS, REGISTRY, RUNTIMES, count, observe_duration},
};

/// Too large for the stack. Executions do not nest on a CPU.
#[map]
static OPERATION_SCRATCH: PerCpuArray<Operation> = PerCpuArray::with_max_entries(1, 0);

/// Arguments of a runtime's command line that are looked at; containerd's shim passes about ten.
const MAX_ARGUMENTS: usize = 24;

/// The first eight bytes of a word, as the programs compare it: longer words are cut, shorter ones zero-padded.
const fn word(text: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let mut i = 0;
    while i < text.len() && i < bytes.len() {
        bytes[i] = text[i];
        i += 1;
    }
    u64::from_ne_bytes(bytes)
}

/// What a runtime's argument asks for; 0 when it is no operation of interest.
#[inline(always)]
fn operation_named(first_bytes: u64) -> u32 {
    if first_bytes == const { word(b"create") } {
        operation::CREATE
    } else if first_bytes == const { word(b"start") } {
        operation::START
    } else if first_bytes == const { word(b"run") } {
        operation::RUN
    } else {
        0
    }
}

/// The name of the task, if it is a runtime's.
#[inline(always)]
fn runtime() -> Option<u64> {
    let Ok(comm) = bpf_get_current_comm() else { return None };
    let name = u64::from_ne_bytes([comm[0], comm[1], comm[2], comm[3], comm[4], comm[5], comm[6], comm[7]]);
    let mut i = 0;
    while i < RUNTIME_NAMES.len() as u32 {
        if let Some(runtime) = RUNTIMES.get(i)
            && *runtime == name
            && name != 0
        {
            return Some(name);
        }
        i += 1;
    }
    None
}

#[btf_tracepoint(function = "sched_process_exec")]
pub(crate) fn on_exec(ctx: BtfTracePointContext) -> i32 {
    let task = Task(pointer_argument(&ctx, 0));
    if let Some(runtime) = runtime() {
        // Anybody may name a program `runc`, root of an ordinary container too.
        if bpf_get_current_uid_gid() as u32 == 0 && task.may_make_containers() {
            runtime_executed(task, runtime);
        }
    } else {
        payload_executed(task);
    }
    0
}

#[inline(always)]
fn runtime_executed(task: Task, runtime: u64) -> Option<()> {
    // SAFETY: no arguments, no requirements.
    let now = unsafe { bpf_ktime_get_ns() };
    let scratch = OPERATION_SCRATCH.get_ptr_mut(0)?;
    let (start, end) = task.arguments()?;
    // SAFETY: `scratch` is this CPU's map value.
    unsafe {
        (*scratch).began_ns = now;
        (*scratch).cgroup = 0;
        (*scratch).stop_signals = 0;
        (*scratch).kind = 0;
        (*scratch).group = group::UNASSIGNED;
        (*scratch).level = 0;
        (*scratch).flags = if runtime == const { word(b"runsc") } { flag::SANDBOXED } else { 0 };
        let id = &raw mut (*scratch).id;
        let mut argument = start;
        let mut i = 0;
        while i < MAX_ARGUMENTS && argument < end {
            i += 1;
            // The id is a map key: every byte of it must be defined. The last argument stays.
            *id.cast::<[u64; ID_LEN / 8]>() = [0; ID_LEN / 8];
            let length = bpf_probe_read_user_str(untyped(id), ID_LEN as u32, argument as *const _);
            if length <= 0 {
                break;
            }
            if (*scratch).kind == 0 {
                (*scratch).kind = operation_named(core::ptr::read_unaligned(id.cast::<u64>()));
            }
            argument += length as u64;
        }
        if (*scratch).kind == 0 {
            return None;
        }
        let id: &ContainerId = &*id;
        if let Some(registration) = REGISTRY.get(id) {
            (*scratch).group = registration.group;
            (*scratch).stop_signals = registration.stop_signals;
        } else if constant(&CONFIG.registered_only) != 0 {
            return None;
        }
        if (*scratch).kind == operation::START {
            let cgroup = *IDS.get(id)?;
            let container = CONTAINERS.get_ptr_mut(cgroup)?;
            // Only once: a program of that name inside the container must not begin it again.
            if (*container).state == state::CREATED || (*container).state == state::CREATING {
                (*container).start_began_ns = now;
                (*container).state = state::STARTING;
            }
        } else if OPERATIONS.insert(current_tgid(), *scratch, 0).is_err() {
            count(counter::LIFECYCLE_MAP_FULL);
        }
    }
    Some(())
}

/// Takes an execution in a container's cgroup for the payload's if the container waits for it and the task's parent, the
/// runtime or its shim, is outside. OCI hooks run inside the cgroup too, as children of the container's first process.
#[inline(always)]
fn payload_executed(task: Task) -> Option<()> {
    let (cgroup, container) = container_of(current_cgroup())?;
    // SAFETY: `container` is a map value.
    unsafe {
        match (*container).state {
            state::CREATED | state::STARTING => {}
            // `runc run` starts its container before it exits. Its own re-executions in the cgroup, which happen before
            // the container's PID namespace exists, are not the payload's.
            state::CREATING if (*container).operation == operation::RUN => {
                if task.pid_namespace_level()? == task.real_parent()?.pid_namespace_level()? {
                    return None;
                }
            }
            _ => return None,
        }
        if container_cgroup(task.real_parent()?.cgroup_id()) == cgroup {
            return None;
        }
        let now = bpf_ktime_get_ns();
        let began = if (*container).start_began_ns != 0 {
            (*container).start_began_ns
        } else if (*container).operation == operation::RUN {
            (*container).create_began_ns
        } else {
            (*container).cgroup_made_ns
        };
        (*container).init_tgid = current_tgid();
        (*container).payload_ns = now;
        (*container).state = state::RUNNING;
        let took = now - began;
        observe_duration(duration::START, took);
        emit(event::STARTED, now, cgroup, took, container);
    }
    Some(())
}
