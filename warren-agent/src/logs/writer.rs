//! The process beside a container. It is started by the runtime's shim with the container's output on its file descriptors
//! 3 and 4, and lives as long as somebody has their other ends.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Mutex, PoisonError},
    thread,
    time::SystemTime,
};

use super::{FILE, LOST, OWNER, Owner, lost};
use crate::stats;

/// The first argument of the program that makes it this process.
pub const COMMAND: &str = "container-log";
/// A longer line is cut into parts: what the process holds is bounded.
const MAX_LINE: u64 = 16 << 10;

pub(super) fn argument(directory: &Path, max_bytes: u64, files: u32) -> String {
    format!("{max_bytes}:{files}:{}", directory.display())
}

/// Writes what a container writes until it ends. `argument` says where, and how much: `BYTES:FILES:DIRECTORY`.
#[must_use]
pub fn write(argument: &str) -> ExitCode {
    let mut parts = argument.splitn(3, ':');
    let mut next = || parts.next().unwrap_or_default();
    let (Ok(max_bytes), Ok(files)) = (next().parse(), next().parse()) else { return ExitCode::FAILURE };
    // The runtime asks it to end as soon as the container has: what is still in the pipes, a crash's last words perhaps, is
    // written first. It ends with the pipes.
    let _ = ctrlc::set_handler(|| ());
    let directory = PathBuf::from(next());
    join_others(&directory);
    let rotating = Mutex::new(Rotating::new(directory, max_bytes, files));
    // The pipes are opened once more by their names: that takes no trust in what the numbers mean. Without them it does not say that it is
    // there, and the container is not started.
    let open = |descriptor| File::open(format!("/proc/self/fd/{descriptor}"));
    let (Ok(stdout), Ok(stderr)) = (open(3), open(4)) else { return ExitCode::FAILURE };
    thread::scope(|scope| {
        for (file, stream) in [(stdout, "stdout"), (stderr, "stderr")] {
            let rotating = &rotating;
            scope.spawn(move || copy(file, stream, rotating));
        }
        // The runtime waits for a sign that this process is there.
        if let Ok(mut ready) = File::options().write(true).open("/proc/self/fd/5") {
            let _ = ready.write_all(b"1");
        }
    });
    ExitCode::SUCCESS
}

/// Goes where what it may take of the processors is bounded. Where that cannot be, the log counts more.
fn join_others(directory: &Path) {
    let owner = fs::read(directory.join(OWNER)).ok().and_then(|json| serde_json::from_slice::<Owner>(&json).ok());
    if let Some(owner) = owner.filter(|owner| !owner.writer.as_os_str().is_empty()) {
        let _ = stats::join_cpu(&owner.writer);
    }
}

/// Reads lines to the end, whatever becomes of them: a full disk must not hold the container up.
fn copy(from: File, stream: &str, to: &Mutex<Rotating>) {
    let mut from = BufReader::with_capacity(64 << 10, from);
    let mut line = Vec::new();
    loop {
        line.clear();
        match io::Read::take(&mut from, MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let whole = line.last() == Some(&b'\n');
        if whole {
            line.pop();
        }
        let time = prost_types::Timestamp::from(SystemTime::now());
        let mut entry = format!("{time} {stream} {} ", if whole { 'F' } else { 'P' }).into_bytes();
        entry.extend_from_slice(&line);
        entry.push(b'\n');
        to.lock().unwrap_or_else(PoisonError::into_inner).write(&entry);
    }
}

/// A file that is put aside when it is full.
struct Rotating {
    directory: PathBuf,
    max_bytes: u64,
    files: u32,
    file: Option<File>,
    size: u64,
    /// Where the number of lost entries is kept: opened while there is room for it.
    count: Option<File>,
    lost: u64,
    /// Those that the log itself does not speak of yet.
    unsaid: u64,
}

impl Rotating {
    fn new(directory: PathBuf, max_bytes: u64, files: u32) -> Self {
        let count = File::options().read(true).write(true).create(true).truncate(false).open(directory.join(LOST));
        let count = count.ok();
        if let Some(count) = &count {
            // For as long as this process writes: readers look whether it still does.
            let _ = count.lock();
        }
        let mut rotating = Self { directory, max_bytes, files, file: None, size: 0, count, lost: 0, unsaid: 0 };
        rotating.lost = lost(&rotating.directory);
        rotating.keep_count();
        rotating
    }

    /// In place, and always as long: a full disk has room for it.
    fn keep_count(&self) {
        if let Some(count) = &self.count {
            let _ = count.write_all_at(&self.lost.to_le_bytes(), 0);
        }
    }

    /// Writes an entry, or counts it as lost. Once there is room again, the log says how many are missing.
    fn write(&mut self, entry: &[u8]) {
        if self.unsaid > 0 {
            let time = prost_types::Timestamp::from(SystemTime::now());
            let said =
                format!("{time} stderr F [warren: {} lines were lost: they could not be written]\n", self.unsaid);
            if self.append(said.as_bytes()).is_ok() {
                self.unsaid = 0;
            }
        }
        if self.append(entry).is_err() {
            self.lost += 1;
            self.unsaid += 1;
            self.keep_count();
        }
    }

    fn path(&self, number: u32) -> PathBuf {
        self.directory.join(if number == 0 { FILE.to_owned() } else { format!("{FILE}.{number}") })
    }

    fn append(&mut self, entry: &[u8]) -> io::Result<()> {
        if self.size > 0 && self.size + entry.len() as u64 > self.max_bytes {
            self.file = None;
            for number in (1..self.files).rev() {
                // One that is not there yet leaves its place free.
                let _ = fs::rename(self.path(number - 1), self.path(number));
            }
            if self.files <= 1 {
                let _ = fs::remove_file(self.path(0));
            }
            self.size = 0;
        }
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let file = File::options().create(true).append(true).open(self.path(0))?;
                self.size = file.metadata()?.len();
                self.file.insert(file)
            }
        };
        if let Err(error) = file.write_all(entry) {
            // A part of an entry would spoil the next one.
            let _ = file.set_len(self.size);
            return Err(error);
        }
        self.size += entry.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_put_aside_when_they_are_full() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut rotating = Rotating::new(directory.path().to_owned(), 10, 3);
        for i in 0..9 {
            rotating.append(format!("{i}234\n").as_bytes()).expect("writable");
        }
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap_or_default();
        assert_eq!([read("log.2"), read("log.1"), read("log")], ["4234\n5234\n", "6234\n7234\n", "8234\n"]);
        assert!(!directory.path().join("log.3").exists());
        // A process that goes on where another left off knows how full the file is.
        let mut again = Rotating { file: None, size: 0, ..rotating };
        again.append(b"9234\n").expect("writable");
        again.append(b"a234\n").expect("writable");
        assert_eq!([read("log.1"), read("log")], ["8234\n9234\n", "a234\n"]);
    }

    #[test]
    fn what_cannot_be_written_is_counted_and_said() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut rotating = Rotating::new(directory.path().to_owned(), 1 << 20, 2);
        rotating.write(b"one\n");
        // As on a full disk: /dev/full takes nothing.
        rotating.file = File::options().write(true).open("/dev/full").ok();
        rotating.write(b"two\n");
        rotating.write(b"three\n");
        assert_eq!(lost(directory.path()), 2);
        rotating.file = None;
        rotating.write(b"four\n");
        let log = fs::read_to_string(directory.path().join(FILE)).expect("readable");
        assert!(
            log.starts_with("one\n")
                && log.ends_with(" stderr F [warren: 2 lines were lost: they could not be written]\nfour\n"),
            "{log}"
        );
        assert!(super::super::is_written(directory.path()));
        drop(rotating);
        assert!(!super::super::is_written(directory.path()));
        // One that goes on where another left off goes on counting.
        assert_eq!(Rotating::new(directory.path().to_owned(), 1 << 20, 2).lost, 2);
    }
}
