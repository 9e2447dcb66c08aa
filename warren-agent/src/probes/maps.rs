//! The maps, as the agent reads and writes them.

use std::{
    collections::BTreeSet,
    fmt, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf};
use warren_agent_ebpf::{
    abi::{ContainerId, GroupName, ID_LEN, Meta, Registration, SweepIntent, container, counter, dns, group},
    histogram::Histogram,
};

use super::Error;

/// The maps that are pinned: those that hold state or counts.
pub(super) const NAMES: [&str; 18] = [
    "LIFECYCLE_RING",
    "DNS_RING",
    "REGISTRY",
    "OPERATIONS",
    "CONTAINERS",
    "IDS",
    "ALIASES",
    "GROUPS",
    "RUNTIMES",
    "DURATIONS",
    "COUNTERS",
    "DNS_PENDING",
    "DNS_DURATIONS",
    "DNS_TIMEOUTS",
    "EMPTY_HISTOGRAM",
    "META",
    "GROUP_NAMES",
    "SWEEP_INTENT",
];

pub(super) type Hash<K, V> = HashMap<MapData, K, V>;

/// Handles of the pinned maps.
pub struct Maps {
    directory: PathBuf,
    epoch: u64,
    counters: PerCpuArray<MapData, u64>,
    durations: Array<MapData, Histogram>,
    dns_durations: Hash<dns::HistogramKey, Histogram>,
    /// The most that was ever found evicted; see [`Maps::evicted`].
    evicted: AtomicU64,
    // Written by the agent: `aya` wants them mutable, and there is one writer at a time anyway.
    written: Mutex<Written>,
    // Released when the agent ends, however it does.
    _lock: OwnedFd,
}

pub(super) struct Written {
    pub(super) registry: Hash<ContainerId, Registration>,
    pub(super) containers: Hash<u64, container::Container>,
    pub(super) ids: Hash<ContainerId, u64>,
    pub(super) groups: Hash<u64, u32>,
    pub(super) group_names: Hash<u32, GroupName>,
    pub(super) operations: Hash<u32, container::Operation>,
    /// The programs write what is in them.
    dns_durations: Hash<dns::HistogramKey, Histogram>,
    pub(super) dns_pending: Hash<dns::PendingKey, dns::Pending>,
    pub(super) dns_timeouts: Hash<dns::HistogramKey, u64>,
    pub(super) sweep_intent: Array<MapData, SweepIntent>,
}

impl fmt::Debug for Maps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Maps").field("directory", &self.directory).finish_non_exhaustive()
    }
}

/// What the DNS programs and the sweep have counted. At rest,
/// `sent - retransmits = matched + timeouts + pending + superseded + evicted`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DnsStatistics {
    /// Queries sent, retransmissions included.
    pub sent: u64,
    /// Of these, repetitions.
    pub retransmits: u64,
    /// Queries that were answered.
    pub matched: u64,
    /// Queries given up.
    pub timeouts: u64,
    /// Queries waiting.
    pub pending: u64,
    /// Queries whose socket and id another question took, or that had no room.
    pub superseded: u64,
}

impl DnsStatistics {
    /// Queries that the least-recently-used map dropped: what the law above leaves over.
    #[must_use]
    pub fn evicted(&self) -> u64 {
        (self.sent - self.retransmits.min(self.sent))
            .saturating_sub(self.matched + self.timeouts + self.pending + self.superseded)
    }
}

impl Maps {
    pub(super) fn from_pins(directory: &Path, lock: OwnedFd) -> Result<Self, Error> {
        Ok(Self {
            epoch: read_meta(directory)?.epoch,
            counters: open(directory, "COUNTERS")?,
            durations: open(directory, "DURATIONS")?,
            dns_durations: open(directory, "DNS_DURATIONS")?,
            evicted: AtomicU64::new(0),
            written: Mutex::new(Written {
                registry: open(directory, "REGISTRY")?,
                containers: open(directory, "CONTAINERS")?,
                ids: open(directory, "IDS")?,
                groups: open(directory, "GROUPS")?,
                group_names: open(directory, "GROUP_NAMES")?,
                operations: open(directory, "OPERATIONS")?,
                dns_durations: open(directory, "DNS_DURATIONS")?,
                dns_pending: open(directory, "DNS_PENDING")?,
                dns_timeouts: open(directory, "DNS_TIMEOUTS")?,
                sweep_intent: open(directory, "SWEEP_INTENT")?,
            }),
            directory: directory.to_owned(),
            _lock: lock,
        })
    }

    pub(super) fn written(&self) -> MutexGuard<'_, Written> {
        // What a panic interrupted was a system call: done or not, never half.
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the pins are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Names this set of maps: counts of another began at zero.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The lifecycle ring's and the DNS ring's reading ends. There is to be one reader of each.
    ///
    /// # Errors
    ///
    /// When the pins are gone.
    pub fn rings(&self) -> Result<(RingBuf<MapData>, RingBuf<MapData>), Error> {
        Ok((open(&self.directory, "LIFECYCLE_RING")?, open(&self.directory, "DNS_RING")?))
    }

    /// A counter's total over all CPUs; `index` is one of [`counter`].
    ///
    /// # Errors
    ///
    /// When the kernel refuses the read.
    pub fn counter(&self, index: u32) -> Result<u64, Error> {
        let values = self.counters.get(&index, 0).map_err(|source| Error::Map { map: "COUNTERS", source })?;
        Ok(values.iter().sum())
    }

    /// The histogram of one of [`container::duration`].
    ///
    /// # Errors
    ///
    /// When the kernel refuses the read.
    pub fn duration(&self, which: u32) -> Result<Histogram, Error> {
        self.durations.get(&which, 0).map_err(|source| Error::Map { map: "DURATIONS", source })
    }

    /// All DNS histograms.
    #[must_use]
    pub fn dns_durations(&self) -> Vec<(dns::HistogramKey, Histogram)> {
        self.dns_durations.iter().flatten().collect()
    }

    /// All counts of unanswered DNS queries.
    #[must_use]
    pub fn dns_timeouts(&self) -> Vec<(dns::HistogramKey, u64)> {
        self.written().dns_timeouts.iter().flatten().collect()
    }

    /// Totals of DNS queries.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the read.
    pub fn dns_statistics(&self) -> Result<DnsStatistics, Error> {
        // What is sent first, and what becomes of it later: a query on its way counts rather twice than as evicted.
        let sent = self.counter(counter::DNS_QUERIES)?;
        let (pending, timeouts) = {
            let written = self.written();
            let timeouts = written.dns_timeouts.iter().flatten().map(|(_, count)| count).sum();
            (written.dns_pending.keys().count() as u64, timeouts)
        };
        Ok(DnsStatistics {
            sent,
            retransmits: self.counter(counter::DNS_RETRANSMITS)?,
            matched: self.counter(counter::DNS_MATCHED)?,
            timeouts,
            pending,
            superseded: self.counter(counter::DNS_SUPERSEDED)? + self.counter(counter::DNS_PENDING_FULL)?,
        })
    }

    /// Queries evicted so far. Derived from counts that are read one after the other, so the largest finding stays: what is
    /// exported as a counter must not fall.
    #[must_use]
    pub fn evicted(&self, statistics: &DnsStatistics) -> u64 {
        let found = statistics.evicted();
        self.evicted.fetch_max(found, Ordering::Relaxed).max(found)
    }

    /// Tells the programs of a container before the runtime creates it.
    ///
    /// # Errors
    ///
    /// When the map is full.
    pub fn register(&self, id: &str, group: u32, stop_signals: u64) -> Result<(), Error> {
        let registration = Registration { stop_signals, group, _reserved: 0 };
        self.written()
            .registry
            .insert(container_key(id), registration, 0)
            .map_err(|source| Error::Map { map: "REGISTRY", source })
    }

    /// Forgets a container that is gone.
    pub fn unregister(&self, id: &str) {
        // Not there is what is wanted.
        let _ = self.written().registry.remove(&container_key(id));
    }

    /// What the programs know of the container with this id.
    #[must_use]
    pub fn container(&self, id: &str) -> Option<(u64, container::Container)> {
        let written = self.written();
        let cgroup = written.ids.get(&container_key(id), 0).ok()?;
        written.containers.get(&cgroup, 0).ok().map(|container| (cgroup, container))
    }

    /// Enters a container that ran before the probes did, so that its stop is timed. `stop_signals` has a bit for each signal
    /// that begins one. Does nothing if it is known.
    ///
    /// # Errors
    ///
    /// When a map is full.
    pub fn seed(&self, id: &str, cgroup: u64, init_tgid: u32, group: u32, stop_signals: u64) -> Result<(), Error> {
        let key = container_key(id);
        // SAFETY: integers and bytes only, for which zero is a value.
        let mut entry: container::Container = unsafe { std::mem::zeroed() };
        entry.state = container::state::RUNNING;
        entry.flags = container::flag::SEEDED;
        entry.init_tgid = init_tgid;
        entry.group = group;
        entry.stop_signals = stop_signals;
        entry.id = key;
        let mut written = self.written();
        if written.containers.get(&cgroup, 0).is_ok() {
            return Ok(());
        }
        let failed = |map| move |source| Error::Map { map, source };
        written.ids.insert(key, cgroup, 0).map_err(failed("IDS"))?;
        written.groups.insert(cgroup, group, 0).map_err(failed("GROUPS"))?;
        // Last: from here on the programs count.
        written.containers.insert(cgroup, entry, 0).map_err(failed("CONTAINERS"))
    }

    /// Accounts a container's DNS queries to `group` from now on. One that is gone by now stays gone: nobody would remove it again.
    ///
    /// # Errors
    ///
    /// When the kernel refuses it.
    pub fn set_group(&self, cgroup: u64, group: u32) -> Result<(), Error> {
        match self.written().groups.insert(cgroup, group, BPF_EXIST) {
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(|source| Error::Map { map: "GROUPS", source }),
        }
    }

    /// Removes operations of runtimes that began long before `now`, whose exit must have been missed. Returns how many.
    pub fn remove_stale_operations(&self, now: Duration) -> usize {
        let mut written = self.written();
        let oldest = u64::try_from(now.saturating_sub(LONGEST_OPERATION).as_nanos()).unwrap_or(u64::MAX);
        let stale: Vec<_> = written.operations.iter().flatten().filter(|(_, it)| it.began_ns < oldest).collect();
        stale.iter().filter(|(process, _)| written.operations.remove(process).is_ok()).count()
    }

    /// The groups that containers are accounted to, those that are known beforehand included.
    #[must_use]
    pub fn used_groups(&self) -> BTreeSet<u32> {
        let written = self.written();
        let registered = written.registry.iter().flatten().map(|(_, registration)| registration.group);
        registered.chain(written.groups.iter().flatten().map(|(_, group)| group)).collect()
    }

    /// Whether the maps that hold something of each group are filling up.
    #[must_use]
    pub fn is_filling_up(&self) -> bool {
        let written = self.written();
        let full = MAX_HISTOGRAMS * 3 / 4;
        written.dns_durations.keys().count() > full
            || written.dns_timeouts.keys().count() > full
            || written.group_names.keys().count() > full
    }

    /// Forgets groups, with what was counted of them. Their unanswered queries are the overflow group's from then on: what was
    /// sent stays accounted for.
    ///
    /// # Errors
    ///
    /// When a map cannot be written; the next time takes it up.
    pub fn forget_groups(&self, groups: &BTreeSet<u32>) -> Result<(), Error> {
        let failed = |map| move |source| Error::Map { map, source };
        let mut written = self.written();
        let durations: Vec<_> =
            written.dns_durations.keys().flatten().filter(|key| groups.contains(&key.group)).collect();
        for key in durations {
            // Not there is what is wanted, here and below.
            let _ = written.dns_durations.remove(&key);
        }
        let timeouts: Vec<_> =
            written.dns_timeouts.iter().flatten().filter(|(key, _)| groups.contains(&key.group)).collect();
        for (key, count) in timeouts {
            let overflow = dns::HistogramKey { group: group::OVERFLOW, ..key };
            let all = written.dns_timeouts.get(&overflow, 0).unwrap_or(0) + count;
            written.dns_timeouts.insert(overflow, all, 0).map_err(failed("DNS_TIMEOUTS"))?;
            let _ = written.dns_timeouts.remove(&key);
        }
        for number in groups {
            let _ = written.group_names.remove(number);
        }
        Ok(())
    }
}

/// For as long a runtime may make a container.
const LONGEST_OPERATION: Duration = Duration::from_secs(600);
/// The size of the maps of histograms, timeouts and groups' names.
const MAX_HISTOGRAMS: usize = 4096;
/// The kernel's flag: only what is there is written.
const BPF_EXIST: u64 = 2;

/// A container id as the maps key it; longer ones are cut as the programs cut them.
pub(super) fn container_key(id: &str) -> ContainerId {
    let mut key = [0; ID_LEN];
    let len = id.len().min(ID_LEN - 1);
    key[..len].copy_from_slice(&id.as_bytes()[..len]);
    key
}

pub(super) fn open<T>(directory: &Path, name: &'static str) -> Result<T, Error>
where
    T: TryFrom<Map, Error = MapError>,
{
    let failed = |source| Error::Map { map: name, source };
    let data = MapData::from_pin(directory.join(name)).map_err(failed)?;
    Map::from_map_data(data).map_err(failed)?.try_into().map_err(failed)
}

pub(super) fn read_meta(directory: &Path) -> Result<Meta, Error> {
    let meta: Array<MapData, Meta> = open(directory, "META")?;
    meta.get(&0, 0).map_err(|source| Error::Map { map: "META", source })
}

pub(super) fn write_meta(directory: &Path, value: Meta) -> Result<(), Error> {
    let mut meta: Array<MapData, Meta> = open(directory, "META")?;
    meta.set(0, value, 0).map_err(|source| Error::Map { map: "META", source })
}

/// Makes the entries that take what has no room of its own; once the maps are full it would be too late.
pub(super) fn make_room_for_overflow(directory: &Path) -> Result<(), Error> {
    let mut durations: Hash<dns::HistogramKey, Histogram> = open(directory, "DNS_DURATIONS")?;
    let mut timeouts: Hash<dns::HistogramKey, u64> = open(directory, "DNS_TIMEOUTS")?;
    for qtype in 0..dns::qtype::NAMES.len() as u8 {
        for transport in 0..dns::transport::NAMES.len() as u8 {
            for rcode in 0..dns::rcode::NAMES.len() as u8 {
                let key = dns::HistogramKey { group: group::OVERFLOW, qtype, rcode, transport, _reserved: 0 };
                // Existing ones hold counts and stay.
                let made = if rcode == dns::rcode::TIMEOUT {
                    insert_new(&mut timeouts, key, 0)
                } else {
                    insert_new(&mut durations, key, Histogram::EMPTY)
                };
                made.map_err(|source| Error::Map { map: "DNS_DURATIONS", source })?;
            }
        }
    }
    Ok(())
}

/// Inserts a value unless there is one.
pub(super) fn insert_new<V: aya::Pod>(
    map: &mut Hash<dns::HistogramKey, V>,
    key: dns::HistogramKey,
    value: V,
) -> Result<(), MapError> {
    match map.get(&key, 0) {
        Err(MapError::KeyNotFound) => map.insert(key, value, 0),
        other => other.map(drop),
    }
}
