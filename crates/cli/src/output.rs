//! Tables for people, JSON and YAML for programs.

pub(crate) use warren_manifest::time;

use std::{
    borrow::Cow,
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
    /// Human-readable table.
    #[default]
    Table,
    /// JSON.
    Json,
    /// YAML with all fields.
    Yaml,
}

#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct FormatArguments {
    /// Output format.
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: Format,
}

/// Whether a terminal would do something else than show it: control characters, and those that turn the direction of what follows.
fn is_obeyed(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn escaped(text: &str, shown: impl Fn(char) -> bool) -> Cow<'_, str> {
    if text.chars().all(&shown) {
        return Cow::Borrowed(text);
    }
    let mut result = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if shown(c) { result.push(c) } else { result.extend(c.escape_default()) }
    }
    Cow::Owned(result)
}

/// What others say, as one line of text and nothing else: a terminal does what is in the names, labels and messages that it shows.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, |c| !is_obeyed(c))
}

/// The same of several lines.
pub(crate) fn printable_lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| !is_obeyed(c) || c == '\n' || c == '\t')
}

/// What a program wrote, for a terminal: colours and tabs are left to it, and nothing else that it would obey.
pub(crate) fn coloured(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let mut result = String::with_capacity(text.len());
    let mut rest = &*text;
    while let Some(c) = rest.chars().next() {
        let parameters = rest
            .strip_prefix("\u{1b}[")
            .map(|after| after.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';' || c == ':'));
        if let Some(after) = parameters.and_then(|after| after.strip_prefix('m')) {
            result.push_str(&rest[..rest.len() - after.len()]);
            rest = after;
            continue;
        }
        // A carriage return before a line's end is how some systems end lines.
        let ends_line = c == '\r' && rest.starts_with("\r\n");
        if is_obeyed(c) && c != '\n' && c != '\t' && !ends_line {
            result.extend(c.escape_default())
        } else {
            result.push(c)
        }
        rest = &rest[c.len_utf8()..];
    }
    result
}

/// Writes a line to stdout, which may have line breaks in it. A reader that went away, as `head` does, ends the command quietly.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    let text = text.to_string();
    let mut stdout = io::stdout().lock();
    if let Err(error) = stdout.write_all(printable_lines(&text).as_bytes()).and_then(|()| stdout.write_all(b"\n")) {
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
        builder.push_record(row.iter().map(|cell| printable(cell)));
    }
    let mut table = builder.build();
    table.with(Style::empty()).with(Padding::new(0, 3, 0, 0));
    table.to_string().lines().map(|line| line.trim_end().to_owned()).collect()
}

/// Lines of a name and a value each.
pub(crate) fn fields(fields: &[(&str, String)]) {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in fields {
        say!("{name:width$}  {}", printable(value));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_say_is_shown_and_not_obeyed() {
        for (said, shown) in [
            ("plain \u{e9}\u{4e16} text", "plain \u{e9}\u{4e16} text"),
            ("\u{1b}[2J\u{1b}]0;owned\u{7}", "\\u{1b}[2J\\u{1b}]0;owned\\u{7}"),
            ("a\nerror: b\r", "a\\nerror: b\\r"),
            ("\u{9b}2J\u{85}", "\\u{9b}2J\\u{85}"),
            ("user\u{202e}nimda", "user\\u{202e}nimda"),
        ] {
            assert_eq!(printable(said), shown);
        }
        assert_eq!(printable_lines("a\n\tb\u{1b}c"), "a\n\tb\\u{1b}c");
        let table = render(["NAME", "MESSAGE"], [["web".to_owned(), "x\nforged  row\u{1b}[A".to_owned()]]);
        assert_eq!(table, ["NAME   MESSAGE", "web    x\\nforged  row\\u{1b}[A"]);
    }

    #[test]
    fn colours_are_a_terminals_and_nothing_else_is() {
        for (said, shown) in [
            (&b"\x1b[1;31mred\x1b[0m\tand\r\n"[..], "\u{1b}[1;31mred\u{1b}[0m\tand\r\n"),
            (b"\x1b[38:5:1mred\x1b[m", "\u{1b}[38:5:1mred\u{1b}[m"),
            (b"50%\r60%", "50%\\r60%"),
            (b"\x1b[2J\x1b]52;c;x\x07\x1b[31", "\\u{1b}[2J\\u{1b}]52;c;x\\u{7}\\u{1b}[31"),
            (b"\xff\x9b2J", "\u{fffd}\u{fffd}2J"),
        ] {
            assert_eq!(coloured(said), shown);
        }
    }
}
