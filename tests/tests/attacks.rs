//! What somebody who is not to be trusted gains: nothing. Each of these was tried on a running system first.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::Path,
    process::Command,
    time::Duration,
};

use warren_tests::{
    WELL_BEHAVED, World,
    cluster::{self, Manager},
    until,
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
