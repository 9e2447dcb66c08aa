//! What this build is.

use crate::series::{Measurement, Series, Source};

/// Its version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The commit it was built from.
pub const REVISION: &str = env!("WARREN_REVISION");
/// Both, as `--version` shows them.
pub const LONG_VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("WARREN_REVISION"), ")");

/// Exports version and commit as `warren_build_info`.
#[derive(Clone, Copy, Debug, Default)]
pub struct BuildInfo;

impl Source for BuildInfo {
    fn collect(&self) -> Vec<Series> {
        let labels = [("version", VERSION), ("revision", REVISION)];
        vec![Series::new("warren_build_info", &labels, Measurement::Gauge(1.0))]
    }
}
