//! Kernels, from Debian's archive.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::Kernel;
use crate::run::{output, step};

const MIRROR: &str = "https://deb.debian.org";
/// The package that depends on a suite's current kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// A kernel's package, unpacked.
pub(super) struct Package {
    /// Where.
    pub(super) root: PathBuf,
    /// The kernel itself.
    pub(super) image: PathBuf,
    /// What it calls itself, as `uname -r` shows it.
    pub(super) release: String,
}

impl Package {
    fn unpacked(root: &Path) -> Option<Self> {
        let files = fs::read_dir(root.join("boot")).ok()?;
        files.flatten().find_map(|entry| {
            let release = entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned();
            Some(Self { root: root.to_owned(), image: entry.path(), release })
        })
    }
}

/// A kernel's package, unpacked.
pub(super) fn fetch(kernel: &Kernel, directory: &Path) -> Result<Package> {
    let root = directory.join(kernel.version);
    if let Some(package) = Package::unpacked(&root) {
        return Ok(package);
    }
    println!("==> fetching Linux {}", kernel.version);
    let base = format!("{MIRROR}/{}", kernel.archive);
    let index = format!("{base}/dists/{}/main/binary-amd64/Packages.xz", kernel.suite);
    let index = shell(&format!("curl --fail --silent --show-error {index} | xz --decompress"))?;
    // A mirror may have several versions of a package: the last is the latest.
    let field = |package: &str, name: &str| {
        let blocks =
            index.split("\n\n").filter(|block| block.lines().any(|line| line == format!("Package: {package}")));
        blocks.last()?.lines().find_map(|line| line.strip_prefix(&format!("{name}: "))).map(str::to_owned)
    };
    let depends = field(META_PACKAGE, "Depends").with_context(|| format!("{} has no {META_PACKAGE}", kernel.suite))?;
    let package = depends.split([' ', ',']).next().unwrap_or_default();
    let file = field(package, "Filename").with_context(|| format!("{} has no {package}", kernel.suite))?;
    let archive = directory.join(format!("{}.deb", kernel.version));
    let mut download = Command::new("curl");
    download.args(["--fail", "--silent", "--show-error", "--output"]).arg(&archive).arg(format!("{base}/{file}"));
    step(package, &mut download)?;
    let wanted = field(package, "SHA256").unwrap_or_default();
    let found = output("sha256sum", &[&archive.to_string_lossy()]).unwrap_or_default();
    if wanted.is_empty() || !found.starts_with(&wanted) {
        bail!("{} is not what the archive's index says", archive.display());
    }
    step("unpacking it", Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(&root))?;
    Package::unpacked(&root).with_context(|| format!("{package} has no kernel"))
}

fn shell(script: &str) -> Result<String> {
    output("sh", &["-c", script]).with_context(|| format!("{script} failed"))
}
