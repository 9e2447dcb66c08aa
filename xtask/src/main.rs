//! Warren's chores. `cargo xtask up` runs the product, `cargo xtask test` proves it; both prepare the machine themselves.

mod bench;
mod build_ebpf;
mod fuzz;
mod kernels;
mod mixin;
mod network;
mod run;
mod setup;
mod sim;
mod test;
mod up;

use std::process::ExitCode;

use clap::Parser;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about, args_override_self = true)]
enum Command {
    /// Finds or installs what is missing: containerd and runc, protoc, the eBPF toolchain. Safe to repeat.
    Setup(setup::Arguments),
    /// Builds the kernel programs and puts them where the agent embeds them.
    BuildEbpf,
    /// Runs a manager and an agent with three containers on this machine until Ctrl-C.
    Up(up::Arguments),
    /// Formats, lints, builds and tests everything, kernel and end to end included. What CI runs.
    Test(test::Arguments),
    /// Simulates managers, agents and operators while everything fails that can, by seed.
    Sim(sim::Arguments),
    /// Gives every parser of what strangers send a million damaged inputs.
    Fuzz(fuzz::Arguments),
    /// Tests on other kernels, in QEMU: the kernel programs, and what depends on cgroup v2, WireGuard and NFS.
    Kernels(kernels::Arguments),
    /// Renders dashboards and alerts from deploy/mixin.
    Mixin,
    /// Measures Warren beside what one would use instead, in one run.
    Bench(bench::Arguments),
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Setup(arguments) => setup::run(arguments),
        Command::BuildEbpf => build_ebpf::run(),
        Command::Up(arguments) => up::run(arguments),
        Command::Test(arguments) => test::run(arguments),
        Command::Sim(arguments) => sim::run(arguments),
        Command::Fuzz(arguments) => fuzz::run(arguments),
        Command::Kernels(arguments) => kernels::run(arguments),
        Command::Mixin => mixin::run(),
        Command::Bench(arguments) => bench::run(arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
