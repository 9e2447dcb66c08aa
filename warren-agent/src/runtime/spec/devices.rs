use std::{
    fs,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::Path,
};

use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
};
use warren_proto::v1;

use super::{super::Error, Devices, cannot_be_built};

const PERMISSION_BITS: u32 = 0o7777;

/// The devices that a service names.
pub(super) fn named(wanted: &[v1::Device]) -> Result<Devices, Error> {
    let (mut devices, mut rules) = (Vec::new(), Vec::new());
    for device in wanted {
        let source = &device.source;
        let target = if device.target.is_empty() { source } else { &device.target };
        let bad = |why: &dyn std::fmt::Display| Error::BadSpec(format!("device {source} of this node: {why}"));
        let metadata = fs::metadata(source).map_err(|error| bad(&error))?;
        let made = self::device(Path::new(target), &metadata)?.ok_or_else(|| bad(&"it is no device"))?;
        let access = if device.permissions.is_empty() { "rwm" } else { &device.permissions };
        rules.push(rule(&made, access)?);
        devices.push(made);
    }
    Ok((devices, rules))
}

/// All devices of the node, for a privileged container, and a rule for whatever comes.
pub(super) fn all() -> Result<Devices, Error> {
    let mut devices = Vec::new();
    collect(Path::new("/dev"), &mut devices)?;
    let rule = LinuxDeviceCgroupBuilder::default().allow(true).access("rwm").build().map_err(cannot_be_built)?;
    Ok((devices, vec![rule]))
}

/// What a container has of its own there.
const OWN: [&str; 5] = ["/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/fd", "/dev/console"];

fn collect(directory: &Path, devices: &mut Vec<LinuxDevice>) -> Result<(), Error> {
    // What vanishes while one looks is not there.
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
        if OWN.iter().any(|own| path == Path::new(own)) {
            continue;
        }
        if metadata.is_dir() {
            collect(&path, devices)?;
        } else if let Some(device) = device(&path, &metadata)? {
            devices.push(device);
        }
    }
    Ok(())
}

fn device(target: &Path, metadata: &fs::Metadata) -> Result<Option<LinuxDevice>, Error> {
    let kind = metadata.file_type();
    let kind = if kind.is_char_device() {
        LinuxDeviceType::C
    } else if kind.is_block_device() {
        LinuxDeviceType::B
    } else {
        return Ok(None);
    };
    let built = LinuxDeviceBuilder::default()
        .path(target)
        .typ(kind)
        .major(i64::from(rustix::fs::major(metadata.rdev())))
        .minor(i64::from(rustix::fs::minor(metadata.rdev())))
        .file_mode(metadata.mode() & PERMISSION_BITS)
        .uid(metadata.uid())
        .gid(metadata.gid())
        .build();
    built.map(Some).map_err(cannot_be_built)
}

fn rule(device: &LinuxDevice, access: &str) -> Result<LinuxDeviceCgroup, Error> {
    LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(device.typ())
        .major(device.major())
        .minor(device.minor())
        .access(access)
        .build()
        .map_err(cannot_be_built)
}
