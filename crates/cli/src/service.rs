//! `warren service ...`

mod create;

use clap::Subcommand;
use warren_manifest::manifest_of;
use warren_proto::v1::{self, service_spec::Mode};

use crate::{
    client::ClientArguments,
    complete, container,
    error::Error,
    filter::ListArguments,
    logs::{self, LogArguments},
    objects::{
        self, request_id,
        service::{get, list},
    },
    output::{self, Format, FormatArguments, say},
    wait::{self, Follower, RemovalArguments, WaitArguments},
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a service.
    Create(Box<create::Arguments>),
    /// List services.
    #[command(alias = "list")]
    Ls {
        #[command(flatten)]
        list: ListArguments,
    },
    /// Show a service; --format yaml prints a manifest for `warren apply`.
    Inspect {
        /// Name, ID or unique ID prefix.
        #[arg(add = complete::services())]
        service: String,
        #[command(flatten)]
        format: FormatArguments,
    },
    /// List a service's containers: the newest of each slot, and any that still run.
    Ps {
        /// Name, ID or unique ID prefix.
        #[arg(add = complete::services())]
        service: String,
        /// Include replaced containers that are still recorded.
        #[arg(long, short)]
        all: bool,
        #[command(flatten)]
        list: ListArguments,
    },
    /// Show logs of a service's containers.
    Logs {
        /// Name, ID or unique ID prefix.
        #[arg(add = complete::services())]
        service: String,
        #[command(flatten)]
        logs: LogArguments,
    },
    /// Set the number of replicas of a service.
    Scale {
        /// Name, ID or unique ID prefix.
        #[arg(add = complete::services())]
        service: String,
        /// Number of replicas.
        #[arg(allow_negative_numbers = true)]
        replicas: i64,
        #[command(flatten)]
        wait: WaitArguments,
    },
    /// Restart services: replace their containers with the same spec.
    Restart {
        /// Names, IDs or unique ID prefixes.
        #[arg(required = true, add = complete::services())]
        services: Vec<String>,
        #[command(flatten)]
        wait: WaitArguments,
    },
    /// Wait until a service is ready or has ended. If it has ended, exits with its exit code.
    Wait(wait::Arguments),
    /// Remove services and their containers. Volumes, secrets and configs stay.
    Rm {
        /// Names, IDs or unique ID prefixes.
        #[arg(required = true, add = complete::services())]
        services: Vec<String>,
        #[command(flatten)]
        wait: RemovalArguments,
    },
}

pub(crate) async fn run(command: Command, client: &ClientArguments) -> Result<(), Error> {
    match command {
        Command::Create(arguments) => create::run(*arguments, client).await,
        Command::Ls { list } => ls(client, &list).await,
        Command::Inspect { service, format } => inspect(client, service, format.format).await,
        Command::Ps { service, all, list } => {
            let (mut containers, _) = objects::container::list(client, service, String::new()).await?;
            if !all {
                container::leave_out_replaced(&mut containers);
            }
            container::show(client, &list.apply(containers)?, list.format()).await
        }
        Command::Logs { service, logs } => logs::show(client, service, String::new(), logs).await,
        Command::Scale { service, replicas, wait } => scale(client, service, replicas, wait).await,
        Command::Restart { services, wait } => {
            let (mut outcomes, mut restarted) = (Vec::new(), Vec::new());
            for service in services {
                match restart(client, &service).await {
                    Ok(service) => restarted.push(service),
                    Err(error) => outcomes.push(Err(error)),
                }
            }
            outcomes.push(wait::ready(client, restarted, wait).await);
            Error::all(outcomes)
        }
        Command::Wait(arguments) => wait::run(arguments, client).await,
        Command::Rm { services, wait } => {
            // One that is not there keeps none of the others, and all go together.
            let (mut outcomes, mut leaving) = (Vec::new(), Vec::new());
            for service in services {
                match remove(client, service, wait).await {
                    Ok(removed) => leaving.extend(removed),
                    Err(error) => outcomes.push(Err(error)),
                }
            }
            outcomes.push(wait::gone(client, leaving, wait).await);
            Error::all(outcomes)
        }
    }
}

async fn ls(client: &ClientArguments, wanted: &ListArguments) -> Result<(), Error> {
    let services = wanted.apply(list(client).await?)?;
    if output::to_program(wanted.format(), &services)? {
        return Ok(());
    }
    let row = |service: &v1::Service| {
        let spec = service.spec.clone().unwrap_or_default();
        let status = service.status.unwrap_or_default();
        [
            output::short(&service.id),
            spec.name,
            mode(spec.mode.as_ref()),
            format!("{}/{}", status.running, status.desired),
            spec.container.unwrap_or_default().image,
            output::ago(service.created_at.as_ref()),
        ]
    };
    output::table(["ID", "NAME", "MODE", "RUNNING", "IMAGE", "CREATED"], services.iter().map(row));
    Ok(())
}

fn mode(mode: Option<&Mode>) -> String {
    match mode {
        Some(Mode::Global(_)) => "global".to_owned(),
        _ => "replicated".to_owned(),
    }
}

async fn inspect(client: &ClientArguments, service: String, format: Format) -> Result<(), Error> {
    let service = get(client, &service).await?;
    let shown = match format {
        Format::Yaml => output::to_program(format, &manifest_of(&service))?,
        Format::Table | Format::Json => output::to_program(format, &service)?,
    };
    if shown {
        return Ok(());
    }
    let spec = service.spec.unwrap_or_default();
    let status = service.status.unwrap_or_default();
    let container = spec.container.unwrap_or_default();
    let resources = spec.resources.unwrap_or_default();
    let amounts = |amounts: Option<v1::ResourceAmounts>| {
        let amounts = amounts.unwrap_or_default();
        format!("{} millicores, {}", amounts.cpu_millis, output::bytes(amounts.memory_bytes))
    };
    output::fields(&[
        ("id", service.id),
        ("name", spec.name),
        ("mode", mode(spec.mode.as_ref())),
        ("running", format!("{} of {}", status.running, status.desired)),
        ("addresses", service.virtual_addresses.join(", ")),
        ("ports", spec.ports.iter().map(port).collect::<Vec<_>>().join(", ")),
        ("image", container.image),
        ("command", container.command.join(" ")),
        ("args", container.args.join(" ")),
        ("env", output::pairs(&container.env)),
        ("mounts", container.mounts.iter().map(mount).collect::<Vec<_>>().join(", ")),
        ("secrets", container.secrets.iter().map(|it| it.source.clone()).collect::<Vec<_>>().join(", ")),
        ("configs", container.configs.iter().map(|it| it.source.clone()).collect::<Vec<_>>().join(", ")),
        ("constraints", spec.constraints.join(", ")),
        ("labels", output::pairs(&spec.labels)),
        ("reserved", amounts(resources.reservations)),
        ("limits", amounts(resources.limits)),
        ("created", output::ago(service.created_at.as_ref())),
        ("updated", output::ago(service.updated_at.as_ref())),
        ("version", service.version.to_string()),
        ("revision", service.revision.to_string()),
    ]);
    Ok(())
}

/// As `volumes` and `tmpfs` of a manifest have it.
fn mount(mount: &v1::Mount) -> String {
    let read_only = if mount.read_only { ":ro" } else { "" };
    match mount.r#type() {
        v1::MountType::Tmpfs => format!("tmpfs:{}", mount.target),
        _ => format!("{}:{}{read_only}", mount.source, mount.target),
    }
}

/// As `--publish` takes it.
fn port(port: &v1::Port) -> String {
    let protocol = if port.protocol() == v1::Protocol::Udp { "udp" } else { "tcp" };
    let mode = if port.publish_mode() == v1::PublishMode::Host { " on its nodes" } else { "" };
    let published = if port.host_port == 0 { String::new() } else { format!("{}:", port.host_port) };
    let name = if port.name.is_empty() { String::new() } else { format!("{} ", port.name) };
    format!("{name}{published}{}/{protocol}{mode}", port.container_port)
}

async fn scale(client: &ClientArguments, service: String, replicas: i64, wait: WaitArguments) -> Result<(), Error> {
    let known = get(client, &service).await?;
    let mut spec = known.spec.unwrap_or_default();
    if let Some(Mode::Global(_)) = spec.mode {
        return Err(Error::Usage(format!("{} is a global service: it has one container on every node", spec.name)));
    }
    spec.mode = Some(Mode::Replicated(v1::Replicated { replicas }));
    let request = v1::UpdateServiceRequest {
        service: known.id,
        spec: Some(spec),
        version: known.version,
        request_id: request_id(),
        restart: false,
    };
    let updated = client.services().await?.update_service(request).await?.into_inner().service.unwrap_or_default();
    wait::ready(client, vec![updated], wait).await
}

async fn restart(client: &ClientArguments, service: &str) -> Result<v1::Service, Error> {
    let known = get(client, service).await?;
    let request = v1::UpdateServiceRequest {
        service: known.id,
        spec: known.spec,
        version: known.version,
        request_id: request_id(),
        restart: true,
    };
    let updated = client.services().await?.update_service(request).await?.into_inner().service.unwrap_or_default();
    say!("{}", updated.spec.clone().unwrap_or_default().name);
    Ok(updated)
}

/// Deletes a service; returns its containers, if they are to be waited for.
async fn remove(
    client: &ClientArguments,
    service: String,
    wait: RemovalArguments,
) -> Result<Option<(String, Follower)>, Error> {
    let known = get(client, &service).await?;
    // Before it is deleted: a service that is gone cannot be named.
    let follower = if wait.wait { Some(Follower::start(client, &known.id).await?) } else { None };
    let request = v1::DeleteServiceRequest { service: known.id.clone(), request_id: request_id() };
    client.services().await?.delete_service(request).await?;
    let name = known.spec.unwrap_or_default().name;
    say!("{name}");
    Ok(follower.map(|follower| (name, follower)))
}
