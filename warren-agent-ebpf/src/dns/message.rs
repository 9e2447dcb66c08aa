//! DNS messages: the header and the first question.

use core::ptr::read_volatile;

use warren_agent_ebpf::abi::{
    counter,
    dns::{QUESTION_LEN, qtype},
};

use super::{
    HEADER_LEN, Scratch,
    packet::{Packet, Segment},
};
use crate::maps::{DNS_LOSSY, count};

/// A header, the root's name, a type and a class.
const MIN_LEN: u32 = HEADER_LEN + 5;
const MAX_LEN: u32 = HEADER_LEN + QUESTION_LEN as u32;

/// Labels of the longest name, and its end.
const MAX_LABELS: u32 = 128;
const MAX_LABEL_LEN: u32 = 63;
/// Octets of the longest name without its end (RFC 1035, 3.1).
const MAX_NAME_LEN: u32 = 254;
const QUESTION_MASK: u32 = QUESTION_LEN as u32 - 1;

/// Header flags (RFC 1035, 4.1.1).
pub(super) const FLAG_RESPONSE: u16 = 0x8000;
pub(super) const OPCODE: u16 = 0x7800;
pub(super) const FLAG_TRUNCATED: u16 = 0x0200;
pub(super) const RCODE: u16 = 0x000f;

/// The type's class in metrics.
pub(super) fn qtype_class(wire: u16) -> u8 {
    match wire {
        1 => qtype::A,
        28 => qtype::AAAA,
        12 => qtype::PTR,
        33 => qtype::SRV,
        _ => qtype::OTHER,
    }
}

/// Messages that are looked for in one TCP segment. More are counted as lost.
const MAX_MESSAGES: u32 = 4;
/// Bytes of the length that stands before a message over TCP (RFC 1035, 4.2.2).
const PREFIX_LEN: u32 = 2;

/// Counts what is no message. Over TCP it may be the middle of one: that connection's answers may match nothing then, which
/// is no other loss.
#[inline(always)]
pub(super) fn reject(segment: &Segment, cookie: u64) {
    if segment.is_tcp {
        count(counter::DNS_TCP_PARTIAL);
        let _ = DNS_LOSSY.insert(cookie, 1, 0);
    } else {
        count(counter::DNS_MALFORMED);
    }
}

/// Whether something of this TCP connection was counted as lost.
#[inline(always)]
pub(super) fn is_lossy(segment: &Segment, cookie: u64) -> bool {
    segment.is_tcp && DNS_LOSSY.get_ptr(cookie).is_some()
}

/// Whether a message's header might begin there.
#[inline(always)]
fn is_plausible(packet: Packet, start: u32, response: bool) -> bool {
    // The message's id is anything; then come the flags and the number of questions.
    let Some([flags, questions]) = packet.get::<[u16; 2]>(start + 2) else { return false };
    let flags = u16::from_be(flags) & (FLAG_RESPONSE | OPCODE);
    if response { flags == FLAG_RESPONSE } else { flags == 0 && u16::from_be(questions) == 1 }
}

/// Calls `each` with the offset of every message in a packet. Over TCP there may be several, each behind its length; the
/// length may have come in a segment of its own, and what does not begin a message is counted.
#[inline(always)]
pub(super) fn for_each(packet: Packet, segment: &Segment, cookie: u64, response: bool, mut each: impl FnMut(u32)) {
    if !segment.is_tcp {
        each(segment.payload);
        return;
    }
    let total = packet.len();
    let mut at = segment.payload;
    let mut i = 0;
    while i < MAX_MESSAGES {
        // A bare acknowledgement, or a length whose message is still to come.
        if at >= total || total - at <= PREFIX_LEN {
            return;
        }
        if is_plausible(packet, at + PREFIX_LEN, response) {
            let Some(length) = packet.get::<u16>(at) else { return };
            each(at + PREFIX_LEN);
            at += PREFIX_LEN + u32::from(u16::from_be(length));
        } else {
            if i == 0 && is_plausible(packet, at, response) {
                each(at);
            } else {
                reject(segment, cookie);
            }
            return;
        }
        i += 1;
    }
    if at < total {
        reject(segment, cookie);
    }
}

/// Copies the header and as much of the question as fits into the scratch, and returns how much that was. `None`, and
/// counted, when there is no message.
#[inline(always)]
pub(super) fn load(packet: Packet, segment: &Segment, start: u32, cookie: u64, scratch: *mut Scratch) -> Option<u32> {
    let total = packet.len();
    let offset = start;
    if total < offset + MIN_LEN {
        reject(segment, cookie);
        return None;
    }
    let wanted = u64::from((total - offset).min(MAX_LEN));
    // LLVM proves this check redundant and removes it; the verifier cannot follow the proof and rejects the access
    // ("invalid zero-sized read"). A volatile copy hides the value's origin from LLVM.
    // SAFETY: a local.
    let len = unsafe { read_volatile(&wanted) };
    if len < u64::from(MIN_LEN) || len > u64::from(MAX_LEN) {
        return None;
    }
    // SAFETY: the scratch is a map value, its question follows its header.
    let to = unsafe { (&raw mut (*scratch).header).cast() };
    packet.copy(offset, to, len as u32).then_some(len as u32)
}

/// Walks the question's name and returns its type; `None` when malformed.
#[inline(always)]
pub(super) fn question_type(packet: Packet, start: u32, scratch: *const Scratch, loaded: u32) -> Option<u16> {
    // SAFETY: every access is masked into the question's 256 bytes.
    unsafe {
        let question = (&raw const (*scratch).question).cast::<u8>();
        let mut end: u32 = 0;
        let mut labels = 0;
        while labels < MAX_LABELS {
            labels += 1;
            if end > MAX_NAME_LEN {
                return None;
            }
            let len = u32::from(read_volatile(question.add((end & QUESTION_MASK) as usize)));
            if len == 0 {
                break;
            }
            // Compression has nothing to point at in a query's only question.
            if len > MAX_LABEL_LEN {
                return None;
            }
            end += len + 1;
        }
        if end > MAX_NAME_LEN {
            return None;
        }
        // The type of a name of 250 octets and more lies beyond the copy.
        if HEADER_LEN + end + 5 > loaded || end > 250 {
            return packet.get::<u16>(start + HEADER_LEN + end + 1).map(u16::from_be);
        }
        let high = read_volatile(question.add(((end + 1) & QUESTION_MASK) as usize));
        let low = read_volatile(question.add(((end + 2) & QUESTION_MASK) as usize));
        Some(u16::from_be_bytes([high, low]))
    }
}
