//! `warren node ...`

use clap::Subcommand;
use warren_proto::v1;

use crate::{
    client::{ClientArguments, all_pages},
    error::Error,
    output::{self, Format, FormatArguments, say},
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Lists nodes.
    #[command(alias = "list")]
    Ls {
        #[command(flatten)]
        format: FormatArguments,
    },
    /// Shows one node.
    Inspect {
        /// Hostname, id, or unique beginning of an id.
        node: String,
        #[command(flatten)]
        format: FormatArguments,
    },
    /// Removes the record of a node that is down; its containers are replaced elsewhere.
    Rm {
        /// Hostname, id, or unique beginning of an id.
        node: String,
    },
}

pub(crate) async fn run(command: Command, client: &ClientArguments) -> Result<(), Error> {
    match command {
        Command::Ls { format } => {
            let nodes = list(client).await?;
            match format.format {
                Format::Json => output::json(&nodes),
                Format::Table => {
                    table(&nodes);
                    Ok(())
                }
            }
        }
        Command::Rm { node } => {
            client.nodes().await?.remove_node(v1::RemoveNodeRequest { node: node.clone() }).await?;
            say!("{node}");
            Ok(())
        }
        Command::Inspect { node, format } => {
            let request = v1::GetNodeRequest { node };
            let node = client.nodes().await?.get_node(request).await?.into_inner().node.unwrap_or_default();
            match format.format {
                Format::Json => output::json(&node),
                Format::Table => {
                    inspect(&node);
                    Ok(())
                }
            }
        }
    }
}

/// All nodes, page by page.
pub(crate) async fn list(client: &ClientArguments) -> Result<Vec<v1::Node>, Error> {
    let mut client = client.nodes().await?;
    all_pages(async |page_token| {
        let page = client.list_nodes(v1::ListNodesRequest { page_size: 0, page_token }).await?.into_inner();
        Ok((page.nodes, page.next_page_token))
    })
    .await
}

fn status_name(node: &v1::Node) -> &'static str {
    match node.status() {
        v1::NodeStatus::Unspecified => "unknown",
        v1::NodeStatus::Ready => "ready",
        v1::NodeStatus::Down => "down",
    }
}

fn probes(report: Option<&v1::ProbeReport>) -> String {
    match report {
        Some(report) if report.message.is_empty() => "kernel".to_owned(),
        Some(report) => format!("runtime ({})", report.message),
        None => "unknown".to_owned(),
    }
}

fn table(nodes: &[v1::Node]) {
    let row = |node: &v1::Node| {
        let description = node.description.clone().unwrap_or_default();
        let has = description.resources.unwrap_or_default();
        let reserved = node.reserved.unwrap_or_default();
        [
            output::short(&node.id),
            description.hostname,
            status_name(node).to_owned(),
            node.containers.to_string(),
            format!("{:.1}/{:.1}", reserved.cpu_millis as f64 / 1e3, has.cpu_millis as f64 / 1e3),
            format!("{}/{}", output::bytes(reserved.memory_bytes), output::bytes(has.memory_bytes)),
            description
                .probes
                .as_ref()
                .map_or("unknown", |p| if p.message.is_empty() { "kernel" } else { "runtime" })
                .to_owned(),
        ]
    };
    output::table(["ID", "HOSTNAME", "STATUS", "CONTAINERS", "CPU", "MEMORY", "TIMED BY"], nodes.iter().map(row));
}

fn inspect(node: &v1::Node) {
    let description = node.description.clone().unwrap_or_default();
    let (has, reserved) = (description.resources.unwrap_or_default(), node.reserved.unwrap_or_default());
    output::fields(&[
        ("id", node.id.clone()),
        ("hostname", description.hostname),
        ("status", format!("{} {}", status_name(node), node.status_message)),
        ("labels", output::pairs(&description.labels)),
        ("containers", node.containers.to_string()),
        ("CPU", format!("{} of {} millicores reserved", reserved.cpu_millis, has.cpu_millis)),
        ("memory", format!("{} of {} reserved", output::bytes(reserved.memory_bytes), output::bytes(has.memory_bytes))),
        ("kernel", format!("{} {}", description.kernel, description.architecture)),
        ("agent", description.agent_version),
        ("timed by", probes(description.probes.as_ref())),
        ("joined", output::ago(node.created_at.as_ref())),
    ]);
}
