use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Seek as _, SeekFrom},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tokio::sync::mpsc;
use warren_proto::v1::{LogLine, LogStream};

use super::{FILE, is_written};

/// Between looks whether more was written.
const POLL: Duration = Duration::from_millis(100);
/// Lines that are sent together, unless they are long.
const BATCH_LINES: usize = 256;
/// Bytes after which no other line is added to a batch.
const BATCH_BYTES: usize = 256 << 10;
/// A longer line is given in parts.
const LONGEST: usize = 1 << 20;

/// What is wanted of a container's log.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query {
    /// Goes on with what comes.
    pub(crate) follow: bool,
    /// The last lines; all unless given.
    pub(crate) tail: Option<usize>,
    /// Only what was written since.
    pub(crate) since: Option<SystemTime>,
}

/// Parses a line of a file; `None` for one that is none.
fn parse(line: &[u8]) -> Option<(SystemTime, LogLine)> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let time: prost_types::Timestamp = std::str::from_utf8(parts.next()?).ok()?.parse().ok()?;
    let stream = match parts.next()? {
        b"stdout" => LogStream::Stdout,
        b"stderr" => LogStream::Stderr,
        _ => return None,
    };
    let partial = parts.next()? == b"P";
    let text = parts.next().unwrap_or_default().to_vec();
    let wire = pbjson_types::Timestamp { seconds: time.seconds, nanos: time.nanos };
    let line = LogLine { time: Some(wire), stream: stream.into(), text, partial };
    Some((SystemTime::try_from(time).ok()?, line))
}

/// A container's files, oldest first.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut older: Vec<(u32, PathBuf)> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix(FILE)?.strip_prefix('.')?.parse().ok()?;
            Some((number, entry.path()))
        })
        .collect();
    older.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
    older.into_iter().map(|(_, path)| path).chain([directory.join(FILE)]).collect()
}

/// Puts lines together that were too long for one entry.
#[derive(Debug, Default)]
struct Assembler {
    /// What has come of a line, of each stream.
    begun: [Option<(SystemTime, LogLine)>; 2],
}

impl Assembler {
    /// Takes an entry, and gives the line that it ends, with the time of its first part.
    fn push(&mut self, time: SystemTime, entry: LogLine) -> Option<(SystemTime, LogLine)> {
        let begun = &mut self.begun[usize::from(entry.stream() == LogStream::Stderr)];
        let (time, mut line) = match begun.take() {
            Some((time, mut line)) => {
                line.text.extend_from_slice(&entry.text);
                (time, line)
            }
            None => (time, LogLine { text: entry.text, ..entry }),
        };
        line.partial = entry.partial;
        if entry.partial && line.text.len() < LONGEST {
            *begun = Some((time, line));
            return None;
        }
        Some((time, line))
    }

    /// What has no end yet.
    fn rest(&mut self) -> impl Iterator<Item = (SystemTime, LogLine)> {
        self.begun.iter_mut().filter_map(Option::take)
    }
}

/// Lines of a log.
#[derive(Debug, Default)]
struct Batch {
    lines: Vec<LogLine>,
    /// There are no more just now.
    at_end: bool,
}

/// Reads a container's files, from the oldest on.
#[derive(Debug)]
struct Reader {
    directory: PathBuf,
    query: Query,
    file: Option<BufReader<File>>,
    /// What was read of an entry whose end is not there yet.
    entry: Vec<u8>,
    assembler: Assembler,
    /// There is a newer file, and this one is read to its end.
    is_last_look: bool,
    /// Lines that come before what is read next.
    kept: VecDeque<LogLine>,
}

impl Reader {
    fn new(directory: PathBuf, query: Query) -> Self {
        Self {
            directory,
            query,
            file: None,
            entry: Vec::new(),
            assembler: Assembler::default(),
            is_last_look: false,
            kept: VecDeque::new(),
        }
    }

    fn take(&mut self, parsed: Option<(SystemTime, LogLine)>) -> Option<LogLine> {
        let (time, entry) = parsed?;
        let (time, line) = self.assembler.push(time, entry)?;
        self.is_wanted(time).then_some(line)
    }

    fn is_wanted(&self, time: SystemTime) -> bool {
        self.query.since.is_none_or(|since| time >= since)
    }

    /// The next line, if there is one.
    fn next(&mut self) -> io::Result<Option<LogLine>> {
        loop {
            while let Some(file) = &mut self.file
                && file.read_until(b'\n', &mut self.entry)? > 0
                && self.entry.ends_with(b"\n")
            {
                let parsed = parse(&self.entry);
                self.entry.clear();
                if let Some(line) = self.take(parsed) {
                    return Ok(Some(line));
                }
            }
            if let Some(file) = &mut self.file {
                // An entry that a full disk cut short was taken back.
                let length = file.get_ref().metadata()?.len();
                if file.stream_position()? > length {
                    file.seek(SeekFrom::Start(length))?;
                    self.entry.clear();
                }
            }
            let Some(next) = self.after_this() else { return Ok(None) };
            // What was written before the next file began is read first.
            if self.file.is_some() && !std::mem::replace(&mut self.is_last_look, true) {
                continue;
            }
            let opened = File::open(&next.1).ok();
            // Between the look and the opening files may have been renamed.
            if opened.as_ref().and_then(|file| file.metadata().ok()).is_some_and(|found| found.ino() != next.0) {
                continue;
            }
            self.file = opened.map(BufReader::new);
            self.is_last_look = false;
            self.entry.clear();
        }
    }

    /// The file after this one and its inode, if there is one. Files get higher numbers, and the oldest are removed.
    fn after_this(&self) -> Option<(u64, PathBuf)> {
        let inode_of = |path: &Path| fs::metadata(path).ok().map(|metadata| metadata.ino());
        let inode = self.file.as_ref().and_then(|file| file.get_ref().metadata().ok()).map(|metadata| metadata.ino());
        let there: Vec<_> =
            files(&self.directory).into_iter().filter_map(|path| Some((inode_of(&path)?, path))).collect();
        let this = inode.and_then(|inode| there.iter().position(|(other, _)| *other == inode));
        // One that is gone was older than all that are there.
        there.into_iter().nth(this.map_or(0, |this| this + 1))
    }

    /// What there is besides whole lines; nothing more comes.
    fn rest(&mut self) -> Vec<LogLine> {
        let parsed = parse(&std::mem::take(&mut self.entry));
        let mut lines: Vec<_> = self.take(parsed).into_iter().collect();
        lines.append(&mut self.begun());
        lines
    }

    /// What has come of lines that have no end yet.
    fn begun(&mut self) -> Vec<LogLine> {
        let rest: Vec<_> = self.assembler.rest().collect();
        rest.into_iter().filter(|(time, _)| self.is_wanted(*time)).map(|(_, line)| line).collect()
    }

    /// The last lines of what is there, each whole.
    fn last(&mut self, tail: usize) -> io::Result<VecDeque<LogLine>> {
        let (mut kept, mut ends) = (VecDeque::<(LogLine, bool)>::new(), 0);
        let mut keep = |line: LogLine, is_end: bool| {
            ends += usize::from(is_end);
            kept.push_back((line, is_end));
            // A line may be in several parts: it goes with its end.
            while ends > tail
                && let Some((_, was_end)) = kept.pop_front()
            {
                ends -= usize::from(was_end);
            }
        };
        while let Some(line) = self.next()? {
            let is_end = !line.partial;
            keep(line, is_end);
        }
        if !self.query.follow {
            self.rest().into_iter().for_each(|line| keep(line, true));
        }
        Ok(kept.into_iter().map(|(line, _)| line).collect())
    }

    /// Reads on, not much at a time.
    fn batch(&mut self) -> io::Result<Batch> {
        if let Some(tail) = self.query.tail.take() {
            self.kept = self.last(tail)?;
        }
        let mut batch = Batch::default();
        let mut bytes = 0;
        while batch.lines.len() < BATCH_LINES && bytes < BATCH_BYTES {
            let next = match self.kept.pop_front() {
                None => self.next()?,
                kept => kept,
            };
            let Some(line) = next else {
                batch.at_end = true;
                if !self.query.follow {
                    batch.lines.append(&mut self.rest());
                }
                break;
            };
            bytes += line.text.len();
            batch.lines.push(line);
        }
        Ok(batch)
    }
}

/// Reads a container's log and sends its lines, until there are no more or nobody wants them. Following ends when the container does
/// not run any more and everything was read. No thread is held while there is nothing to read.
pub(crate) async fn read(
    directory: &Path,
    query: &Query,
    runs: impl Fn() -> bool,
    lines: mpsc::Sender<Vec<LogLine>>,
) -> io::Result<()> {
    let mut reader = Reader::new(directory.to_owned(), query.clone());
    let mut was_idle = false;
    loop {
        // Asked first: what it wrote before it ended is read below.
        let running = query.follow && (runs() || is_written(directory));
        let read = tokio::task::spawn_blocking(move || {
            let batch = reader.batch();
            (reader, batch)
        });
        let (back, batch) = read.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
        reader = back;
        let mut batch = batch?;
        let idle = batch.at_end && batch.lines.is_empty();
        if batch.at_end && !running {
            batch.lines.append(&mut reader.rest());
        } else if idle && was_idle {
            // The end of the line may be long in coming.
            batch.lines.append(&mut reader.begun());
        }
        was_idle = idle;
        if !batch.lines.is_empty() && lines.send(batch.lines).await.is_err() {
            return Ok(());
        }
        if batch.at_end {
            if !running {
                return Ok(());
            }
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = lines.closed() => return Ok(()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(directory: &Path, query: &Query) -> Vec<LogLine> {
        let mut reader = Reader::new(directory.to_owned(), query.clone());
        let mut lines = Vec::new();
        loop {
            let mut batch = reader.batch().expect("readable");
            lines.append(&mut batch.lines);
            if batch.at_end {
                return lines;
            }
        }
    }

    fn texts(directory: &Path, query: &Query) -> Vec<String> {
        lines(directory, query).into_iter().map(|line| String::from_utf8_lossy(&line.text).into_owned()).collect()
    }

    #[test]
    fn whatever_comes_is_read_or_refused() {
        let good: [&[u8]; 3] = [
            b"2026-11-22T10:00:00.123456789Z stdout F hello world\n",
            b"2026-11-22T10:00:00Z stderr P part",
            b"9999-12-31T23:59:59.999999999Z stdout F \xff\x00",
        ];
        warren_fuzz::fuzz(&good, |bytes| drop(parse(bytes)));
    }

    #[test]
    fn lines_are_read_in_order_by_number_and_by_time() {
        let directory = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).expect("writable");
        write("log.10", "2026-01-01T00:00:00Z stdout F zero\n");
        write("log.2", "2026-01-01T00:00:01Z stdout F one\nnonsense\n");
        write("log.1", "2026-01-01T00:00:02.5Z stderr P two \n");
        write("log", "2026-01-01T00:00:03Z stdout F \n2026-01-01T00:00:04Z stdout F four");
        let query = Query::default();
        assert_eq!(texts(directory.path(), &query), ["zero", "one", "", "four", "two "]);
        assert_eq!(texts(directory.path(), &Query { tail: Some(2), ..query.clone() }), ["four", "two "]);
        assert_eq!(texts(directory.path(), &Query { tail: Some(0), ..query.clone() }), [""; 0]);
        let at: prost_types::Timestamp = "2026-01-01T00:00:02.5Z".parse().expect("a time");
        let since = SystemTime::try_from(at).ok();
        assert_eq!(texts(directory.path(), &Query { since, ..query.clone() }), ["", "four", "two "]);
        assert_eq!(texts(Path::new("/none"), &query), [""; 0]);
    }

    #[test]
    fn a_long_line_is_one_line() {
        let directory = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).expect("writable");
        // Its parts are in two files, and something else was written between them.
        write("log.1", "2026-01-01T00:00:00Z stdout P one, \n2026-01-01T00:00:01Z stderr F other\n");
        write("log", "2026-01-01T00:00:02Z stdout F two\n2026-01-01T00:00:03Z stdout F three\n");
        let query = Query::default();
        assert_eq!(texts(directory.path(), &query), ["other", "one, two", "three"]);
        assert_eq!(texts(directory.path(), &Query { tail: Some(2), ..query.clone() }), ["one, two", "three"]);
        let first = &lines(directory.path(), &query)[1];
        assert_eq!(first.time.as_ref().map(|time| time.seconds % 60), Some(0), "its beginning's");
        // One without an end is given in parts.
        let long = format!("2026-01-01T00:00:00Z stdout P {}\n", "x".repeat(LONGEST / 2));
        write("log.1", &long.repeat(3));
        write("log", "2026-01-01T00:00:02Z stdout F y\n");
        let parts = lines(directory.path(), &query);
        assert_eq!(parts.iter().map(|part| part.text.len()).collect::<Vec<_>>(), [LONGEST, LONGEST / 2 + 1]);
        assert_eq!(parts.iter().map(|part| part.partial).collect::<Vec<_>>(), [true, false]);
        assert_eq!(lines(directory.path(), &Query { tail: Some(1), ..query.clone() }), parts);
        assert_eq!(texts(directory.path(), &Query { tail: Some(0), ..query }), [""; 0]);
    }
}
