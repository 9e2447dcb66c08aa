//! Tables for people, JSON and YAML for programs.

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, Write as _},
    time::{Duration, SystemTime},
};

use clap::{Args, ValueEnum};
use serde::Serialize;
use tabled::{
    builder::Builder,
    settings::{Padding, Style},
};

use crate::error::Error;

/// How to show something.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
    /// For programs, and for people who want to see everything.
    Yaml,
}

#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct FormatArguments {
    /// How to show it.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: Format,
}

/// Writes a line to stdout. A reader that went away, as `head` does, ends the command quietly.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    let mut stdout = io::stdout().lock();
    if let Err(error) = stdout.write_fmt(text).and_then(|()| stdout.write_all(b"\n")) {
        std::process::exit(i32::from(error.kind() != io::ErrorKind::BrokenPipe));
    }
}

/// Like `println!`, by [`line()`].
macro_rules! say {
    ($($text:tt)*) => { $crate::output::line(format_args!($($text)*)) };
}
pub(crate) use say;

/// Characters of an id in a table: enough to tell objects of one cluster apart.
const SHORT_ID: usize = 12;

pub(crate) fn short(id: &str) -> String {
    id.chars().take(SHORT_ID).collect()
}

pub(crate) fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) {
    for line in render(header, rows) {
        say!("{line}");
    }
}

/// A table's lines.
pub(crate) fn render<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> Vec<String> {
    let mut builder = Builder::default();
    builder.push_record(header);
    for row in rows {
        builder.push_record(row);
    }
    let mut table = builder.build();
    table.with(Style::empty()).with(Padding::new(0, 3, 0, 0));
    table.to_string().lines().map(|line| line.trim_end().to_owned()).collect()
}

/// Lines of a name and a value each.
pub(crate) fn fields(fields: &[(&str, String)]) {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in fields {
        say!("{name:width$}  {value}");
    }
}

/// Shows something to a program; or does nothing and is false, when it is people who want to see it.
pub(crate) fn to_program(format: Format, value: &impl Serialize) -> Result<bool, Error> {
    match format {
        Format::Table => return Ok(false),
        Format::Json => say!("{}", serde_json::to_string_pretty(value)?),
        Format::Yaml => say!("{}", serde_saphyr::to_string(value)?.trim_end()),
    }
    Ok(true)
}

/// The same of one of many that come over time, each of which can be read as soon as it is there: a line of JSON, or a document of
/// YAML.
pub(crate) fn next_to_program(format: Format, value: &impl Serialize) -> Result<bool, Error> {
    match format {
        Format::Table => return Ok(false),
        Format::Json => say!("{}", serde_json::to_string(value)?),
        Format::Yaml => say!("---\n{}", serde_saphyr::to_string(value)?.trim_end()),
    }
    Ok(true)
}

/// Labels and the like, as `name=value, name=value`.
pub(crate) fn pairs(map: &BTreeMap<String, String>) -> String {
    map.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(", ")
}

/// A point in time in UTC, to the second, as RFC 3339 has it.
pub(crate) fn time(time: &pbjson_types::Timestamp) -> String {
    let at = time::OffsetDateTime::from_unix_timestamp(time.seconds).unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    at.format(&time::format_description::well_known::Rfc3339).unwrap_or_default()
}

/// How long ago something was, in its largest unit.
pub(crate) fn ago(time: Option<&pbjson_types::Timestamp>) -> String {
    let Some(time) = time else { return "-".to_owned() };
    let then = SystemTime::UNIX_EPOCH + Duration::new(time.seconds.unsigned_abs(), time.nanos.unsigned_abs());
    format!("{} ago", coarse(SystemTime::now().duration_since(then).unwrap_or_default()))
}

/// How long it is until something, which may be over.
pub(crate) fn left(time: Option<&pbjson_types::Timestamp>) -> Option<Duration> {
    let time = time?;
    let then = SystemTime::UNIX_EPOCH + Duration::new(time.seconds.unsigned_abs(), time.nanos.unsigned_abs());
    Some(then.duration_since(SystemTime::now()).unwrap_or_default())
}

/// A duration in its largest unit.
pub(crate) fn coarse(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A duration in nanoseconds, 0 being unknown.
pub(crate) fn ms(nanos: u64) -> String {
    if nanos == 0 { "-".to_owned() } else { format!("{:.1} ms", nanos as f64 / 1e6) }
}

pub(crate) fn bytes(bytes: i64) -> String {
    const MIB: f64 = 1024.0 * 1024.0;
    let mib = bytes as f64 / MIB;
    if mib >= 1024.0 { format!("{:.1} GiB", mib / 1024.0) } else { format!("{mib:.0} MiB") }
}
