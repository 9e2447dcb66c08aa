//! Embeds the kernel programs, if `cargo xtask build-ebpf` has built them, and what containers with secrets in their environment begin with.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    println!("cargo:rerun-if-env-changed=WARREN_EBPF_OBJECT");
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let out = out_dir.join("probes.o");
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let object = env::var_os("WARREN_EBPF_OBJECT")
        .map_or_else(|| manifest.join("../target/ebpf/warren-probes.o"), PathBuf::from);
    // A directory or file that does not exist yet makes cargo run this again next time, which is right.
    println!("cargo:rerun-if-changed={}", object.display());
    let bytes = fs::read(&object).unwrap_or_default();
    fs::write(&out, bytes).expect("OUT_DIR is writable");
    build_env_helper(&manifest.join("helper/env.rs"), &out_dir.join("env"));
}

/// One static program, for images that may have no C library, or another one.
fn build_env_helper(source: &Path, out: &Path) {
    println!("cargo:rerun-if-changed={}", source.display());
    let rustc = env::var_os("RUSTC").expect("cargo sets RUSTC");
    let target = env::var_os("TARGET").expect("cargo sets TARGET");
    let linker = env::var_os("RUSTC_LINKER").map(|linker| {
        let mut option = std::ffi::OsString::from("linker=");
        option.push(linker);
        option
    });
    let built = Command::new(rustc)
        .args(linker.iter().flat_map(|linker| [std::ffi::OsStr::new("-C"), linker]))
        .args(["--edition", "2024", "--crate-name", "env", "--target"])
        .arg(target)
        .args([
            "-C",
            "opt-level=s",
            "-C",
            "panic=abort",
            "-C",
            "strip=symbols",
            "-C",
            "target-feature=+crt-static",
            "-o",
        ])
        .args([out, source])
        .status();
    assert!(built.is_ok_and(|status| status.success()), "{} cannot be built", source.display());
}
