//! The binary `warren-agent`.

use std::process::ExitCode;

use warren_agent::cli;

fn main() -> ExitCode {
    cli::main(warren_config::parse(cli::FILE))
}
