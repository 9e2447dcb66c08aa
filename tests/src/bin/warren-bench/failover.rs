//! From `kill -9` of the leader to the next acknowledged write: Warren beside Docker's swarm mode, three managers each on a machine of
//! its own, the same machines for both, and the same client: the program that operators use, one process an attempt, at a manager that
//! is left. Of Warren also what clients that write all the time miss: the longest time in which none of four had an answer.

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

const ROUNDS: usize = 100;
/// Each takes ten times as long.
const ROUNDS_OF_DOCKER: usize = 10;
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn measure() {
    let (mut own, mut gaps): (Vec<f64>, Vec<f64>) = warren().into_iter().unzip();
    let mut other = docker();
    println!("from kill -9 of the leader of three to the next acknowledged write");
    let row = |what: &str, samples: &mut Vec<f64>| {
        let median = crate::median(samples);
        let at = |share: f64| samples[((samples.len() - 1) as f64 * share).round() as usize];
        let p99 = if samples.len() < 100 { "-".to_owned() } else { format!("{:.0} ms", at(0.99)) };
        println!("  {what:42} {median:6.0} ms, p99 {p99}, longest {:.0} ms, {} rounds", at(1.0), samples.len());
        median
    };
    let other = row("docker service create", &mut other);
    let own = row("warren service create, profile lan", &mut own);
    println!("  {:.2} of docker's median", own / other);
    row("four clients of warren that always write", &mut gaps);
    println!("  (goal: p99 below 2000 ms)\n");
}

/// What a program at a manager that is left waits, and the longest time without an answer to those who write all the time.
fn warren() -> Vec<(f64, f64)> {
    let world = World::empty("bench-failover");
    let hosts = Hosts::new(&world, 3);
    let manager = |at: usize| Manager::at(&world, &format!("m{at}"), &Hosts::address(at), Some(hosts.name(at)));
    let mut managers: Vec<_> = (0..3).map(manager).collect();
    let _ = cluster::found(&mut managers);
    let round = |round: usize| {
        let led = leader(&managers);
        let others: Vec<PathBuf> =
            managers.iter().enumerate().filter(|(at, _)| *at != led).map(|(_, manager)| manager.socket()).collect();
        let load = Load::start(4, &others);
        until_within(PATIENCE, "writes are acknowledged", || (load.count() > 20).then_some(()));
        managers[led].kill();
        let killed = Instant::now();
        let other = &managers[(led + 1) % 3];
        let answered = (0..1000).any(|attempt| {
            let name = format!("asked-{round}-{attempt}");
            other.warren(&["service", "create", &name, "--image", "written", "--pull", "never", "--replicas", "0"]).code
                == 0
        });
        let waited = killed.elapsed();
        assert!(answered, "no write is acknowledged any more");
        let before = load.count();
        until_within(PATIENCE, "writes go on", || (load.count() > before + 20).then_some(()));
        let (_, longest) = load.stop();
        managers[led].start();
        until_within(PATIENCE, "it follows again", || managers[led].has_caught_up().then_some(()));
        (crate::ms(waited), crate::ms(longest))
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
