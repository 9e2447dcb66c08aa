//! Logs: one line an event on stderr.

use std::io::IsTerminal as _;

use tracing_subscriber::{
    EnvFilter, Layer as _,
    filter::{FilterExt as _, filter_fn},
    fmt,
    prelude::*,
};

use crate::signals::Signals;

/// How events are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// For people.
    #[default]
    Text,
    /// For programs: one JSON object a line.
    Json,
}

/// Starts logging, to the collector too where `signals` have one. `filter` is in `tracing_subscriber`'s syntax (`info`,
/// `warren_agent=debug`); an invalid one counts as `info`. Does nothing when logging has been started before.
pub fn init(filter: &str, style: Style, signals: &Signals) {
    let filter = quiet(filter);
    let layer = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let stderr = match style {
        Style::Text => layer.with_target(false).boxed(),
        Style::Json => layer.json().boxed(),
    };
    // Spans are for traces: a line says what happened, not within what.
    let events = parse(&filter).and(filter_fn(|metadata| metadata.is_event()));
    let registry = tracing_subscriber::registry();
    // What the exporter's own transport logs would be exported, and logged again.
    let exported = parse(&format!("{filter},h2=off,hyper=off,hyper_util=off,tonic=off,tower=off,opentelemetry=off"));
    let started = registry.with(stderr.with_filter(events)).with(signals.traces()).with(signals.logs(exported));
    // Somebody else's subscriber is as good as ours.
    drop(started.try_init());
}

/// The filter as it was given, if it is one.
pub(crate) fn checked(filter: &str) -> Result<String, String> {
    EnvFilter::try_new(filter).map(|_| filter.to_owned()).map_err(|error| error.to_string())
}

fn parse(filter: &str) -> EnvFilter {
    EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"))
}

/// A filter that leaves out what libraries say about every entry, file, connection and question, unless the filter names them. Of a member
/// that is away, consensus warns ten times a second; of what strangers send, whoever reads it as often as they like.
fn quiet(filter: &str) -> String {
    const CHATTY: [(&str, &str); 8] = [
        ("openraft", "error"),
        ("raft_log", "warn"),
        ("chunked_wal", "warn"),
        ("rustls", "error"),
        ("h2", "error"),
        ("hyper", "error"),
        ("hickory_server", "error"),
        ("hickory_proto", "error"),
    ];
    let mut quiet = filter.to_owned();
    for (library, level) in CHATTY.into_iter().filter(|(library, _)| !filter.contains(library)) {
        quiet.push_str(&format!(",{library}={level}"));
    }
    quiet
}
