//! `warren container stats`, and what `warren top` has in common with it.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use clap::Args;
use serde::Serialize;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};
use tonic::Streaming;
use warren_manifest::parse;
use warren_proto::v1;

use crate::{
    client::ClientArguments,
    error::Error,
    objects::{container, node},
    output::{self, Format, FormatArguments, say},
    terminal::{self, Screen},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Arguments {
    /// Only this container: name, like web-1, ID or unique ID prefix.
    container: Option<String>,
    #[command(flatten)]
    look: LookArguments,
    #[command(flatten)]
    format: FormatArguments,
}

/// Where to look, and how often.
#[derive(Args, Clone, Debug)]
pub(crate) struct LookArguments {
    /// Only containers of this service: name, ID or unique ID prefix.
    #[arg(long)]
    service: Option<String>,
    /// Only this node: hostname, ID or unique ID prefix.
    #[arg(long)]
    node: Option<String>,
    /// Refresh interval.
    #[arg(long, short, default_value = "2s", value_name = "DURATION", value_parser = parse::duration)]
    interval: pbjson_types::Duration,
    /// Print once and exit.
    #[arg(long, visible_alias = "no-stream")]
    pub(crate) once: bool,
}

/// What is known of a node: its latest message, and the one before.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) latest: v1::StreamStatsResponse,
    before: Option<v1::StreamStatsResponse>,
    at: Option<Instant>,
}

impl Seen {
    pub(crate) fn node(&self) -> v1::NodeStats {
        self.latest.node.clone().unwrap_or_default()
    }

    /// Of all its processors together; `None` until it was seen twice.
    pub(crate) fn cpu_percent(&self) -> Option<f64> {
        let (now, before) = (self.latest.node.as_ref()?, self.before.as_ref()?.node.as_ref()?);
        let elapsed = elapsed(before.taken_at.as_ref(), now.taken_at.as_ref())? * f64::from(now.cpus.max(1));
        Some(percent(before.cpu_usage_nanos, now.cpu_usage_nanos, elapsed))
    }
}

/// Seconds from one time to another; `None` unless there are some.
fn elapsed(from: Option<&pbjson_types::Timestamp>, to: Option<&pbjson_types::Timestamp>) -> Option<f64> {
    let (from, to) = (from?, to?);
    let seconds = (to.seconds - from.seconds) as f64 + f64::from(to.nanos - from.nanos) / 1e9;
    (seconds > 0.0).then_some(seconds)
}

fn percent(before: u64, now: u64, seconds: f64) -> f64 {
    now.saturating_sub(before) as f64 / 1e9 / seconds * 100.0
}

/// One container's figures.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Row {
    id: String,
    pub(crate) name: String,
    pub(crate) node: String,
    /// Of one processor; `None` until it was seen twice.
    pub(crate) cpu_percent: Option<f64>,
    /// Of the time, kept from running by its limit.
    cpu_throttled_percent: Option<f64>,
    memory_bytes: u64,
    /// 0 is no limit, here and below.
    memory_limit_bytes: u64,
    pids: u64,
    pids_limit: u64,
    network_receive_bytes: u64,
    network_transmit_bytes: u64,
    block_read_bytes: u64,
    block_write_bytes: u64,
}

/// What all nodes have said, by their ids.
#[derive(Debug, Default)]
pub(crate) struct Nodes(BTreeMap<String, Seen>);

/// A node that has said nothing for this many looks is not shown.
const MISSED: u32 = 3;

impl Nodes {
    fn add(&mut self, message: v1::StreamStatsResponse) {
        let id = message.node.as_ref().map(|node| node.node_id.clone()).unwrap_or_default();
        let seen = self.0.entry(id).or_default();
        let before = std::mem::replace(&mut seen.latest, message);
        if seen.at.replace(Instant::now()).is_some() {
            seen.before = Some(before);
        }
    }

    fn forget_silent(&mut self, interval: Duration) {
        self.0.retain(|_, seen| seen.at.is_some_and(|at| at.elapsed() <= interval * MISSED + Duration::from_secs(2)));
    }

    /// How many were seen twice.
    fn measured(&self) -> usize {
        self.0.values().filter(|seen| seen.before.is_some()).count()
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Seen> {
        self.0.values()
    }

    /// All containers, by name.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let mut rows: Vec<Row> = self.0.values().flat_map(rows).collect();
        rows.sort_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
        rows
    }
}

fn rows(seen: &Seen) -> impl Iterator<Item = Row> {
    let before: HashMap<&str, &v1::ContainerStats> = seen
        .before
        .iter()
        .flat_map(|before| &before.containers)
        .map(|stats| (stats.container_id.as_str(), stats))
        .collect();
    let hostname = seen.node().hostname;
    seen.latest.containers.iter().map(move |stats| {
        let known = before.get(stats.container_id.as_str());
        let elapsed = known.and_then(|before| elapsed(before.taken_at.as_ref(), stats.taken_at.as_ref()));
        let share = |read: fn(&v1::ContainerStats) -> u64| Some(percent(read(known?), read(stats), elapsed?));
        Row {
            id: stats.container_id.clone(),
            name: container::name_of(&stats.service_name, stats.slot),
            node: hostname.clone(),
            cpu_percent: share(|stats| stats.cpu_usage_nanos),
            cpu_throttled_percent: share(|stats| stats.cpu_throttled_nanos),
            memory_bytes: stats.memory_bytes,
            memory_limit_bytes: stats.memory_limit_bytes,
            pids: stats.pids,
            pids_limit: stats.pids_limit,
            network_receive_bytes: stats.network_receive_bytes,
            network_transmit_bytes: stats.network_transmit_bytes,
            block_read_bytes: stats.block_read_bytes,
            block_write_bytes: stats.block_write_bytes,
        }
    })
}

pub(crate) fn percentage(percent: Option<f64>) -> String {
    percent.map_or_else(|| "-".to_owned(), |percent| format!("{percent:.1}%"))
}

/// With three digits or so.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 100.0 { 0 } else { 1 };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A value and its limit.
fn of(value: String, limit: u64, show: fn(u64) -> String) -> String {
    if limit == 0 { value } else { format!("{value} / {}", show(limit)) }
}

/// The table of containers.
pub(crate) fn table(rows: &[Row]) -> Vec<String> {
    let header = ["ID", "NAME", "NODE", "CPU", "MEMORY", "PIDS", "NET IN", "NET OUT", "READ", "WRITTEN"];
    output::render(
        header,
        rows.iter().map(|row| {
            [
                output::short(&row.id),
                row.name.clone(),
                row.node.clone(),
                percentage(row.cpu_percent),
                of(bytes(row.memory_bytes), row.memory_limit_bytes, bytes),
                of(row.pids.to_string(), row.pids_limit, |limit| limit.to_string()),
                bytes(row.network_receive_bytes),
                bytes(row.network_transmit_bytes),
                bytes(row.block_read_bytes),
                bytes(row.block_write_bytes),
            ]
        }),
    )
}

/// Looks again and again, or once, and has each look shown.
pub(crate) async fn look(
    client: &ClientArguments,
    container: Option<String>,
    arguments: &LookArguments,
    live: bool,
    mut show: impl FnMut(&Nodes, Option<&Screen>) -> Result<(), Error>,
) -> Result<(), Error> {
    let period = Duration::try_from(arguments.interval).unwrap_or_default();
    let request = v1::StreamStatsRequest {
        service: arguments.service.clone().unwrap_or_default(),
        container: container.clone().unwrap_or_default(),
        node: arguments.node.clone().unwrap_or_default(),
        interval: Some(arguments.interval),
    };
    let mut messages = client.stats().await?.stream_stats(request).await?.into_inner();
    let mut nodes = Nodes::default();
    // Rates take two looks.
    let one = container.is_some() || arguments.node.is_some();
    let expected = if one { 1 } else { ready_nodes(client).await? };
    measure(&mut messages, &mut nodes, expected, period).await?;
    if arguments.once {
        return show(&nodes, None);
    }
    let screen = if live && terminal::is_output() { Some(Screen::enter()?) } else { None };
    let mut tick = interval(period);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let quit = terminal::quit();
    tokio::pin!(quit);
    loop {
        tokio::select! {
            message = messages.message() => nodes.add(message?.ok_or(Error::NoAnswer)?),
            _ = tick.tick() => {
                nodes.forget_silent(period);
                show(&nodes, screen.as_ref())?;
            }
            () = &mut quit, if screen.is_some() => return Ok(()),
            // The screen is to be left as it was.
            interrupted = tokio::signal::ctrl_c() => return interrupted.map_err(Error::Io),
        }
    }
}

async fn ready_nodes(client: &ClientArguments) -> Result<usize, Error> {
    let nodes = node::list(client).await?;
    Ok(nodes.iter().filter(|node| node.status() == v1::NodeStatus::Ready).count())
}

/// Waits until so many nodes were seen twice, but not for ever.
async fn measure(
    messages: &mut Streaming<v1::StreamStatsResponse>,
    nodes: &mut Nodes,
    expected: usize,
    period: Duration,
) -> Result<(), Error> {
    let deadline = Instant::now() + period * MISSED + Duration::from_secs(2);
    while nodes.measured() < expected {
        match timeout_at(deadline, messages.message()).await {
            Ok(message) => nodes.add(message?.ok_or(Error::NoAnswer)?),
            Err(_) => break,
        }
    }
    Ok(())
}

pub(crate) async fn run(arguments: Arguments, client: &ClientArguments) -> Result<(), Error> {
    let Arguments { container, look: arguments, format } = arguments;
    let table_wanted = matches!(format.format, Format::Table);
    look(client, container, &arguments, table_wanted, |nodes, screen| {
        let rows = nodes.rows();
        let to_program = if arguments.once { output::to_program } else { output::next_to_program };
        match screen {
            _ if to_program(format.format, &rows)? => {}
            Some(screen) => screen.show(&table(&rows))?,
            None => table(&rows).iter().for_each(|line| say!("{line}")),
        }
        Ok(())
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(seconds: i64, cpu: u64, containers: &[(&str, u64)]) -> v1::StreamStatsResponse {
        let taken_at = Some(pbjson_types::Timestamp { seconds, nanos: 500_000_000 });
        let container = |(id, cpu): &(&str, u64)| v1::ContainerStats {
            container_id: (*id).to_owned(),
            service_name: "web".to_owned(),
            slot: 2,
            taken_at,
            cpu_usage_nanos: *cpu,
            cpu_throttled_nanos: *cpu / 2,
            ..Default::default()
        };
        v1::StreamStatsResponse {
            node: Some(v1::NodeStats {
                node_id: "n".to_owned(),
                taken_at,
                cpus: 2,
                cpu_usage_nanos: cpu,
                ..Default::default()
            }),
            containers: containers.iter().map(container).collect(),
        }
    }

    #[test]
    fn rates_are_between_two_looks() {
        let mut nodes = Nodes::default();
        nodes.add(message(10, 1_000_000_000, &[("a", 100), ("gone", 5)]));
        assert_eq!(nodes.measured(), 0);
        assert!(nodes.rows().iter().all(|row| row.cpu_percent.is_none()));
        nodes.add(message(12, 2_000_000_000, &[("a", 3_000_000_100), ("new", 7)]));
        let seen = nodes.all().next().expect("a node");
        assert_eq!(seen.cpu_percent(), Some(25.0));
        let rows = nodes.rows();
        assert_eq!(rows.iter().map(|row| row.id.as_str()).collect::<Vec<_>>(), ["a", "new"]);
        assert_eq!((rows[0].cpu_percent, rows[0].cpu_throttled_percent), (Some(150.0), Some(75.0)));
        assert_eq!((rows[1].cpu_percent, rows[1].name.as_str()), (None, "web-2"));
    }

    #[test]
    fn bytes_have_a_unit_that_keeps_them_short() {
        let shown = [0, 999, 1000, 10 << 10, 150 << 20, 5_500_000_000].map(bytes);
        assert_eq!(shown, ["0 B", "999 B", "1.0 KiB", "10.0 KiB", "150 MiB", "5.1 GiB"]);
    }
}
