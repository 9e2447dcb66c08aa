use std::{collections::BTreeMap, fs, path::Path, process::Command, time::Duration};

use serde_json::{Value, json};

use crate::process::{Process, find, free_port, until};

/// A scrape: series with their values, in the text format.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// The text.
    pub text: String,
    series: BTreeMap<String, f64>,
}

impl Metrics {
    /// Reads the text format.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let series = text
            .lines()
            .filter(|line| !line.starts_with('#') && !line.is_empty())
            .map(|line| {
                let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("not a sample: {line}"));
                (series.to_owned(), value.parse().unwrap_or_else(|_| panic!("not a number: {line}")))
            })
            .collect();
        Self { text: text.to_owned(), series }
    }

    /// The value of a series; labels sorted by name.
    #[must_use]
    pub fn get(&self, series: &str) -> Option<f64> {
        self.series.get(series).copied()
    }

    /// The sum of all series of a metric whose labels hold all of `labels`.
    #[must_use]
    pub fn sum(&self, metric: &str, labels: &[&str]) -> f64 {
        self.matching(metric, labels).map(|(_, value)| value).sum()
    }

    /// All series of a metric whose labels hold all of `labels`.
    pub fn matching<'a>(&'a self, metric: &'a str, labels: &'a [&'a str]) -> impl Iterator<Item = (&'a str, f64)> {
        self.series.iter().filter_map(move |(series, value)| {
            let name = series.split('{').next().unwrap_or_default();
            (name == metric && labels.iter().all(|label| series.contains(label))).then_some((series.as_str(), *value))
        })
    }

    /// The names of all metrics with a sample, histograms by their own.
    #[must_use]
    pub fn names(&self) -> std::collections::BTreeSet<String> {
        let histograms: Vec<_> = self
            .text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" histogram").map(str::to_owned))
            .collect();
        let name = |series: &String| {
            let name = series.split('{').next().unwrap_or_default();
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            match family {
                Some(family) if histograms.iter().any(|histogram| histogram == family) => family.to_owned(),
                _ => name.to_owned(),
            }
        };
        self.series.keys().map(name).collect()
    }
}

/// A real Prometheus that scrapes one endpoint every second.
#[derive(Debug)]
pub struct Prometheus {
    port: u16,
    _process: Process,
}

impl Prometheus {
    /// Starts one for the endpoint at `target`, with native histograms if wanted.
    #[must_use]
    pub fn scraping(target: u16, directory: &Path, native_histograms: bool) -> Self {
        let options: &[&str] = if native_histograms { &["--enable-feature=native-histograms"] } else { &[] };
        Self::start(directory, &[("warren", target)], None, options)
    }

    /// Starts one for several jobs, with alerting rules that are evaluated every second.
    #[must_use]
    pub fn with(directory: &Path, jobs: &[(&str, u16)], rules: &Path) -> Self {
        Self::start(directory, jobs, Some(rules), &[])
    }

    fn start(directory: &Path, jobs: &[(&str, u16)], rules: Option<&Path>, options: &[&str]) -> Self {
        let port = free_port();
        let config = directory.join("prometheus.yml");
        let jobs: Vec<Value> = jobs
            .iter()
            .map(|(job, port)| json!({"job_name": job, "static_configs": [{"targets": [format!("127.0.0.1:{port}")]}]}))
            .collect();
        let text = json!({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": Vec::from_iter(rules),
            "scrape_configs": jobs,
        });
        // JSON is YAML.
        fs::write(&config, text.to_string()).expect("writable");
        let mut command = Command::new(find("prometheus"));
        command
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", directory.join("tsdb").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .arg("--log.level=warn")
            .args(options);
        let prometheus = Self { port, _process: Process::start("prometheus", &mut command, directory) };
        until("Prometheus has scraped", || (prometheus.query("min(up)") == Some(1.0)).then_some(()));
        prometheus
    }

    fn get(&self, path: &str, query: Option<&str>) -> Option<Value> {
        let agent = ureq::Agent::new_with_config(
            ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(5))).build(),
        );
        let request = agent.get(format!("http://127.0.0.1:{}/api/v1/{path}", self.port));
        let request = query.into_iter().fold(request, |request, query| request.query("query", query));
        serde_json::from_str(&request.call().ok()?.body_mut().read_to_string().ok()?).ok()
    }

    /// What the API says of something.
    #[must_use]
    pub fn api(&self, what: &str) -> Option<Value> {
        self.get(what, None)
    }

    /// How many series an expression gives; `None` if it is none.
    #[must_use]
    pub fn series(&self, expression: &str) -> Option<usize> {
        Some(self.get("query", Some(expression))?["data"]["result"].as_array()?.len())
    }

    /// The value of an expression that gives one series; `None` if it gives none.
    #[must_use]
    pub fn query(&self, expression: &str) -> Option<f64> {
        let answer = self.get("query", Some(expression))?;
        let results = answer["data"]["result"].as_array()?;
        assert!(results.len() <= 1, "{expression} gives several series: {answer}");
        results.first()?["value"][1].as_str()?.parse().ok()
    }
}
