//! What people write and machines do that is not what its authors would have written.

use std::{
    fs,
    time::{Duration, Instant},
};

use warren_tests::{Inside, Process, WELL_BEHAVED, World, image_name, run, until, until_within};

/// How many processes of this machine have this command line.
fn count(command: &str) -> usize {
    let command = command.replace(' ', "\0") + "\0";
    let processes = fs::read_dir("/proc").expect("a directory").flatten();
    let lines = processes.filter_map(|entry| fs::read_to_string(entry.path().join("cmdline")).ok());
    lines.filter(|line| *line == command).count()
}

#[test]
fn a_server_that_takes_its_time_is_not_replaced() {
    let world = World::with_warren("slow-start");
    let check = ["--health", "http://:8080/passwd", "--health-interval", "10s", "--health-retries", "3"];
    world.create("web", 1, &check, "sleep 5; exec httpd -f -p 8080 -h /etc");
    let containers = world.containers("web");
    assert_eq!(containers.len(), 1, "{containers:?}");
    assert_eq!(containers[0]["status"]["health"], "HEALTH_HEALTHY");
}

#[test]
fn what_a_check_started_ends_with_it() {
    let world = World::with_warren("leftovers");
    let quick = ["--health-interval", "500ms", "--health-timeout", "500ms", "--health-start-period", "10m"];
    let service = |name: &str, check: &str| {
        let mut arguments = vec!["service", "create", name, "--image", image_name(), "--health", check];
        arguments.extend(quick);
        arguments.extend(["--", "sh", "-c", WELL_BEHAVED]);
        let _ = world.warren(&arguments).succeeded();
    };
    // A child that the command waits for; a grandchild in a session of its own while its parents live; one that is left behind.
    service("waits", "exec:sleep 6881; true");
    service("nested", "exec:sh -c 'setsid sleep 6882; true'; true");
    service("leaves", "exec:sleep 6883 & true");
    let sleeps = || ["sleep 6881", "sleep 6882", "sleep 6883"].map(count);
    let checks = || world.agent_metrics().sum("warren_health_checks_total", &["type=\"exec\""]);
    until_within(Duration::from_secs(60), "they have been checked many times", || (checks() >= 20.0).then_some(()));
    let ends = Instant::now() + Duration::from_secs(5);
    while Instant::now() < ends {
        let now = sleeps();
        assert!(now.iter().all(|count| *count <= 1), "{now:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    // A command whose caller leaves takes its children with it.
    let mut exec = World::binary("warren");
    exec.args(["--manager", &world.manager_address(), "container", "exec", "waits-1", "--", "sh", "-c"]);
    let exec = Process::start("exec", exec.arg("sleep 6884; true"), world.directory.path());
    until("it runs", || (count("sleep 6884") == 1).then_some(()));
    exec.signal(rustix::process::Signal::INT);
    until_within(Duration::from_secs(20), "its child is gone", || (count("sleep 6884") == 0).then_some(()));
    drop(exec);
    let _ = world.warren(&["service", "rm", "waits", "nested", "leaves", "--wait"]).succeeded();
    assert_eq!(sleeps(), [0, 0, 0]);
}

#[test]
fn mounts_hide_nothing_of_each_other() {
    let world = World::with_warren("depth");
    let options = [
        ["--mount", "source=data,target=/app/data"],
        ["--mount", "type=tmpfs,target=/app"],
        ["--mount", "source=inner,target=/s/a/b"],
        ["--mount", "source=outer,target=/s/a"],
        ["--mount", "source=etc,target=/etc"],
    ];
    for volume in ["data", "inner", "outer", "etc"] {
        let _ = world.warren(&["volume", "create", volume]).succeeded();
    }
    world.create("app", 1, &options.concat(), WELL_BEHAVED);
    let app = Inside::only(&world, "app");
    let (code, said) =
        app.shell(&world, "echo one > /app/data/x; echo two > /s/a/b/y; echo three > /s/a/z; cat /etc/resolv.conf");
    assert!(code == 0 && said.contains("nameserver 169.254.1.1"), "{said}");
    let path = |volume: &str| {
        let shown = world.warren(&["volume", "inspect", volume, "--format", "json"]).succeeded();
        let id = serde_json::from_str::<serde_json::Value>(&shown).expect("JSON")["id"].clone();
        world.path("agent/volumes/data").join(id.as_str().expect("an id"))
    };
    for (volume, file, text) in [("data", "x", "one\n"), ("inner", "y", "two\n"), ("outer", "z", "three\n")] {
        assert_eq!(fs::read_to_string(path(volume).join(file)).expect(volume), text);
    }
}

#[test]
fn a_nodes_clock_neither_delays_restarts_nor_hurries_them() {
    let mut world = World::empty("clock").and_containerd();
    world.start_manager();
    for (offset, words) in [("+1h", "ahead of"), ("-1h", "behind")] {
        let mut agent = world.agent_command();
        let library = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";
        agent.env("LD_PRELOAD", library).env("FAKETIME", offset).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        agent.env("DONT_FAKE_MONOTONIC", "1");
        world.agent = Some(Process::start("agent", &mut agent, world.directory.path()));
        world.wait_ready();
        let health = until("its clock is noticed", || {
            let health = world.warren(&["cluster", "health"]);
            health.stdout.contains("clock_skewed").then_some(health)
        });
        assert!(health.code == 1 && health.stdout.contains(words), "{}", health.stdout);
        let name = if words == "behind" { "late" } else { "early" };
        let arguments = ["service", "create", name, "--image", image_name(), "--restart-delay-ms", "1000", "--"];
        let _ = world.warren(&[&arguments[..], &["sh", "-c", "exit 3"]].concat()).succeeded();
        let began = Instant::now();
        let restarts =
            || world.manager_metrics().sum("warren_container_restarts_total", &[&format!("service=\"{name}\"")]);
        until_within(Duration::from_secs(20), "it is restarted", || (restarts() >= 2.0).then_some(()));
        // A second each at least. (Only the agent has the wrong clock here: to the daemon it ended at another time.)
        assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
        let _ = world.warren(&["service", "rm", name, "--wait"]).succeeded();
        let _ = world.agent.take().expect("it runs").terminate();
    }
}

#[test]
fn manifests_in_one_line_are_documents_too() {
    let mut world = World::empty("inline");
    world.start_manager();
    let file = world.path("inline.yaml");
    let config = |name: &str| {
        format!("--- {{apiVersion: warren.io/v1, kind: Config, metadata: {{name: {name}}}, spec: {{stringData: y}}}}\n")
    };
    fs::write(&file, config("a") + &config("b")).expect("writable");
    let applied = world.warren(&["apply", "-f", &file.display().to_string()]).succeeded();
    assert_eq!(applied, "config a created\nconfig b created\n");
    // A name that another's id begins with is a name all the same.
    let listed = world.warren(&["config", "ls", "--format", "json"]);
    let configs: serde_json::Value = serde_json::from_str(&listed.succeeded()).expect("JSON");
    let id = configs[0]["id"].as_str().expect("an id").to_owned();
    fs::write(&file, config(&id[..6])).expect("writable");
    let applied = world.warren(&["apply", "-f", &file.display().to_string()]).succeeded();
    assert_eq!(applied, format!("config {} created\n", &id[..6]));
}

#[test]
fn a_name_is_one_containers() {
    let mut world = World::empty("names");
    world.start_manager();
    let create = |name: &str, replicas: &str| {
        world.warren(&["service", "create", name, "--image", image_name(), "--replicas", replicas])
    };
    let _ = create("web", "2").succeeded();
    let refused = create("web-2", "1").failed(2);
    assert!(refused.contains("spec.name: \"web-2\" is a container of service \"web\""), "{refused}");
    let _ = create("web-3", "1").succeeded();
    let refused = world.warren(&["service", "scale", "web", "3"]).failed(2);
    assert!(refused.contains("would be called like service \"web-3\""), "{refused}");
    let _ = create(&"x".repeat(61), "9").succeeded();
    let refused = create(&"y".repeat(61), "10").failed(2);
    assert!(refused.contains("spec.name: is too long: its containers are called "), "{refused}");
}

#[test]
fn the_machines_own_resolvers_are_followed() {
    let world = World::with_warren("resolv");
    let servers = [("127.0.0.2", "192.0.2.2"), ("127.0.0.3", "192.0.2.3")].map(|(address, answer)| {
        let mut command = std::process::Command::new(warren_tests::find("dnsmasq"));
        command.args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root"]);
        command.arg(format!("--listen-address={address}")).args(["--bind-interfaces", "--local-ttl=1", "--port=53"]);
        command.arg(format!("--host-record=x.example,{answer},1")).arg("--pid-file=");
        Process::start(address, &mut command, world.directory.path())
    });
    let mut world = world;
    let _ = world.agent.take().expect("it runs").terminate();
    // In a mount namespace of its own, where /etc/resolv.conf is a file of the test's.
    let directory = world.path("etc");
    fs::create_dir(&directory).expect("writable");
    let write = |address: &str| {
        let next = directory.join("next");
        fs::write(&next, format!("nameserver {address}\n")).expect("writable");
        fs::rename(&next, directory.join("resolv.conf")).expect("writable");
    };
    write("127.0.0.2");
    for entry in fs::read_dir("/etc").expect("a directory").flatten() {
        let target = directory.join(entry.file_name());
        if entry.file_name() != "resolv.conf" {
            std::os::unix::fs::symlink(format!("/proc/1/root/etc/{}", entry.file_name().to_string_lossy()), target)
                .expect("writable");
        }
    }
    let agent = world.agent_command();
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "--propagation", "shared", "sh", "-c"]);
    command.arg(format!("mount --make-private /; mount --bind {} /etc && exec \"$0\" \"$@\"", directory.display()));
    command.arg(agent.get_program()).args(agent.get_args()).envs(agent.get_envs().filter_map(|(k, v)| Some((k, v?))));
    world.agent = Some(Process::start("agent", &mut command, world.directory.path()));
    world.wait_ready();
    let asked =
        || run("dig", &["@169.254.1.1", "+short", "+tries=1", "+timeout=4", "x.example"]).stdout.trim().to_owned();
    until("the first is asked", || (asked() == "192.0.2.2").then_some(()));
    let [first, second] = servers;
    write("127.0.0.3");
    let _ = first.terminate();
    until_within(Duration::from_secs(6), "the other is asked", || (asked() == "192.0.2.3").then_some(()));
    // With nobody there, that is known at once.
    let _ = second.terminate();
    std::thread::sleep(Duration::from_secs(1));
    let began = Instant::now();
    let output = run("dig", &["@169.254.1.1", "+tries=1", "+timeout=4", "y.example"]).stdout;
    assert!(output.contains("SERVFAIL"), "{output}");
    assert!(began.elapsed() < Duration::from_millis(900), "{:?}", began.elapsed());
}

#[test]
fn a_service_is_restarted_and_found_by_name() {
    let world = World::with_warren("again");
    world.create("web", 2, &[], WELL_BEHAVED);
    world.create("other", 1, &[], WELL_BEHAVED);
    let ids = || {
        let mut ids: Vec<_> = Inside::all(&world, "web").into_iter().map(|inside| inside.id).collect();
        ids.sort();
        ids
    };
    let (before, other) = (ids(), Inside::only(&world, "other").id);
    let _ = world.warren(&["service", "restart", "web", "--wait"]).succeeded();
    let after = ids();
    assert!(after.len() == 2 && after.iter().all(|id| !before.contains(id)), "{before:?} {after:?}");
    assert_eq!(Inside::only(&world, "other").id, other);
    let listed = world.warren(&["service", "ls", "--filter", "name=web"]).succeeded();
    assert!(listed.contains(" web ") && !listed.contains("other"), "{listed}");
    let listed = world.warren(&["node", "ls", "--filter", "name!=node-1"]).succeeded();
    assert!(!listed.contains("node-1"), "{listed}");
}

#[test]
fn what_is_removed_while_it_grows_costs_few_entries() {
    let mut world = World::empty("moot");
    world.start_manager();
    let _ = world.warren(&["service", "create", "big", "--image", "localhost/none", "--replicas", "0"]).succeeded();
    let entries = || world.manager_metrics().sum("warren_raft_applied_index", &[]);
    let before = entries();
    let _ = world.warren(&["service", "scale", "big", "10000"]).succeeded();
    let _ = world.warren(&["service", "rm", "big"]).succeeded();
    let end = Instant::now() + Duration::from_secs(8);
    let mut last = entries();
    until_within(Duration::from_secs(60), "it has settled", || {
        let now = entries();
        let settled = now == last && Instant::now() > end;
        last = now;
        settled.then_some(())
    });
    assert!(last - before < 300.0, "{} entries", last - before);
}

/// A program's clock, which a file sets while it runs.
fn with_clock(command: &mut std::process::Command, file: &std::path::Path) {
    command
        .env("LD_PRELOAD", "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
        .env("FAKETIME_TIMESTAMP_FILE", file)
        .env("FAKETIME_NO_CACHE", "1")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .env("DONT_FAKE_MONOTONIC", "1");
}

#[test]
fn a_managers_certificate_follows_its_clock() {
    let mut world = World::empty("jump");
    let clock = world.path("clock");
    fs::write(&clock, "+0").expect("writable");
    let mut command = world.manager_command();
    with_clock(&mut command, &clock);
    world.start_manager_as(command);
    let ready = || world.get(world.manager_port, "/ready").map_or(0, |(status, _)| status);
    until("it is ready", || (ready() == 200).then_some(()));
    fs::write(&clock, "+6y").expect("writable");
    until("it says that its certificate has run out, or has another", || {
        let (status, body) = world.get(world.manager_port, "/ready")?;
        let renewed = world.manager.as_ref().expect("it runs").log().contains("the certificate was renewed");
        (renewed || status == 503 && body.contains("the certificate has run out")).then_some(())
    });
    until_within(Duration::from_secs(60), "it has another", || {
        world.manager.as_ref().expect("it runs").log().contains("the certificate was renewed").then_some(())
    });
    until("it is ready again", || (ready() == 200).then_some(()));
}

#[test]
fn a_node_says_that_its_certificate_has_run_out() {
    let mut world = World::with_containerd("ran-out");
    let clock = world.path("clock");
    fs::write(&clock, "+0").expect("writable");
    world.start_manager();
    let token = world.warren(&["cluster", "token", "create", "--role", "worker"]).succeeded();
    let mut join = World::binary("warren");
    let address = format!("127.0.0.1:{}", world.api_port);
    join.args(["cluster", "join", "--token", token.trim(), &address, "--data-dir"]).arg(world.directory.path());
    let _ = World::run(&mut join).succeeded();
    let mut agent = world.agent_command();
    with_clock(&mut agent, &clock);
    world.agent = Some(Process::start("agent", &mut agent, world.directory.path()));
    world.wait_ready();
    let _ = world.agent.take().expect("it runs").terminate();
    fs::write(&clock, "+2y").expect("writable");
    let mut agent = world.agent_command();
    with_clock(&mut agent, &clock);
    world.agent = Some(Process::start("agent", &mut agent, world.directory.path()));
    let said = until("it says why", || {
        let (status, body) = world.get(world.agent_port, "/ready")?;
        (status == 503 && body.contains("certificate")).then_some(body)
    });
    assert!(said.contains("the certificate has run out") && said.contains("let it join again"), "{said}");
    let log = world.agent.as_ref().expect("it runs").log();
    assert!(log.contains("the certificate has run out") && !log.contains("transport error"), "{log}");
}
