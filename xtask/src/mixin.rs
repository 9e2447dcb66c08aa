//! Rendering what Prometheus and Grafana read from the mixin.

use std::process::Command;

use anyhow::Result;

use crate::{
    run::{step, workspace},
    setup,
};

pub(crate) fn run() -> Result<()> {
    setup::run(setup::Arguments { tests: true, bench: false })?;
    step("rendering deploy/mixin", Command::new("python3").arg(workspace().join("deploy/mixin/render.py")))
}
