//! From `kill -9` of the leader to the next acknowledged write: Warren beside Docker's swarm mode, three managers each on a machine of
//! its own, the same machines for both.

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use warren_tests::{
    Hosts, Load, Output, Process, World,
    cluster::{self, Manager, leader},
    find, run, until, until_within,
};

const ROUNDS: usize = 15;
const ROUNDS_OF_DOCKER: usize = 5;
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn measure() {
    let mut own = warren();
    let mut other = docker();
    let (median, worst) = (crate::median(&mut own), own.iter().copied().fold(0.0, f64::max));
    let (other_median, other_worst) = (crate::median(&mut other), other.iter().copied().fold(0.0, f64::max));
    println!("from kill -9 of the leader of three to the next acknowledged write");
    println!(
        "  docker swarm, {} rounds                       median {other_median:6.0} ms, longest {other_worst:6.0} ms",
        other.len()
    );
    println!(
        "  warren, profile lan, {} rounds               median {median:6.0} ms, longest {worst:6.0} ms (goal: p99 below 2000)",
        own.len()
    );
    println!("  {:.2} of docker's median\n", median / other_median);
}

fn warren() -> Vec<f64> {
    let world = World::empty("bench-failover");
    let hosts = Hosts::new(&world, 3);
    let manager = |at: usize| Manager::at(&world, &format!("m{at}"), &Hosts::address(at), Some(hosts.name(at)));
    let mut managers: Vec<_> = (0..3).map(manager).collect();
    let _ = cluster::found(&mut managers);
    let round = |_| {
        let led = leader(&managers);
        let others: Vec<PathBuf> =
            managers.iter().enumerate().filter(|(at, _)| *at != led).map(|(_, manager)| manager.socket()).collect();
        let load = Load::start(4, &others);
        until_within(PATIENCE, "writes are acknowledged", || (load.count() > 20).then_some(()));
        managers[led].kill();
        let killed = Instant::now();
        until_within(PATIENCE, "writes go on", || load.last_acknowledged().filter(|at| *at > killed));
        let before = load.count();
        until_within(PATIENCE, "writes go on", || (load.count() > before + 20).then_some(()));
        let (_, longest) = load.stop();
        managers[led].start();
        until_within(PATIENCE, "it follows again", || managers[led].has_caught_up().then_some(()));
        crate::ms(longest)
    };
    (0..ROUNDS).map(round).collect()
}

struct Docker {
    at: usize,
    socket: String,
    daemon: Option<Process>,
}

impl Docker {
    fn start(&mut self, world: &World, hosts: &Hosts) {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", hosts.name(self.at))).arg(find("dockerd"));
        command.args(["--host", &self.socket, "--log-level", "error", "--iptables=false", "--bridge=none"]);
        for (flag, directory) in [("--data-root", "docker"), ("--exec-root", "docker-run"), ("--pidfile", "docker.pid")]
        {
            let own = world.path(&format!("{directory}-{}", self.at));
            if flag == "--pidfile" {
                let _ = std::fs::remove_file(&own);
            }
            command.arg(flag).arg(own);
        }
        command.arg("--containerd").arg(world.containerd_socket());
        self.daemon = Some(Process::start(&format!("dockerd-{}", self.at), &mut command, world.directory.path()));
        until_within(PATIENCE, "dockerd answers", || (self.run(&["version"]).code == 0).then_some(()));
    }

    fn run(&self, arguments: &[&str]) -> Output {
        run("timeout", &[&["30", "docker", "--host", self.socket.as_str()], arguments].concat())
    }
}

fn docker() -> Vec<f64> {
    let world = World::empty("bench-swarm");
    let hosts = Hosts::new(&world, 3);
    let world = world.and_containerd();
    let daemon = |at: usize| Docker {
        at,
        socket: format!("unix://{}", world.path(&format!("d{at}.sock")).display()),
        daemon: None,
    };
    let mut daemons: Vec<_> = (0..3).map(daemon).collect();
    for daemon in &mut daemons {
        daemon.start(&world, &hosts);
    }
    let first = Hosts::address(0);
    let _ = daemons[0].run(&["swarm", "init", "--advertise-addr", &first]).succeeded();
    let token = daemons[0].run(&["swarm", "join-token", "--quiet", "manager"]).succeeded();
    for daemon in &daemons[1..] {
        let (own, address) = (Hosts::address(daemon.at), format!("{first}:2377"));
        let join = ["swarm", "join", "--token", token.trim(), "--advertise-addr", &own, &address];
        let _ = daemon.run(&join).succeeded();
    }
    let led = |daemons: &[Docker]| {
        until_within(PATIENCE, "all three are reachable", || {
            let asked = daemons.iter().find(|daemon| daemon.daemon.is_some())?;
            let status = asked.run(&["node", "ls", "--format", "{{.ManagerStatus}}"]);
            let whole = status.stdout.matches("Reachable").count() == 2 && status.stdout.contains("Leader");
            whole.then_some(())
        });
        until("one leads", || {
            daemons.iter().position(|daemon| {
                let own = daemon.run(&["node", "inspect", "self", "--format", "{{.ManagerStatus.Leader}}"]);
                own.stdout.trim() == "true"
            })
        })
    };
    let mut number = 0;
    let mut samples = Vec::new();
    for _ in 0..ROUNDS_OF_DOCKER {
        let at = led(&daemons);
        let other = (at + 1) % 3;
        daemons[at].daemon.take().expect("it runs").kill();
        let killed = Instant::now();
        until_within(PATIENCE, "a write is acknowledged", || {
            number += 1;
            let name = format!("w{number}");
            let create =
                ["service", "create", "--detach", "--no-resolve-image", "--replicas", "0", "--name", &name, "none"];
            (daemons[other].run(&create).code == 0).then_some(())
        });
        samples.push(crate::ms(killed.elapsed()));
        daemons[at].start(&world, &hosts);
    }
    for daemon in &mut daemons {
        if let Some(process) = daemon.daemon.take() {
            process.kill();
        }
    }
    samples
}
