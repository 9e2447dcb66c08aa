//! Bad input: one clear sentence each, an exit code that programs can tell apart, and nothing lost.

use std::{fs, net::TcpListener, os::unix::process::CommandExt as _};

use warren_tests::{WELL_BEHAVED, World, image_name};

#[test]
fn requests_that_cannot_be_are_refused() {
    let world = World::with_warren("refusals");
    world.create("web", 1, &[], WELL_BEHAVED);
    let create = |name: &str, options: &[&str]| {
        let mut arguments = vec!["service", "create", name, "--image", image_name()];
        arguments.extend(options);
        world.warren(&arguments)
    };
    let long = "x".repeat(64);
    for (output, code, words) in [
        (create("neg", &["--replicas", "-1"]), 2, "spec.replicated.replicas: -1"),
        (create("", &[]), 2, "spec.name: is missing"),
        (create("Web_1", &[]), 2, "spec.name: \"Web_1\" is no DNS label"),
        (create(&long, &[]), 2, "spec.name"),
        (create("web", &[]), 5, "a service named \"web\" exists already"),
        (create("mem", &["--limit-memory", "1K"]), 2, "spec.resources.limits.memory_bytes"),
        (create("sig", &["--stop-signal", "SIGNOPE"]), 2, "spec.container.stop_signal"),
        (world.warren(&["service", "create", "img", "--image", "UPPER CASE"]), 2, "image"),
        (world.warren(&["service", "inspect", "nope"]), 3, "there is no service \"nope\""),
        (world.warren(&["service", "scale", "nope", "3"]), 3, "there is no service \"nope\""),
        (world.warren(&["service", "scale", "web", "-3"]), 2, "-3 is not between 0 and 100000"),
        (world.warren(&["service", "rm", "nope"]), 3, "there is no service \"nope\""),
        (world.warren(&["container", "inspect", "nope"]), 3, "there is no container \"nope\""),
        (world.warren(&["node", "inspect", "nope"]), 3, "there is no node \"nope\""),
        (world.warren(&["--manager", "unix:///nowhere.sock", "node", "ls"]), 4, "no manager answers"),
        (world.warren_image_import(&world.path("no-such-file.tar")), 1, "no-such-file.tar"),
        (world.warren_image_import(&world.path("containerd.toml")), 1, "no uncompressed tar archive"),
        (world.warren_image_import(std::path::Path::new("/dev/zero")), 1, "no regular file"),
    ] {
        let line = output.failed(code);
        assert!(line.contains(words), "{line:?} does not say {words:?}");
    }
    // An image that is nowhere is not known to be when the service is created: its containers say so.
    let _ = world.warren(&["service", "create", "ghost", "--image", "ghost"]).succeeded();
    let rejected = world.container_when("ghost", "it has failed", |c| c["status"]["state"] == "CONTAINER_STATE_FAILED");
    let message = rejected["status"]["message"].as_str().unwrap_or_default();
    assert!(message.starts_with("docker.io does not answer: "), "{message}");
    // Nothing of all this has harmed what was there.
    let services = world.warren(&["service", "ls"]).succeeded();
    assert_eq!(services.lines().count(), 3, "{services}");
    assert_eq!(world.tasks().len(), 1);
}

#[test]
fn a_manager_that_cannot_start_says_why_and_changes_nothing() {
    let mut world = World::empty("manager-start");
    world.start_manager();
    let _ = world.warren(&["service", "create", "web", "--image", "x", "--replicas", "0"]).succeeded();

    // Its addresses are taken by the one that runs.
    let second = World::run(&mut world.manager_command()).failed(7);
    assert!(second.contains("another process uses this port"), "{second}");
    world.manager.take().expect("it runs").terminate();

    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let refused = World::run(world.manager_command().args(["--listen-addr", &address])).failed(7);
    assert!(refused.contains(&address) && refused.contains("another process"), "{refused}");

    let wrong = World::run(world.manager_command().args(["--advertise-addr", "here"])).failed(2);
    assert!(wrong.contains("advertise_addr: \"here\" is not HOST:PORT"), "{wrong}");

    // A file that is no socket is nobody's to replace.
    let precious = world.path("precious");
    fs::write(&precious, "kept").expect("writable");
    let refused = World::run(world.manager_command().arg("--socket").arg(&precious)).failed(7);
    assert!(refused.contains("no socket"), "{refused}");
    assert_eq!(fs::read_to_string(&precious).expect("still there"), "kept");

    // Settings that are none.
    let settings = world.path("settings");
    fs::create_dir(&settings).expect("writable");
    for (text, words) in [
        ("metrics_adr = \"x\"", "there is no setting metrics-adr"),
        ("otlp_interval_s = 0", "invalid value '0' for '--otlp-interval-s"),
        ("[metrics]\nnative_histograms = ", "line 2"),
    ] {
        fs::write(settings.join("manager.toml"), text).expect("writable");
        let refused = World::run(world.manager_command().env("WARREN_CONFIG_DIR", &settings)).failed(2);
        assert!(refused.contains("manager.toml") && refused.contains(words), "{refused}");
    }

    // A data directory that a later version wrote.
    let identity = world.path("manager/manager.json");
    let kept = fs::read_to_string(&identity).expect("readable");
    let mut later: serde_json::Value = serde_json::from_str(&kept).expect("JSON");
    later["format"] = 9.into();
    fs::write(&identity, later.to_string()).expect("writable");
    let version = World::run(&mut world.manager_command()).failed(8);
    assert!(version.contains("has format 9, this version reads 3 to 5"), "{version}");
    fs::write(&identity, kept).expect("writable");

    // A snapshot that is damaged is named, not guessed at.
    let snapshots = world.path("manager/raft/snapshot");
    fs::write(snapshots.join("current.snapshot"), b"nonsense").expect("writable");
    let damaged = World::run(&mut world.manager_command()).failed(8);
    assert!(damaged.contains("snapshot is damaged"), "{damaged}");
    fs::remove_file(snapshots.join("current.snapshot")).expect("removable");

    world.start_manager();
    let services = world.warren(&["service", "ls"]).succeeded();
    assert!(services.contains(" web "), "{services}");
}

#[test]
fn an_agent_that_cannot_start_says_why() {
    let world = World::empty("agent-start");
    let absent = World::run(&mut world.agent_command()).failed(4);
    assert!(absent.contains("containerd does not answer on") && absent.contains("is it running?"), "{absent}");

    let ports = World::run(world.agent_command().args(["--dns-ports", "1,2,3,4,5"])).failed(2);
    assert!(ports.contains("DNS ports were given: there can be 4 at most"), "{ports}");
    let filter = World::run(world.manager_command().env("WARREN_LOG", "debugg=="));
    assert!(filter.code == 2 && filter.stderr.contains("--log"), "{filter:?}");

    // Nobody's user: the directory must be theirs to get that far.
    let nobody = World::run(world.agent_command().uid(65534).gid(65534)).failed(6);
    assert!(nobody.contains("must run as root"), "{nobody}");

    let taken = TcpListener::bind(("127.0.0.1", world.agent_port)).expect("a port");
    let refused = World::run(&mut world.agent_command()).failed(7);
    assert!(refused.contains("another process uses this port"), "{refused}");
    drop(taken);
}
