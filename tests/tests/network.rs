//! Containers' addresses, the ways between them, and what is left of it all.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command, time::Duration};

use warren_tests::{Inside, Output, Outside, Process, World, both_ready, run, start_second, two_nodes, until};

/// A web server that says where it is.
const SERVER: &str =
    "hostname > /tmp/index.html; httpd -p 80 -h /tmp; trap 'exit 0' TERM; while :; do sleep 0.05; done";

/// A service of servers, and its containers.
fn servers(world: &World, name: &str, replicas: u32, options: &[&str]) -> Vec<Inside> {
    world.create(name, replicas, options, SERVER);
    Inside::all(world, name)
}

fn hostname(container: &Inside) -> String {
    container.id[..12].to_owned()
}

/// What a server answers to a container.
fn fetch(world: &World, from: &Inside, url: &str) -> Output {
    let (code, text) = from.shell(world, &format!("timeout 2 wget -q -O - http://{url}/"));
    Output { code, stdout: text.trim().to_owned(), stderr: String::new() }
}

/// What a server answers to this machine.
fn fetch_here(url: &str) -> Output {
    let output = run("busybox", &["timeout", "2", "busybox", "wget", "-q", "-O", "-", &format!("http://{url}/")]);
    Output { stdout: output.stdout.trim().to_owned(), ..output }
}

fn virtual_addresses(world: &World, service: &str) -> Vec<String> {
    let shown = world.warren(&["service", "inspect", service, "--format", "json"]).succeeded();
    let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
    let addresses = shown["virtualAddresses"].as_array().cloned().unwrap_or_default();
    addresses.iter().filter_map(|address| address.as_str().map(str::to_owned)).collect()
}

fn url(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

/// What the node has of containers' network now: links, routes, namespaces, and addresses in the rules.
fn traces(world: &World) -> Vec<String> {
    let lines = |program: &str, arguments: &[&str], word: &str| {
        let listed = run(program, arguments).succeeded();
        listed.lines().filter(|line| line.contains(word)).map(|line| format!("{program}: {line}")).collect::<Vec<_>>()
    };
    let mut traces = lines("ip", &["-o", "link"], "wrn");
    traces.extend(lines("ip", &["route"], "wrn"));
    traces.extend(lines("ip", &["-6", "route"], "wrn"));
    traces.extend(lines("nft", &["list", "table", "inet", "warren"], "dnat ip to"));
    traces.extend(lines("nft", &["list", "table", "inet", "warren"], "elements"));
    for directory in ["netns", "agent/network/files"] {
        let kept = fs::read_dir(world.path(directory)).into_iter().flatten().flatten();
        traces.extend(kept.map(|entry| format!("{}", entry.path().display())));
    }
    traces
}

#[test]
fn a_container_has_addresses_and_leaves_none() {
    let world = World::with_warren("addresses");
    let containers = servers(&world, "web", 2, &[]);
    let (one, two) = (&containers[0], &containers[1]);
    assert_eq!((one.addresses.len(), two.addresses.len()), (2, 2), "one of each family: {containers:?}");
    for address in &two.addresses {
        assert_eq!(fetch(&world, one, &url(address)).succeeded(), hostname(two), "{address} from a container");
        assert_eq!(fetch_here(&url(address)).succeeded(), hostname(two), "{address} from the node");
    }
    let (_, hosts) = one.shell(&world, "cat /etc/hosts /etc/hostname /etc/resolv.conf");
    for expected in [&format!("{}\t{}", one.addresses[0], hostname(one)), "nameserver 169.254.1.1", "search warren"] {
        assert!(hosts.contains(expected), "{expected:?} is not in {hosts}");
    }
    // Everything goes by the node, and nobody asks who has an address.
    assert!(one.enter(&["ip", "route"]).starts_with("default via 169.254.1.1 dev eth0"));
    assert!(one.enter(&["ip", "neighbour"]).contains("PERMANENT"));
    // What it sends under another's address goes nowhere.
    assert_eq!(one.shell(&world, "ip addr add 10.128.0.77/32 dev eth0").0, 2, "it may not");
    let spoofed = one.enter(&["ip", "addr", "add", "10.128.0.77/32", "dev", "eth0"]);
    assert_eq!(spoofed, "");
    let ping = |source: &str| one.enter(&["busybox", "ping", "-c", "1", "-W", "1", "-I", source, &two.addresses[0]]);
    assert!(ping(&one.addresses[0]).contains(" 0% packet loss"), "{}", ping(&one.addresses[0]));
    assert!(ping("10.128.0.77").contains("100% packet loss"));

    let phase = world.agent_metrics();
    let observed = phase.sum("warren_container_phase_duration_seconds_count", &["phase=\"network\""]);
    assert_eq!(observed, 2.0);
    assert!(!traces(&world).is_empty());
    let _ = world.warren(&["service", "rm", "web", "--wait"]).succeeded();
    until("nothing is left of the network", || {
        let traces = traces(&world);
        traces.is_empty().then_some(()).ok_or(traces).ok()
    });
}

#[test]
fn a_virtual_address_leads_to_every_healthy_container() {
    let world = World::with_warren("virtual");
    let containers = servers(&world, "web", 3, &[]);
    servers(&world, "other", 1, &[]);
    let client = &Inside::all(&world, "other")[0];
    let addresses = virtual_addresses(&world, "web");
    assert_eq!(addresses.len(), 2, "{addresses:?}");
    for address in &addresses {
        let mut answered = std::collections::BTreeSet::new();
        until("all three have answered", || {
            let answer = fetch(&world, client, &url(address));
            answered.insert(answer.stdout);
            answered.remove("");
            (answered.len() == 3).then_some(())
        });
        assert_eq!(answered, containers.iter().map(hostname).collect());
        assert_eq!(fetch_here(&url(address)).succeeded().len(), 12, "from the node");
        // A container of the service itself, be it led to itself.
        for _ in 0..6 {
            assert_eq!(fetch(&world, &containers[0], &url(address)).succeeded().len(), 12);
        }
    }
    assert_ne!(addresses, virtual_addresses(&world, "other"));
    // Nobody is behind it any more: refused at once, not after a time-out.
    let _ = world.warren(&["service", "scale", "web", "0", "--wait"]).succeeded();
    let refused = until("the address is refused", || {
        let answer = client.shell(&world, &format!("timeout 5 wget -O - http://{}/", addresses[0]));
        answer.1.contains("refused").then_some(answer)
    });
    assert_ne!(refused.0, 0);
}

/// Runs a command in a container's network, whichever node it is on.
fn fetch_inside(from: &Inside, url: &str) -> String {
    from.enter(&["busybox", "timeout", "2", "busybox", "wget", "-q", "-O", "-", &format!("http://{url}/")])
}

/// Containers of two nodes answer each other, under their own addresses and under their service's.
fn reach_each_other(world: &World, web: &[Inside]) {
    assert_ne!(web[0].node, web[1].node, "one on each");
    let virtuals = virtual_addresses(world, "web");
    for (from, to) in [(&web[0], &web[1]), (&web[1], &web[0])] {
        for address in &to.addresses {
            let answer = until("the other node's container answers", || {
                Some(fetch_inside(from, &url(address))).filter(|answer| !answer.is_empty())
            });
            assert_eq!(answer, hostname(to), "{address}");
        }
        for address in &virtuals {
            let mut answered = std::collections::BTreeSet::new();
            until("both have answered", || {
                answered.insert(fetch_inside(from, &url(address)));
                answered.remove("");
                (answered.len() == 2).then_some(())
            });
        }
    }
}

#[test]
fn containers_of_two_nodes_reach_each_other() {
    let (world, other, second) = two_nodes("overlay", &[]);
    let mut second = Some(second);
    let web = servers(&world, "web", 2, &["--endpoint-mode", "vip"]);
    let single = servers(&world, "single", 1, &["--publish", "8080:80"]);
    reach_each_other(&world, &web);
    // Either node answers for a container that only one of them has, seen from the node itself and from the other one.
    for address in [Outside::HERE, Outside::THERE] {
        let port = format!("{address}:8080");
        until("the port answers", || (fetch_here(&port).stdout == hostname(&single[0])).then_some(()));
        until("the port answers", || (other.fetch(&port) == hostname(&single[0])).then_some(()));
    }
    // It still does while the other node's agent is away, and after it is back.
    second.take().expect("it runs").kill();
    assert_eq!(fetch_inside(&web[0], &web[1].addresses[0]), hostname(&web[1]));
    let second = start_second(&world, &other, &[]);
    both_ready(&world);
    until("the other node's container answers", || {
        (fetch_inside(&web[1], &web[0].addresses[0]) == hostname(&web[0])).then_some(())
    });
    // Somebody who is no member puts nothing into the network.
    let members = run("nft", &["list", "chain", "inet", "warren", "guard"]).succeeded();
    assert!(members.contains("udp dport 4789 @th,96,24 0x5741 ip saddr != { 192.0.2.1, 192.0.2.2 } drop"), "{members}");
    // Nor does a member under others' addresses: two datagrams, of which the container hears one.
    let listen = "import socket\n\
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
        own.bind(('', 7777))\n\
        own.settimeout(3)\n\
        print('listening', flush=True)\n\
        try:\n    while True: print(own.recv(100).decode(), flush=True)\n\
        except TimeoutError: pass";
    let mut nsenter = Command::new("nsenter");
    let is_here = |one: &&Inside| run("ip", &["route", "get", &one.addresses[0]]).succeeded().contains("dev wrn");
    let here = web.iter().find(is_here).expect("one of them is on this node");
    nsenter.args(["--target", &here.pid.to_string(), "--net", "python3", "-c", listen]);
    let mut listening = nsenter.stdout(std::process::Stdio::piped()).spawn().expect("nsenter");
    let mut said = std::io::BufReader::new(listening.stdout.take().expect("a pipe"));
    let mut first = String::new();
    std::io::BufRead::read_line(&mut said, &mut first).expect("it listens");
    let address = here.addresses[0].clone();
    let _ = World::run(other.command("ip").args(["addr", "add", "198.51.100.7/32", "dev", "lo"])).succeeded();
    let send = |source: &str, what: &str| {
        let send = format!(
            "import socket\nown = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nown.bind(('{source}', 0))\n\
             own.sendto(b'{what}', ('{address}', 7777))"
        );
        let _ = World::run(other.command("python3").args(["-c", &send])).succeeded();
    };
    send("198.51.100.7", "forged");
    send("", "own");
    let mut heard = String::new();
    std::io::Read::read_to_string(&mut said, &mut heard).expect("it ends");
    let _ = listening.wait();
    assert_eq!(heard, "own\n");
    // A node that is gone is forgotten.
    let routes = || run("ip", &["route", "show", "dev", "warren-vxlan"]).succeeded();
    assert_eq!(routes().lines().count(), 1, "{}", routes());
    let _ = world.warren(&["service", "rm", "web", "single", "--wait"]).succeeded();
    let _ = second.terminate();
    until("the node is removed", || (world.warren(&["node", "rm", "node-2"]).code == 0).then_some(()));
    until("its route is gone", || routes().is_empty().then_some(()));
    assert_eq!(run("bridge", &["fdb", "show", "dev", "warren-vxlan"]).succeeded(), "");
    assert_eq!(run("ip", &["neighbour", "show", "dev", "warren-vxlan"]).succeeded(), "");
}

/// Packets that came over the wire since this was loaded: encrypted ones, VXLAN's, and containers' own as they are.
const WATCH: &str = "table inet watch {
  chain wire {
    type filter hook prerouting priority -400; policy accept;
    iifname wire udp dport 51820 counter comment \"encrypted\"
    iifname wire udp dport 4789 counter comment \"vxlan\"
    iifname wire ip saddr 10.0.0.0/8 counter comment \"plain\"
    iifname wire ip6 saddr fd00::/8 counter comment \"plain 6\"
  }
}";

fn counted(what: &str) -> u64 {
    let listed = run("nft", &["list", "table", "inet", "watch"]).succeeded();
    let line = listed.lines().find(|line| line.contains(&format!("comment \"{what}\""))).expect("a counter").to_owned();
    let packets = line.split("packets ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok());
    packets.unwrap_or_else(|| panic!("no count: {line}"))
}

#[test]
fn what_goes_between_nodes_may_be_encrypted() {
    let encrypted = ["--overlay", "wireguard"];
    let (world, other, second) = two_nodes("encrypted", &encrypted);
    let rules = world.path("watch.nft");
    fs::write(&rules, WATCH).expect("writable");
    let _ = run("nft", &["-f", &rules.to_string_lossy()]).succeeded();
    let web = servers(&world, "web", 2, &["--endpoint-mode", "vip"]);
    let single = servers(&world, "single", 1, &["--publish", "8080:80"]);
    reach_each_other(&world, &web);
    for address in [Outside::HERE, Outside::THERE] {
        let port = format!("{address}:8080");
        until("the port answers", || (fetch_here(&port).stdout == hostname(&single[0])).then_some(()));
    }
    assert!(counted("encrypted") > 10);
    assert_eq!([counted("vxlan"), counted("plain"), counted("plain 6")], [0, 0, 0]);
    // Nobody but the agent reads the key, and a restart keeps it: the other node knows it still.
    let key = world.path("agent/network/wireguard.key");
    let before = fs::read_to_string(&key).expect("a key");
    assert_eq!(fs::metadata(&key).expect("a file").permissions().mode() & 0o777, 0o600);
    second.kill();
    assert_eq!(fetch_inside(&web[0], &web[1].addresses[0]), hostname(&web[1]), "also while the agent is away");
    let second = start_second(&world, &other, &encrypted);
    both_ready(&world);
    reach_each_other(&world, &web);
    // A link that somebody removes comes again.
    let links = run("ip", &["-o", "link", "show"]).succeeded();
    let link = links.split([' ', ':']).find(|word| word.starts_with("wg-"));
    let link = link.unwrap_or_else(|| panic!("no link: {links}")).to_owned();
    let _ = run("ip", &["link", "delete", &link]).succeeded();
    reach_each_other(&world, &web);
    assert_eq!(fs::read_to_string(&key).expect("a key"), before);
    // A node that does not encrypt is not spoken to in plain words instead.
    let _ = second.terminate();
    let _third = start_second(&world, &other, &[]);
    until("it has another way", || {
        let node = world.warren(&["node", "inspect", "node-2", "--format", "json"]).succeeded();
        (!node.contains("wireguardPublicKey")).then_some(())
    });
    until("there is no way to it", || fetch_inside(&web[0], &web[1].addresses[0]).is_empty().then_some(()));
    assert_eq!([counted("plain"), counted("plain 6")], [0, 0]);
}

#[test]
fn what_leaves_the_cluster_leaves_as_the_node() {
    let world = World::empty("egress");
    let outside = Outside::new(&world);
    drop(run("ip", &["route", "add", "default", "via", Outside::THERE]).succeeded());
    let world = world.and_warren();
    let client = &servers(&world, "web", 1, &[])[0];
    // It tells a caller who the caller is, as it sees it; it has no way back to a container's own address.
    let mut command = outside.command("busybox");
    command.args(["nc", "-ll", "-p", "7000", "-e", "sh", "-c", "echo \"$NCAT_REMOTE_ADDR\"; busybox netstat -tn"]);
    let mut server = command.stdout(std::process::Stdio::null()).spawn().expect("a server");
    let seen = until("the server answers", || {
        let (_, text) = client.shell(&world, &format!("nc -w 2 {} 7000 < /dev/null", Outside::THERE));
        text.contains(":7000").then_some(text)
    });
    let _ = server.kill();
    let _ = server.wait();
    assert!(seen.contains(Outside::HERE), "{seen}");
    assert!(!seen.contains(&client.addresses[0]), "{seen}");
}

#[test]
fn ports_are_published_on_the_node() {
    let world = World::empty("publish");
    let outside = Outside::new(&world);
    let world = world.and_warren();
    let web = servers(&world, "web", 2, &["--publish", "8080:80"]);
    let host = servers(&world, "host", 1, &["--publish", "published=8081,target=80,mode=host"]);
    servers(&world, "quiet", 1, &["--publish", "name=http,target=80"]);
    let refused =
        std::net::TcpStream::connect_timeout(&"[::1]:8080".parse().expect("an address"), Duration::from_secs(5));
    assert_eq!(refused.map_err(|error| error.kind()).err(), Some(std::io::ErrorKind::ConnectionRefused), "at once");
    for address in ["127.0.0.1:8080", "192.0.2.1:8080"] {
        let answer = until("the port answers", || {
            let answer = fetch_here(address);
            (answer.code == 0).then_some(answer.stdout)
        });
        assert!(web.iter().any(|container| hostname(container) == answer), "{address}: {answer}");
    }
    let mut answered = std::collections::BTreeSet::new();
    until("both have answered", || {
        answered.insert(outside.fetch("192.0.2.1:8080"));
        answered.remove("");
        (answered.len() == 2).then_some(())
    });
    assert_eq!(outside.fetch("192.0.2.1:8081"), hostname(&host[0]));
    assert_eq!(outside.fetch("192.0.2.1:80"), "", "it is not published");
    // From a container, by the node's address, also to itself.
    for _ in 0..4 {
        assert_eq!(fetch(&world, &web[0], "192.0.2.1:8080").succeeded().len(), 12);
    }
    // Nobody else may have it, and the second container of a node not the host's.
    let taken = world.warren(&["service", "create", "thief", "--image", "x", "--publish", "8080:80"]).failed(5);
    assert!(taken.contains("spec.ports: port 8080/tcp is published by service \"web\""), "{taken}");
    let _ = world.warren(&["service", "scale", "host", "2"]).succeeded();
    let waiting = until("the second one waits", || {
        let containers = world.containers("host");
        let message = |c: &serde_json::Value| c["status"]["message"].as_str().unwrap_or_default().to_owned();
        containers.iter().map(message).find(|message| message.contains("host port"))
    });
    assert_eq!(waiting, "no suitable node (1 node: 1 a host port is taken)");
    let _ = world.warren(&["service", "rm", "web", "host", "--wait"]).succeeded();
    until("the ports are closed", || (fetch_here("127.0.0.1:8080").code != 0).then_some(()));
    assert_eq!(outside.fetch("192.0.2.1:8081"), "");
}

/// A neighbour may send its packets by way of a node, and under addresses that are not its own.
/// A service that listens on one port, and is published on another, as YAML.
fn listening_on(port: u16) -> String {
    let script = format!("httpd -p {port} -h /etc; trap 'sleep 0.2; exit 0' TERM; while :; do sleep 0.05; done");
    format!(
        "apiVersion: warren.io/v1\nkind: Service\nmetadata: {{name: moving}}\nspec:\n  image: {}\n  replicas: 2\n  \
         command: [sh, -c, \"{script}\"]\n  ports: [\"8090:{port}\"]\n  endpointMode: vip\n  \
         healthCheck: {{type: tcp, endpoint: \"tcp://:{port}\", interval: 200ms}}\n",
        warren_tests::image_name()
    )
}

#[test]
fn an_update_that_moves_a_port_leads_to_each_container_where_it_listens() {
    let world = World::with_warren("moving");
    let file = world.path("moving.yaml");
    let apply = |port| {
        fs::write(&file, listening_on(port)).expect("writable");
        world.warren(&["apply", "-f", &file.display().to_string(), "--wait"]).succeeded()
    };
    let _ = apply(8001);
    let connect = || std::net::TcpStream::connect(("127.0.0.1", 8090)).map(drop);
    until("the port answers", || connect().ok());
    let done = std::sync::atomic::AtomicBool::new(false);
    let (mut answered, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = apply(8002);
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        while !done.load(std::sync::atomic::Ordering::Relaxed) {
            match connect() {
                Ok(()) => answered += 1,
                Err(_) => refused += 1,
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    // Where all were led to the new port at once, the old ones refused for as long as they ran.
    assert!(answered > 100 && refused * 50 < answered, "{refused} refused, {answered} answered");
}

#[test]
fn a_neighbour_reaches_what_is_published_and_nothing_else() {
    let world = World::empty("neighbour");
    let outside = Outside::new(&world);
    let world = world.and_warren();
    let web = servers(&world, "web", 1, &["--publish", "8080:80"]);
    until("the port answers", || (outside.fetch("192.0.2.1:8080") == hostname(&web[0])).then_some(()));
    let own = &web[0].addresses;
    let virtual_ones = virtual_addresses(&world, "web");
    let node = own[0].rsplit_once('.').map(|(subnet, _)| format!("{subnet}.1")).expect("an address");
    let ip = |arguments: &str| drop(run("ip", &arguments.split(' ').collect::<Vec<_>>()).succeeded());
    let there = outside.name();
    for address in own.iter().chain(&virtual_ones).chain([&node]) {
        if address.contains(':') {
            continue;
        }
        ip(&format!("-n {there} route add {address} via {}", Outside::HERE));
        assert_eq!(outside.fetch(address), "", "{address} is not published");
    }
    let listener = std::net::TcpListener::bind((node.as_str(), 8099)).expect("the node's own address among containers");
    let mut connect = outside.command("busybox");
    let reached = connect.args(["timeout", "2", "busybox", "nc", "-w", "1", &node, "8099"]).output().expect("busybox");
    assert!(!reached.status.success(), "{node} is the node's own among its containers");
    drop(listener);
    // What says that it comes from a container comes in by a container's link.
    ip(&format!("-n {there} addr add {}/32 dev lo", own[0]));
    let packets = || web[0].enter(&["cat", "/sys/class/net/eth0/statistics/rx_packets"]);
    let before = packets();
    let mut forged = outside.command("busybox");
    let _ = forged.args(["timeout", "2", "busybox", "ping", "-c", "2", "-W", "1", "-I", &own[0], "192.0.2.1"]).output();
    assert_eq!(packets(), before, "the answer goes to the container");
    assert_eq!(outside.fetch("192.0.2.1:8080"), hostname(&web[0]), "what is published still answers");
}

#[test]
fn containers_reach_what_of_the_cluster_is_open_to_them() {
    let world = World::empty("reach");
    let other = Outside::new(&world);
    let mut world = world.and_containerd();
    let everywhere = |command: &Command| {
        let mut there = Command::new(command.get_program());
        there.args(command.get_args().map(|argument| argument.to_string_lossy().replace("127.0.0.1:", "0.0.0.0:")));
        there
    };
    let mut manager = everywhere(&world.manager_command());
    let listens =
        manager.get_args().find_map(|argument| argument.to_str()?.strip_prefix("0.0.0.0:").map(str::to_owned));
    let api = listens.expect("an address");
    manager.args(["--advertise-addr", &format!("192.0.2.1:{api}")]);
    world.start_manager_as(manager);
    let start_agent = |world: &mut World, options: &[&str]| {
        let mut agent = everywhere(&world.agent_command());
        agent.args(["--advertise-addr", Outside::HERE]).args(options);
        world.agent = Some(Process::start("agent", &mut agent, world.directory.path()));
        world.wait_ready();
    };
    start_agent(&mut world, &[]);
    let client = Inside::of(&world, "client", &[]);
    let connects = |world: &World, address: &str, port: &str| {
        client.shell(world, &format!("nc -w 1 {address} {port} </dev/null")).0 == 0
    };
    let node = client.addresses[0].rsplit_once('.').map(|(subnet, _)| format!("{subnet}.1")).expect("an address");
    let metrics = world.agent_port.to_string();
    let all = |world: &World, port: &str| ["192.0.2.1", &node].map(|address| connects(world, address, port));
    until("the managers are closed", || (all(&world, &api) == [false; 2]).then_some(()));
    assert_eq!(all(&world, &metrics), [true; 2]);
    let from_outside = other.command("busybox").args(["nc", "-w", "1", "192.0.2.1", &api]).output();
    assert!(from_outside.expect("busybox").status.success(), "to others they are open");
    for (reach, to_managers, to_metrics) in
        [("managers", true, false), ("managers,metrics", true, true), ("nothing", false, false)]
    {
        let _ = world.agent.take().expect("it runs").terminate();
        start_agent(&mut world, &["--containers-reach", reach]);
        until(&format!("{reach}: the managers"), || (all(&world, &api) == [to_managers; 2]).then_some(()));
        until(&format!("{reach}: metrics"), || (all(&world, &metrics) == [to_metrics; 2]).then_some(()));
    }
}

#[test]
fn a_container_may_have_the_nodes_network_or_none() {
    let world = World::with_warren("modes");
    let page = "mkdir /tmp/page; echo here > /tmp/page/index.html; exec httpd -f -p 8099 -h /tmp";
    world.create("host", 1, &["--network", "host"], page);
    let host = Inside::only(&world, "host");
    let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).expect("a namespace");
    assert_eq!(network(&host.pid.to_string()), network("thread-self"));
    until("it answers in the node's network", || (fetch_here("127.0.0.1:8099/page").stdout == "here").then_some(()));
    assert!(host.addresses.is_empty());
    let none = Inside::of(&world, "none", &["--network", "none"]);
    assert_ne!(network(&none.pid.to_string()), network("thread-self"));
    assert!(none.addresses.is_empty());
    assert!(!none.enter(&["ip", "-o", "link"]).contains("eth0"));
    let error = world.warren(&["service", "create", "bad", "--image", "x", "--network", "host", "--publish", "80:80"]);
    assert!(error.failed(2).contains("spec.ports[0].host_port"));
    assert!(!traces(&world).iter().any(|trace| trace.starts_with("ip: ")));
}

#[test]
fn an_agent_that_was_killed_finds_its_networks_and_removes_the_others() {
    let mut world = World::with_warren("killed");
    let kept = servers(&world, "kept", 1, &["--publish", "8080:80"]);
    let gone = servers(&world, "gone", 1, &[]);
    world.agent.take().expect("it runs").kill();
    // Meanwhile one of them goes, with nobody to clean up after it.
    for (command, arguments) in [("tasks", ["kill", "--signal", "SIGKILL"]), ("tasks", ["delete", "--force", ""])] {
        let mut words = vec![command];
        words.extend(arguments.iter().filter(|word| !word.is_empty()));
        words.push(&gone[0].id);
        until("ctr does it", || (world.ctr(&words).code == 0).then_some(()));
    }
    // A namespace that belongs to nobody, and a link too.
    fs::write(world.path("netns/nobody"), "").expect("writable");
    drop(run("ip", &["link", "add", "wrnnobody", "type", "veth", "peer", "name", "wrnpeer"]).succeeded());
    assert_eq!(fetch_here("127.0.0.1:8080").succeeded(), hostname(&kept[0]), "without an agent");
    world.start_agent(&[]);
    world.wait_ready();
    let replaced = until("the other is replaced", || {
        let running = Inside::all(&world, "gone");
        (running.len() == 1 && running[0].id != gone[0].id).then_some(running)
    });
    assert_ne!(replaced[0].addresses, kept[0].addresses);
    assert_eq!(Inside::all(&world, "kept")[0].id, kept[0].id);
    assert_eq!(fetch_here("127.0.0.1:8080").succeeded(), hostname(&kept[0]));
    assert_eq!(fetch(&world, &replaced[0], &kept[0].addresses[0]).succeeded(), hostname(&kept[0]));
    until("what is nobody's is gone", || {
        let links = run("ip", &["-o", "link"]).succeeded();
        let old = links.contains("wrnnobody") || links.contains(&format!("wrn{}", hostname(&gone[0])));
        let kept =
            Path::new(&world.path("netns")).join("nobody").exists() || world.path("netns").join(&gone[0].id).exists();
        (!old && !kept).then_some(())
    });
}

#[test]
fn a_machine_that_comes_as_another_node_lets_go_of_its_old_address() {
    let mut world = World::with_warren("another");
    let has = |address: &str| {
        let addresses = run("ip", &["-o", "address", "show", "dev", "lo"]).succeeded();
        addresses.contains(&format!(" {address}/32 "))
    };
    assert!(has("10.128.0.1") && !has("10.128.1.1"));
    drop(run("ip", &["address", "add", "10.128.78.1/32", "dev", "lo"]).succeeded());
    world.agent.take().expect("it runs").kill();
    fs::remove_dir_all(world.path("agent")).expect("it was there");
    world.start_agent(&[]);
    until("it has the next node's address", || has("10.128.1.1").then_some(()));
    until("and not the one of before", || (!has("10.128.0.1")).then_some(()));
    assert!(has("169.254.1.1") && has("10.128.78.1"), "these are not of a node's place");
}
