//! `warren secret ...` and `warren config ...`: small files for containers. A secret's value is read from a file or stdin, never
//! from the command line, where everybody on the machine could read it.

use std::{
    io::{Read as _, Write as _},
    path::PathBuf,
};

use clap::Subcommand;
use warren_manifest::parse;
use warren_proto::v1::{self, SecretKind};

use crate::{
    client::ClientArguments,
    complete,
    error::Error,
    filter::ListArguments,
    objects::{request_id, secret::list},
    output::{self, FormatArguments, say},
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a secret or config from a file.
    Create {
        /// Name of the secret or config.
        name: String,
        /// File with the value; - is stdin.
        file: PathBuf,
        /// Label, as NAME=VALUE; may be repeated.
        #[arg(long, value_parser = parse::pair)]
        label: Vec<(String, String)>,
    },
    /// List secrets or configs, without their values.
    #[command(alias = "list")]
    Ls {
        #[command(flatten)]
        list: ListArguments,
    },
    /// Show details. Secret values are never shown.
    Inspect {
        /// Name, ID or unique ID prefix.
        #[arg(add = complete::secrets())]
        name: String,
        #[command(flatten)]
        format: FormatArguments,
    },
    /// Set a new value.
    Update {
        /// Name, ID or unique ID prefix.
        #[arg(add = complete::secrets())]
        name: String,
        /// File with the new value; - is stdin.
        file: PathBuf,
    },
    /// Remove secrets or configs. Fails for those that a service uses.
    Rm {
        /// Names, IDs or unique ID prefixes.
        #[arg(required = true, add = complete::secrets())]
        names: Vec<String>,
    },
}

fn read(file: PathBuf) -> Result<Vec<u8>, Error> {
    if file.as_os_str() == "-" {
        let mut bytes = Vec::new();
        std::io::stdin().read_to_end(&mut bytes)?;
        return Ok(bytes);
    }
    std::fs::read(&file).map_err(|source| Error::File { path: file, source })
}

pub(crate) async fn run(which: SecretKind, command: Command, client: &ClientArguments) -> Result<(), Error> {
    let mut api = client.secrets().await?;
    let kind = i32::from(which);
    match command {
        Command::Create { name, file, label } => {
            let (data, labels) = (read(file)?, label.into_iter().collect());
            let request = v1::CreateSecretRequest { kind, name, labels, data, request_id: request_id() };
            let made = api.create_secret(request).await?.into_inner().secret.unwrap_or_default();
            say!("{}", made.id);
        }
        Command::Ls { list: wanted } => {
            let secrets = wanted.apply(list(client, which).await?)?;
            if output::to_program(wanted.format(), &secrets)? {
                return Ok(());
            }
            let row = |secret: &v1::Secret| {
                [
                    output::short(&secret.id),
                    secret.name.clone(),
                    secret.sequence.to_string(),
                    secret.size_bytes.to_string(),
                    output::ago(secret.updated_at.as_ref()),
                ]
            };
            output::table(["ID", "NAME", "VALUE", "BYTES", "UPDATED"], secrets.iter().map(row));
        }
        Command::Inspect { name, format } => {
            let request = v1::GetSecretByNameRequest { kind, secret: name };
            let secret = api.get_secret_by_name(request).await?.into_inner().secret.unwrap_or_default();
            if output::to_program(format.format, &secret)? {
                return Ok(());
            }
            output::fields(&[
                ("id", secret.id),
                ("name", secret.name),
                ("labels", output::pairs(&secret.labels)),
                ("value", format!("number {}, {} bytes", secret.sequence, secret.size_bytes)),
                ("created", output::ago(secret.created_at.as_ref())),
                ("updated", output::ago(secret.updated_at.as_ref())),
            ]);
            if !secret.data.is_empty() {
                say!("");
                std::io::stdout().lock().write_all(&secret.data)?;
            }
        }
        Command::Update { name, file } => {
            let data = read(file)?;
            let request = v1::UpdateSecretRequest { kind, secret: name, data, request_id: request_id() };
            let secret = api.update_secret(request).await?.into_inner().secret.unwrap_or_default();
            say!("{} {}", secret.name, secret.sequence);
        }
        Command::Rm { names } => {
            let mut outcome = Ok(());
            for name in names {
                let request = v1::DeleteSecretRequest { kind, secret: name.clone(), request_id: request_id() };
                match api.delete_secret(request).await {
                    Ok(_) => say!("{name}"),
                    Err(status) => outcome = outcome.and(Err(status.into())),
                }
            }
            return outcome;
        }
    }
    Ok(())
}
