//! The binary `warren-agent`.

use std::process::ExitCode;

use warren_agent::cli;

fn main() -> ExitCode {
    // Before anything else: one of these runs beside every container.
    if let Some(code) = cli::beside_an_agent() {
        return code;
    }
    cli::main(warren_config::parse(cli::FILE))
}
