//! What is wrong with a node is said where people look, and keeps containers away that could not be started.

use std::{fs, path::Path, time::Duration};

use serde_json::Value;
use warren_tests::{WELL_BEHAVED, World, image_name, run, start_second, two_nodes, until, until_within};

fn node(world: &World, name: &str) -> Value {
    let shown = world.warren(&["node", "inspect", name, "--format", "json"]).succeeded();
    serde_json::from_str(&shown).expect("JSON")
}

/// Waits until a node has a condition, or none of it any more; what it says of it.
fn until_condition(world: &World, name: &str, kind: &str, holds: bool) -> String {
    until_within(Duration::from_secs(20), &format!("{name}: {kind} {holds}"), || {
        let node = node(world, name);
        let conditions = node["conditions"].as_array().cloned().unwrap_or_default();
        let found = conditions.iter().find(|condition| condition["type"] == kind);
        match found {
            Some(condition) if holds => Some(condition["message"].as_str().unwrap_or_default().to_owned()),
            None if !holds => Some(String::new()),
            _ => None,
        }
    })
}

#[test]
fn a_node_without_containerd_is_not_ready_and_says_so_everywhere() {
    let mut world = World::with_warren("no-containerd");
    world.create("web", 1, &[], WELL_BEHAVED);
    assert!(world.warren(&["node", "ls"]).succeeded().contains(" ready "), "{}", world.warren(&["node", "ls"]).stdout);
    assert_eq!(node(&world, "node-1")["conditions"], Value::Null);
    world.stop_containerd();
    let said = until_condition(&world, "node-1", "containerd_unavailable", true);
    assert!(said.contains("containerd"), "{said}");
    let listed = world.warren(&["node", "ls"]).succeeded();
    assert!(listed.contains("not ready") && listed.contains("containerd_unavailable"), "{listed}");
    let health = world.warren(&["cluster", "health"]);
    assert_eq!(health.code, 1, "{}", health.stdout);
    assert!(health.stdout.contains("node-1 is not ready (containerd_unavailable: "), "{}", health.stdout);
    let (status, _) = world.get(world.agent_port, "/ready").expect("an answer");
    assert_eq!(status, 503);
    let labels = ["node=\"node-1\"", "condition=\"containerd_unavailable\""];
    assert_eq!(world.manager_metrics().sum("warren_node_condition", &labels), 1.0);
    assert_eq!(world.manager_metrics().sum("warren_nodes_total", &["role=\"worker\"", "status=\"not_ready\""]), 1.0);
    // It is given nothing, and what waits says why.
    let arguments = ["service", "create", "next", "--image", image_name(), "--wait", "--timeout", "2"];
    let said = world.warren(&arguments).failed(1);
    assert!(said.contains("no suitable node (1 node: 1 not ready)"), "{said}");
    world.start_containerd();
    until_condition(&world, "node-1", "containerd_unavailable", false);
    assert_eq!(world.manager_metrics().sum("warren_node_condition", &labels), 0.0);
    let _ = world.warren(&["service", "wait", "next", "--for", "ready", "--timeout", "20"]).succeeded();
    let events = world.warren(&["events", "--tail", "100"]).succeeded();
    for expected in ["node.condition ", "node.condition_cleared", "node.not_ready", "node.ready"] {
        assert!(events.contains(expected), "{expected}: {events}");
    }
    let _ = world.warren(&["service", "rm", "web", "next", "--wait"]).succeeded();
}

/// A file system of its own on a directory, while it lives.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn on(directory: &'a Path) -> Self {
        fs::create_dir_all(directory).expect("writable");
        let shown = directory.display().to_string();
        let _ = run("mount", &["-t", "tmpfs", "-o", "size=32m", "tmpfs", &shown]).succeeded();
        Self(directory)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = run("umount", &["-l", &self.0.display().to_string()]);
    }
}

#[test]
fn a_node_without_disk_space_swallows_no_containers() {
    let (world, other, second) = two_nodes("disk", &[]);
    // The other node's agent again, on a small disk that fills up.
    let _ = second.terminate();
    let directory = world.path("node-2");
    let kept: Vec<_> =
        ["node-id"].into_iter().map(|file| (file, fs::read(directory.join(file)).expect(file))).collect();
    let small = Small::on(&directory);
    for (file, bytes) in kept {
        fs::write(directory.join(file), bytes).expect("writable");
    }
    let second = start_second(&world, &other, &[]);
    until("both are ready", || {
        let listed = world.warren(&["node", "ls", "--format", "json"]).succeeded();
        (listed.matches("NODE_STATUS_READY").count() == 2).then_some(())
    });
    world.create("web", 2, &[], WELL_BEHAVED);
    fs::write(directory.join("ballast"), vec![0; 31 << 20])
        .or_else(|error| if error.kind() == std::io::ErrorKind::StorageFull { Ok(()) } else { Err(error) })
        .expect("it fills up");
    let said = until_condition(&world, "node-2", "disk_full", true);
    assert!(said.contains(" MB left"), "{said}");
    let _ = world.warren(&["service", "scale", "web", "6", "--wait"]).succeeded();
    let id = node(&world, "node-2")["id"].clone();
    let on_it = world.containers("web").iter().filter(|container| container["nodeId"] == id).count();
    assert!(on_it <= 1, "{on_it}");
    fs::remove_file(directory.join("ballast")).expect("it is there");
    until_condition(&world, "node-2", "disk_full", false);
    let _ = world.warren(&["service", "scale", "web", "9", "--wait"]).succeeded();
    let on_it = world.containers("web").iter().filter(|container| container["nodeId"] == id).count();
    assert!(on_it >= 4, "it takes containers again: {on_it}");
    let _ = world.warren(&["service", "rm", "web", "--wait"]).succeeded();
    let _ = second.terminate();
    drop(small);
    drop(other);
}

#[test]
fn what_fails_to_start_on_a_node_is_tried_on_another() {
    let (world, other, second) = two_nodes("elsewhere", &[]);
    // The other node can start nothing at all: where its containers' namespaces are kept is no directory.
    let kept = world.path("netns-node-2");
    fs::remove_dir_all(&kept).expect("it is there");
    fs::write(&kept, b"").expect("writable");
    let arguments =
        ["service", "create", "web", "--image", image_name(), "--replicas", "4", "--restart-delay-ms", "100"];
    let _ = world
        .warren(&[&arguments[..], &["--wait", "--timeout", "30", "--", "sh", "-c", WELL_BEHAVED]].concat())
        .succeeded();
    let here = node(&world, "node-1")["id"].clone();
    let all = world.containers("web");
    let running = all.iter().filter(|container| container["status"]["state"] == "CONTAINER_STATE_RUNNING");
    assert!(running.clone().count() == 4 && running.clone().all(|container| container["nodeId"] == here), "{all:?}");
    fs::remove_file(&kept).expect("it is there");
    fs::create_dir(&kept).expect("writable");
    let _ = world.warren(&["service", "rm", "web", "--wait"]).succeeded();
    let _ = second.terminate();
    drop(other);
}
