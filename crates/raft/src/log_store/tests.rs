use std::{
    fs,
    path::{Path, PathBuf},
};

use openraft::{
    EntryPayload, StorageError,
    storage::RaftLogStorageExt as _,
    testing::log::{StoreBuilder, Suite},
    type_config::TypeConfigExt as _,
};
use raft_log::{ChunkId, Dump, DumpApi as _, RaftLogRecord, WALRecord};

use super::*;
use crate::{
    Freeze, StateMachine, Unobserved,
    files::{self, SnapshotFile, Wal, wal_config},
    machine::{LogLimit, Machine},
    snapshot::SnapshotStore,
    types::{Proposal, StoredMembership},
};

/// A machine that remembers nothing: the suite only looks at positions.
struct Forgetful;

impl StateMachine for Forgetful {
    fn apply(&mut self, _index: u64, _command: &str) -> io::Result<String> {
        Ok(String::new())
    }

    fn freeze(&self) -> Freeze {
        Box::new(|| Ok(Vec::new()))
    }

    fn restore(&mut self, _state: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

fn store(directory: &Path) -> io::Result<LogStore> {
    Ok(LogStore::new(Box::new(files::open(directory)?), Arc::new(Unobserved)))
}

struct Builder;

impl StoreBuilder<Config, LogStore, Machine, tempfile::TempDir> for Builder {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, Machine), StorageError<Config>> {
        let directory = tempfile::tempdir().expect("a directory");
        let log = store(&directory.path().join("log")).expect("opens");
        let snapshots = SnapshotFile::open(&directory.path().join("snapshot")).expect("opens");
        let snapshots = SnapshotStore::new(Box::new(snapshots));
        let limit = LogLimit::new(u64::MAX, Arc::default());
        let failure = log.failure();
        let machine = Machine::new(Box::new(Forgetful), snapshots, true, limit, Arc::new(Unobserved), failure);
        Ok((directory, log, machine))
    }
}

#[test]
fn openrafts_own_suite_passes() {
    Config::run(async { Suite::test_all(Builder).await }).expect("the suite passes");
}

fn entry(index: u64, text: &str) -> Entry {
    let leader = openraft::impls::leader_id_adv::LeaderId { term: 1, node_id: 1 };
    Entry { log_id: LogId::new(leader, index), payload: EntryPayload::Normal(Proposal(text.to_owned())) }
}

fn content(directory: &Path) -> io::Result<(Option<Vote>, Vec<Entry>)> {
    let log = store(directory)?;
    let vote = log.read().positions().vote;
    let entries = log.read().read(0, u64::MAX, usize::MAX)?;
    Ok((vote, entries))
}

/// What each record of the log makes of vote and number of entries, with the offset at which it ends.
fn boundaries(directory: &Path) -> Vec<(u64, Option<Vote>, usize)> {
    let mut found = Vec::new();
    let (mut vote, mut entries) = (None, 0);
    Dump::<Wal>::new(Arc::new(wal_config(directory)))
        .expect("can be dumped")
        .write_with(|_chunk: ChunkId, _i: u64, record| {
            let (segment, record): (_, RaftLogRecord<Wal>) = record?;
            match record {
                WALRecord::Action(raft_log::RaftLogAction::SaveVote(saved)) => vote = Some(saved.0),
                WALRecord::Action(raft_log::RaftLogAction::Append(..)) => entries += 1,
                _ => {}
            }
            found.push((segment.offset + segment.size, vote, entries));
            Ok(())
        })
        .expect("can be dumped");
    found
}

/// Cuts the log at every record boundary, before and behind each, and in the middle of each record: what comes back is
/// exactly what the whole records before the cut say.
#[test]
fn a_log_cut_anywhere_holds_the_whole_records_before_the_cut() {
    let origin = tempfile::tempdir().expect("a directory");
    let vote = Vote::new_committed(1, 1);
    let written: Vec<_> = (1..=40).map(|i| entry(i, &"x".repeat((i as usize * 37) % 300))).collect();
    Config::run(async {
        let mut log = store(origin.path()).expect("opens");
        log.save_vote(&vote).await.expect("saves");
        for entry in &written {
            log.blocking_append([entry.clone()]).await.expect("appends");
        }
    });
    let files: Vec<PathBuf> = fs::read_dir(origin.path())
        .expect("a directory")
        .map(|file| file.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "wal"))
        .collect();
    let [file] = files.as_slice() else { panic!("one chunk is expected: {files:?}") };
    let whole = fs::read(file).expect("readable");
    let boundaries = boundaries(origin.path());
    assert_eq!(boundaries.last().map(|last| (last.0, last.2)), Some((whole.len() as u64, written.len())));

    let mut cuts: Vec<u64> = Vec::new();
    for pair in boundaries.windows(2) {
        let (start, end) = (pair[0].0, pair[1].0);
        cuts.extend([start, start + 1, start.midpoint(end), end - 1]);
    }
    cuts.push(whole.len() as u64);
    for cut in cuts {
        let directory = tempfile::tempdir().expect("a directory");
        let copy = directory.path().join(file.file_name().expect("a name"));
        fs::write(copy, &whole[..cut as usize]).expect("writable");
        let (_, expected_vote, expected_entries) =
            *boundaries.iter().rfind(|(end, ..)| *end <= cut).expect("at least the first record is whole");
        let (vote, entries) = content(directory.path()).unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
        assert_eq!(vote, expected_vote, "cut at {cut}");
        assert_eq!(entries, written[..expected_entries], "cut at {cut}");
        // And again: what recovery wrote is itself recoverable.
        assert_eq!(content(directory.path()).expect("opens again").1.len(), expected_entries, "cut at {cut}");
    }
}

#[test]
fn a_damaged_record_is_an_error_and_not_a_shorter_log() {
    let origin = tempfile::tempdir().expect("a directory");
    Config::run(async {
        let mut log = store(origin.path()).expect("opens");
        for i in 1..=10 {
            log.blocking_append([entry(i, "some command")]).await.expect("appends");
        }
    });
    let boundaries = boundaries(origin.path());
    let file = fs::read_dir(origin.path())
        .expect("a directory")
        .map(|file| file.expect("a file").path())
        .find(|path| path.extension().is_some_and(|extension| extension == "wal"))
        .expect("a chunk");
    let mut bytes = fs::read(&file).expect("readable");
    // Every byte of a record in the middle, its length included.
    let (start, end) = (boundaries[4].0 as usize, boundaries[5].0 as usize);
    for i in start..end {
        bytes[i] ^= 0x40;
        fs::write(&file, &bytes).expect("writable");
        let found = content(origin.path()).map(|(_, entries)| entries.len());
        assert!(found.is_err(), "byte {i} of {start}..{end}: {found:?} entries");
        bytes[i] ^= 0x40;
    }
    fs::write(&file, &bytes).expect("writable");
    assert_eq!(content(origin.path()).expect("opens").1.len(), 10);
}

#[test]
fn one_directory_serves_one_manager() {
    let directory = tempfile::tempdir().expect("a directory");
    let _first = store(directory.path()).expect("opens");
    let second = store(directory.path());
    assert_eq!(second.err().map(|error| error.kind()), Some(io::ErrorKind::WouldBlock));
}

#[test]
fn a_membership_survives_the_disk() {
    let directory = tempfile::tempdir().expect("a directory");
    let membership = StoredMembership::default().membership().clone();
    let leader = openraft::impls::leader_id_adv::LeaderId { term: 3, node_id: 7 };
    let written = Entry { log_id: LogId::new(leader, 1), payload: EntryPayload::Membership(membership) };
    Config::run(async {
        let mut log = store(directory.path()).expect("opens");
        log.blocking_append([written.clone()]).await.expect("appends");
    });
    assert_eq!(content(directory.path()).expect("opens").1, [written]);
}

#[test]
fn what_failed_first_is_told() {
    let failure = super::FirstFailure::default();
    assert_eq!(failure.note(Ok(1)).expect("went well"), 1);
    assert_eq!(failure.get(), None);
    for why in ["the disk is full", "the writer has ended"] {
        let passed_on = failure.note(Err::<(), _>(std::io::Error::other(why))).expect_err("failed");
        assert_eq!(passed_on.to_string(), why);
    }
    assert_eq!(failure.get(), Some("the log cannot be written: the disk is full"));
}
