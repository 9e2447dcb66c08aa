//! `warren image ...`: images are a node's, so this talks to its containerd.

use std::path::PathBuf;

use clap::Subcommand;
use warren_agent::runtime;
use warren_spec::ImageName;

use crate::{error::Error, output::say};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Imports the images of an OCI archive (an image layout in a tar file).
    Import {
        /// The archive.
        file: PathBuf,
        /// Names the archive's only image; otherwise its own name is taken.
        #[arg(long)]
        name: Option<String>,
        /// containerd's socket.
        #[arg(long, env = "WARREN_CONTAINERD_SOCKET", default_value = "/run/containerd/containerd.sock")]
        containerd_socket: PathBuf,
        /// containerd's namespace.
        #[arg(long, env = "WARREN_CONTAINERD_NAMESPACE", default_value = "warren")]
        containerd_namespace: String,
    },
}

pub(crate) async fn run(command: Command) -> Result<(), Error> {
    let Command::Import { file, name, containerd_socket, containerd_namespace } = command;
    let name = name.map(|name| name.parse::<ImageName>()).transpose();
    let name = name.map_err(|error| Error::Usage(error.to_string()))?;
    // Before the daemon is asked: a name that was misspelt is the likelier fault.
    std::fs::metadata(&file).map_err(|error| Error::File { path: file.clone(), source: error })?;
    let containerd = runtime::connect(&containerd_socket, &containerd_namespace).await?;
    for image in runtime::import(&containerd, &file, name.as_ref()).await? {
        say!("{image}");
    }
    Ok(())
}
