//! Several managers of one cluster, each a process of its own.

use std::{collections::BTreeSet, path::PathBuf, process::Command, time::Duration};

use serde_json::Value;

use crate::{
    process::{Process, free_port, until, until_within},
    world::{Output, World},
};

/// A manager of several.
#[derive(Debug)]
pub struct Manager {
    name: String,
    /// Holds its data and its socket.
    pub directory: PathBuf,
    address: String,
    network: Option<String>,
    metrics_port: u16,
    more: Vec<String>,
    /// It, if it runs.
    pub process: Option<Process>,
}

impl Manager {
    /// A machine with nothing on it, in the test's own network.
    #[must_use]
    pub fn new(world: &World, name: &str) -> Self {
        Self::at(world, name, "127.0.0.1", None)
    }

    /// A machine with nothing on it, in the network namespace of this name.
    #[must_use]
    pub fn at(world: &World, name: &str, address: &str, network: Option<&str>) -> Self {
        let directory = world.path(name);
        std::fs::create_dir_all(&directory).expect("writable");
        Self {
            name: name.to_owned(),
            directory,
            address: format!("{address}:{}", free_port()),
            network: network.map(str::to_owned),
            metrics_port: free_port(),
            more: Vec::new(),
            process: None,
        }
    }

    /// With more arguments.
    #[must_use]
    pub fn with(mut self, arguments: &[&str]) -> Self {
        self.more.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }

    /// Has it start with these arguments instead, from its next start on.
    pub fn instead(&mut self, arguments: &[&str]) {
        self.more = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    }

    /// Where it is, as HOST:PORT.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// Where its metrics are.
    #[must_use]
    pub fn metrics_port(&self) -> u16 {
        self.metrics_port
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.join("w.sock")
    }

    /// Its command.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = in_network(self.network.as_deref(), World::binary("warren-manager"));
        command
            .arg("--data-dir")
            .arg(self.directory.join("manager"))
            .arg("--socket")
            .arg(self.socket())
            .args(["--listen-addr", &self.address, "--snapshot-after", "100"])
            .args(["--metrics-addr", &format!("127.0.0.1:{}", self.metrics_port)])
            .args(&self.more);
        command
    }

    /// Starts it.
    pub fn start(&mut self) {
        self.process = Some(Process::start(&self.name, &mut self.command(), &self.directory));
    }

    /// Kills it as a crash would.
    pub fn kill(&mut self) {
        self.process.take().expect("it runs").kill();
    }

    /// Stops it.
    pub fn stop(&mut self) {
        let _ = self.process.take().expect("it runs").terminate();
    }

    /// The names of the services that it has on its disk, itself. It must not run.
    ///
    /// # Panics
    ///
    /// When what is there cannot be read.
    #[must_use]
    pub fn services_on_disk(&self) -> BTreeSet<String> {
        let found = warren_manager::data::backup::survey(&self.directory.join("manager")).expect("readable");
        found.state().services().map(|service| service.spec.name.to_string()).collect()
    }

    /// What it wrote so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// Runs `warren` at its socket.
    #[must_use]
    pub fn warren(&self, arguments: &[&str]) -> Output {
        World::run(self.warren_command().args(arguments))
    }

    /// The command `warren` at its socket.
    #[must_use]
    pub fn warren_command(&self) -> Command {
        let mut command = World::binary("warren");
        command.args(["--manager", &format!("unix://{}", self.socket().display())]);
        command
    }

    /// `warren cluster init`, `join`, `restore` or `recover`, for its directory.
    #[must_use]
    pub fn cluster(&self, arguments: &[&str]) -> Output {
        let mut command = in_network(self.network.as_deref(), World::binary("warren"));
        World::run(command.arg("cluster").args(arguments).arg("--data-dir").arg(&self.directory))
    }

    /// The cluster as it sees it, if it answers.
    #[must_use]
    pub fn info(&self) -> Option<Value> {
        let shown = self.warren(&["cluster", "info", "--format", "json"]);
        if shown.code == 0 { serde_json::from_str(&shown.stdout).ok() } else { None }
    }

    /// How many managers vote, as it sees it.
    #[must_use]
    pub fn voters(&self) -> usize {
        let managers = self.info().and_then(|info| info["managers"].as_array().cloned()).unwrap_or_default();
        managers.iter().filter(|manager| manager["voter"] == true).count()
    }

    /// Its number.
    #[must_use]
    pub fn id(&self) -> String {
        self.info().expect("it answers")["managerId"].as_str().expect("an id").to_owned()
    }

    /// Whether it has applied all that it has, and knows who leads. While others write it may never have; see [`follows`].
    #[must_use]
    pub fn has_caught_up(&self) -> bool {
        self.info().is_some_and(|info| info["appliedIndex"] == info["lastLogIndex"] && info["leaderId"] != "0")
    }

    /// The index of the last entry that it has applied, if it answers and knows who leads.
    #[must_use]
    pub fn applied(&self) -> Option<u64> {
        let info = self.info().filter(|info| info["leaderId"] != "0")?;
        info["appliedIndex"].as_str()?.parse().ok()
    }

    /// Ids and process ids of a service's running containers. While another leader is elected, it is asked again.
    #[must_use]
    pub fn running(&self, service: &str) -> Vec<(String, u64)> {
        let shown = until("a manager answers", || {
            let shown = self.warren(&["service", "ps", "--all", service, "--format", "json"]);
            (shown.code != 4).then_some(shown)
        });
        let containers: Value = serde_json::from_str(&shown.succeeded()).expect("JSON");
        let is_running = |container: &&Value| container["status"]["state"] == "CONTAINER_STATE_RUNNING";
        let containers = containers.as_array().cloned().unwrap_or_default();
        let about =
            |c: &Value| (c["id"].as_str().unwrap_or_default().to_owned(), c["status"]["pid"].as_u64().unwrap_or(0));
        let mut found: Vec<_> = containers.iter().filter(is_running).map(about).collect();
        found.sort();
        found
    }
}

/// A command as it is run in a network namespace.
fn in_network(network: Option<&str>, command: Command) -> Command {
    let Some(network) = network else { return command };
    let mut inside = Command::new("nsenter");
    inside.arg(format!("--net=/run/netns/{network}")).arg(command.get_program());
    for (variable, value) in command.get_envs() {
        match value {
            Some(value) => inside.env(variable, value),
            None => inside.env_remove(variable),
        };
    }
    inside
}

/// The tokens that founding printed: for managers, and for agents.
#[must_use]
pub fn tokens(printed: &str) -> (String, String) {
    let mut found = printed.split_whitespace().filter(|word| word.starts_with("WRN-1-")).map(str::to_owned);
    (found.next().expect("a manager's token"), found.next().expect("a worker's token"))
}

/// Has the first of some managers found a cluster that the others join; the worker's token.
#[must_use]
pub fn found(managers: &mut [Manager]) -> String {
    let (manager_token, worker_token) = tokens(&managers[0].cluster(&["init"]).succeeded());
    managers[0].start();
    until("the first leads", || managers[0].info().filter(|info| info["leaderId"] == "1"));
    let first = managers[0].address();
    for manager in &mut managers[1..] {
        let _ = manager.cluster(&["join", "--token", &manager_token, &first]).succeeded();
        manager.start();
    }
    all_vote(managers);
    worker_token
}

/// Waits until all of these vote, as each of them sees it.
pub fn all_vote(managers: &[Manager]) {
    for manager in managers {
        until("all vote", || (manager.voters() == managers.len()).then_some(()));
    }
}

/// Waits until one of them has applied what any of the others has by now, though writes go on.
pub fn follows(managers: &[Manager], one: usize) {
    let others = managers.iter().enumerate().filter(|(at, _)| *at != one);
    let applied = others.filter_map(|(_, other)| other.applied()).max().expect("another answers");
    until_within(Duration::from_secs(60), "it follows again", || (managers[one].applied()? >= applied).then_some(()));
}

/// Which of those that run leads, as the others see it too.
#[must_use]
pub fn leader(managers: &[Manager]) -> usize {
    until("one leads", || {
        let running = managers.iter().enumerate().filter(|(_, manager)| manager.process.is_some());
        let seen: Vec<_> = running.map(|(at, manager)| (at, manager.info())).collect();
        let (at, _) =
            seen.iter().find(|(_, info)| info.as_ref().is_some_and(|info| info["leaderId"] == info["managerId"]))?;
        let id = managers[*at].info()?["managerId"].clone();
        seen.iter().all(|(_, info)| info.as_ref().is_some_and(|info| info["leaderId"] == id)).then_some(*at)
    })
}
