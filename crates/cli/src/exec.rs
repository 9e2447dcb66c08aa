//! `warren container exec`.

use std::{
    collections::BTreeMap,
    io::{self, Read as _},
    thread,
};

use clap::Args;
use tokio::{
    signal::unix::{self, SignalKind},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use warren_manifest::parse;
use warren_proto::v1::{self, exec_request::Message as Request, exec_response::Message as Response};

use crate::{
    client::ClientArguments,
    complete,
    error::Error,
    terminal::{self, Raw},
};

/// Bytes of input that travel together.
const CHUNK: usize = 32 << 10;
/// Chunks on their way; then reading waits.
const AHEAD: usize = 4;

#[derive(Args, Clone, Debug)]
pub(crate) struct Arguments {
    /// Keep stdin open and forward it to the command.
    #[arg(long, short)]
    interactive: bool,
    /// Allocate a pseudo-TTY.
    #[arg(long, short)]
    tty: bool,
    /// Additional environment variable, as NAME=VALUE; may be repeated.
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = parse::pair)]
    env: Vec<(String, String)>,
    /// Working directory of the command [default: the container's]
    #[arg(long, short = 'w', value_name = "PATH")]
    workdir: Option<String>,
    /// User name or UID, optionally with :GROUP or :GID [default: the container's user]
    #[arg(long, short, value_name = "USER")]
    user: Option<String>,
    /// Name, like web-1, ID or unique ID prefix.
    #[arg(add = complete::containers())]
    container: String,
    /// Command and arguments; not run in a shell.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs a command in a container and ends as it does.
pub(crate) async fn run(arguments: Arguments, client: &ClientArguments) -> Result<(), Error> {
    if arguments.tty && arguments.interactive && !terminal::is_input() {
        return Err(Error::Usage(
            "--tty: the input is no terminal; without it, input is passed on as it is".to_owned(),
        ));
    }
    let mut env: BTreeMap<_, _> = arguments.env.into_iter().collect();
    if arguments.tty {
        let own = std::env::var("TERM").unwrap_or_else(|_| "xterm".to_owned());
        env.entry("TERM".to_owned()).or_insert(own);
    }
    let start = v1::ExecStart {
        container: arguments.container,
        command: arguments.command,
        env,
        working_dir: arguments.workdir.unwrap_or_default(),
        user: arguments.user.unwrap_or_default(),
        input: arguments.interactive,
        terminal: arguments.tty.then(|| terminal::size().unwrap_or_default()),
        signal: String::new(),
    };
    let (requests, mut responses) = begin(client, start).await?;
    match responses.message().await?.and_then(|response| response.message) {
        Some(Response::Started(_)) => {}
        Some(Response::Failed(failed)) => return Err(Error::NotStarted { failed }),
        _ => return Err(Error::NoAnswer),
    }

    let raw = if arguments.tty && arguments.interactive { Some(Raw::enter()?) } else { None };
    if arguments.interactive {
        let input = requests.clone();
        // Nobody waits for it: it may be in a read that never ends.
        thread::spawn(move || read_input(&input));
    }
    let mut resized = unix::signal(SignalKind::window_change())?;
    let code = loop {
        let response = tokio::select! {
            response = responses.message() => response?.ok_or(Error::NoAnswer)?,
            Some(()) = resized.recv(), if arguments.tty => {
                let size = terminal::size().unwrap_or_default();
                let _ = requests.send(request(Request::Resize(size))).await;
                continue;
            }
        };
        let written = match response.message {
            Some(Response::Stdout(bytes)) => write(io::stdout().lock(), &bytes),
            Some(Response::Stderr(bytes)) => write(io::stderr().lock(), &bytes),
            Some(Response::ExitCode(code)) => break code,
            Some(Response::Failed(failed)) => return Err(Error::NotStarted { failed }),
            Some(Response::Started(_)) | None => Ok(()),
        };
        match written {
            // A reader that went away, as `head` does, has seen enough; the command ends with this one.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written?,
        }
    };
    drop(raw);
    if code == 0 { Ok(()) } else { Err(Error::Exited(u8::try_from(code).unwrap_or(u8::MAX))) }
}

/// Sends a container's first process a signal.
pub(crate) async fn signal(client: &ClientArguments, container: &str, signal: &str) -> Result<(), Error> {
    if warren_spec::signal(signal).is_none() {
        return Err(Error::Usage(format!("{signal:?} is not a signal: use a name like TERM or SIGTERM, or a number")));
    }
    let start = v1::ExecStart { container: container.to_owned(), signal: signal.to_owned(), ..Default::default() };
    let (_requests, mut responses) = begin(client, start).await?;
    while let Some(response) = responses.message().await? {
        match response.message {
            Some(Response::ExitCode(_)) => return Ok(()),
            Some(Response::Failed(failed)) => {
                return Err(Error::NotSignalled { container: container.to_owned(), why: failed.message });
            }
            _ => {}
        }
    }
    Err(Error::NoAnswer)
}

/// Begins a call: what goes up, and what comes down.
pub(crate) async fn begin(
    client: &ClientArguments,
    start: v1::ExecStart,
) -> Result<(mpsc::Sender<v1::ExecRequest>, Streaming<v1::ExecResponse>), Error> {
    let (requests, receiver) = mpsc::channel(AHEAD);
    // The queue is empty: this does not wait.
    let _ = requests.send(request(Request::Start(start))).await;
    let responses = client.exec().await?.exec(ReceiverStream::new(receiver)).await?.into_inner();
    Ok((requests, responses))
}

pub(crate) fn request(message: Request) -> v1::ExecRequest {
    v1::ExecRequest { message: Some(message) }
}

fn write(mut to: impl io::Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

fn read_input(to: &mpsc::Sender<v1::ExecRequest>) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let message = match io::stdin().lock().read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Ok(0) | Err(_) => Request::InputEnd(v1::ExecInputEnd {}),
            Ok(read) => Request::Input(buffer[..read].to_vec()),
        };
        let over = matches!(message, Request::InputEnd(_));
        if to.blocking_send(request(message)).is_err() || over {
            return;
        }
    }
}
