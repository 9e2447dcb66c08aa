//! Counting DNS queries that nobody answered.
//!
//! The kernel only knows queries that wait. Once a second the agent looks for those that have waited too long, removes
//! them and counts them. Whoever removes an entry accounts for it, so an answer that arrives at the same moment is counted
//! as an answer and not here. Removing and counting are two system calls; an intent written before them lets the next
//! agent finish what this one could not, so that dying between them loses and doubles nothing.

use std::time::Duration;

use warren_agent_ebpf::abi::{SweepIntent, dns, group};

use super::{
    Error, Maps,
    maps::{Written, insert_new},
};

/// Sweeps of the queries that wait for an answer.
#[derive(Clone, Copy, Debug)]
pub struct Sweep {
    /// How long a query may wait.
    pub timeout: Duration,
}

impl Sweep {
    /// Counts the queries that wait since before `now - timeout`, and returns how many they were. `now` is
    /// `CLOCK_MONOTONIC`.
    ///
    /// # Errors
    ///
    /// When a map cannot be written; the next sweep takes it up.
    pub fn run(&self, maps: &Maps, now: Duration) -> Result<u64, Error> {
        let mut written = maps.written();
        recover(&mut written)?;
        let oldest = u64::try_from(now.saturating_sub(self.timeout).as_nanos()).unwrap_or(u64::MAX);
        let expired: Vec<_> =
            written.dns_pending.iter().flatten().filter(|(_, query)| query.sent_ns < oldest).collect();
        let mut counted = 0;
        for (key, query) in expired {
            counted += u64::from(count_timeout(&mut written, key, query)?);
        }
        Ok(counted)
    }
}

fn histogram_key(query: &dns::Pending) -> dns::HistogramKey {
    let qtype = match query.qtype {
        1 => dns::qtype::A,
        28 => dns::qtype::AAAA,
        12 => dns::qtype::PTR,
        33 => dns::qtype::SRV,
        _ => dns::qtype::OTHER,
    };
    dns::HistogramKey {
        group: query.group,
        qtype,
        rcode: dns::rcode::TIMEOUT,
        transport: query.transport as u8,
        _reserved: 0,
    }
}

/// Counts one query; false when its answer was first.
fn count_timeout(written: &mut Written, query: dns::PendingKey, pending: dns::Pending) -> Result<bool, Error> {
    let failed = |source| Error::Map { map: "DNS_TIMEOUTS", source };
    let mut key = histogram_key(&pending);
    // The counter must be there before the query is removed: without room for one, the overflow group's always is.
    if insert_new(&mut written.dns_timeouts, key, 0).is_err() {
        key.group = group::OVERFLOW;
    }
    let count = written.dns_timeouts.get(&key, 0).map_err(failed)? + 1;
    let intent = SweepIntent { query, sent_ns: pending.sent_ns, key, count };
    set_intent(written, intent)?;
    let removed = written.dns_pending.remove(&query).is_ok();
    if removed {
        set_count(written, key, count)?;
    }
    set_intent(written, SweepIntent::default())?;
    Ok(removed)
}

/// Finishes what an agent that died had begun.
fn recover(written: &mut Written) -> Result<(), Error> {
    let intent = written.sweep_intent.get(&0, 0).map_err(|source| Error::Map { map: "SWEEP_INTENT", source })?;
    if intent.sent_ns == 0 {
        return Ok(());
    }
    let waits = written.dns_pending.get(&intent.query, 0).is_ok_and(|query| query.sent_ns == intent.sent_ns);
    if !waits {
        // Removed, and counted or not: setting the same value again does no harm.
        set_count(written, intent.key, intent.count)?;
    }
    set_intent(written, SweepIntent::default())
}

fn set_intent(written: &mut Written, intent: SweepIntent) -> Result<(), Error> {
    written.sweep_intent.set(0, intent, 0).map_err(|source| Error::Map { map: "SWEEP_INTENT", source })
}

fn set_count(written: &mut Written, key: dns::HistogramKey, count: u64) -> Result<(), Error> {
    written.dns_timeouts.insert(key, count, 0).map_err(|source| Error::Map { map: "DNS_TIMEOUTS", source })
}

/// `CLOCK_MONOTONIC` now, as the programs read it.
#[must_use]
pub fn monotonic_now() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}
