//! Measuring Warren beside what one would use instead.

use anyhow::Result;

use crate::{
    build_ebpf,
    run::{cargo, step, target},
    setup,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only these: containers, hundred, network, names, packets, raft, scale, failover, memory.
    sections: Vec<String>,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    setup::run(setup::Arguments { tests: true, bench: true })?;
    build_ebpf::run()?;
    // Not --quiet: the first optimised build takes minutes.
    step("building everything optimised", cargo().args(["build", "--locked", "--workspace", "--release"]))?;
    step("measuring", std::process::Command::new(target().join("release/warren-bench")).args(&arguments.sections))
}
