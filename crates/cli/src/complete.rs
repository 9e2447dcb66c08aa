//! Completion of the names of what a cluster has, as it is now.

use std::{ffi::OsStr, time::Duration};

use clap_complete::engine::{ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter as _};
use warren_proto::v1;

use crate::{
    client::ClientArguments,
    error::Error,
    objects::{container, node, secret, service, volume},
};

/// Of the environment: a shell asks with it for the end of a word.
pub(crate) const VARIABLE: &str = "WARREN_COMPLETE";
/// Whoever has pressed a key does not wait longer.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug)]
enum Kind {
    Services,
    Containers,
    Nodes,
    Secrets(v1::SecretKind),
    Volumes,
}

pub(crate) fn services() -> ArgValueCompleter {
    of(Kind::Services)
}

pub(crate) fn containers() -> ArgValueCompleter {
    of(Kind::Containers)
}

/// Files of this machine, and containers with the colon that a path in them stands behind.
pub(crate) fn places() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        let mut candidates = PathCompleter::any().complete(current);
        let current = current.to_string_lossy();
        if !current.contains(['/', ':']) {
            let names = names(Kind::Containers).unwrap_or_default().into_iter();
            let names = names.filter(|name| name.starts_with(&*current)).map(|name| format!("{name}:"));
            candidates.extend(names.map(CompletionCandidate::new));
        }
        candidates
    })
}

pub(crate) fn nodes() -> ArgValueCompleter {
    of(Kind::Nodes)
}

pub(crate) fn volumes() -> ArgValueCompleter {
    of(Kind::Volumes)
}

/// Secrets, or configs after `warren config`.
pub(crate) fn secrets() -> ArgValueCompleter {
    let is_config = std::env::args_os().any(|word| word == "config");
    of(Kind::Secrets(if is_config { v1::SecretKind::Config } else { v1::SecretKind::Secret }))
}

fn of(kind: Kind) -> ArgValueCompleter {
    ArgValueCompleter::new(move |current: &OsStr| {
        let current = current.to_string_lossy();
        let names = names(kind).unwrap_or_default();
        names.into_iter().filter(|name| name.starts_with(&*current)).map(CompletionCandidate::new).collect::<Vec<_>>()
    })
}

/// The words of the command so far say which manager to ask; one that does not answer has no names.
fn names(kind: Kind) -> Option<Vec<String>> {
    let words: Vec<_> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let client = ClientArguments::of_words(&words);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    let names = runtime.block_on(async { tokio::time::timeout(PATIENCE, fetch(kind, &client)).await.ok()?.ok() });
    runtime.shutdown_background();
    let mut names = names?;
    names.sort();
    names.dedup();
    Some(names)
}

async fn fetch(kind: Kind, client: &ClientArguments) -> Result<Vec<String>, Error> {
    match kind {
        Kind::Services => {
            let services = service::list(client).await?;
            Ok(services.into_iter().filter_map(|service| Some(service.spec?.name)).collect())
        }
        Kind::Containers => {
            let (containers, _) = container::list(client, String::new(), String::new()).await?;
            // Ended ones, too: their logs are what is looked for.
            Ok(containers.iter().map(container::name).collect())
        }
        Kind::Nodes => {
            let nodes = node::list(client).await?;
            Ok(nodes.into_iter().filter_map(|node| Some(node.description?.hostname)).collect())
        }
        Kind::Secrets(kind) => {
            let secrets = secret::list(client, kind).await?;
            Ok(secrets.into_iter().map(|secret| secret.name).collect())
        }
        Kind::Volumes => {
            let volumes = volume::list(client).await?;
            Ok(volumes.into_iter().map(|volume| volume.name).collect())
        }
    }
}
