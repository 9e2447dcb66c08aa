//! What somebody who is not to be trusted gains: nothing. Each of these was tried on a running system first.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use warren_tests::{
    Harm, Hostile, Inside, Process, WELL_BEHAVED, World,
    cluster::{self, Manager},
    image_name, run, until, zeros,
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
    call(bytes(int(message[1:])) if message.startswith("*") else bytes.fromhex(message), timeout=10)
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
    // So many zeros: refused by its length, before anybody looks at it.
    let refused = call("nobody", "/warren.v1.Cluster/JoinCluster", "*100000");
    assert!(refused.starts_with("OUT_OF_RANGE "), "{refused}");
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
    registry.say("/v2/verbose/manifests/", Harm::Bytes("application/json", long.into_bytes()));
    let verbose = create("verbose", &format!("{}/verbose", registry.host));
    let said = if verbose.code == 0 { refusal(&world, "verbose") } else { verbose.stderr };
    assert!(said.contains("cannot be") && said.len() < 1500, "{} bytes: {said:.200}", said.len());

    let config = "x".repeat(5 << 20);
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
    let _ =
        world.warren(&["service", "create", "bomb", "--image", &image, "--restart", "never", "--", "true"]).succeeded();
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

/// A world's command without what tests' containers usually may have.
fn closed(command: &Command) -> Command {
    let allowed =
        ["--allow-host-network", "--allow-host-path", "/", "--allow-capability", "ALL", "--allow-device", "/dev"];
    let mut closed = Command::new(command.get_program());
    closed.args(command.get_args().filter(|argument| !allowed.iter().any(|one| argument == one)));
    for (name, value) in command.get_envs().filter_map(|(name, value)| Some((name, value?))) {
        closed.env(name, value);
    }
    closed
}

#[test]
fn containers_are_no_more_than_containers_unless_that_is_allowed() {
    let mut world = World::with_containerd("policy");
    let manager = closed(&world.manager_command());
    world.start_manager_as(manager);
    let mut agent = closed(&world.agent_command());
    world.agent = Some(Process::start("agent", &mut agent, world.directory.path()));
    world.wait_ready();
    let more: [(&[&str], &str, &str); 7] = [
        (&["--privileged"], "spec.container.privileged", "privileged"),
        (&["--network", "host"], "spec.container.network", "host-network"),
        (&["--cap-add", "ALL"], "spec.container.capabilities_add", "capability ALL"),
        (&["--cap-add", "CAP_SYS_ADMIN"], "spec.container.capabilities_add", "capability SYS_ADMIN"),
        (&["--device", "/dev/fuse"], "spec.container.devices[0].source", "device /dev/fuse"),
        (&["--mount", "type=bind,source=/,target=/host"], "spec.container.mounts[0].source", "host-path /"),
        (
            &["--mount", "type=bind,source=/run/containerd,target=/x,readonly"],
            "spec.container.mounts[0].source",
            "host-path /run/containerd",
        ),
    ];
    let create = |world: &World, name: &str, options: &[&str]| {
        let arguments = ["service", "create", name, "--image", image_name(), "--restart", "never"];
        world.warren(&[&arguments[..], options, &["--", "true"]].concat())
    };
    for (options, field, option) in more {
        let refused = create(&world, "more", options).failed(2);
        let why = format!("{field}: is not allowed: --allow-{option} of managers and agents would allow it");
        assert!(refused.contains(&why), "{options:?}: {refused}");
    }
    let volume = ["volume", "create", "etc", "--opt", "type=bind", "--opt", "device=/etc"];
    let refused = world.warren(&volume).failed(2);
    assert!(refused.contains("driver_options.device: is not allowed: --allow-host-path /etc"), "{refused}");
    assert_eq!(create(&world, "plain", &["--cap-add", "CHOWN", "--wait"]).code, 0, "it is as it was");

    // A manager that allows it does not decide for the node.
    world.manager.take().expect("it runs").kill();
    let mut manager = world.manager_command();
    manager.arg("--allow-privileged");
    world.start_manager_as(manager);
    for (number, (options, _, option)) in more.iter().enumerate() {
        let name = format!("more-{number}");
        let _ = create(&world, &name, options).succeeded();
        let said = refusal(&world, &name);
        assert!(said.contains(&format!("is not allowed: --allow-{option} of managers and agents")), "{name}: {said}");
    }
    let _ = world.warren(&volume).succeeded();
    let _ = create(&world, "volume", &["--mount", "type=volume,source=etc,target=/x"]).succeeded();
    let said = refusal(&world, "volume");
    assert!(said.contains("/etc of this node is not allowed: --allow-host-path /etc"), "{said}");

    // What is allowed by name is, and no more.
    let shared = world.path("shared");
    fs::create_dir(&shared).expect("writable");
    std::os::unix::fs::symlink("/etc", shared.join("link")).expect("writable");
    let _ = world.agent.take().expect("it runs").terminate();
    let mut agent = closed(&world.agent_command());
    agent.arg("--allow-host-path").arg(&shared);
    world.agent = Some(Process::start("agent", &mut agent, world.directory.path()));
    world.wait_ready();
    let bind = |path: &Path| format!("type=bind,source={},target=/x", path.display());
    assert_eq!(create(&world, "shared", &["--mount", &bind(&shared), "--wait"]).code, 0);
    let _ = create(&world, "link", &["--mount", &bind(&shared.join("link"))]).succeeded();
    let said = refusal(&world, "link");
    assert!(said.contains("/etc of this node is not allowed"), "{said}");
}

#[test]
fn a_container_has_bounds_that_nobody_asked_for() {
    let mut world = World::with_containerd("bounds");
    world.start_manager();
    world.start_agent(&["--limit-pids", "50"]);
    world.wait_ready();
    let sealed = world.path("sealed");
    fs::write(&sealed, "value").expect("writable");
    let _ = world.warren(&["secret", "create", "key", &sealed.display().to_string()]).succeeded();
    let inside = Inside::of(&world, "bounds", &["--secret", "key"]);
    // A fork bomb ends at the limit; the node, and its neighbours, do not.
    let (_, said) =
        inside.shell(&world, "i=0; while [ $i -lt 100 ]; do sleep 5 & i=$((i+1)); done 2>&1; echo; jobs -p | wc -l");
    assert!(said.contains("can't fork"), "{said}");
    let plain = Inside::of(&world, "other", &["--limit-pids", "200"]);
    let (_, said) = plain.shell(&world, "i=0; while [ $i -lt 100 ]; do sleep 5 & i=$((i+1)); done 2>&1; echo done");
    assert_eq!(said.trim(), "done", "what its service says counts more");
    let all = world.cgroups().into_iter().find_map(|parent| fs::read_to_string(parent.join("pids.max")).ok());
    let all = all.expect("a limit");
    let all: u64 = all.trim().parse().unwrap_or_else(|_| panic!("{all:?} is no number"));
    assert!((1000..4 << 20).contains(&all), "{all}");
    let mount = inside.mount("/run/secrets");
    assert!(["ro", "nosuid", "nodev", "noexec"].iter().all(|flag| mount.contains(flag)), "{mount}");
    let limits = inside.proc("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("a line");
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{core}");
    for masked in ["/proc/interrupts", "/proc/kcore", "/proc/keys"] {
        let (_, said) = plain.shell(&world, &format!("head -c 100 {masked} 2>/dev/null | wc -c"));
        assert_eq!(said.trim().lines().last(), Some("0"), "{masked}: {said}");
    }
}

#[test]
fn metrics_are_shown_to_whom_they_are_for() {
    let mut world = World::with_containerd("metrics");
    world.start_manager();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    let directory = world.path("access");
    fs::create_dir(&directory).expect("writable");
    let write = |name: &str, text: &str| {
        fs::write(directory.join(name), text).expect("writable");
        directory.join(name).display().to_string()
    };
    let (certificate, key) = (write("cert.pem", &made.cert.pem()), write("key.pem", &made.signing_key.serialize_pem()));
    let token = write("token", "open sesame\n");
    let mut agent = world.agent_command();
    agent.args(["--metrics-tls-cert", &certificate, "--metrics-tls-key", &key, "--metrics-token-file", &token]);
    let missing = {
        let mut wrong = world.agent_command();
        wrong.args(["--metrics-token-file", "/none/such"]);
        World::run(&mut wrong)
    };
    assert!(missing.failed(2).contains("/none/such of the metrics endpoint: No such file"));
    world.agent = Some(Process::start("agent", &mut agent, world.directory.path()));
    let asked = |path: &str, more: &[&str]| {
        let url = format!("https://localhost:{}/{path}", world.agent_port);
        let resolve = format!("localhost:{}:127.0.0.1", world.agent_port);
        let arguments =
            ["-s", "-o", "/dev/null", "-w", "%{http_code}", "--resolve", &resolve, "--cacert", &certificate];
        run("curl", &[&arguments[..], more, &[&url]].concat()).stdout
    };
    until("it serves", || (asked("live", &[]) == "200").then_some(()));
    assert_eq!(asked("metrics", &[]), "401");
    assert_eq!(asked("metrics", &["-H", "Authorization: Bearer open"]), "401");
    assert_eq!(asked("metrics", &["-H", "Authorization: Bearer open sesame"]), "200");
    let plain = format!("http://127.0.0.1:{}/metrics", world.agent_port);
    assert_ne!(run("curl", &["-s", &plain]).code, 0, "nothing without TLS");
    // Another token, and another certificate, are used as soon as they are there.
    let _ = write("token", "another");
    assert_eq!(asked("metrics", &["-H", "Authorization: Bearer open sesame"]), "401");
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    let _ = (write("key.pem", &made.signing_key.serialize_pem()), write("cert.pem", &made.cert.pem()));
    until("it has the new certificate", || (asked("live", &[]) == "200").then_some(()));
    assert_eq!(asked("metrics", &["-H", "Authorization: Bearer another"]), "200");
}

#[test]
fn connections_to_the_resolver_are_a_containers_own_matter() {
    let world = World::with_warren("resolver");
    let (greedy, other) = (Inside::of(&world, "greedy", &[]), Inside::of(&world, "other", &[]));
    let agent = world.agent.as_ref().expect("it runs").id();
    let before = open_files(agent);
    let connect = "import resource, socket, time\n\
        resource.setrlimit(resource.RLIMIT_NOFILE, (4000, 4000))\n\
        all = [socket.create_connection(('169.254.1.1', 53)) for _ in range(2000)]\n\
        print('connected', flush=True)\n\
        time.sleep(4)";
    let mut nsenter = Command::new("nsenter");
    nsenter.args(["--target", &greedy.pid.to_string(), "--net", "python3", "-c", connect]);
    let mut process = nsenter.stdout(std::process::Stdio::piped()).spawn().expect("nsenter");
    let mut said = [0; 9];
    std::io::Read::read_exact(process.stdout.as_mut().expect("a pipe"), &mut said).expect("it connects");
    until("most are shown out", || (open_files(agent) < before + 100).then_some(()));
    let (code, answer) = other.shell(&world, "nslookup other 169.254.1.1");
    let _ = (process.kill(), process.wait());
    assert_eq!(code, 0, "{answer}");
}

/// Sends frames that ask for an answer, for as long as it is let, and says how many bytes that were.
const FLOOD: &str = r#"
import socket, ssl, sys, threading
context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.set_alpn_protocols(["h2"])
stream = context.wrap_socket(socket.create_connection(("127.0.0.1", int(sys.argv[1]))))
stream.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
def drain():
    try:
        while stream.recv(65536): pass
    except OSError: pass
threading.Thread(target=drain, daemon=True).start()
ping, sent = bytes([0, 0, 8, 6, 0, 0, 0, 0, 0]) + b"warren??", 0
try:
    while sent < 50_000_000:
        stream.sendall(ping * 100)
        sent += 1700
except OSError: pass
print(sent)
"#;

#[test]
fn a_flood_of_frames_ends_with_its_connection() {
    let mut world = World::empty("flood");
    world.start_manager();
    let port = world.api_port.to_string();
    let sent: u64 = run("python3", &["-c", FLOOD, &port]).succeeded().trim().parse().expect("a number");
    // What was under way in buffers comes besides.
    assert!(sent < 20_000_000, "{sent}");
    // Nor does it help to come again: there is so much in all, and little more with time. Buffers take some of each before it ends.
    let again = std::iter::repeat_with(|| run("python3", &["-c", FLOOD, &port]).succeeded());
    let again: u64 = again.take(5).map(|sent| sent.trim().parse::<u64>().expect("a number")).max().expect("some");
    assert!(again < 20_000_000, "{again}");
    let taken =
        || fs::read_to_string(format!("/proc/{}/io", world.manager.as_ref().expect("it runs").id())).expect("it runs");
    let read =
        |io: String| io.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse::<u64>().ok()).expect("a number");
    let before = read(taken());
    let _ = run("python3", &["-c", FLOOD, &port]).succeeded();
    let more = read(taken()) - before;
    assert!(more < 200_000, "{more} bytes were read of one that comes again");
    assert_eq!(world.warren(&["service", "ls"]).code, 0);
}

/// A cgroup in which nothing runs for as long as this is there.
struct Frozen(PathBuf);

impl Frozen {
    fn new(cgroup: PathBuf) -> Self {
        let frozen = Self(cgroup);
        frozen.set(true);
        frozen
    }

    fn set(&self, on: bool) {
        let (v1, v2) = if on { ("FROZEN", "1") } else { ("THAWED", "0") };
        let (file, state) =
            if self.0.join("freezer.state").exists() { ("freezer.state", v1) } else { ("cgroup.freeze", v2) };
        fs::write(self.0.join(file), state).expect("it may");
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.set(false);
    }
}

#[test]
fn a_runtime_that_hangs_fails_the_container_and_no_other() {
    let mut world = World::with_containerd("hung");
    world.start_manager();
    world.start_agent(&["--runtime-timeout-s", "2"]);
    world.wait_ready();
    // Whatever joins a frozen cgroup waits: the runtime waits for it.
    let frozen = until("a freezer", || {
        let _ = Inside::of(&world, "before", &[]);
        let freezer = |path: &PathBuf| path.join("freezer.state").exists() || path.join("cgroup.freeze").exists();
        world
            .cgroups()
            .into_iter()
            .find(|path| path.ends_with(world.cgroup_parent().trim_start_matches('/')) && freezer(path))
    });
    let frozen = Frozen::new(frozen);
    let _ = world.warren(&["service", "create", "hung", "--image", image_name(), "--restart", "never", "--", "true"]);
    let said = refusal(&world, "hung");
    drop(frozen);
    assert!(said.contains("the container runtime did not create it in 2 s"), "{said}");
    let _ = world.warren(&["service", "rm", "hung", "--wait"]).succeeded();
    let _ = Inside::of(&world, "after", &[]);
}

/// A process that is stopped, and is killed in the end: what cleans up after a test would wait for it.
struct Hung(Pid);

impl Drop for Hung {
    fn drop(&mut self) {
        // It should be gone.
        let _ = kill_process(self.0, Signal::KILL);
    }
}

#[test]
fn a_shim_that_hangs_keeps_no_container_for_ever() {
    let mut world = World::with_containerd("shim");
    world.start_manager();
    world.start_agent(&["--runtime-timeout-s", "2"]);
    world.wait_ready();
    let inside = Inside::of(&world, "stuck", &["--stop-timeout", "1s"]);
    // The process between containerd and the container.
    let parent: i32 = inside.status("PPid").trim().parse().expect("a process");
    let shim = Hung(Pid::from_raw(parent).expect("a process"));
    kill_process(shim.0, Signal::STOP).expect("it is ours");
    let _ = world.warren(&["service", "rm", "stuck", "--wait"]).succeeded();
    until("its process is gone", || (!Path::new(&format!("/proc/{}", inside.pid)).exists()).then_some(()));
    let _ = Inside::of(&world, "after", &[]);
}
