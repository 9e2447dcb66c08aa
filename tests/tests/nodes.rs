//! What operators do with nodes, and what becomes of services when nodes go.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde_json::Value;
use warren_tests::{WELL_BEHAVED, World, both_ready, start_second, two_nodes, until, until_within};

/// Ids of nodes by name.
fn nodes(world: &World) -> BTreeMap<String, Value> {
    let listed = world.warren(&["node", "ls", "--format", "json"]).succeeded();
    let listed: Vec<Value> = serde_json::from_str(&listed).expect("a list");
    listed.into_iter().map(|n| (n["description"]["hostname"].as_str().expect("a name").to_owned(), n)).collect()
}

/// A service's running containers: id and node.
fn running(world: &World, service: &str) -> BTreeMap<String, String> {
    let nodes = nodes(world);
    let name = |id: &Value| nodes.iter().find(|(_, node)| node["id"] == *id).map(|(name, _)| name.clone());
    let containers = world.containers(service).into_iter();
    let running = containers.filter(|c| {
        c["status"]["state"] == "CONTAINER_STATE_RUNNING" && c["desiredState"] == "CONTAINER_STATE_RUNNING"
    });
    running.map(|c| (c["id"].as_str().expect("an id").to_owned(), name(&c["nodeId"]).unwrap_or_default())).collect()
}

fn count_on(world: &World, service: &str, node: &str) -> usize {
    running(world, service).values().filter(|on| *on == node).count()
}

/// Waits until a service has so many containers on each of the two nodes.
fn until_on(world: &World, service: &str, first: usize, second: usize) {
    until(&format!("{service} has {first} and {second} containers"), || {
        let on = (count_on(world, service, "node-1"), count_on(world, service, "node-2"));
        (on == (first, second)).then_some(())
    });
}

#[test]
fn a_node_is_drained_without_its_services_going_down() {
    let (world, _other, _second) = two_nodes("drained", &[]);
    world.create("web", 4, &[], WELL_BEHAVED);
    world.create("everywhere", 2, &[], WELL_BEHAVED);
    let global = ["service", "create", "agent", "--image", warren_tests::image_name(), "--global", "--wait", "--"];
    let _ = world.warren(&[&global[..], &["sh", "-c", WELL_BEHAVED]].concat()).succeeded();
    until_on(&world, "web", 2, 2);
    until_on(&world, "agent", 1, 1);

    let mut drain = World::binary("warren");
    drain.args(["--manager", &world.manager_address(), "node", "drain", "node-2", "--wait", "--timeout", "60"]);
    let mut draining = drain.spawn().expect("it can be run");
    let mut fewest = usize::MAX;
    let ended = until_within(Duration::from_secs(60), "the node is empty", || {
        fewest = fewest.min(running(&world, "web").len());
        draining.try_wait().expect("a child")
    });
    assert!(ended.success());
    assert!(fewest >= 3, "of 4 containers only {fewest} were left");
    until_on(&world, "web", 4, 0);
    until_on(&world, "everywhere", 2, 0);
    until_on(&world, "agent", 1, 0);
    assert!(world.warren(&["node", "ls"]).succeeded().contains("ready, drained"));
    // Nothing new goes there, and it says so.
    let _ = world.warren(&["service", "create", "late", "--image", "x", "--constraint", "node.hostname==node-2"]);
    until("it says why", || {
        let shown = world.warren(&["service", "ps", "late"]).succeeded();
        (shown.contains("1 drained") && shown.contains("1 not node.hostname==node-2")).then_some(())
    });

    let _ = world.warren(&["node", "uncordon", "node-2"]).succeeded();
    until_on(&world, "agent", 1, 1);
    let _ = world.warren(&["service", "scale", "web", "8"]).succeeded();
    until_on(&world, "web", 4, 4);
    // Who did it is known, and from where.
    let events = world.warren(&["events", "--type", "node."]).succeeded();
    let drained = events.lines().find(|line| line.contains("node.drained")).expect("the event");
    assert!(drained.contains("node-2") && drained.contains("by root at the socket of "), "{events}");
    assert!(events.contains("node.uncordoned"), "{events}");
    let metrics = world.manager_metrics();
    assert!(metrics.sum("warren_events_total", &["type=\"node.drained\""]) >= 1.0);
}

#[test]
fn a_cordoned_node_keeps_what_it_has_and_labels_decide_where_services_go() {
    let (world, _other, _second) = two_nodes("cordoned", &["--label", "disk=slow"]);
    world.create("web", 2, &[], WELL_BEHAVED);
    until_on(&world, "web", 1, 1);
    let _ = world.warren(&["node", "cordon", "node-2"]).succeeded();
    let _ = world.warren(&["service", "scale", "web", "4"]).succeeded();
    until_on(&world, "web", 3, 1);
    let _ = world.warren(&["node", "uncordon", "node-2"]).succeeded();

    // What a node says of itself never passes for what an operator says of it.
    let labels = |name: &str| nodes(&world)[name]["labels"].clone();
    assert_eq!(labels("node-2"), serde_json::json!({"agent/disk": "slow"}));
    let _ = world.warren(&["node", "label", "node-2", "disk=fast", "zone=eu"]).succeeded();
    assert_eq!(labels("node-2"), serde_json::json!({"agent/disk": "slow", "disk": "fast", "zone": "eu"}));
    world.create("own", 2, &["--constraint", "node.labels.agent/disk==slow"], WELL_BEHAVED);
    until_on(&world, "own", 1, 1);
    world.create("fast", 2, &["--constraint", "node.labels.disk==fast"], WELL_BEHAVED);
    until_on(&world, "fast", 0, 2);
    world.create("slow", 2, &["--constraint", "node.labels.disk!=fast"], WELL_BEHAVED);
    until_on(&world, "slow", 2, 0);
    // A node that is no longer what a service asks for is left.
    let _ = world.warren(&["node", "label", "node-1", "disk=fast"]).succeeded();
    let _ = world.warren(&["node", "label", "node-2", "disk-"]).succeeded();
    assert_eq!(labels("node-2"), serde_json::json!({"agent/disk": "slow", "zone": "eu"}));
    until_on(&world, "fast", 2, 0);
    until_on(&world, "slow", 0, 2);
    for (wrong, why) in [
        (vec!["node", "label", "node-2", "nonsense"], "is neither NAME=VALUE nor NAME-"),
        (vec!["node", "label", "node-2", "-x=1"], "unexpected argument"),
        (vec!["node", "label", "node-2", "a b=1"], "is not 1 to 128 of letters"),
        (vec!["node", "label", "node-2", "agent/disk=fast"], "is for what the agent's configuration says"),
        (vec!["service", "create", "x", "--image", "x", "--constraint", "zone==eu"], "spec.constraints[0]: is not"),
        (vec!["service", "create", "x", "--image", "x", "--lost-after", "25h"], "spec.lost_after: is not between"),
    ] {
        let refused = world.warren(&wrong);
        assert_eq!(refused.code, 2, "{wrong:?}: {}", refused.stderr);
        assert!(refused.stderr.contains(why), "{wrong:?}: {}", refused.stderr);
    }
    let _ = world.warren(&["node", "drain", "nobody"]).failed(3);
}

#[test]
fn a_service_says_how_long_its_node_may_be_away() {
    let (world, other, second) = two_nodes("lost", &[]);
    world.create("patient", 2, &["--lost-after", "1h"], WELL_BEHAVED);
    world.create("hasty", 2, &[], WELL_BEHAVED);
    until_on(&world, "patient", 1, 1);
    until_on(&world, "hasty", 1, 1);
    let before = running(&world, "patient");
    let tasks = || -> BTreeSet<String> {
        world.ctr_of("node-2", &["tasks", "ls", "-q"]).succeeded().lines().map(str::to_owned).collect()
    };
    let first = tasks();
    assert_eq!(first.len(), 2);

    second.kill();
    until_within(Duration::from_secs(60), "the node is down", || {
        world.warren(&["node", "ls"]).succeeded().contains("down").then_some(())
    });
    until("the hasty one's container is replaced", || (count_on(&world, "hasty", "node-1") == 2).then_some(()));
    assert_eq!(running(&world, "patient"), before, "it waits");
    assert_eq!(tasks(), first, "its containers go on without it");
    // What they do nobody knows.
    let shown = world.warren(&["service", "ps", "patient"]).succeeded();
    assert_eq!(shown.matches(" running (node down) ").count(), 1, "{shown}");
    let listed = world.warren(&["service", "ls"]).succeeded();
    let counted = |service: &str| listed.lines().find(|line| line.contains(service)).expect("its line").to_owned();
    assert!(counted(" patient ").contains(" 1/2 ") && counted(" hasty ").contains(" 2/2 "), "{listed}");

    // It comes back: what was given up is removed, what was waited for is the same as before.
    let _second = start_second(&world, &other, &[]);
    both_ready(&world);
    until("what was replaced is gone", || (tasks().len() == 1).then_some(()));
    assert_eq!(running(&world, "patient"), before);
    until_on(&world, "hasty", 2, 0);
    let events = world.warren(&["events"]).succeeded();
    assert!(events.contains("node.down") && events.contains("node.ready"), "{events}");
    let assigned: Vec<_> = events.lines().filter(|line| line.contains("container.assigned")).collect();
    assert_eq!(assigned.iter().filter(|line| line.ends_with(" to node-2")).count(), 2, "{events}");
    assert_eq!(assigned.iter().filter(|line| line.ends_with(" to node-1")).count(), 3, "{events}");
    let latest = world.warren(&["events", "--tail", "3"]).succeeded();
    assert!(latest.lines().count() == 3 && events.ends_with(&latest), "{latest} is not the end of {events}");
}
