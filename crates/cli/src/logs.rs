//! `warren service logs` and `warren container logs`.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, SystemTime},
};

use clap::Args;
use warren_manifest::parse;
use warren_proto::v1::{self, LogStream};

use crate::{client::ClientArguments, error::Error, output, terminal};

#[derive(Args, Clone, Debug)]
pub(crate) struct LogArguments {
    /// Follow log output.
    #[arg(long, short)]
    follow: bool,
    /// Number of lines to show from the end of each container's log.
    #[arg(long, short = 'n', value_name = "LINES")]
    tail: Option<u32>,
    /// Only lines since a timestamp, like 2026-11-22T10:00:00Z, or a relative time, like 10m.
    #[arg(long, value_parser = since)]
    since: Option<pbjson_types::Timestamp>,
    /// Show timestamps.
    #[arg(long, short)]
    timestamps: bool,
}

fn since(text: &str) -> Result<pbjson_types::Timestamp, String> {
    let time = match text.parse::<prost_types::Timestamp>() {
        Ok(time) => time,
        Err(_) => {
            let ago = parse::duration(text).map_err(|_| format!("{text:?} is neither a time nor how long ago"))?;
            let ago = Duration::new(ago.seconds.unsigned_abs(), ago.nanos.unsigned_abs());
            SystemTime::now().checked_sub(ago).unwrap_or(SystemTime::UNIX_EPOCH).into()
        }
    };
    Ok(pbjson_types::Timestamp { seconds: time.seconds, nanos: time.nanos })
}

/// Writes the lines of a service's containers, or of one container. What a container wrote to stderr goes to stderr.
pub(crate) async fn show(
    client: &ClientArguments,
    service: String,
    container: String,
    arguments: LogArguments,
) -> Result<(), Error> {
    let of_service = !service.is_empty();
    let request = v1::StreamLogsRequest {
        service,
        container,
        follow: arguments.follow,
        tail: arguments.tail,
        since: arguments.since,
    };
    let mut lines = client.logs().await?.stream_logs(request).await?.into_inner();
    let mut failed = Ok(());
    let mut written = Written { of_service, timestamps: arguments.timestamps, unfinished: [None, None] };
    // Without following, lines of several containers are put in the order of time.
    let mut held = Vec::new();
    loop {
        match lines.message().await {
            Ok(Some(response)) if arguments.follow || !of_service => written.write(&response),
            Ok(Some(response)) => held.push(response),
            Ok(None) => break,
            Err(status) => {
                failed = Err(status.into());
                break;
            }
        }
    }
    let time = |response: &v1::StreamLogsResponse| {
        response.line.as_ref().and_then(|line| line.time.as_ref()).map(|time| (time.seconds, time.nanos))
    };
    held.sort_by_key(time);
    for response in &held {
        written.write(response);
    }
    written.end();
    failed
}

/// What was written so far, and how.
struct Written {
    of_service: bool,
    timestamps: bool,
    /// The container whose line on stdout, and on stderr, has no end yet.
    unfinished: [Option<String>; 2],
}

impl Written {
    fn write(&mut self, response: &v1::StreamLogsResponse) {
        let line = response.line.clone().unwrap_or_default();
        let to_stderr = line.stream() == LogStream::Stderr;
        let unfinished = self.unfinished[usize::from(to_stderr)].take();
        let goes_on = unfinished.as_ref() == Some(&response.container_id);
        let mut text = Vec::new();
        if unfinished.is_some() && !goes_on {
            text.push(b'\n');
        }
        if !goes_on {
            if self.timestamps
                && let Some(time) = &line.time
            {
                let time = prost_types::Timestamp { seconds: time.seconds, nanos: time.nanos };
                text.extend_from_slice(format!("{time} ").as_bytes());
            }
            if self.of_service {
                let name = &response.service_name;
                let slot = if response.slot == 0 { String::new() } else { format!("-{}", response.slot) };
                let prefix = format!("{name}{slot}@{} {} | ", response.hostname, output::short(&response.container_id));
                text.extend_from_slice(prefix.as_bytes());
            }
        }
        text.extend_from_slice(&line.text);
        if line.partial {
            self.unfinished[usize::from(to_stderr)] = Some(response.container_id.clone());
        } else {
            text.push(b'\n');
        }
        print(to_stderr, &text);
    }

    /// Ends what has no end. What one container wrote is given as it is.
    fn end(self) {
        for (to_stderr, unfinished) in [false, true].into_iter().zip(self.unfinished) {
            if unfinished.is_some() && self.of_service {
                print(to_stderr, b"\n");
            }
        }
    }
}

/// Pipes and files get what the container wrote, byte by byte.
fn print(to_stderr: bool, text: &[u8]) {
    let is_terminal = if to_stderr { io::stderr().is_terminal() } else { terminal::is_output() };
    let safe;
    let text = if is_terminal {
        safe = output::coloured(text);
        safe.as_bytes()
    } else {
        text
    };
    let written = if to_stderr {
        io::stderr().lock().write_all(text)
    } else {
        // Also what has no end yet.
        let mut stdout = io::stdout().lock();
        stdout.write_all(text).and_then(|()| stdout.flush())
    };
    if written.is_err() {
        // A reader that went away, as `head` does, has seen enough.
        std::process::exit(0);
    }
}
