//! `warren volume ...`

use clap::Subcommand;
use warren_manifest::parse;
use warren_proto::v1;

use crate::{
    client::ClientArguments,
    complete,
    error::Error,
    filter::ListArguments,
    objects::{node, request_id, volume::list},
    output::{self, FormatArguments, say},
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a volume.
    Create {
        /// Name of the volume.
        name: String,
        /// Driver option, as for Docker's local driver: type=bind|tmpfs|nfs, device=PATH, o=MOUNT-OPTIONS; may be
        /// repeated [default: a directory on the node]
        #[arg(long = "opt", short, value_parser = parse::pair)]
        options: Vec<(String, String)>,
        /// Allow only one container at a time to use the volume.
        #[arg(long)]
        exclusive: bool,
        /// Node that stores the data [default: the node of the first container that uses the volume]
        #[arg(long, default_value = "", hide_default_value = true)]
        node: String,
        /// Label, as NAME=VALUE; may be repeated.
        #[arg(long, value_parser = parse::pair)]
        label: Vec<(String, String)>,
        /// Volume driver; only local is supported.
        #[arg(long, default_value = "local")]
        driver: String,
    },
    /// List volumes.
    #[command(alias = "list")]
    Ls {
        #[command(flatten)]
        list: ListArguments,
    },
    /// Show a volume.
    Inspect {
        /// Name, ID or unique ID prefix.
        #[arg(add = complete::volumes())]
        volume: String,
        #[command(flatten)]
        format: FormatArguments,
    },
    /// Remove volumes and their data.
    Rm {
        /// Names, IDs or unique ID prefixes.
        #[arg(required = true, add = complete::volumes())]
        volumes: Vec<String>,
        /// Remove volumes even if services use them.
        #[arg(long, short)]
        force: bool,
    },
}

pub(crate) async fn run(command: Command, client: &ClientArguments) -> Result<(), Error> {
    let mut api = client.volumes().await?;
    match command {
        Command::Create { name, options, exclusive, node, label, driver } => {
            let request = v1::CreateVolumeRequest {
                name,
                driver,
                driver_options: options.into_iter().collect(),
                labels: label.into_iter().collect(),
                exclusive,
                node,
                request_id: request_id(),
            };
            let made = api.create_volume(request).await?.into_inner().volume.unwrap_or_default();
            say!("{}", made.id);
        }
        Command::Ls { list: wanted } => {
            let volumes = wanted.apply(list(client).await?)?;
            if output::to_program(wanted.format(), &volumes)? {
                return Ok(());
            }
            let nodes = node::list(client).await?;
            let hostname = |id: &str| {
                let known = nodes.iter().find(|node| node.id == id).and_then(|node| node.description.as_ref());
                known.map_or_else(|| "-".to_owned(), |description| description.hostname.clone())
            };
            let row = |volume: &v1::Volume| {
                [
                    output::short(&volume.id),
                    volume.name.clone(),
                    volume.driver_options.get("type").cloned().unwrap_or_else(|| "directory".to_owned()),
                    hostname(&volume.node_id),
                    volume.used_by.join(", "),
                    output::ago(volume.created_at.as_ref()),
                ]
            };
            output::table(["ID", "NAME", "TYPE", "NODE", "USED BY", "CREATED"], volumes.iter().map(row));
        }
        Command::Inspect { volume, format } => {
            let request = v1::GetVolumeByNameRequest { volume };
            let volume = api.get_volume_by_name(request).await?.into_inner().volume.unwrap_or_default();
            if output::to_program(format.format, &volume)? {
                return Ok(());
            }
            output::fields(&[
                ("id", volume.id),
                ("name", volume.name),
                ("driver", volume.driver),
                ("options", output::pairs(&volume.driver_options)),
                ("labels", output::pairs(&volume.labels)),
                ("node", volume.node_id),
                ("exclusive", volume.exclusive.to_string()),
                ("used by", volume.used_by.join(", ")),
                ("created", output::ago(volume.created_at.as_ref())),
            ]);
        }
        Command::Rm { volumes, force } => {
            let mut outcome = Ok(());
            for volume in volumes {
                let request = v1::DeleteVolumeRequest { volume: volume.clone(), force, request_id: request_id() };
                match api.delete_volume(request).await {
                    Ok(_) => say!("{volume}"),
                    Err(status) => outcome = outcome.and(Err(status.into())),
                }
            }
            return outcome;
        }
    }
    Ok(())
}
