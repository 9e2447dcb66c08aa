//! Export by OTLP to a real collector.

use std::{collections::HashMap, fs, path::PathBuf, process::Command};

use warren_tests::{Process, WELL_BEHAVED, World, free_port, until};

/// A collector that prints what it receives.
fn collector(world: &World, port: u16) -> Process {
    let binary = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/tools/rotel/rotel/rotel-agent");
    assert!(binary.is_file(), "the collector is missing: run `cargo xtask setup --tests`");
    let http = free_port();
    let mut command = Command::new(binary);
    command
        .arg("start")
        .args([
            "--debug-log",
            "metrics",
            "--debug-log",
            "traces",
            "--debug-log",
            "logs",
            "--debug-log-verbosity",
            "detailed",
            "--exporter",
            "blackhole",
        ])
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

/// The spans that the collector printed, by field.
fn spans(printed: &str) -> Vec<HashMap<&str, &str>> {
    let blocks = printed.split("\nSpan #").skip(1);
    blocks
        .map(|block| {
            // The first of a name: the next block's records come after the last span.
            let mut span = HashMap::new();
            for (name, value) in block.lines().filter_map(|line| line.split_once(':')) {
                span.entry(name.trim()).or_insert(value.trim());
            }
            span
        })
        .collect()
}

#[test]
fn a_collector_receives_every_metric_and_the_kernels_buckets() {
    let mut world = World::with_containerd("otlp");
    let port = free_port();
    let endpoint = format!("http://127.0.0.1:{port}");
    let push = ["--otlp-endpoint", &endpoint, "--otlp-interval-s", "1"];
    // Spans are handed over every so often, here sooner.
    let mut manager = world.manager_command();
    manager.args(push).arg("--otlp-semantic-conventions").env("OTEL_BSP_SCHEDULE_DELAY", "200");
    world.start_manager_as(manager);
    // The collector is away at first: no count is lost, and it is said once.
    world.start_agent(&push);
    world.wait_ready();
    world.create("web", 2, &[], WELL_BEHAVED);
    until("exports have failed", || {
        (world.agent_metrics().sum("warren_otlp_exports_total", &["result=\"failure\"", "signal=\"metrics\""]) >= 2.0)
            .then_some(())
    });
    let collector = collector(&world, port);
    until("exports succeed", || {
        (world.agent_metrics().sum("warren_otlp_exports_total", &["result=\"success\"", "signal=\"metrics\""]) >= 2.0)
            .then_some(())
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

    // Of both processes: spans of the call, of the change to the state within it, and of the work on the container.
    let _ = world.warren(&["service", "rm", "web", "--wait"]).succeeded();
    let received = || collector.log() + &fs::read_to_string(world.path("rotel.log")).unwrap_or_default();
    for sought in [
        "warren.v1.Services/DeleteService",
        "propose",
        "container stop",
        "container clean",
        "rpc.server.call.duration",
        "process.cpu.time",
        "the manager serves",
    ] {
        until(&format!("the collector has {sought}: {}", received()), || received().contains(sought).then_some(()));
    }
    // The change to the state is part of the call that asked for it.
    let printed = received();
    let spans = spans(&printed);
    let call = spans.iter().find(|span| span["Name"] == "warren.v1.Services/DeleteService").expect("the call");
    assert!(spans.iter().any(|span| span["Name"] == "propose" && span["Parent ID"] == call["ID"]), "{spans:?}");
    for signal in ["metrics", "traces", "logs"] {
        let labels = ["result=\"success\"".to_owned(), format!("signal=\"{signal}\"")];
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        assert!(world.manager_metrics().sum("warren_otlp_exports_total", &labels) >= 1.0, "{signal}");
    }
    // What was exported under other names is not on the endpoint as well.
    assert!(world.manager_metrics().names().iter().all(|name| !name.starts_with("rpc_")));
}
