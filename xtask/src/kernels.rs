//! Other kernels, and pure cgroup v2: Debian's cloud kernels in QEMU, without KVM, with an initramfs of the tests that depend on
//! either.

mod initramfs;
mod package;

use std::{
    fs::{self, File},
    io::Read as _,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use self::package::Package;
use crate::{
    build_ebpf,
    run::{cargo, find, install, step, target, took, workspace},
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
    /// Whether it is booted once more without IPv6, which is another thing than to switch it off.
    also_without_ipv6: bool,
}

const KERNELS: [Kernel; 3] = [
    // The last of them whose mark_victim carries a pid instead of a task.
    Kernel { version: "5.10", archive: "debian", suite: "bullseye", also_without_ipv6: false },
    Kernel { version: "6.1", archive: "debian", suite: "bookworm", also_without_ipv6: true },
    Kernel { version: "6.12", archive: "debian", suite: "trixie", also_without_ipv6: false },
];

/// Emulation is slow; a kernel takes some twenty seconds here.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Suites that run there, and which of their tests: some need what the initramfs lacks, or a processor that is not emulated.
struct Suite {
    name: &'static str,
    tests: Tests,
}

enum Tests {
    /// All but those whose names have one of these in them.
    Except(&'static [&'static str]),
    /// Those whose names have one of these in them.
    Only(&'static [&'static str]),
}

/// What a kernel that was told to have no IPv6 runs, and nothing else.
const WITHOUT_IPV6: Suite = Suite { name: "drift", tests: Tests::Only(&["a_node_without_ipv6"]) };
/// As it is told.
const NO_IPV6: &str = "ipv6.disable=1";

const SUITES: [Suite; 6] = [
    Suite { name: "packets", tests: Tests::Except(&["embedded_object"]) },
    Suite {
        name: "probes",
        tests: Tests::Except(&[
            "containers_that_ran_before",
            "another_stop_signal",
            "one_agent_at_a_time",
            "durations_are_those",
        ]),
    },
    // Limits and what is used of them are files of cgroup v2 here.
    Suite { name: "spec", tests: Tests::Only(&["limits_and_reservations"]) },
    Suite { name: "stats", tests: Tests::Only(&["what_containers_use"]) },
    // The kernel's own WireGuard.
    Suite { name: "network", tests: Tests::Only(&["may_be_encrypted"]) },
    // The kernel's own file server.
    Suite { name: "volumes", tests: Tests::Only(&["file_servers_directory"]) },
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
    let tools = [
        ("qemu-system-x86_64", "qemu-system-x86"),
        ("cpio", "cpio"),
        ("curl", "curl"),
        ("strip", "binutils"),
        ("depmod", "kmod"),
        ("rpc.nfsd", "nfs-kernel-server"),
        ("xz", "xz-utils"),
    ];
    let missing: Vec<&str> =
        tools.into_iter().filter(|(program, _)| find(program).is_none()).map(|(_, package)| package).collect();
    install(&missing)?;
    build_ebpf::run()?;
    step("building", cargo().args(["build", "--quiet", "--workspace", "--locked"]))?;

    let directory = target().join("kernels");
    fs::create_dir_all(&directory)?;
    let programs = initramfs::of_programs(&directory)?;
    for kernel in kernels {
        let package = package::fetch(kernel, &directory)?;
        let modules = initramfs::of_modules(&package)?;
        let initramfs = directory.join(format!("{}.initramfs.gz", kernel.version));
        // The kernel unpacks archives that follow each other.
        fs::write(&initramfs, [fs::read(&programs)?, fs::read(&modules)?].concat())?;
        boot(kernel, &package, &initramfs, &directory, &SUITES, 1)?;
        if kernel.also_without_ipv6 {
            boot(kernel, &package, &initramfs, &directory, &[WITHOUT_IPV6], 1)?;
        }
    }
    Ok(())
}

/// What the initramfs prints first.
const STARTED: &str = "KERNEL ";
/// How often a kernel that crashes is booted.
const BOOTS: u32 = 3;

/// Boots a kernel, shows what it prints, and looks whether every suite passed.
fn boot(
    kernel: &Kernel,
    package: &Package,
    initramfs: &Path,
    directory: &Path,
    suites: &[Suite],
    attempt: u32,
) -> Result<()> {
    let told = if suites.iter().any(|suite| suite.name == WITHOUT_IPV6.name) { NO_IPV6 } else { "" };
    println!("==> Linux {} in QEMU {told}", kernel.version);
    let began = Instant::now();
    let log = directory.join(format!("{}{}.log", kernel.version, if told.is_empty() { "" } else { "-no-ipv6" }));
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
        .args(["-net", "none", "-append", &format!("console=ttyS0 quiet panic=-1 mitigations=off {told}")])
        .arg("-kernel")
        .arg(&package.image)
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
        return boot(kernel, package, initramfs, directory, suites, attempt + 1);
    }
    let failed: Vec<&str> =
        suites.iter().map(|suite| suite.name).filter(|name| !printed.contains(&format!("PASSED {name}\n"))).collect();
    if !ended || !failed.is_empty() {
        println!("{printed}");
        bail!("Linux {}: {} did not pass; see {}", kernel.version, failed.join(", "), log.display());
    }
    for line in printed.lines().filter(|line| line.starts_with("KERNEL ") || line.starts_with("test ")) {
        println!("    {line}");
    }
    took(&format!("Linux {} {told}", kernel.version), began.elapsed());
    Ok(())
}
