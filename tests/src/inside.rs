use std::{
    fs,
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use serde_json::Value;

use crate::{WELL_BEHAVED, World};

/// One container of a service, seen from its node.
#[derive(Debug)]
pub struct Inside {
    /// Its id.
    pub id: String,
    /// Its first process on the node.
    pub pid: u32,
    /// The id of the node that it is on.
    pub node: String,
    /// Its addresses, as text.
    pub addresses: Vec<String>,
}

impl Inside {
    /// The only container of a new service with these options.
    #[must_use]
    pub fn of(world: &World, name: &str, options: &[&str]) -> Self {
        world.create(name, 1, options, WELL_BEHAVED);
        Self::only(world, name)
    }

    /// The only container of a service.
    #[must_use]
    pub fn only(world: &World, name: &str) -> Self {
        let container = world.container_when(name, "the container runs", |c| c["status"]["pid"].is_number());
        Self::from_json(&container)
    }

    /// All containers of a service that run.
    #[must_use]
    pub fn all(world: &World, name: &str) -> Vec<Self> {
        let containers = world.containers(name);
        let running = containers.iter().filter(|c| c["status"]["state"] == "CONTAINER_STATE_RUNNING");
        running.map(Self::from_json).collect()
    }

    fn from_json(container: &Value) -> Self {
        let id = container["id"].as_str().expect("an id").to_owned();
        let pid = container["status"]["pid"].as_u64().expect("a pid");
        let addresses = container["status"]["addresses"].as_array().cloned().unwrap_or_default();
        let addresses = addresses.iter().filter_map(|address| address.as_str().map(str::to_owned)).collect();
        let node = container["nodeId"].as_str().unwrap_or_default().to_owned();
        Self { id, node, pid: u32::try_from(pid).expect("a pid"), addresses }
    }

    /// A file of the kernel's account of the process.
    #[must_use]
    pub fn proc(&self, file: &str) -> String {
        let bytes = fs::read(format!("/proc/{}/{file}", self.pid)).unwrap_or_else(|error| panic!("{file}: {error}"));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// A field of the kernel's account of the process.
    #[must_use]
    pub fn status(&self, field: &str) -> String {
        let status = self.proc("status");
        let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        value.unwrap_or_else(|| panic!("no {field}")).split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// Runs a command of the node in the container's namespaces but that of files.
    #[must_use]
    pub fn enter(&self, command: &[&str]) -> String {
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["--target", &self.pid.to_string(), "--uts", "--ipc", "--net"]).args(command);
        let output = nsenter.output().expect("nsenter");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Runs a shell command in the container: its exit code, and what it wrote.
    #[must_use]
    pub fn shell(&self, world: &World, script: &str) -> (i32, String) {
        static EXECS: AtomicU32 = AtomicU32::new(0);
        let exec = format!("probe-{}", EXECS.fetch_add(1, Ordering::Relaxed));
        let output = world.ctr(&["tasks", "exec", "--exec-id", &exec, &self.id, "sh", "-c", script]);
        (output.code, output.stdout + &output.stderr)
    }

    /// Where something is mounted: its line of mountinfo.
    #[must_use]
    pub fn mount(&self, target: &str) -> String {
        let mounts = self.proc("mountinfo");
        let found = mounts.lines().find(|line| line.split(' ').nth(4) == Some(target));
        found.unwrap_or_else(|| panic!("nothing is mounted on {target}:\n{mounts}")).to_owned()
    }

    /// A file of its cgroup, by its name in cgroup v1 and in v2.
    #[must_use]
    pub fn cgroup(&self, world: &World, controller: &str, v1: &str, v2: &str) -> String {
        let path = format!("{}/{}", world.cgroup_parent(), self.id);
        let candidates = [format!("/sys/fs/cgroup/{controller}{path}/{v1}"), format!("/sys/fs/cgroup{path}/{v2}")];
        let read = candidates.iter().find_map(|candidate| fs::read_to_string(candidate).ok());
        read.unwrap_or_else(|| panic!("none of {candidates:?}")).trim().to_owned()
    }
}
