//! Commands that people run in containers: between containerd's named pipes and a manager.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::unix::pipe,
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Streaming, transport::Channel};
use warren_proto::v1::{
    self, dispatcher_client::DispatcherClient, exec_request::Message as Request, exec_response::Message as Response,
};

use crate::runtime::{Containerd, Error, Execution, Streams};

/// Bytes of output that travel together.
const CHUNK: usize = 32 << 10;
/// Chunks on their way; then the command waits.
const AHEAD: usize = 16;
const SIGHUP: u32 = 1;
/// How long a command has to end after a hangup.
const HANGUP_PATIENCE: Duration = Duration::from_secs(2);
/// How long nothing may come of what an ended command's children still write.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// All commands. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Execs {
    containerd: Containerd,
    /// Holds a directory for each, named after its container and itself.
    directory: PathBuf,
    running: Arc<Mutex<HashMap<String, CancellationToken>>>,
}

impl Execs {
    /// Commands with their pipes in `directory`. Those of an agent that was killed have lost their readers: they end.
    pub(crate) fn start(containerd: Containerd, directory: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if let Some((container, id)) = entry.file_name().to_str().and_then(|name| name.split_once('.')) {
                let left = Execution::new(containerd.clone(), container, id);
                tokio::spawn(async move {
                    if left.kill().await.is_ok() {
                        left.delete().await;
                    }
                });
            }
            fs::remove_dir_all(entry.path())?;
        }
        Ok(Self { containerd, directory, running: Arc::default() })
    }

    fn running(&self) -> MutexGuard<'_, HashMap<String, CancellationToken>> {
        // Every change is one insertion or removal: a panic leaves it whole.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The caller of a command has left.
    pub(crate) fn cancel(&self, id: &str) {
        if let Some(token) = self.running().get(id) {
            token.cancel();
        }
    }

    /// Runs a command for a manager's caller, to its end or theirs.
    pub(crate) async fn serve(self, mut dispatcher: DispatcherClient<Channel>, id: String, start: v1::ExecStart) {
        let cancelled = CancellationToken::new();
        self.running().insert(id.clone(), cancelled.clone());
        let (to_manager, receiver) = mpsc::channel(AHEAD);
        let first = v1::ServeExecRequest { id: id.clone(), response: None };
        // The queue is empty.
        let _ = to_manager.send(first).await;
        match dispatcher.serve_exec(ReceiverStream::new(receiver)).await {
            Ok(requests) => {
                let mut requests = requests.into_inner();
                let caller = Caller { to_manager, cancelled };
                let exec_id = format!("exec-{:016x}", rand::random::<u64>());
                let directory = self.directory.join(format!("{}.{exec_id}", start.container));
                if let Err(error) = self.run(&directory, &exec_id, start, &mut requests, &caller).await {
                    let message = crate::probes::describe(&error);
                    // What the runtimes say of a program that is not there.
                    let not_found = ["not found", "no such file or directory"];
                    let is_directory = message.contains("chdir to cwd");
                    let not_found = !is_directory && not_found.iter().any(|text| message.contains(text));
                    let _ = caller.send(Response::Failed(v1::ExecFailed { message, not_found })).await;
                }
                let _ = fs::remove_dir_all(&directory);
                let Caller { to_manager, cancelled } = caller;
                drop(to_manager);
                // To let go of the call before the manager does would take back what is still on its way, and who reads it may be
                // slow.
                let taken = async { while let Ok(Some(_)) = requests.message().await {} };
                cancelled.run_until_cancelled(taken).await;
            }
            Err(status) => tracing::debug!(message = status.message(), "nobody waits for a command"),
        }
        self.running().remove(&id);
    }

    async fn run(
        &self,
        directory: &Path,
        exec_id: &str,
        start: v1::ExecStart,
        requests: &mut Streaming<v1::ExecRequest>,
        caller: &Caller,
    ) -> Result<(), Error> {
        if !start.signal.is_empty() {
            let signal = warren_spec::signal(&start.signal);
            let signal = signal.ok_or_else(|| Error::BadSpec(format!("{:?} is no signal", start.signal)))?;
            // A process without an id is the container's first.
            if !Execution::new(self.containerd.clone(), &start.container, "").signal(signal).await? {
                return Err(Error::BadSpec("the container does not run any more".to_owned()));
            }
            let _ = caller.send(Response::Started(v1::ExecStarted {})).await;
            let _ = caller.send(Response::ExitCode(0)).await;
            return Ok(());
        }
        let pipe_error = |source| Error::Io { action: "making pipes in", path: directory.to_owned(), source };
        let streams = pipes(directory, &start).map_err(pipe_error)?;
        let stdin = streams.stdin.as_deref().map(open_stdin).transpose().map_err(pipe_error)?;
        let open = |path: &Option<PathBuf>| path.as_deref().map(|path| pipe::OpenOptions::new().open_receiver(path));
        let stdout = open(&streams.stdout).transpose().map_err(pipe_error)?;
        let stderr = open(&streams.stderr).transpose().map_err(pipe_error)?;

        let execution = self.containerd.add_process(exec_id, &start, &streams).await?;
        if let Err(error) = execution.start().await {
            execution.delete().await;
            return Err(error);
        }
        let _ = caller.send(Response::Started(v1::ExecStarted {})).await;
        // Only now: without anyone at their other ends, the pipes would seem to be over.
        let sent = AtomicU64::new(0);
        let output = async {
            let stdout = copy(stdout, caller, &sent, Response::Stdout);
            let stderr = copy(stderr, caller, &sent, Response::Stderr);
            tokio::join!(stdout, stderr)
        };
        let input = feed(requests, stdin, &execution);
        let ended = execution.wait();
        tokio::pin!(output, input, ended);
        let (mut written, mut fed) = (false, false);
        let ended = loop {
            tokio::select! {
                ended = &mut ended => break Some(ended),
                _ = &mut output, if !written => written = true,
                () = &mut input, if !fed => fed = true,
                () = caller.left() => break None,
            }
        };
        let Some(ended) = ended else {
            hang_up(&execution).await;
            return Ok(());
        };
        // Before it is deleted: the shim has two seconds from then to pass on what it still has.
        let mut in_time = 0;
        while !written {
            let before = sent.load(Ordering::Relaxed);
            tokio::select! {
                _ = &mut output => written = true,
                () = caller.left() => break,
                () = tokio::time::sleep(LAST_WORDS) => {
                    // Whoever reads may be slow. Where all is taken in time, what comes is not the command's any more, but of what
                    // it has left behind with its pipes.
                    in_time = if caller.has_room() { in_time + 1 } else { 0 };
                    let is_silent = sent.load(Ordering::Relaxed) == before;
                    if in_time >= 3 || (is_silent && in_time > 0) {
                        break;
                    }
                }
            }
        }
        execution.delete().await;
        let _ = caller.send(Response::ExitCode(ended?)).await;
        Ok(())
    }
}

/// Whoever wanted a command.
struct Caller {
    to_manager: mpsc::Sender<v1::ServeExecRequest>,
    cancelled: CancellationToken,
}

impl Caller {
    async fn send(&self, message: Response) -> Result<(), ()> {
        let response = Some(v1::ExecResponse { message: Some(message) });
        self.to_manager.send(v1::ServeExecRequest { id: String::new(), response }).await.map_err(|_| ())
    }

    /// Whether it has taken what it was sent, but for the last.
    fn has_room(&self) -> bool {
        self.to_manager.capacity() > 0
    }

    async fn left(&self) {
        tokio::select! {
            () = self.cancelled.cancelled() => {}
            () = self.to_manager.closed() => {}
        }
    }
}

/// Makes the pipes that a command needs.
fn pipes(directory: &Path, start: &v1::ExecStart) -> io::Result<Streams> {
    fs::create_dir_all(directory)?;
    let make = |name: &str| {
        let path = directory.join(name);
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
        Ok::<_, io::Error>(Some(path))
    };
    Ok(Streams {
        stdin: if start.input { make("stdin")? } else { None },
        stdout: make("stdout")?,
        stderr: if start.terminal.is_some() { None } else { make("stderr")? },
    })
}

/// Opens a pipe that nobody reads yet.
fn open_stdin(path: &Path) -> io::Result<pipe::Sender> {
    pipe::OpenOptions::new().read_write(true).open_sender(path)
}

/// Sends what a command writes until it has closed the pipe.
async fn copy(from: Option<pipe::Receiver>, to: &Caller, sent: &AtomicU64, message: impl Fn(Vec<u8>) -> Response) {
    let Some(mut from) = from else { return };
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        match from.read_buf(&mut chunk).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                if to.send(message(chunk)).await.is_err() {
                    return;
                }
                sent.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Gives a command what comes down: input, its end, and sizes of its terminal.
async fn feed(from: &mut Streaming<v1::ExecRequest>, mut stdin: Option<pipe::Sender>, execution: &Execution) {
    loop {
        let request = from.message().await.ok().flatten();
        let over = request.is_none();
        match request.map_or(Some(Request::InputEnd(v1::ExecInputEnd {})), |request| request.message) {
            Some(Request::Input(bytes)) => {
                if let Some(pipe) = &mut stdin
                    && pipe.write_all(&bytes).await.is_err()
                {
                    stdin = None;
                }
            }
            Some(Request::InputEnd(_)) => {
                if stdin.take().is_some()
                    && let Err(error) = execution.close_input().await
                {
                    tracing::debug!(%error, "a command's input cannot be ended");
                }
            }
            Some(Request::Resize(size)) => {
                if let Err(error) = execution.resize(&size).await {
                    tracing::debug!(%error, "a terminal cannot be resized");
                }
            }
            Some(Request::Start(_)) | None => {}
        }
        if over {
            return;
        }
    }
}

/// Ends a command that nobody looks at any more, as the end of a terminal would.
async fn hang_up(execution: &Execution) {
    let running = execution.running().await;
    let hung_up = execution.signal(SIGHUP).await.is_ok();
    let ended = hung_up && tokio::time::timeout(HANGUP_PATIENCE, execution.wait()).await.is_ok();
    if !ended && let Err(error) = execution.kill().await {
        tracing::warn!(%error, "a command that nobody waits for cannot be ended");
    }
    execution.kill_left(running).await;
    execution.delete().await;
}
