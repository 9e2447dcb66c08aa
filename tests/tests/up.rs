//! `cargo xtask up`, as the README tells people to run it.

use rustix::process::Signal;

use warren_tests::{Process, World, until};

#[test]
fn up_touches_nothing_that_is_not_its_own() {
    let mut world = World::empty("up-own");
    let precious = world.path("up/precious");
    std::fs::create_dir(world.path("up")).expect("writable");
    std::fs::write(&precious, "kept").expect("writable");
    let refused = World::run(&mut world.up_command()).failed(1);
    assert!(refused.contains("holds something else"), "{refused}");
    assert!(precious.exists());
    let _ = World::run(world.up_command().args(["--name", "../x"])).failed(1);

    // Somebody's manager on the same socket, and somebody's service.
    std::fs::remove_dir_all(world.path("up")).expect("removable");
    world.start_manager();
    let _ = world.warren(&["service", "create", "theirs", "--image", "x", "--replicas", "0"]).succeeded();
    let refused = World::run(&mut world.up_command()).failed(1);
    assert!(refused.contains("a manager answers on"), "{refused}");
    assert!(world.warren(&["service", "ls"]).succeeded().contains(" theirs "));
}

#[test]
fn up_leaves_nothing_though_its_manager_no_longer_answers() {
    let world = World::empty("up-deaf");
    let up = Process::start("up", &mut world.up_command(), world.directory.path());
    until("it is up", || up.log().contains("Warren is up.").then_some(()));
    std::fs::remove_file(world.path("w.sock")).expect("removable");
    up.signal(Signal::INT);
    let log = world.path("up.log");
    let _ = up.terminate();
    let log = std::fs::read_to_string(log).expect("a log");
    assert!(log.contains("nothing is left"), "{log}");
    assert!(!world.path("up").exists() && !world.pins().exists());
    let processes = std::fs::read_dir("/proc").expect("a directory").flatten();
    let directory = world.directory.path().to_string_lossy().into_owned();
    let left: Vec<String> = processes
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("cmdline")).ok())
        .filter(|command| command.contains(&directory))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn up_shows_timed_containers_and_leaves_nothing() {
    let world = World::empty("up");
    let up = Process::start("up", &mut world.up_command(), world.directory.path());
    until("three containers are timed", || {
        let log = up.log();
        let timed = log.lines().filter(|line| line.contains(" running ") && line.matches(" ms").count() == 2);
        (log.contains("Warren is up.") && timed.count() == 3).then_some(())
    });
    let (_, text) = world.get(world.manager_port, "/metrics").expect("metrics");
    assert!(text.contains("warren_services_total 1"));
    let log = world.path("up.log");
    let status = up.terminate();
    assert!(status.success());
    let log = std::fs::read_to_string(log).expect("a log");
    assert!(log.contains("nothing is left"), "{log}");
    assert!(!world.path("up").exists() && !world.pins().exists());
}

#[test]
fn up_cleans_up_though_nobody_reads_what_it_says() {
    let world = World::empty("up-unread");
    let mut command = world.up_command();
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut up = command.spawn().expect("it starts");
    until("it is up", || world.warren(&["service", "ps", "demo"]).stdout.contains("running").then_some(()));
    // As `tee` that Ctrl-C ends first.
    drop((up.stdout.take(), up.stderr.take()));
    let pid = rustix::process::Pid::from_raw(up.id() as i32).expect("a pid");
    rustix::process::kill_process(pid, Signal::INT).expect("it runs");
    let status = up.wait().expect("it ends");
    assert!(status.success(), "{status}");
    assert!(!world.path("up").exists() && !world.pins().exists());
}
