//! Metrics, logs, health checks and the HTTP endpoint that serves them, for every Warren process.
//!
//! [`table`] defines every metric once: name, type, unit, labels, buckets, help. [`Meters`] hands out OpenTelemetry
//! instruments for them; a [`Source`] contributes what the SDK cannot carry, above all the histograms that the kernel
//! has aggregated. [`endpoint`] serves both as one exposition, beside the health checks.
//!
//! Nothing here decides what is worth measuring: that is the components' part.

mod access;
pub mod build;
pub mod cli;
pub mod endpoint;
pub mod exposition;
mod family;
mod health;
pub mod logs;
mod meters;
pub mod otlp;
mod process;
mod semconv;
/// What a process shows of itself, or of others, beside the OpenTelemetry SDK.
pub mod series;
pub mod signals;
pub mod table;

use cli::NativeHistograms;

pub use access::{Access, FileError};
pub use family::{Family, Point, Value};
pub use health::{Checks, Outcome};
pub use meters::{GaugeObserver, Meters};
pub use process::{ProcessSource, keep_memory_private};
pub use series::{Exponential, Key, Measurement, Series, Source};

/// What a process does with its metrics.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Who gets native histograms.
    pub native_histograms: NativeHistograms,
    /// Who may see them at the endpoint.
    pub access: Access,
    /// Where metrics are pushed to, if anywhere.
    pub otlp: Option<otlp::Options>,
}
