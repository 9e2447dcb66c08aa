//! `warren container ...`

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use clap::Subcommand;
use warren_manifest::parse;
use warren_proto::v1;

use crate::{
    client::ClientArguments,
    complete, copy,
    error::Error,
    exec,
    filter::ListArguments,
    logs::{self, LogArguments},
    objects::{
        container::{get, has_ended, list, name, state_name, status},
        node,
    },
    output::{self, Format, FormatArguments, say},
    stats, wait,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List containers.
    #[command(alias = "list")]
    Ls {
        /// Only containers of this service: name, ID or unique ID prefix.
        #[arg(long)]
        service: Option<String>,
        /// Only containers of this node: hostname, ID or unique ID prefix.
        #[arg(long)]
        node: Option<String>,
        /// Include containers that have ended.
        #[arg(long, short)]
        all: bool,
        #[command(flatten)]
        list: ListArguments,
    },
    /// Show logs of a container.
    Logs {
        /// Name, like web-1, ID or unique ID prefix.
        #[arg(add = complete::containers())]
        container: String,
        #[command(flatten)]
        logs: LogArguments,
    },
    /// Run a command in a running container; exits with the command's exit code.
    Exec(exec::Arguments),
    /// Copy files from or to a running container: `web-1:/etc/hosts .`, or `file web-1:/tmp`. Needs `tar` in the image.
    Cp(copy::Arguments),
    /// Send a signal to containers' main processes. The restart policy applies to those that exit.
    Kill {
        /// Names, like web-1, IDs or unique ID prefixes.
        #[arg(required = true, add = complete::containers())]
        containers: Vec<String>,
        /// Signal name, like TERM or SIGTERM, or number.
        #[arg(long, short, default_value = "KILL")]
        signal: String,
    },
    /// Wait until containers exit, and print their exit codes.
    Wait {
        /// Names, like web-1, IDs or unique ID prefixes.
        #[arg(required = true, add = complete::containers())]
        containers: Vec<String>,
        /// Timeout: a number of seconds, or 90s, 5m [default: no limit]
        #[arg(long, value_name = "DURATION", value_parser = parse::seconds)]
        timeout: Option<u64>,
    },
    /// Show resource usage of containers.
    Stats(stats::Arguments),
    /// Show a container.
    Inspect {
        /// Name, like web-1, ID or unique ID prefix.
        #[arg(add = complete::containers())]
        container: String,
        #[command(flatten)]
        format: FormatArguments,
    },
}

pub(crate) async fn run(command: Command, client: &ClientArguments) -> Result<(), Error> {
    match command {
        Command::Ls { service, node, all, list: wanted } => {
            let (mut containers, _) = list(client, service.unwrap_or_default(), node.unwrap_or_default()).await?;
            containers.retain(|container| all || !has_ended(container));
            show(client, &wanted.apply(containers)?, wanted.format()).await
        }
        Command::Logs { container, logs } => logs::show(client, String::new(), container, logs).await,
        Command::Exec(arguments) => exec::run(arguments, client).await,
        Command::Cp(arguments) => copy::run(arguments, client).await,
        Command::Kill { containers, signal } => {
            let mut outcomes = Vec::new();
            for container in containers {
                outcomes.push(exec::signal(client, &container, &signal).await.map(|()| say!("{container}")));
            }
            Error::all(outcomes)
        }
        Command::Wait { containers, timeout } => wait::containers_end(client, containers, timeout).await,
        Command::Stats(arguments) => stats::run(arguments, client).await,
        Command::Inspect { container, format } => {
            let container = get(client, container).await?;
            if !output::to_program(format.format, &container)? {
                inspect(&container);
            }
            Ok(())
        }
    }
}

/// Leaves out those of a service that have ended and have a newer one in their slot.
pub(crate) fn leave_out_replaced(containers: &mut Vec<v1::Container>) {
    let slots = wait::slots(containers.iter());
    let newest: HashSet<String> = slots.values().filter_map(|slot| slot.last()).map(|it| it.id.clone()).collect();
    containers.retain(|it| !has_ended(it) || newest.contains(&it.id));
}

/// How a container is; nothing where nobody asks.
fn health_name(health: v1::Health) -> &'static str {
    match health {
        v1::Health::Unspecified => "",
        v1::Health::Starting => "starting",
        v1::Health::Healthy => "healthy",
        v1::Health::Unhealthy => "unhealthy",
    }
}

/// Shows containers with their kernel timings.
pub(crate) async fn show(client: &ClientArguments, containers: &[v1::Container], format: Format) -> Result<(), Error> {
    if output::to_program(format, &containers)? {
        return Ok(());
    }
    let nodes = node::list(client).await?;
    let nodes: HashMap<&str, &v1::Node> = nodes.iter().map(|node| (node.id.as_str(), node)).collect();
    let hostname = |node: &v1::Node| node.description.clone().unwrap_or_default().hostname;
    let row = |container: &v1::Container| {
        let status = status(container);
        let node = nodes.get(container.node_id.as_str());
        let kernel = status.kernel.unwrap_or_default();
        let mut state = state_name(status.state());
        let (mut message, health) = (status.message.clone(), health_name(status.health()));
        if container.desired_state() == v1::ContainerState::Removed && !has_ended(container) {
            state.push_str(" (stopping)");
        } else if !has_ended(container) && node.is_some_and(|node| node.status() == v1::NodeStatus::Down) {
            // What it does now nobody knows.
            state.push_str(" (node down)");
        } else if status.state() == v1::ContainerState::Running && !health.is_empty() {
            state.push_str(&format!(" ({health})"));
        }
        if status.oom_killed && has_ended(container) {
            message.push_str(" (out of memory)");
        }
        if message.is_empty() && status.health() == v1::Health::Unhealthy {
            message.clone_from(&status.health_message);
        }
        if let Some(left) = output::left(container.next_try_at.as_ref()) {
            let words = if message.is_empty() { "" } else { "; " };
            // Not too early by what is cut off.
            message.push_str(&format!("{words}next try in {}", output::coarse(left + Duration::from_millis(999))));
        }
        [
            output::short(&container.id),
            name(container),
            container.spec.as_ref().map(|spec| spec.image.clone()).unwrap_or_default(),
            node.map_or_else(|| "-".to_owned(), |node| hostname(node)),
            state,
            output::ago(status.changed_at.as_ref()),
            output::ms(kernel.create_nanos),
            output::ms(kernel.start_nanos),
            output::ms(kernel.stop_nanos),
            message,
        ]
    };
    let header = ["ID", "NAME", "IMAGE", "NODE", "STATE", "SINCE", "CREATE", "START", "STOP", "MESSAGE"];
    output::table(header, containers.iter().map(row));
    Ok(())
}

fn inspect(container: &v1::Container) {
    let status = status(container);
    let (kernel, runtime) = (status.kernel.unwrap_or_default(), status.runtime.unwrap_or_default());
    let spec = container.spec.clone().unwrap_or_default();
    let timing = |timing: &v1::Timing| {
        let v1::Timing { create_nanos, start_nanos, stop_nanos } = timing;
        format!(
            "create {}, start {}, stop {}",
            output::ms(*create_nanos),
            output::ms(*start_nanos),
            output::ms(*stop_nanos)
        )
    };
    let next_try = output::left(container.next_try_at.as_ref());
    let next_try = next_try.map_or_else(|| "-".to_owned(), |left| format!("in {}", output::coarse(left)));
    output::fields(&[
        ("id", container.id.clone()),
        ("name", name(container)),
        ("node", container.node_id.clone()),
        ("image", spec.image),
        ("state", state_name(status.state.try_into().unwrap_or_default())),
        ("wanted", state_name(container.desired_state())),
        ("message", status.message.clone()),
        ("addresses", status.addresses.join(", ")),
        ("health", [health_name(status.health()), status.health_message.as_str()].join(" ").trim().to_owned()),
        ("created", output::ago(container.created_at.as_ref())),
        ("exit code", status.exit_code.map_or_else(|| "-".to_owned(), |code| code.to_string())),
        ("next try", next_try),
        ("pid", if status.pid == 0 { "-".to_owned() } else { status.pid.to_string() }),
        ("oom killed", status.oom_killed.to_string()),
        ("signal ignored", status.signal_ignored.to_string()),
        ("kernel", timing(&kernel)),
        ("runtime", timing(&runtime)),
    ]);
}
