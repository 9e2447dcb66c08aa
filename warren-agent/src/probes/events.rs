//! Draining the rings.

use std::io;

use aya::maps::{MapData, RingBuf};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::mpsc,
};
use warren_agent_ebpf::abi::{
    container::{self, event, flag},
    dns,
};

/// What happened to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Its create ended, well or not.
    Created,
    /// Its payload runs.
    Started,
    /// A stop signal was sent.
    StopBegan,
    /// SIGKILL followed.
    Escalated,
    /// Its first process exited.
    Exited,
    /// Its last process is gone.
    Stopped,
    /// Its cgroup is gone.
    Removed,
}

/// A record of the lifecycle ring.
#[derive(Clone, Debug)]
pub struct LifecycleEvent {
    /// What happened.
    pub phase: Phase,
    /// To which container.
    pub id: String,
    /// Its cgroup.
    pub cgroup: u64,
    /// The duration that this event ends, in nanoseconds; 0 if none.
    pub duration_ns: u64,
    /// The container afterwards.
    pub container: container::Container,
}

impl LifecycleEvent {
    fn read(bytes: &[u8]) -> Option<Self> {
        let record: container::Event = read(bytes)?;
        let phase = match record.kind {
            event::CREATED => Phase::Created,
            event::STARTED => Phase::Started,
            event::STOP_BEGAN => Phase::StopBegan,
            event::ESCALATED => Phase::Escalated,
            event::EXITED => Phase::Exited,
            event::STOPPED => Phase::Stopped,
            event::REMOVED => Phase::Removed,
            _ => return None,
        };
        let id = String::from_utf8_lossy(&record.container.id).trim_end_matches('\0').to_owned();
        Some(Self { phase, id, cgroup: record.cgroup, duration_ns: record.duration_ns, container: record.container })
    }

    /// Whether one of [`flag`] is set.
    #[must_use]
    pub fn has(&self, flag: u32) -> bool {
        self.container.flags & flag != 0
    }

    /// The exit code as a shell shows it: 128 + signal for a signal. `None` before the exit.
    #[must_use]
    pub fn exit_code(&self) -> Option<i32> {
        let status = self.container.exit_status;
        self.has(flag::EXIT_SEEN).then(|| match status & 0x7f {
            0 => (status >> 8 & 0xff) as i32,
            signal => 128 + signal as i32,
        })
    }
}

/// A record of the DNS ring: a slow or failed query.
#[derive(Clone, Debug)]
pub struct DnsEvent {
    /// The name that was asked for.
    pub name: String,
    /// Its type, as on the wire.
    pub qtype: u16,
    /// The response code.
    pub rcode: u16,
    /// From query to answer, in nanoseconds.
    pub duration_ns: u64,
    /// How often the query was sent again.
    pub retransmits: u32,
    /// The asking process's cgroup.
    pub cgroup: u64,
    /// Whom it is accounted to.
    pub group: u32,
}

impl DnsEvent {
    fn read(bytes: &[u8]) -> Option<Self> {
        let record: dns::Event = read(bytes)?;
        let len = usize::from(record.question_len).min(record.question.len());
        Some(Self {
            name: decode_name(&record.question[..len]),
            qtype: record.qtype,
            rcode: record.flags & 0xf,
            duration_ns: record.duration_ns,
            retransmits: record.retransmits,
            cgroup: record.cgroup,
            group: record.group,
        })
    }
}

/// A domain name from its wire form; escaped as in zone files (RFC 1035, 5.1), ending in `…` when cut.
#[must_use]
pub fn decode_name(wire: &[u8]) -> String {
    let mut name = String::new();
    let mut rest = wire;
    loop {
        match rest.split_first() {
            Some((0, _)) if name.is_empty() => return ".".to_owned(),
            Some((0, _)) => return name,
            Some((len, tail)) if usize::from(*len) <= tail.len() && *len < 64 => {
                let (label, tail) = tail.split_at(usize::from(*len));
                for byte in label {
                    match byte {
                        b'.' | b'\\' => name.extend(['\\', char::from(*byte)]),
                        b'!'..=b'~' => name.push(char::from(*byte)),
                        _ => name.push_str(&format!("\\{byte:03}")),
                    }
                }
                name.push('.');
                rest = tail;
            }
            _ => {
                name.push('…');
                return name;
            }
        }
    }
}

fn read<T: Copy>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: long enough; the types are integers and byte arrays, for which every pattern is a value.
    Some(unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
}

/// Drains the lifecycle ring into `events` until the receiver is gone.
///
/// # Errors
///
/// When the ring can no longer be waited for.
pub async fn drain_lifecycle(ring: RingBuf<MapData>, events: mpsc::Sender<LifecycleEvent>) -> io::Result<()> {
    drain(ring, LifecycleEvent::read, events).await
}

/// Drains the DNS ring into `events` until the receiver is gone.
///
/// # Errors
///
/// When the ring can no longer be waited for.
pub async fn drain_dns(ring: RingBuf<MapData>, events: mpsc::Sender<DnsEvent>) -> io::Result<()> {
    drain(ring, DnsEvent::read, events).await
}

async fn drain<T>(ring: RingBuf<MapData>, read: fn(&[u8]) -> Option<T>, events: mpsc::Sender<T>) -> io::Result<()> {
    // SAFETY: the ring owns its descriptor, which stays the same and open as long as it lives.
    let mut ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }?;
    loop {
        // What is there already wakes nobody: look first, wait then. Readiness is edge-triggered, so all must be taken
        // before it is cleared.
        while let Some(event) = next(ring.get_mut(), read) {
            if events.send(event).await.is_err() {
                return Ok(());
            }
        }
        tokio::select! {
            ready = ring.readable_mut() => ready?.clear_ready(),
            () = events.closed() => return Ok(()),
        }
    }
}

/// The next record that can be read.
fn next<T>(ring: &mut RingBuf<MapData>, read: fn(&[u8]) -> Option<T>) -> Option<T> {
    loop {
        if let Some(event) = read(&ring.next()?) {
            return Some(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::decode_name;

    #[test]
    fn names_are_decoded() {
        assert_eq!(decode_name(b"\x03www\x07example\x00rest"), "www.example.");
        assert_eq!(decode_name(b"\x00"), ".");
        assert_eq!(decode_name(b"\x03a.b\x00"), "a\\.b.");
        assert_eq!(decode_name(b"\x02\x00\xff\x00"), "\\000\\255.");
        assert_eq!(decode_name(b"\x05ab"), "…");
        assert_eq!(decode_name(b""), "…");
        assert_eq!(decode_name(b"\xc0\x0c"), "…");
    }
}
