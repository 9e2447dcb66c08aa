//! Indices into the per-CPU array of event counters. All of them only grow.

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[expect(non_camel_case_types, clippy::upper_case_acronyms, reason = "only used to number the constants")]
        #[repr(u32)]
        enum Index { $($name,)* END }
        $($(#[$doc])* pub const $name: u32 = Index::$name as u32;)*
        /// How many counters there are.
        pub const COUNT: u32 = Index::END as u32;
        /// Their names, by index.
        pub const NAMES: [&str; COUNT as usize] = [$(stringify!($name)),*];
    };
}

counters! {
    /// Lifecycle records that found the ring full.
    LIFECYCLE_RING_FULL,
    /// Entries that did not fit in a lifecycle map.
    LIFECYCLE_MAP_FULL,
    /// Failed `runc create`.
    CREATE_FAILURES,
    /// Containers whose payload never ran.
    START_FAILURES,
    /// Stop signals that the first process had no handler for.
    SIGNALS_IGNORED,
    /// Stops that needed SIGKILL after another signal.
    STOP_ESCALATIONS,
    /// Containers that exited with 0.
    EXITS_COMPLETED,
    /// Containers that failed by themselves.
    EXITS_ERROR,
    /// Containers that ended for want of memory.
    EXITS_OOM,
    /// Containers that a signal from outside ended.
    EXITS_KILLED,
    /// DNS queries sent, retransmissions included.
    DNS_QUERIES,
    /// Queries sent again before they were answered.
    DNS_RETRANSMITS,
    /// Queries whose place another question with the same socket and id took.
    DNS_SUPERSEDED,
    /// Answers that matched a query.
    DNS_MATCHED,
    /// Answers that matched none.
    DNS_UNMATCHED,
    /// Answers that were truncated.
    DNS_TRUNCATED,
    /// Packets on a DNS port that are no DNS message.
    DNS_MALFORMED,
    /// TCP segments that hold something besides whole messages, or begin none.
    DNS_TCP_PARTIAL,
    /// Queries that did not fit in the map of pending ones.
    DNS_PENDING_FULL,
    /// Observations that did not fit in the map of histograms, not even under the overflow group.
    DNS_HISTOGRAM_FULL,
    /// DNS records that found the ring full.
    DNS_RING_FULL,
    /// Messages skipped because one was being parsed on the same CPU, twice over.
    DNS_NESTED,
}
