//! Layouts of maps, and taking over what was counted in another one.
//!
//! Each layout has a directory of pins. An agent of another layout, newer or older, makes its maps in a directory beside it, adds to
//! them what was counted so far, and renames that directory to its own: from then on, and not before, its counts are the ones that hold.
//! The highest generation tells which those are, so an agent that is killed anywhere on the way loses nothing and adds nothing twice.

use std::{
    ffi::OsStr,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use aya::{
    Pod,
    maps::{Array, MapData, MapError, PerCpuArray, PerCpuValues},
};
use warren_agent_ebpf::{
    abi::{COUNTS, GroupName, Meta, SweepIntent, dns},
    histogram::Histogram,
};

use super::{
    Error,
    maps::{self, Hash, open},
};

/// What follows the name of a directory that is not finished; bpffs takes no dots.
const UNFINISHED: &str = "-new";

/// The directory of a layout's pins.
pub(super) fn directory(pin_dir: &Path, hash: u64) -> PathBuf {
    pin_dir.join(format!("{hash:016x}"))
}

/// Where the pins of a layout are made that takes over another's counts.
pub(super) fn unfinished(directory: &Path) -> PathBuf {
    let mut name = directory.as_os_str().to_owned();
    name.push(UNFINISHED);
    name.into()
}

/// The directories of layouts that agents have made, unfinished ones included: their names are hashes.
pub(super) fn layouts(pin_dir: &Path) -> Vec<PathBuf> {
    let is_hash = |name: &OsStr| {
        let name = name.to_str().map(|name| name.strip_suffix(UNFINISHED).unwrap_or(name));
        name.is_some_and(|name| name.len() == 16 && u64::from_str_radix(name, 16).is_ok())
    };
    let entries = fs::read_dir(pin_dir).into_iter().flatten().flatten();
    entries.filter(|entry| is_hash(&entry.file_name())).map(|entry| entry.path()).collect()
}

/// The layout whose counts hold, with what is noted of it; `None` when there is none.
pub(super) fn newest(pin_dir: &Path) -> Option<(PathBuf, Meta)> {
    let is_finished = |path: &PathBuf| !path.to_str().is_some_and(|path| path.ends_with(UNFINISHED));
    let finished = layouts(pin_dir).into_iter().filter(is_finished);
    let known = finished.filter_map(|path| Some((meta(&path)?, path)));
    known.max_by_key(|(meta, _)| meta.generation).map(|(meta, path)| (path, meta))
}

/// What agents before generations noted.
#[repr(C)]
#[derive(Clone, Copy)]
struct FirstMeta {
    epoch: u64,
    programs: u64,
}

// SAFETY: integers only, without padding.
unsafe impl Pod for FirstMeta {}

fn meta(directory: &Path) -> Option<Meta> {
    let found = maps::read_meta(directory).or_else(|_| {
        let meta: Array<MapData, FirstMeta> = open(directory, "META")?;
        let FirstMeta { epoch, programs } = meta.get(&0, 0).map_err(|source| Error::Map { map: "META", source })?;
        Ok::<_, Error>(Meta { epoch, programs, generation: 0, counts: 1 })
    });
    found.ok().filter(|meta| meta.epoch != 0)
}

/// Adds to the maps of a directory, which nobody writes to yet, what was counted in another's, which nobody writes to any more. Counts
/// that this agent has no place for are left.
///
/// # Errors
///
/// When the maps cannot be read or written.
pub(super) fn take_over(from: &Path, meta: &Meta, to: &Path) -> Result<(), Error> {
    let added = if meta.counts == COUNTS { add(from, to) } else { Err(Error::Form(meta.counts)) };
    match added {
        // To time nothing from here on would be worse.
        Err(
            error @ (Error::Form(_)
            | Error::Map { source: MapError::InvalidKeySize { .. } | MapError::InvalidValueSize { .. }, .. }),
        ) => {
            let path = from.display();
            tracing::warn!(%path, %error, "what another version's probes counted cannot be read: these counts begin anew");
            Ok(())
        }
        other => other,
    }
}

fn add(from: &Path, to: &Path) -> Result<(), Error> {
    let failed = |map| move |source| Error::Map { map, source };

    let old: PerCpuArray<MapData, u64> = open(from, "COUNTERS")?;
    let mut new: PerCpuArray<MapData, u64> = open(to, "COUNTERS")?;
    for index in 0..old.len().min(new.len()) {
        let total: u64 = old.get(&index, 0).map_err(failed("COUNTERS"))?.iter().sum();
        let mut values = new.get(&index, 0).map_err(failed("COUNTERS"))?.to_vec();
        values[0] += total;
        let values = PerCpuValues::try_from(values).map_err(|source| failed("COUNTERS")(source.into()))?;
        new.set(index, values, 0).map_err(failed("COUNTERS"))?;
    }

    let old: Array<MapData, Histogram> = open(from, "DURATIONS")?;
    let mut new: Array<MapData, Histogram> = open(to, "DURATIONS")?;
    for index in 0..old.len().min(new.len()) {
        let mut histogram = new.get(&index, 0).map_err(failed("DURATIONS"))?;
        histogram.merge(&old.get(&index, 0).map_err(failed("DURATIONS"))?);
        new.set(index, histogram, 0).map_err(failed("DURATIONS"))?;
    }

    copy::<u32, GroupName>(from, to, "GROUP_NAMES")?;
    copy::<dns::HistogramKey, Histogram>(from, to, "DNS_DURATIONS")?;
    copy::<dns::HistogramKey, u64>(from, to, "DNS_TIMEOUTS")?;
    copy::<dns::PendingKey, dns::Pending>(from, to, "DNS_PENDING")?;
    // The timeout that was being counted; the first sweep finishes it.
    let intent: Array<MapData, SweepIntent> = open(from, "SWEEP_INTENT")?;
    let intent = intent.get(&0, 0).map_err(failed("SWEEP_INTENT"))?;
    let mut new: Array<MapData, SweepIntent> = open(to, "SWEEP_INTENT")?;
    new.set(0, intent, 0).map_err(failed("SWEEP_INTENT"))
}

/// Copies entries into a map that has none of its own.
fn copy<K: Pod, V: Pod>(from: &Path, to: &Path, map: &'static str) -> Result<(), Error> {
    let failed = |source| Error::Map { map, source };
    let old: Hash<K, V> = open(from, map)?;
    let mut new: Hash<K, V> = open(to, map)?;
    for entry in old.iter() {
        let (key, value) = entry.map_err(failed)?;
        new.insert(key, value, 0).map_err(failed)?;
    }
    Ok(())
}

/// Has the counts of an unfinished directory hold from here on.
pub(super) fn finish(unfinished: &Path, directory: &Path) -> Result<(), Error> {
    // What an agent of this layout counted before one of another took it over.
    remove(directory)?;
    fs::rename(unfinished, directory).map_err(|source| Error::Io {
        action: "renaming",
        path: unfinished.into(),
        source,
    })
}

/// Removes a directory of pins, and with it what they keep in the kernel; none is none.
pub(super) fn remove(directory: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(directory) {
        Err(source) if source.kind() != ErrorKind::NotFound => {
            Err(Error::Io { action: "removing", path: directory.into(), source })
        }
        _ => Ok(()),
    }
}

/// Removes the other layouts, whose counts were taken over.
pub(super) fn remove_others(pin_dir: &Path, current: &Path) {
    for path in layouts(pin_dir).into_iter().filter(|path| path != current) {
        if let Err(error) = remove(&path) {
            let error: &(dyn std::error::Error + 'static) = &error;
            tracing::warn!(path = %path.display(), error, "the pins of another version's probes could not be removed");
        }
    }
}
