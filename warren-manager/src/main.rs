//! The binary `warren-manager`.

use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use warren_manager::cli::ManagerArguments;
use warren_telemetry::{
    build,
    logs::{self, Style},
};

/// Warren's manager: keeps the cluster's state in Raft, schedules, and tells the agents.
#[derive(Debug, Parser)]
#[command(name = "warren-manager", args_override_self = true, version = build::LONG_VERSION)]
struct Arguments {
    /// What to log, as `level` or `module=level,...`.
    #[arg(long, env = "WARREN_LOG", default_value = "info")]
    log: String,
    /// Log JSON objects, one a line.
    #[arg(long, env = "WARREN_LOG_JSON")]
    log_json: bool,
    #[command(flatten)]
    manager: ManagerArguments,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let style = if arguments.log_json { Style::Json } else { Style::Text };
    logs::init(&logs::quiet(&arguments.log), style);
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        eprintln!("error: signals cannot be handled");
        return ExitCode::FAILURE;
    };
    let shutdown = CancellationToken::new();
    let cancel = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        cancel.cancel();
    });
    match warren_manager::run(arguments.manager.options(), shutdown, || ()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            error.exit_code().into()
        }
    }
}
