//! The DNS programs' parser, run by the kernel on packets made here (`BPF_PROG_TEST_RUN`).

use std::{fs, path::PathBuf};

use aya::{Ebpf, EbpfLoader, TestRun as _, TestRunOptions, maps::PerCpuArray, programs::CgroupSkb};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use warren_agent::probes::OBJECT;
use warren_agent_ebpf::abi::{Config, counter};

const PASS: u32 = 1;

struct Programs(Ebpf);

/// What a packet is, its bytes, and what it is to be counted as.
type Case<'a> = (&'a str, Vec<u8>, &'a [(&'static str, u64)]);

/// Counters that changed, with by how much.
type Changes = Vec<(&'static str, u64)>;

impl Programs {
    fn load() -> Self {
        assert!(!OBJECT.is_empty(), "the kernel programs are not built: run `cargo xtask build-ebpf`");
        let config = Config { dns_ports: [53u16.to_be(), 0, 0, 0], ..Config::default() };
        let mut loader = EbpfLoader::new();
        loader.override_global("CONFIG", &config, true);
        let mut ebpf = loader.load(OBJECT).expect("the object loads");
        for name in ["dns_egress", "dns_ingress"] {
            let program: &mut CgroupSkb = ebpf.program_mut(name).expect("there").try_into().expect("its kind");
            program.load().expect("the verifier accepts it");
        }
        Self(ebpf)
    }

    fn counters(&self) -> Vec<u64> {
        let map = self.0.map("COUNTERS").expect("there");
        let counters: PerCpuArray<_, u64> = map.try_into().expect("its kind");
        (0..counter::COUNT).map(|index| counters.get(&index, 0).expect("readable").iter().sum()).collect()
    }

    /// Runs a program on a packet, `repeat` times from one socket; it must pass, and this is what it counted.
    fn run(&self, program: &str, packet: &[u8], repeat: u32) -> Changes {
        let before = self.counters();
        let loaded: &CgroupSkb = self.0.program(program).expect("there").try_into().expect("its kind");
        let options = TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::default() };
        assert_eq!(loaded.test_run(options).expect("it runs").return_value, PASS);
        let after = self.counters();
        let changes = counter::NAMES.iter().zip(before.iter().zip(&after));
        changes.filter(|(_, (before, after))| before != after).map(|(name, (b, a))| (*name, a - b)).collect()
    }
}

fn name(labels: &[&[u8]]) -> Vec<u8> {
    let mut name = Vec::new();
    for label in labels {
        name.push(label.len() as u8);
        name.extend(*label);
    }
    name.push(0);
    name
}

fn message(flags: u16, questions: u16, name: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    for word in [7, flags, questions, 0, 0, 0] {
        message.extend(u16::to_be_bytes(word));
    }
    message.extend(name);
    message.extend([0, 1, 0, 1]);
    message
}

fn query() -> Vec<u8> {
    message(0x0100, 1, &name(&[b"www", b"example", b"test"]))
}

fn udp(source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let mut segment = Vec::new();
    for word in [source, destination, 8 + payload.len() as u16, 0] {
        segment.extend(word.to_be_bytes());
    }
    segment.extend(payload);
    segment
}

fn tcp(option_words: u8, payload: &[u8]) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(4000u16.to_be_bytes());
    segment.extend(53u16.to_be_bytes());
    segment.extend([0; 8]);
    segment.extend([(5 + option_words) << 4, 0x18]);
    segment.extend([0; 6]);
    segment.extend(vec![1; usize::from(option_words) * 4]);
    segment.extend(payload);
    segment
}

fn framed(message: &[u8]) -> Vec<u8> {
    let mut framed = (message.len() as u16).to_be_bytes().to_vec();
    framed.extend(message);
    framed
}

/// An Ethernet frame, as test runs want it, with an IPv4 packet.
fn ipv4(protocol: u8, option_words: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([8, 0]);
    let len = 20 + usize::from(option_words) * 4 + payload.len();
    frame.extend([0x40 | (5 + option_words), 0]);
    frame.extend((len as u16).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(fragment.to_be_bytes());
    frame.extend([64, protocol, 0, 0, 127, 0, 0, 1, 127, 0, 0, 1]);
    frame.extend(vec![1; usize::from(option_words) * 4]);
    frame.extend(payload);
    frame
}

fn ipv6(next_header: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend((payload.len() as u16).to_be_bytes());
    frame.extend([next_header, 64]);
    frame.extend([0; 32]);
    frame.extend(payload);
    frame
}

const UDP: u8 = 17;
const TCP: u8 = 6;

#[test]
fn each_shape_of_packet_is_counted_as_what_it_is() {
    let programs = Programs::load();
    let plain = query();
    let asked = [("DNS_QUERIES", 1)];
    let malformed = [("DNS_MALFORMED", 1)];

    let longest: Vec<&[u8]> = vec![&[b'a'; 63], &[b'b'; 63], &[b'c'; 63], &[b'd'; 61]];
    let deepest: Vec<&[u8]> = vec![b"x"; 127];
    let mut extended = vec![60, 0, 1, 4, 0, 0, 0, 0, UDP, 0, 1, 4, 0, 0, 0, 0];
    extended.extend(udp(4000, 53, &plain));
    let egress: [Case<'_>; 21] = [
        ("UDP over IPv4", ipv4(UDP, 0, 0, &udp(4000, 53, &plain)), &asked),
        ("IPv4 with options", ipv4(UDP, 3, 0, &udp(4000, 53, &plain)), &asked),
        ("UDP over IPv6", ipv6(UDP, &udp(4000, 53, &plain)), &asked),
        ("IPv6 with extension headers", ipv6(0, &extended), &asked),
        ("TCP with options", ipv4(TCP, 0, 0, &tcp(3, &framed(&plain))), &asked),
        ("a bare acknowledgement", ipv4(TCP, 0, 0, &tcp(0, &[])), &[]),
        ("a length alone", ipv4(TCP, 0, 0, &tcp(0, &framed(&plain)[..2])), &[]),
        ("half a length", ipv4(TCP, 0, 0, &tcp(0, &framed(&plain)[1..])), &[("DNS_TCP_PARTIAL", 1)]),
        ("the root's name", ipv4(UDP, 0, 0, &udp(4000, 53, &message(0, 1, &[0]))), &asked),
        ("the longest name", ipv4(UDP, 0, 0, &udp(4000, 53, &message(0, 1, &name(&longest)))), &asked),
        ("the most labels", ipv4(UDP, 0, 0, &udp(4000, 53, &message(0, 1, &name(&deepest)))), &asked),
        ("two questions", ipv4(UDP, 0, 0, &udp(4000, 53, &message(0x0100, 2, &[0]))), &malformed),
        ("an update", ipv4(UDP, 0, 0, &udp(4000, 53, &message(0x2800, 1, &[0]))), &malformed),
        ("a compressed name", ipv4(UDP, 0, 0, &udp(4000, 53, &message(0x0100, 1, &[0xc0, 12]))), &malformed),
        ("half a header", ipv4(UDP, 0, 0, &udp(4000, 53, &plain[..10])), &malformed),
        ("no question", ipv4(UDP, 0, 0, &udp(4000, 53, &plain[..16])), &malformed),
        ("a cut name", ipv4(UDP, 0, 0, &udp(4000, 53, &message(0x0100, 1, &[63, b'a', b'b']))), &malformed),
        ("another port", ipv4(UDP, 0, 0, &udp(4000, 5353, &plain)), &[]),
        ("a server's answer", ipv4(UDP, 0, 0, &udp(53, 4000, &plain)), &[]),
        ("a later fragment", ipv4(UDP, 0, 5, &udp(4000, 53, &plain)), &[]),
        ("another protocol", ipv4(1, 0, 0, &udp(4000, 53, &plain)), &[]),
    ];
    for (what, packet, expected) in egress {
        assert_eq!(programs.run("dns_egress", &packet, 1), expected, "{what}");
    }

    let answer = message(0x8180, 1, &name(&[b"www"]));
    let ingress: [Case<'_>; 3] = [
        ("an answer to nobody", ipv4(UDP, 0, 0, &udp(53, 4000, &answer)), &[("DNS_UNMATCHED", 1)]),
        ("a query to a server", ipv4(UDP, 0, 0, &udp(4000, 53, &plain)), &[]),
        ("a query as an answer", ipv4(UDP, 0, 0, &udp(53, 4000, &plain)), &malformed),
    ];
    for (what, packet, expected) in ingress {
        assert_eq!(programs.run("dns_ingress", &packet, 1), expected, "{what}");
    }
}

#[test]
fn a_query_sent_again_is_one_query() {
    let programs = Programs::load();
    // Each test run has a socket of its own; repetitions share it.
    let changes = programs.run("dns_egress", &ipv4(UDP, 0, 0, &udp(4000, 53, &query())), 3);
    assert_eq!(changes, [("DNS_QUERIES", 3), ("DNS_RETRANSMITS", 2)]);
}

#[test]
fn random_packets_pass_and_lose_nothing() {
    let programs = Programs::load();
    let seed = rand::random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let shapes = [
        ipv4(UDP, 0, 0, &udp(4000, 53, &query())),
        ipv4(UDP, 0, 0, &udp(53, 4000, &query())),
        ipv4(TCP, 0, 0, &tcp(2, &framed(&query()))),
        ipv6(UDP, &udp(4000, 53, &query())),
        ipv6(44, &udp(4000, 53, &query())),
    ];
    // An Ethernet and an IP header are the least that a test run takes.
    let least = |packet: &[u8]| if packet[12] == 8 { 34 } else { 54 };
    let before: u64 = programs.counters().iter().sum();
    for i in 0..20_000 {
        let mut packet = shapes[i % shapes.len()].clone();
        for _ in 0..random.random_range(0..12) {
            let at = random.random_range(14..packet.len());
            packet[at] = random.random();
        }
        if random.random_bool(0.3) {
            let len = random.random_range(least(&packet)..=packet.len());
            packet.truncate(len);
        }
        for program in ["dns_egress", "dns_ingress"] {
            let loaded: &CgroupSkb = programs.0.program(program).expect("there").try_into().expect("its kind");
            let options = TestRunOptions { data_in: Some(&packet), ..TestRunOptions::default() };
            let result = loaded.test_run(options).unwrap_or_else(|error| panic!("{error}: {packet:02x?}"));
            assert_eq!(result.return_value, PASS, "{packet:02x?}");
        }
    }
    let counters = programs.counters();
    assert!(counters.iter().sum::<u64>() > before, "some of them are DNS");
    for lost in [counter::DNS_PENDING_FULL, counter::DNS_NESTED, counter::DNS_HISTOGRAM_FULL, counter::DNS_MATCHED] {
        assert_eq!(counters[lost as usize], 0, "{}", counter::NAMES[lost as usize]);
    }
}

#[test]
fn the_embedded_object_is_the_one_that_was_built() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/ebpf/warren-probes.o");
    assert!(fs::read(path).is_ok_and(|built| built == OBJECT));
}
