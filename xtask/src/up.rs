//! Running the product: containerd if none runs, manager and agent, and three containers to look at.

use std::{
    fs,
    io::Write as _,
    os::unix::{net::UnixStream, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    build_ebpf,
    network::Before,
    run::{cargo, find, step, target},
    setup,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Build and run the optimised binaries.
    #[arg(long)]
    release: bool,
    /// Everything that is written goes below; removed in the end. A directory of the build unless given.
    #[arg(long)]
    directory: Option<PathBuf>,
    /// A containerd to use if it answers; otherwise one is started for the while.
    #[arg(long, default_value = "/run/containerd/containerd.sock")]
    containerd_socket: PathBuf,
    /// Where `warren` finds the manager.
    #[arg(long, default_value = "/run/warren/warren.sock")]
    socket: PathBuf,
    #[arg(long, default_value_t = 7443)]
    api_port: u16,
    #[arg(long, default_value_t = 9464)]
    metrics_port: u16,
    #[arg(long, default_value_t = 9465)]
    agent_metrics_port: u16,
    /// Names the cgroup, the pins and containerd's namespace.
    #[arg(long, default_value = "warren")]
    name: String,
    /// The machine is set up and everything is built.
    #[arg(long)]
    no_build: bool,
}

impl Arguments {
    /// Refuses what would touch things that are not this run's.
    fn check(&self) -> Result<()> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if self.name.is_empty() || !self.name.chars().all(plain) {
            bail!("--name: {:?} is not made of a-z, 0-9 and '-'", self.name);
        }
        if UnixStream::connect(&self.socket).is_ok() {
            bail!("a manager answers on {} already: stop it, or give another --socket", self.socket.display());
        }
        let directory = self.directory();
        let is_empty = fs::read_dir(&directory).map_or(true, |mut entries| entries.next().is_none());
        if !is_empty && !directory.join(MARKER).exists() {
            bail!("{} holds something else: it would be removed in the end", directory.display());
        }
        Ok(())
    }

    fn directory(&self) -> PathBuf {
        self.directory.clone().unwrap_or_else(|| target().join("up"))
    }
}

/// Writes a line, whatever becomes of it: who reads it may have gone, and what was started is to be taken away all the same.
macro_rules! say {
    ($($text:tt)*) => {{
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}

/// Marks a directory as made by this command, to be removed in the end.
const MARKER: &str = ".warren-up";
const SERVICE: &str = "demo";
const REPLICAS: &str = "3";
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("this must run as root: it runs containers and loads BPF programs");
    }
    if !arguments.no_build {
        setup::run(setup::Arguments { tests: false, bench: false })?;
        build_ebpf::run()?;
        let profile = if arguments.release { "release" } else { "dev" };
        // Not --quiet: the first build takes minutes.
        step("building Warren", cargo().args(["build", "--locked", "--package", "warren-cli", "--profile", profile]))?;
    }
    arguments.check()?;
    // Ctrl-C ends the wait below; the children are in groups of their own and do not see it.
    let (interrupt, interrupted) = mpsc::channel();
    // Nobody listens any more once the wait is over.
    let on_signal = move || interrupt.send(()).unwrap_or_default();
    ctrlc::set_handler(on_signal).context("signals cannot be handled")?;

    let warren = target().join(if arguments.release { "release" } else { "debug" }).join("warren");
    let directory = arguments.directory();
    let made_socket_directory = arguments.socket.parent().is_some_and(|directory| !directory.exists());
    let mut up = Up {
        arguments,
        warren,
        directory,
        containerd: None,
        manager_and_agent: None,
        made_socket_directory,
        network: Before::look(),
    };
    let outcome = up.start().and_then(|()| up.show(&interrupted));
    say!("\n==> cleaning up");
    if let Err(error) = up.clean_up() {
        say!("    {error:#}");
        return outcome.and(Err(error));
    }
    outcome
}

struct Up {
    arguments: Arguments,
    warren: PathBuf,
    directory: PathBuf,
    containerd: Option<(Child, PathBuf)>,
    manager_and_agent: Option<Child>,
    /// The socket's directory was not there before.
    made_socket_directory: bool,
    network: Before,
}

impl Up {
    fn containerd_socket(&self) -> &Path {
        self.containerd.as_ref().map_or(&self.arguments.containerd_socket, |(_, socket)| socket)
    }

    fn start(&mut self) -> Result<()> {
        fs::create_dir_all(&self.directory)?;
        fs::write(self.directory.join(MARKER), "")?;
        let _ = fs::remove_dir_all(self.directory.join("data"));
        if UnixStream::connect(&self.arguments.containerd_socket).is_ok() {
            say!("==> using the containerd on {}", self.arguments.containerd_socket.display());
        } else {
            self.start_containerd()?;
        }
        say!("==> making the demo image from busybox");
        let archive = self.directory.join("demo.tar");
        warren_demo_image::write(&find("busybox").context("busybox is missing")?, &archive)?;

        say!("==> starting manager and agent");
        let name = &self.arguments.name;
        let mut command = Command::new(&self.warren);
        command
            .arg("up")
            .arg("--data-dir")
            .arg(self.directory.join("data"))
            .arg("--socket")
            .arg(&self.arguments.socket)
            .args(["--listen-addr", &format!("127.0.0.1:{}", self.arguments.api_port)])
            .args(["--metrics-addr", &format!("127.0.0.1:{}", self.arguments.metrics_port)])
            .args(["--agent-metrics-addr", &format!("127.0.0.1:{}", self.arguments.agent_metrics_port)])
            .arg("--containerd-socket")
            .arg(self.containerd_socket())
            .args(["--containerd-namespace", name, "--cgroup-parent", &format!("/{name}")])
            .arg("--run-dir")
            .arg(self.directory.join("network"))
            .arg("--secrets-dir")
            .arg(self.directory.join("secrets"))
            .args(["--bpf-pin-dir", &format!("/sys/fs/bpf/{name}")]);
        self.manager_and_agent = Some(self.spawn("warren", &mut command)?);
        let ready = || self.warren(&["node", "ls"]).is_ok_and(|listed| listed.contains(" ready "));
        if !self.wait("the node to be ready", ready)? {
            bail!(
                "Warren did not start:\n{}",
                fs::read_to_string(self.directory.join("warren.log")).unwrap_or_default()
            );
        }
        let socket = self.containerd_socket().to_string_lossy().into_owned();
        let archive = archive.to_string_lossy().into_owned();
        self.warren(&["image", "import", &archive, "--containerd-socket", &socket, "--containerd-namespace", name])?;
        say!("==> creating the service {SERVICE} with {REPLICAS} containers");
        self.warren(&[
            "service",
            "create",
            SERVICE,
            "--image",
            warren_demo_image::NAME,
            "--replicas",
            REPLICAS,
            "--wait",
        ])?;
        Ok(())
    }

    fn start_containerd(&mut self) -> Result<()> {
        say!("==> starting containerd, as none answers on {}", self.arguments.containerd_socket.display());
        let directory = self.directory.join("containerd");
        fs::create_dir_all(&directory)?;
        let socket = directory.join("containerd.sock");
        let (root, state) = (directory.join("root"), directory.join("state"));
        let text = format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\n  address = {socket:?}\n"
        );
        let config = directory.join("config.toml");
        fs::write(&config, text)?;
        let mut command = Command::new(find("containerd").context("containerd is missing")?);
        command.arg("--config").arg(&config);
        let child = self.spawn("containerd", &mut command)?;
        self.containerd = Some((child, socket.clone()));
        if !self.wait("containerd to answer", || UnixStream::connect(&socket).is_ok())? {
            bail!("containerd did not start; see {}", self.directory.join("containerd.log").display());
        }
        Ok(())
    }

    /// Starts a child whose output goes to a file, in a process group of its own.
    fn spawn(&self, name: &str, command: &mut Command) -> Result<Child> {
        let log = fs::File::create(self.directory.join(format!("{name}.log")))?;
        let child = command.process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        child.with_context(|| format!("{name} cannot be started"))
    }

    fn warren(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.warren);
        command.args(["--manager", &format!("unix://{}", self.arguments.socket.display())]).args(arguments);
        let output = command.output()?;
        if !output.status.success() {
            bail!("warren {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn wait(&self, what: &str, mut done: impl FnMut() -> bool) -> Result<bool> {
        say!("    waiting for {what}");
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if done() {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(false)
    }

    /// Says where to look, then shows every change of the service's containers until Ctrl-C.
    fn show(&mut self, interrupted: &mpsc::Receiver<()>) -> Result<()> {
        let Arguments { metrics_port, agent_metrics_port, socket, .. } = &self.arguments;
        let warren = match socket.to_str() {
            Some("/run/warren/warren.sock") => self.warren.display().to_string(),
            _ => format!("{} --manager unix://{}", self.warren.display(), socket.display()),
        };
        say!(
            "\nWarren is up.\n\n  \
             metrics        http://127.0.0.1:{metrics_port}/metrics (manager, every node's kernel timings)\n                 \
             http://127.0.0.1:{agent_metrics_port}/metrics (agent)\n  \
             health         http://127.0.0.1:{metrics_port}/ready and http://127.0.0.1:{agent_metrics_port}/ready\n  \
             logs           {}\n  \
             try            {warren} service ps {SERVICE}\n                 \
             {warren} service scale {SERVICE} 5\n                 \
             {warren} node ls\n                 \
             {warren} image import FILE.tar --containerd-socket {containerd} --containerd-namespace {name}\n\n\
             Timed in the kernel, until Ctrl-C:\n",
            self.directory.display(),
            containerd = self.containerd_socket().display(),
            name = self.arguments.name,
        );
        let mut shown = Vec::new();
        loop {
            let lines = self.timings()?;
            for line in lines.iter().filter(|line| !shown.contains(*line)) {
                say!("  {line}");
            }
            shown = lines;
            if interrupted.recv_timeout(Duration::from_millis(500)).is_ok() {
                return Ok(());
            }
            let ended =
                self.manager_and_agent.as_mut().is_some_and(|child| child.try_wait().is_ok_and(|s| s.is_some()));
            if ended {
                bail!("Warren ended; see {}", self.directory.join("warren.log").display());
            }
        }
    }

    /// A line for each of the service's containers.
    fn timings(&self) -> Result<Vec<String>> {
        let listed = match self.warren(&["service", "ps", SERVICE, "--format", "json"]) {
            Ok(listed) => listed,
            // The user may have removed it.
            Err(_) => return Ok(Vec::new()),
        };
        let containers: Vec<Value> = serde_json::from_str(&listed)?;
        let line = |container: &Value| {
            let status = &container["status"];
            let ms = |what: &str| {
                // 64-bit integers are strings in protobuf's JSON.
                let nanos = status["kernel"][what].as_str().and_then(|nanos| nanos.parse::<f64>().ok());
                nanos.map_or_else(|| "      -   ".to_owned(), |nanos| format!("{:7.1} ms", nanos / 1e6))
            };
            format!(
                "{SERVICE}-{}  {}  {:9}  create {}  start {}  stop {}",
                container["slot"],
                container["id"].as_str().unwrap_or_default().chars().take(12).collect::<String>(),
                status["state"].as_str().unwrap_or_default().trim_start_matches("CONTAINER_STATE_").to_lowercase(),
                ms("createNanos"),
                ms("startNanos"),
                ms("stopNanos")
            )
        };
        Ok(containers.iter().map(line).collect())
    }

    /// Removes containers that an agent which died has left; there are none otherwise. The namespace is this run's.
    fn remove_containers(&self) {
        let ctr = |arguments: &[&str]| {
            let mut command = Command::new("ctr");
            command.arg("--address").arg(self.containerd_socket()).args(["--namespace", &self.arguments.name]);
            command.args(arguments).stderr(Stdio::null()).output().map(|output| output.stdout).unwrap_or_default()
        };
        let listed = ctr(&["containers", "ls", "--quiet"]);
        for id in String::from_utf8_lossy(&listed).lines() {
            ctr(&["tasks", "kill", "--signal", "SIGKILL", "--all", id]);
            // Its end may take a moment.
            for _ in 0..50 {
                ctr(&["tasks", "delete", "--force", id]);
                if !String::from_utf8_lossy(&ctr(&["tasks", "ls", "--quiet"])).contains(id) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            ctr(&["containers", "delete", id]);
        }
    }

    fn clean_up(&mut self) -> Result<()> {
        // Only what this run's own manager knows of.
        let runs = self.manager_and_agent.as_mut().is_some_and(|child| child.try_wait().is_ok_and(|s| s.is_none()));
        // Orderly if the manager answers in time; what then remains goes by force, with its processes.
        let listed = if runs { self.warren(&["service", "ls", "--format", "json"]) } else { Ok(String::new()) };
        let services: Vec<Value> =
            listed.ok().and_then(|listed| serde_json::from_str(&listed).ok()).unwrap_or_default();
        let names: Vec<&str> = services.iter().filter_map(|service| service["spec"]["name"].as_str()).collect();
        if !names.is_empty() {
            let mut remove = vec!["service", "rm", "--wait", "--timeout", ORDERLY_S];
            remove.extend(names);
            if self.warren(&remove).is_err() {
                say!("    some containers take too long to stop: they are killed");
            }
        }
        if let Some(child) = self.manager_and_agent.take() {
            // The agent is given the time to remove what its containers left.
            std::thread::sleep(Duration::from_millis(500));
            end(child);
        }
        self.remove_containers();
        if let Some((child, _)) = self.containerd.take() {
            end(child);
        }
        self.network.restore(&self.directory.join("network"));
        // Not there if the agent did not get that far.
        let _ = rustix::mount::unmount(self.directory.join("secrets"), rustix::mount::UnmountFlags::DETACH);
        let name = &self.arguments.name;
        remove(&Path::new("/sys/fs/bpf").join(name))?;
        for mount in cgroup_mounts() {
            // Empty by now; one that is not has somebody else's containers.
            let _ = fs::remove_dir(mount.join(name));
            let _ = fs::remove_dir(mount.join(format!("{name}-logs")));
        }
        remove(&self.directory)?;
        if let Some(directory) = self.arguments.socket.parent().filter(|_| self.made_socket_directory) {
            // Not empty if somebody else has found a use for it.
            let _ = fs::remove_dir(directory);
        }
        say!("    nothing is left");
        Ok(())
    }
}

/// Seconds for containers to stop when everything is cleaned up: longer than the usual grace period.
const ORDERLY_S: &str = "15";

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", directory.display()))
        }
        _ => Ok(()),
    }
}

fn cgroup_mounts() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let cgroup = |line: &str| {
        let mut fields = line.split(' ');
        let (target, kind) = (fields.nth(1)?, fields.next()?);
        matches!(kind, "cgroup" | "cgroup2").then(|| PathBuf::from(target))
    };
    mounts.lines().filter_map(cgroup).collect()
}

/// Asks a child to end, and makes it after a while.
fn end(mut child: Child) {
    let signal = |signal| {
        if let Some(pid) = Pid::from_raw(child.id() as i32) {
            // One that has exited cannot be signalled.
            let _ = kill_process(pid, signal);
        }
    };
    signal(Signal::TERM);
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if child.try_wait().is_ok_and(|status| status.is_some()) {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let _ = child.kill();
    let _ = child.wait();
}
