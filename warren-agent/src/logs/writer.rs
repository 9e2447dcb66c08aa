//! The process beside a container. It is started by the runtime's shim with the container's output on its file descriptors
//! 3 and 4, and lives as long as somebody has their other ends.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Mutex, PoisonError},
    thread,
    time::SystemTime,
};

use super::FILE;

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
    let rotating = Mutex::new(Rotating { directory: PathBuf::from(next()), max_bytes, files, file: None, size: 0 });
    thread::scope(|scope| {
        for (descriptor, stream) in [(3, "stdout"), (4, "stderr")] {
            let rotating = &rotating;
            // The pipe is opened once more by its name: that takes no trust in what the number means.
            let opened = File::open(format!("/proc/self/fd/{descriptor}"));
            scope.spawn(move || opened.map(|file| copy(file, stream, rotating)));
        }
        // The runtime waits for a sign that this process is there.
        if let Ok(mut ready) = File::options().write(true).open("/proc/self/fd/5") {
            let _ = ready.write_all(b"1");
        }
    });
    ExitCode::SUCCESS
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
        let _ = to.lock().unwrap_or_else(PoisonError::into_inner).append(&entry);
    }
}

/// A file that is put aside when it is full.
struct Rotating {
    directory: PathBuf,
    max_bytes: u64,
    files: u32,
    file: Option<File>,
    size: u64,
}

impl Rotating {
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
                fs::remove_file(self.path(0))?;
            }
        }
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let file = File::options().create(true).append(true).open(self.path(0))?;
                self.size = file.metadata()?.len();
                self.file.insert(file)
            }
        };
        file.write_all(entry)?;
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
        let mut rotating =
            Rotating { directory: directory.path().to_owned(), max_bytes: 10, files: 3, file: None, size: 0 };
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
}
