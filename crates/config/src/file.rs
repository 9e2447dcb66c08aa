use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use clap::{Arg, Command, builder::OsStr};
use toml::{Table, Value};

use super::{key, tree};

/// What is wrong with a file or with the arguments in front of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is there and cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is no TOML.
    #[error("{}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What and in which line.
        message: String,
    },
    /// The file has a key that is no setting.
    #[error("{}: there is no setting {key}; the settings are {known}", path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key as a flag's name.
        key: String,
        /// All there are, by name.
        known: String,
    },
    /// A setting is there twice, in two spellings.
    #[error("{}: {key} is set twice", path.display())]
    Twice {
        /// The file.
        path: PathBuf,
        /// The key as a flag's name.
        key: String,
    },
    /// A setting's value is of a type that no flag takes.
    #[error("{}: {key} is a text, a number, true or false, or a list of them", path.display())]
    BadType {
        /// The file.
        path: PathBuf,
        /// The key as a flag's name.
        key: String,
    },
    /// A value is not the setting's.
    #[error("{}: {message}", path.display())]
    BadValue {
        /// The file.
        path: PathBuf,
        /// Which, and why.
        message: String,
    },
    /// The arguments are wrong, or ask for help.
    #[error(transparent)]
    Usage(clap::Error),
}

/// A file's settings: values by the name of their flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    path: PathBuf,
    values: BTreeMap<String, Vec<String>>,
}

impl Settings {
    /// Reads TOML; `path` is what errors name.
    ///
    /// # Errors
    ///
    /// When it is no TOML, or a value is neither a scalar nor a list of scalars.
    pub fn parse(text: &str, path: &Path) -> Result<Self, Error> {
        let table: Table = text.parse().map_err(|error: toml::de::Error| {
            let line = error.span().map_or(1, |span| text[..span.start].matches('\n').count() + 1);
            Error::Syntax { path: path.to_owned(), message: format!("line {line}: {}", error.message()) }
        })?;
        let mut settings = Self { path: path.to_owned(), values: BTreeMap::new() };
        settings.add("", table)?;
        Ok(settings)
    }

    fn add(&mut self, prefix: &str, table: Table) -> Result<(), Error> {
        for (name, value) in table {
            let key = format!("{prefix}{}", name.replace('_', "-"));
            let bad_type = || Error::BadType { path: self.path.clone(), key: key.clone() };
            let values = match value {
                Value::Table(table) => {
                    self.add(&format!("{key}-"), table)?;
                    continue;
                }
                Value::Array(values) => values.iter().map(scalar).collect::<Option<_>>().ok_or_else(bad_type)?,
                value => vec![scalar(&value).ok_or_else(bad_type)?],
            };
            if self.values.insert(key.clone(), values).is_some() {
                return Err(Error::Twice { path: self.path.clone(), key });
            }
        }
        Ok(())
    }

    /// Makes the settings the defaults of `command` and of the commands below it, wherever they are arguments.
    ///
    /// # Errors
    ///
    /// When a setting is an argument of none of them.
    pub fn apply(&self, command: Command) -> Result<Command, Error> {
        let commands = tree(&command);
        let mut known: Vec<&str> =
            commands.iter().flat_map(|command| command.get_arguments()).filter_map(key).collect();
        if let Some(unknown) = self.values.keys().find(|name| !known.contains(&name.as_str())) {
            known.sort_unstable();
            known.dedup();
            return Err(Error::UnknownKey { path: self.path.clone(), key: unknown.clone(), known: known.join(", ") });
        }
        Ok(self.set_defaults(command))
    }

    fn set_defaults(&self, command: Command) -> Command {
        let with_default = |argument: Arg| match key(&argument).and_then(|key| self.values.get(key)) {
            Some(values) => argument.default_values(values.iter().map(OsStr::from)),
            None => argument,
        };
        let mut command = command.mut_args(with_default);
        let names: Vec<String> = command.get_subcommands().map(|command| command.get_name().to_owned()).collect();
        for name in names {
            command = command.mut_subcommand(name, |command| self.set_defaults(command));
        }
        command
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(truth) => Some(truth.to_string()),
        Value::Datetime(_) | Value::Array(_) | Value::Table(_) => None,
    }
}
