//! Logs: one line an event on stderr.

use std::io::IsTerminal as _;

use tracing_subscriber::{EnvFilter, fmt, prelude::*};

/// How events are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// For people.
    #[default]
    Text,
    /// For programs: one JSON object a line.
    Json,
}

/// Starts logging. `filter` is in `tracing_subscriber`'s syntax (`info`, `warren_agent=debug`); an invalid one counts as
/// `info`. Does nothing when logging has been started before.
pub fn init(filter: &str, style: Style) {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let layer = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let registry = tracing_subscriber::registry().with(filter);
    let started = match style {
        Style::Text => registry.with(layer.with_target(false)).try_init(),
        Style::Json => registry.with(layer.json()).try_init(),
    };
    // Somebody else's subscriber is as good as ours.
    drop(started);
}

/// A filter that leaves out what consensus's libraries say about every entry and file, unless the filter names them.
#[must_use]
pub fn quiet(filter: &str) -> String {
    const CHATTY: [&str; 3] = ["openraft", "raft_log", "chunked_wal"];
    let mut quiet = filter.to_owned();
    for library in CHATTY.into_iter().filter(|library| !filter.contains(library)) {
        quiet.push_str(&format!(",{library}=warn"));
    }
    quiet
}
