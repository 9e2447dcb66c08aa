//! Agents and managers that die: nothing acknowledged is lost, nothing is counted twice, no container notices.

use std::{
    process::Command,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    thread,
    time::Duration,
};

use warren_tests::{WELL_BEHAVED, World, until};

fn counts(world: &World) -> [f64; 3] {
    let metrics = world.agent_metrics();
    ["create", "start", "stop"]
        .map(|operation| metrics.sum(&format!("warren_container_{operation}_duration_seconds_count"), &[]))
}

#[test]
fn an_agent_killed_and_restarted_changes_no_container_and_loses_no_count() {
    let mut world = World::with_warren("agent-9");
    world.create("web", 3, &[], WELL_BEHAVED);
    let before = world.tasks();
    assert_eq!(before.len(), 3);
    assert_eq!(counts(&world), [3.0, 3.0, 0.0]);

    world.agent.take().expect("it runs").kill();
    // One of them ends while nobody looks: the kernel counts its stop.
    let victim = &before[0].0;
    assert_eq!(world.ctr(&["tasks", "kill", "--signal", "SIGTERM", victim]).code, 0);
    until("it has ended", || (!world.tasks().iter().any(|(id, _)| id == victim)).then_some(()));
    let date = Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%S"]).output().expect("date runs").stdout;
    let ended_by = String::from_utf8_lossy(&date).trim().to_owned();
    // The next agent's own time would be another second.
    thread::sleep(Duration::from_millis(1100));

    world.start_agent(&[]);
    world.wait_ready();
    until("it was replaced", || (world.tasks().len() == 3).then_some(()));
    let record = world.container_when("web", "its end is known", |c| c["id"] == victim.as_str());
    let finished_at = record["status"]["finishedAt"].as_str().expect("a time");
    assert!(finished_at[..ended_by.len()] <= *ended_by, "it ended by {ended_by} and is said to at {finished_at}");
    let after = world.tasks();
    for survivor in &before[1..] {
        assert!(after.contains(survivor), "{survivor:?} is not among {after:?}");
    }
    assert_eq!(counts(&world), [4.0, 4.0, 1.0]);
    until("the manager has the counts", || {
        let metrics = world.manager_metrics();
        (metrics.sum("warren_container_stop_duration_seconds_count", &[]) == 1.0
            && metrics.sum("warren_container_create_duration_seconds_count", &[]) == 4.0)
            .then_some(())
    });
    assert_eq!(world.manager_metrics().sum("warren_agent_session_reconnects_total", &["node=\"node-1\""]), 1.0);
}

#[test]
fn a_manager_killed_and_restarted_has_every_acknowledged_service() {
    let mut world = World::with_warren("manager-9");
    world.create("web", 3, &[], WELL_BEHAVED);
    let before = world.tasks();

    // Services are created while the manager dies: what was acknowledged must be there, what was not may be.
    let mut acknowledged = vec!["web".to_owned()];
    for round in 0..3 {
        let victim = world.manager.take().expect("it runs");
        let count = AtomicUsize::new(0);
        let created = thread::scope(|scope| {
            let creator = scope.spawn(|| {
                let mut created = Vec::new();
                for i in 0..200 {
                    let name = format!("s-{round}-{i}");
                    let arguments = ["service", "create", &name, "--image", "nowhere", "--replicas", "0"];
                    if world.warren(&arguments).code != 0 {
                        break;
                    }
                    created.push(name);
                    count.store(created.len(), Relaxed);
                }
                created
            });
            // Three rounds of these are more than a snapshot's distance.
            until("services are created", || (count.load(Relaxed) >= 40).then_some(()));
            thread::sleep(Duration::from_millis(7 * round));
            victim.kill();
            creator.join().expect("no panic")
        });
        assert!(!created.is_empty() && created.len() < 200, "the manager died in between: {}", created.len());
        acknowledged.extend(created);
        world.start_manager();
        let listed = world.warren(&["service", "ls"]).succeeded();
        for name in &acknowledged {
            assert!(listed.contains(&format!(" {name} ")), "{name} is lost:\n{listed}");
        }
    }
    until("the agent is back in session", || {
        (world.manager_metrics().sum("warren_agent_sessions", &[]) == 1.0).then_some(())
    });
    assert_eq!(world.tasks(), before, "no container was touched");
    until("the kernel's counts are back", || {
        let metrics = world.manager_metrics();
        (metrics.sum("warren_container_start_duration_seconds_count", &[]) == 3.0).then_some(())
    });
    // The log is longer than a snapshot's distance: some of this came from one.
    assert!(world.path("manager/raft/snapshot/current.snapshot").exists());
}

#[test]
fn what_is_assigned_to_nobody_is_removed() {
    let mut world = World::with_warren("orphans");
    world.create("web", 2, &[], WELL_BEHAVED);
    world.agent.take().expect("it runs").kill();
    let _ = world.warren(&["service", "rm", "web"]).succeeded();
    // And one that no manager ever knew.
    let stranger = world.ctr(&["run", "--detach", warren_tests::image_name(), "stranger"]);
    assert_eq!(stranger.code, 0, "{}", stranger.stderr);
    assert_eq!(world.tasks().len(), 3);
    world.start_agent(&[]);
    until("all are gone", || world.leftovers().is_empty().then_some(()));
    // Nor may one be made beside a running agent.
    let stranger = world.ctr(&["run", "--detach", warren_tests::image_name(), "another-stranger"]);
    assert_eq!(stranger.code, 0, "{}", stranger.stderr);
    until("it is gone too", || world.leftovers().is_empty().then_some(()));
    let listed = world.warren(&["container", "ls", "--all", "--format", "json"]).succeeded();
    until("their records too", || {
        (world.warren(&["container", "ls", "--all", "--format", "json"]).stdout.trim() == "[]").then_some(())
    });
    drop(listed);
}

#[test]
fn containers_and_counts_survive_a_restart_of_containerd() {
    let mut world = World::with_warren("containerd");
    world.create("web", 2, &[], WELL_BEHAVED);
    let before = world.tasks();
    world.stop_containerd();
    until("the agent says so", || {
        let (status, body) = world.get(world.agent_port, "/ready")?;
        (status == 503 && body.contains("containerd")).then_some(())
    });
    world.start_containerd();
    world.wait_ready();
    assert_eq!(world.tasks(), before);
    let _ = world.warren(&["service", "rm", "web", "--wait"]).succeeded();
    until("nothing is left", || world.leftovers().is_empty().then_some(()));
    assert_eq!(counts(&world), [2.0, 2.0, 2.0]);
}

#[test]
fn an_idle_cluster_writes_nothing() {
    let world = World::with_warren("idle");
    world.create("web", 1, &[], WELL_BEHAVED);
    let index = || world.manager_metrics().sum("warren_raft_log_index", &[]);
    // The last report of the container's timing is written, and the node's first.
    let mut before = index();
    until("nothing more is to be written", || {
        thread::sleep(Duration::from_secs(1));
        let now = index();
        (std::mem::replace(&mut before, now) == now).then_some(())
    });
    thread::sleep(Duration::from_secs(8));
    assert_eq!(index(), before, "heartbeats and telemetry must not reach the log");
    // Longer than any timeout after its election, the manager is still fine.
    thread::sleep(Duration::from_secs(3));
    let (status, body) = world.get(world.manager_port, "/ready").expect("an answer");
    assert_eq!(status, 200, "{body}");
    assert_eq!(world.manager_metrics().sum("warren_raft_quorum_ok", &[]), 1.0);
}
