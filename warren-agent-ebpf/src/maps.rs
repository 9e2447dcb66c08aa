//! The maps, and how to add to them. Sizes are for a node with up to 8192 containers; the agent may set others.

use core::{
    intrinsics::{AtomicOrdering, atomic_xadd},
    ptr::read_volatile,
};

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use warren_agent_ebpf::{
    abi::{Config, ContainerId, GroupName, Meta, Registration, SweepIntent, container, counter, dns},
    histogram::{Histogram, SLOTS, slot},
};

const CONTAINERS_MAX: u32 = 8192;
const RING_BYTES: u32 = 256 * 1024;

/// Set by the agent before loading.
#[unsafe(no_mangle)]
pub(crate) static CONFIG: Config =
    Config { dns_slow_ns: 0, dns_timeout_ns: 0, dns_ports: [0; 4], registered_only: 0, oom_argument_is_pid: 0 };

#[map]
pub(crate) static LIFECYCLE_RING: RingBuf = RingBuf::with_byte_size(RING_BYTES, 0);
#[map]
pub(crate) static DNS_RING: RingBuf = RingBuf::with_byte_size(RING_BYTES, 0);

/// Container id to what the agent knows of it beforehand.
#[map]
pub(crate) static REGISTRY: HashMap<ContainerId, Registration> = HashMap::with_max_entries(CONTAINERS_MAX, 0);
/// Process id of a runtime to what it is doing. Not LRU: what finds no room is counted, and the agent removes what is left of those
/// whose exit was missed.
#[map]
pub(crate) static OPERATIONS: HashMap<u32, container::Operation> = HashMap::with_max_entries(1024, 0);
/// Cgroup id to container. Not LRU: state must not vanish in silence.
#[map]
pub(crate) static CONTAINERS: HashMap<u64, container::Container> = HashMap::with_max_entries(CONTAINERS_MAX, 0);
/// Container id to cgroup id.
#[map]
pub(crate) static IDS: HashMap<ContainerId, u64> = HashMap::with_max_entries(CONTAINERS_MAX, 0);
/// A cgroup made inside a container's cgroup, to the container's.
#[map]
pub(crate) static ALIASES: HashMap<u64, u64> = HashMap::with_max_entries(CONTAINERS_MAX, 0);
/// Cgroup id, of containers and cgroups inside them, to whom their DNS queries are accounted.
#[map]
pub(crate) static GROUPS: HashMap<u64, u32> = HashMap::with_max_entries(2 * CONTAINERS_MAX, 0);
/// First eight bytes of the task names of container runtimes; 0 is unused.
#[map]
pub(crate) static RUNTIMES: Array<u64> = Array::with_max_entries(4, 0);

#[map]
pub(crate) static DURATIONS: Array<Histogram> = Array::with_max_entries(container::DURATIONS as u32, 0);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(counter::COUNT, 0);

/// Queries without an answer yet. LRU, so that queries nobody answers cannot shut out live ones.
#[map]
pub(crate) static DNS_PENDING: LruHashMap<dns::PendingKey, dns::Pending> = LruHashMap::with_max_entries(16_384, 0);
/// Cookies of TCP connections of which some message could not be followed. Not pinned: it is about connections, not counts.
#[map]
pub(crate) static DNS_LOSSY: LruHashMap<u64, u32> = LruHashMap::with_max_entries(1024, 0);
/// Not preallocated: 4096 histograms would pin 8 MB that most nodes never use.
#[map]
pub(crate) static DNS_DURATIONS: HashMap<dns::HistogramKey, Histogram> =
    HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);
/// Unanswered queries by key. Only the agent writes here; see its sweep.
#[map]
static DNS_TIMEOUTS: HashMap<dns::HistogramKey, u64> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);
/// All zeros for ever: what a new histogram is inserted from. Too large for the stack.
#[map]
static EMPTY_HISTOGRAM: Array<Histogram> = Array::with_max_entries(1, 0);

/// The agent's: whose counts these maps hold.
#[map]
static META: Array<Meta> = Array::with_max_entries(1, 0);
/// The agent's: names of the groups it handed out, so that they outlive it as the counts do.
#[map]
static GROUP_NAMES: HashMap<u32, GroupName> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);
/// The agent's: the timeout being counted.
#[map]
static SWEEP_INTENT: Array<SweepIntent> = Array::with_max_entries(1, 0);

/// Adds to a counter in a map, atomically: an interrupt may run another program between a load and a store.
#[inline(always)]
pub(crate) unsafe fn add(to: *mut u64, value: u64) {
    // SAFETY: the caller passes a pointer into a map value, aligned to 8.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(to, value) };
}

#[inline(always)]
pub(crate) fn count(index: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: a map value.
        unsafe { add(counter, 1) };
    }
}

#[inline(always)]
unsafe fn observe_into(histogram: *mut Histogram, ns: u64) {
    let slot = slot(ns);
    // The verifier does not follow the proof that `slot` is in range, and LLVM removes a plain check; the volatile copy
    // keeps the check in the program.
    // SAFETY: a local; then a map value, and a slot within it.
    unsafe {
        let slot = read_volatile(&slot);
        if slot < SLOTS {
            add(&raw mut (*histogram).sum_ns, ns);
            add((&raw mut (*histogram).slots).cast::<u64>().add(slot), 1);
        }
    }
}

/// Observes the duration of a container's phase; `which` is one of [`container::duration`].
#[inline(always)]
pub(crate) fn observe_duration(which: u32, ns: u64) {
    if let Some(histogram) = DURATIONS.get_ptr_mut(which) {
        // SAFETY: a map value.
        unsafe { observe_into(histogram, ns) };
    }
}

#[inline(always)]
fn dns_histogram(key: &dns::HistogramKey) -> Option<*mut Histogram> {
    if let Some(histogram) = DNS_DURATIONS.get_ptr_mut(key) {
        return Some(histogram);
    }
    let empty = EMPTY_HISTOGRAM.get(0)?;
    // Fails when another CPU was first, which is fine, or when the map is full, which the second look shows.
    let _ = DNS_DURATIONS.insert(key, empty, aya_ebpf::bindings::BPF_NOEXIST.into());
    DNS_DURATIONS.get_ptr_mut(key)
}

/// Observes an answered query. What has no room is accounted to the overflow group; what has none there, counted.
#[inline(always)]
pub(crate) fn observe_dns(key: &dns::HistogramKey, ns: u64) {
    let mut histogram = dns_histogram(key);
    if histogram.is_none() {
        let overflow = dns::HistogramKey { group: warren_agent_ebpf::abi::group::OVERFLOW, ..*key };
        histogram = dns_histogram(&overflow);
    }
    match histogram {
        // SAFETY: a map value.
        Some(histogram) => unsafe { observe_into(histogram, ns) },
        None => count(counter::DNS_HISTOGRAM_FULL),
    }
}
