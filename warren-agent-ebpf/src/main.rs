//! The kernel programs: eight BTF tracepoints that follow containers, two cgroup programs that time DNS.
//!
//! Programs never block, drop or change anything: they read, keep state in maps, and count what they lose.
#![no_std]
#![no_main]
// Atomic additions on map values: `AtomicU64::fetch_add` does not exist for this target.
#![feature(core_intrinsics)]
#![expect(internal_features, reason = "the only way to an atomic addition here")]

mod dns;
mod kernel;
mod lifecycle;
mod maps;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Unreachable: nothing here panics, or the verifier would reject the endless loop.
    loop {}
}

/// Helpers like `bpf_probe_read_kernel` are open to GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
