//! A cluster of real processes, each on a machine of its own, while managers are killed, networks are cut, disks are full and
//! everything is restarted: no acknowledged write is lost, and no container notices.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use serde_json::Value;
use warren_tests::{
    Hosts, Load, Process, WELL_BEHAVED, World,
    cluster::{self, Manager, all_vote, follows, leader},
    image_name, run, until_within,
};

const CLIENTS: usize = 4;
/// Writes that are acknowledged before the next thing goes wrong.
const BETWEEN: usize = 40;
const PATIENCE: Duration = Duration::from_secs(60);

/// Three managers and a node, each on a machine of its own.
struct Cluster {
    managers: Vec<Manager>,
    agent: Option<Process>,
    hosts: Hosts,
    world: World,
}

/// The node's machine.
const NODE: usize = 3;

impl Cluster {
    fn new(name: &str) -> Self {
        let world = World::empty(name);
        let hosts = Hosts::new(&world, 4);
        let world = world.and_containerd();
        let manager = |at: usize| Manager::at(&world, &format!("m{at}"), &Hosts::address(at), Some(hosts.name(at)));
        let mut managers: Vec<_> = (0..3).map(manager).collect();
        let token = cluster::found(&mut managers);
        let place = world.path("node").display().to_string();
        let mut join = World::binary("warren");
        join.args(["cluster", "join", "--token", &token, &managers[0].address(), "--data-dir", &place]);
        let mut inside = std::process::Command::new("nsenter");
        inside.arg(format!("--net=/run/netns/{}", hosts.name(NODE))).arg(join.get_program()).args(join.get_args());
        let _ = World::run(&mut inside).succeeded();
        let agent = Some(start_agent(&world, &hosts));
        let cluster = Self { managers, agent, hosts, world };
        until_within(PATIENCE, "the node is ready", || {
            cluster.managers[0].warren(&["node", "ls"]).stdout.contains("ready").then_some(())
        });
        let create = ["service", "create", "web", "--image", image_name(), "--replicas", "3", "--wait", "--"];
        let _ = cluster.managers[0].warren(&[&create[..], &["sh", "-c", WELL_BEHAVED]].concat()).succeeded();
        cluster
    }

    fn load(&self) -> Load {
        Load::start(CLIENTS, &self.managers.iter().map(Manager::socket).collect::<Vec<_>>())
    }

    /// The node's containers as containerd has them: ids and process ids.
    fn tasks(&self) -> Vec<String> {
        let listed = self.world.ctr_of("node", &["tasks", "ls"]).succeeded();
        let mut tasks: Vec<_> = listed.lines().skip(1).map(str::to_owned).collect();
        tasks.sort();
        tasks
    }

    /// What a manager exports.
    fn metrics(&self, at: usize) -> String {
        let url = format!("http://127.0.0.1:{}/metrics", self.managers[at].metrics_port());
        let inside = format!("--net=/run/netns/{}", self.hosts.name(at));
        run("nsenter", &[&inside, "busybox", "wget", "-q", "-O", "-", &url]).stdout
    }
}

/// Every manager has everything that was acknowledged.
fn has_all(managers: &[Manager], acknowledged: &BTreeSet<String>) {
    assert!(acknowledged.len() >= BETWEEN, "only {} writes", acknowledged.len());
    for manager in managers {
        until_within(PATIENCE, "it has caught up", || manager.has_caught_up().then_some(()));
        let listed = manager.warren(&["service", "ls", "--format", "json"]).succeeded();
        let listed: Vec<Value> = serde_json::from_str(&listed).expect("a list");
        let names: BTreeSet<_> =
            listed.iter().map(|service| service["spec"]["name"].as_str().expect("a name").to_owned()).collect();
        let lost: Vec<_> = acknowledged.difference(&names).collect();
        assert!(lost.is_empty(), "of {} acknowledged writes {} are lost: {lost:?}", acknowledged.len(), lost.len());
    }
}

fn start_agent(world: &World, hosts: &Hosts) -> Process {
    let place = world.path("node/agent").display().to_string();
    let address = Hosts::address(NODE);
    world.start_other_agent("node", hosts.name(NODE), &["--data-dir", &place, "--advertise-addr", &address])
}

/// Waits until so many more writes were acknowledged.
fn more(load: &Load) {
    let before = load.count();
    until_within(PATIENCE, "writes go on", || (load.count() >= before + BETWEEN).then_some(()));
}

#[test]
fn the_leader_is_killed_again_and_again_under_load() {
    let mut cluster = Cluster::new("killed");
    let before = cluster.tasks();
    assert_eq!(before.len(), 3);
    let load = cluster.load();
    for _ in 0..4 {
        more(&load);
        let led = leader(&cluster.managers);
        cluster.managers[led].kill();
        more(&load);
        cluster.managers[led].start();
        follows(&cluster.managers, led);
    }
    let (acknowledged, longest) = load.stop();
    eprintln!("{} writes; the longest time without one was {longest:?}", acknowledged.len());
    has_all(&cluster.managers, &acknowledged);
    assert_eq!(cluster.tasks(), before);
}

#[test]
fn managers_and_nodes_are_cut_off_and_come_back() {
    let cluster = Cluster::new("cut");
    let before = cluster.tasks();
    let load = cluster.load();
    more(&load);
    // The leader: the others go on, and it neither acknowledges nor tells what may be old news.
    let led = leader(&cluster.managers);
    let metrics = cluster.metrics(led);
    assert!(metrics.contains("\nwarren_raft_is_leader 1\n") && !metrics.contains("\nwarren_services_total 0\n"));
    cluster.hosts.cut_off(led);
    more(&load);
    let refused = cluster.managers[led].warren(&["service", "ls"]);
    assert_eq!(refused.code, 4, "{}{}", refused.stdout, refused.stderr);
    // Nor does it go on saying that it leads, and what the cluster has: another says so by now.
    until_within(PATIENCE, "it knows that it does not lead", || {
        let metrics = cluster.metrics(led);
        let is_over = ["\nwarren_raft_is_leader 0\n", "\nwarren_services_total 0\n"];
        is_over.iter().all(|line| metrics.contains(line)).then_some(())
    });
    cluster.hosts.heal();
    follows(&cluster.managers, led);
    // A follower.
    let follower = (leader(&cluster.managers) + 1) % 3;
    cluster.hosts.cut_off(follower);
    more(&load);
    assert_eq!(cluster.managers[follower].warren(&["service", "ls"]).code, 4);
    cluster.hosts.heal();
    follows(&cluster.managers, follower);
    // The node, for long enough to be down: its containers go on, and are the same when it is back.
    cluster.hosts.cut_off(NODE);
    until_within(PATIENCE, "it is down", || {
        cluster.managers[0].warren(&["node", "ls"]).stdout.contains("down").then_some(())
    });
    more(&load);
    assert_eq!(cluster.tasks(), before);
    cluster.hosts.heal();
    until_within(PATIENCE, "it is back", || {
        cluster.managers[0].warren(&["node", "ls"]).stdout.contains("ready").then_some(())
    });
    // All of them, from everybody.
    (0..4).for_each(|at| ip_down(&cluster.hosts, at));
    until_within(PATIENCE, "nobody decides", || {
        cluster.managers.iter().all(|manager| manager.warren(&["service", "ls"]).code == 4).then_some(())
    });
    (0..4).for_each(|at| ip_up(&cluster.hosts, at));
    more(&load);
    let (acknowledged, longest) = load.stop();
    eprintln!("{} writes; the longest time without one was {longest:?}", acknowledged.len());
    has_all(&cluster.managers, &acknowledged);
    assert_eq!(cluster.tasks(), before);
    assert_eq!(cluster.managers[0].running("web").len(), 3);
}

fn ip_down(hosts: &Hosts, at: usize) {
    let _ = run("ip", &["-n", hosts.name(at), "link", "set", "wire", "down"]).succeeded();
}

fn ip_up(hosts: &Hosts, at: usize) {
    let _ = run("ip", &["-n", hosts.name(at), "link", "set", "wire", "up"]).succeeded();
}

#[test]
fn five_managers_are_split_in_two_and_three() {
    let world = World::empty("split");
    let hosts = Hosts::new(&world, 5);
    let manager = |at: usize| Manager::at(&world, &format!("m{at}"), &Hosts::address(at), Some(hosts.name(at)));
    let mut managers: Vec<_> = (0..5).map(manager).collect();
    let _ = cluster::found(&mut managers);
    let load = Load::start(CLIENTS, &managers.iter().map(Manager::socket).collect::<Vec<_>>());
    more(&load);
    // Once with the leader on the smaller side, once on the larger.
    for led_by_two in [true, false] {
        let led = leader(&managers);
        let two = if led_by_two { [led, (led + 1) % 5] } else { [(led + 1) % 5, (led + 2) % 5] };
        two.iter().for_each(|at| hosts.cut_off(*at));
        more(&load);
        for (at, manager) in managers.iter().enumerate() {
            let expected = if two.contains(&at) { 4 } else { 0 };
            until_within(PATIENCE, "only those in the majority answer", || {
                (manager.warren(&["service", "ls"]).code == expected).then_some(())
            });
        }
        hosts.heal();
        two.iter().for_each(|at| follows(&managers, *at));
        more(&load);
    }
    let (acknowledged, longest) = load.stop();
    eprintln!("{} writes; the longest time without one was {longest:?}", acknowledged.len());
    has_all(&managers, &acknowledged);
}

#[test]
fn everything_is_restarted_one_after_the_other_under_load() {
    let mut cluster = Cluster::new("rolling");
    let before = cluster.tasks();
    let load = cluster.load();
    for at in 0..3 {
        more(&load);
        cluster.managers[at].stop();
        more(&load);
        cluster.managers[at].start();
        follows(&cluster.managers, at);
    }
    let _ = cluster.agent.take().expect("it runs").terminate();
    let agent = start_agent(&cluster.world, &cluster.hosts);
    until_within(PATIENCE, "the node is in session again", || {
        let log = agent.log();
        (log.matches("in session with the manager").count() >= 2).then_some(())
    });
    more(&load);
    let (acknowledged, longest) = load.stop();
    eprintln!("{} writes; the longest time without one was {longest:?}", acknowledged.len());
    has_all(&cluster.managers, &acknowledged);
    all_vote(&cluster.managers);
    assert_eq!(cluster.tasks(), before);
    let _ = agent.terminate();
}

/// A small disk, unmounted with the value.
struct Disk(std::path::PathBuf);

impl Disk {
    fn new(place: &Path, mib: u32) -> Self {
        fs::create_dir_all(place).expect("writable");
        let place_text = place.display().to_string();
        let options = format!("size={mib}m");
        let _ = run("mount", &["-t", "tmpfs", "-o", &options, "tmpfs", &place_text]).succeeded();
        Self(place.to_owned())
    }

    /// Takes what is free.
    fn fill(&self) {
        let file = self.0.join("ballast");
        let _ = run("dd", &["if=/dev/zero", &format!("of={}", file.display()), "bs=4k"]);
    }

    fn free(&self) {
        fs::remove_file(self.0.join("ballast")).expect("there");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = run("umount", &["-l", &self.0.display().to_string()]);
    }
}

#[test]
fn a_full_disk_stops_one_manager_and_nothing_else() {
    let world = World::empty("full");
    let mut managers: Vec<_> = (0..3).map(|at| Manager::new(&world, &format!("m{at}"))).collect();
    let disks: Vec<_> = managers.iter().map(|manager| Disk::new(&manager.directory.join("manager"), 64)).collect();
    let _ = cluster::found(&mut managers);
    let load = Load::start(CLIENTS, &managers.iter().map(Manager::socket).collect::<Vec<_>>());
    more(&load);
    // The leader's: it can write nothing more, says so, and another leads.
    let led = leader(&managers);
    disks[led].fill();
    until_within(PATIENCE, "its health says so", || {
        let (status, body) = world.get(managers[led].metrics_port(), "/health")?;
        (status == 503 && body.contains("No space left")).then_some(())
    });
    more(&load);
    managers[led].kill();
    disks[led].free();
    managers[led].start();
    follows(&managers, led);
    // A follower's.
    let follower = (leader(&managers) + 1) % 3;
    disks[follower].fill();
    more(&load);
    until_within(PATIENCE, "its health says so", || {
        world.get(managers[follower].metrics_port(), "/health").filter(|(status, _)| *status == 503)
    });
    managers[follower].kill();
    disks[follower].free();
    managers[follower].start();
    follows(&managers, follower);
    more(&load);
    let (acknowledged, longest) = load.stop();
    eprintln!("{} writes; the longest time without one was {longest:?}", acknowledged.len());
    has_all(&managers, &acknowledged);
    drop(managers);
}
