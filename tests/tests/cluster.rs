//! Several managers: how they come together, and what their cluster survives.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use warren_tests::{
    Output, Process, WELL_BEHAVED, World,
    cluster::{Manager, all_vote, found, leader, tokens},
    image_name, until,
};

/// Three managers that have found each other; the worker's token.
fn three(world: &World) -> (Vec<Manager>, String) {
    let mut managers: Vec<_> = ["m1", "m2", "m3"].iter().map(|name| Manager::new(world, name)).collect();
    // The first was running before there was a cluster, the second joins before it runs, the third waits too.
    managers[0].start();
    until("it says that it waits", || {
        let (status, body) = world.get(managers[0].metrics_port(), "/ready")?;
        (status == 503 && body.contains("in no cluster yet")).then_some(())
    });
    let waits = managers[0].warren(&["cluster", "info"]).failed(4);
    assert!(waits.contains("this manager is in no cluster yet: run `warren cluster init`"), "{waits}");
    let (manager_token, worker_token) = tokens(&managers[0].cluster(&["init"]).succeeded());
    until("the first leads", || managers[0].info().filter(|info| info["leaderId"] == "1"));
    let first = managers[0].address();
    let _ = managers[1].cluster(&["join", "--token", &manager_token, &first]).succeeded();
    let awaited = managers[0].warren(&["cluster", "info"]).succeeded();
    assert!(awaited.lines().any(|line| line.starts_with("2 ") && line.contains("awaited")), "{awaited}");
    managers[1].start();
    managers[2].start();
    let _ = managers[2].cluster(&["join", "--token", &manager_token, &first]).succeeded();
    all_vote(&managers);
    assert!(!managers[0].warren(&["cluster", "info"]).succeeded().contains("awaited"));
    (managers, worker_token)
}

/// An agent that joins with a token, on containerd of the world.
fn start_agent(world: &mut World, token: &str, manager: &str) {
    let mut join = World::binary("warren");
    join.args(["cluster", "join", "--token", token, manager]).arg("--data-dir").arg(world.directory.path());
    let _ = World::run(&mut join).succeeded();
    world.start_agent(&[]);
}

fn create(manager: &Manager, name: &str, replicas: u32) -> Output {
    let replicas = replicas.to_string();
    let arguments = ["service", "create", name, "--image", image_name(), "--replicas", &replicas, "--wait"];
    manager.warren(&[&arguments[..], &["--", "sh", "-c", WELL_BEHAVED]].concat())
}

#[test]
fn three_managers_and_an_agent_survive_the_leader() {
    let mut world = World::with_containerd("three");
    let (mut managers, worker_token) = three(&world);
    let followers: Vec<usize> = (0..3).filter(|at| *at != leader(&managers)).collect();
    start_agent(&mut world, &worker_token, &managers[followers[0]].address());
    // Any manager answers, a follower too.
    let _ = create(&managers[followers[0]], "web", 2).succeeded();
    let before = managers[followers[1]].running("web");
    assert_eq!(before.len(), 2, "{before:?}");
    let healthy = managers[followers[0]].warren(&["cluster", "health"]).succeeded();
    for words in ["3 of 3 voters answer, 1 of them may fail", "1 of 1 are ready", "1 of 1 have all their containers"] {
        assert!(healthy.contains(words), "{healthy}");
    }

    let led = leader(&managers);
    let other = (led + 1) % 3;
    let mut follow = managers[other].warren_command();
    follow.args(["events", "--follow", "--tail", "0", "--type", "service", "--type", "node.labelled"]);
    let followed = Process::start("events", &mut follow, world.directory.path());
    let mut seen = 0;
    until("it is followed", || {
        seen += 1;
        let _ = managers[other].warren(&["node", "label", "node-1", &format!("seen={seen}")]).succeeded();
        followed.log().contains("node.labelled").then_some(())
    });
    managers[led].kill();
    // Writes go on with the other two, and nobody's containers notice.
    let began = Instant::now();
    until("a write is acknowledged", || {
        (managers[other].warren(&["service", "scale", "web", "3"]).code == 0).then_some(())
    });
    eprintln!("the next write after the leader's death was acknowledged after {:?}", began.elapsed());
    let after = until("a third runs", || Some(managers[other].running("web")).filter(|running| running.len() == 3));
    assert!(before.iter().all(|container| after.contains(container)), "{before:?} became {after:?}");

    // Whoever follows goes on to, and misses nothing that was changed.
    until("the write is told of", || followed.log().contains("service.updated").then_some(()));
    assert_eq!(followed.log().matches("service.").count(), 1, "{}", followed.log());
    let _ = followed.terminate();
    let health = || managers[other].warren(&["cluster", "health"]);
    let sick = until("it is noticed", || Some(health()).filter(|health| health.stdout.contains(" has not answered ")));
    let voters = format!("2 of 3 voters answer, none of them may fail; manager {} ", led + 1);
    assert!(sick.stdout.contains(&voters), "{sick:?}");
    assert!(sick.failed(1).contains("not as it should be"));
    // Once, and not at every attempt to reach it.
    let now = leader(&managers);
    let told = |what: &str| managers[now].log().lines().filter(|line| line.contains(what)).count();
    until("the leader's log says so", || (told("a manager does not answer") > 0).then_some(()));
    assert_eq!((told("a manager does not answer"), told("HeartbeatWorker")), (1, 0));
    // Without the third as well there would be no majority of those that are left.
    let third = managers[3 - led - other].id();
    let refused = managers[other].warren(&["cluster", "rm", &third]).failed(1);
    assert!(refused.contains("of the 2 managers that would be left to vote 1 can be reached"), "{refused}");
    let refused = managers[other].warren(&["node", "demote", &third]).failed(1);
    assert!(refused.contains("which is no majority"), "{refused}");

    // It comes back and follows.
    managers[led].start();
    until("it has caught up", || managers[led].has_caught_up().then_some(()));
    until("the leader's log says so", || managers[now].log().contains("a manager answers again").then_some(()));
    assert_eq!(managers[led].running("web"), after);
    // All at once.
    for manager in &mut managers {
        manager.kill();
    }
    for manager in &mut managers {
        manager.start();
    }
    until("they answer again", || (managers[0].running("web") == after).then_some(()));
    let _ = create(&managers[1], "more", 1).succeeded();
    // What is the cluster's is counted once, what is a manager's by each.
    let scraped: Vec<_> = managers.iter().map(|manager| world.metrics(manager.metrics_port())).collect();
    let sum = |metric: &str| scraped.iter().map(|metrics| metrics.sum(metric, &[])).sum::<f64>();
    assert_eq!((sum("warren_services_total"), sum("warren_raft_peers_total")), (2.0, 9.0));
    assert_eq!((sum("warren_raft_is_leader"), sum("warren_raft_quorum_ok")), (1.0, 3.0));
    assert_eq!(sum("warren_nodes_total"), 4.0, "a node and three managers");
    // Two of three are no majority of one.
    let led = leader(&managers);
    let (one, two) = ((led + 1) % 3, (led + 2) % 3);
    managers[led].kill();
    managers[one].kill();
    let refused = managers[two].warren(&["service", "scale", "web", "1"]).failed(4);
    assert!(refused.contains("no manager leads") || refused.contains("the leader does not answer"), "{refused}");
    assert!(managers[two].info().is_some(), "it still says what it knows");
    managers[one].start();
    until("two of three decide", || (managers[two].warren(&["service", "scale", "web", "2"]).code == 0).then_some(()));
    until("one of three went", || (managers[two].running("web").len() == 2).then_some(()));
}

#[test]
fn five_managers_go_on_without_two() {
    let world = World::empty("five");
    let mut managers: Vec<_> = (1..=5).map(|number| Manager::new(&world, &format!("m{number}"))).collect();
    let _ = found(&mut managers);
    let led = leader(&managers);
    let at = |further: usize| (led + further) % 5;
    let write = |manager: &Manager, name: &str| {
        manager.warren(&["service", "create", name, "--image", "x", "--pull", "never", "--replicas", "0"])
    };
    // One whose outcome nobody knew may have been written all the same: then there is one of its name (5).
    let written = |manager: &Manager, name: &str| matches!(write(manager, name).code, 0 | 5).then_some(());
    // The leader and another at once.
    managers[led].kill();
    managers[at(1)].kill();
    until("three of five decide", || written(&managers[at(2)], "by-three"));
    managers[at(3)].kill();
    assert_eq!(write(&managers[at(2)], "by-two").code, 4);
    for back in [led, at(1), at(3)] {
        managers[back].start();
    }
    until("five decide", || written(&managers[led], "by-five"));
    for manager in &managers {
        until("it has caught up", || manager.has_caught_up().then_some(()));
        let services = manager.warren(&["service", "ls"]).succeeded();
        assert!(services.contains("by-three") && services.contains("by-five"), "{services}");
    }
}

#[test]
fn a_newcomer_learns_from_a_leader_that_it_does_not_know_yet() {
    let world = World::empty("newcomer");
    let (mut managers, _) = three(&world);
    // The third was let in long after the log's beginning, which is what a newcomer gets first.
    for id in ["1", "2"] {
        let _ = managers[2].warren(&["node", "demote", id]).succeeded();
    }
    assert_eq!(leader(&managers), 2);
    for id in ["1", "2"] {
        let _ = managers[2].warren(&["node", "promote", id]).succeeded();
    }
    let token = managers[2].warren(&["cluster", "token", "create", "--role", "manager"]).succeeded();
    let mut fourth = Manager::new(&world, "m4");
    let _ = fourth.cluster(&["join", "--token", token.trim(), &managers[2].address()]).succeeded();
    fourth.start();
    until("it votes and has all", || (fourth.voters() == 4 && fourth.has_caught_up()).then_some(()));
    managers[0].stop();
    // One that was removed hears so.
    let _ = managers[2].warren(&["cluster", "rm", "2"]).succeeded();
    until("it says so", || {
        let (_, body) = world.get(managers[1].metrics_port(), "/ready")?;
        body.contains("this manager was removed from the cluster").then_some(())
    });
}

#[test]
fn managers_are_removed_and_replaced() {
    let world = World::empty("replaced");
    let (mut managers, _) = three(&world);
    let led = leader(&managers);
    let other = (led + 1) % 3;
    // The one that leads: another leads first.
    let removed = managers[led].id();
    let _ = managers[other].warren(&["cluster", "rm", &removed]).succeeded();
    until("two are left", || (managers[other].voters() == 2).then_some(()));
    // It is no longer let in, and another takes its place under another number.
    let refused = managers[led].warren(&["service", "ls"]);
    assert_ne!(refused.code, 0, "{}", refused.stdout);
    managers[led].kill();
    let token = managers[other].warren(&["cluster", "token", "create", "--role", "manager"]).succeeded();
    let mut fourth = Manager::new(&world, "m4");
    let _ = fourth.cluster(&["join", "--token", token.trim(), &managers[other].address()]).succeeded();
    fourth.start();
    until("three vote again", || (fourth.voters() == 3).then_some(()));
    assert_eq!(fourth.id(), "4");
    let _ = fourth.warren(&["service", "create", "kept", "--image", "x", "--replicas", "0"]).succeeded();
    assert!(managers[other].warren(&["service", "ls"]).succeeded().contains("kept"));
    let unknown = fourth.warren(&["cluster", "rm", "9"]).failed(3);
    assert!(unknown.contains("there is no manager \"9\""), "{unknown}");
    // Who removes the manager that they ask hears that it is done.
    let _ = fourth.warren(&["cluster", "rm", "4"]).succeeded();
    until("two are left", || (managers[other].voters() == 2).then_some(()));
    // One that is removed before it has come finds out.
    let mut fifth = Manager::new(&world, "m5");
    let _ = fifth.cluster(&["join", "--token", token.trim(), &managers[other].address()]).succeeded();
    let _ = managers[other].warren(&["cluster", "rm", "5"]).succeeded();
    fifth.start();
    until("it says so", || fifth.log().contains("this manager was removed from the cluster").then_some(()));
    let (status, body) = world.get(fifth.metrics_port(), "/ready").expect("an answer");
    assert!(status == 503 && body.contains("was removed"), "{body}");
}

#[test]
fn nodes_have_time_to_come_back_when_a_majority_does() {
    let mut world = World::with_containerd("majority");
    let (mut managers, worker_token) = three(&world);
    let led = leader(&managers);
    start_agent(&mut world, &worker_token, &managers[led].address());
    let status = |manager: &Manager| {
        let listed = manager.warren(&["node", "ls", "--format", "json"]).stdout;
        let listed: serde_json::Value = serde_json::from_str(&listed).unwrap_or_default();
        listed[0]["status"].as_str().map(str::to_owned)
    };
    until("the node is ready", || status(&managers[led]).filter(|status| status == "NODE_STATUS_READY"));
    for at in [(led + 1) % 3, (led + 2) % 3] {
        managers[at].kill();
    }
    let none_leads = || managers[led].info().is_some_and(|info| info["leaderId"].is_null());
    until("it no longer takes itself for the leader", || none_leads().then_some(()));
    until("the node has no session", || world.get(world.agent_port, "/ready").filter(|(status, _)| *status == 503));
    // It is silent for longer than it may be: there is nothing to see of that where nobody can be asked.
    std::thread::sleep(Duration::from_secs(12));
    for at in [(led + 1) % 3, (led + 2) % 3] {
        managers[at].start();
    }
    let mut seen = BTreeSet::new();
    until("the node is ready", || {
        seen.extend(status(&managers[led]));
        seen.contains("NODE_STATUS_READY").then_some(())
    });
    assert!(!seen.contains("NODE_STATUS_DOWN"), "{seen:?}");
}

#[test]
fn tokens_let_in_whom_they_are_for_and_nobody_else() {
    let mut world = World::with_containerd("tokens");
    let mut manager = Manager::new(&world, "m1");
    let (manager_token, worker_token) = tokens(&manager.cluster(&["init"]).succeeded());
    assert!(manager.cluster(&["init"]).failed(5).contains("is a manager's already"));
    manager.start();
    let address = manager.address();
    until("it leads", || manager.info().filter(|info| info["leaderId"] == "1"));
    let newcomer = Manager::new(&world, "m2");
    let try_to_join = |token: &str| newcomer.cluster(&["join", "--token", token, &address]);

    assert!(try_to_join("WRN-1-x").failed(2).contains("the token cannot be used"));
    // A digest of another cluster's authority: this one is not believed.
    let other = Manager::new(&world, "elsewhere");
    let (elsewhere, _) = tokens(&other.cluster(&["init"]).succeeded());
    let refused = try_to_join(&elsewhere).failed(4);
    assert!(refused.contains("not of the cluster that the token is for"), "{refused}");
    // The right authority, and a secret that nobody was given.
    let (front, _) = worker_token.rsplit_once('-').expect("parts");
    let (_, secret) = elsewhere.rsplit_once('-').expect("parts");
    let refused = try_to_join(&format!("{front}-{secret}")).failed(6);
    assert!(refused.contains("the token is not valid"), "{refused}");
    // One that has run out, and one that was revoked.
    let short = ["cluster", "token", "create", "--role", "worker", "--lifetime", "1s"];
    let short = manager.warren(&short).succeeded();
    std::thread::sleep(Duration::from_millis(1100));
    assert!(try_to_join(short.trim()).failed(6).contains("the token is not valid"));
    let rotated = manager.warren(&["cluster", "token", "rotate", "--role", "manager"]).succeeded();
    assert!(try_to_join(&manager_token).failed(6).contains("the token is not valid"));
    let listed = manager.warren(&["cluster", "token", "ls"]).succeeded();
    assert_eq!(listed.matches("manager").count(), 1, "{listed}");
    for token in [&worker_token, rotated.trim()] {
        let (_, secret) = token.rsplit_once('-').expect("parts");
        assert!(!listed.contains(secret), "a secret is shown again: {listed}");
        let state = String::from_utf8_lossy(&everything(&manager.directory.join("manager"))).into_owned();
        assert!(!state.contains(secret), "a secret is kept");
    }
    let wrong = manager.warren(&["cluster", "token", "create", "--role", "worker", "--lifetime", "721h"]).failed(2);
    assert!(wrong.contains("lifetime: is not 1 s to 30 days"), "{wrong}");

    // One that was let in and never came can be removed.
    let stranger = newcomer.cluster(&["join", "--token", &worker_token, &address]).succeeded();
    let stranger = stranger.split(' ').nth(4).expect("an id");
    let _ = manager.warren(&["node", "rm", stranger]).succeeded();
    let _ = manager.warren(&["node", "rm", stranger]).failed(3);

    // The agent's own id is the node's from then on, and a node that was removed stays out.
    start_agent(&mut world, &worker_token, &address);
    let mut again = World::binary("warren");
    again.args(["cluster", "join", "--token", &worker_token, &address]).arg("--data-dir").arg(world.directory.path());
    assert!(World::run(&mut again).failed(5).contains("is a node's already"));
    let admitted = manager.warren(&["events", "--type", "node.admitted"]).succeeded();
    assert_eq!(admitted.matches("node.admitted").count(), 2, "{admitted}");
    until("its node is ready", || manager.warren(&["node", "ls"]).stdout.contains("ready").then_some(()));
    let _ = create(&manager, "web", 1).succeeded();
    // One that is connected is removed by force alone, and is out at once: it may be a thief's.
    let refused = manager.warren(&["node", "rm", "node-1"]).failed(1);
    assert!(refused.contains("is not down") && refused.contains("--force"), "{refused}");
    let _ = manager.warren(&["node", "rm", "node-1", "--force"]).succeeded();
    let is_told = |world: &World| {
        let log = world.agent.as_ref().expect("it runs").log();
        log.contains("is not, or no longer, in this cluster").then_some(())
    };
    until("it is turned out", || is_told(&world));
    world.agent.take().expect("it runs").terminate();
    world.start_agent(&[]);
    until("it is not let in", || is_told(&world));
    assert!(!manager.warren(&["node", "ls"]).succeeded().contains("node-1"));
}

/// All bytes of all files below a directory.
fn everything(directory: &std::path::Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in std::fs::read_dir(directory).expect("readable").flatten() {
        if entry.path().is_dir() {
            bytes.extend(everything(&entry.path()));
        } else {
            bytes.extend(std::fs::read(entry.path()).unwrap_or_default());
        }
    }
    bytes
}

#[test]
fn a_containers_world_is_the_same_by_way_of_a_follower() {
    let mut world = World::with_containerd("follower");
    let (managers, worker_token) = three(&world);
    let led = leader(&managers);
    let (one, two) = ((led + 1) % 3, (led + 2) % 3);
    start_agent(&mut world, &worker_token, &managers[one].address());
    let _ = create(&managers[two], "web", 1).succeeded();
    // Streams go through it both ways.
    let shown = managers[two].warren(&["container", "exec", "web-1", "--", "echo", "through"]);
    assert_eq!((shown.code, shown.stdout.as_str()), (0, "through\n"), "{}", shown.stderr);
    let stats = managers[two].warren(&["container", "stats", "--once", "--format", "json"]).succeeded();
    assert!(stats.contains("web-1"), "{stats}");
}

#[test]
fn operators_work_from_machines_that_are_not_of_the_cluster() {
    let mut world = World::with_containerd("operators");
    let (mut managers, worker_token) = three(&world);
    start_agent(&mut world, &worker_token, &managers[0].address());
    // Who logs in keeps what they need in a directory of their own, and knows no socket.
    let home = world.path("ada");
    let command = || {
        let mut command = World::binary("warren");
        command.arg("--identity").arg(&home).env_remove("WARREN_MANAGER").env_remove("WARREN_JOIN_TOKEN");
        command
    };
    let ada = |arguments: &[&str]| World::run(command().args(arguments));
    let invite = |name: &str| managers[1].warren(&["operator", "create", name]).succeeded();
    let printed = invite("ada");
    let words: Vec<_> = printed.split_whitespace().collect();
    assert_eq!(words[..3], ["warren", "login", "--token"], "{printed}");
    assert!(managers.iter().any(|manager| manager.address() == words[4]), "{printed}");
    // Tokens are for what they are for.
    let newcomer = Manager::new(&world, "m4");
    let refused = newcomer.cluster(&["join", "--token", words[3], words[4]]).failed(2);
    assert!(refused.contains("the token is for an operator: use `warren login`"), "{refused}");
    let refused = ada(&["login", "--token", &worker_token, words[4]]).failed(2);
    assert!(refused.contains("the token is for a node: use `warren cluster join`"), "{refused}");
    assert!(ada(&["--manager", words[4], "node", "ls"]).failed(6).contains("nobody has logged in"));
    let _ = ada(&words[1..]).succeeded();
    assert!(ada(&words[1..]).failed(5).contains("is logged in to cluster"));
    let again = World::run(World::binary("warren").arg("--identity").arg(world.path("other")).args(&words[1..]));
    assert!(again.failed(6).contains("the token is not valid, or no longer"));

    let create = ["service", "create", "web", "--image", image_name(), "--wait", "--", "sh", "-c", WELL_BEHAVED];
    let _ = ada(&create).succeeded();
    let shown = ada(&["container", "exec", "web-1", "--", "echo", "through"]);
    assert_eq!((shown.code, shown.stdout.as_str()), (0, "through\n"), "{}", shown.stderr);
    let events = ada(&["events", "--type", "service"]).succeeded();
    assert!(events.contains("service.created") && events.contains("by ada at 127.0.0.1:"), "{events}");
    let listed = invite("bob") + &ada(&["operator", "ls"]).succeeded();
    assert!(listed.contains("has logged in") && listed.contains("invited for 23h"), "{listed}");

    // Any manager will do, and those that are gone are passed over.
    managers[0].kill();
    for _ in 0..4 {
        until("another answers", || (ada(&["service", "ls"]).code == 0).then_some(()));
    }
    managers[0].start();
    all_vote(&managers);

    // Until she is no longer one of them.
    let mut following = Process::start("follow", command().args(["events", "--follow"]), world.directory.path());
    until("she sees what happens", || following.log().contains("bob").then_some(()));
    let _ = managers[2].warren(&["operator", "rm", "ada"]).succeeded();
    until("it ends", || (!following.is_running()).then_some(()));
    let log = following.log();
    assert!(log.trim_end().ends_with("error: you were removed from this cluster"), "{log}");
    assert!(ada(&["service", "ls"]).failed(6).contains("is not, or no longer, in this cluster"));
    let _ = ada(&["logout"]).succeeded();
    assert!(ada(&["logout"]).failed(6).contains("nobody has logged in"));
    assert!(!world.path("ada").join("identity.pem").exists());
}

#[test]
fn scripts_need_no_pauses() {
    let world = World::empty("scripts");
    let mut managers: Vec<_> = ["m1", "m2", "m3"].iter().map(|name| Manager::new(&world, name)).collect();
    managers.iter_mut().for_each(Manager::start);
    for manager in &managers {
        until("it waits", || manager.warren(&["node", "ls"]).stderr.contains("in no cluster yet").then_some(()));
    }
    let cluster = |manager: &Manager, arguments: &[&str]| {
        let directory = manager.directory.display().to_string();
        manager.warren(&[&["cluster"], arguments, &["--data-dir", &directory]].concat())
    };
    // One after the other, with nothing between them: each answers when its command has ended.
    let (manager_token, worker_token) = tokens(&cluster(&managers[0], &["init", "--hostname", "alpha"]).succeeded());
    let _ = managers[0].warren(&["service", "ls"]).succeeded();
    let join = |at: usize, by: usize, name: &str| {
        let by = managers[by].address();
        let arguments = ["join", "--token", &manager_token, &by, "--hostname", name];
        let _ = cluster(&managers[at], &arguments).succeeded();
        assert!(managers[at].info().is_some());
    };
    join(1, 0, "beta");
    join(2, 1, "gamma");
    until("all are known", || {
        let info = managers[2].warren(&["cluster", "info"]).stdout;
        ["alpha", "beta", "gamma"].iter().all(|name| info.contains(name)).then_some(())
    });
    // Beside one that runs, nothing is recovered.
    let refused = cluster(&managers[2], &["recover"]).failed(8);
    assert!(refused.contains("a manager runs with ") && refused.contains("stop it first"), "{refused}");

    // A machine that has joined, and whose agent was never started.
    let address = managers[0].address();
    let agent = |arguments: &[&str]| {
        let mut join = World::binary("warren");
        join.args(["cluster", "join", "--token", &worker_token, &address]).args(arguments);
        World::run(&mut join)
    };
    let place = world.path("worker").display().to_string();
    let joined = agent(&["--data-dir", &place]).succeeded();
    let id = joined.split(' ').nth(4).expect("an id").to_owned();
    let listed = managers[1].warren(&["node", "ls"]).succeeded();
    assert!(listed.lines().any(|line| line.starts_with(&id[..12]) && line.contains("pending")), "{listed}");
    let shown = managers[1].warren(&["node", "inspect", &id[..6]]).succeeded();
    assert!(shown.contains("its agent was never heard of"), "{shown}");
    let health = managers[1].warren(&["cluster", "health"]);
    assert!(health.stdout.contains("1 joined and never started"), "{}", health.stdout);
    let _ = managers[1].warren(&["node", "rm", &id[..6]]).succeeded();
    assert!(!managers[1].warren(&["node", "ls"]).succeeded().contains("pending"));
    // Waited for in vain: it says so, and what it made is there.
    let other = world.path("other").display().to_string();
    let late = agent(&["--data-dir", &other, "--wait", "--timeout", "1s"]).failed(1);
    assert!(late.contains("the agent of this machine is in its place, and not at work after 1 s"), "{late}");
    let alone = Manager::new(&world, "alone");
    let late = cluster(&alone, &["init", "--wait", "--timeout", "1s"]);
    assert_eq!((late.code, tokens(&late.stdout).0.is_empty()), (1, false), "{}", late.stderr);

    // Another cluster's agent is told so.
    let mut another = Manager::new(&world, "another");
    let (_, foreign) = tokens(&another.cluster(&["init"]).succeeded());
    another.start();
    until("it leads", || another.info().filter(|info| info["leaderId"] == "1"));
    let lost = world.path("lost");
    let place = lost.display().to_string();
    let mut join = World::binary("warren");
    join.args(["cluster", "join", "--token", &foreign, &another.address(), "--data-dir", &place]);
    let _ = World::run(&mut join).succeeded();
    std::fs::write(lost.join("agent/managers.json"), format!("[{address:?}]")).expect("writable");
    let mut world = world.and_containerd();
    world.start_agent(&["--data-dir", &lost.join("agent").display().to_string()]);
    let log = until("it says why", || {
        let log = world.agent.as_ref().expect("it runs").log();
        log.contains("no session with a manager").then_some(log)
    });
    assert!(log.contains("cannot be reached: it belongs to another cluster"), "{log}");
    assert!(!log.contains("transport error") && !log.contains("UnknownIssuer"), "{log}");
}

#[test]
fn lists_are_as_long_as_they_are() {
    let mut world = World::empty("lists");
    world.start_manager();
    let label = format!("note={}", "x".repeat(60_000));
    for i in 0..80 {
        let _ = world.warren(&["volume", "create", &format!("v{i}"), "--label", &label]).succeeded();
    }
    let listed = world.warren(&["volume", "ls", "--format", "json"]).succeeded();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&listed).expect("JSON").as_array().map(Vec::len), Some(80));
}
