//! Processes in containers that run already.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use containerd_client::{services::v1 as api, tonic::Code};
use oci_spec::runtime::{BoxBuilder, Capabilities, Process, Spec, UserBuilder};
use prost_types::Any;
use warren_proto::v1;

use super::{Containerd, Error, users};
use crate::stats::processes_with;

/// containerd's name for a process of an OCI runtime spec as JSON.
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const SIGKILL: u32 = 9;
/// How long a killed process may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// Named pipes of a process, or URIs that the shim knows. Without any, nothing can be written; with one output it must have the other, or
/// the shim crashes and the container with it. A terminal needs no stderr.
#[derive(Clone, Debug, Default)]
pub(crate) struct Streams {
    pub(crate) stdin: Option<PathBuf>,
    pub(crate) stdout: Option<PathBuf>,
    pub(crate) stderr: Option<PathBuf>,
}

/// A process beside a container's first one, from its making to its deletion.
#[derive(Clone, Debug)]
pub(crate) struct Execution {
    containerd: Containerd,
    container: String,
    id: String,
}

impl Execution {
    /// One that may exist.
    pub(crate) fn new(containerd: Containerd, container: &str, id: &str) -> Self {
        Self { containerd, container: container.to_owned(), id: id.to_owned() }
    }

    async fn add(&self, process: &Process, streams: &Streams) -> Result<(), Error> {
        let value = serde_json::to_vec(process).map_err(|error| Error::BadSpec(error.to_string()))?;
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
        let exec = self.containerd.request(api::ExecProcessRequest {
            container_id: self.container.clone(),
            exec_id: self.id.clone(),
            spec: Some(Any { type_url: PROCESS_TYPE.to_owned(), value }),
            stdin: path(&streams.stdin),
            stdout: path(&streams.stdout),
            stderr: path(&streams.stderr),
            terminal: process.terminal().unwrap_or(false),
        });
        self.containerd.client().tasks().exec(exec).await.map_err(Error::call("adding a process"))?;
        Ok(())
    }

    /// Starts it.
    pub(crate) async fn start(&self) -> Result<(), Error> {
        let request = api::StartRequest { container_id: self.container.clone(), exec_id: self.id.clone() };
        let request = self.containerd.request(request);
        self.containerd.client().tasks().start(request).await.map_err(Error::call("starting a process"))?;
        Ok(())
    }

    /// Its exit code, once it has one.
    pub(crate) async fn wait(&self) -> Result<i32, Error> {
        let request = api::WaitRequest { container_id: self.container.clone(), exec_id: self.id.clone() };
        let request = self.containerd.unlimited_request(request);
        let answer = self.containerd.client().tasks().wait(request).await;
        Ok(answer.map_err(Error::call("waiting for a process"))?.into_inner().exit_status as i32)
    }

    /// Signals it. Returns whether it was there: one that has exited is no error.
    pub(crate) async fn signal(&self, signal: u32) -> Result<bool, Error> {
        let request = self.containerd.request(api::KillRequest {
            container_id: self.container.clone(),
            exec_id: self.id.clone(),
            signal,
            all: false,
        });
        match self.containerd.client().tasks().kill(request).await {
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(Error::call("killing a process")(status)),
            Ok(_) => Ok(true),
        }
    }

    /// Its process, while it runs.
    pub(crate) async fn running(&self) -> Option<Running> {
        let request = api::GetRequest { container_id: self.container.clone(), exec_id: self.id.clone() };
        let answer = self.containerd.client().tasks().get(self.containerd.request(request)).await.ok()?;
        let command = answer.into_inner().process.map(|process| process.pid).filter(|pid| *pid != 0)?;
        let (_, first) = self.containerd.task(&self.container).await.ok()??;
        Some(Running { command, first })
    }

    /// Kills what it started and left behind.
    pub(crate) async fn kill_left(&self, running: Option<Running>) {
        if let Some(running) = running {
            // Many processes, perhaps: not on a thread that serves others. A panic is logged.
            let _ = tokio::task::spawn_blocking(move || running.kill_all()).await;
        }
    }

    /// Kills it with all that it started, and waits until it is gone: only then can it be deleted.
    pub(crate) async fn kill(&self) -> Result<(), Error> {
        let running = self.running().await;
        self.kill_left(running).await;
        self.signal(SIGKILL).await?;
        let _ = tokio::time::timeout(KILL_PATIENCE, self.wait()).await;
        Ok(())
    }

    /// Gives its terminal another size, in characters.
    pub(crate) async fn resize(&self, size: &v1::TerminalSize) -> Result<(), Error> {
        let request = self.containerd.request(api::ResizePtyRequest {
            container_id: self.container.clone(),
            exec_id: self.id.clone(),
            width: size.columns,
            height: size.rows,
        });
        self.containerd.client().tasks().resize_pty(request).await.map_err(Error::call("resizing a terminal"))?;
        Ok(())
    }

    /// Ends its standard input, of which the shim holds an end too.
    pub(crate) async fn close_input(&self) -> Result<(), Error> {
        let request = self.containerd.request(api::CloseIoRequest {
            container_id: self.container.clone(),
            exec_id: self.id.clone(),
            stdin: true,
        });
        self.containerd.client().tasks().close_io(request).await.map_err(Error::call("ending a process's input"))?;
        Ok(())
    }

    /// Deletes it, once it has exited: whatever it wrote has been passed on then. It goes with its container otherwise.
    pub(crate) async fn delete(&self) {
        let request = api::DeleteProcessRequest { container_id: self.container.clone(), exec_id: self.id.clone() };
        let _ = self.containerd.client().tasks().delete_process(self.containerd.request(request)).await;
    }
}

impl Containerd {
    /// The process that a container was made with: its user, environment and limits.
    async fn process_of(&self, id: &str) -> Result<Process, Error> {
        let request = self.request(api::GetContainerRequest { id: id.to_owned() });
        let answer = self.client().containers().get(request).await.map_err(Error::call("looking at a container"))?;
        let spec = answer.into_inner().container.and_then(|container| container.spec).unwrap_or_default();
        let spec: Spec = serde_json::from_slice(&spec.value)
            .map_err(|error| Error::BadSpec(format!("the container's spec cannot be read: {error}")))?;
        spec.process().clone().ok_or_else(|| Error::BadSpec("the container's spec has no process".to_owned()))
    }

    /// Makes a process in a container, like its first one but for what `start` says. It does not run yet.
    pub(crate) async fn add_process(
        &self,
        exec_id: &str,
        start: &v1::ExecStart,
        streams: &Streams,
    ) -> Result<Execution, Error> {
        let id = &start.container;
        let mut process = self.process_of(id).await?;
        process.set_args(Some(super::spec::with_same_env(&process, &start.command)));
        process.set_terminal(Some(start.terminal.is_some()));
        if let Some(size) = start.terminal.as_ref().filter(|size| size.rows > 0 && size.columns > 0) {
            let size = BoxBuilder::default().height(size.rows).width(size.columns).build();
            process.set_console_size(Some(size.map_err(super::spec::cannot_be_built)?));
        }
        if !start.working_dir.is_empty() {
            process.set_cwd(PathBuf::from(&start.working_dir));
        }
        let mut env = process.env().clone().unwrap_or_default();
        if !start.user.is_empty() {
            let gone = || Error::BadSpec("the container does not run any more".to_owned());
            let (_, pid) = self.task(id).await?.ok_or_else(gone)?;
            let identity = users::resolve_inside(&start.user, pid).await?;
            env.push(format!("HOME={}", identity.home));
            become_user(&mut process, &identity)?;
        }
        env.extend(start.env.iter().map(|(name, value)| format!("{name}={value}")));
        process.set_env(Some(super::spec::last_of_each_name(env)));
        let execution = Execution::new(self.clone(), id, exec_id);
        execution.add(&process, streams).await?;
        Ok(execution)
    }

    /// Runs a command in a container as its first process runs, and returns its exit code; `None` if it took longer than
    /// `limit` and was killed. What it writes is lost.
    ///
    /// # Errors
    ///
    /// When it cannot be started: no such program in the image, for one.
    pub async fn run_in(&self, id: &str, command: &[String], limit: Duration) -> Result<Option<i32>, Error> {
        let start = v1::ExecStart { container: id.to_owned(), command: command.to_vec(), ..Default::default() };
        let exec_id = format!("check-{:016x}", rand::random::<u64>());
        // Without any, what it writes to is open for reading alone, and what writes fails.
        let lost = || Some(PathBuf::from("file:///dev/null"));
        let streams = Streams { stdin: None, stdout: lost(), stderr: lost() };
        let execution = self.add_process(&exec_id, &start, &streams).await?;
        let began = std::time::Instant::now();
        let ran = match execution.start().await {
            Ok(()) => {
                let running = execution.running().await;
                match tokio::time::timeout(limit.saturating_sub(began.elapsed()), execution.wait()).await {
                    Ok(code) => {
                        execution.kill_left(running).await;
                        code.map(Some)
                    }
                    Err(_) => execution.kill().await.map(|()| None),
                }
            }
            Err(error) => Err(error),
        };
        execution.delete().await;
        ran
    }
}

/// A command's process while it runs, and its container's first one; the host's ids.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    command: u32,
    first: u32,
}

impl Running {
    /// Kills the command's session and all that descend from it: what it started ends with it. Those that begin meanwhile are found the
    /// next time round. Nothing outside of the container's cgroup is touched, whatever has become of the numbers.
    fn kill_all(self) {
        const ROUNDS: usize = 20;
        for _ in 0..ROUNDS {
            let all = processes_with(self.first).into_iter().filter(|id| *id != self.first);
            let all: Vec<_> = all.filter_map(|id| Some((id, Lineage::of(id)?))).collect();
            let mut doomed: BTreeSet<u32> =
                all.iter().filter(|(_, lineage)| lineage.session == self.command).map(|(id, _)| *id).collect();
            loop {
                let before = doomed.len();
                let is_child = |lineage: &Lineage| lineage.parent == self.command || doomed.contains(&lineage.parent);
                let children: Vec<_> = all.iter().filter(|(_, lineage)| is_child(lineage)).map(|(id, _)| *id).collect();
                doomed.extend(children);
                if doomed.len() == before {
                    break;
                }
            }
            if kill_each(doomed) == 0 {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Signals processes; how many there were.
fn kill_each(processes: impl IntoIterator<Item = u32>) -> usize {
    let pids = processes.into_iter().filter_map(|id| rustix::process::Pid::from_raw(i32::try_from(id).ok()?));
    pids.filter(|pid| rustix::process::kill_process(*pid, rustix::process::Signal::KILL).is_ok()).count()
}

/// Where a process comes from, in the host's ids.
struct Lineage {
    parent: u32,
    session: u32,
}

impl Lineage {
    /// `None` for one that has ended.
    fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // Its name may have anything in it, and ends with the last parenthesis.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let (state, parent) = (fields.next()?, fields.next()?.parse().ok()?);
        let session = fields.nth(1)?.parse().ok()?;
        (state != "Z").then_some(Self { parent, session })
    }
}

/// What root may do is what the container may at most; others may do nothing that takes a capability.
fn become_user(process: &mut Process, identity: &users::Identity) -> Result<(), Error> {
    let user = UserBuilder::default()
        .uid(identity.uid)
        .gid(identity.gid)
        .additional_gids(identity.groups.clone())
        .build()
        .map_err(super::spec::cannot_be_built)?;
    let is_the_same = process.user().uid() == identity.uid;
    process.set_user(user);
    if !is_the_same && let Some(mut capabilities) = process.capabilities().clone() {
        let bounding = capabilities.bounding().clone().unwrap_or_default();
        let given = if identity.uid == 0 { bounding } else { Capabilities::new() };
        capabilities.set_effective(Some(given.clone())).set_permitted(Some(given));
        capabilities.set_inheritable(Some(Capabilities::new())).set_ambient(Some(Capabilities::new()));
        process.set_capabilities(Some(capabilities));
    }
    Ok(())
}
