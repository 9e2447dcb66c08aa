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
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tokio_util::sync::CancellationToken;

/// The newest file of a container; older ones have numbers behind it, from 1 on.
const FILE: &str = "log";
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

/// All containers' logs. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Logs {
    options: Options,
    /// This program as it was when it began: it may be replaced by a newer one while it runs.
    program: PathBuf,
}

impl Logs {
    /// Keeps logs as the options say.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self { options, program: std::env::current_exe().unwrap_or_default() }
    }

    pub(crate) fn directory(&self, container: &str) -> PathBuf {
        self.options.directory.join(container)
    }

    /// Where the runtime is to send what a container writes: to this very program, as a process of its own.
    pub(crate) fn uri(&self, container: &str) -> std::io::Result<String> {
        let directory = self.directory(container);
        fs::create_dir_all(&directory)?;
        let argument = writer::argument(&directory, self.options.max_bytes, self.options.files);
        Ok(format!("binary://{}?{COMMAND}={}", escaped(&self.program.to_string_lossy()), escaped(&argument)))
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

fn last_written(directory: &Path) -> Option<SystemTime> {
    let modified = |path: &Path| path.metadata().and_then(|metadata| metadata.modified()).ok();
    modified(&directory.join(FILE)).or_else(|| modified(directory))
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
