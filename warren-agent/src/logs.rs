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

/// The newest file of a container; older ones have numbers behind it, from 1 on.
const FILE: &str = "log";
/// Whose a container was, as JSON: its log outlives it.
const OWNER: &str = "owner.json";
/// How many entries of a container could not be written, as eight bytes, the lowest first.
const LOST: &str = "lost";
/// How often old logs are looked for.
const COLLECT: Duration = Duration::from_secs(60);

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
}

/// What a container was part of.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Owner {
    /// The service's id.
    pub(crate) service: String,
    /// Which of its containers; 0 where it has one a node.
    pub(crate) slot: u32,
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
    pub(crate) fn uri(&self, container: &str, owner: &Owner) -> std::io::Result<String> {
        let directory = self.directory(container);
        fs::create_dir_all(&directory)?;
        fs::write(directory.join(OWNER), serde_json::to_vec(owner)?)?;
        let argument = writer::argument(&directory, self.options.max_bytes, self.options.files);
        Ok(format!("binary://{}?{COMMAND}={}", escaped(&self.program.to_string_lossy()), escaped(&argument)))
    }

    /// A container has ended: from now on its log grows old, however long ago it last wrote.
    pub(crate) fn ended(&self, container: &str) {
        let owner = fs::File::options().write(true).open(self.directory(container).join(OWNER));
        // One that never started has none.
        let _ = owner.and_then(|owner| owner.set_modified(SystemTime::now()));
    }

    /// Removes logs of containers that ended a while ago, until `shutdown`. `lives` says which have not.
    pub(crate) async fn collect(self, lives: impl Fn(&str) -> bool, shutdown: CancellationToken) {
        let mut tick = tokio::time::interval(COLLECT.min(self.options.keep / 2).max(Duration::from_millis(100)));
        while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
            for entry in fs::read_dir(&self.options.directory).into_iter().flatten().flatten() {
                let path = entry.path();
                let old = last_written(&path).is_none_or(|at| at.elapsed().unwrap_or_default() >= self.options.keep);
                if old && !lives(&entry.file_name().to_string_lossy()) {
                    // Next time, if not now.
                    let _ = fs::remove_dir_all(path);
                }
            }
        }
    }
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
