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
/// returns. What is being written stands beside it, with the extension `new`; one writer at a time. Nobody but its owner reads it.
///
/// # Errors
///
/// When the file or its directory cannot be written.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    // What a write that was cut short left may have been anybody's to read.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}
