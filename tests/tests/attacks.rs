//! What somebody who is not to be trusted gains: nothing. Each of these was tried on a running system first.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use warren_tests::{
    Harm, Hostile, WELL_BEHAVED, World,
    cluster::{self, Manager},
    run, until, zeros,
};

/// Connections that say nothing.
fn silent(address: SocketAddr, count: usize) -> Vec<TcpStream> {
    let connect = |_| TcpStream::connect_timeout(&address, Duration::from_secs(5)).expect("connected");
    (0..count).map(connect).collect()
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// How many files a process has open.
fn open_files(process: u32) -> usize {
    fs::read_dir(format!("/proc/{process}/fd")).expect("it runs").count()
}

#[test]
fn who_only_connects_keeps_nobody_out() {
    raise_open_files();
    let world = World::with_warren("idle");
    let api = local(world.api_port);
    let processes = || [&world.manager, &world.agent].map(|process| process.as_ref().expect("it runs").id());
    let before = processes().map(open_files);
    let mut idle = silent(local(world.manager_port), 2000);
    idle.extend(silent(local(world.agent_port), 2000));
    idle.extend(silent(api, 2000));
    // Everybody is served all the same, and there are files left for the work.
    world.create("web", 2, &["--wait"], WELL_BEHAVED);
    assert!(world.manager_metrics().sum("warren_nodes_total", &["status=\"ready\""]) >= 1.0);
    assert!(world.agent_metrics().sum("warren_probe_up", &[]) >= 1.0);
    until("most are shown out", || {
        let now = processes().map(open_files);
        let more = now.iter().zip(before).map(|(now, before)| now.saturating_sub(before)).max();
        more.filter(|more| *more < 400)
    });
    let invited = world.warren(&["operator", "create", "ada"]).succeeded();
    let words: Vec<_> = invited.split_whitespace().collect();
    let home = world.path("ada");
    let ada = |arguments: &[&str]| {
        let mut command = World::binary("warren");
        command.arg("--identity").arg(&home).env_remove("WARREN_MANAGER").env_remove("WARREN_JOIN_TOKEN");
        World::run(command.args(arguments))
    };
    let _ = ada(&words[1..]).succeeded();
    assert!(ada(&["service", "ls"]).succeeded().contains("web"));
    drop(idle);
}

/// As many as this process may have.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).expect("it may");
}

/// Calls a method with gRPC's own client: the status's name, and its message.
const CALL: &str = r#"
import grpc, re, sys
address, identity, method, message, who = sys.argv[1:]
key, own, *authorities = re.findall("-----BEGIN.*?END [A-Z ]*-----\n", open(identity).read(), re.S)
certificate = dict(private_key=key.encode(), certificate_chain=own.encode()) if who == "ada" else {}
credentials = grpc.ssl_channel_credentials(root_certificates="".join(authorities).encode(), **certificate)
channel = grpc.secure_channel(address, credentials, [("grpc.ssl_target_name_override", "warren-manager")])
call = channel.unary_unary(method, lambda given: given, lambda got: got)
try:
    call(bytes.fromhex(message), timeout=10)
    print("OK")
except grpc.RpcError as error:
    print(error.code().name, error.details())
"#;

#[test]
fn what_is_refused_is_understood_by_other_clients() {
    let world = World::empty("grpcio");
    let mut managers = vec![Manager::new(&world, "m1")];
    let _ = cluster::found(&mut managers);
    let invited = managers[0].warren(&["operator", "create", "ada"]).succeeded();
    let words: Vec<_> = invited.split_whitespace().collect();
    let home = world.path("ada");
    let mut login = World::binary("warren");
    login.arg("--identity").arg(&home).env_remove("WARREN_MANAGER").env_remove("WARREN_JOIN_TOKEN");
    let _ = World::run(login.args(&words[1..])).succeeded();
    let identity = fs::read_dir(&home).expect("there").flatten().map(|entry| entry.path().join("identity.pem"));
    let identity = identity.chain([home.join("identity.pem")]).find(|path| path.exists()).expect("an identity");
    let call = |who: &str, method: &str, message: &str| {
        let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/grpcio");
        let mut python = Command::new("python3");
        python.env("PYTHONPATH", tools).args(["-c", CALL, &managers[0].address()]).arg(&identity);
        World::run(python.args([method, message, who])).succeeded().trim().to_owned()
    };
    assert_eq!(call("ada", "/warren.v1.Services/ListServices", ""), "OK");
    // GetServiceRequest { service: "nobody" }
    let refused = call("ada", "/warren.v1.Services/GetService", "0a066e6f626f6479");
    assert_eq!(refused, "NOT_FOUND there is no service \"nobody\"");
    let refused = call("ada", "/warren.v1.Raft/Exchange", "");
    assert_eq!(refused, "PERMISSION_DENIED the role admin may not call this");
    let refused = call("nobody", "/warren.v1.Services/ListServices", "");
    assert_eq!(refused, "UNAUTHENTICATED this needs a certificate of the cluster");
    let refused = call("nobody", "/warren.v1.Cluster/JoinCluster", "");
    assert!(refused.starts_with("INVALID_ARGUMENT ") || refused.starts_with("PERMISSION_DENIED "), "{refused}");
}

/// Memory that a process has at the most so far, in bytes.
fn peak_memory(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Why a service's only container was not run.
fn refusal(world: &World, service: &str) -> String {
    until(&format!("{service} is refused"), || {
        let containers = world.containers(service);
        let status = &containers.first()?["status"];
        let ended = ["CONTAINER_STATE_REJECTED", "CONTAINER_STATE_FAILED"].map(Value::from).contains(&status["state"]);
        ended.then(|| status["message"].as_str().unwrap_or_default().to_owned())
    })
}

#[test]
fn a_registry_gains_nothing_by_what_it_answers() {
    let mut world = World::empty("registry").and_containerd();
    // Not this machine's loopback, whose registries may lead there.
    let _ = run("ip", &["addr", "add", "192.0.2.1/32", "dev", "lo"]).succeeded();
    let (registry, secret) = (Hostile::start("192.0.2.1"), Hostile::start("127.0.0.1"));
    let trusting = |mut command: Command| {
        command.args(["--registry-plain", &registry.host]);
        command
    };
    let manager = trusting(world.manager_command());
    world.start_manager_as(manager);
    world.start_agent(&["--registry-plain", &registry.host, "--max-image-gb", "0.3"]);
    world.wait_ready();
    let processes = || [&world.manager, &world.agent].map(|process| process.as_ref().expect("it runs").id());
    let before = processes().map(peak_memory);
    let create = |name: &str, image: &str| {
        world.warren(&["service", "create", name, "--image", image, "--restart", "never", "--", "true"])
    };

    registry.say("/v2/endless/manifests/latest", Harm::Endless(b"{\"schemaVersion\": 2, ".to_vec()));
    let began = Instant::now();
    let endless = create("endless", &format!("{}/endless", registry.host));
    let said = if endless.code == 0 { refusal(&world, "endless") } else { endless.stderr };
    assert!(said.contains("its manifest is larger than 4194304 bytes"), "{said}");
    assert!(registry.sent() < 64 << 20 && began.elapsed() < Duration::from_secs(20), "{} bytes", registry.sent());

    let long = format!("{{\"schemaVersion\": 2, \"manifests\": \"{}\"}}", "x".repeat(3 << 20));
    registry.say("/v2/verbose/manifests/latest", Harm::Bytes("application/json", long.into_bytes()));
    let verbose = create("verbose", &format!("{}/verbose", registry.host));
    let said = if verbose.code == 0 { refusal(&world, "verbose") } else { verbose.stderr };
    assert!(said.contains("cannot be") && said.len() < 1500, "{} bytes: {said:.200}", said.len());

    let config = format!("{:01$}", 0, 5 << 20);
    let image = registry.image("large", json!({ "architecture": "amd64", "os": "linux", "author": config }), &[]);
    let _ = create("large", &image).succeeded();
    let said = refusal(&world, "large");
    assert!(said.contains("its configuration is larger than 4194304 bytes"), "{said}");

    for (name, harm) in [
        ("realm", Harm::Realm(format!("http://{}/token", secret.host))),
        ("metadata", Harm::Realm("http://169.254.169.254/latest".to_owned())),
        ("elsewhere", Harm::Elsewhere(format!("http://{}/secret", secret.host))),
    ] {
        registry.say(format!("/v2/{name}/manifests/latest"), harm);
        let asked = create(name, &format!("{}/{name}", registry.host));
        let said = if asked.code == 0 { refusal(&world, name) } else { asked.stderr };
        assert!(said.contains("which is not followed: that is this machine, or its own link"), "{said}");
    }
    assert_eq!(secret.asked(), Vec::<String>::new(), "nobody is led there");

    // A thousand variables were no matter, 150,000 were minutes of a core.
    let env: Vec<_> = (0..100_000).map(|number| format!("VARIABLE_{number}=x")).collect();
    let image = registry.image("env", json!({ "os": "linux", "config": { "Env": env } }), &[]);
    let began = Instant::now();
    let _ = create("env", &image).succeeded();
    let _ = refusal(&world, "env");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());

    // Zeros without end: a gigabyte comes in a megabyte.
    let image = registry.image("bomb", json!({ "os": "linux" }), &[zeros(32)]);
    let _ = create("bomb", &image).succeeded();
    let said = refusal(&world, "bomb");
    assert!(said.contains("it takes more than 0.3 GB (the agent's --max-image-gb)"), "{said}");

    let after = processes().map(peak_memory);
    for (before, after) in before.iter().zip(after) {
        assert!(after - before < 200 << 20, "{before} bytes before, {after} at the most since");
    }
}

#[test]
fn what_nobody_wants_any_more_is_not_unpacked_any_further() {
    let mut world = World::empty("unwanted").and_containerd();
    let registry = Hostile::start("127.0.0.1");
    world.start_manager();
    world.start_agent(&[]);
    world.wait_ready();
    let image = registry.image("bomb", json!({ "os": "linux" }), &[zeros(320)]);
    let _ = world.warren(&["service", "create", "bomb", "--image", &image, "--restart", "never", "--", "true"]).succeeded();
    let snapshots = || world.ctr(&["snapshots", "ls"]).succeeded();
    until("it is being unpacked", || snapshots().contains("extract-").then_some(()));
    let _ = world.warren(&["service", "rm", "bomb", "--wait"]).succeeded();
    let written = || {
        let usage = world.ctr(&["snapshots", "usage"]);
        usage.stdout.lines().filter(|line| line.contains("extract-")).map(str::to_owned).collect::<Vec<_>>()
    };
    let at_the_end = written();
    std::thread::sleep(Duration::from_secs(2));
    let later = written();
    assert!(later.is_empty() || later == at_the_end, "{at_the_end:?}, and two seconds later {later:?}");
}
