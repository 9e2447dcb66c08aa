use std::{sync::Arc, time::Duration};

use openraft::SnapshotPolicy;

/// How far apart the managers are, and on what disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Profile {
    /// One site, disks of servers: failover in 1 to 1.5 seconds.
    #[default]
    Lan,
    /// Several sites.
    Wan,
    /// Slow or worn disks, like SD cards.
    Edge,
}

impl Profile {
    /// Heartbeat, and the shortest election timeout. A leader is followed for twice that timeout after its last heartbeat; who then
    /// waits another, of once to twice its length, becomes a candidate: three to four of them after the leader has gone.
    fn times(self) -> (Duration, Duration) {
        let ms = Duration::from_millis;
        match self {
            Self::Lan => (ms(100), ms(350)),
            Self::Wan => (ms(350), ms(1000)),
            Self::Edge => (ms(500), ms(2500)),
        }
    }
}

/// How a manager takes part in consensus.
#[derive(Clone, Debug)]
pub struct Options {
    /// This manager's id, never used by another.
    pub id: u64,
    /// Where other managers reach it.
    pub address: String,
    /// How far apart the managers are.
    pub profile: Profile,
    /// Log entries between snapshots, at most.
    pub snapshot_after: u64,
    /// Bytes of commands between snapshots, about.
    pub snapshot_after_bytes: u64,
}

/// Openraft's own election default is ten appends; slower disks get more time.
const ELECTION_IN_SYNCS: u32 = 20;
/// Entries kept behind a snapshot for followers that are not far behind.
const KEPT_BEHIND_SNAPSHOT: u64 = 500;
/// A whole snapshot's transfer.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(120);

impl Options {
    pub(crate) fn raft(&self, sync: Duration) -> Result<Arc<openraft::Config>, openraft::ConfigError> {
        let (heartbeat, shortest) = self.profile.times();
        let election = shortest.max(sync * ELECTION_IN_SYNCS);
        let heartbeat = heartbeat.max(election / 10).min(election / 3);
        let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let config = openraft::Config {
            cluster_name: "warren".to_owned(),
            heartbeat_interval: ms(heartbeat),
            election_timeout_min: ms(election),
            election_timeout_max: ms(election * 2),
            install_snapshot_timeout: ms(SNAPSHOT_TIMEOUT),
            snapshot_policy: SnapshotPolicy::LogsSinceLast(self.snapshot_after),
            max_in_snapshot_log_to_keep: KEPT_BEHIND_SNAPSHOT.min(self.snapshot_after),
            enable_pre_vote: Some(true),
            // The state is in memory and the committed index may lag behind after a crash: a restarted leader must be
            // elected again, or it could serve what it had not applied yet.
            enable_leader_restore: Some(false),
            ..openraft::Config::default()
        };
        Ok(Arc::new(config.validate()?))
    }
}
