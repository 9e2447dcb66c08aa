//! Queries: the clock starts.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    helpers::{
        bpf_ktime_get_ns,
        generated::{bpf_get_socket_cookie, bpf_skb_cgroup_id},
    },
};
use warren_agent_ebpf::abi::{
    counter,
    dns::{Pending, PendingKey, transport},
    group,
};

use super::{
    Scratch,
    message::{self, FLAG_RESPONSE, OPCODE},
    packet::{Packet, Segment, is_dns_port},
    with_scratch,
};
use crate::maps::{DNS_PENDING, GROUPS, count};

#[inline(always)]
pub(super) fn handle(packet: Packet) {
    let Some(segment) = packet.segment() else { return };
    if is_dns_port(segment.destination) {
        // SAFETY: the program's own context.
        let cookie = unsafe { bpf_get_socket_cookie(packet.0.cast()) };
        with_scratch(|scratch| {
            message::for_each(packet, &segment, cookie, false, |start| sent(packet, &segment, start, cookie, scratch));
        });
    }
}

#[inline(always)]
fn sent(packet: Packet, segment: &Segment, start: u32, cookie: u64, scratch: *mut Scratch) {
    let Some(loaded) = message::load(packet, segment, start, cookie, scratch) else { return };
    // SAFETY: the scratch is a map value; the helpers take the program's own context.
    unsafe {
        let flags = u16::from_be((*scratch).header[1]);
        let questions = u16::from_be((*scratch).header[2]);
        // Servers refuse anything but one question.
        if flags & (FLAG_RESPONSE | OPCODE) != 0 || questions != 1 {
            message::reject(segment, cookie);
            return;
        }
        let Some(qtype) = message::question_type(packet, start, scratch, loaded) else {
            count(counter::DNS_MALFORMED);
            return;
        };
        count(counter::DNS_QUERIES);

        let cgroup = bpf_skb_cgroup_id(packet.0);
        let key = PendingKey { cookie, id: (*scratch).header[0], tcp: segment.is_tcp.into(), _reserved: 0 };
        let query = Pending {
            sent_ns: bpf_ktime_get_ns(),
            cgroup,
            group: GROUPS.get(cgroup).copied().unwrap_or(group::HOST),
            retransmits: 0,
            qtype,
            transport: (if segment.is_tcp { transport::TCP } else { 0 }
                | if packet.is_ipv4() { 0 } else { transport::IPV6 })
            .into(),
            _reserved: 0,
        };
        if DNS_PENDING.insert(key, query, BPF_NOEXIST.into()).is_ok() {
            return;
        }
        match DNS_PENDING.get_ptr_mut(key) {
            // The same question again: the user has waited since the first.
            Some(earlier) if (*earlier).qtype == qtype => {
                (*earlier).retransmits += 1;
                count(counter::DNS_RETRANSMITS);
            }
            Some(_) => {
                count(counter::DNS_SUPERSEDED);
                if DNS_PENDING.insert(key, query, BPF_ANY.into()).is_err() {
                    count(counter::DNS_PENDING_FULL);
                }
            }
            None => count(counter::DNS_PENDING_FULL),
        }
    }
}
