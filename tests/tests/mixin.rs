//! Dashboards and alerts: what is rendered is what is committed, the alerts do what their own tests say, and every name in a
//! query is one that Warren emits.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use warren_telemetry::table::{self, Kind};
use warren_tests::{Prometheus, WELL_BEHAVED, World, find, until};

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn succeed(command: &mut Command) {
    let output = World::run(command);
    assert_eq!(output.code, 0, "{}{}", output.stdout, output.stderr);
}

/// Every query of the dashboard, with its panel's title.
fn panels() -> Vec<(String, String)> {
    let text = fs::read_to_string(deploy().join("grafana/warren.json")).expect("readable");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let queries = panels.iter().flat_map(|panel| {
        let title = panel["title"].as_str().unwrap_or_default();
        let targets = panel["targets"].as_array().into_iter().flatten();
        targets.map(move |target| (title.to_owned(), target["expr"].as_str().unwrap_or_default().to_owned()))
    });
    queries.collect()
}

/// Every query of the alerts.
fn alerts(prometheus: &Prometheus) -> Vec<(String, String)> {
    let rules = prometheus.api("rules").expect("rules");
    let groups = rules["data"]["groups"].as_array().expect("groups").iter();
    let rules = groups.flat_map(|group| group["rules"].as_array().cloned().unwrap_or_default());
    rules
        .map(|rule| {
            let text = |field: &str| rule[field].as_str().unwrap_or_default().to_owned();
            (text("name"), text("query"))
        })
        .collect()
}

#[test]
fn rendered_files_are_those_of_the_mixin() {
    succeed(Command::new("python3").arg(deploy().join("mixin/render.py")).arg("--check"));
}

#[test]
fn alerts_are_raised_when_they_should_be_and_not_otherwise() {
    let mut promtool = Command::new(find("promtool"));
    succeed(promtool.args(["test", "rules", "alerts.test.yaml"]).current_dir(deploy().join("prometheus")));
}

/// The metrics that a query names, by the table's names.
fn metrics(query: &str) -> BTreeSet<&str> {
    let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words
        .filter(|word| word.starts_with("warren_") || word.starts_with("process_"))
        .map(|word| {
            let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| word.strip_suffix(suffix));
            family
                .filter(|family| table::find(family).is_some_and(|metric| metric.kind == Kind::Histogram))
                .unwrap_or(word)
        })
        .collect()
}

#[test]
fn every_query_has_an_answer_on_a_running_system() {
    let world = World::with_warren("mixin");
    let rules = deploy().join("prometheus/alerts.yaml");
    let prometheus = Prometheus::with(
        &world.path("manager"),
        &[("warren-manager", world.manager_port), ("warren-agent", world.agent_port)],
        &rules,
    );
    let panels = panels();
    let alerts = alerts(&prometheus);
    assert!(panels.len() > 30 && alerts.len() == 21, "{} queries, {} alerts", panels.len(), alerts.len());
    for (title, query) in panels.iter().chain(&alerts) {
        for name in metrics(query) {
            assert!(table::find(name).is_some(), "{title} asks for {name}, which nobody emits");
        }
    }
    // Containers come, and one of them goes by SIGKILL: what counts such things has series then.
    world.create("web", 2, &[], WELL_BEHAVED);
    let deaf = ["--restart", "never", "--stop-timeout", "1"];
    world.create("deaf", 1, &deaf, "sleep 1000");
    let _ = world.warren(&["service", "rm", "deaf", "--wait"]).succeeded();
    // The container network is not there yet, nobody asks a name server, and nothing has failed.
    let nothing_to_show =
        |title: &str| ["Queries", "Duration", "Failures", "Replacements", "Lost by probes"].contains(&title);
    for (title, query) in panels.iter().filter(|(title, _)| !nothing_to_show(title)) {
        let query = query.replace("$__rate_interval", "1m").replace("$node", ".*");
        until(&format!("{title} shows something: {query}"), || prometheus.series(&query).filter(|series| *series > 0));
    }
    for (title, query) in panels.iter().filter(|(title, _)| nothing_to_show(title)) {
        let query = query.replace("$__rate_interval", "1m").replace("$node", ".*");
        assert!(prometheus.series(&query).is_some(), "{title}: {query}");
    }
    let raised = prometheus.api("alerts").expect("alerts");
    let raised = raised["data"]["alerts"].as_array().expect("a list").iter();
    // Others may be pending for what a scrape saw halfway; none of them waits for less than a minute.
    let raised = raised.filter(|alert| alert["state"] == "firing");
    let names: BTreeSet<_> = raised.filter_map(|alert| alert["labels"]["alertname"].as_str()).collect();
    // The one that the deaf container is about.
    assert!(names.iter().all(|name| *name == "WarrenSigtermIgnored"), "{names:?}");
}
