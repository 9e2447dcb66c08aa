//! Damaged inputs for everything that reads what strangers send.

use anyhow::Result;

use crate::run::{cargo, step};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Inputs for each parser.
    #[arg(long, default_value_t = 1_000_000)]
    inputs: u64,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let mut tests = cargo();
    tests
        .args(["test", "--quiet", "--workspace", "--exclude", "warren-tests", "--locked", "--lib"])
        .args(["--", "whatever_comes_is_read_or_refused"])
        .env("WARREN_FUZZ_INPUTS", arguments.inputs.to_string());
    step(&format!("giving each parser {} inputs", arguments.inputs), &mut tests)
}
