//! Tells the binaries which commit they are built from.

use std::{path::Path, process::Command};

fn main() {
    // Written at every commit, checkout and clone; without it there is no commit to tell of.
    let log = "../../.git/logs/HEAD";
    if Path::new(log).exists() {
        println!("cargo:rerun-if-changed={log}");
    } else {
        println!("cargo:rerun-if-changed=build.rs");
    }
    let revision = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output();
    let revision = revision.ok().filter(|output| output.status.success()).map(|output| output.stdout);
    let revision = revision.and_then(|bytes| String::from_utf8(bytes).ok());
    println!("cargo:rustc-env=WARREN_REVISION={}", revision.as_deref().map_or("unknown", str::trim));
}
