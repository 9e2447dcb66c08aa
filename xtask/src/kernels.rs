//! The kernel programs on other kernels: Debian's cloud kernels in QEMU, without KVM, with an initramfs of the tests that need
//! nothing but a kernel and a runtime.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Read as _,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    build_ebpf,
    run::{cargo, find, output, step, target, workspace},
    setup,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Which, as 5.10, 6.1 or 6.12; all of them unless given.
    pub(crate) versions: Vec<String>,
}

/// A kernel, and the Debian suite that has it.
struct Kernel {
    version: &'static str,
    archive: &'static str,
    suite: &'static str,
}

const KERNELS: [Kernel; 3] = [
    // The last of them whose mark_victim carries a pid instead of a task.
    Kernel { version: "5.10", archive: "debian", suite: "bullseye" },
    Kernel { version: "6.1", archive: "debian", suite: "bookworm" },
    Kernel { version: "6.12", archive: "debian", suite: "trixie" },
];

const MIRROR: &str = "https://deb.debian.org";
/// The package that depends on a suite's current kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// Emulation is slow; a kernel takes some twenty seconds here.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Suites that need neither containerd nor anything else that the initramfs lacks, and the tests of them that do.
const SUITES: [(&str, &[&str]); 2] = [
    ("packets", &["embedded_object"]),
    ("probes", &["containers_that_ran_before", "another_stop_signal", "one_agent_at_a_time", "durations_are_those"]),
];

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let wanted = |kernel: &&Kernel| {
        arguments.versions.is_empty() || arguments.versions.iter().any(|version| version == kernel.version)
    };
    let kernels: Vec<&Kernel> = KERNELS.iter().filter(wanted).collect();
    if kernels.len() < arguments.versions.len() {
        bail!("the kernels are {}", KERNELS.map(|kernel| kernel.version).join(", "));
    }
    setup::run(setup::Arguments { tests: true, bench: false })?;
    let tools = [("qemu-system-x86_64", "qemu-system-x86"), ("cpio", "cpio"), ("curl", "curl"), ("strip", "binutils")];
    let missing: Vec<&str> =
        tools.into_iter().filter(|(program, _)| find(program).is_none()).map(|(_, package)| package).collect();
    setup::install(&missing)?;
    build_ebpf::run()?;
    step("building", cargo().args(["build", "--quiet", "--package", "warren-agent", "--locked"]))?;

    let directory = target().join("kernels");
    fs::create_dir_all(&directory)?;
    let initramfs = initramfs(&directory)?;
    for kernel in kernels {
        let image = fetch(kernel, &directory)?;
        boot(kernel, &image, &initramfs, &directory, 1)?;
    }
    Ok(())
}

/// The kernel's image, from its package.
fn fetch(kernel: &Kernel, directory: &Path) -> Result<PathBuf> {
    let root = directory.join(kernel.version);
    let image = |root: &Path| {
        let files = fs::read_dir(root.join("boot")).ok()?;
        files.flatten().map(|entry| entry.path()).find(|path| path.to_string_lossy().contains("/vmlinuz-"))
    };
    if let Some(image) = image(&root) {
        return Ok(image);
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
    image(&root).with_context(|| format!("{package} has no kernel"))
}

fn shell(script: &str) -> Result<String> {
    output("sh", &["-c", script]).with_context(|| format!("{script} failed"))
}

/// What the machine in QEMU begins with: Debian's runc and busybox, the agent and the tests, and the libraries of them all.
fn initramfs(directory: &Path) -> Result<PathBuf> {
    let root = directory.join("root");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    for path in ["bin", "t/deps", "proc", "sys", "dev", "tmp", "run", "new"] {
        fs::create_dir_all(root.join(path))?;
    }
    let mut programs = Vec::new();
    for program in ["busybox", "runc"] {
        let found = find(program).with_context(|| format!("{program} is missing"))?;
        fs::copy(&found, root.join("bin").join(program))?;
        programs.push(found);
    }
    for applet in
        ["sh", "mount", "mkdir", "ln", "ip", "cp", "switch_root", "poweroff", "uname", "sleep", "tail", "echo"]
    {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    let mut script = String::from(SECOND);
    for (suite, skipped) in SUITES {
        let executable = test_executable(suite)?;
        strip(&executable, &root.join("t/deps").join(suite))?;
        programs.push(executable);
        let skipped: String = skipped.iter().map(|test| format!(" --skip {test}")).collect();
        script.push_str(&format!("/t/deps/{suite} --test-threads 1{skipped} && echo 'PASSED {suite}'\n"));
    }
    script.push_str("poweroff -f\n");
    let agent = target().join("debug/warren-agent");
    strip(&agent, &root.join("t/warren-agent"))?;
    programs.push(agent);
    let mut libraries = BTreeSet::new();
    for program in &programs {
        let listed = output("ldd", &[&program.to_string_lossy()]).unwrap_or_default();
        libraries.extend(listed.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from));
    }
    for library in libraries {
        let copy = root.join(library.strip_prefix("/").unwrap_or(&library));
        fs::create_dir_all(copy.parent().context("a library is in a directory")?)?;
        fs::copy(&library, &copy).with_context(|| format!("copying {}", library.display()))?;
    }
    for (name, text) in [("init", FIRST), ("second", script.as_str())] {
        let path = root.join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    let image = directory.join("initramfs.gz");
    let pack = format!(
        "cd {} && find . | cpio --create --format newc --quiet | gzip -1 > {}",
        root.display(),
        image.display()
    );
    step("packing the initramfs", Command::new("sh").args(["-c", &pack]))?;
    Ok(image)
}

/// pivot_root does not work on the first root: everything moves to another.
const FIRST: &str = "#!/bin/sh
export PATH=/bin
mount -t tmpfs -o size=1200M root /new
for entry in bin lib lib64 usr t second; do [ -e /$entry ] && cp -a /$entry /new/; done
mkdir -p /new/proc /new/sys /new/dev /new/tmp /new/run
exec switch_root /new /second
";

const SECOND: &str = "#!/bin/sh
export PATH=/bin RUST_BACKTRACE=0
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mkdir -p /dev/pts
ln -s /proc/self/fd /dev/fd
ip link set lo up
echo \"KERNEL $(uname -r)\"
";

fn strip(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("strip").arg("-o").arg(to).arg(from).status()?;
    if !status.success() {
        bail!("{} cannot be stripped", from.display());
    }
    Ok(())
}

/// Builds a suite and returns its executable.
fn test_executable(suite: &str) -> Result<PathBuf> {
    println!("==> building the suite {suite}");
    let built = cargo()
        .args(["test", "--no-run", "--quiet", "--locked", "--package", "warren-tests", "--test", suite])
        .args(["--message-format", "json"])
        .stderr(Stdio::inherit())
        .output()?;
    let messages = String::from_utf8_lossy(&built.stdout);
    let executable = messages.lines().rev().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        (message["target"]["name"] == suite).then(|| message["executable"].as_str().map(PathBuf::from))?
    });
    executable.with_context(|| format!("{suite} was not built"))
}

/// What the initramfs prints first.
const STARTED: &str = "KERNEL ";
/// How often a kernel that crashes is booted.
const BOOTS: u32 = 3;

/// Boots a kernel, shows what it prints, and looks whether every suite passed.
fn boot(kernel: &Kernel, image: &Path, initramfs: &Path, directory: &Path, attempt: u32) -> Result<()> {
    println!("==> Linux {} in QEMU", kernel.version);
    let began = Instant::now();
    let log = directory.join(format!("{}.log", kernel.version));
    let mut qemu = Command::new("qemu-system-x86_64")
        // One thread for both processors: with two, a kernel that patches its own code may meet half of a patch.
        .args([
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=single",
            "-cpu",
            "max",
            "-m",
            "3000",
            "-smp",
            "2",
            "-nographic",
            "-no-reboot",
        ])
        .args(["-net", "none", "-append", "console=ttyS0 quiet panic=-1 mitigations=off"])
        .arg("-kernel")
        .arg(image)
        .arg("-initrd")
        .arg(initramfs)
        .current_dir(workspace())
        .stdin(Stdio::null())
        .stdout(File::create(&log)?)
        .spawn()?;
    let ended = loop {
        if qemu.try_wait()?.is_some() {
            break true;
        }
        if began.elapsed() > TIMEOUT {
            qemu.kill()?;
            qemu.wait()?;
            break false;
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    let mut printed = Vec::new();
    File::open(&log)?.read_to_end(&mut printed)?;
    let printed = String::from_utf8_lossy(&printed).replace('\r', "");
    let crashed = !printed.contains(STARTED) || printed.contains("Kernel panic") || printed.contains("Oops");
    if crashed && attempt < BOOTS {
        // QEMU 7.2 without KVM corrupts a kernel now and then, before our programs are loaded as well. A crash that is their
        // fault comes again, and a test that fails is not tried again.
        println!("{printed}    the kernel crashed (boot {attempt} of {BOOTS})");
        return boot(kernel, image, initramfs, directory, attempt + 1);
    }
    let failed: Vec<&str> =
        SUITES.iter().map(|(suite, _)| *suite).filter(|suite| !printed.contains(&format!("PASSED {suite}"))).collect();
    if !ended || !failed.is_empty() {
        println!("{printed}");
        bail!("Linux {}: {} did not pass; see {}", kernel.version, failed.join(", "), log.display());
    }
    for line in printed.lines().filter(|line| line.starts_with("KERNEL ") || line.starts_with("test ")) {
        println!("    {line}");
    }
    println!("    {:.1} s", began.elapsed().as_secs_f64());
    Ok(())
}
