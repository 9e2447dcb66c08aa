//! Export by OTLP to a real collector.

use std::{fs, path::PathBuf, process::Command};

use warren_tests::{Process, WELL_BEHAVED, World, free_port, until};

/// A collector that prints what it receives.
fn collector(world: &World, port: u16) -> Process {
    let binary = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/tools/rotel/rotel/rotel-agent");
    assert!(binary.is_file(), "the collector is missing: run `cargo xtask setup --tests`");
    let http = free_port();
    let mut command = Command::new(binary);
    command
        .arg("start")
        .args(["--debug-log", "metrics", "--debug-log-verbosity", "detailed", "--exporter", "blackhole"])
        .args([
            "--otlp-grpc-endpoint",
            &format!("127.0.0.1:{port}"),
            "--otlp-http-endpoint",
            &format!("127.0.0.1:{http}"),
        ])
        .arg("--pid-file")
        .arg(world.path("rotel.pid"))
        .arg("--log-file")
        .arg(world.path("rotel.log"));
    Process::start("collector", &mut command, world.directory.path())
}

#[test]
fn a_collector_receives_every_metric_and_the_kernels_buckets() {
    let mut world = World::with_containerd("otlp");
    let port = free_port();
    let endpoint = format!("http://127.0.0.1:{port}");
    world.start_manager();
    // The collector is away at first: nothing is lost, and it is said once.
    world.start_agent(&["--otlp-endpoint", &endpoint, "--otlp-interval-s", "1"]);
    world.wait_ready();
    world.create("web", 2, &[], WELL_BEHAVED);
    until("exports have failed", || {
        (world.agent_metrics().sum("warren_otlp_exports_total", &["result=\"failure\""]) >= 2.0).then_some(())
    });
    let collector = collector(&world, port);
    until("exports succeed", || {
        (world.agent_metrics().sum("warren_otlp_exports_total", &["result=\"success\""]) >= 2.0).then_some(())
    });
    let received = until("the collector shows them", || {
        let log = collector.log() + &fs::read_to_string(world.path("rotel.log")).unwrap_or_default();
        log.contains("warren_container_start_duration_seconds").then_some(log)
    });
    for name in world.agent_metrics().names() {
        assert!(received.contains(&name), "{name} did not arrive");
    }
    assert!(received.contains("ExponentialHistogram"), "kernel histograms are exponential\n{received}");
    let log = world.agent.as_ref().expect("it runs").log();
    assert_eq!(log.matches("metrics cannot be exported by OTLP").count(), 1, "{log}");
    assert_eq!(log.matches("metrics are exported by OTLP again").count(), 1, "{log}");
}
