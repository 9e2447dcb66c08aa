//! `warren image ...`: works on this node's containerd, not on the cluster.

use std::{io::IsTerminal as _, path::PathBuf};

use clap::{Args, Subcommand};
use warren_agent::runtime::{self, Containerd, Images, Wanted};
use warren_proto::v1::PullPolicy;
use warren_registry::{Credentials, Registries, cli::RegistryArguments};
use warren_spec::ImageName;

use crate::{
    error::Error,
    output::{self, FormatArguments, say},
};

#[derive(Args, Debug)]
pub(crate) struct Daemon {
    /// containerd socket.
    #[arg(long, env = "WARREN_CONTAINERD_SOCKET", default_value = "/run/containerd/containerd.sock")]
    containerd_socket: PathBuf,
    /// containerd namespace.
    #[arg(long, env = "WARREN_CONTAINERD_NAMESPACE", default_value = "warren")]
    containerd_namespace: String,
}

impl Daemon {
    async fn connect(&self) -> Result<Containerd, Error> {
        Ok(runtime::connect(&self.containerd_socket, &self.containerd_namespace).await?)
    }

    async fn images(&self, registries: &RegistryArguments) -> Result<Images, Error> {
        let registries = Registries::new(registries.options()).map_err(runtime::Error::from)?;
        Ok(Images::new(self.connect().await?, registries))
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Import images from an OCI archive (an image layout in a tar file).
    Import {
        /// OCI archive.
        file: PathBuf,
        /// Name of the image, if the archive has only one [default: the name in the archive]
        #[arg(long)]
        name: Option<String>,
        #[command(flatten)]
        daemon: Daemon,
    },
    /// Pull an image from its registry.
    Pull {
        /// Image name, with a tag or digest.
        image: String,
        /// File with registry credentials: user:password, or a Docker config.json.
        #[arg(long, value_name = "FILE")]
        credentials: Option<PathBuf>,
        #[command(flatten)]
        registries: RegistryArguments,
        #[command(flatten)]
        daemon: Daemon,
    },
    /// List images.
    #[command(alias = "list")]
    Ls {
        #[command(flatten)]
        daemon: Daemon,
        #[command(flatten)]
        format: FormatArguments,
    },
    /// Remove images by name; layers that containers use stay.
    Rm {
        /// Image names from `warren image ls`.
        #[arg(required = true)]
        images: Vec<String>,
        #[command(flatten)]
        daemon: Daemon,
    },
}

fn parse(name: &str) -> Result<ImageName, Error> {
    name.parse().map_err(|error: warren_spec::InvalidImageName| Error::Usage(error.to_string()))
}

pub(crate) async fn run(command: Command) -> Result<(), Error> {
    match command {
        Command::Import { file, name, daemon } => {
            let name = name.as_deref().map(parse).transpose()?;
            // Before the daemon is asked: a name that was misspelt is the likelier fault.
            std::fs::metadata(&file).map_err(|error| Error::File { path: file.clone(), source: error })?;
            for image in runtime::import(&daemon.connect().await?, &file, name.as_ref()).await? {
                say!("{image}");
            }
            Ok(())
        }
        Command::Pull { image, credentials, registries, daemon } => {
            let name = parse(&image)?;
            let credentials = match credentials {
                Some(path) => {
                    let bytes = std::fs::read(&path).map_err(|error| Error::File { path, source: error })?;
                    Credentials::parse(&bytes, name.registry()).map_err(runtime::Error::from)?
                }
                None => Credentials::Anonymous,
            };
            let images = daemon.images(&registries).await?;
            let wanted = Wanted { name, digest: None, policy: PullPolicy::Always, credentials };
            let shown = std::io::stderr().is_terminal();
            let pulled = images
                .ensure(&wanted, |come, all| {
                    if shown && all > 0 {
                        eprint!("\r{:.1} of {:.1} MB ", come as f64 / 1e6, all as f64 / 1e6);
                    }
                })
                .await;
            if shown {
                eprint!("\r");
            }
            say!("{} {}", wanted.name, pulled?.target());
            Ok(())
        }
        Command::Ls { daemon, format } => {
            let images = daemon.images(&RegistryArguments::default()).await?.all().await?;
            let entry = |(name, digest): &(String, String)| serde_json::json!({"name": name, "digest": digest});
            if output::to_program(format.format, &images.iter().map(entry).collect::<Vec<_>>())? {
                return Ok(());
            }
            output::table(["NAME", "DIGEST"], images.into_iter().map(|(name, digest)| [name, digest]));
            Ok(())
        }
        Command::Rm { images, daemon } => {
            let here = daemon.images(&RegistryArguments::default()).await?;
            let mut outcome = Ok(());
            for image in images {
                // By the name that was given; else by the whole name that it stands for.
                let mut removed = here.remove(&image).await;
                if let (Err(runtime::Error::NoSuchImage(_)), Ok(name)) = (&removed, parse(&image)) {
                    let whole = here.remove(&name.to_string()).await;
                    removed = whole.map_err(|_| runtime::Error::NoSuchImage(image.clone()));
                }
                if removed.is_ok() {
                    say!("{image}");
                }
                outcome = outcome.and(removed.map_err(|error| match error {
                    runtime::Error::NoSuchImage(name) => Error::NoImage(name),
                    error => error.into(),
                }));
            }
            outcome
        }
    }
}
