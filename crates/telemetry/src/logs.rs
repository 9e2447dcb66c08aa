//! Logs: one line an event on stderr.

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
    let layer = fmt::layer().with_writer(std::io::stderr);
    let registry = tracing_subscriber::registry().with(filter);
    let started = match style {
        Style::Text => registry.with(layer.with_target(false)).try_init(),
        Style::Json => registry.with(layer.json()).try_init(),
    };
    // Somebody else's subscriber is as good as ours.
    drop(started);
}

/// A filter that leaves out what consensus's library says about every entry and vote, unless the filter names it.
#[must_use]
pub fn quiet(filter: &str) -> String {
    if filter.contains("openraft") { filter.to_owned() } else { format!("{filter},openraft=warn") }
}
