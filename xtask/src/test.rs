//! Everything that must hold before a change lands.

use std::fs;

use anyhow::Result;

use crate::{
    build_ebpf, kernels,
    run::{cargo, find, print_parts, step, workspace},
    setup, sim,
};

/// Runs of the simulation.
const SEEDS: u64 = 100;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only the tests, without formatting, lints and documentation.
    #[arg(long)]
    tests_only: bool,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let result = everything(arguments);
    print_parts();
    result
}

fn everything(arguments: Arguments) -> Result<()> {
    setup::run(setup::Arguments { tests: true, bench: false })?;
    build_ebpf::run()?;
    if !arguments.tests_only {
        step("formatting", cargo().args(["fmt", "--all", "--check"]))?;
        step(
            "lints",
            cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--locked", "--", "--deny", "warnings"]),
        )?;
        step(
            "lints of the kernel programs",
            cargo()
                .args(["clippy", "--quiet", "--profile", "ebpf", "--package", "warren-agent-ebpf", "--locked"])
                .args(["--bin", build_ebpf::BINARY, "--features", "programs", "--", "--deny", "warnings"])
                // They use unstable features; to lint them, the stable compiler will do, and this machine as the target.
                .env("RUSTC_BOOTSTRAP", "1")
                .env("CARGO_TARGET_DIR", workspace().join("target/ebpf-lints")),
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
    sim::run(sim::Arguments { seeds: SEEDS, first: 1, seed: None })?;
    end_to_end()?;
    // The emulation is at odds with 6.12; see CONTRIBUTING.md.
    kernels::run(kernels::Arguments { versions: ["5.10", "6.1"].map(str::to_owned).into() })
}

/// Runs the end-to-end tests: of the whole workspace, so that nothing is built with fewer features than before, and with that again.
fn end_to_end() -> Result<()> {
    if find("cargo-nextest").is_some() {
        // .config/nextest.toml says which of them run side by side.
        let nextest = ["nextest", "run", "--workspace", "--locked", "--profile", "e2e"];
        let filter = ["--filterset", "package(warren-tests) & kind(test)"];
        return step("end-to-end tests", cargo().args(nextest).args(filter));
    }
    let mut tests = cargo();
    tests.args(["test", "--workspace", "--locked", "--no-fail-fast"]);
    for suite in suites()? {
        tests.args(["--test", &suite]);
    }
    step("end-to-end tests, one after the other", tests.args(["--", "--test-threads", "1"]))
}

/// The end-to-end tests' targets.
fn suites() -> Result<Vec<String>> {
    let mut suites = Vec::new();
    for file in fs::read_dir(workspace().join("tests/tests"))? {
        let path = file?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            suites.extend(path.file_stem().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    suites.sort();
    Ok(suites)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        fs,
    };

    use super::{suites, workspace};

    #[test]
    fn end_to_end_suites_are_found() {
        let suites = suites().expect("readable");
        assert!(suites.contains(&"up".to_owned()) && suites.contains(&"cluster".to_owned()), "{suites:?}");
    }

    #[test]
    fn what_the_specification_names_is_there() {
        let read =
            |file: &str| fs::read_to_string(workspace().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        let specification = read("SPECIFICATION.md");
        let named: Vec<_> = specification.split('`').filter_map(|word| word.split_once(".rs::")).collect();
        assert!(named.len() > 10, "{named:?}");
        for (file, test) in named {
            let file = format!("{file}.rs");
            assert!(read(&file).contains(&format!("fn {test}(")), "{file} has no test {test}");
        }
        let table = specification.lines().filter(|line| line.starts_with("| ")).skip(1);
        for promise in table {
            let enforced = promise.rsplit('|').nth(1).unwrap_or_default();
            let is_said = ["::", "cargo xtask", "pending"].iter().any(|word| enforced.contains(word));
            assert!(is_said, "nothing is said to enforce {promise}");
        }
    }

    #[test]
    fn no_banned_crate_is_locked() {
        let read = |file: &str| -> toml::Table {
            fs::read_to_string(workspace().join(file)).expect("readable").parse().expect("TOML")
        };
        let (deny, lock) = (read("deny.toml"), read("Cargo.lock"));
        let banned = deny["bans"]["deny"].as_array().expect("a list").iter().map(|ban| ban["crate"].clone());
        let locked = lock["package"].as_array().expect("a list").iter();
        let locked: BTreeSet<&str> = locked.filter_map(|package| package["name"].as_str()).collect();
        assert!(locked.contains("tokio"), "the lock file is not read right");
        let found: Vec<_> = banned.filter(|name| name.as_str().is_some_and(|name| locked.contains(name))).collect();
        assert!(found.is_empty(), "{found:?}");
    }

    /// The manager's modules, each with those of the modules that it uses which stand above it in the list of its lib.rs.
    #[test]
    fn the_managers_modules_use_those_below_them() {
        let source = workspace().join("warren-manager/src");
        let list = fs::read_to_string(source.join("lib.rs")).expect("readable");
        let rows =
            list.lines().filter_map(|line| line.strip_prefix("//! | ")?.split_once(" |").map(|(names, _)| names));
        let level_of: BTreeMap<String, usize> = (0..)
            .zip(rows)
            .flat_map(|(level, names)| names.split(", ").map(move |name| (name.replace(['[', ']', '`'], ""), level)))
            .collect();
        let mut looked_at = 0;
        let mut directories = vec![source.clone()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).expect("readable") {
                let path = entry.expect("readable").path();
                if path.is_dir() {
                    directories.push(path);
                    continue;
                }
                let inner = path.strip_prefix(&source).expect("below it").with_extension("");
                let module = inner.iter().next().and_then(|name| name.to_str()).expect("a name");
                let Some(level) = level_of.get(module) else {
                    assert!(["lib", "main"].contains(&module), "{module} is not in the list of lib.rs");
                    continue;
                };
                let text = fs::read_to_string(&path).expect("readable");
                // What only tests use may be anywhere.
                let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
                let code: Vec<_> = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
                let text = code.join("\n");
                for used in text.match_indices("crate::").flat_map(|(at, found)| first_names(&text[at + found.len()..]))
                {
                    looked_at += 1;
                    let of_used = level_of.get(used).unwrap_or_else(|| panic!("{used} in {module}"));
                    assert!(
                        of_used >= level || inner.ends_with("tests"),
                        "{} uses {used}, which is above it",
                        path.display()
                    );
                }
            }
        }
        assert!(looked_at > 100, "{looked_at}");
    }

    /// The first names of the paths that a `use` has: of `{a::{b, c}, d}`, these are `a` and `d`.
    fn first_names(used: &str) -> Vec<&str> {
        let name = |text: &'_ str| text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
        let Some(list) = used.strip_prefix('{') else { return vec![&used[..name(used)]] };
        let (mut depth, mut names, mut begins) = (0, Vec::new(), true);
        for (at, c) in list.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => begins = true,
                _ if begins && c.is_alphabetic() => {
                    names.push(&list[at..at + name(&list[at..])]);
                    begins = false;
                }
                _ => {}
            }
        }
        names
    }
}
