//! The node's resolver: services' names for containers, everything else from the node's own resolvers.

use std::{
    collections::BTreeSet,
    fs,
    process::{Command, Stdio},
};

use warren_tests::{Inside, Process, WELL_BEHAVED, World, find, run, until};

const RESOLVER: &str = "@169.254.1.1";

/// Asks the resolver; the answers in order, or the code where it is another than NOERROR.
fn dig(arguments: &[&str]) -> String {
    let mut words = vec![RESOLVER, "+tries=1", "+timeout=4", "+noall", "+answer", "+comments"];
    words.extend(arguments);
    let output = run("dig", &words).stdout;
    let status = output.split("status: ").nth(1).and_then(|rest| rest.split(',').next()).unwrap_or("NOTHING");
    if status != "NOERROR" {
        return status.to_owned();
    }
    let data = output.lines().filter(|line| !line.starts_with(';') && !line.is_empty());
    data.map(|line| line.split_whitespace().skip(4).collect::<Vec<_>>().join(" ")).collect::<Vec<_>>().join(", ")
}

/// The answers sorted.
fn sorted(arguments: &[&str]) -> Vec<String> {
    let mut answers: Vec<_> = dig(arguments).split(", ").map(str::to_owned).collect();
    answers.sort();
    answers
}

/// The node's resolver of a company that has one: a real one, which notes what it is asked.
struct Upstream {
    _process: Process,
    log: std::path::PathBuf,
}

impl Upstream {
    const ADDRESS: &'static str = "127.0.0.1:5353";

    fn start(world: &World) -> Self {
        let log = world.path("upstream.log");
        let mut command = Command::new(find("dnsmasq"));
        command
            .args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"])
            .args(["--port=5353", "--listen-address=127.0.0.1", "--bind-interfaces", "--log-queries"])
            .arg(format!("--log-facility={}", log.display()))
            .arg(format!("--pid-file={}", world.path("upstream.pid").display()))
            .args(["--host-record=there.example,192.0.2.7,60", "--local-ttl=60", "--neg-ttl=60", "--local=/example/"])
            .args(["--mx-host=there.example,mail.there.example,10"]);
        // More than one packet holds.
        for i in 0..40 {
            command.arg(format!("--txt-record=big.example,{}-{}", i, "x".repeat(100)));
        }
        let process = Process::start("dnsmasq", &mut command, world.directory.path());
        until("the upstream answers", || {
            let asked = run("dig", &["@127.0.0.1", "-p", "5353", "+tries=1", "+timeout=1", "+short", "there.example"]);
            asked.stdout.contains("192.0.2.7").then_some(())
        });
        fs::write(&log, "").expect("writable");
        Self { _process: process, log }
    }

    /// What it was asked since it was last looked at.
    fn asked(&self) -> Vec<String> {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        fs::write(&self.log, "").expect("writable");
        let asked = log.lines().filter_map(|line| line.split(" query[").nth(1));
        asked.map(|rest| rest.replace(']', "").split(" from").next().unwrap_or_default().to_owned()).collect()
    }
}

fn with_upstream(name: &str, arguments: &[&str]) -> (World, Upstream) {
    let mut world = World::empty(name).and_containerd();
    let upstream = Upstream::start(&world);
    world.start_manager();
    let mut all = vec!["--dns-upstreams", Upstream::ADDRESS, "--dns-ports", "53"];
    all.extend(arguments);
    world.start_agent(&all);
    world.wait_ready();
    (world, upstream)
}

#[test]
fn services_have_names() {
    let (mut world, upstream) = with_upstream("names", &[]);
    let ports = ["--publish", "name=http,target=80", "--publish", "name=dns,target=53,protocol=udp"];
    world.create("web", 3, &ports, WELL_BEHAVED);
    world.create("db", 1, &["--endpoint-mode", "vip"], WELL_BEHAVED);
    let web = Inside::all(&world, "web");
    let of = |i: usize| web.iter().map(|container| container.addresses[i].clone()).collect::<BTreeSet<_>>();
    let set = |list: Vec<String>| list.into_iter().collect::<BTreeSet<_>>();
    until("all three are known", || (set(sorted(&["web"])) == of(0)).then_some(()));
    for name in ["web", "web.warren", "WEB.Warren."] {
        assert_eq!(set(sorted(&[name])), of(0), "{name}");
        assert_eq!(set(sorted(&["+tcp", name])), of(0), "{name} by TCP");
        assert_eq!(set(sorted(&[name, "AAAA"])), of(1), "{name}");
    }
    // Each in turn is the first.
    let firsts = || dig(&["web"]).split(", ").next().unwrap_or_default().to_owned();
    let firsts: BTreeSet<_> = (0..60).map(|_| firsts()).collect();
    assert_eq!(firsts, of(0));
    let slots: BTreeSet<_> = (1..=3).map(|slot| dig(&[&format!("web-{slot}")])).collect();
    assert_eq!(slots, of(0));
    let virtuals = |service: &str| dig(&[&format!("vip.{service}")]);
    assert!(virtuals("web").starts_with("10.127.0."), "{}", virtuals("web"));
    assert_eq!(dig(&["db"]), virtuals("db"), "it wants its virtual address");
    let srv = sorted(&["_http._tcp.web.warren", "SRV"]);
    let expected = ["0 10 80 web-1.warren.", "0 10 80 web-2.warren.", "0 10 80 web-3.warren."];
    assert_eq!(srv, expected);
    assert!(dig(&["_dns._udp.web", "SRV"]).contains("0 10 53 web-"));
    let reverse = dig(&["-x", &web[0].addresses[0]]);
    assert!(reverse.starts_with("web-") && reverse.ends_with(".warren."), "{reverse}");
    assert_eq!(dig(&["-x", &virtuals("web")]), "web.warren.");
    // There is such a name, and nothing of the kind; there is no such name.
    assert_eq!(
        (dig(&["web", "TXT"]), dig(&["nobody.warren"]), dig(&["nobody"])),
        ("".into(), "NXDOMAIN".into(), "NXDOMAIN".into())
    );
    assert_eq!(dig(&["-x", "10.128.0.99"]), "NXDOMAIN");
    let soa = run("dig", &[RESOLVER, "+noall", "+authority", "web", "TXT"]).stdout;
    assert!(soa.contains("SOA") && soa.split_whitespace().nth(1) == Some("5"), "a short negative TTL: {soa}");
    let ttl = run("dig", &[RESOLVER, "+noall", "+answer", "web"]).stdout;
    assert_eq!(ttl.split_whitespace().nth(1), Some("5"), "{ttl}");
    // None of these names ever left the node.
    assert_eq!(upstream.asked(), Vec::<String>::new());

    // From a container, by whatever its C library does.
    let (_, found) = web[0].shell(&world, "nslookup db; nslookup web.warren");
    assert!(found.contains(&virtuals("db")) && found.contains(&web[1].addresses[0]), "{found}");
    until("the query is its service's, seen in the kernel", || {
        let queries = world.agent_metrics().sum("warren_dns_queries_total", &["service=\"web\"", "type=\"A\""]);
        (queries >= 2.0).then_some(())
    });

    // Without a manager, and after the agent's own restart.
    world.manager.take().expect("it runs").kill();
    world.agent.take().expect("it runs").kill();
    world.start_agent(&["--dns-upstreams", Upstream::ADDRESS]);
    until("names are answered again", || (set(sorted(&["web"])) == of(0)).then_some(()));
    world.start_manager();
    world.wait_ready();
    // A container that stops is no longer named.
    let _ = world.warren(&["service", "scale", "web", "1", "--wait"]).succeeded();
    until("one is left", || (sorted(&["web"]).len() == 1).then_some(()));
    let _ = world.warren(&["service", "rm", "web", "--wait"]).succeeded();
    until("the name is gone", || (dig(&["web"]) == "NXDOMAIN").then_some(()));
}

#[test]
fn everything_else_is_asked_of_the_nodes_resolvers() {
    let (world, upstream) = with_upstream("forward", &["--dns-rate", "50"]);
    assert_eq!(dig(&["there.example"]), "192.0.2.7");
    assert_eq!(dig(&["there.example", "MX"]), "10 mail.there.example.");
    assert_eq!(dig(&["nobody.example"]), "NXDOMAIN");
    assert_eq!(dig(&["there.example", "AAAA"]), "", "there is nothing of the kind");
    let asked = upstream.asked();
    let expected = ["A there.example", "MX there.example", "A nobody.example", "AAAA there.example"];
    assert_eq!(asked, expected);
    // What was answered is kept, and that there is nothing too.
    for _ in 0..3 {
        assert_eq!((dig(&["there.example"]), dig(&["nobody.example"])), ("192.0.2.7".into(), "NXDOMAIN".into()));
    }
    assert_eq!(upstream.asked(), Vec::<String>::new());
    // What does not fit into a packet comes by TCP, on both sides.
    let whole = run("dig", &[RESOLVER, "+short", "big.example", "TXT"]).stdout;
    assert_eq!(whole.lines().count(), 40, "{whole}");
    let cut = run("dig", &[RESOLVER, "+ignore", "+noedns", "big.example", "TXT"]).stdout;
    assert!(cut.contains(" tc "), "a client that does not ask again sees that it is cut: {cut}");

    let requests = |source: &str| {
        let label = format!("source=\"{source}\"");
        world.agent_metrics().sum("warren_dns_server_requests_total", &[&label])
    };
    assert_eq!((requests("forwarded"), requests("cached")), (5.0, 8.0));
    let nothing = ["source=\"forwarded\"", "rcode=\"nxdomain\"", "type=\"A\""];
    assert_eq!(world.agent_metrics().sum("warren_dns_server_requests_total", &nothing), 1.0);

    // One that asks too much is refused; nobody else is.
    world.create("greedy", 1, &[], WELL_BEHAVED);
    let greedy = Inside::only(&world, "greedy");
    let mut flood = Command::new("nsenter");
    let queries = world.path("queries");
    fs::write(&queries, "there.example A\n").expect("writable");
    flood.args(["--target", &greedy.pid.to_string(), "--net", "dnsperf", "-s", "169.254.1.1", "-l", "3", "-d"]);
    let mut flood = flood.arg(&queries).stdout(Stdio::piped()).spawn().expect("dnsperf");
    let mut asked = 0;
    while flood.try_wait().expect("a child").is_none() {
        assert_eq!(dig(&["there.example"]), "192.0.2.7", "meanwhile, after {asked}");
        asked += 1;
    }
    let flooded = flood.wait_with_output().expect("dnsperf");
    let flooded = String::from_utf8_lossy(&flooded.stdout).into_owned();
    assert!(flooded.contains("REFUSED") && asked > 3, "{asked} were answered meanwhile; {flooded}");
}

#[test]
fn resolvers_that_are_silent_are_a_failure_in_time() {
    let mut world = World::empty("silent").and_containerd();
    // One that takes everything and says nothing, and one that is not there.
    let silent = std::net::UdpSocket::bind("127.0.0.1:5353").expect("a port");
    world.start_manager();
    world.start_agent(&["--dns-upstreams", "127.0.0.1:5353,127.0.0.1:5354"]);
    world.wait_ready();
    let began = std::time::Instant::now();
    assert_eq!(dig(&["somewhere.example"]), "SERVFAIL");
    assert!(began.elapsed().as_secs_f64() < 4.0, "{:?}", began.elapsed());
    assert!(world.agent_metrics().sum("warren_dns_server_upstream_failures_total", &[]) >= 1.0);
    // The cluster's own names do not wait for them.
    let began = std::time::Instant::now();
    assert_eq!(dig(&["nobody"]), "NXDOMAIN");
    assert!(began.elapsed().as_secs_f64() < 1.0, "{:?}", began.elapsed());
    drop(silent);
}
