//! `warren node ...`

use std::time::Duration;

use clap::Subcommand;
use warren_manifest::parse;
use warren_proto::v1;

use crate::{
    client::ClientArguments,
    cluster, complete,
    error::Error,
    filter::ListArguments,
    objects::node::list,
    output::{self, FormatArguments, say},
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List nodes.
    #[command(alias = "list")]
    Ls {
        #[command(flatten)]
        list: ListArguments,
    },
    /// Show a node.
    Inspect {
        /// Hostname, ID or unique ID prefix.
        #[arg(add = complete::nodes())]
        node: String,
        #[command(flatten)]
        format: FormatArguments,
    },
    /// Mark a node unschedulable; running containers stay.
    Cordon {
        /// Hostname, ID or unique ID prefix.
        #[arg(add = complete::nodes())]
        node: String,
    },
    /// Mark a node schedulable again.
    Uncordon {
        /// Hostname, ID or unique ID prefix.
        #[arg(add = complete::nodes())]
        node: String,
    },
    /// Drain a node: move its containers to other nodes, for each service one at a time.
    Drain {
        /// Hostname, ID or unique ID prefix.
        #[arg(add = complete::nodes())]
        node: String,
        /// Wait until the node has no containers left.
        #[arg(long)]
        wait: bool,
        /// Timeout of --wait: a number of seconds, or 90s, 5m.
        #[arg(long, value_name = "DURATION", default_value = "300", requires = "wait", value_parser = parse::seconds)]
        timeout: u64,
    },
    /// Set or remove labels of a node.
    Label {
        /// Hostname, ID or unique ID prefix.
        #[arg(add = complete::nodes())]
        node: String,
        /// NAME=VALUE sets a label, NAME- removes it.
        #[arg(required = true, value_name = "LABEL", value_parser = label)]
        labels: Vec<(String, Option<String>)>,
    },
    /// Make the manager on a machine a voter.
    Promote {
        /// Hostname or manager number.
        machine: String,
    },
    /// Make the manager on a machine a non-voting learner. A leader transfers leadership first.
    Demote {
        /// Hostname or manager number.
        machine: String,
    },
    /// Remove a node that is down: revoke its certificate and replace its containers elsewhere.
    Rm {
        /// Hostname, ID or unique ID prefix.
        #[arg(add = complete::nodes())]
        node: String,
        /// Remove the node even if its agent is connected, for example a stolen machine. Its containers are not
        /// stopped.
        #[arg(long)]
        force: bool,
    },
}

pub(crate) async fn run(command: Command, client: &ClientArguments) -> Result<(), Error> {
    match command {
        Command::Ls { list: wanted } => {
            let nodes = wanted.apply(list(client).await?)?;
            if !output::to_program(wanted.format(), &nodes)? {
                table(&nodes);
            }
            Ok(())
        }
        Command::Cordon { node } => set(client, node, v1::Availability::Cordoned).await.map(drop),
        Command::Uncordon { node } => set(client, node, v1::Availability::Active).await.map(drop),
        Command::Drain { node, wait, timeout } => {
            let drained = set(client, node, v1::Availability::Drained).await?;
            if wait { until_empty(client, &drained, Duration::from_secs(timeout)).await } else { Ok(()) }
        }
        Command::Label { node, labels } => {
            let set_labels = labels.iter().filter_map(|(name, value)| Some((name.clone(), value.clone()?))).collect();
            let removed = labels.into_iter().filter(|(_, value)| value.is_none());
            let remove_labels = removed.map(|(name, _)| name).collect();
            update(client, v1::UpdateNodeRequest { node, set_labels, remove_labels, ..Default::default() }).await?;
            Ok(())
        }
        Command::Promote { machine } => cluster::set_voter(client, &machine, true).await,
        Command::Demote { machine } => cluster::set_voter(client, &machine, false).await,
        Command::Rm { node, force } => {
            client.nodes().await?.remove_node(v1::RemoveNodeRequest { node: node.clone(), force }).await?;
            say!("{node}");
            Ok(())
        }
        Command::Inspect { node, format } => {
            let request = v1::GetNodeRequest { node };
            let node = client.nodes().await?.get_node(request).await?.into_inner().node.unwrap_or_default();
            if !output::to_program(format.format, &node)? {
                inspect(&node);
            }
            Ok(())
        }
    }
}

fn label(text: &str) -> Result<(String, Option<String>), String> {
    if let Some((name, value)) = text.split_once('=') {
        return Ok((name.to_owned(), Some(value.to_owned())));
    }
    let name = text.strip_suffix('-').ok_or_else(|| format!("{text:?} is neither NAME=VALUE nor NAME-"))?;
    Ok((name.to_owned(), None))
}

async fn set(client: &ClientArguments, node: String, availability: v1::Availability) -> Result<v1::Node, Error> {
    update(client, v1::UpdateNodeRequest { node, availability: availability.into(), ..Default::default() }).await
}

async fn update(client: &ClientArguments, request: v1::UpdateNodeRequest) -> Result<v1::Node, Error> {
    let named = request.node.clone();
    let node = client.nodes().await?.update_node(request).await?.into_inner().node.unwrap_or_default();
    say!("{named}");
    Ok(node)
}

/// Between looks at what a node still has.
const LOOK: Duration = Duration::from_millis(250);

async fn until_empty(client: &ClientArguments, node: &v1::Node, timeout: Duration) -> Result<(), Error> {
    let mut nodes = client.nodes().await?;
    let end = tokio::time::Instant::now() + timeout;
    loop {
        let request = v1::GetNodeRequest { node: node.id.clone() };
        let now = nodes.get_node(request).await?.into_inner().node.unwrap_or_default();
        if now.containers == 0 {
            return Ok(());
        }
        if tokio::time::Instant::now() >= end {
            let node = now.description.unwrap_or_default().hostname;
            return Err(Error::NotEmpty { node, containers: now.containers, timeout });
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// All nodes, page by page.
fn status_name(node: &v1::Node) -> String {
    let status = match node.status() {
        v1::NodeStatus::Unspecified => "unknown",
        v1::NodeStatus::Ready => "ready",
        v1::NodeStatus::Down => "down",
        v1::NodeStatus::NotReady => "not ready",
        v1::NodeStatus::Pending => "pending",
    };
    match node.availability() {
        v1::Availability::Active | v1::Availability::Unspecified => status.to_owned(),
        v1::Availability::Cordoned => format!("{status}, cordoned"),
        v1::Availability::Drained => format!("{status}, drained"),
    }
}

fn probes(report: Option<&v1::ProbeReport>) -> String {
    match report {
        Some(report) if report.message.is_empty() => "kernel".to_owned(),
        Some(report) => format!("runtime ({})", report.message),
        None => "unknown".to_owned(),
    }
}

/// What is wrong with a node, in a word each.
fn conditions(node: &v1::Node) -> String {
    let kinds: Vec<_> = node.conditions.iter().map(|condition| condition.r#type.as_str()).collect();
    if kinds.is_empty() { "-".to_owned() } else { kinds.join(", ") }
}

/// The same with the reasons, and since when.
fn conditions_in_full(node: &v1::Node) -> String {
    let line = |condition: &v1::NodeCondition| {
        format!("{} since {}: {}", condition.r#type, output::ago(condition.since.as_ref()), condition.message)
    };
    if node.conditions.is_empty() {
        "-".to_owned()
    } else {
        node.conditions.iter().map(line).collect::<Vec<_>>().join("; ")
    }
}

fn table(nodes: &[v1::Node]) {
    let row = |node: &v1::Node| {
        if node.status() == v1::NodeStatus::Pending {
            let [none, status] = ["-", "pending"].map(str::to_owned);
            let id = output::short(&node.id);
            return [id, none.clone(), status, none.clone(), none.clone(), none.clone(), none.clone(), none];
        }
        let description = node.description.clone().unwrap_or_default();
        let has = description.resources.unwrap_or_default();
        let reserved = node.reserved.unwrap_or_default();
        [
            output::short(&node.id),
            description.hostname,
            status_name(node),
            node.containers.to_string(),
            format!("{:.1}/{:.1}", reserved.cpu_millis as f64 / 1e3, has.cpu_millis as f64 / 1e3),
            format!("{}/{}", output::bytes(reserved.memory_bytes), output::bytes(has.memory_bytes)),
            description
                .probes
                .as_ref()
                .map_or("-", |p| if p.message.is_empty() { "kernel" } else { "runtime" })
                .to_owned(),
            conditions(node),
        ]
    };
    output::table(
        ["ID", "HOSTNAME", "STATUS", "CONTAINERS", "CPU", "MEMORY", "TIMED BY", "CONDITIONS"],
        nodes.iter().map(row),
    );
}

fn inspect(node: &v1::Node) {
    let description = node.description.clone().unwrap_or_default();
    let (has, reserved) = (description.resources.unwrap_or_default(), node.reserved.unwrap_or_default());
    output::fields(&[
        ("id", node.id.clone()),
        ("hostname", description.hostname),
        ("status", [status_name(node), node.status_message.clone()].join(" ").trim_end().to_owned()),
        ("conditions", conditions_in_full(node)),
        ("labels", output::pairs(&node.labels)),
        ("containers", node.containers.to_string()),
        ("CPU", format!("{} of {} millicores reserved", reserved.cpu_millis, has.cpu_millis)),
        ("memory", format!("{} of {} reserved", output::bytes(reserved.memory_bytes), output::bytes(has.memory_bytes))),
        ("kernel", format!("{} {}", description.kernel, description.architecture)),
        ("agent", description.agent_version),
        ("timed by", probes(description.probes.as_ref())),
        ("joined", output::ago(node.created_at.as_ref())),
    ]);
}
