//! Timing DNS queries at the client's socket.
//!
//! The programs sit on a v2 cgroup and see the packets of the sockets below it, in every network namespace, both ways. A
//! query starts the clock where the packet leaves the socket's host stack, its answer stops it at delivery. Servers on
//! the same host send *from* and receive *on* the port; those packets are not looked at further.

mod egress;
mod ingress;
mod message;
mod packet;

use aya_ebpf::{
    macros::{cgroup_skb, map},
    maps::PerCpuArray,
    programs::SkBuffContext,
};
use warren_agent_ebpf::abi::{
    counter,
    dns::{Event, QUESTION_LEN},
};

use crate::maps::count;

/// Lets the packet pass; the programs never do anything else.
const PASS: i32 = 1;

/// Words of a DNS message's header.
const HEADER_WORDS: usize = 6;
/// Bytes of a DNS message's header.
const HEADER_LEN: u32 = 12;

/// A message as copied from a packet, and a record to report it with: too large for the stack.
#[repr(C)]
struct Scratch {
    header: [u16; HEADER_WORDS],
    question: [u8; QUESTION_LEN],
    // Keeps the event aligned to 8 behind 12 + 256 bytes.
    _reserved: u32,
    event: Event,
}

/// How often the two programs may interrupt one another on one CPU: a process sends, a softirq receives meanwhile.
const SCRATCHES: u32 = 2;

#[map]
static DNS_SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(SCRATCHES, 0);
#[map]
static DNS_NESTING: PerCpuArray<u32> = PerCpuArray::with_max_entries(1, 0);

/// Runs `work` with a scratch of its own. Interrupts nest, so a plain depth counter is enough.
#[inline(always)]
fn with_scratch(work: impl FnOnce(*mut Scratch)) {
    let Some(depth) = DNS_NESTING.get_ptr_mut(0) else { return };
    // SAFETY: this CPU's map value; whoever interrupts between these lines restores it before they go on.
    unsafe {
        let mine = core::ptr::read_volatile(depth);
        if mine >= SCRATCHES {
            count(counter::DNS_NESTED);
            return;
        }
        core::ptr::write_volatile(depth, mine + 1);
        if let Some(scratch) = DNS_SCRATCH.get_ptr_mut(mine) {
            work(scratch);
        }
        core::ptr::write_volatile(depth, mine);
    }
}

#[cgroup_skb(egress)]
pub(crate) fn dns_egress(ctx: SkBuffContext) -> i32 {
    let packet = packet::Packet(ctx.skb.skb);
    if packet.may_be_dns() {
        egress::handle(packet);
    }
    PASS
}

#[cgroup_skb(ingress)]
pub(crate) fn dns_ingress(ctx: SkBuffContext) -> i32 {
    let packet = packet::Packet(ctx.skb.skb);
    if packet.may_be_dns() {
        ingress::handle(packet);
    }
    PASS
}

/// Does nothing: what the benchmark compares the others with.
#[cgroup_skb(egress)]
pub(crate) fn empty(_ctx: SkBuffContext) -> i32 {
    PASS
}
