//! The binary `warren-manager`.

use std::process::ExitCode;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use warren_manager::cli::ManagerArguments;
use warren_telemetry::build;

/// Warren's manager: keeps the cluster's state in Raft, schedules, and tells the agents.
#[derive(Debug, Parser)]
#[command(name = "warren-manager", args_override_self = true, version = build::LONG_VERSION)]
struct Arguments {
    #[command(flatten)]
    manager: ManagerArguments,
}

#[tokio::main]
async fn main() -> ExitCode {
    let Arguments { manager } = warren_config::parse(warren_manager::cli::FILE);
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
    let outcome = match manager.telemetry.start(&warren_manager::identity(&manager.data_dir)) {
        Ok(signals) => {
            let outcome = warren_manager::run(manager.options(), shutdown, || ()).await;
            signals.shutdown().await;
            outcome
        }
        Err(error) => Err(error.into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            error.exit_code().into()
        }
    }
}
