use std::fmt::Write as _;

use clap::{Arg, Command};

use super::{key, tree};

/// The settings of a program, which reads `file`, as a section of a Markdown document.
#[must_use]
pub fn markdown(command: &Command, file: &str) -> String {
    let mut out = format!(
        "## {}\n\nFile: `/etc/warren/{file}`\n\n| key in the file | flag | environment | default | description |\n|---|---|---|---|---|\n",
        command.get_name()
    );
    let mut seen = Vec::new();
    for argument in tree(command).iter().flat_map(|command| command.get_arguments()) {
        let Some(name) = key(argument).filter(|name| !seen.contains(name)) else { continue };
        seen.push(name);
        let variable = argument.get_env().map(|variable| variable.to_string_lossy()).unwrap_or_default();
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        writeln!(out, "| `{}` | `--{name}` | `{variable}` | {} | {help} |", name.replace('-', "_"), default(argument))
            .expect("writing to a string cannot fail");
    }
    out
}

fn default(argument: &Arg) -> String {
    let values: Vec<_> = argument.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    match values.join(",") {
        none if none.is_empty() => String::new(),
        values => format!("`{values}`"),
    }
}
