use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    metrics::Metrics,
    process::{Process, find, free_port, until, until_within},
};

/// What a command did.
#[derive(Clone, Debug)]
pub struct Output {
    /// Its exit code.
    pub code: i32,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Output {
    fn of(command: &mut Command) -> Self {
        Self::from(&command.output().expect("the command can be run"))
    }

    fn from(output: &std::process::Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Its stdout, if it succeeded.
    #[must_use]
    pub fn succeeded(self) -> String {
        assert_eq!(self.code, 0, "{}{}", self.stdout, self.stderr);
        self.stdout
    }

    /// Its one line of stderr, if it failed with `code`.
    #[must_use]
    pub fn failed(self, code: i32) -> String {
        assert_eq!(self.code, code, "{}{}", self.stdout, self.stderr);
        let line = self.stderr.trim_end();
        assert!(line.starts_with("error: ") && !line.contains('\n'), "not one clear sentence: {line}");
        line.to_owned()
    }
}

/// The demo image's name.
#[must_use]
pub fn image_name() -> &'static str {
    warren_demo_image::NAME
}

/// Moves this thread, and what it starts from now on, into a network of its own: a test's addresses, rules and ports are
/// nobody else's, and gone with the test.
fn own_network() {
    // SAFETY: whatever this thread does with the network from now on is the test's.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.expect("a network of its own");
    let _ = run("ip", &["link", "set", "lo", "up"]).succeeded();
}

/// Runs a program to its end.
#[must_use]
pub fn run(program: &str, arguments: &[&str]) -> Output {
    Output::of(Command::new(find(program)).args(arguments))
}

/// How long a command may take.
const RUN_PATIENCE: Duration = Duration::from_secs(30);

/// A machine of a test's own: containerd, and places for a manager and an agent.
#[derive(Debug)]
pub struct World {
    name: String,
    /// Everything it writes is below.
    pub directory: TempDir,
    containerd: Option<Process>,
    /// The manager, if it runs.
    pub manager: Option<Process>,
    /// The agent, if it runs.
    pub agent: Option<Process>,
    /// The manager's metrics.
    pub manager_port: u16,
    /// The agent's metrics.
    pub agent_port: u16,
    /// The manager's API.
    pub api_port: u16,
    /// The port that the agent takes for DNS.
    pub dns_port: u16,
}

/// What most tests' containers may have of their node: all but privilege.
const ALLOWED: [&str; 7] =
    ["--allow-host-network", "--allow-host-path", "/", "--allow-capability", "ALL", "--allow-device", "/dev"];

impl World {
    /// A machine with nothing on it.
    #[must_use]
    pub fn empty(name: &str) -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests run as root");
        own_network();
        // Short: a Unix socket's path may have 107 bytes.
        let directory = tempfile::Builder::new().prefix("wt-").tempdir_in("/tmp").expect("a directory");
        let id = directory.path().file_name().expect("a name").to_string_lossy().to_lowercase();
        Self {
            name: format!("{name}-{id}").replace('.', "-"),
            directory,
            containerd: None,
            manager: None,
            agent: None,
            manager_port: free_port(),
            agent_port: free_port(),
            api_port: free_port(),
            dns_port: free_port(),
        }
    }

    /// A machine with containerd and the demo image.
    #[must_use]
    pub fn with_containerd(name: &str) -> Self {
        Self::empty(name).and_containerd()
    }

    /// The same with containerd and the demo image.
    #[must_use]
    pub fn and_containerd(mut self) -> Self {
        self.start_containerd();
        let archive = self.path("demo.tar");
        warren_demo_image::write(&find("busybox"), &archive).expect("an archive");
        let imported = self.warren_image_import(&archive).succeeded();
        assert_eq!(imported.trim(), image_name());
        self
    }

    /// A machine with a manager and an agent that is ready.
    #[must_use]
    pub fn with_warren(name: &str) -> Self {
        Self::empty(name).and_warren()
    }

    /// The same with all of Warren.
    #[must_use]
    pub fn and_warren(self) -> Self {
        let mut world = self.and_containerd();
        world.start_manager();
        world.start_agent(&[]);
        world.wait_ready();
        world
    }

    /// A path of this world's.
    #[must_use]
    pub fn path(&self, relative: &str) -> PathBuf {
        self.directory.path().join(relative)
    }

    /// Where the probes are pinned.
    #[must_use]
    pub fn pins(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(&self.name)
    }

    /// The parent of containers' cgroups.
    #[must_use]
    pub fn cgroup_parent(&self) -> String {
        format!("/{}", self.name)
    }

    /// containerd's socket.
    #[must_use]
    pub fn containerd_socket(&self) -> PathBuf {
        self.path("c.sock")
    }

    /// Where the manager's API is.
    #[must_use]
    pub fn manager_address(&self) -> String {
        format!("unix://{}", self.path("w.sock").display())
    }

    /// Starts containerd.
    pub fn start_containerd(&mut self) {
        let config = self.path("containerd.toml");
        let directory = self.directory.path().display();
        let text = format!(
            "version = 2\nroot = \"{directory}/root\"\nstate = \"{directory}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[debug]\n  level = \"error\"\n[grpc]\n  address = \"{}\"\n",
            self.containerd_socket().display()
        );
        fs::write(&config, text).expect("writable");
        let mut command = Command::new(find("containerd"));
        command.arg("-c").arg(&config);
        self.containerd = Some(Process::start("containerd", &mut command, self.directory.path()));
        until("containerd answers", || (self.ctr(&["version"]).code == 0).then_some(()));
    }

    /// Stops containerd; containers go on.
    pub fn stop_containerd(&mut self) {
        if let Some(containerd) = self.containerd.take() {
            containerd.terminate();
        }
    }

    /// A binary that was built beside the tests.
    #[must_use]
    pub fn binary(name: &str) -> Command {
        // Tests are in `deps` beside the binaries, the benchmark is one of them.
        let own = std::env::current_exe().expect("a path");
        let candidates = own.ancestors().skip(1).take(2).map(|directory| directory.join(name));
        let binary = candidates.into_iter().find(|candidate| candidate.is_file());
        let mut command =
            Command::new(binary.unwrap_or_else(|| panic!("{name} is missing: run `cargo build --workspace`")));
        // A machine's settings must not reach the test's processes.
        for (variable, _) in std::env::vars_os().filter(|(v, _)| v.to_string_lossy().starts_with("WARREN_")) {
            command.env_remove(variable);
        }
        command
            // A test that is not about it need not see that containers go on running.
            .env("WARREN_STABLE_S", "0")
            .env("RUST_BACKTRACE", "0")
            .env("WARREN_CONFIG_DIR", "/nonexistent")
            .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT");
        command
    }

    /// The manager's command.
    #[must_use]
    pub fn manager_command(&self) -> Command {
        let mut command = Self::binary("warren-manager");
        command
            .arg("--data-dir")
            .arg(self.path("manager"))
            .arg("--socket")
            .arg(self.path("w.sock"))
            .args(["--listen-addr", &format!("127.0.0.1:{}", self.api_port)])
            .args(["--metrics-addr", &format!("127.0.0.1:{}", self.manager_port)])
            .args(["--snapshot-after", "100"])
            .args(ALLOWED)
            .arg("--bootstrap");
        command
    }

    /// Starts the manager and waits until it serves.
    pub fn start_manager(&mut self) {
        let command = self.manager_command();
        self.start_manager_as(command);
    }

    /// Starts a manager by its command and waits until it serves.
    pub fn start_manager_as(&mut self, mut command: Command) {
        self.manager = Some(Process::start("manager", &mut command, self.directory.path()));
        until("the manager is ready", || self.is_ready(self.manager_port).then_some(()));
    }

    /// The agent's command.
    #[must_use]
    pub fn agent_command(&self) -> Command {
        let mut command = Self::binary("warren-agent");
        command
            .arg("run")
            .arg("--data-dir")
            .arg(self.path("agent"))
            .arg("--socket")
            .arg(self.path("w.sock"))
            .args(["--hostname", "node-1"])
            .args(["--metrics-addr", &format!("127.0.0.1:{}", self.agent_port)])
            .arg("--containerd-socket")
            .arg(self.containerd_socket())
            .args(["--cgroup-parent", &self.cgroup_parent()])
            .arg("--run-dir")
            .arg(self.path("netns"))
            .arg("--secrets-dir")
            .arg(self.path("secrets"))
            .args(["--telemetry-interval-s", "1"])
            .args(["--dns-ports", &self.dns_port.to_string(), "--dns-timeout-s", "2"])
            .args(ALLOWED)
            .arg("--bpf-pin-dir")
            .arg(self.pins());
        command
    }

    /// Starts the agent, with more arguments.
    pub fn start_agent(&mut self, arguments: &[&str]) {
        let mut command = self.agent_command();
        command.args(arguments);
        self.agent = Some(Process::start("agent", &mut command, self.directory.path()));
    }

    /// Starts the agent of another node, in the network namespace of this name, with a containerd namespace of its own on the
    /// same daemon and the demo image in it.
    #[must_use]
    pub fn start_other_agent(&self, name: &str, network: &str, arguments: &[&str]) -> Process {
        let archive = self.path("demo.tar");
        let mut import = Self::binary("warren");
        import.args(["image", "import"]).arg(archive).arg("--containerd-socket").arg(self.containerd_socket());
        let _ = Output::of(import.args(["--containerd-namespace", name])).succeeded();
        let agent = Self::binary("warren-agent");
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{network}")).arg(agent.get_program());
        for (variable, value) in agent.get_envs() {
            match value {
                Some(value) => command.env(variable, value),
                None => command.env_remove(variable),
            };
        }
        command
            .args(["run", "--hostname", name, "--no-probes", "--containerd-namespace", name])
            .arg("--socket")
            .arg(self.path("w.sock"))
            .arg("--data-dir")
            .arg(self.path(name))
            .arg("--run-dir")
            .arg(self.path(&format!("netns-{name}")))
            .arg("--secrets-dir")
            .arg(self.path(&format!("secrets-{name}")))
            .arg("--containerd-socket")
            .arg(self.containerd_socket())
            .args(["--cgroup-parent", &format!("{}/{name}", self.cgroup_parent())])
            .args(["--metrics-addr", "127.0.0.1:9465", "--telemetry-interval-s", "1"])
            .args(ALLOWED)
            .args(arguments);
        Process::start(name, &mut command, self.directory.path())
    }

    /// Starts an agent that observes the whole host.
    pub fn start_observer(&mut self, arguments: &[&str]) {
        let mut command = Self::binary("warren-agent");
        command
            .args(["observe", "--hostname", "node-1"])
            .args(["--metrics-addr", &format!("127.0.0.1:{}", self.agent_port)])
            .arg("--containerd-socket")
            .arg(self.containerd_socket())
            .args(["--dns-ports", &self.dns_port.to_string(), "--dns-timeout-s", "2"])
            .arg("--bpf-pin-dir")
            .arg(self.pins())
            .args(arguments);
        self.agent = Some(Process::start("observer", &mut command, self.directory.path()));
        until("the observer is ready", || self.is_ready(self.agent_port).then_some(()));
    }

    /// Waits until the agent is ready.
    pub fn wait_ready(&self) {
        until("the agent is ready", || self.is_ready(self.agent_port).then_some(()));
    }

    fn is_ready(&self, port: u16) -> bool {
        self.get(port, "/ready").is_some_and(|(status, _)| status == 200)
    }

    /// An HTTP answer of an endpoint: status and body.
    #[must_use]
    pub fn get(&self, port: u16, path: &str) -> Option<(u16, String)> {
        let agent = ureq::Agent::new_with_config(
            ureq::Agent::config_builder()
                .http_status_as_error(false)
                .timeout_global(Some(Duration::from_secs(5)))
                .build(),
        );
        let mut response = agent.get(format!("http://127.0.0.1:{port}{path}")).call().ok()?;
        let status = response.status().as_u16();
        response.body_mut().read_to_string().ok().map(|body| (status, body))
    }

    /// The manager's metrics now.
    #[must_use]
    pub fn manager_metrics(&self) -> Metrics {
        self.metrics(self.manager_port)
    }

    /// The agent's metrics now.
    #[must_use]
    pub fn agent_metrics(&self) -> Metrics {
        self.metrics(self.agent_port)
    }

    /// What is served on a port of this machine now.
    #[must_use]
    pub fn metrics(&self, port: u16) -> Metrics {
        let (status, body) = self.get(port, "/metrics").expect("metrics");
        assert_eq!(status, 200);
        Metrics::parse(&body)
    }

    /// The command `cargo xtask up`, in this world: it starts its own containerd, manager and agent there.
    #[must_use]
    pub fn up_command(&self) -> Command {
        let mut command = Self::binary("xtask");
        command
            .args(["up", "--no-build", "--name", self.cgroup_parent().trim_start_matches('/')])
            .args(["--api-port", &self.api_port.to_string()])
            .args(["--metrics-port", &self.manager_port.to_string()])
            .args(["--agent-metrics-port", &self.agent_port.to_string()])
            .arg("--directory")
            .arg(self.path("up"))
            // Nothing answers there: one is started.
            .arg("--containerd-socket")
            .arg(self.path("none.sock"))
            .arg("--socket")
            .arg(self.path("w.sock"));
        command
    }

    /// Runs `warren`.
    #[must_use]
    pub fn warren(&self, arguments: &[&str]) -> Output {
        Output::of(Self::binary("warren").args(["--manager", &self.manager_address()]).args(arguments))
    }

    /// Runs `warren image import`.
    #[must_use]
    pub fn warren_image_import(&self, archive: &Path) -> Output {
        let mut command = Self::binary("warren");
        command.args(["image", "import"]).arg(archive).arg("--containerd-socket").arg(self.containerd_socket());
        Output::of(&mut command)
    }

    /// Runs a daemon that is expected to fail at once; one that does not is killed.
    #[must_use]
    pub fn run(command: &mut Command) -> Output {
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let child = child.expect("the command can be run");
        let pid = Pid::from_child(&child);
        let (done, ended) = std::sync::mpsc::channel::<()>();
        let watchdog = std::thread::spawn(move || {
            if let Err(std::sync::mpsc::RecvTimeoutError::Timeout) = ended.recv_timeout(RUN_PATIENCE) {
                let _ = kill_process(pid, Signal::KILL);
            }
        });
        // Reads both while it waits: who fills a pipe that nobody reads never ends.
        let output = child.wait_with_output().expect("a child");
        drop(done);
        watchdog.join().expect("the watchdog does not panic");
        Output::from(&output)
    }

    /// Runs `ctr` in the agent's namespace.
    #[must_use]
    pub fn ctr(&self, arguments: &[&str]) -> Output {
        self.ctr_of("warren", arguments)
    }

    /// Runs `ctr` in the namespace of another agent.
    #[must_use]
    pub fn ctr_of(&self, namespace: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(find("ctr"));
        command.arg("--address").arg(self.containerd_socket()).args(["--namespace", namespace]).args(arguments);
        Output::of(&mut command)
    }

    /// Creates a service of the demo image that runs `script`, and waits until it runs.
    pub fn create(&self, name: &str, replicas: u32, options: &[&str], script: &str) {
        let replicas = replicas.to_string();
        let mut arguments = vec!["service", "create", name, "--image", image_name(), "--replicas", &replicas, "--wait"];
        arguments.extend(options);
        arguments.extend(["--", "sh", "-c", script]);
        let _ = self.warren(&arguments).succeeded();
    }

    /// A service's containers as JSON.
    #[must_use]
    pub fn containers(&self, service: &str) -> Vec<Value> {
        let listed = self.warren(&["service", "ps", "--all", service, "--format", "json"]).succeeded();
        match serde_json::from_str(&listed).expect("JSON") {
            Value::Array(containers) => containers,
            other => panic!("not a list: {other}"),
        }
    }

    /// A service's only container, once `check` holds for it.
    #[must_use]
    pub fn container_when(&self, service: &str, what: &str, check: impl Fn(&Value) -> bool) -> Value {
        until(what, || self.containers(service).into_iter().find(|container| check(container)))
    }

    /// Ids and process ids of all running tasks.
    #[must_use]
    pub fn tasks(&self) -> Vec<(String, u32)> {
        let listed = self.ctr(&["tasks", "ls"]).succeeded();
        let mut tasks: Vec<_> = listed
            .lines()
            .skip(1)
            .filter_map(|line| {
                let fields: Vec<_> = line.split_whitespace().collect();
                (fields.get(2) == Some(&"RUNNING")).then(|| (fields[0].to_owned(), fields[1].parse().unwrap_or(0)))
            })
            .collect();
        tasks.sort();
        tasks
    }

    /// What is left on the machine of containers: records, snapshots that are not an image's, cgroups.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        let mut left: Vec<String> =
            self.ctr(&["containers", "ls", "-q"]).succeeded().lines().map(|id| format!("container {id}")).collect();
        let snapshots = self.ctr(&["snapshots", "ls"]).succeeded();
        left.extend(snapshots.lines().filter(|line| line.contains("Active")).map(|line| format!("snapshot {line}")));
        left.extend(self.cgroups().into_iter().flat_map(|parent| {
            let children = fs::read_dir(parent).into_iter().flatten().flatten();
            // What another agent's writers of logs are in is the agent's.
            let is_left = |path: &PathBuf| path.is_dir() && !path.to_string_lossy().ends_with("-logs");
            let left = children.map(|entry| entry.path()).filter(is_left);
            left.map(|path| format!("cgroup {}", path.display()))
        }));
        left
    }

    /// Removes the containers of a namespace of containerd's, whatever state they are in.
    fn remove_containers(&self, namespace: &str) {
        for id in self.ctr_of(namespace, &["containers", "ls", "-q"]).stdout.lines() {
            let _ = self.ctr_of(namespace, &["tasks", "kill", "--signal", "SIGKILL", "--all", id]);
            // A record that goes before its task leaves a shim, and a slow machine takes its time. The list of tasks is not asked: it
            // leaves out those whose shim is slow to answer.
            for _ in 0..200 {
                let deleted = self.ctr_of(namespace, &["tasks", "delete", "--force", id]);
                if deleted.code == 0 || deleted.stderr.contains("not found") {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            let _ = self.ctr_of(namespace, &["containers", "delete", id]);
        }
    }

    /// containerd's shims that live, by process id.
    fn shims(&self) -> Vec<i32> {
        let socket = self.containerd_socket().display().to_string();
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let is_shim = |pid: &i32| {
            // Empty for one that has ended and was not yet waited for.
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut arguments = command.split(|byte| *byte == 0);
            arguments.next().is_some_and(|program| program.ends_with(b"containerd-shim-runc-v2"))
                && arguments.any(|argument| argument == socket.as_bytes())
        };
        processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_shim).collect()
    }

    /// The parent cgroup's directories, one a hierarchy.
    #[must_use]
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let hierarchies = mounts.lines().filter_map(|line| {
            let mut fields = line.split(' ');
            let (target, kind) = (fields.nth(1)?, fields.next()?);
            let both = [self.name.clone(), format!("{}-logs", self.name)].map(|name| Path::new(target).join(name));
            matches!(kind, "cgroup" | "cgroup2").then_some(both)
        });
        hierarchies.flatten().filter(|path| path.is_dir()).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Asked, not killed: it lets containerd finish deleting tasks, which otherwise leaves their shims behind.
        if let Some(agent) = self.agent.take().filter(|_| !std::thread::panicking()) {
            let _ = agent.terminate();
        }
        self.manager = None;
        if self.containerd.is_some() {
            let listed = self.ctr(&["namespaces", "ls", "-q"]).stdout;
            for namespace in listed.lines() {
                self.remove_containers(namespace);
            }
            if !std::thread::panicking() {
                until("containerd's shims end with their tasks", || self.shims().is_empty().then_some(()));
            }
            self.stop_containerd();
            for shim in self.shims() {
                let _ = Pid::from_raw(shim).map(|pid| kill_process(pid, Signal::KILL));
            }
        }
        let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
        // Processes that encrypt for its nodes end with their sockets.
        for node in
            entries(self.directory.path()).filter_map(|entry| fs::read_to_string(entry.path().join("node-id")).ok())
        {
            let _ = fs::remove_file(format!("/var/run/wireguard/wg-{:.12}.sock", node.trim()));
        }
        // Namespaces that an agent which was killed has kept.
        let kept =
            entries(self.directory.path()).filter(|entry| entry.file_name().to_string_lossy().starts_with("netns"));
        for kept in kept.flat_map(|directory| entries(&directory.path())) {
            let _ = rustix::mount::unmount(kept.path(), rustix::mount::UnmountFlags::DETACH);
        }
        for secrets in entries(self.directory.path()).filter(|e| e.file_name().to_string_lossy().starts_with("secrets"))
        {
            let _ = rustix::mount::unmount(secrets.path(), rustix::mount::UnmountFlags::DETACH);
        }
        // Nothing of it may stay: neither programs in the kernel nor directories.
        let _ = fs::remove_dir_all(self.pins());
        for parent in self.cgroups() {
            for child in fs::read_dir(&parent).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(child.path());
            }
            let _ = fs::remove_dir(parent);
        }
        if !std::thread::panicking() {
            let left = until_within(Duration::from_secs(5), "the cgroups are gone", || {
                let left = self.cgroups();
                for parent in &left {
                    let _ = fs::remove_dir(parent);
                }
                left.is_empty().then_some(left)
            });
            drop(left);
        }
    }
}
