//! `cargo xtask up`, as the README tells people to run it.

use std::process::Command;

use warren_tests::{Process, World, free_port, until};

#[test]
fn up_shows_timed_containers_and_leaves_nothing() {
    let world = World::empty("up");
    let name = world.cgroup_parent().trim_start_matches('/').to_owned();
    let [api, metrics, agent] = [free_port(), free_port(), free_port()].map(|port| port.to_string());
    let mut command: Command = World::binary("xtask");
    command
        .args(["up", "--no-build", "--name", &name])
        .arg("--directory")
        .arg(world.path("up"))
        // Nothing answers there: one is started.
        .arg("--containerd-socket")
        .arg(world.path("none.sock"))
        .arg("--socket")
        .arg(world.path("w.sock"))
        .args(["--api-port", &api, "--metrics-port", &metrics, "--agent-metrics-port", &agent]);
    let up = Process::start("up", &mut command, world.directory.path());
    until("three containers are timed", || {
        let log = up.log();
        let timed = log.lines().filter(|line| line.contains(" running ") && line.matches(" ms").count() == 2);
        (log.contains("Warren is up.") && timed.count() == 3).then_some(())
    });
    let (_, text) = world.get(metrics.parse().expect("a port"), "/metrics").expect("metrics");
    assert!(text.contains("warren_services_total 1"));
    let log = world.path("up.log");
    let status = up.terminate();
    assert!(status.success());
    let log = std::fs::read_to_string(log).expect("a log");
    assert!(log.contains("nothing is left"), "{log}");
    assert!(!world.path("up").exists() && !world.pins().exists());
}
