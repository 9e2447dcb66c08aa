//! Names of services: the agent's resolver against dnsmasq and unbound, which have the same names, in turns. The questions come
//! from dnsperf on the same machine, so that each server has what dnsperf leaves of the processors.

use std::{fmt::Write as _, fs, process::Command};

use warren_tests::{Process, World, free_port, run, until};

use crate::median;

const ROUNDS: usize = 5;
const SECONDS: &str = "3";
/// Where latency is measured: far from what any of them can do.
const RATE: &str = "5000";
const SERVICES: usize = 20;

/// A server, where it listens, and what was measured of it.
struct Server {
    name: &'static str,
    process: u32,
    address: &'static str,
    port: u16,
    /// Answers a second with as many questions as it can take.
    rates: Vec<f64>,
    /// Microseconds of a processor for each of those answers.
    costs: Vec<f64>,
    /// Of every answer to few questions, in milliseconds.
    latencies: Vec<f64>,
}

impl Server {
    fn new(name: &'static str, process: u32, address: &'static str, port: u16) -> Self {
        Self { name, process, address, port, rates: Vec::new(), costs: Vec::new(), latencies: Vec::new() }
    }

    fn dnsperf(&self, queries: &str, more: &[&str]) -> String {
        let port = self.port.to_string();
        let arguments = ["-s", self.address, "-p", &port, "-d", queries, "-l", SECONDS];
        run("dnsperf", &[&arguments[..], more].concat()).succeeded()
    }

    /// How long it has used processors, in microseconds.
    fn processor_time(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process)).expect("it runs");
        let (_, fields) = stat.rsplit_once(") ").expect("a name");
        // utime and stime, in hundredths of a second.
        fields.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<f64>().expect("a number") * 1e4).sum()
    }

    fn measure(&mut self, queries: &str) {
        let before = self.processor_time();
        let report = self.dnsperf(queries, &["-c", "8", "-q", "200"]);
        let used = self.processor_time() - before;
        let line = |name: &str| {
            let found = report.lines().find_map(|line| line.trim().strip_prefix(name));
            found.unwrap_or_else(|| panic!("dnsperf does not say {name:?}: {report}")).trim().to_owned()
        };
        let codes = line("Response codes:");
        assert!(codes.starts_with("NOERROR") && codes.contains("(100.00%)"), "{report}");
        let completed = line("Queries completed:");
        let completed: f64 = completed.split(' ').next().and_then(|count| count.parse().ok()).expect("a number");
        self.rates.push(line("Queries per second:").parse().expect("a number"));
        self.costs.push(used / completed);
        let each = self.dnsperf(queries, &["-Q", RATE, "-v"]);
        let latency = |line: &str| line.strip_prefix("> NOERROR ")?.rsplit(' ').next()?.parse::<f64>().ok();
        self.latencies.extend(each.lines().filter_map(latency).map(|seconds| seconds * 1e3));
    }

    fn latency(&mut self, percent: usize) -> f64 {
        self.latencies.sort_by(f64::total_cmp);
        self.latencies.get(self.latencies.len() * percent / 100).copied().unwrap_or(f64::NAN)
    }
}

pub(crate) fn measure() {
    let mut world = World::empty("bench-dns").and_containerd();
    world.start_manager();
    // Else it protects itself from a container that asks this much.
    world.start_agent(&["--dns-rate", "100000000"]);
    world.wait_ready();
    let names: Vec<String> = (0..SERVICES).map(|i| format!("web-{i}")).collect();
    for name in &names {
        world.create(name, 1, &["--stop-timeout", "0"], "exec sleep 100000");
    }
    // The same names and addresses for all of them.
    let (mut hosts, mut local_data, mut queries) = (String::new(), String::new(), String::new());
    for name in &names {
        for kind in ["A", "AAAA"] {
            let ask = || run("dig", &["@169.254.1.1", "+short", &format!("{name}.warren"), kind]).succeeded();
            let address = until("the name is known", || Some(ask().trim().to_owned()).filter(|text| !text.is_empty()));
            let _ = writeln!(hosts, "{address} {name}.warren");
            let _ = writeln!(local_data, "  local-data: \"{name}.warren. 5 IN {kind} {address}\"");
            let _ = writeln!(queries, "{name}.warren {kind}");
        }
    }
    let write = |file: &str, text: &str| {
        let path = world.path(file);
        fs::write(&path, text).expect("writable");
        path.to_string_lossy().into_owned()
    };
    let (hosts, queries) = (write("hosts", &hosts), write("queries", &queries));
    let (dnsmasq_port, unbound_port) = (free_port(), free_port());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let configuration = write(
        "unbound.conf",
        &format!(
            "server:\n  interface: 127.0.0.1@{unbound_port}\n  num-threads: {threads}\n  do-daemonize: no\n  username: \"\"\n  \
             chroot: \"\"\n  pidfile: \"\"\n  use-syslog: no\n  directory: \"{}\"\n  local-zone: \"warren.\" static\n{local_data}",
            world.directory.path().display()
        ),
    );
    let mut dnsmasq = Command::new("dnsmasq");
    dnsmasq.args(["--keep-in-foreground", "--no-resolv", "--no-hosts", "--bind-interfaces", "--conf-file=/dev/null"]);
    dnsmasq.args([
        format!("--addn-hosts={hosts}"),
        format!("--port={dnsmasq_port}"),
        "--listen-address=127.0.0.1".to_owned(),
    ]);
    let dnsmasq = Process::start("dnsmasq", &mut dnsmasq, world.directory.path());
    let unbound =
        Process::start("unbound", Command::new("unbound").args(["-d", "-c", &configuration]), world.directory.path());

    let agent = world.agent.as_ref().expect("it runs").id();
    let mut servers = [
        Server::new("dnsmasq", dnsmasq.id(), "127.0.0.1", dnsmasq_port),
        Server::new("unbound", unbound.id(), "127.0.0.1", unbound_port),
        Server::new("warren-agent", agent, "169.254.1.1", 53),
    ];
    for server in &servers {
        let port = server.port.to_string();
        until("the server answers", || {
            let asked = run("dig", &[&format!("@{}", server.address), "-p", &port, "+short", "web-0.warren", "A"]);
            (asked.code == 0 && !asked.stdout.trim().is_empty()).then_some(())
        });
    }
    for _ in 0..ROUNDS {
        servers.iter_mut().for_each(|server| server.measure(&queries));
    }
    let figures = servers.map(|mut server| {
        let (middle, slow) = (server.latency(50), server.latency(99));
        (server.name, median(&mut server.rates), median(&mut server.costs), middle, slow)
    });
    println!(
        "names of {SERVICES} services, A and AAAA, by dnsperf beside the server, in turns; medians of {ROUNDS} rounds of {SECONDS} s,\n\
         and latencies at {RATE} /s of all rounds together"
    );
    let (_, own_rate, own_cost, _, own_slow) = figures[2];
    for (name, rate, cost, middle, slow) in figures {
        println!(
            "  {name:14}  {rate:8.0} /s ({:.2})   {cost:5.2} us of a processor each ({:.2})   median {middle:.3} ms   p99 {slow:.3} ms ({:.2})",
            own_rate / rate,
            own_cost / cost,
            own_slow / slow
        );
    }
    println!("  (in brackets: warren's share of it; goal: a rate above and a p99 below both)\n");
}
