//! DNS queries as the kernel sees them at the client's socket.

/// Bytes of a question kept in a record: the longest name, its type and class.
pub const QUESTION_LEN: usize = 256;

/// Question types told apart in metrics.
pub mod qtype {
    /// Anything not named here.
    pub const OTHER: u8 = 0;
    /// IPv4 address.
    pub const A: u8 = 1;
    /// IPv6 address.
    pub const AAAA: u8 = 2;
    /// Address to name.
    pub const PTR: u8 = 3;
    /// Service location.
    pub const SRV: u8 = 4;
    /// Their label values, by number.
    pub const NAMES: [&str; 5] = ["other", "A", "AAAA", "PTR", "SRV"];
}

/// Response codes told apart in metrics.
pub mod rcode {
    /// Answered.
    pub const NOERROR: u8 = 0;
    /// The name does not exist.
    pub const NXDOMAIN: u8 = 1;
    /// The server failed.
    pub const SERVFAIL: u8 = 2;
    /// The server refused.
    pub const REFUSED: u8 = 3;
    /// Any other code.
    pub const OTHER: u8 = 4;
    /// No answer came; counted by the agent.
    pub const TIMEOUT: u8 = 5;
    /// Their label values, by number.
    pub const NAMES: [&str; 6] = ["noerror", "nxdomain", "servfail", "refused", "other", "timeout"];
}

/// Bits of a transport.
pub mod transport {
    /// TCP, not UDP.
    pub const TCP: u8 = 1;
    /// IPv6, not IPv4.
    pub const IPV6: u8 = 2;
    /// Their label values, by bits.
    pub const NAMES: [&str; 4] = ["udp", "tcp", "udp6", "tcp6"];
}

/// What tells histograms apart.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HistogramKey {
    /// Who asked; see [`super::group`].
    pub group: u32,
    /// One of [`qtype`].
    pub qtype: u8,
    /// One of [`rcode`].
    pub rcode: u8,
    /// Bits of [`transport`].
    pub transport: u8,
    /// Always 0.
    pub _reserved: u8,
}

/// What pairs an answer with its query. The cookie names the socket in every network namespace, is the same in both
/// directions, and does not change under address translation, as ports and addresses do.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PendingKey {
    /// The socket's cookie.
    pub cookie: u64,
    /// The message's id, as on the wire.
    pub id: u16,
    /// 1 for TCP, 0 for UDP.
    pub tcp: u16,
    /// Always 0.
    pub _reserved: u32,
}

/// A query that waits for its answer.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// When it was first sent.
    pub sent_ns: u64,
    /// The asking process's cgroup.
    pub cgroup: u64,
    /// Who asked.
    pub group: u32,
    /// How often it was sent again.
    pub retransmits: u32,
    /// Its type, as on the wire.
    pub qtype: u16,
    /// Bits of [`transport`].
    pub transport: u16,
    /// Always 0.
    pub _reserved: u32,
}

/// A record of the DNS ring: a slow or failed query.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// When the answer came.
    pub at_ns: u64,
    /// From the first query to the answer.
    pub duration_ns: u64,
    /// The asking process's cgroup.
    pub cgroup: u64,
    /// Who asked.
    pub group: u32,
    /// How often it was sent again.
    pub retransmits: u32,
    /// The message's second word: flags and response code, in host byte order.
    pub flags: u16,
    /// The question's type.
    pub qtype: u16,
    /// Bits of [`transport`].
    pub transport: u16,
    /// Valid bytes of the question.
    pub question_len: u16,
    /// The question as on the wire; the agent decodes the name.
    pub question: [u8; QUESTION_LEN],
}
