//! Answers: the clock stops.

use aya_ebpf::helpers::{bpf_ktime_get_ns, generated::bpf_get_socket_cookie};
use warren_agent_ebpf::abi::{
    counter,
    dns::{Event, HistogramKey, Pending, PendingKey, QUESTION_LEN, rcode},
};

use super::{
    HEADER_LEN, Scratch,
    message::{self, FLAG_RESPONSE, FLAG_TRUNCATED, OPCODE, RCODE},
    packet::{Packet, Segment, is_dns_port},
    with_scratch,
};
use crate::{
    kernel::constant,
    maps::{CONFIG, DNS_PENDING, DNS_RING, count, observe_dns},
};

#[inline(always)]
pub(super) fn handle(packet: Packet) {
    let Some(segment) = packet.segment() else { return };
    if is_dns_port(segment.source) {
        // SAFETY: the program's own context.
        let cookie = unsafe { bpf_get_socket_cookie(packet.0.cast()) };
        with_scratch(|scratch| {
            message::for_each(packet, &segment, cookie, true, |start| {
                received(packet, &segment, start, cookie, scratch)
            });
        });
    }
}

fn rcode_class(code: u16) -> u8 {
    match code {
        0 => rcode::NOERROR,
        2 => rcode::SERVFAIL,
        3 => rcode::NXDOMAIN,
        5 => rcode::REFUSED,
        _ => rcode::OTHER,
    }
}

#[inline(always)]
fn received(packet: Packet, segment: &Segment, start: u32, cookie: u64, scratch: *mut Scratch) {
    let Some(loaded) = message::load(packet, segment, start, cookie, scratch) else { return };
    // SAFETY: the scratch is a map value; the helpers take the program's own context.
    unsafe {
        let flags = u16::from_be((*scratch).header[1]);
        if flags & (FLAG_RESPONSE | OPCODE) != FLAG_RESPONSE {
            message::reject(segment, cookie);
            return;
        }
        let key = PendingKey { cookie, id: (*scratch).header[0], tcp: segment.is_tcp.into(), _reserved: 0 };
        let Some(query) = DNS_PENDING.get_ptr(key) else {
            // Its query was counted as lost where it was sent.
            if !message::is_lossy(segment, cookie) {
                count(counter::DNS_UNMATCHED);
            }
            return;
        };
        let query = *query;
        let now = bpf_ktime_get_ns();
        let took = now - query.sent_ns;
        // Too late: the agent's sweep may be counting this query as unanswered right now, or died doing so.
        let timeout = constant(&CONFIG.dns_timeout_ns);
        if timeout != 0 && took >= timeout {
            count(counter::DNS_UNMATCHED);
            return;
        }
        // Whoever removes the entry accounts for the query: this program, or the agent's sweep.
        if DNS_PENDING.remove(key).is_err() {
            count(counter::DNS_UNMATCHED);
            return;
        }
        count(counter::DNS_MATCHED);
        if flags & FLAG_TRUNCATED != 0 {
            count(counter::DNS_TRUNCATED);
        }
        let code = flags & RCODE;
        let histogram = HistogramKey {
            group: query.group,
            qtype: message::qtype_class(query.qtype),
            rcode: rcode_class(code),
            transport: query.transport as u8,
            _reserved: 0,
        };
        observe_dns(&histogram, took);

        let slow = constant(&CONFIG.dns_slow_ns);
        if slow != 0 && (took >= slow || code != 0 || flags & FLAG_TRUNCATED != 0) {
            report(&query, flags, now, took, loaded, scratch);
        }
    }
}

#[inline(always)]
unsafe fn report(query: &Pending, flags: u16, now: u64, took: u64, loaded: u32, scratch: *mut Scratch) {
    // SAFETY: the caller passes a map value.
    unsafe {
        let event = &raw mut (*scratch).event;
        (*event).at_ns = now;
        (*event).duration_ns = took;
        (*event).cgroup = query.cgroup;
        (*event).group = query.group;
        (*event).retransmits = query.retransmits;
        (*event).flags = flags;
        (*event).qtype = query.qtype;
        (*event).transport = query.transport;
        (*event).question_len = (loaded - HEADER_LEN) as u16;
        core::ptr::copy_nonoverlapping(
            (&raw const (*scratch).question).cast::<[u32; QUESTION_LEN / 4]>(),
            (&raw mut (*event).question).cast::<[u32; QUESTION_LEN / 4]>(),
            1,
        );
        if DNS_RING.output::<Event>(&*event, 0).is_err() {
            count(counter::DNS_RING_FULL);
        }
    }
}
