//! Files that survive a power cut whole.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
};

/// Replaces the file at `path`: after a power cut there is the old content or the new, never half of it. Durable when this
/// returns. What is being written stands beside it, with the extension `new`; one writer at a time.
///
/// # Errors
///
/// When the file or its directory cannot be written.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}
