//! DNS queries, timed in the kernel.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    process::Command,
    thread,
    time::Duration,
};

use aya::maps::{Array, HashMap, MapData, MapError};
use rustix::process::Signal;
use warren_agent::probes::{Groups, Maps, Options};
use warren_agent_ebpf::abi::{SweepIntent, dns};
use warren_tests::{
    Answer, DnsServer, Metrics, Process, Transport, World, ask, ask_silently, find, framed_query, script_that_asks,
    until,
};

/// Terms of the law `sent - retransmits = answered or timed out + pending + evicted + superseded`, of the whole node.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Law {
    sent: f64,
    retransmits: f64,
    finished: f64,
    pending: f64,
    lost: f64,
}

impl Law {
    fn of(metrics: &Metrics) -> Self {
        let lost = |reason: &str| {
            metrics.sum("warren_probe_events_lost_total", &["probe=\"dns\"", &format!("reason=\"{reason}\"")])
        };
        Self {
            sent: metrics.sum("warren_dns_sent_total", &[]),
            retransmits: metrics.sum("warren_dns_retransmits_total", &[]),
            finished: metrics.sum("warren_dns_queries_total", &[]),
            pending: metrics.sum("warren_dns_pending", &[]),
            lost: lost("evicted") + lost("superseded") + lost("map_full"),
        }
    }

    fn holds(&self) -> bool {
        self.sent - self.retransmits == self.finished + self.pending + self.lost
    }
}

fn finished(metrics: &Metrics, labels: &[&str]) -> f64 {
    metrics.sum("warren_dns_queries_total", labels)
}

#[test]
fn every_kind_of_query_is_counted_and_timed() {
    let mut world = World::empty("dns-kinds");
    let server = DnsServer::start(world.dns_port);
    world.start_observer(&["--dns-slow-ms", "100"]);
    let port = world.dns_port;

    for (transport, label) in
        [(Transport::Udp4, "udp"), (Transport::Udp6, "udp6"), (Transport::Tcp4, "tcp"), (Transport::Tcp6, "tcp6")]
    {
        assert_eq!(ask(transport, port, 1, "ok.test", 1, 1), Answer::Code(0), "{label}");
        assert_eq!(ask(transport, port, 2, "nx.test", 28, 1), Answer::Code(3), "{label}");
        assert_eq!(ask(transport, port, 3, "fail.test", 33, 1), Answer::Code(2), "{label}");
    }
    let metrics = world.agent_metrics();
    for transport in ["udp", "udp6", "tcp", "tcp6"] {
        for (qtype, rcode) in [("A", "noerror"), ("AAAA", "nxdomain"), ("SRV", "servfail")] {
            let series = format!(
                "warren_dns_queries_total{{node=\"node-1\",rcode=\"{rcode}\",service=\"host\",\
                 transport=\"{transport}\",type=\"{qtype}\"}}"
            );
            assert_eq!(metrics.get(&series), Some(1.0), "{series}\n{}", metrics.text);
        }
    }
    assert_eq!(metrics.sum("warren_dns_query_duration_seconds_count", &["rcode=\"noerror\"", "type=\"A\""]), 4.0);
    assert_eq!(metrics.sum("warren_dns_failures_total", &["reason=\"nxdomain\""]), 4.0);
    assert_eq!(metrics.sum("warren_dns_failures_total", &["reason=\"servfail\""]), 4.0);

    // One question sent twice, answered the second time: one query, as long as the user waited.
    assert_eq!(ask(Transport::Udp4, port, 7, "second.test", 12, 2), Answer::Code(0));
    let metrics = world.agent_metrics();
    assert_eq!(metrics.sum("warren_dns_retransmits_total", &[]), 1.0);
    assert_eq!(finished(&metrics, &["type=\"PTR\""]), 1.0);
    let waited = metrics.sum("warren_dns_query_duration_seconds_sum", &["type=\"PTR\""]);
    assert!((0.4..1.0).contains(&waited), "{waited} s");

    // No answer at all: a timeout, after two seconds here.
    assert_eq!(ask(Transport::Udp4, port, 8, "drop.test", 16, 1), Answer::Nothing);
    assert_eq!(world.agent_metrics().sum("warren_dns_pending", &[]), 1.0);
    until("the query is given up", || {
        (finished(&world.agent_metrics(), &["rcode=\"timeout\"", "type=\"other\""]) == 1.0).then_some(())
    });
    let law = Law::of(&world.agent_metrics());
    assert!(law.holds() && law.lost == 0.0, "{law:?}");
    assert_eq!(server.answered(), 13);

    // Failed and slow queries are reported with their names.
    let log = world.agent.as_ref().expect("it runs").log();
    for name in ["nx.test.", "fail.test.", "second.test."] {
        assert!(log.contains(name), "{name} is not in\n{log}");
    }
    assert!(!log.contains("ok.test."), "a fast answer is nobody's business");
}

#[test]
fn a_full_ring_loses_details_and_no_count_and_says_so() {
    /// More failed queries than the ring has room for.
    const QUERIES: u16 = 3000;
    let mut world = World::empty("dns-ring");
    let _server = DnsServer::start(world.dns_port);
    world.start_observer(&["--dns-slow-ms", "1000"]);
    // An agent that stands still reads nothing.
    let agent = world.agent.as_ref().expect("it runs");
    agent.signal(Signal::STOP);
    for id in 0..QUERIES {
        assert_eq!(ask(Transport::Udp4, world.dns_port, id, "nx.test", 1, 1), Answer::Code(3));
    }
    agent.signal(Signal::CONT);
    let metrics = world.agent_metrics();
    let lost = metrics.sum("warren_probe_events_lost_total", &["probe=\"dns\"", "reason=\"ring_full\""]);
    assert!(lost > 0.0 && lost < f64::from(QUERIES), "{lost}");
    assert_eq!(metrics.sum("warren_dns_failures_total", &["reason=\"nxdomain\""]), f64::from(QUERIES));
    // What was not lost is reported.
    let reported = || world.agent.as_ref().expect("it runs").log().matches("nx.test.").count();
    until("the rest is reported", || (reported() as f64 + lost == f64::from(QUERIES)).then_some(()));
}

/// Debian's dnsmasq, answering for one domain.
fn dnsmasq(world: &World) -> Process {
    let mut command = Command::new(find("dnsmasq"));
    command
        .args([
            "--keep-in-foreground",
            "--no-resolv",
            "--no-hosts",
            "--conf-file=/dev/null",
            "--user=root",
            "--group=root",
        ])
        .args(["--listen-address=127.0.0.1", "--bind-interfaces", "--address=/ok.test/192.0.2.1", "--local=/test/"])
        .arg(format!("--port={}", world.dns_port))
        .arg(format!("--pid-file={}", world.path("dnsmasq.pid").display()));
    let process = Process::start("dnsmasq", &mut command, world.directory.path());
    until("dnsmasq answers", || {
        (ask(Transport::Udp4, world.dns_port, 1, "ok.test", 1, 1) == Answer::Code(0)).then_some(())
    });
    process
}

const QUERIES: u16 = 10_000;
const CLIENTS: u16 = 4;

fn ask_many(port: u16, queries: u16) {
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            scope.spawn(move || {
                for i in 0..queries / CLIENTS {
                    let (name, code) = if i % 5 == 0 { ("gone.test", 3) } else { ("ok.test", 0) };
                    let id = client * (queries / CLIENTS) + i;
                    assert_eq!(ask(Transport::Udp4, port, id, name, 1, 1), Answer::Code(code), "query {id}");
                }
            });
        }
    });
}

#[test]
fn ten_thousand_queries_are_all_accounted_for() {
    let mut world = World::empty("dns-many");
    let _dnsmasq = dnsmasq(&world);
    world.start_observer(&[]);
    let before = finished(&world.agent_metrics(), &[]);

    ask_many(world.dns_port, QUERIES);
    // And some that nobody answers, from one socket, all pending at once.
    let silence = DnsSilence::start(&world);
    let metrics = until("the unanswered ones are given up", || {
        let metrics = world.agent_metrics();
        (metrics.sum("warren_dns_pending", &[]) == 0.0).then_some(metrics)
    });
    let law = Law::of(&metrics);
    assert!(law.holds() && law.lost == 0.0, "{law:?}");
    assert_eq!(law.finished - before, f64::from(QUERIES) + f64::from(silence.asked));
    assert_eq!(finished(&metrics, &["rcode=\"nxdomain\""]), f64::from(QUERIES / 5));
    assert_eq!(finished(&metrics, &["rcode=\"timeout\""]), f64::from(silence.asked));
    assert_eq!(metrics.sum("warren_probe_events_lost_total", &["probe=\"dns\"", "reason=\"recursion\""]), 0.0);

    // The agent is away: the kernel goes on counting, and its successor finds every one.
    let agent = world.agent.take().expect("it runs");
    agent.kill();
    ask_many(world.dns_port, QUERIES);
    world.start_observer(&[]);
    let later = Law::of(&world.agent_metrics());
    assert!(later.holds() && later.lost == 0.0, "{later:?}");
    assert_eq!(later.finished - law.finished, f64::from(QUERIES));
}

/// Queries to a socket that is bound and never read.
struct DnsSilence {
    asked: u16,
}

impl DnsSilence {
    fn start(world: &World) -> Self {
        let asked = 500u16;
        // dnsmasq is not asked: the other loopback address has a listener that never answers.
        let _deaf = std::net::UdpSocket::bind(("127.0.0.2", world.dns_port)).expect("a socket");
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
        socket.connect(("127.0.0.2", world.dns_port)).expect("connects");
        for id in 0..asked {
            let mut message = id.to_be_bytes().to_vec();
            message.extend(b"\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04drop\x04test\x00\x00\x01\x00\x01");
            socket.send(&message).expect("sends");
        }
        Self { asked }
    }
}

/// A map of the probes that an agent left in the kernel.
fn pinned<M: TryFrom<aya::maps::Map, Error = MapError>>(world: &World, name: &str) -> M {
    let directories = fs::read_dir(world.pins()).expect("pins").flatten().map(|entry| entry.path());
    let pin = directories.map(|directory| directory.join(name)).find(|pin| pin.exists()).expect("it is pinned");
    let data = MapData::from_pin(pin).expect("it can be opened");
    M::try_from(aya::maps::Map::from_map_data(data).expect("a map")).expect("its kind")
}

/// Removing a query and counting it are two calls, with what is meant to be done written down before: an agent may die after
/// each.
#[test]
fn an_agent_that_dies_while_it_counts_timeouts_loses_and_doubles_none() {
    let mut world = World::empty("dns-sweep");
    let _server = DnsServer::start(world.dns_port);
    world.start_observer(&[]);
    for (round, (removed, counted)) in (1..).zip([(false, false), (true, false), (true, true)]) {
        ask_silently(world.dns_port, 1);
        until("it waits", || (Law::of(&world.agent_metrics()).pending == 1.0).then_some(()));
        world.agent.take().expect("it runs").kill();
        let mut pending: HashMap<_, dns::PendingKey, dns::Pending> = pinned(&world, "DNS_PENDING");
        let (query, found) = pending.iter().flatten().next().expect("it waits still");
        let mut timeouts: HashMap<_, dns::HistogramKey, u64> = pinned(&world, "DNS_TIMEOUTS");
        let key = dns::HistogramKey {
            group: found.group,
            qtype: dns::qtype::A,
            rcode: dns::rcode::TIMEOUT,
            transport: found.transport as u8,
            _reserved: 0,
        };
        let count = timeouts.get(&key, 0).unwrap_or(0) + 1;
        let mut intent: Array<_, SweepIntent> = pinned(&world, "SWEEP_INTENT");
        intent.set(0, SweepIntent { query, sent_ns: found.sent_ns, key, count }, 0).expect("writable");
        if removed {
            pending.remove(&query).expect("it is there");
        }
        if counted {
            timeouts.insert(key, count, 0).expect("there is room");
        }
        world.start_observer(&[]);
        until("it is given up", || (Law::of(&world.agent_metrics()).pending == 0.0).then_some(()));
        // Looked at again: the counts of one look are read one after the other, and the sweep may have been in between.
        let law = Law::of(&world.agent_metrics());
        assert!(law.holds() && law.lost == 0.0, "removed {removed}, counted {counted}: {law:?}");
        assert_eq!(law.finished, f64::from(round), "removed {removed}, counted {counted}");
    }
}

#[test]
fn queries_of_containers_are_their_services() {
    let mut world = World::with_containerd("dns-service");
    world.start_manager();
    world.start_agent(&[]);
    world.wait_ready();
    world.create("silent", 2, &[], &script_that_asks(world.dns_port, false));
    world.create("answered", 1, &[], &script_that_asks(world.dns_port, true));
    until("all three queries are accounted for", || {
        let metrics = world.manager_metrics();
        let count = |service: &str, rcode: &str| {
            metrics.sum("warren_dns_queries_total", &["node=\"node-1\"", "transport=\"tcp\"", service, rcode])
        };
        (count("service=\"silent\"", "rcode=\"timeout\"") == 2.0
            && count("service=\"answered\"", "rcode=\"noerror\"") == 1.0)
            .then_some(())
    });
    // Their parent cgroup is what is watched: the host's own queries cost nothing and are not counted.
    let _ = ask_host(world.dns_port);
    assert_eq!(world.agent_metrics().sum("warren_dns_sent_total", &[]), 3.0);
}

fn ask_host(port: u16) -> Answer {
    let _server = DnsServer::start(port);
    ask(Transport::Udp4, port, 1, "ok.test", 1, 1)
}

/// Sends pieces over one TCP connection, each in a segment of its own, and reads so many answers.
fn send_pieces(port: u16, pieces: &[&[u8]], answers: usize) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("connects");
    stream.set_nodelay(true).expect("a socket option");
    stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a socket option");
    for piece in pieces {
        stream.write_all(piece).expect("sends");
        thread::sleep(Duration::from_millis(50));
    }
    for _ in 0..answers {
        let mut length = [0; 2];
        stream.read_exact(&mut length).expect("an answer");
        let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut message).expect("an answer");
    }
}

#[test]
fn messages_are_counted_however_tcp_cuts_them() {
    let mut world = World::empty("dns-cut");
    let _dnsmasq = dnsmasq(&world);
    world.start_observer(&[]);
    let port = world.dns_port;
    let query = |id: u16| framed_query(id, "ok.test", 1);
    let joined = |ids: std::ops::Range<u16>| ids.flat_map(query).collect::<Vec<_>>();
    let one = query(9);
    // Pieces; how many queries; how many of those are counted, and how many losses.
    let cases: [(&[&[u8]], usize, f64, f64); 6] = [
        (&[&joined(1..3)], 2, 2.0, 0.0),
        (&[&joined(1..5)], 4, 4.0, 0.0),
        (&[&one[..2], &one[2..]], 1, 1.0, 0.0),
        (&[&one, &one], 2, 2.0, 0.0),
        (&[&one[..1], &one[1..]], 1, 0.0, 1.0),
        (&[&joined(1..7)], 6, 4.0, 1.0),
    ];
    for (i, (pieces, queries, counted, lost)) in cases.into_iter().enumerate() {
        let now = || {
            let metrics = world.agent_metrics();
            let partial = ["probe=\"dns\"", "reason=\"tcp_partial\""];
            (
                finished(&metrics, &["transport=\"tcp\""]),
                metrics.sum("warren_dns_sent_total", &[]),
                metrics.sum("warren_probe_events_lost_total", &partial),
                metrics.sum("warren_dns_unmatched_responses_total", &[]),
            )
        };
        let before = now();
        send_pieces(port, pieces, queries);
        let after = now();
        let by = (after.0 - before.0, after.1 - before.1, after.2 - before.2, after.3 - before.3);
        assert_eq!(by, (counted, counted, lost, 0.0), "case {i}");
    }
}

/// A node that has had thousands of services goes on naming those that it has.
#[test]
fn groups_of_services_that_are_gone_make_room() {
    let world = World::empty("dns-groups");
    let options = Options {
        pin_dir: world.pins(),
        dns_cgroup: "/".into(),
        registered_only: true,
        dns_timeout: Duration::from_secs(1),
        dns_slow: Duration::ZERO,
        dns_ports: vec![world.dns_port],
    };
    let maps = Maps::open(&options).expect("the probes load");
    let mut groups = Groups::load(&maps);
    let number = |groups: &mut Groups, name: &str| groups.number(&maps, name).expect("there is room");
    let kept = number(&mut groups, "kept");
    maps.register("0123456789", kept, 0).expect("there is room");
    assert_eq!(groups.forget_unused(&maps).expect("readable"), 0, "there is room: nothing is forgotten");
    let last = (0..3_200).map(|i| number(&mut groups, &format!("service-{i}"))).last().expect("many");
    assert_eq!(groups.forget_unused(&maps).expect("writable"), 3_200);
    assert_eq!((groups.name(kept), groups.name(last)), ("kept", "unknown"));
    // A number is not used again, and what was forgotten is in the kernel, too.
    let next = number(&mut groups, "next");
    assert!(next > last, "{next} after {last}");
    let again = Groups::load(&maps);
    assert_eq!((again.name(kept), again.name(next), again.name(last)), ("kept", "next", "unknown"));
    drop(maps);
    Maps::remove(&world.pins()).expect("removable");
}
