//! Following containers from the runtime's execution to the removal of their cgroup.
//!
//! | what happens | how it is seen |
//! |---|---|
//! | create begins, ends | a runtime executes with `create`; its process exits |
//! | the container has a cgroup | that runtime makes one, or a task of its is attached to one |
//! | start begins, the payload runs | a runtime executes with `start`; first execution in the cgroup from outside |
//! | stop begins, ends | first stop signal from outside; the cgroup is empty |

mod cgroup;
mod exec;
mod exit;
mod signal;

use aya_ebpf::helpers::{bpf_get_current_cgroup_id, bpf_get_current_pid_tgid};
use warren_agent_ebpf::abi::{
    container::{CONTAINER_WORDS, Container, Event},
    counter,
};

use crate::maps::{ALIASES, CONTAINERS, LIFECYCLE_RING, count};

#[inline(always)]
fn current_tgid() -> u32 {
    (bpf_get_current_pid_tgid() >> 32) as u32
}

#[inline(always)]
fn current_cgroup() -> u64 {
    // SAFETY: no arguments, no requirements.
    unsafe { bpf_get_current_cgroup_id() }
}

/// The cgroup that stands for the container which `cgroup` is in: itself, unless it was made inside one.
#[inline(always)]
fn container_cgroup(cgroup: u64) -> u64 {
    // SAFETY: the value is copied at once.
    unsafe { ALIASES.get(cgroup).copied().unwrap_or(cgroup) }
}

/// The container that `cgroup` belongs to, with the cgroup that is its key.
#[inline(always)]
fn container_of(cgroup: u64) -> Option<(u64, *mut Container)> {
    if let Some(container) = CONTAINERS.get_ptr_mut(cgroup) {
        return Some((cgroup, container));
    }
    // SAFETY: the value is copied at once.
    let owner = unsafe { ALIASES.get(cgroup).copied()? };
    CONTAINERS.get_ptr_mut(owner).map(|container| (owner, container))
}

/// Clears a container's state word by word: an assignment of zeros becomes a call to a byte loop that the verifier
/// walks once a byte.
#[inline(always)]
unsafe fn clear(container: *mut Container) {
    // SAFETY: the type is a whole number of aligned words; the caller owns the memory.
    unsafe { *container.cast::<[u64; CONTAINER_WORDS]>() = [0; CONTAINER_WORDS] };
}

/// Reports what happened to a container, and counts the report if the ring is full.
#[inline(always)]
unsafe fn emit(kind: u32, at_ns: u64, cgroup: u64, duration_ns: u64, container: *const Container) {
    let Some(mut record) = LIFECYCLE_RING.reserve::<Event>(0) else {
        count(counter::LIFECYCLE_RING_FULL);
        return;
    };
    let event = record.as_mut_ptr();
    // SAFETY: the record is ours until submitted, and every field is written; the container is a map value.
    unsafe {
        (*event).at_ns = at_ns;
        (*event).cgroup = cgroup;
        (*event).duration_ns = duration_ns;
        (*event).kind = kind;
        (*event)._reserved = 0;
        core::ptr::copy_nonoverlapping(
            container.cast::<[u64; CONTAINER_WORDS]>(),
            (&raw mut (*event).container).cast::<[u64; CONTAINER_WORDS]>(),
            1,
        );
    }
    record.submit(0);
}
