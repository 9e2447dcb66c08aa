use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, BufRead as _, BufReader},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime},
};

use warren_proto::v1::{LogLine, LogStream};

use super::FILE;

/// Between looks whether more was written.
const POLL: Duration = Duration::from_millis(100);

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

/// Reads a container's log and gives each line to `sink`, until there is no more, or `sink` wants none. Following ends when
/// the container does not run any more and everything was read. Blocks.
pub(crate) fn read(
    directory: &Path,
    query: &Query,
    runs: impl Fn() -> bool,
    mut sink: impl FnMut(LogLine) -> bool,
) -> io::Result<()> {
    let wanted = |time: SystemTime| query.since.is_none_or(|since| time >= since);
    let mut kept = VecDeque::new();
    let mut newest = None;
    for path in files(directory) {
        let Ok(file) = File::open(&path) else { continue };
        let mut reader = BufReader::new(file);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line)? > 0 {
            if let Some((_, parsed)) = parse(&line).filter(|(time, _)| wanted(*time)) {
                kept.push_back(parsed);
                match query.tail {
                    Some(tail) if kept.len() > tail => drop(kept.pop_front()),
                    // Nothing to hold back.
                    None => {
                        if kept.pop_front().is_some_and(|line| !sink(line)) {
                            return Ok(());
                        }
                    }
                    Some(_) => {}
                }
            }
            line.clear();
        }
        newest = Some(reader);
    }
    for line in kept {
        if !sink(line) {
            return Ok(());
        }
    }
    if query.follow { follow(directory, newest, runs, wanted, sink) } else { Ok(()) }
}

fn follow(
    directory: &Path,
    mut reader: Option<BufReader<File>>,
    runs: impl Fn() -> bool,
    wanted: impl Fn(SystemTime) -> bool,
    mut sink: impl FnMut(LogLine) -> bool,
) -> io::Result<()> {
    let current = directory.join(FILE);
    let mut line = Vec::new();
    loop {
        // Asked first: what it wrote before it ended is read below.
        let running = runs();
        let inode = reader.as_ref().and_then(|reader| reader.get_ref().metadata().ok()).map(|metadata| metadata.ino());
        if let Some(reader) = &mut reader {
            // A line that is not finished yet stays in `line`.
            while reader.read_until(b'\n', &mut line)? > 0 && line.ends_with(b"\n") {
                if let Some((_, parsed)) = parse(&line).filter(|(time, _)| wanted(*time))
                    && !sink(parsed)
                {
                    return Ok(());
                }
                line.clear();
            }
        }
        // Put aside, or there at last. It may have been put aside more than once: what is between is read by its number.
        let now = fs::metadata(&current).ok().map(|metadata| metadata.ino());
        if now.is_some() && now != inode {
            let known = files(directory)
                .into_iter()
                .skip_while(|path| inode.is_some() && fs::metadata(path).ok().map(|metadata| metadata.ino()) != inode);
            let next =
                known.skip(usize::from(inode.is_some())).find(|path| path.exists()).unwrap_or_else(|| current.clone());
            reader = File::open(next).ok().map(BufReader::new);
            line.clear();
            continue;
        }
        if !running {
            return Ok(());
        }
        thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(directory: &Path, query: &Query) -> Vec<String> {
        let mut texts = Vec::new();
        read(
            directory,
            query,
            || false,
            |line| {
                texts.push(String::from_utf8_lossy(&line.text).into_owned());
                true
            },
        )
        .expect("readable");
        texts
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
        assert_eq!(texts(directory.path(), &query), ["zero", "one", "two ", "", "four"]);
        assert_eq!(texts(directory.path(), &Query { tail: Some(2), ..query.clone() }), ["", "four"]);
        assert_eq!(texts(directory.path(), &Query { tail: Some(0), ..query.clone() }), [""; 0]);
        let at: prost_types::Timestamp = "2026-01-01T00:00:02.5Z".parse().expect("a time");
        let since = SystemTime::try_from(at).ok();
        assert_eq!(texts(directory.path(), &Query { since, ..query.clone() }), ["two ", "", "four"]);
        assert_eq!(texts(Path::new("/none"), &query), [""; 0]);
    }
}
