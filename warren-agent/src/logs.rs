//! What containers write: a process beside each container takes it, so that nothing that happens to the agent or to a
//! reader holds a container up; files with a limit; and reading them.
//!
//! A line of a file is `TIME STREAM F|P TEXT`, the format of the Kubernetes container runtime interface, so that collectors
//! know it. P is the part of a line that was too long or had no end.

mod reader;
mod writer;

pub(crate) use reader::{Query, read};
pub use writer::{COMMAND, write};

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use tokio_util::sync::CancellationToken;
use warren_telemetry::{Measurement, Series, Source};

use crate::{conditions, stats};

/// The newest file of a container; older ones have numbers behind it, from 1 on.
const FILE: &str = "log";
/// Whose a container was, as JSON: its log outlives it.
const OWNER: &str = "owner.json";
/// How many entries of a container could not be written, as eight bytes, the lowest first.
const LOST: &str = "lost";
/// How often old logs are looked for.
const COLLECT: Duration = Duration::from_secs(10);

/// Of the node's cores, all writers together have so manieth part, and no less than so many thousandths of one: what a container
/// writes costs more than its own share of a processor.
const WRITERS_SHARE: u64 = 4;
const WRITERS_AT_LEAST: u64 = 500;

/// How logs are kept.
#[derive(Clone, Debug)]
pub struct Options {
    /// Holds a directory for each container.
    pub directory: PathBuf,
    /// Bytes of a file before the next one begins.
    pub max_bytes: u64,
    /// Files of a container.
    pub files: u32,
    /// How long they are kept after its end.
    pub keep: Duration,
    /// Bytes of all containers together that have ended: the oldest go first.
    pub max_ended_bytes: u64,
    /// Where the processes that write them are, and not in their containers' cgroups: they have the last words to write when those
    /// are gone.
    pub cgroup: PathBuf,
}

/// What a container was part of.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Owner {
    /// The service's id.
    pub(crate) service: String,
    /// Which of its containers; 0 where it has one a node.
    pub(crate) slot: u32,
    /// The cgroup of the process that writes its log; empty for where it is anyway.
    #[serde(default)]
    pub(crate) writer: PathBuf,
}

/// All containers' logs. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Logs {
    options: Options,
    counted: Arc<Mutex<Counted>>,
    /// This program as it was when it began: it may be replaced by a newer one while it runs.
    program: PathBuf,
}

impl Logs {
    /// Keeps logs as the options say.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as u64;
        let most = (cores * 1000 / WRITERS_SHARE).max(WRITERS_AT_LEAST);
        if let Err(error) = stats::limit_cpu(&options.cgroup, most) {
            tracing::warn!(%error, "nothing bounds the processor time for writing containers' logs");
        }
        Self { options, counted: Arc::default(), program: std::env::current_exe().unwrap_or_default() }
    }

    /// What it counts.
    pub(crate) fn source(&self) -> Arc<dyn Source> {
        Arc::new(self.clone())
    }

    pub(crate) fn directory(&self, container: &str) -> PathBuf {
        self.options.directory.join(container)
    }

    /// Containers of a service whose logs are kept, with their slots.
    pub(crate) fn kept_of(&self, service: &str) -> Vec<(String, u32)> {
        let owner =
            |directory: &Path| -> Option<Owner> { serde_json::from_slice(&fs::read(directory.join(OWNER)).ok()?).ok() };
        let entries = fs::read_dir(&self.options.directory).into_iter().flatten().flatten();
        let of_service = |entry: fs::DirEntry| {
            let owner = owner(&entry.path()).filter(|owner| owner.service == service)?;
            Some((entry.file_name().to_str()?.to_owned(), owner.slot))
        };
        entries.filter_map(of_service).collect()
    }

    /// Where the runtime is to send what a container writes: to this very program, as a process of its own.
    pub(crate) fn uri(&self, container: &str, service: String, slot: u32) -> std::io::Result<String> {
        let directory = self.directory(container);
        fs::create_dir_all(&directory)?;
        let owner = Owner { service, slot, writer: self.options.cgroup.clone() };
        fs::write(directory.join(OWNER), serde_json::to_vec(&owner)?)?;
        let argument = writer::argument(&directory, self.options.max_bytes, self.options.files);
        Ok(format!("binary://{}?{COMMAND}={}", escaped(&self.program.to_string_lossy()), escaped(&argument)))
    }

    /// A container has ended: from now on its log grows old, however long ago it last wrote.
    pub(crate) fn ended(&self, container: &str) {
        let owner = fs::File::options().write(true).open(self.directory(container).join(OWNER));
        // One that never started has none.
        let _ = owner.and_then(|owner| owner.set_modified(SystemTime::now()));
    }

    /// Removes logs of containers that ended a while ago, until `shutdown`, and others of them where they are too large together or
    /// the disk is full. `lives` says which have not ended.
    pub(crate) async fn collect(
        self,
        lives: impl Fn(&str) -> bool + Clone + Send + 'static,
        shutdown: CancellationToken,
    ) {
        let mut tick = tokio::time::interval(COLLECT.min(self.options.keep / 2).max(Duration::from_millis(100)));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
            let (logs, lives) = (self.clone(), lives.clone());
            // A file system may hang. A panic is logged.
            let swept = tokio::task::spawn_blocking(move || {
                logs.sweep(lives, || conditions::has_room(&logs.options.directory));
            });
            if shutdown.run_until_cancelled(swept).await.is_none() {
                return;
            }
        }
    }

    fn sweep(&self, lives: impl Fn(&str) -> bool, has_room: impl Fn() -> bool) {
        let mut ended = Vec::new();
        for entry in fs::read_dir(&self.options.directory).into_iter().flatten().flatten() {
            let path = entry.path();
            // Its last words may still be on their way.
            if !lives(&entry.file_name().to_string_lossy()) && !is_written(&path) {
                ended.push((last_written(&path).unwrap_or(SystemTime::UNIX_EPOCH), size(&path), path));
            }
        }
        ended.sort();
        let mut left: u64 = ended.iter().map(|(_, size, _)| size).sum();
        let mut for_room = 0;
        for (at, size, path) in ended {
            let is_old = at.elapsed().unwrap_or_default() >= self.options.keep;
            if !is_old && left <= self.options.max_ended_bytes && has_room() {
                break;
            }
            // Next time, if not now.
            if fs::remove_dir_all(path).is_ok() {
                left -= size;
                for_room += usize::from(!is_old);
            }
        }
        if for_room > 0 {
            tracing::warn!(containers = for_room, "logs of ended containers were removed early to make room");
        }
    }
}

/// Bytes of a container's files.
fn size(directory: &Path) -> u64 {
    let files = fs::read_dir(directory).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum()
}

/// Entries that were lost, as they were last seen.
#[derive(Debug, Default)]
struct Counted {
    all: u64,
    by_container: BTreeMap<OsString, u64>,
}

impl Source for Logs {
    fn collect(&self) -> Vec<Series> {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let mut now = BTreeMap::new();
        for entry in fs::read_dir(&self.options.directory).into_iter().flatten().flatten() {
            let lost = lost(&entry.path());
            let known = counted.by_container.get(&entry.file_name()).copied().unwrap_or(0);
            counted.all += lost.saturating_sub(known);
            now.insert(entry.file_name(), lost);
        }
        counted.by_container = now;
        let value = Measurement::Counter(counted.all as f64);
        vec![Series::new("warren_log_lines_lost_total", &[], value)]
    }
}

/// Whether what a container wrote is not all in its log yet.
fn is_written(directory: &Path) -> bool {
    let count = fs::File::open(directory.join(LOST));
    count.is_ok_and(|count| matches!(count.try_lock_shared(), Err(fs::TryLockError::WouldBlock)))
}

/// How many entries of a container could not be written.
fn lost(directory: &Path) -> u64 {
    fs::read(directory.join(LOST)).ok().and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn last_written(directory: &Path) -> Option<SystemTime> {
    let modified = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
    let newest = [FILE, OWNER].into_iter().filter_map(|name| modified(&directory.join(name))).max();
    newest.or_else(|| modified(directory))
}

/// What means nothing in a URI stands for itself.
fn escaped(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'_' | b'-' => char::from(byte).to_string(),
            other => format!("%{other:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn the_oldest_go_first_where_there_is_no_room() {
        let root = tempfile::tempdir().expect("a directory");
        let logs = Logs {
            options: Options {
                directory: root.path().to_owned(),
                max_bytes: 0,
                files: 0,
                keep: Duration::from_secs(3600),
                max_ended_bytes: 2000,
                cgroup: PathBuf::new(),
            },
            counted: Arc::default(),
            program: PathBuf::new(),
        };
        let make = |name: &str, minutes: u64| {
            let directory = logs.directory(name);
            fs::create_dir(&directory).expect("writable");
            fs::write(directory.join(FILE), [b'x'; 900]).expect("writable");
            let file = File::options().write(true).open(directory.join(FILE)).expect("there");
            file.set_modified(SystemTime::now() - Duration::from_secs(60 * minutes)).expect("its own");
        };
        let left = || {
            let mut names: Vec<_> =
                fs::read_dir(root.path()).expect("there").flatten().map(|entry| entry.file_name()).collect();
            names.sort();
            names.into_iter().map(|name| name.into_string().expect("UTF-8")).collect::<Vec<_>>().join(" ")
        };
        for (name, minutes) in [("a", 30), ("b", 20), ("c", 10), ("d", 100), ("lives", 200)] {
            make(name, minutes);
        }
        let lives = |id: &str| id == "lives";
        logs.sweep(lives, || true);
        assert_eq!(left(), "b c lives", "one is too old, and one too many");
        // As soon as there is room, the rest stays.
        let looks = std::cell::Cell::new(0);
        logs.sweep(lives, || looks.replace(looks.get() + 1) > 0);
        assert_eq!(left(), "c lives");
        logs.sweep(lives, || false);
        assert_eq!(left(), "lives");
    }
}
