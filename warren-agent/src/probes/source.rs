//! What the probes have counted, as series of metrics.

use std::{
    fs,
    os::fd::{AsFd as _, AsRawFd as _},
    sync::{Arc, Mutex, PoisonError},
};

use aya::programs::ProgramInfo;
use warren_agent_ebpf::{
    abi::{
        container::duration,
        counter,
        dns::{self, qtype, rcode, transport},
    },
    histogram::{FIRST_INDEX, Histogram, SCALE},
};
use warren_telemetry::{Exponential, Measurement, Series, Source};

use super::{Error, Groups, Maps, PROGRAMS, loader};

const NS: f64 = 1e9;

/// Reads the maps at every scrape. All series lack the `node` label.
#[derive(Debug)]
pub struct ProbeSource {
    maps: Arc<Maps>,
    groups: Arc<Mutex<Groups>>,
}

impl ProbeSource {
    /// A source of these maps' counts.
    #[must_use]
    pub fn new(maps: Arc<Maps>, groups: Arc<Mutex<Groups>>) -> Self {
        Self { maps, groups }
    }

    fn read(&self) -> Result<Vec<Series>, Error> {
        let mut series = Vec::new();
        self.lifecycle(&mut series)?;
        self.dns(&mut series)?;
        self.losses(&mut series)?;
        self.programs(&mut series);
        Ok(series)
    }

    fn count(
        &self,
        series: &mut Vec<Series>,
        metric: &'static str,
        labels: &[(&str, &str)],
        index: u32,
    ) -> Result<(), Error> {
        let count = self.maps.counter(index)?;
        series.push(Series::new(metric, labels, Measurement::Counter(count as f64)));
        Ok(())
    }

    fn lifecycle(&self, series: &mut Vec<Series>) -> Result<(), Error> {
        for (metric, which) in [
            ("warren_container_create_duration_seconds", duration::CREATE),
            ("warren_container_start_duration_seconds", duration::START),
            ("warren_container_stop_duration_seconds", duration::STOP),
        ] {
            let histogram = exponential(&self.maps.duration(which)?);
            series.push(Series::new(metric, &[("source", "kernel")], Measurement::Histogram(histogram)));
        }
        for (reason, index) in [
            ("completed", counter::EXITS_COMPLETED),
            ("error", counter::EXITS_ERROR),
            ("oom", counter::EXITS_OOM),
            ("killed", counter::EXITS_KILLED),
        ] {
            self.count(series, "warren_container_exits_total", &[("reason", reason)], index)?;
        }
        for (reason, index) in [("create", counter::CREATE_FAILURES), ("start", counter::START_FAILURES)] {
            self.count(series, "warren_container_start_failures_total", &[("reason", reason)], index)?;
        }
        self.count(series, "warren_container_sigterm_ignored_total", &[], counter::SIGNALS_IGNORED)?;
        self.count(series, "warren_container_stop_escalations_total", &[], counter::STOP_ESCALATIONS)
    }

    fn dns(&self, series: &mut Vec<Series>) -> Result<(), Error> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let mut durations = std::collections::BTreeMap::<_, Histogram>::new();
        let mut queries = std::collections::BTreeMap::<_, u64>::new();
        let mut failures = std::collections::BTreeMap::<_, u64>::new();
        let mut count = |key: &dns::HistogramKey, count: u64| {
            let service = groups.name(key.group).to_owned();
            let code = name(&rcode::NAMES, key.rcode);
            *queries
                .entry((service.clone(), name(&qtype::NAMES, key.qtype), code, name(&transport::NAMES, key.transport)))
                .or_default() += count;
            if key.rcode != rcode::NOERROR {
                *failures.entry((service, code)).or_default() += count;
            }
        };
        for (key, histogram) in self.maps.dns_durations().into_iter().filter(|(_, histogram)| histogram.count() > 0) {
            count(&key, histogram.count());
            durations
                .entry((
                    groups.name(key.group).to_owned(),
                    name(&qtype::NAMES, key.qtype),
                    name(&rcode::NAMES, key.rcode),
                ))
                .or_insert(Histogram::EMPTY)
                .merge(&histogram);
        }
        for (key, timeouts) in self.maps.dns_timeouts().into_iter().filter(|(_, timeouts)| *timeouts > 0) {
            count(&key, timeouts);
        }
        for ((service, qtype, rcode), histogram) in durations {
            series.push(Series::new(
                "warren_dns_query_duration_seconds",
                &[("service", &service), ("type", qtype), ("rcode", rcode)],
                Measurement::Histogram(exponential(&histogram)),
            ));
        }
        for ((service, qtype, rcode, transport), count) in queries {
            series.push(Series::new(
                "warren_dns_queries_total",
                &[("service", &service), ("type", qtype), ("rcode", rcode), ("transport", transport)],
                Measurement::Counter(count as f64),
            ));
        }
        for ((service, reason), count) in failures {
            series.push(Series::new(
                "warren_dns_failures_total",
                &[("service", &service), ("reason", reason)],
                Measurement::Counter(count as f64),
            ));
        }
        self.count(series, "warren_dns_sent_total", &[], counter::DNS_QUERIES)?;
        self.count(series, "warren_dns_retransmits_total", &[], counter::DNS_RETRANSMITS)?;
        self.count(series, "warren_dns_unmatched_responses_total", &[], counter::DNS_UNMATCHED)
    }

    fn losses(&self, series: &mut Vec<Series>) -> Result<(), Error> {
        for (probe, reason, index) in [
            ("lifecycle", "ring_full", counter::LIFECYCLE_RING_FULL),
            ("lifecycle", "map_full", counter::LIFECYCLE_MAP_FULL),
            ("dns", "ring_full", counter::DNS_RING_FULL),
            ("dns", "map_full", counter::DNS_PENDING_FULL),
            ("dns", "histogram_full", counter::DNS_HISTOGRAM_FULL),
            ("dns", "superseded", counter::DNS_SUPERSEDED),
            ("dns", "malformed", counter::DNS_MALFORMED),
            ("dns", "tcp_partial", counter::DNS_TCP_PARTIAL),
            ("dns", "nested", counter::DNS_NESTED),
        ] {
            self.count(series, "warren_probe_events_lost_total", &[("probe", probe), ("reason", reason)], index)?;
        }
        let statistics = self.maps.dns_statistics()?;
        series.push(Series::new("warren_dns_pending", &[], Measurement::Gauge(statistics.pending as f64)));
        series.push(Series::new(
            "warren_probe_events_lost_total",
            &[("probe", "dns"), ("reason", "evicted")],
            Measurement::Counter(self.maps.evicted(&statistics) as f64),
        ));
        Ok(())
    }

    /// Runs of the programs, and whether they are attached.
    fn programs(&self, series: &mut Vec<Series>) {
        let mut recursions = [("lifecycle", 0), ("dns", 0)];
        for program in PROGRAMS {
            let pin = loader::program_pin(self.maps.directory(), program.name);
            let Ok(info) = ProgramInfo::from_pin(pin) else { continue };
            let labels = [("program", program.name)];
            let runs = Measurement::Counter(info.run_count() as f64);
            series.push(Series::new("warren_probe_runs_total", &labels, runs));
            let seconds = Measurement::Counter(info.run_time().as_secs_f64());
            series.push(Series::new("warren_probe_run_seconds_total", &labels, seconds));
            if let Ok(fd) = info.fd()
                && let Some(misses) = recursion_misses(fd.as_fd().as_raw_fd())
            {
                for (probe, total) in &mut recursions {
                    if *probe == program.probe {
                        *total += misses;
                    }
                }
            }
        }
        for (probe, misses) in recursions {
            series.push(Series::new(
                "warren_probe_events_lost_total",
                &[("probe", probe), ("reason", "recursion")],
                Measurement::Counter(misses as f64),
            ));
            let mut programs = PROGRAMS.iter().filter(|program| program.probe == probe);
            let attached = programs.all(|program| loader::link_pin(self.maps.directory(), program.name).exists());
            series.push(Series::new(
                "warren_probe_up",
                &[("probe", probe)],
                Measurement::Gauge(f64::from(u8::from(attached))),
            ));
        }
    }
}

impl Source for ProbeSource {
    fn collect(&self) -> Vec<Series> {
        self.read().unwrap_or_else(|error| {
            tracing::error!(error = super::describe(&error), "the probes' counts cannot be read");
            Vec::new()
        })
    }
}

/// How often the kernel did not run a program because it was running already on that CPU; since 5.12.
fn recursion_misses(fd: i32) -> Option<u64> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
    info.lines().find_map(|line| line.strip_prefix("recursion_misses:"))?.trim().parse().ok()
}

fn name(names: &'static [&'static str], index: u8) -> &'static str {
    names.get(usize::from(index)).copied().unwrap_or("other")
}

/// The kernel's histogram without its empty ends, in seconds.
pub(crate) fn exponential(histogram: &Histogram) -> Exponential {
    let first = histogram.slots.iter().position(|count| *count != 0).unwrap_or(0);
    let end = histogram.slots.iter().rposition(|count| *count != 0).map_or(first, |last| last + 1);
    Exponential {
        scale: SCALE,
        offset: FIRST_INDEX + first as i32,
        buckets: histogram.slots[first..end].to_vec(),
        sum: histogram.sum_ns as f64 / NS,
    }
}
