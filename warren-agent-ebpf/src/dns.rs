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

use crate::maps::{add, count};

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

/// How many messages may be parsed at once on one CPU: a process sends, another preempts it, a softirq receives meanwhile.
const SCRATCHES: u32 = 2;

#[map]
static DNS_SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(SCRATCHES, 0);
/// How many want each scratch; whoever finds to be the only one has it.
#[map]
static DNS_CLAIMS: PerCpuArray<u64> = PerCpuArray::with_max_entries(SCRATCHES, 0);

/// Runs `work` with a scratch of its own. Claims are additions, so that it does not matter who interrupts whom.
#[inline(always)]
fn with_scratch(work: impl FnOnce(*mut Scratch)) {
    let mut slot = 0;
    while slot < SCRATCHES {
        let Some(claims) = DNS_CLAIMS.get_ptr_mut(slot) else { return };
        // SAFETY: this CPU's map value.
        unsafe {
            add(claims, 1);
            if core::ptr::read_volatile(claims) == 1 {
                break;
            }
            add(claims, u64::MAX);
        }
        slot += 1;
    }
    if slot >= SCRATCHES {
        count(counter::DNS_NESTED);
        return;
    }
    if let Some(scratch) = DNS_SCRATCH.get_ptr_mut(slot) {
        work(scratch);
    }
    if let Some(claims) = DNS_CLAIMS.get_ptr_mut(slot) {
        // SAFETY: this CPU's map value. Adding all ones takes one away.
        unsafe { add(claims, u64::MAX) };
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
