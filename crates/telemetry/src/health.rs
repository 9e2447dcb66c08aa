use std::{fmt, sync::Arc};

use serde::Serialize;

/// What a check found: nothing wrong, or what is.
pub type Outcome = Result<(), String>;

type Check = Arc<dyn Fn() -> Outcome + Send + Sync>;

/// Named conditions that are evaluated when somebody asks.
#[derive(Clone, Default)]
pub struct Checks {
    checks: Vec<(&'static str, Check)>,
}

impl fmt::Debug for Checks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.checks.iter().map(|(name, _)| name)).finish()
    }
}

/// The result of all checks.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// "ok" or "failing".
    pub(crate) status: &'static str,
    pub(crate) checks: Vec<Line>,
}

/// The result of one.
#[derive(Debug, Serialize)]
pub(crate) struct Line {
    pub(crate) name: &'static str,
    pub(crate) ok: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) message: String,
}

impl Checks {
    /// Adds a check. It must not block.
    pub fn add(&mut self, name: &'static str, check: impl Fn() -> Outcome + Send + Sync + 'static) {
        self.checks.push((name, Arc::new(check)));
    }

    pub(crate) fn evaluate(&self) -> Report {
        let checks: Vec<Line> = self
            .checks
            .iter()
            .map(|(name, check)| {
                let outcome = check();
                Line { name, ok: outcome.is_ok(), message: outcome.err().unwrap_or_default() }
            })
            .collect();
        let status = if checks.iter().all(|line| line.ok) { "ok" } else { "failing" };
        Report { status, checks }
    }
}
