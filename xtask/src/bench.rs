//! Measuring.

use anyhow::Result;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {}

pub(crate) fn run(_arguments: Arguments) -> Result<()> {
    anyhow::bail!("not there yet")
}
