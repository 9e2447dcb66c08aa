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
use crate::maps::count;

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

/// Counts what is no message head. Over TCP it may be the middle of one.
#[inline(always)]
pub(super) fn reject(segment: &Segment) {
    count(if segment.is_tcp { counter::DNS_TCP_PARTIAL } else { counter::DNS_MALFORMED });
}

/// Copies the header and as much of the question as fits into the scratch, and returns how much that was. `None`, and
/// counted unless it is a bare acknowledgement, when there is no message.
#[inline(always)]
pub(super) fn load(packet: Packet, segment: &Segment, scratch: *mut Scratch) -> Option<u32> {
    let total = packet.len();
    let mut offset = segment.payload;
    if segment.is_tcp {
        if total <= offset {
            return None;
        }
        // The length of the message stands before it (RFC 1035, 4.2.2).
        offset += 2;
    }
    if total < offset + MIN_LEN {
        reject(segment);
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
pub(super) fn question_type(packet: Packet, segment: &Segment, scratch: *const Scratch, loaded: u32) -> Option<u16> {
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
            let offset = segment.payload + HEADER_LEN + end + 1 + if segment.is_tcp { 2 } else { 0 };
            return packet.get::<u16>(offset).map(u16::from_be);
        }
        let high = read_volatile(question.add(((end + 1) & QUESTION_MASK) as usize));
        let low = read_volatile(question.add(((end + 2) & QUESTION_MASK) as usize));
        Some(u16::from_be_bytes([high, low]))
    }
}
