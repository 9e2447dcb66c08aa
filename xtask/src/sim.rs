//! The control plane in simulation.

use anyhow::Result;

use crate::run::{cargo, step, target};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How many seeds to run.
    #[arg(long, default_value_t = 20)]
    pub(crate) seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    pub(crate) first: u64,
    /// Run this one instead, and say what happens in it.
    #[arg(long)]
    pub(crate) seed: Option<u64>,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    step("building", cargo().args(["build", "--quiet", "--workspace", "--bin", "warren-sim", "--locked"]))?;
    let mut sim = std::process::Command::new(target().join("debug/warren-sim"));
    match arguments.seed {
        Some(seed) => sim.args(["--seed", &seed.to_string()]),
        None => sim.args(["--quiet", "--seeds", &arguments.seeds.to_string(), "--first", &arguments.first.to_string()]),
    };
    step("simulating the control plane", &mut sim)
}
