//! Deterministic simulation of the control plane: managers, agents and operators in one thread, on simulated wires, disks and
//! clocks, while machines crash, links fail, disks fill up and clocks step. What must hold is looked at after every step; in the
//! end nothing goes wrong any more, and everything must come right. A seed is a run: it reproduces exactly.

mod agent;
mod disk;
mod entropy;
mod history;
mod manager;
mod network;
mod operator;
mod shared;
mod world;

use std::{
    env, panic,
    process::{Command, ExitCode, Output},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use clap::Parser;

#[derive(Debug, Parser)]
#[command(name = "warren-sim")]
struct Arguments {
    /// Run this seed, and say what happens.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// How many seeds to run.
    #[arg(long, default_value_t = 20)]
    seeds: u64,
    /// The first of them.
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Say only what came of it.
    #[arg(long)]
    quiet: bool,
    /// How many at a time; one for each processor unless given.
    #[arg(long)]
    jobs: Option<usize>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.seed {
        Some(seed) => one(seed, arguments.quiet),
        None => many(&arguments),
    }
}

fn one(seed: u64, quiet: bool) -> ExitCode {
    entropy::seed(seed);
    if let Ok(filter) = env::var("WARREN_SIM_LOG") {
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    }
    // Whatever was made before the seed was known, as this thread's hash maps, must not matter.
    let told = panic::take_hook();
    panic::set_hook(Box::new(move |what| {
        world::panicked(what);
        told(what);
    }));
    let ran =
        thread::Builder::new().name("world".to_owned()).stack_size(16 << 20).spawn(move || world::run(seed, !quiet));
    match ran.map(thread::JoinHandle::join) {
        Ok(Ok(Ok(digest))) => {
            println!("seed {seed}: passed, {digest}");
            ExitCode::SUCCESS
        }
        Ok(Ok(Err(why))) => {
            println!("seed {seed}: FAILED, {why}");
            ExitCode::FAILURE
        }
        Ok(Err(_)) | Err(_) => {
            println!("seed {seed}: FAILED, the simulation panicked");
            ExitCode::FAILURE
        }
    }
}

/// Each seed in a process of its own, so that nothing of one reaches another.
fn many(arguments: &Arguments) -> ExitCode {
    let began = Instant::now();
    let next = AtomicU64::new(arguments.first);
    let end = arguments.first + arguments.seeds;
    let failed = Mutex::new(Vec::new());
    let jobs = arguments.jobs.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let (passed, said) = child(seed);
                    if !passed {
                        failed.lock().unwrap_or_else(PoisonError::into_inner).push(seed);
                    }
                    if !passed || !arguments.quiet {
                        print!("{said}");
                    }
                }
            });
        }
    });
    let mut failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.sort_unstable();
    println!(
        "{} of {} seeds passed in {:.0} s",
        arguments.seeds - failed.len() as u64,
        arguments.seeds,
        began.elapsed().as_secs_f64()
    );
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("failed: {failed:?}; `cargo xtask sim --seed {}` shows how", failed[0]);
    ExitCode::FAILURE
}

fn child(seed: u64) -> (bool, String) {
    let ran =
        env::current_exe().and_then(|own| Command::new(own).args(["--quiet", "--seed", &seed.to_string()]).output());
    match ran {
        Ok(Output { status, stdout, stderr }) => {
            let mut said = String::from_utf8_lossy(&stdout).into_owned();
            if !status.success() {
                said.push_str(&String::from_utf8_lossy(&stderr));
            }
            (status.success(), said)
        }
        Err(error) => (false, format!("seed {seed}: {error}\n")),
    }
}
