//! The table of metrics against a system that does everything once.

use std::collections::BTreeSet;

use warren_telemetry::table::{Emitter, METRICS};
use warren_tests::{World, image_name, script_that_asks, until};

/// Families that a single voter without peers cannot have a sample of.
const NEEDS_PEERS: [&str; 1] = ["warren_raft_replication_lag_entries"];

#[test]
fn every_metric_of_the_table_has_a_sample_and_every_sample_is_in_the_table() {
    let mut world = World::with_warren("coverage");
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
    world.start_agent(&[]);
    world.wait_ready();
    world.create("dns", 1, &[], &script_that_asks(world.dns_port, true));

    let of = |emitters: &[Emitter]| -> BTreeSet<String> {
        let metrics = METRICS.iter().filter(|metric| emitters.contains(&metric.emitter));
        metrics.map(|metric| metric.name.to_owned()).filter(|name| !NEEDS_PEERS.contains(&name.as_str())).collect()
    };
    let manager = of(&[Emitter::Manager, Emitter::Agent, Emitter::Both]);
    let agent = of(&[Emitter::Agent, Emitter::Both]);
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
    for (port, known) in
        [(world.manager_port, of(&[Emitter::Manager, Emitter::Agent, Emitter::Both])), (world.agent_port, agent)]
    {
        let (_, text) = world.get(port, "/metrics").expect("metrics");
        let emitted = warren_tests::Metrics::parse(&text).names();
        let unknown: Vec<_> = emitted.difference(&known).collect();
        assert!(unknown.is_empty(), "not in the table: {unknown:?}");
    }
}
