//! The node's network stays as it should be, whoever else changes it, and whatever the machine lacks.

use std::{
    fs,
    net::{TcpListener, UdpSocket},
    path::Path,
    time::{Duration, Instant},
};

use warren_tests::{
    Inside, Output, Outside, Process, WELL_BEHAVED, World, image_name, run, two_nodes, until, until_within,
};

fn web(world: &World, name: &str, options: &[&str]) {
    world.create(name, 1, options, "hostname > /tmp/index.html; exec httpd -f -p 80 -h /tmp");
}

fn fetch(url: &str) -> Output {
    run("busybox", &["timeout", "2", "busybox", "wget", "-q", "-O", "-", &format!("http://{url}/")])
}

fn ip(arguments: &str) {
    let _ = run("ip", &arguments.split(' ').collect::<Vec<_>>()).succeeded();
}

#[test]
fn what_others_take_away_is_back_in_seconds() {
    let world = World::empty("drift");
    let outside = Outside::new(&world);
    let world = world.and_warren();
    web(&world, "web", &["--publish", "8080:80"]);
    let inside = Inside::only(&world, "web");
    let answers = || outside.fetch("192.0.2.1:8080").len() == 12;
    until("it is published", || answers().then_some(()));
    let resolves = || inside.enter(&["busybox", "nslookup", "web.warren", "169.254.1.1"]).contains("10.128.0.");
    let flush = || drop(run("nft", &["flush", "ruleset"]).succeeded());
    let table = || run("nft", &["list", "table", "inet", "warren"]);
    type Damage<'a> = (&'a str, &'a dyn Fn(), &'a dyn Fn() -> bool);
    let address = inside.addresses[0].clone();
    let way = || run("ip", &["route", "show", &address]).stdout.contains("wrn");
    let own = || run("ip", &["address", "show", "dev", "lo"]).stdout.contains("169.254.1.1");
    let chain = || table().stdout.contains("chain guard");
    let forwards = || fs::read_to_string("/proc/sys/net/ipv4/ip_forward").is_ok_and(|said| said.trim() == "1");
    let damages: [Damage<'_>; 5] = [
        ("all rules", &flush, &|| table().code == 0),
        ("one chain", &|| drop(run("nft", &["flush", "chain", "inet", "warren", "guard"]).succeeded()), &|| {
            table().stdout.contains("only containers of this node")
        }),
        ("the resolver's address", &|| ip("address del 169.254.1.1/32 dev lo"), &own),
        ("the way to a container", &|| ip(&format!("route del {address}")), &way),
        ("forwarding", &|| fs::write("/proc/sys/net/ipv4/ip_forward", "0").expect("writable"), &forwards),
    ];
    for (what, damage, is_there) in damages {
        damage();
        until_within(Duration::from_secs(6), what, || is_there().then_some(()));
        until_within(Duration::from_secs(5), &format!("{what}: it answers"), || answers().then_some(()));
        assert!(chain() && resolves(), "{what}");
    }
    // A container's link comes back too, with all that is inside.
    let link = run("ip", &["route", "show", &address]).stdout.split(' ').nth(2).expect("a link").to_owned();
    ip(&format!("link del {link}"));
    until_within(Duration::from_secs(8), "the container is reached again", || answers().then_some(()));
    assert!(resolves());
    let log = world.agent.as_ref().expect("it runs").log();
    assert!(log.contains("network state was changed by another program; restoring"), "{log}");
    // A container of the node's own network has no link, and needs none. An agent that finds everything as it should be touches nothing.
    world.create("host", 1, &["--network", "host"], WELL_BEHAVED);
    until("the rules know of it", || table().stdout.contains("dnat ip to 192.0.2.1").then_some(()));
    let handle = || run("nft", &["-a", "list", "table", "inet", "warren"]).stdout.lines().next().map(str::to_owned);
    let before = handle();
    let mut world = world;
    let _ = world.agent.take().expect("it runs").terminate();
    world.start_agent(&[]);
    world.wait_ready();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(handle(), before, "the rules were loaded again");
}

#[test]
fn only_containers_ask_the_resolver() {
    let world = World::with_warren("resolver");
    let outside = Outside::new(&world);
    web(&world, "web", &[]);
    ip(&format!("-n {} route add 169.254.1.1 via {} dev wire", outside.name(), Outside::HERE));
    let asked = |name: &str| {
        let output =
            outside.command("busybox").args(["timeout", "3", "busybox", "nslookup", name, "169.254.1.1"]).output();
        String::from_utf8_lossy(&output.expect("busybox").stdout).into_owned()
    };
    assert!(!asked("web.warren").contains("10.128."), "{}", asked("web.warren"));
    let own = run("busybox", &["nslookup", "web.warren", "169.254.1.1"]);
    assert!(own.stdout.contains("10.128."), "the node itself may: {}{}", own.stdout, own.stderr);
}

#[test]
fn udp_senders_that_never_pause_find_what_is_there_now() {
    let world = World::with_warren("udp");
    let outside = Outside::new(&world);
    // From one source port, all the time, also before there is anybody.
    let script = "import socket,time\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\ns.bind(('0.0.0.0',40000))\nfor i in range(600):\n s.sendto(b'%d\\n'%i,('192.0.2.1',5300))\n time.sleep(0.1)\n";
    let mut sender = outside.command("python3");
    sender.args(["-c", script]);
    let sender = Process::start("sender", &mut sender, world.directory.path());
    std::thread::sleep(Duration::from_secs(1));
    world.create("udp", 1, &["--publish", "5300:7000/udp", "--restart-delay-ms", "100"], "exec sleep 600");
    // A receiver in a container's network: the first datagram that comes.
    let receive = "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\ns.bind(('',7000))\ns.settimeout(3)\nprint(s.recv(99))";
    let receives = |inside: &Inside| inside.enter(&["python3", "-c", receive]).starts_with("b'");
    let first = Inside::only(&world, "udp");
    assert!(receives(&first), "it gets datagrams, though they came before it");
    let _ = run("kill", &["-9", &first.pid.to_string()]).succeeded();
    let next = until("it is replaced", || Inside::all(&world, "udp").into_iter().find(|inside| inside.id != first.id));
    assert_ne!(next.addresses, first.addresses);
    assert!(receives(&next), "its replacement gets datagrams");
    drop(sender);
}

#[test]
fn a_node_without_ipv6_has_ipv4() {
    let world = World::empty("no-ipv6").and_containerd();
    for scope in ["all", "default", "lo"] {
        // Not there where the kernel was told at its boot to have none.
        if Path::new("/proc/sys/net/ipv6").exists() {
            fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1").expect("writable");
        }
    }
    let mut world = world;
    world.start_manager();
    world.start_agent(&[]);
    world.wait_ready();
    web(&world, "web", &["--publish", "8080:80"]);
    let inside = Inside::only(&world, "web");
    assert_eq!(inside.addresses.len(), 1, "{:?}", inside.addresses);
    until("it answers", || (fetch("127.0.0.1:8080").code == 0).then_some(()));
    let log = world.agent.as_ref().expect("it runs").log();
    assert_eq!(log.matches("no IPv6 on this node").count(), 1, "{log}");
}

#[test]
fn a_port_that_somebody_has_is_left_to_them_and_said() {
    let world = World::with_warren("taken");
    let outside = Outside::new(&world);
    let listener = TcpListener::bind("0.0.0.0:8088").expect("a port");
    let _udp = UdpSocket::bind("127.0.0.1:8089").expect("a port");
    web(&world, "other", &["--publish", "8081:80"]);
    // Where a node can be asked, it is refused.
    let refused = until("the node has told what it listens on", || {
        let created = world.warren(&["service", "create", "taken", "--image", image_name(), "--publish", "8088:80"]);
        if created.code == 0 {
            let _ = world.warren(&["service", "rm", "taken", "--wait"]).succeeded();
        }
        (created.code == 2).then(|| created.failed(2))
    });
    assert!(refused.contains("spec.ports[0].host_port") && refused.contains("node-1 listens on 8088/tcp"), "{refused}");
    for port in ["9465", "4789/udp", &world.manager_port.to_string()] {
        let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
        let published = format!("{number}:80/{protocol}");
        let arguments = ["service", "create", "own", "--image", image_name(), "--publish", &published];
        let refused = world.warren(&arguments).failed(2);
        assert!(refused.contains("spec.ports[0].host_port") && refused.contains("Warren"), "{refused}");
    }
    // What begins to listen later keeps its port too.
    drop(listener);
    until("the port is free", || {
        let arguments = ["service", "create", "late", "--image", image_name(), "--publish", "8088:80", "--wait", "--"];
        let script = ["sh", "-c", "echo late > /tmp/index.html; exec httpd -f -p 80 -h /tmp"];
        (world.warren(&[&arguments[..], &script[..]].concat()).code == 0).then_some(())
    });
    until("it is published", || (outside.fetch("192.0.2.1:8088") == "late").then_some(()));
    let again = TcpListener::bind("0.0.0.0:8088").expect("nothing listens there");
    let listener = again.try_clone().expect("a socket");
    let accepted = std::thread::spawn(move || listener.accept().map(drop));
    until_within(Duration::from_secs(15), "the process gets its connections", || {
        let _ = outside.fetch("192.0.2.1:8088");
        accepted.is_finished().then_some(())
    });
    let began = Instant::now();
    let said = until("it is said", || {
        let health = world.warren(&["cluster", "health"]);
        (health.code == 1).then_some(health.stdout).or_else(|| {
            assert!(began.elapsed() < Duration::from_secs(20));
            None
        })
    });
    assert!(said.contains("port_conflict") && said.contains("8088/tcp"), "{said}");
    assert_eq!(outside.fetch("192.0.2.1:8081").len(), 12, "other ports go on");
    drop(again);
}

#[test]
fn two_services_on_a_node_do_not_get_one_port_by_an_update() {
    let world = World::with_warren("clash");
    web(&world, "a", &["--publish", "80:80,mode=host"]);
    web(&world, "b", &["--publish", "81:80,mode=host"]);
    let manifest = world.path("b.yaml");
    let text = format!(
        "apiVersion: warren.io/v1\nkind: Service\nmetadata: {{name: b}}\nspec:\n  image: {}\n  command: [sh, -c, {:?}]\n  \
         ports: [{{containerPort: 80, hostPort: 80, publishMode: host}}]\n",
        image_name(),
        "hostname > /tmp/index.html; exec httpd -f -p 80 -h /tmp"
    );
    fs::write(&manifest, text).expect("writable");
    let refused = world.warren(&["apply", "-f", &manifest.display().to_string()]).failed(2);
    assert!(refused.contains("port 80/tcp is published by service \"a\""), "{refused}");
    let outside = Outside::new(&world);
    for port in ["80", "81"] {
        until("it answers as before", || (outside.fetch(&format!("192.0.2.1:{port}")).len() == 12).then_some(()));
    }
}

#[test]
fn a_published_port_on_loopback_leads_to_other_nodes() {
    let (world, other, second) = two_nodes("loopback", &[]);
    let constraint = ["--constraint", "node.hostname==node-2", "--publish", "8090:80"];
    web(&world, "far", &constraint);
    until("it answers on the other node's behalf", || (fetch("127.0.0.1:8090").code == 0).then_some(()));
    // Restarts of the agent take nothing away from connections through the node, nor from new ones.
    let mut world = world;
    let ends = Instant::now() + Duration::from_secs(12);
    let load = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let (mut failed, mut all) = (0, 0);
            while Instant::now() < ends {
                all += 1;
                failed += usize::from(other.fetch("192.0.2.1:8090").is_empty());
            }
            (failed, all)
        });
        for _ in 0..3 {
            let _ = world.agent.take().expect("it runs").terminate();
            world.start_agent(&["--advertise-addr", Outside::HERE]);
            world.wait_ready();
        }
        load.join().expect("no panic")
    });
    assert!(load.1 > 100, "{load:?}");
    assert_eq!(load.0, 0, "of {} connections", load.1);
    let _ = world.warren(&["service", "rm", "far", "--wait"]).succeeded();
    let _ = second.terminate();
}
