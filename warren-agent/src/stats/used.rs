//! What containers use, as metrics of the agent.

use std::{
    collections::HashMap,
    fs,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use warren_telemetry::{Measurement, Series, Source};

use super::cgroup::Hierarchies;
use crate::tasks::{Board, Running};

/// For how long the processor time of a slot is kept after its last container: a restart does not begin it anew.
const KEPT: Duration = Duration::from_secs(300);

/// Containers of a slot of which it is known what they had used, before those that are gone are forgotten.
const REMEMBERED: usize = 16;

/// A service's name and a container's slot.
type Slot = (String, u32);

/// Exports what each slot's containers on this node use. One counter goes on from a container to the next in its slot.
#[derive(Debug)]
pub(crate) struct Used {
    board: Board,
    slots: Mutex<HashMap<Slot, Spent>>,
}

/// Processor time of a slot.
#[derive(Debug)]
struct Spent {
    nanos: u64,
    /// What each container had used when it was last looked at.
    running: HashMap<String, u64>,
    seen: Instant,
}

/// What a container uses now.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    cpu_nanos: u64,
    /// In use, and the limit, 0 being none; where the kernel accounts for it.
    memory: Option<(u64, u64)>,
}

impl Used {
    /// Counts from now on: what those that run have used before, an earlier agent has counted.
    pub(crate) fn new(board: Board) -> Self {
        let used = Self { board, slots: Mutex::default() };
        used.begin(used.look(), Instant::now());
        used
    }

    fn begin(&self, found: Vec<(Running, Usage)>, now: Instant) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        for (container, usage) in found {
            let slot = (container.service, container.slot);
            let spent = slots.entry(slot).or_insert_with(|| Spent { nanos: 0, running: HashMap::new(), seen: now });
            spent.running.insert(container.id, usage.cpu_nanos);
        }
    }

    fn look(&self) -> Vec<(Running, Usage)> {
        let hierarchies = Hierarchies::of_this_process();
        let running = self.board.running().into_iter().filter(|container| !container.service.is_empty());
        let found = running.filter_map(|container| {
            let cgroups = fs::read_to_string(format!("/proc/{}/cgroup", container.pid)).ok()?;
            // The process that had this number is another by now.
            let used = cgroups.contains(&container.id).then(|| hierarchies.cpu_and_memory(&cgroups))?;
            Some((container, Usage { cpu_nanos: used.0, memory: used.1 }))
        });
        found.collect()
    }

    fn series(&self, found: Vec<(Running, Usage)>, now: Instant) -> Vec<Series> {
        // Every change is one addition: a panic loses no more than a look.
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let mut memory = HashMap::<Slot, Option<(u64, u64)>>::new();
        for (container, usage) in found {
            let slot = (container.service, container.slot);
            let spent =
                slots.entry(slot.clone()).or_insert_with(|| Spent { nanos: 0, running: HashMap::new(), seen: now });
            let before = spent.running.entry(container.id).or_insert(0);
            spent.nanos += usage.cpu_nanos.saturating_sub(*before);
            *before = usage.cpu_nanos.max(*before);
            spent.seen = now;
            let sum = memory.entry(slot).or_default();
            if let Some((used, limit)) = usage.memory {
                let (all_used, all_limits) = sum.unwrap_or_default();
                *sum = Some((all_used + used, all_limits + limit));
            }
        }
        slots.retain(|_, spent| now - spent.seen < KEPT);
        for spent in slots.values_mut().filter(|spent| spent.running.len() > REMEMBERED) {
            spent.running.retain(|id, _| self.board.get(id).is_some());
        }
        let mut series = Vec::new();
        for ((service, slot), memory) in memory {
            let number = slot.to_string();
            let labels = [("service", service.as_str()), ("slot", number.as_str())];
            let nanos = slots.get(&(service.clone(), slot)).map_or(0, |spent| spent.nanos);
            let seconds = Measurement::Counter(nanos as f64 / 1e9);
            series.push(Series::new("warren_container_cpu_seconds_total", &labels, seconds));
            let bytes =
                memory.map(|(used, limit)| [("working_set", Some(used)), ("limit", Some(limit).filter(|it| *it > 0))]);
            for (kind, bytes) in bytes.into_iter().flatten() {
                let Some(bytes) = bytes else { continue };
                let labels = [labels[0], labels[1], ("kind", kind)];
                series.push(Series::new("warren_container_memory_bytes", &labels, Measurement::Gauge(bytes as f64)));
            }
        }
        series
    }
}

impl Source for Used {
    fn collect(&self) -> Vec<Series> {
        self.series(self.look(), Instant::now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(used: &Used, found: &[(&str, u32, u64, u64)], now: Instant) -> Vec<(String, f64)> {
        let found = found.iter().map(|&(id, slot, cpu, memory)| {
            let container = Running { id: id.to_owned(), pid: 1, service: "web".to_owned(), slot };
            (container, Usage { cpu_nanos: cpu * 1_000_000_000, memory: Some((memory, 0)) })
        });
        let series = used.series(found.collect(), now);
        let mut shown: Vec<_> = series
            .into_iter()
            .map(|series| {
                let values: Vec<_> = series.labels.iter().map(|(_, value)| value.as_str()).collect();
                let value = match series.value {
                    Measurement::Counter(value) | Measurement::Gauge(value) => value,
                    Measurement::Histogram(_) => panic!("no histogram"),
                };
                (values.join(" "), value)
            })
            .collect();
        shown.sort_by(|a, b| a.partial_cmp(b).expect("numbers"));
        shown
    }

    #[test]
    fn a_slots_processor_time_goes_on_from_one_container_to_the_next() {
        let used = Used::new(Board::default());
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let cpu = |slot: u32, value: f64| (format!("web {slot}"), value);
        let memory = |slot: u32, value: f64| (format!("working_set web {slot}"), value);
        assert_eq!(look(&used, &[("a", 1, 5, 10)], start), [cpu(1, 5.0), memory(1, 10.0)]);
        // Two at a time, as while one replaces the other.
        assert_eq!(look(&used, &[("a", 1, 7, 10), ("b", 1, 1, 5)], after(1)), [cpu(1, 8.0), memory(1, 15.0)]);
        assert_eq!(look(&used, &[("b", 1, 2, 5)], after(2)), [cpu(1, 9.0), memory(1, 5.0)]);
        // Not seen for a moment, as when a file cannot be read, and there again.
        assert_eq!(look(&used, &[], after(3)), []);
        assert_eq!(look(&used, &[("b", 1, 2, 5)], after(4)), [cpu(1, 9.0), memory(1, 5.0)]);
        assert_eq!(look(&used, &[("c", 1, 1, 5)], after(100)), [cpu(1, 10.0), memory(1, 5.0)]);
        let _ = look(&used, &[], after(1000));
        assert_eq!(look(&used, &[("d", 1, 3, 5)], after(1001)), [cpu(1, 3.0), memory(1, 5.0)], "long forgotten");
        // What was there when the agent began is another's to have counted.
        let found = Running { id: "e".to_owned(), pid: 1, service: "web".to_owned(), slot: 2 };
        used.begin(vec![(found, Usage { cpu_nanos: 7_000_000_000, memory: None })], after(1001));
        assert_eq!(look(&used, &[("e", 2, 9, 5)], after(1002)), [cpu(2, 2.0), memory(2, 5.0)]);
    }
}
