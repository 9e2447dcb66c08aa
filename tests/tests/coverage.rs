//! The table of metrics against a system that does everything once.

use std::collections::BTreeSet;

use warren_telemetry::table::{Emitter, Kind, METRICS, Metric, find};
use warren_tests::{World, image_name, run, script_that_asks, until};

/// Families that a single voter without peers cannot have a sample of.
const NEEDS_PEERS: [&str; 1] = ["warren_raft_replication_lag_entries"];

/// Has the processes say when they make up a sample.
const LOG: &str = "info,warren_telemetry=trace";

#[test]
fn every_metric_of_the_table_has_a_sample_and_every_sample_is_in_the_table() {
    let mut world = World::with_containerd("coverage");
    // Where a sample is made up because nobody has one, or left out because it is not in the table, they say so.
    let mut manager = world.manager_command();
    manager.args(["--log", LOG]);
    world.start_manager_as(manager);
    world.start_agent(&["--log", LOG]);
    world.wait_ready();
    // Queries from containers, one of which times out; a service created, changed and removed; one that nobody can place.
    let script = script_that_asks(world.dns_port, false);
    world.create("web", 2, &[], &script);
    let _ = world.warren(&["service", "scale", "web", "1", "--wait"]).succeeded();
    let huge = ["service", "create", "huge", "--image", image_name(), "--reserve-cpu", "1000"];
    let _ = world.warren(&huge).succeeded();
    let crash = ["service", "create", "crash", "--image", image_name(), "--restart-delay-ms", "10", "--", "false"];
    let _ = world.warren(&crash).succeeded();
    until("one was replaced", || {
        (world.manager_metrics().sum("warren_container_restarts_total", &[]) >= 1.0).then_some(())
    });
    let _ = world.warren(&["service", "rm", "web", "huge", "crash", "--wait"]).succeeded();
    // A second session, and a second life of the manager, which builds and installs snapshots.
    for i in 0..60 {
        let name = format!("filler-{i}");
        let _ = world.warren(&["service", "create", &name, "--image", "x", "--replicas", "0"]).succeeded();
        let _ = world.warren(&["service", "rm", &name]).succeeded();
    }
    until("a snapshot was built", || {
        (world.manager_metrics().sum("warren_raft_snapshots_total", &["operation=\"build\"", "result=\"success\""])
            >= 1.0)
            .then_some(())
    });
    let built = world.manager_metrics();
    assert!(built.sum("warren_raft_snapshot_size_bytes", &[]) > 0.0);
    world.agent.take().expect("it runs").kill();
    world.start_agent(&["--log", LOG]);
    world.wait_ready();
    let value = world.path("value");
    std::fs::write(&value, "secret").expect("writable");
    let _ = world.warren(&["secret", "create", "key", &value.display().to_string()]).succeeded();
    let _ = world.warren(&["volume", "create", "v"]).succeeded();
    world.create(
        "dns",
        1,
        &["--health", "exec:true", "--secret", "key", "--mount", "type=volume,source=v,target=/v"],
        &script_that_asks(world.dns_port, true),
    );
    // Of the node's resolver: what it knows, and what the node's own would have to know, which are none here.
    for name in ["dns", "elsewhere.example"] {
        let _ = run("dig", &["@169.254.1.1", "+tries=1", "+timeout=5", name]);
    }

    let of = |emitters: &[Emitter]| -> BTreeSet<String> {
        let metrics = METRICS.iter().filter(|metric| emitters.contains(&metric.emitter));
        metrics.map(|metric| metric.name.to_owned()).filter(|name| !NEEDS_PEERS.contains(&name.as_str())).collect()
    };
    let manager = of(&[Emitter::Manager, Emitter::Agent, Emitter::Both]);
    let agent = of(&[Emitter::Agent, Emitter::Node, Emitter::Both]);
    // Samples come with what happens; some a scrape or a snapshot later.
    let missing = |wanted: &BTreeSet<String>, port: u16| -> Vec<String> {
        let (_, text) = world.get(port, "/metrics").expect("metrics");
        wanted.difference(&warren_tests::Metrics::parse(&text).names()).cloned().collect()
    };
    let mut last = Vec::new();
    let complete = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        until("every metric has a sample", || {
            last = missing(&manager, world.manager_port);
            last.extend(missing(&agent, world.agent_port));
            last.is_empty().then_some(())
        });
    }));
    assert!(complete.is_ok(), "without a sample: {last:?}");
    let processes = [
        (&world.manager, world.manager_port, of(&[Emitter::Manager, Emitter::Agent, Emitter::Both])),
        (&world.agent, world.agent_port, agent),
    ];
    for (process, port, known) in processes {
        let process = process.as_ref().expect("it runs");
        let said_before = process.log().len();
        let (_, text) = world.get(port, "/metrics").expect("metrics");
        let said = &process.log()[said_before..];
        assert!(!said.contains("shown as zero"), "nobody emits these:\n{said}");
        assert!(!process.log().contains("is not in the table of metrics"), "{}", process.log());

        let metrics = warren_tests::Metrics::parse(&text);
        let emitted = metrics.names();
        let unknown: Vec<_> = emitted.difference(&known).collect();
        assert!(unknown.is_empty(), "not in the table: {unknown:?}");
        for sample in text.lines().filter(|line| !line.starts_with('#')) {
            let (metric, labels) = taken_apart(sample);
            let expected: BTreeSet<&str> = metric.labels.iter().copied().collect();
            assert_eq!(labels, expected, "{sample}");
        }
        // An instrument that is there and that nobody records into stays at zero.
        let idle: Vec<_> = emitted
            .iter()
            .filter(|name| {
                let histogram = find(name).is_some_and(|metric| metric.kind == Kind::Histogram);
                let series = if histogram { format!("{name}_count") } else { (*name).clone() };
                find(name).is_some_and(|metric| metric.kind != Kind::Gauge) && metrics.sum(&series, &[]) == 0.0
            })
            .filter(|name| !NOT_PROVOKED.contains(&name.as_str()))
            .collect();
        assert!(idle.is_empty(), "nothing was counted in {idle:?}");
    }
}

/// What this test does not bring about; the others do.
const NOT_PROVOKED: [&str; 11] = [
    "warren_container_out_of_memory_total",
    "warren_log_lines_lost_total",
    "warren_container_sigterm_ignored_total",
    "warren_container_start_failures_total",
    "warren_container_stop_escalations_total",
    "warren_dns_retransmits_total",
    "warren_dns_unmatched_responses_total",
    "warren_probe_events_lost_total",
    // Nothing is pushed, and the kernel's BPF statistics are off.
    "warren_probe_run_seconds_total",
    "warren_otlp_exports_total",
    "warren_probe_runs_total",
];

/// A sample's metric and its labels' names.
fn taken_apart(sample: &str) -> (&'static Metric, BTreeSet<&str>) {
    let (series, _) = sample.rsplit_once(' ').expect("a sample");
    let (name, labels) = series.split_once('{').unwrap_or((series, ""));
    let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
    let metric = find(name).or_else(|| family.and_then(find)).unwrap_or_else(|| panic!("{sample}"));
    // No value of this test's has a quote or a comma in it.
    let names = labels.trim_end_matches('}').split(',').filter_map(|label| label.split_once('='));
    (metric, names.map(|(name, _)| name).filter(|name| *name != "le").collect())
}
