//! A cluster of real processes, each on a machine of its own, while managers are killed, networks are cut, disks are full and
//! everything is restarted: no acknowledged write is lost, and no container notices.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use warren_tests::{
    Hosts, Load, Process, WELL_BEHAVED, World,
    cluster::{self, Manager, all_vote, follows, leader},
    image_name, run, until_within,
};

const CLIENTS: usize = 4;
/// Writes that are acknowledged before the next thing goes wrong.
const BETWEEN: usize = 40;
const PATIENCE: Duration = Duration::from_secs(60);

/// Three managers and two nodes, each on a machine of its own.
struct Cluster {
    managers: Vec<Manager>,
    agents: Vec<Process>,
    hosts: Hosts,
    world: World,
}

/// The nodes' machines.
const NODES: [usize; 2] = [3, 4];

impl Cluster {
    fn new(name: &str) -> Self {
        let world = World::empty(name);
        let hosts = Hosts::new(&world, 5);
        let world = world.and_containerd();
        let manager = |at: usize| Manager::at(&world, &format!("m{at}"), &Hosts::address(at), Some(hosts.name(at)));
        let mut managers: Vec<_> = (0..3).map(manager).collect();
        let token = cluster::found(&mut managers);
        for at in NODES {
            let place = world.path(&node(at)).display().to_string();
            let mut join = World::binary("warren");
            join.args(["cluster", "join", "--token", &token, &managers[0].address(), "--data-dir", &place]);
            let mut inside = std::process::Command::new("nsenter");
            inside.arg(format!("--net=/run/netns/{}", hosts.name(at))).arg(join.get_program()).args(join.get_args());
            let _ = World::run(&mut inside).succeeded();
        }
        let agents = NODES.map(|at| start_agent(&world, &hosts, at)).into();
        let cluster = Self { managers, agents, hosts, world };
        cluster.nodes_are("ready", NODES.len());
        for (name, more) in [("web", &[][..]), ("kept", &["--lost-after", "10m"])] {
            let create = ["service", "create", name, "--image", image_name(), "--replicas", "4", "--wait"];
            let create = [&create[..], more, &["--", "sh", "-c", WELL_BEHAVED]].concat();
            let _ = cluster.managers[0].warren(&create).succeeded();
        }
        // Both have something that could go to the other.
        for at in NODES {
            assert_eq!(cluster.tasks_of(at).len(), 4, "{:?}", cluster.tasks());
        }
        cluster
    }

    fn load(&self) -> Load {
        Load::start(CLIENTS, &self.managers.iter().map(Manager::socket).collect::<Vec<_>>())
    }

    fn nodes_are(&self, status: &str, count: usize) {
        until_within(PATIENCE, &format!("{count} nodes are {status}"), || {
            let nodes = self.managers[0].warren(&["node", "ls"]).stdout;
            (nodes.matches(status).count() == count).then_some(())
        });
    }

    /// A node's containers as containerd has them: ids and process ids.
    fn tasks_of(&self, at: usize) -> Vec<String> {
        let listed = self.world.ctr_of(&node(at), &["tasks", "ls"]).succeeded();
        let mut tasks: Vec<_> = listed.lines().skip(1).map(str::to_owned).collect();
        tasks.sort();
        tasks
    }

    /// All nodes' containers.
    fn tasks(&self) -> [Vec<String>; 2] {
        NODES.map(|at| self.tasks_of(at))
    }

    /// How far behind one manager is, as another exports it.
    fn lag(&self, exporter: usize, behind: usize) -> Option<f64> {
        let line = format!("warren_raft_replication_lag_entries{{peer=\"{}\"}} ", self.managers[behind].id());
        let metrics = self.metrics(exporter);
        metrics.lines().find_map(|shown| shown.strip_prefix(&line)?.parse().ok())
    }

    /// What a manager exports.
    fn metrics(&self, at: usize) -> String {
        let url = format!("http://127.0.0.1:{}/metrics", self.managers[at].metrics_port());
        let inside = format!("--net=/run/netns/{}", self.hosts.name(at));
        run("nsenter", &[&inside, "busybox", "wget", "-q", "-O", "-", &url]).stdout
    }
}

/// Every manager has everything that was acknowledged, on a disk of its own, when all of them are killed.
fn has_all(managers: &mut [Manager], acknowledged: &BTreeSet<String>) {
    assert!(acknowledged.len() >= BETWEEN, "only {} writes", acknowledged.len());
    for manager in &*managers {
        until_within(PATIENCE, "it has caught up", || manager.has_caught_up().then_some(()));
    }
    for manager in &mut *managers {
        manager.kill();
    }
    for manager in managers {
        let names = manager.services_on_disk();
        let lost: Vec<_> = acknowledged.difference(&names).collect();
        assert!(lost.is_empty(), "of {} acknowledged writes {} are lost: {lost:?}", acknowledged.len(), lost.len());
    }
}

fn node(at: usize) -> String {
    format!("node-{at}")
}

fn start_agent(world: &World, hosts: &Hosts, at: usize) -> Process {
    let place = world.path(&format!("{}/agent", node(at))).display().to_string();
    let address = Hosts::address(at);
    world.start_other_agent(&node(at), hosts.name(at), &["--data-dir", &place, "--advertise-addr", &address])
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
    assert_eq!(cluster.tasks(), before);
    has_all(&mut cluster.managers, &acknowledged);
    assert_eq!(cluster.tasks(), before);
}

#[test]
fn managers_and_nodes_are_cut_off_and_come_back() {
    let mut cluster = Cluster::new("cut");
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
        let is_over = ["\nwarren_raft_is_leader 0\n", "\nwarren_services_total 0\n", "\nwarren_raft_quorum_ok 0\n"];
        is_over.iter().all(|line| metrics.contains(line)).then_some(())
    });
    cluster.hosts.heal();
    follows(&cluster.managers, led);
    // A follower.
    let led = leader(&cluster.managers);
    let follower = (led + 1) % 3;
    assert!(cluster.metrics(led).contains("\nwarren_raft_quorum_ok 1\n"));
    cluster.hosts.cut_off(follower);
    more(&load);
    assert_eq!(cluster.managers[follower].warren(&["service", "ls"]).code, 4);
    // The leader says how far behind it is; of the other one it is not.
    let lag = cluster.lag(led, follower).expect("of a follower");
    assert!(lag >= BETWEEN as f64, "{lag}");
    assert!(cluster.lag(led, (led + 2) % 3).is_some_and(|other| other < lag));
    cluster.hosts.heal();
    follows(&cluster.managers, follower);
    until_within(PATIENCE, "it is as near as the other", || {
        cluster.lag(leader(&cluster.managers), follower).filter(|lag| *lag < BETWEEN as f64)
    });
    // Whoever led, and however often that changed: nothing that runs was touched.
    assert_eq!(cluster.tasks(), before);
    // A node, for long enough to be down: its containers go on. Of those that are not kept others do their work, and when it is
    // back they end.
    let (lost, other) = (NODES[0], NODES[1]);
    let kept: BTreeSet<_> = cluster.managers[0].running("kept").into_iter().collect();
    cluster.hosts.cut_off(lost);
    cluster.nodes_are("down", 1);
    until_within(PATIENCE, "web runs elsewhere", || (cluster.tasks_of(other).len() == 6).then_some(()));
    more(&load);
    assert_eq!(cluster.tasks_of(lost), before[0]);
    cluster.hosts.heal();
    cluster.nodes_are("ready", 2);
    until_within(PATIENCE, "what was replaced has ended", || (cluster.tasks_of(lost).len() == 2).then_some(()));
    assert_eq!(cluster.managers[0].running("kept").into_iter().collect::<BTreeSet<_>>(), kept);
    let before = cluster.tasks();
    assert!(before[0].iter().all(|task| kept.iter().any(|(id, _)| task.starts_with(id))), "{before:?} {kept:?}");
    // All of them, from everybody.
    (0..5).for_each(|at| ip_down(&cluster.hosts, at));
    until_within(PATIENCE, "nobody decides", || {
        cluster.managers.iter().all(|manager| manager.warren(&["service", "ls"]).code == 4).then_some(())
    });
    (0..5).for_each(|at| ip_up(&cluster.hosts, at));
    more(&load);
    let (acknowledged, longest) = load.stop();
    eprintln!("{} writes; the longest time without one was {longest:?}", acknowledged.len());
    assert_eq!(cluster.tasks(), before);
    assert_eq!(cluster.managers[0].running("web").len(), 4);
    has_all(&mut cluster.managers, &acknowledged);
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
    has_all(&mut managers, &acknowledged);
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
    for at in NODES {
        let _ = cluster.agents.remove(0).terminate();
        let agent = start_agent(&cluster.world, &cluster.hosts, at);
        until_within(PATIENCE, "the node is in session again", || {
            let log = agent.log();
            (log.matches("in session with the manager").count() >= 2).then_some(())
        });
        cluster.agents.push(agent);
        more(&load);
    }
    let (acknowledged, longest) = load.stop();
    eprintln!("{} writes; the longest time without one was {longest:?}", acknowledged.len());
    all_vote(&cluster.managers);
    assert_eq!(cluster.tasks(), before);
    has_all(&mut cluster.managers, &acknowledged);
    assert_eq!(cluster.tasks(), before);
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
    has_all(&mut managers, &acknowledged);
    drop(managers);
}
