//! Embeds the kernel programs, if `cargo xtask build-ebpf` has built them.

use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo:rerun-if-env-changed=WARREN_EBPF_OBJECT");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("probes.o");
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let object = env::var_os("WARREN_EBPF_OBJECT")
        .map_or_else(|| manifest.join("../target/ebpf/warren-probes.o"), PathBuf::from);
    // A directory or file that does not exist yet makes cargo run this again next time, which is right.
    println!("cargo:rerun-if-changed={}", object.display());
    let bytes = fs::read(&object).unwrap_or_default();
    fs::write(&out, bytes).expect("OUT_DIR is writable");
}
