//! A service with a hundred replicas, from its creation to all of them being healthy: Warren against Docker's swarm mode on the
//! same machine, one after the other, with the same image, command and health check.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use warren_tests::{Process, World, find, image_name, run, until_within};

use crate::SCRIPT;

const REPLICAS: &str = "100";
const PATIENCE: Duration = Duration::from_secs(300);

/// Docker's daemon of the benchmark's own.
struct Docker {
    socket: String,
    _daemon: Process,
}

impl Docker {
    fn start(world: &World) -> Self {
        let socket = format!("unix://{}", world.path("d.sock").display());
        let mut command = Command::new(find("dockerd"));
        command.args(["--host", &socket, "--log-level", "error"]);
        for (flag, directory) in [("--data-root", "docker"), ("--exec-root", "docker-run"), ("--pidfile", "docker.pid")]
        {
            command.arg(flag).arg(world.path(directory));
        }
        let docker = Self { socket, _daemon: Process::start("dockerd", &mut command, world.directory.path()) };
        until_within(Duration::from_secs(60), "dockerd answers", || (docker.run(&["version"]).code == 0).then_some(()));
        docker
    }

    fn run(&self, arguments: &[&str]) -> warren_tests::Output {
        run("docker", &[&["--host", self.socket.as_str()], arguments].concat())
    }
}

pub(crate) fn measure() {
    let warren = {
        let world = World::with_warren("bench-100");
        let began = Instant::now();
        let create = ["service", "create", "web", "--image", image_name(), "--replicas", REPLICAS];
        let health = ["--health", "exec:true", "--health-interval", "1s"];
        let command = ["--", "sh", "-c", SCRIPT];
        let _ = world.warren(&[&create[..], &health, &command].concat()).succeeded();
        until_within(PATIENCE, "all are healthy", || {
            let containers = world.containers("web");
            let healthy = containers.iter().filter(|c| c["status"]["health"] == "HEALTH_HEALTHY").count();
            (healthy.to_string() == REPLICAS).then_some(())
        });
        let took = began.elapsed().as_secs_f64();
        let _ = world.warren(&["service", "rm", "web", "--wait", "--timeout", "300"]).succeeded();
        took
    };
    let world = World::with_containerd("bench-docker");
    let docker = Docker::start(&world);
    let archive = world.path("docker.tar").to_string_lossy().into_owned();
    assert_eq!(world.ctr(&["images", "export", &archive, image_name()]).code, 0);
    let _ = docker.run(&["load", "--input", &archive]).succeeded();
    let _ = docker.run(&["swarm", "init", "--advertise-addr", "127.0.0.1"]).succeeded();
    let began = Instant::now();
    let create = ["service", "create", "--name", "web", "--replicas", REPLICAS, "--detach", "--no-resolve-image"];
    let health = ["--health-cmd", "true", "--health-interval", "1s"];
    let _ = docker.run(&[&create[..], &health, &[image_name(), "sh", "-c", SCRIPT]].concat()).succeeded();
    until_within(PATIENCE, "all are healthy", || {
        let healthy = docker.run(&["ps", "--quiet", "--filter", "health=healthy"]).succeeded().lines().count();
        (healthy.to_string() == REPLICAS).then_some(())
    });
    let other = began.elapsed().as_secs_f64();
    let _ = docker.run(&["service", "rm", "web"]).succeeded();
    until_within(PATIENCE, "all are gone", || {
        docker.run(&["ps", "--all", "--quiet"]).succeeded().trim().is_empty().then_some(())
    });
    let _ = docker.run(&["swarm", "leave", "--force"]);
    println!("{REPLICAS} containers of one service on one node, from its creation to all healthy, once each");
    println!("  docker service create                       {other:8.1} s");
    println!(
        "  warren service create                       {warren:8.1} s    {:.2} of docker (goal: below 1.00)\n",
        warren / other
    );
}
