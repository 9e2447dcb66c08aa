//! What every process takes on its command line about its telemetry.

use std::{path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};

use crate::{
    Access, Options, logs,
    logs::Style,
    otlp,
    otlp::InvalidEndpoint,
    signals::{Identity, Signals},
};

/// Whether scrapers that ask for it get native histograms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum NativeHistograms {
    /// To scrapers that ask for the protobuf exposition.
    #[default]
    Auto,
    /// To none: everyone gets classic buckets as text. Prometheus before 2.45 with native histograms on keeps no classic
    /// buckets of a histogram that has both.
    Off,
}

/// A kind of telemetry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Signal {
    /// What the metrics endpoint shows.
    Metrics,
    /// Spans of API calls, of changes to the state, and of work on containers.
    Traces,
    /// What is written to stderr.
    Logs,
}

/// How a process logs, and what becomes of its telemetry.
#[derive(Args, Clone, Debug)]
pub struct TelemetryArguments {
    /// Log filter, as `level` or `module=level,...`.
    #[arg(long, env = "WARREN_LOG", default_value = "info", value_parser = logs::checked)]
    pub log: String,
    /// Log in JSON, one object per line.
    #[arg(long, env = "WARREN_LOG_JSON")]
    pub log_json: bool,
    /// Native histograms: auto serves them to scrapers that negotiate protobuf, off never.
    #[arg(long, env = "WARREN_METRICS_NATIVE_HISTOGRAMS", default_value = "auto", hide_possible_values = true)]
    pub metrics_native_histograms: NativeHistograms,
    /// PEM certificate to serve metrics over HTTPS; reloaded when the file changes.
    #[arg(long, env = "WARREN_METRICS_TLS_CERT", value_name = "FILE", requires = "metrics_tls_key")]
    pub metrics_tls_cert: Option<PathBuf>,
    /// PEM private key of --metrics-tls-cert.
    #[arg(long, env = "WARREN_METRICS_TLS_KEY", value_name = "FILE", requires = "metrics_tls_cert")]
    pub metrics_tls_key: Option<PathBuf>,
    /// File with the bearer token that /metrics requires (Authorization: Bearer ...); health endpoints require none.
    #[arg(long, env = "WARREN_METRICS_TOKEN_FILE", value_name = "FILE")]
    pub metrics_token_file: Option<PathBuf>,
    /// OTLP collector (gRPC) to push telemetry to, like http://127.0.0.1:4317.
    #[arg(long, env = "OTEL_EXPORTER_OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<String>,
    /// Seconds between pushes of metrics.
    #[arg(long, env = "WARREN_OTLP_INTERVAL_S", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..))]
    pub otlp_interval_s: u64,
    /// Signals to push: metrics, traces, logs.
    #[arg(
        long,
        env = "WARREN_OTLP_SIGNALS",
        default_value = "metrics,traces,logs",
        value_delimiter = ',',
        hide_possible_values = true
    )]
    pub otlp_signals: Vec<Signal>,
    /// Also push metrics of OpenTelemetry's semantic conventions: rpc.server.call.duration and process.*.
    #[arg(long, env = "WARREN_OTLP_SEMANTIC_CONVENTIONS")]
    pub otlp_semantic_conventions: bool,
}

impl TelemetryArguments {
    fn endpoint(&self) -> Option<&str> {
        let disabled = std::env::var("OTEL_SDK_DISABLED").is_ok_and(|value| value.eq_ignore_ascii_case("true"));
        self.otlp_endpoint.as_deref().filter(|endpoint| !endpoint.is_empty() && !disabled)
    }

    fn pushes(&self, signal: Signal) -> bool {
        self.otlp_signals.contains(&signal)
    }

    /// What is done with metrics.
    #[must_use]
    pub fn options(&self) -> Options {
        let otlp = self.endpoint().filter(|_| self.pushes(Signal::Metrics)).map(|endpoint| otlp::Options {
            endpoint: endpoint.to_owned(),
            interval: Duration::from_secs(self.otlp_interval_s),
            semantic_conventions: self.otlp_semantic_conventions,
        });
        let access = Access {
            tls: self.metrics_tls_cert.clone().zip(self.metrics_tls_key.clone()),
            token: self.metrics_token_file.clone(),
        };
        Options { native_histograms: self.metrics_native_histograms, access, otlp }
    }

    /// Starts logging, and pushing of traces and logs. Must be called within tokio.
    ///
    /// # Errors
    ///
    /// When the collector's endpoint is no address.
    pub fn start(&self, identity: &Identity) -> Result<Signals, InvalidEndpoint> {
        let signals = match self.endpoint() {
            Some(endpoint) => {
                otlp::check_environment(|variable| std::env::var(variable).ok())?;
                Signals::start(endpoint, identity, self.pushes(Signal::Traces), self.pushes(Signal::Logs))?
            }
            None => Signals::default(),
        };
        let style = if self.log_json { Style::Json } else { Style::Text };
        logs::init(&self.log, style, &signals);
        Ok(signals)
    }
}
