use std::{fs, time::SystemTime};

use crate::series::{Measurement, Series, Source};

/// The conventional `process_*` metrics of this process, from `/proc/self`.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessSource;

impl Source for ProcessSource {
    fn collect(&self) -> Vec<Series> {
        let mut series = Vec::new();
        let mut gauge = |name, value: f64| series.push(Series::new(name, &[], Measurement::Gauge(value)));
        if let Some(files) = open_files() {
            gauge("process_open_fds", files);
        }
        if let Some(limit) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
            gauge("process_max_fds", limit as f64);
        }
        if let Some(stat) = Stat::read() {
            gauge("process_threads", stat.threads);
            gauge("process_virtual_memory_bytes", stat.virtual_bytes);
            gauge("process_resident_memory_bytes", stat.resident_bytes());
            if let Some(start) = stat.start_time_seconds() {
                gauge("process_start_time_seconds", start);
            }
            let cpu = Measurement::Counter(stat.cpu_seconds());
            series.push(Series::new("process_cpu_seconds_total", &[], cpu));
        }
        series
    }
}

/// The fields of `/proc/self/stat` that are exported (proc(5)).
pub(crate) struct Stat {
    cpu_ticks: f64,
    pub(crate) threads: f64,
    start_ticks: f64,
    pub(crate) virtual_bytes: f64,
    resident_pages: f64,
}

impl Stat {
    pub(crate) fn read() -> Option<Self> {
        let stat = fs::read_to_string("/proc/self/stat").ok()?;
        // The second field, the name, may hold spaces; the third is the first after its closing parenthesis.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        Some(Self {
            cpu_ticks: field(14)? + field(15)?,
            threads: field(20)?,
            start_ticks: field(22)?,
            virtual_bytes: field(23)?,
            resident_pages: field(24)?,
        })
    }

    pub(crate) fn resident_bytes(&self) -> f64 {
        self.resident_pages * rustix::param::page_size() as f64
    }

    pub(crate) fn cpu_seconds(&self) -> f64 {
        self.cpu_ticks / ticks_per_second()
    }

    /// Since the Unix epoch.
    fn start_time_seconds(&self) -> Option<f64> {
        Some(boot_time()? + self.start_ticks / ticks_per_second())
    }

    pub(crate) fn uptime_seconds(&self) -> Option<f64> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs_f64();
        Some((now - self.start_time_seconds()?).max(0.0))
    }
}

fn ticks_per_second() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

/// Open file descriptors of this process.
pub(crate) fn open_files() -> Option<f64> {
    let entries = fs::read_dir("/proc/self/fd").ok()?;
    // The listing's own descriptor is one of them.
    Some(entries.count().saturating_sub(1) as f64)
}

/// When the machine booted, in seconds since the Unix epoch.
fn boot_time() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

/// Has the kernel dump nothing of this process's memory, which holds keys and secrets, whatever becomes of it, and let nobody but root
/// look into it.
pub fn keep_memory_private() {
    use rustix::process::{DumpableBehavior, set_dumpable_behavior};

    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "a core dump of this process would have its secrets in it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_uses_memory_and_files() {
        let series = ProcessSource.collect();
        for name in
            ["process_resident_memory_bytes", "process_open_fds", "process_threads", "process_start_time_seconds"]
        {
            let value = series.iter().find(|s| s.metric == name).map(|s| s.value.clone());
            assert!(matches!(value, Some(Measurement::Gauge(value)) if value > 0.0), "{name}: {value:?}");
        }
    }
}
