//! Packets: finding the transport's payload, cheaply for the many that are no DNS.

use core::{ffi::c_void, mem::MaybeUninit};

use aya_ebpf::{bindings::__sk_buff, helpers::generated::bpf_skb_load_bytes};

use crate::{kernel::constant, maps::CONFIG};

const ETHERTYPE_IPV4: u16 = 0x0800u16.to_be();
const ETHERTYPE_IPV6: u16 = 0x86ddu16.to_be();

const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

const IPV4_HEADER_LEN: u32 = 20;
const IPV6_HEADER_LEN: u32 = 40;
/// Extension headers that may stand before the transport's.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
/// How many of them are walked; real packets have one or two.
const MAX_EXTENSIONS: u32 = 4;

const UDP_HEADER_LEN: u32 = 8;

fn is_extension(next_header: u8) -> bool {
    matches!(next_header, HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION)
}

/// Whether `port`, in network byte order, is one of the configured ones.
#[inline(always)]
pub(super) fn is_dns_port(port: u16) -> bool {
    let ports = constant(&CONFIG.dns_ports);
    port != 0 && (port == ports[0] || port == ports[1] || port == ports[2] || port == ports[3])
}

/// Where a packet's transport payload is.
pub(super) struct Segment {
    /// Ports in network byte order.
    pub(super) source: u16,
    pub(super) destination: u16,
    /// Offset of the payload.
    pub(super) payload: u32,
    pub(super) is_tcp: bool,
}

#[derive(Clone, Copy)]
pub(super) struct Packet(pub(super) *mut __sk_buff);

impl Packet {
    #[inline(always)]
    pub(super) fn len(self) -> u32 {
        // SAFETY: the context's fields are readable.
        unsafe { (*self.0).len }
    }

    #[inline(always)]
    pub(super) fn is_ipv4(self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0).protocol as u16 == ETHERTYPE_IPV4 }
    }

    /// Copies bytes into `to`; false when the packet is shorter.
    #[inline(always)]
    pub(super) fn copy(self, offset: u32, to: *mut c_void, len: u32) -> bool {
        // SAFETY: the verifier checks `to` against `len`.
        unsafe { bpf_skb_load_bytes(self.0 as *const c_void, offset, to, len) == 0 }
    }

    /// Reads a value. The buffer stays uninitialised: zeroing an array becomes a byte-at-a-time call to memset.
    #[inline(always)]
    pub(super) fn get<T: Copy>(self, offset: u32) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the helper fills all of it, or fails.
        self.copy(offset, value.as_mut_ptr().cast(), size_of::<T>() as u32).then(|| unsafe { value.assume_init() })
    }

    /// Decides the common cases, plain IPv4 and IPv6, by reading the packet in place: about 4 ns, where copying its head
    /// costs 50. Options, extension headers and headers outside the linear part answer true and are looked at again.
    #[inline(always)]
    pub(super) fn may_be_dns(self) -> bool {
        // SAFETY: every access is behind a comparison with the end of the data, which the verifier follows.
        unsafe {
            let data = (*self.0).data as usize;
            let end = (*self.0).data_end as usize;
            let ethertype = (*self.0).protocol as u16;
            let start = data as *const u8;
            if ethertype == ETHERTYPE_IPV4 {
                if data + 24 > end {
                    return true;
                }
                let protocol = *start.add(9);
                if protocol != PROTOCOL_UDP && protocol != PROTOCOL_TCP {
                    return false;
                }
                if *start & 15 != 5 {
                    return true;
                }
                let ports = start.add(20).cast::<u16>();
                is_dns_port(*ports) || is_dns_port(*ports.add(1))
            } else if ethertype == ETHERTYPE_IPV6 {
                if data + 44 > end {
                    return true;
                }
                let next_header = *start.add(6);
                if next_header != PROTOCOL_UDP && next_header != PROTOCOL_TCP {
                    return is_extension(next_header);
                }
                let ports = start.add(40).cast::<u16>();
                is_dns_port(*ports) || is_dns_port(*ports.add(1))
            } else {
                false
            }
        }
    }

    /// Finds the transport's payload; `None` for other protocols, other ports and all fragments but the first.
    #[inline(always)]
    pub(super) fn segment(self) -> Option<Segment> {
        let (protocol, offset) = if self.is_ipv4() { self.ipv4()? } else { self.ipv6()? };
        if protocol != PROTOCOL_UDP && protocol != PROTOCOL_TCP {
            return None;
        }
        let [source, destination]: [u16; 2] = self.get(offset)?;
        if !is_dns_port(source) && !is_dns_port(destination) {
            return None;
        }
        let is_tcp = protocol == PROTOCOL_TCP;
        let header = if is_tcp {
            let data_offset: u8 = self.get(offset + 12)?;
            u32::from(data_offset >> 4) * 4
        } else {
            UDP_HEADER_LEN
        };
        Some(Segment { source, destination, payload: offset + header, is_tcp })
    }

    #[inline(always)]
    fn ipv4(self) -> Option<(u8, u32)> {
        let head: [u8; 12] = self.get(0)?;
        let len = u32::from(head[0] & 15) * 4;
        let fragment_offset = u16::from_be_bytes([head[6], head[7]]) & 0x1fff;
        (len >= IPV4_HEADER_LEN && fragment_offset == 0).then_some((head[9], len))
    }

    #[inline(always)]
    fn ipv6(self) -> Option<(u8, u32)> {
        let mut next_header: u8 = self.get(6)?;
        let mut offset = IPV6_HEADER_LEN;
        let mut i = 0;
        while i < MAX_EXTENSIONS && is_extension(next_header) {
            let head: [u8; 4] = self.get(offset)?;
            if next_header == FRAGMENT {
                if u16::from_be_bytes([head[2], head[3]]) & 0xfff8 != 0 {
                    return None;
                }
                offset += 8;
            } else {
                offset += (u32::from(head[1]) + 1) * 8;
            }
            next_header = head[0];
            i += 1;
        }
        Some((next_header, offset))
    }
}
