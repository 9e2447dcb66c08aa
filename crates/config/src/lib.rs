//! Settings of Warren's processes: flags, then `WARREN_*` environment variables, then a file in `/etc/warren`, in that order
//! of strength.
//!
//! A *setting* is a command's argument that has an environment variable; its key in the file is its flag's name. Words may be
//! joined by `-` or `_`, or be tables: `otlp-endpoint = "..."` and `[otlp] endpoint = "..."` are the same key. A file is
//! strict: what no command of the program knows is an error.
//!
//! Nothing here knows what the settings are: the commands' definitions do.

mod file;
mod reference;

use std::{
    env,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    process,
};

use clap::{Arg, Command, Parser, error::ErrorKind};

pub use file::{Error, Settings};
pub use reference::markdown;

/// Where files are looked for unless [`DIRECTORY_VARIABLE`] says otherwise.
pub const DIRECTORY: &str = "/etc/warren";
/// Names another directory.
pub const DIRECTORY_VARIABLE: &str = "WARREN_CONFIG_DIR";

/// Parses the process's arguments, with `file` in the configuration's directory behind them. What is wrong ends the process
/// with exit code 2, as `clap` does.
#[must_use]
pub fn parse<T: Parser>(file: &str) -> T {
    let directory = env::var_os(DIRECTORY_VARIABLE).map_or_else(|| PathBuf::from(DIRECTORY), PathBuf::from);
    match parse_from(env::args_os(), &directory.join(file)) {
        Ok(parsed) => parsed,
        Err(Error::Usage(error)) => error.exit(),
        Err(error) => {
            eprintln!("error: {error}");
            process::exit(2);
        }
    }
}

/// Parses `arguments`, with the settings of `path`, if there is such a file, behind them and the environment.
///
/// # Errors
///
/// When the file cannot be read, is no TOML, or has a key or a value that the command does not take; and when the arguments
/// are wrong, or ask for help.
pub fn parse_from<T: Parser>(arguments: impl IntoIterator<Item = OsString>, path: &Path) -> Result<T, Error> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(source) => return Err(Error::Unreadable { path: path.to_owned(), source }),
    };
    let settings = Settings::parse(&text, path)?;
    let command = settings.apply(T::command())?;
    let parsed = command.try_get_matches_from(&arguments).and_then(|mut matches| T::from_arg_matches_mut(&mut matches));
    parsed.map_err(|error| {
        let of_a_value = matches!(error.kind(), ErrorKind::InvalidValue | ErrorKind::ValueValidation);
        // Without the file it would do: the value is the file's.
        if of_a_value && T::command().try_get_matches_from(&arguments).is_ok() {
            Error::BadValue { path: path.to_owned(), message: first_line(&error) }
        } else {
            Error::Usage(error)
        }
    })
}

fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

/// Whether an argument is a setting, and its key if it is.
fn key(argument: &Arg) -> Option<&str> {
    argument.get_env()?;
    argument.get_long()
}

/// A command and all below it.
fn tree(command: &Command) -> Vec<&Command> {
    let mut all = vec![command];
    let mut next = 0;
    while let Some(command) = all.get(next).copied() {
        all.extend(command.get_subcommands());
        next += 1;
    }
    all
}

#[cfg(test)]
mod tests;
