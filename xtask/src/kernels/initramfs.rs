//! What a machine in QEMU begins with.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use super::{NO_IPV6, SUITES, Tests, WITHOUT_IPV6, package::Package};
use crate::run::{cargo, find, output, step, target};

/// What a node has of Debian's.
const PROGRAMS: [&str; 11] = [
    "busybox",
    "runc",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "nft",
    "ip",
    "nsenter",
    "rpc.nfsd",
    "rpc.mountd",
    "exportfs",
];
const APPLETS: [&str; 13] = [
    "sh",
    "mount",
    "mkdir",
    "ln",
    "cp",
    "insmod",
    "switch_root",
    "poweroff",
    "uname",
    "sleep",
    "tail",
    "echo",
    "umount",
];

/// What the kernels have as modules: a node's files, links and packet rules, and a file server. They are loaded beforehand,
/// because nothing answers the kernel when it asks for one.
const MODULES: [&str; 19] = [
    "overlay",
    "veth",
    "vxlan",
    "wireguard",
    "nf_tables",
    "nft_chain_nat",
    "nft_nat",
    "nft_masq",
    "nft_ct",
    "nft_numgen",
    "nft_fib_inet",
    "nft_reject_inet",
    "nft_hash",
    "nft_counter",
    "nf_conntrack",
    "nf_conntrack_netlink",
    "nfs",
    "nfsv4",
    "nfsd",
];

/// What every kernel begins with: what a node has of Debian's, Warren, the tests, and the libraries of them all.
pub(super) fn of_programs(directory: &Path) -> Result<PathBuf> {
    let root = directory.join("root");
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    for path in ["bin", "t/deps", "proc", "sys", "dev", "tmp", "run", "var", "new"] {
        fs::create_dir_all(root.join(path))?;
    }
    let mut programs = Vec::new();
    symlink("/run", root.join("var/run"))?;
    for program in PROGRAMS {
        let found = find(program).with_context(|| format!("{program} is missing"))?;
        fs::copy(&found, root.join("bin").join(program))?;
        programs.push(found);
    }
    // Without it, the file server's programs know no network.
    fs::create_dir_all(root.join("etc"))?;
    fs::copy("/etc/netconfig", root.join("etc/netconfig")).context("netconfig, of libtirpc-common, is missing")?;
    for (file, text) in [("hosts", "127.0.0.1 localhost\n"), ("exports", "")] {
        fs::write(root.join("etc").join(file), text)?;
    }
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    let mut script = String::from(SECOND);
    script.push_str(&format!("read -r told < /proc/cmdline\ncase \"$told\" in *{NO_IPV6}*)\n"));
    for (i, suite) in [WITHOUT_IPV6].into_iter().chain(SUITES).enumerate() {
        if i == 1 {
            script.push_str(";; *)\n");
        }
        let name = suite.name;
        let executable = test_executable(name)?;
        strip(&executable, &root.join("t/deps").join(name))?;
        programs.push(executable);
        let tests: String = match suite.tests {
            Tests::Except(tests) => tests.iter().map(|test| format!(" --skip {test}")).collect(),
            Tests::Only(tests) => format!(" --include-ignored {}", tests.join(" ")),
        };
        script.push_str(&format!("/t/deps/{name} --test-threads 1{tests} && echo 'PASSED {name}'\n"));
    }
    script.push_str(";; esac\npoweroff -f\n");
    for binary in ["warren", "warren-agent", "warren-manager"] {
        let built = target().join("debug").join(binary);
        strip(&built, &root.join("t").join(binary))?;
        programs.push(built);
    }
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
    pack(&root, &directory.join("programs.gz"))
}

/// A kernel's modules, in the order in which they are loaded.
pub(super) fn of_modules(package: &Package) -> Result<PathBuf> {
    let Package { root, release, .. } = package;
    let (root, library) = (root.display().to_string(), root.join("lib"));
    if !library.exists() {
        symlink("usr/lib", &library)?;
    }
    step("finding the modules", Command::new("depmod").args(["--basedir", &root, release]))?;
    let mut modules = Vec::new();
    for name in MODULES {
        // One that a kernel has built in, or as a part of another, is none of its own there.
        let shown = output("modprobe", &["--dirname", &root, "--set-version", release, "--show-depends", name]);
        for line in shown.unwrap_or_default().lines() {
            let path = line.strip_prefix("insmod ").map(|path| PathBuf::from(path.trim()));
            modules.extend(path.filter(|path| !modules.contains(path)));
        }
    }
    let directory = package.root.join("initramfs");
    if directory.exists() {
        fs::remove_dir_all(&directory)?;
    }
    fs::create_dir_all(directory.join("modules"))?;
    for (index, module) in modules.iter().enumerate() {
        let compressed = module.extension().is_some_and(|extension| extension == "xz");
        let copy = directory.join(format!("modules/{index:03}.ko"));
        if compressed {
            let unpacked = Command::new("xz").args(["--decompress", "--stdout"]).arg(module).output()?;
            fs::write(copy, unpacked.stdout)?;
        } else {
            fs::copy(module, copy)?;
        }
    }
    pack(&directory, &package.root.join("modules.gz"))
}

/// A directory as what a kernel unpacks.
fn pack(directory: &Path, archive: &Path) -> Result<PathBuf> {
    let script = format!(
        "cd {} && find . | cpio --create --format newc --quiet | gzip -1 > {}",
        directory.display(),
        archive.display()
    );
    step(&format!("packing {}", archive.display()), Command::new("sh").args(["-c", &script]))?;
    Ok(archive.to_owned())
}

/// pivot_root does not work on the first root: everything moves to another.
const FIRST: &str = "#!/bin/sh
export PATH=/bin
for module in /modules/*; do insmod $module; done
mount -t tmpfs -o size=2000M root /new
for entry in bin etc lib lib64 usr var t second; do [ -e /$entry ] && cp -a /$entry /new/; done
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
        .args(["test", "--no-run", "--quiet", "--locked", "--workspace", "--test", suite])
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
