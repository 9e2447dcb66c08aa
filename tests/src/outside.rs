use std::process::Command;

use crate::{
    process::{Process, find, until},
    world::{World, run},
};

/// A machine beyond the node: a network of its own, with one wire to it.
#[derive(Debug)]
pub struct Outside {
    name: String,
}

impl Outside {
    /// This machine's address on the wire.
    pub const HERE: &'static str = "192.0.2.1";
    /// The other's.
    pub const THERE: &'static str = "192.0.2.2";

    /// Made anew, and gone with the value.
    #[must_use]
    pub fn new(world: &World) -> Self {
        let name = world.cgroup_parent().trim_start_matches('/').to_owned();
        let ip = |arguments: &str| drop(run("ip", &arguments.split(' ').collect::<Vec<_>>()).succeeded());
        ip(&format!("netns add {name}"));
        ip(&format!("link add wire type veth peer name wire netns {name}"));
        ip(&format!("addr add {}/24 dev wire", Self::HERE));
        ip("link set wire up");
        ip(&format!("-n {name} addr add {}/24 dev wire", Self::THERE));
        ip(&format!("-n {name} link set wire up"));
        ip(&format!("-n {name} link set lo up"));
        Self { name }
    }

    /// The name of its network namespace.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A program, to be run there.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.name)).arg(find(program));
        command
    }

    /// What a URL is answered with from there.
    #[must_use]
    pub fn fetch(&self, url: &str) -> String {
        let mut command = self.command("busybox");
        let output =
            command.args(["timeout", "2", "busybox", "wget", "-q", "-O", "-", &format!("http://{url}/")]).output();
        String::from_utf8_lossy(&output.expect("busybox").stdout).trim().to_owned()
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = run("ip", &["netns", "del", &self.name]);
    }
}

/// A world and the outside as two nodes of one cluster; the other node's agent.
#[must_use]
pub fn two_nodes(name: &str, options: &[&str]) -> (World, Outside, Process) {
    let world = World::empty(name);
    let other = Outside::new(&world);
    let mut world = world.and_containerd();
    world.start_manager();
    world.start_agent(&[&["--advertise-addr", Outside::HERE], options].concat());
    let second = start_second(&world, &other, options);
    world.wait_ready();
    both_ready(&world);
    (world, other, second)
}

/// Starts the other node's agent.
#[must_use]
pub fn start_second(world: &World, other: &Outside, options: &[&str]) -> Process {
    world.start_other_agent("node-2", other.name(), &[&["--advertise-addr", Outside::THERE], options].concat())
}

/// Waits until both nodes are ready.
pub fn both_ready(world: &World) {
    until("both nodes are ready", || {
        let nodes = world.warren(&["node", "ls"]).succeeded();
        (nodes.matches("ready").count() == 2).then_some(())
    });
}
