//! Files that survive a power cut whole, and blocks of bytes that tell when they are not.

mod block;

pub use block::{Damage, pack, unpack};

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

/// Replaces the file at `path`: after a power cut there is the old content or the new, never half of it. Durable when this
/// returns. What is being written stands beside it, with `.new` behind its name; one writer at a time. Nobody but its owner reads it.
///
/// # Errors
///
/// When the file or its directory cannot be written.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    // What a write that was cut short left may have been anybody's to read.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    match path.parent() {
        // A name alone is one in the working directory.
        Some(directory) if directory.as_os_str().is_empty() => File::open(".")?.sync_all(),
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

/// Makes a directory for nobody but this user; one that was there already is nobody else's from now on, which is what is returned.
///
/// # Errors
///
/// When it cannot be made or closed.
pub fn private_directory(directory: &Path) -> io::Result<bool> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};

    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let mode = fs::metadata(directory)?.permissions().mode();
    let was_open = mode & 0o077 != 0;
    if was_open {
        fs::set_permissions(directory, fs::Permissions::from_mode(mode & 0o7700))?;
    }
    Ok(was_open)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_its_neighbours_are_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        fs::write(at("state.new"), "a neighbour").expect("writable");
        replace(&at("state.bak"), b"one").expect("writes");
        replace(&at("state.bak"), b"two").expect("writes");
        assert_eq!(fs::read(at("state.bak")).expect("readable"), b"two");
        assert_eq!(fs::read(at("state.new")).expect("readable"), b"a neighbour");
        assert_eq!(fs::read_dir(directory.path()).expect("readable").count(), 2);
        // By its name alone; a process has one working directory, and no other test here looks at it.
        std::env::set_current_dir(directory.path()).expect("a directory");
        replace(Path::new("here"), b"three").expect("writes");
        assert_eq!(fs::read(at("here")).expect("readable"), b"three");
    }
}
