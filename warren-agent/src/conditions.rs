//! What is wrong with the node, by name, for the manager: a node that cannot start containers is given none.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use warren_proto::v1;

use crate::runtime::Containerd;

/// What a check finds: nothing wrong, or what is, in words.
type Check = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// One thing that may be wrong.
#[derive(Clone)]
struct Condition {
    kind: &'static str,
    blocks_scheduling: bool,
    check: Check,
    /// What fails for less than this is not told.
    settles: Duration,
    /// Since when the check fails.
    fails_since: Arc<Mutex<Option<Instant>>>,
}

/// An agent that has just started has not made everything yet.
pub(crate) const SETTLED: Duration = Duration::from_secs(2);

/// What may be wrong with the node. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Conditions(Vec<Condition>);

impl std::fmt::Debug for Conditions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|condition| condition.kind)).finish()
    }
}

impl Conditions {
    /// Adds one. While `blocks_scheduling` it keeps containers away; what fails for less than `settles` is not told.
    pub(crate) fn add(
        &mut self,
        kind: &'static str,
        blocks_scheduling: bool,
        settles: Duration,
        check: impl Fn() -> Result<(), String> + Send + Sync + 'static,
    ) {
        let check = Arc::new(check);
        self.0.push(Condition { kind, blocks_scheduling, check, settles, fails_since: Arc::default() });
    }

    /// Those that hold `now`, as the manager is told.
    pub(crate) fn holding(&self, now: Instant) -> Vec<v1::NodeCondition> {
        let holds = |condition: &Condition| {
            let problem = (condition.check)().err();
            let mut fails_since = condition.fails_since.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(message) = problem else {
                *fails_since = None;
                return None;
            };
            let since = *fails_since.get_or_insert(now);
            (now - since >= condition.settles).then(|| v1::NodeCondition {
                r#type: condition.kind.to_owned(),
                message,
                since: None,
                blocks_scheduling: condition.blocks_scheduling,
            })
        };
        self.0.iter().filter_map(holds).collect()
    }
}

/// A check whose outcome is found out from time to time, elsewhere. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Finding(Arc<Mutex<Option<String>>>);

impl Finding {
    fn set(&self, problem: Option<String>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// What was found last.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone().map_or(Ok(()), Err)
    }
}

/// Between looks.
const LOOK: Duration = Duration::from_secs(2);
/// A daemon or file system that takes longer does not work.
const PATIENCE: Duration = Duration::from_secs(5);

/// Checks these directories once, within [`PATIENCE`].
pub(crate) async fn look_at_disks(finding: &Finding, directories: &[PathBuf]) {
    if let Ok(Ok(found)) = tokio::time::timeout(PATIENCE, begin_look(directories.to_vec())).await {
        finding.set(found);
    }
}

/// Finds out whether containerd answers, until `shutdown`.
pub(crate) async fn watch_containerd(finding: Finding, containerd: Containerd, shutdown: CancellationToken) {
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
        let problem = match tokio::time::timeout(PATIENCE, containerd.version()).await {
            Ok(answer) => answer.err().map(|error| error.to_string()),
            Err(_) => Some(format!("containerd has not answered for {} s", PATIENCE.as_secs())),
        };
        finding.set(problem);
    }
}

/// What is wrong with the file systems of these directories, if they say so in time.
pub(crate) async fn disk_trouble(directories: Vec<PathBuf>) -> Option<String> {
    tokio::time::timeout(PATIENCE, begin_look(directories)).await.ok()?.ok()?
}

/// Finds out whether the file systems of these directories have room and answer, until `shutdown`.
pub(crate) async fn watch_disks(finding: Finding, directories: Vec<PathBuf>, shutdown: CancellationToken) {
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
        let mut look = begin_look(directories.clone());
        match tokio::time::timeout(PATIENCE, &mut look).await {
            Ok(found) => finding.set(found.unwrap_or_default()),
            Err(_) => {
                finding.set(Some(format!("a file system has not answered for {} s", PATIENCE.as_secs())));
                // One thread waits for it, not one more each time.
                let Some(found) = shutdown.run_until_cancelled(look).await else { return };
                finding.set(found.unwrap_or_default());
            }
        }
    }
}

/// Looks on a thread of its own: a file system that hangs holds up that thread and nothing else.
fn begin_look(directories: Vec<PathBuf>) -> JoinHandle<Option<String>> {
    tokio::task::spawn_blocking(move || directories.iter().find_map(|directory| trouble(directory)))
}

/// A twentieth of a file system, or this, whichever is less, must be free: below it, images and logs have no room.
const ROOM: u64 = 100 << 20;

/// Whether a directory's file system has room, or does not say.
pub(crate) fn has_room(directory: &Path) -> bool {
    trouble(directory).is_none()
}

fn trouble(directory: &Path) -> Option<String> {
    let shown = directory.display();
    let found = match rustix::fs::statvfs(directory) {
        Ok(found) => found,
        Err(error) => return Some(format!("{shown}: {error}")),
    };
    let (free, all) = (found.f_bavail.saturating_mul(found.f_frsize), found.f_blocks.saturating_mul(found.f_frsize));
    if found.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
        Some(format!("the file system of {shown} is read-only"))
    } else if free < ROOM.min(all / 20) {
        Some(format!("the file system of {shown} has {:.1} of {:.1} MB left", free as f64 / 1e6, all as f64 / 1e6))
    } else if found.f_files > 0 && found.f_favail == 0 {
        Some(format!("the file system of {shown} has no inode left"))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_told_with_its_name() {
        let finding = Finding::default();
        let mut conditions = Conditions::default();
        let found = finding.clone();
        conditions.add("disk_full", true, SETTLED, move || found.check());
        let now = Instant::now();
        assert!(conditions.holding(now).is_empty());
        finding.set(Some("1 MB left".to_owned()));
        assert!(conditions.holding(now).is_empty(), "it may be over at once");
        let [only] = conditions.holding(now + SETTLED).try_into().expect("one");
        finding.set(None);
        assert!(conditions.holding(now + SETTLED).is_empty());
        assert_eq!(
            (only.r#type.as_str(), only.message.as_str(), only.blocks_scheduling),
            ("disk_full", "1 MB left", true)
        );
    }

    #[test]
    fn a_directory_that_is_not_there_is_trouble() {
        assert!(trouble(Path::new("/nonexistent")).is_some());
        // Read-only, whatever else it is.
        assert!(trouble(Path::new("/proc")).is_none_or(|trouble| trouble.contains("read-only")));
    }
}
