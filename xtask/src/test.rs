//! Everything that must hold before a change lands.

use anyhow::Result;

use crate::{
    build_ebpf,
    run::{cargo, find, step},
    setup,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only the tests, without formatting, lints and documentation.
    #[arg(long)]
    tests_only: bool,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    setup::run(setup::Arguments { tests: true })?;
    build_ebpf::run()?;
    if !arguments.tests_only {
        step("formatting", cargo().args(["fmt", "--all", "--check"]))?;
        step(
            "lints",
            cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--locked", "--", "--deny", "warnings"]),
        )?;
        step(
            "documentation",
            cargo()
                .args(["doc", "--quiet", "--workspace", "--no-deps", "--locked", "--document-private-items"])
                .env("RUSTDOCFLAGS", "--deny warnings"),
        )?;
    }
    step("building", cargo().args(["build", "--quiet", "--workspace", "--locked"]))?;
    // One process a test keeps them apart; without nextest, cargo's own runner does.
    if find("cargo-nextest").is_some() {
        step(
            "unit and property tests",
            cargo().args([
                "nextest",
                "run",
                "--workspace",
                "--locked",
                "--exclude",
                "warren-tests",
                "--no-tests",
                "pass",
            ]),
        )?;
    } else {
        let exclude = ["test", "--workspace", "--locked", "--exclude", "warren-tests"];
        step("unit and property tests", cargo().args(exclude))?;
    }
    // One after the other: they share the kernel and two of them time things.
    step(
        "end-to-end tests",
        cargo().args(["test", "--package", "warren-tests", "--locked", "--", "--test-threads", "1"]),
    )
}
