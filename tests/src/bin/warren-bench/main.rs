//! Warren beside what one would use instead, in one run. Prints what it measured; asserts nothing.
//!
//! Run by `cargo xtask bench`, which builds everything optimised first.

mod failover;
mod hundred;
mod names;
mod network;
mod scale;

use std::{
    fs::File,
    hint::black_box,
    io::{self, Write as _},
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use aya::{Ebpf, EbpfLoader, TestRun as _, TestRunOptions, programs::CgroupSkb};
use warren_agent::probes::{OBJECT, PROGRAMS};
use warren_agent_ebpf::abi::Config;
use warren_raft::{Disconnected, Files, Freeze, Node, Options, Profile, StateMachine, Unobserved};
use warren_tests::{DnsServer, Transport, World, ask, image_name, until};

fn main() {
    /// What there is to measure, how, and the programs that it needs.
    type Section = (&'static str, fn(), &'static [&'static str]);
    const SECTIONS: [Section; 10] = [
        ("containers", containers, &["containerd", "runc"]),
        ("hundred", hundred::measure, &["containerd", "dockerd"]),
        ("network", network::measure, &["containerd", "iptables"]),
        ("names", names::measure, &["containerd", "dnsmasq", "unbound", "dnsperf"]),
        ("packets", packets, &[]),
        ("raft", raft, &[]),
        ("scale", scale::measure, &[]),
        ("agents", scale::idle_agents, &[]),
        ("failover", failover::measure, &["dockerd"]),
        ("memory", memory, &["containerd"]),
    ];
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name);
    if let Some(unknown) = wanted.iter().find(|wanted| SECTIONS.iter().all(|(name, ..)| name != wanted)) {
        let names = SECTIONS.map(|(name, ..)| name).join(", ");
        eprintln!("error: there is nothing called {unknown} to measure; there are {names}");
        std::process::exit(2);
    }
    for (name, _, programs) in SECTIONS.iter().filter(|(name, ..)| is_wanted(name)) {
        if let Some(missing) = programs.iter().find(|program| warren_tests::find_program(program).is_none()) {
            eprintln!(
                "error: {name} needs {missing}, which is missing: `cargo xtask setup --tests --bench` installs it"
            );
            std::process::exit(1);
        }
    }
    println!("{}", machine());
    for (name, measure, _) in SECTIONS {
        if is_wanted(name) {
            // Of its own thread: it may go into a network of its own.
            std::thread::spawn(measure).join().expect("it measures");
        }
    }
}

/// What this was measured on.
fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("?", |m| m.1);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let date = Command::new("date").arg("-Is").output().map(|output| output.stdout).unwrap_or_default();
    format!(
        "machine  {cores} x {model}, kernel {}\ndate     {}\nload     {}\ncommand  cargo xtask bench\n",
        kernel.trim(),
        String::from_utf8_lossy(&date).trim(),
        load.trim()
    )
}

fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

const SCRIPT: &str = "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done";
const CONTAINERS: usize = 25;

/// Creating and starting a container: Warren against containerd's own client, in turns on the same containerd.
fn containers() {
    let world = World::with_warren("bench");
    let (mut by_ctr, mut by_warren, mut in_agent) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..CONTAINERS {
        let id = format!("ctr-{i}");
        // In a namespace of its own: in the agent's, it would be removed as nobody's.
        let ctr = |arguments: &[&str]| {
            let mut all = vec!["--namespace", "bench"];
            all.extend(arguments);
            assert_eq!(world.ctr(&all).code, 0, "{arguments:?}");
        };
        if i == 0 {
            ctr(&["images", "import", &world.path("demo.tar").to_string_lossy()]);
        }
        let began = Instant::now();
        ctr(&["run", "--detach", image_name(), &id, "sh", "-c", SCRIPT]);
        by_ctr.push(ms(began.elapsed()));
        ctr(&["tasks", "kill", "--signal", "SIGKILL", &id]);
        until("it has ended", || {
            (world.ctr(&["--namespace", "bench", "tasks", "delete", &id]).code == 0).then_some(())
        });
        ctr(&["containers", "delete", &id]);

        let name = format!("warren-{i}");
        let began = Instant::now();
        world.create(&name, 1, &[], SCRIPT);
        by_warren.push(ms(began.elapsed()));
        let container = &world.containers(&name)[0];
        let nanos =
            |what: &str| container["status"]["runtime"][what].as_str().and_then(|text| text.parse::<f64>().ok());
        in_agent.push((nanos("createNanos").unwrap_or(f64::NAN) + nanos("startNanos").unwrap_or(f64::NAN)) / 1e6);
        let _ = world.warren(&["service", "rm", &name, "--wait"]).succeeded();
    }
    let (ctr, warren, agent) = (median(&mut by_ctr), median(&mut by_warren), median(&mut in_agent));
    println!("create and start one container, median of {CONTAINERS}, in turns");
    println!("  ctr run --detach                            {ctr:8.1} ms");
    println!(
        "  warren service create --wait                {warren:8.1} ms   {:.2} of ctr (goal: at most 1.10)",
        warren / ctr
    );
    println!("  of that, the agent's calls to containerd    {agent:8.1} ms\n");
}

fn load_programs() -> Ebpf {
    let config = Config { dns_ports: [53u16.to_be(), 0, 0, 0], ..Config::default() };
    let mut loader = EbpfLoader::new();
    loader.override_global("CONFIG", &config, true);
    let mut ebpf = loader.load(OBJECT).expect("the object loads");
    for name in ["dns_egress", "dns_ingress", "empty"] {
        let program: &mut CgroupSkb = ebpf.program_mut(name).expect("there").try_into().expect("its kind");
        program.load().expect("the verifier accepts it");
    }
    ebpf
}

const REPEATS: u32 = 300_000;
const ROUNDS: usize = 7;

/// What the packet programs cost, by the kernel's own clock.
fn packets() {
    let ebpf = load_programs();
    let cost = |program: &str, packet: &[u8]| {
        let loaded: &CgroupSkb = ebpf.program(program).expect("there").try_into().expect("its kind");
        let mut rounds: Vec<f64> = (0..ROUNDS)
            .map(|_| {
                let options = TestRunOptions { data_in: Some(packet), repeat: REPEATS, ..TestRunOptions::default() };
                loaded.test_run(options).expect("it runs").duration.as_nanos() as f64
            })
            .collect();
        median(&mut rounds)
    };
    let ipv4 = |protocol: u8, payload: &[u8]| {
        let mut frame = vec![0; 12];
        frame.extend([8, 0, 0x45, 0]);
        frame.extend((20 + payload.len() as u16).to_be_bytes());
        frame.extend([0, 0, 0, 0, 64, protocol, 0, 0, 127, 0, 0, 1, 127, 0, 0, 1]);
        frame.extend(payload);
        frame
    };
    let message = b"\x00\x07\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03www\x07example\x04test\x00\x00\x01\x00\x01";
    let udp = |from: u16, to: u16, answer: bool| {
        let mut segment = Vec::new();
        for word in [from, to, 8 + message.len() as u16, 0] {
            segment.extend(word.to_be_bytes());
        }
        segment.extend(message);
        if answer {
            segment[8 + 2] = 0x81;
        }
        ipv4(17, &segment)
    };
    let mut web = vec![0; 1020];
    web[..4].copy_from_slice(&[0x9c, 0x40, 0x01, 0xbb]);
    web[12] = 0x50;
    let web = ipv4(6, &web);
    let empty = cost("empty", &web);
    println!("ns a packet, median of {ROUNDS} rounds of {REPEATS}; against an empty program");
    println!("  empty program                               {empty:8.0} ns");
    for (what, program, packet) in [
        ("egress, not DNS", "dns_egress", &web),
        ("ingress, not DNS", "dns_ingress", &web),
        ("egress, a DNS query (sent again)", "dns_egress", &udp(4000, 53, false)),
        ("ingress, a DNS answer (to nobody)", "dns_ingress", &udp(53, 4000, true)),
    ] {
        let ns = cost(program, packet);
        println!("  {what:42}  {ns:8.0} ns   +{:.0} ns", ns - empty);
    }
    println!();
    live();
}

const QUERIES: u16 = 5000;

/// What each program costs where it is attached, by the kernel's statistics: whole queries and whole containers, which a test
/// run cannot make. The statistics' own clock is part of every figure.
fn live() {
    let statistics = aya::sys::enable_stats(aya::sys::Stats::RunTime);
    let Ok(_statistics) = statistics else {
        println!("live: SKIPPED, the kernel keeps no statistics of BPF programs\n");
        return;
    };
    let mut world = World::with_containerd("live");
    let _server = DnsServer::start(world.dns_port);
    world.start_observer(&[]);
    for id in 0..QUERIES {
        let _ = ask(Transport::Udp4, world.dns_port, id, "ok.test", 1, 1);
    }
    for i in 0..10 {
        let id = format!("live-{i}");
        assert_eq!(world.ctr(&["run", "--detach", image_name(), &id, "sh", "-c", SCRIPT]).code, 0);
        assert_eq!(world.ctr(&["tasks", "kill", "--signal", "SIGTERM", &id]).code, 0);
        until("it has ended", || (world.ctr(&["tasks", "delete", &id]).code == 0).then_some(()));
    }
    let metrics = world.agent_metrics();
    println!(
        "ns a run where they are attached: {QUERIES} queries with their answers, 10 containers, and what else happened"
    );
    for program in PROGRAMS {
        let label = format!("program=\"{}\"", program.name);
        let runs = metrics.sum("warren_probe_runs_total", &[&label]);
        let ns = metrics.sum("warren_probe_run_seconds_total", &[&label]) * 1e9;
        println!("  {:42}  {:8.0} ns   {runs:.0} runs", program.name, ns / runs.max(1.0));
    }
    println!();
}

/// Applies nothing.
struct Nothing;

impl StateMachine for Nothing {
    fn apply(&mut self, _index: u64, command: &str) -> io::Result<String> {
        Ok(black_box(command.len()).to_string())
    }

    fn freeze(&self) -> Freeze {
        Box::new(|| Ok(Vec::new()))
    }

    fn restore(&mut self, _state: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

const MEASURED: Duration = Duration::from_secs(3);

fn fdatasyncs(directory: &Path) -> f64 {
    let mut file = File::create(directory.join("sync")).expect("a file");
    let (began, mut count) = (Instant::now(), 0);
    while began.elapsed() < MEASURED {
        file.write_all(&[7; 256]).expect("writable");
        file.sync_data().expect("syncs");
        count += 1;
    }
    f64::from(count) / began.elapsed().as_secs_f64()
}

async fn writes(node: &Node, clients: usize) -> f64 {
    let count = Arc::new(AtomicU64::new(0));
    let began = Instant::now();
    let tasks: Vec<_> = (0..clients)
        .map(|_| {
            let (node, count) = (node.clone(), Arc::clone(&count));
            tokio::spawn(async move {
                while began.elapsed() < MEASURED {
                    node.propose("x".repeat(256)).await.expect("commits");
                    count.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("no panic");
    }
    count.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64()
}

/// Durable writes against what the disk can do.
fn raft() {
    // On the disk that the build is on: /tmp may be memory.
    let own = std::env::current_exe().expect("a path");
    let directory = tempfile::tempdir_in(own.parent().expect("a directory")).expect("a directory");
    let before = fdatasyncs(directory.path());
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    let (one, many) = runtime.block_on(async {
        let options = Options {
            id: 1,
            address: "nowhere".to_owned(),
            profile: Profile::Lan,
            snapshot_after: 1_000_000,
            snapshot_after_bytes: u64::MAX,
        };
        let node = {
            let files = Arc::new(Files::new(directory.path().join("raft")));
            Node::start(&options, files, Box::new(Nothing), Arc::new(Disconnected), Arc::new(Unobserved)).await
        };
        let node = node.expect("starts");
        node.recovered().await.expect("recovers");
        let rates = (writes(&node, 1).await, writes(&node, 64).await);
        node.shutdown().await;
        rates
    });
    let after = fdatasyncs(directory.path());
    let disk = f64::midpoint(before, after);
    println!("durable Raft writes of 256 bytes, one voter, {} s each", MEASURED.as_secs());
    println!("  the disk's fdatasync, one after another     {disk:8.0} /s   (before {before:.0}, after {after:.0})");
    println!("  1 client                                    {one:8.0} /s   {:.2} of the disk", one / disk);
    println!("  64 clients                                  {many:8.0} /s   {:.2} of the disk\n", many / disk);
}

fn resident_mib(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib =
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.map_or(f64::NAN, |kib: f64| kib / 1024.0)
}

/// Memory of processes that have nothing to do but three containers.
fn memory() {
    let world = World::with_warren("memory");
    world.create("web", 3, &[], SCRIPT);
    std::thread::sleep(Duration::from_secs(10));
    let resident =
        |process: &Option<warren_tests::Process>| process.as_ref().map_or(f64::NAN, |p| resident_mib(p.id()));
    println!("resident memory, three containers, 10 s idle");
    println!("  manager                                     {:8.1} MiB  (goal: 40)", resident(&world.manager));
    println!("  agent                                       {:8.1} MiB  (goal: 20)", resident(&world.agent));
}
