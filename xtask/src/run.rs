//! Running commands and saying so.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

/// The workspace's directory.
pub(crate) fn workspace() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().map_or_else(|| manifest.to_owned(), Path::to_owned)
}

/// The directory of build results.
pub(crate) fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// The cargo that runs this.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command
}

/// Says what is being done, does it, and says how long it took.
pub(crate) fn step(what: &str, command: &mut Command) -> Result<()> {
    println!("==> {what}");
    let began = Instant::now();
    let status = command.status().with_context(|| format!("{} cannot be run", name(command)))?;
    if !status.success() {
        bail!("{what} failed: {} ended with {status}", name(command));
    }
    took(what, began.elapsed());
    Ok(())
}

/// What was done so far, and how long each part of it took.
static PARTS: Mutex<Vec<(String, Duration)>> = Mutex::new(Vec::new());

/// Says how long a part took.
pub(crate) fn took(what: &str, time: Duration) {
    println!("    {:.1} s", time.as_secs_f64());
    PARTS.lock().unwrap_or_else(PoisonError::into_inner).push((what.to_owned(), time));
}

/// Prints how long each part took, and all of them.
pub(crate) fn print_parts() {
    let parts = PARTS.lock().unwrap_or_else(PoisonError::into_inner);
    let all = parts.iter().map(|(_, time)| time).sum::<Duration>();
    println!("==> times");
    for (what, time) in parts.iter().map(|(what, time)| (what.as_str(), time)).chain([("together", &all)]) {
        println!("    {:>7.1} s  {what}", time.as_secs_f64());
    }
}

/// A command's output; `None` when it cannot be run or fails.
pub(crate) fn output(program: impl AsRef<OsStr>, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where a program is on the search path, which for root's shells may lack the sbin directories.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = env::split_paths(&path).chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from));
    directories.map(|directory| directory.join(program)).find(|candidate| candidate.is_file())
}

fn name(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

/// Installs Debian packages without starting the services in them; elsewhere, says what to install.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    if find("apt-get").is_none() || !is_debian() {
        bail!(
            "this is no Debian system: install these (names of Debian packages), then try again: {}",
            packages.join(" ")
        );
    }
    let apt = || {
        let mut command = Command::new("apt-get");
        // RUNLEVEL=1 keeps packages from starting their services.
        command.env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1");
        command
    };
    step("updating the list of packages", apt().args(["update", "-qq"]))?;
    step(
        &format!("installing {}", packages.join(" ")),
        apt().args(["install", "-y", "-qq", "--no-install-recommends"]).args(packages),
    )
}

fn is_debian() -> bool {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    release
        .lines()
        .any(|line| matches!(line.split_once('='), Some(("ID" | "ID_LIKE", value)) if value.contains("debian")))
}
