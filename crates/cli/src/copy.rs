//! `warren container cp`: files into and out of containers, by the `tar` of their image.

use std::{
    ffi::OsStr,
    fs,
    io::{self, Read as _},
    os::unix::fs::PermissionsExt as _,
    path::{Component, Path, PathBuf},
};

use clap::Args;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use warren_proto::v1::{self, exec_request::Message as Request, exec_response::Message as Response};

use crate::{
    client::ClientArguments,
    complete,
    error::Error,
    exec::{begin, request},
    output,
};

/// Bytes that travel together.
const CHUNK: usize = 32 << 10;
/// Chunks on their way; then whoever makes them waits.
const AHEAD: usize = 16;

#[derive(Args, Clone, Debug)]
pub(crate) struct Arguments {
    /// Local path or CONTAINER:PATH; DIRECTORY/. copies the directory's contents
    #[arg(add = complete::places())]
    source: String,
    /// Local path or CONTAINER:PATH: an existing directory to copy into, or the name of the copy
    #[arg(add = complete::places())]
    destination: String,
}

/// A place on this machine or in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Here(PathBuf),
    Inside { container: String, path: String },
}

impl Place {
    /// A colon makes it a container's, unless something of a path is before it: `./a:b` is a file.
    fn parse(text: &str) -> Self {
        match text.split_once(':') {
            Some((container, path)) if !container.is_empty() && !container.contains('/') => {
                Self::Inside { container: container.to_owned(), path: path.to_owned() }
            }
            _ => Self::Here(PathBuf::from(text)),
        }
    }
}

/// Copies.
pub(crate) async fn run(arguments: Arguments, client: &ClientArguments) -> Result<(), Error> {
    match (Place::parse(&arguments.source), Place::parse(&arguments.destination)) {
        (Place::Inside { container, path }, Place::Here(to)) => out_of(client, &container, &path, &to).await,
        (Place::Here(from), Place::Inside { container, path }) => into(client, &container, &from, &path).await,
        (Place::Here(_), Place::Here(_)) => {
            Err(Error::Usage("one of the two must be in a container: CONTAINER:PATH".to_owned()))
        }
        (Place::Inside { .. }, Place::Inside { .. }) => Err(Error::Usage(
            "both are in containers: copy to this machine first (a file with a colon in its name is ./NAME)".to_owned(),
        )),
    }
}

/// A path's directory and its last name.
fn split(path: &str) -> Result<(String, String), Error> {
    let trimmed = path.trim_end_matches('/');
    let (directory, name) = trimmed.rsplit_once('/').unwrap_or((".", trimmed));
    if !path.starts_with('/') {
        return Err(Error::Usage(format!("{path:?} is not an absolute path in the container")));
    }
    if matches!(name, "" | "." | "..") {
        return Err(Error::Usage(format!("{path:?} has no name of its own: copy what is in it one by one")));
    }
    Ok((if directory.is_empty() { "/".to_owned() } else { directory.to_owned() }, name.to_owned()))
}

/// The directory of a path like `/srv/.`: what is in it is meant, and not itself.
fn contents(path: &str) -> Option<&str> {
    path.strip_suffix("/.").map(|directory| if directory.is_empty() { "/" } else { directory })
}

async fn out_of(client: &ClientArguments, container: &str, path: &str, to: &Path) -> Result<(), Error> {
    let (directory, name) = match contents(path) {
        Some(directory) if path.starts_with('/') => (directory.to_owned(), ".".to_owned()),
        _ => split(path)?,
    };
    if to.to_string_lossy().ends_with('/') && !to.is_dir() {
        return Err(Error::Usage(format!("there is no directory {}", to.display())));
    }
    let target = match (to.is_dir(), name.as_str()) {
        (true, ".") => to.canonicalize().map_err(|source| Error::File { path: to.to_owned(), source })?,
        (true, name) => to.join(name),
        (false, _) => to.to_owned(),
    };
    let (sender, receiver) = mpsc::channel(AHEAD);
    let command = ["tar", "cf", "-", "-C", &directory, "--", &name].map(str::to_owned).to_vec();
    let unpacking = tokio::task::spawn_blocking(move || unpack(Chunks::new(receiver), OsStr::new(&name), &target));
    let ended = exec(client, container, command, None, Some(sender)).await;
    let unpacked = unpacking.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
    let ended = ended?;
    match unpacked {
        // An archive that ends too soon is what became of the tar that made it.
        Err(error) if ended.code == 0 || error.kind() != io::ErrorKind::UnexpectedEof => {
            Err(Error::Copy(output::printable(&format!("{path} of {container}: {error}")).into_owned()))
        }
        Ok(()) if ended.has_only_changed() => {
            eprintln!("{} of {container}: {}", output::printable(path), ended.said());
            Ok(())
        }
        _ => ended.checked(container),
    }
}

async fn into(client: &ClientArguments, container: &str, from: &Path, path: &str) -> Result<(), Error> {
    let failed = |source| Error::File { path: from.to_owned(), source };
    // A link is followed, and the copy is called what it is.
    let real = from.canonicalize().map_err(failed)?;
    let is_contents = contents(&from.to_string_lossy()).is_some() || from == Path::new(".");
    let own = if is_contents { Some(OsStr::new(".")) } else { from.file_name().or_else(|| real.file_name()) };
    let own = own.map(OsStr::to_owned).ok_or_else(|| {
        Error::Usage(format!("{} has no name of its own: copy what is in it one by one", from.display()))
    })?;
    let is_directory = ["test", "-d", path].map(str::to_owned).to_vec();
    let is_directory = path.starts_with('/') && exec(client, container, is_directory, None, None).await?.code == 0;
    let (directory, name) = if is_directory {
        (path.to_owned(), own)
    } else if path.starts_with('/') && path.ends_with('/') {
        return Err(Error::Copy(format!("{container}: there is no directory {path}")));
    } else {
        let (directory, name) = split(path)?;
        (directory, name.into())
    };
    let (sender, receiver) = mpsc::channel(AHEAD);
    let packing = tokio::task::spawn_blocking(move || pack(&real, &name, sender));
    // The files are whose the container is, as if it had written them.
    let command = ["tar", "xof", "-", "-C", &directory].map(str::to_owned).to_vec();
    let ended = exec(client, container, command, Some(receiver), None).await;
    let packed = packing.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
    match packed {
        // Nobody read any more, and says why.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        Err(error) => return Err(Error::Copy(error.to_string())),
        Ok(()) => {}
    }
    ended?.checked(container)
}

/// How a command ended.
struct Ended {
    code: i32,
    stderr: String,
}

impl Ended {
    /// The first thing that its tar had to say; the last is that it ends.
    fn said(&self) -> String {
        let said = self.stderr.lines().map(str::trim).find(|line| !line.is_empty());
        said.map_or_else(
            || format!("its tar exited with code {}", self.code),
            |said| output::printable(said).into_owned(),
        )
    }

    /// Whether all that was wrong is that files were written to meanwhile, as logs are.
    fn has_only_changed(&self) -> bool {
        let harmless = ["changed as we read it", "removed before we read it", "file is the archive"];
        let mut lines = self.stderr.lines().filter(|line| !line.trim().is_empty()).peekable();
        self.code == 1 && lines.peek().is_some() && lines.all(|line| harmless.iter().any(|words| line.contains(words)))
    }

    fn checked(self, container: &str) -> Result<(), Error> {
        if self.code == 0 { Ok(()) } else { Err(Error::Copy(format!("{container}: {}", self.said()))) }
    }
}

/// Runs a command in a container, with input and output if they are wanted.
async fn exec(
    client: &ClientArguments,
    container: &str,
    command: Vec<String>,
    input: Option<mpsc::Receiver<Vec<u8>>>,
    output: Option<mpsc::Sender<Vec<u8>>>,
) -> Result<Ended, Error> {
    /// More would not be read.
    const STDERR: usize = 4096;
    let program = command.first().cloned().unwrap_or_default();
    let start =
        v1::ExecStart { container: container.to_owned(), command, input: input.is_some(), ..Default::default() };
    let (requests, mut responses) = begin(client, start).await?;
    // What is not wanted any more is not fed.
    let _feeding = input.map(|mut input| {
        let requests = requests.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            while let Some(bytes) = input.recv().await {
                if requests.send(request(Request::Input(bytes))).await.is_err() {
                    return;
                }
            }
            let _ = requests.send(request(Request::InputEnd(v1::ExecInputEnd {}))).await;
        }))
    });
    let mut stderr = Vec::new();
    let code = loop {
        match responses.message().await?.ok_or(Error::NoAnswer)?.message {
            Some(Response::Stdout(bytes)) => {
                if let Some(output) = &output
                    && output.send(bytes).await.is_err()
                {
                    // Whoever unpacks has met an error, and says it.
                    break 0;
                }
            }
            Some(Response::Stderr(bytes)) if stderr.len() < STDERR => stderr.extend(bytes),
            Some(Response::ExitCode(code)) => break code,
            Some(Response::Failed(failed)) if failed.not_found => {
                return Err(Error::Copy(format!(
                    "{container}: there is no {program} in its image, which does the copying"
                )));
            }
            Some(Response::Failed(failed)) => return Err(Error::NotStarted { failed }),
            Some(Response::Started(_) | Response::Stderr(_)) | None => {}
        }
    };
    Ok(Ended { code, stderr: String::from_utf8_lossy(&stderr).into_owned() })
}

/// Reads what comes in chunks.
struct Chunks {
    from: mpsc::Receiver<Vec<u8>>,
    chunk: io::Cursor<Vec<u8>>,
}

impl Chunks {
    fn new(from: mpsc::Receiver<Vec<u8>>) -> Self {
        Self { from, chunk: io::Cursor::default() }
    }
}

impl io::Read for Chunks {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.chunk.read(into)?;
            if read > 0 || into.is_empty() {
                return Ok(read);
            }
            match self.from.blocking_recv() {
                Some(chunk) => self.chunk = io::Cursor::new(chunk),
                None => return Ok(0),
            }
        }
    }
}

/// Sends what is written in chunks.
struct Sink(mpsc::Sender<Vec<u8>>);

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.blocking_send(bytes.to_vec()).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Of what cannot be copied.
const NO_FILE: &str = "is not a file, directory or link";

/// Writes a file or a directory as an archive in which it is called `name`.
fn pack(from: &Path, name: &OsStr, to: mpsc::Sender<Vec<u8>>) -> io::Result<()> {
    let mut archive = tar::Builder::new(io::BufWriter::with_capacity(CHUNK, Sink(to)));
    // What is in a directory has no directory around it.
    let name = if name == "." { PathBuf::new() } else { PathBuf::from(name) };
    let mut left = vec![(from.to_owned(), name)];
    let mut is_first = true;
    while let Some((path, name)) = left.pop() {
        let said = |error: io::Error| match error.kind() {
            io::ErrorKind::BrokenPipe => error,
            kind => io::Error::new(kind, format!("{}: {error}", path.display())),
        };
        let metadata = fs::symlink_metadata(&path).map_err(said)?;
        let mut header = tar::Header::new_gnu();
        header.set_metadata(&metadata);
        let is_wanted = std::mem::take(&mut is_first);
        if metadata.is_dir() {
            if !name.as_os_str().is_empty() {
                archive.append_data(&mut header, &name, io::empty()).map_err(said)?;
            }
            for entry in fs::read_dir(&path).map_err(said)? {
                let entry = entry.map_err(said)?;
                left.push((entry.path(), name.join(entry.file_name())));
            }
        } else if metadata.is_symlink() {
            archive.append_link(&mut header, &name, fs::read_link(&path).map_err(said)?).map_err(said)?;
        } else if metadata.is_file() {
            // As long as its header says, whatever is written to it meanwhile. Holes are zeros: not every tar knows them.
            let file = fs::File::open(&path).map_err(said)?;
            let content = file.chain(io::repeat(0)).take(metadata.len());
            archive.append_data(&mut header, &name, content).map_err(said)?;
        } else if is_wanted {
            return Err(said(io::Error::other(NO_FILE)));
        } else {
            eprintln!("{} is left out: it {NO_FILE}", path.display());
        }
    }
    io::Write::flush(&mut archive.into_inner()?)
}

/// Writes what an archive has below `name` to `target`, and nothing anywhere else: who wrote it may wish otherwise.
fn unpack(archive: impl io::Read, name: &OsStr, target: &Path) -> io::Result<()> {
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let named = |path: &Path, error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let parent = parent.canonicalize().map_err(|error| named(parent, error))?;
    let own = target.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let root = parent.join(own);
    let mut is_empty = true;
    let mut archive = tar::Archive::new(archive);
    // Not writable ones are filled first.
    let mut directories = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = inside(&entry.path()?, name, &root)?;
        let is_root = path == root;
        let is_first = std::mem::take(&mut is_empty);
        let above = path.parent().unwrap_or(&root);
        // A link on the way would lead elsewhere.
        if !is_root && above.canonicalize()? != above {
            return Err(outside(&path));
        }
        let kind = entry.header().entry_type();
        let known = fs::symlink_metadata(&path).ok();
        if kind.is_dir() {
            let is_there = known.is_some_and(|known| known.is_dir());
            if is_there && is_root && name == "." {
                // It is whose it was; only what is in it comes.
                continue;
            }
            if !is_there {
                fs::create_dir(&path).map_err(|error| named(&path, error))?;
            }
            directories.push((path, entry.header().mode()?));
            continue;
        }
        if known.is_some() {
            fs::remove_file(&path)?;
        }
        if kind.is_hard_link() {
            let other = entry.link_name()?.ok_or_else(|| outside(&path))?;
            let other = inside(&other, name, &root)?;
            let above = other.parent().unwrap_or(&root);
            let is_file = fs::symlink_metadata(&other).is_ok_and(|other| other.is_file());
            if above.canonicalize()? != above || !is_file {
                return Err(outside(&other));
            }
            fs::hard_link(other, &path)?;
        } else if kind.is_file() || kind.is_symlink() {
            entry.unpack(&path)?;
        } else if is_root && is_first {
            return Err(io::Error::other(NO_FILE));
        } else {
            let path = output::printable(&path.display().to_string()).into_owned();
            eprintln!("{} is left out: it {NO_FILE}", output::printable(&path));
        }
    }
    // To the end, or whoever writes it would be told that nobody reads it.
    io::copy(&mut archive.into_inner(), &mut io::sink())?;
    if is_empty {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "its tar wrote nothing"));
    }
    for (path, mode) in directories.into_iter().rev() {
        fs::set_permissions(path, fs::Permissions::from_mode(mode & 0o7777))?;
    }
    Ok(())
}

/// Where an entry belongs.
fn inside(entry: &Path, name: &OsStr, root: &Path) -> io::Result<PathBuf> {
    let mut parts = entry.components().filter(|part| !matches!(part, Component::CurDir));
    // Of what is in a directory, nothing is around it.
    if name != "." && parts.next() != Some(Component::Normal(name)) {
        return Err(outside(entry));
    }
    let mut path = root.to_owned();
    for part in parts {
        match part {
            Component::Normal(part) => path.push(part),
            _ => return Err(outside(entry)),
        }
    }
    Ok(path)
}

fn outside(path: &Path) -> io::Error {
    io::Error::other(format!("the archive names {}, which is outside of what was asked for", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked() {
        let place = tempfile::tempdir().expect("a directory");
        let from = place.path().join("from");
        fs::create_dir_all(from.join("a/b")).expect("writable");
        // A file of holes, which not every tar would take as such, and one without a byte.
        fs::File::create(from.join("a/holes")).and_then(|file| file.set_len(1 << 20)).expect("writable");
        fs::write(from.join("a/b/empty"), "").expect("writable");
        let long = "x".repeat(200);
        fs::write(from.join(&long), "long").expect("writable");
        let _socket = std::os::unix::net::UnixListener::bind(from.join("socket")).expect("a socket");
        let (sender, receiver) = mpsc::channel(AHEAD);
        let packing = {
            let from = from.clone();
            std::thread::spawn(move || pack(&from, OsStr::new("name"), sender))
        };
        unpack(Chunks::new(receiver), OsStr::new("name"), &place.path().join("to")).expect("unpacked");
        packing.join().expect("no panic").expect("packed");
        let to = place.path().join("to");
        assert!(fs::read(to.join("a/holes")).expect("readable") == vec![0; 1 << 20]);
        assert_eq!(fs::read_to_string(to.join(long)).expect("readable"), "long");
        assert!(to.join("a/b/empty").is_file() && !to.join("socket").exists());

        // What is in it, into a directory that is there, twice.
        for _ in 0..2 {
            let (sender, receiver) = mpsc::channel(AHEAD);
            let packing = {
                let from = from.join("a");
                std::thread::spawn(move || pack(&from, OsStr::new("."), sender))
            };
            unpack(Chunks::new(receiver), OsStr::new("."), &to).expect("unpacked");
            packing.join().expect("no panic").expect("packed");
        }
        assert!(to.join("b/empty").is_file() && to.join("holes").is_file() && to.join("a").is_dir());
        // The only thing that was asked for is not left out in silence.
        let (sender, _receiver) = mpsc::channel(AHEAD);
        assert!(pack(&from.join("socket"), OsStr::new("socket"), sender).unwrap_err().to_string().contains(NO_FILE));
        assert!(unpack(io::empty(), OsStr::new("x"), &to.join("x")).is_err());
        let missing = unpack(io::empty(), OsStr::new("x"), &to.join("none/x")).unwrap_err();
        assert!(missing.to_string().contains("/none: "), "{missing}");
    }

    #[test]
    fn the_first_thing_that_tar_says_is_what_was_wrong() {
        let ended = |stderr: &str| Ended { code: 1, stderr: stderr.to_owned() };
        let missing = "tar: x: Cannot stat: No such file\ntar: Exiting with failure status due to previous errors\n";
        assert_eq!(ended(missing).said(), "tar: x: Cannot stat: No such file");
        assert!(!ended(missing).has_only_changed() && !ended("").has_only_changed());
        assert!(ended("tar: log: file changed as we read it\n").has_only_changed());
        assert_eq!(ended("\x1b[2Jgone").said(), "\\u{1b}[2Jgone");
    }

    #[test]
    fn places_are_told_apart() {
        let inside =
            |container: &str, path: &str| Place::Inside { container: container.to_owned(), path: path.to_owned() };
        assert_eq!(Place::parse("web-1:/etc/hosts"), inside("web-1", "/etc/hosts"));
        assert_eq!(Place::parse("./web:1"), Place::Here("./web:1".into()));
        assert_eq!(Place::parse("/a/b:c"), Place::Here("/a/b:c".into()));
        assert_eq!((contents("/etc/."), contents("/."), contents("/etc/a.")), (Some("/etc"), Some("/"), None));
        assert_eq!(split("/etc/hosts/").ok(), Some(("/etc".to_owned(), "hosts".to_owned())));
        assert_eq!(split("/etc").ok(), Some(("/".to_owned(), "etc".to_owned())));
        for path in ["etc/hosts", "/", "/etc/..", "", "/etc/."] {
            assert!(split(path).is_err(), "{path}");
        }
    }

    fn entry(archive: &mut tar::Builder<Vec<u8>>, kind: tar::EntryType, path: &str, link: &str, content: &str) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(if kind.is_dir() { 0o755 } else { 0o640 });
        header.set_size(content.len() as u64);
        // Such paths are refused by the setters.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        archive.append(&header, content.as_bytes()).expect("written");
    }

    #[test]
    fn what_was_copied_goes_where_it_was_wanted_and_nowhere_else() {
        use tar::EntryType::{Directory, Link, Regular, Symlink};

        let place = tempfile::tempdir().expect("a directory");
        let target = place.path().join("copy");
        let unpacked = |entries: &[(tar::EntryType, &str, &str, &str)]| {
            let mut archive = tar::Builder::new(Vec::new());
            entries.iter().for_each(|(kind, path, link, content)| entry(&mut archive, *kind, path, link, content));
            let archive = archive.into_inner().expect("written");
            unpack(archive.as_slice(), OsStr::new("data"), &target)
        };
        let all = [
            (Directory, "data", "", ""),
            (Regular, "data/a", "", "one"),
            (Link, "data/b", "data/a", ""),
            (Symlink, "data/c", "/etc", ""),
        ];
        unpacked(&all).expect("unpacked");
        // Once more, over what is there.
        unpacked(&all).expect("unpacked");
        assert_eq!(fs::read_to_string(target.join("b")).expect("readable"), "one");
        assert_eq!(fs::read_link(target.join("c")).expect("a link"), Path::new("/etc"));
        fs::write(place.path().join("secret"), "kept").expect("writable");
        let outside = place.path().join("secret").display().to_string();
        for wrong in [
            (Regular, "data/../secret", "", "x"),
            (Regular, "/etc/x", "", "x"),
            (Regular, "other", "", "x"),
            (Regular, "data/c/x", "", "x"),
            (Link, "data/d", outside.as_str(), ""),
            (Link, "data/d", "data/../secret", ""),
            (Link, "data/d", "data/c/passwd", ""),
        ] {
            assert!(unpacked(&[wrong]).is_err(), "{wrong:?}");
        }
        // A link in the way is replaced, and what it leads to stays.
        std::os::unix::fs::symlink("../secret", target.join("e")).expect("a link");
        unpacked(&[(Regular, "data/e", "", "new")]).expect("unpacked");
        assert_eq!(fs::read_to_string(place.path().join("secret")).expect("readable"), "kept");
        assert_eq!(fs::read_to_string(target.join("e")).expect("readable"), "new");
    }
}
