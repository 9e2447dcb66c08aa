//! The kernel programs: finding a toolchain that can build them, and building them.
//!
//! It takes a Rust compiler with the standard library's sources, which stable toolchains may not use for this without
//! being told (`RUSTC_BOOTSTRAP`), and bpf-linker, linked with an LLVM not older than the compiler's.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use crate::run::{cargo, find, install, output, step, target, workspace};

const TARGET: &str = "bpfel-unknown-none";
pub(crate) const BINARY: &str = "warren-probes";
const LINKER_VERSION: &str = "0.13.0";

/// A compiler that can build `core` for the BPF target.
struct Toolchain {
    what: String,
    cargo: Command,
    llvm: String,
}

/// LLVM's major version in `rustc -vV`.
fn llvm_version(verbose: &str) -> Option<String> {
    let version = verbose.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next().map(str::to_owned)
}

fn nightly() -> Option<Toolchain> {
    let sysroot = output("rustc", &["+nightly", "--print", "sysroot"])?;
    has_sources(Path::new(sysroot.trim())).then_some(())?;
    let llvm = llvm_version(&output("rustc", &["+nightly", "-vV"])?)?;
    let mut cargo = Command::new("cargo");
    cargo.arg("+nightly");
    // Set by the cargo that runs this, for its own toolchain.
    cargo.env_remove("RUSTC").env_remove("RUSTDOC").env_remove("RUSTUP_TOOLCHAIN");
    Some(Toolchain { what: "rustup's nightly with rust-src".to_owned(), cargo, llvm })
}

fn debian() -> Option<Toolchain> {
    let rustc = Path::new("/usr/bin/rustc");
    has_sources(Path::new("/usr")).then_some(())?;
    let llvm = llvm_version(&output(rustc, &["-vV"])?)?;
    let mut cargo = Command::new("/usr/bin/cargo");
    cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1").env_remove("RUSTUP_TOOLCHAIN");
    Some(Toolchain { what: "Debian's rustc with its sources".to_owned(), cargo, llvm })
}

fn has_sources(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").exists()
}

fn toolchain() -> Option<Toolchain> {
    nightly().or_else(debian)
}

fn tools_bin() -> PathBuf {
    target().join("tools/bin")
}

fn linker() -> Option<PathBuf> {
    let own = tools_bin().join("bpf-linker");
    if own.is_file() { Some(own) } else { find("bpf-linker") }
}

/// Installs the toolchain unless there is one.
pub(crate) fn setup() -> Result<()> {
    if toolchain().is_none() {
        println!("no compiler here can build the kernel programs: asking rustup for the sources of a nightly one");
        let added = output("rustup", &["component", "add", "rust-src", "--toolchain", "nightly"]);
        if added.is_none() || toolchain().is_none() {
            println!("rustup has none: taking Debian's compiler");
            install(&["rustc-web", "rust-web-src", "cargo-web"])?;
        }
    }
    let toolchain = toolchain().context("no compiler can build the kernel programs")?;
    println!("the kernel programs are built with {}, LLVM {}", toolchain.what, toolchain.llvm);
    if linker().is_none() {
        install_linker(&toolchain.llvm)?;
    }
    Ok(())
}

fn install_linker(llvm: &str) -> Result<()> {
    if !["21", "22", "23"].contains(&llvm) {
        bail!("bpf-linker {LINKER_VERSION} does not know LLVM {llvm}, which the compiler uses");
    }
    let prefix = PathBuf::from(format!("/usr/lib/llvm-{llvm}"));
    if !prefix.join("lib/libLLVM.so").exists() {
        let packages = [format!("llvm-{llvm}-dev"), format!("libpolly-{llvm}-dev")];
        install(&[&packages[0], &packages[1], "libzstd-dev", "zlib1g-dev"])?;
    }
    let root = target().join("tools");
    step(
        "building bpf-linker (a minute or two)",
        cargo()
            .args([
                "install",
                "bpf-linker",
                "--version",
                LINKER_VERSION,
                "--locked",
                "--no-default-features",
                "--quiet",
            ])
            .args(["--features", &format!("llvm-{llvm}")])
            .arg("--root")
            .arg(&root)
            .env("CARGO_TARGET_DIR", root.join("build"))
            .env("LLVM_PREFIX", &prefix)
            .env(format!("LLVM_SYS_{llvm}0_PREFIX"), &prefix),
    )
}

/// Where the agent's build looks for the programs.
pub(crate) fn object() -> PathBuf {
    workspace().join("target/ebpf").join(format!("{BINARY}.o"))
}

pub(crate) fn run() -> Result<()> {
    let mut toolchain =
        toolchain().context("no compiler here can build the kernel programs: run `cargo xtask setup`")?;
    let linker = linker().context("bpf-linker is missing: run `cargo xtask setup`")?;
    let directory = workspace().join("target/ebpf");
    let mut path = vec![linker.parent().map(Path::to_owned).unwrap_or_default()];
    path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    step(
        &format!("building the kernel programs with {}", toolchain.what),
        toolchain
            .cargo
            .current_dir(workspace())
            .args(["build", "--quiet", "--profile", "ebpf", "--package", "warren-agent-ebpf", "--bin", BINARY])
            .args(["--features", "programs", "--target", TARGET, "-Z", "build-std=core"])
            .env("CARGO_TARGET_DIR", &directory)
            .env("PATH", env::join_paths(path)?),
    )?;
    let built = directory.join(TARGET).join("ebpf").join(BINARY);
    let bytes = fs::read(&built).with_context(|| format!("reading {}", built.display()))?;
    // Written only when it changed: the agent is built anew whenever this file is.
    if fs::read(object()).ok().as_deref() != Some(&bytes) {
        fs::write(object(), &bytes).with_context(|| format!("writing {}", object().display()))?;
    }
    println!("    {} bytes in {}", bytes.len(), object().display());
    Ok(())
}
