//! The binary `warren-agent`.

use std::process::ExitCode;

use clap::Parser as _;
use warren_agent::cli::Arguments;

fn main() -> ExitCode {
    warren_agent::cli::main(Arguments::parse())
}
