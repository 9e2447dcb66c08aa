//! Tells the binary which commit it is built from.

use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=../../.git/HEAD");
    let revision = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output();
    let revision = revision.ok().filter(|output| output.status.success()).map(|output| output.stdout);
    let revision = revision.and_then(|bytes| String::from_utf8(bytes).ok());
    println!("cargo:rustc-env=WARREN_REVISION={}", revision.as_deref().map_or("unknown", str::trim));
}
