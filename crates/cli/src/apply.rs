//! `warren apply`: makes the cluster what files say. A key that is not known is an error, with its path: what was misspelt is
//! never left out in silence.

mod manifest;

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use clap::Args;
use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};
use tonic::Code;
use warren_proto::v1::{self, SecretKind};

use crate::{
    client::ClientArguments,
    error::Error,
    output::say,
    service::{self, request_id},
    wait::{self, WaitArguments},
};
use manifest::{SecretSpec, ServiceSpec, VolumeSpec};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// A file, a directory with files named .yaml or .yml, or - for stdin; may be repeated.
    #[arg(long, short, required = true, value_name = "FILE|DIR|-")]
    file: Vec<PathBuf>,
    #[command(flatten)]
    wait: WaitArguments,
}

/// What every document has.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document<T> {
    api_version: String,
    kind: String,
    metadata: Metadata,
    spec: T,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    name: String,
    #[serde(default)]
    labels: std::collections::BTreeMap<String, String>,
}

/// Something to be made so.
enum Object {
    Service(Box<v1::ServiceSpec>),
    Secret(v1::CreateSecretRequest),
    Volume(v1::CreateVolumeRequest),
}

impl Object {
    /// What people call it.
    fn name(&self) -> String {
        match self {
            Self::Service(spec) => format!("service {}", spec.name),
            Self::Secret(request) => format!("{} {}", kind_word(request.kind), request.name),
            Self::Volume(request) => format!("volume {}", request.name),
        }
    }
}

fn kind_word(kind: i32) -> &'static str {
    if kind == i32::from(SecretKind::Config) { "config" } else { "secret" }
}

/// The files, in order; of a directory those that look like manifests.
fn files(paths: &[PathBuf]) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    for path in paths {
        let failed = |source| Error::File { path: path.clone(), source };
        if path.as_os_str() != "-" && std::fs::metadata(path).map_err(failed)?.is_dir() {
            let entries = std::fs::read_dir(path).map_err(failed)?.flatten().map(|entry| entry.path());
            let is_manifest = |path: &PathBuf| path.extension().is_some_and(|e| e == "yaml" || e == "yml");
            let mut found: Vec<_> = entries.filter(is_manifest).collect();
            found.sort();
            files.extend(found);
        } else {
            files.push(path.clone());
        }
    }
    Ok(files)
}

fn read(path: &Path) -> Result<String, Error> {
    let mut text = String::new();
    if path.as_os_str() == "-" {
        std::io::stdin().read_to_string(&mut text)?;
        return Ok(text);
    }
    std::fs::read_to_string(path).map_err(|source| Error::File { path: path.to_owned(), source })
}

/// The documents of a file, each with as many empty lines before it as make its own lines' numbers right.
fn documents(text: &str) -> Vec<String> {
    let mut documents = vec![String::new()];
    for (i, line) in text.lines().enumerate() {
        // What stands behind the dashes belongs to the document that they begin.
        let begins = if line.trim_end() == "---" {
            Some("")
        } else {
            line.strip_prefix("---").filter(|rest| rest.starts_with([' ', '\t']))
        };
        match (begins, documents.last_mut()) {
            (None, Some(document)) => {
                // An end without another beginning.
                if line.trim_end() != "..." {
                    document.push_str(line);
                }
                document.push('\n');
            }
            (rest, _) => documents.push(format!("{}{}\n", "\n".repeat(i), rest.unwrap_or_default())),
        }
    }
    let says_something =
        |document: &String| document.lines().any(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'));
    documents.retain(says_something);
    documents
}

/// Reads a document. The kinds' own types are read from the text itself: what looks like a number or a truth and is meant as
/// text stays as it was written.
fn parse<T: DeserializeOwned>(text: &str) -> Result<Document<T>, String> {
    // What follows the first line shows the text around a mistake, a secret's perhaps.
    serde_saphyr::from_str(text).map_err(|error| {
        let text = error.to_string();
        text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
    })
}

fn object(text: &str) -> Result<Object, String> {
    let Document { api_version, kind, metadata, .. } = parse::<IgnoredAny>(text)?;
    let which = format!("{kind} {}", metadata.name);
    if !matches!(api_version.as_str(), "warren.io/v1" | "v1") {
        return Err(format!("{which}: apiVersion: {api_version:?} is not warren.io/v1"));
    }
    let (name, labels) = (metadata.name, metadata.labels);
    let object = match kind.as_str() {
        "Service" => parse::<ServiceSpec>(text)
            .and_then(|document| Ok(Object::Service(Box::new(document.spec.into_proto(name, labels)?)))),
        "Secret" | "Config" => parse::<SecretSpec>(text).and_then(|document| {
            let kind = if kind == "Secret" { SecretKind::Secret } else { SecretKind::Config };
            let (data, request_id) = (document.spec.value()?, request_id());
            Ok(Object::Secret(v1::CreateSecretRequest { kind: kind.into(), name, labels, data, request_id }))
        }),
        "Volume" => parse::<VolumeSpec>(text).map(|document| Object::Volume(document.spec.into_proto(name, labels))),
        _ => Err("the kind is not known: Service, Secret, Config or Volume".to_owned()),
    };
    object.map_err(|why| format!("{which}: {why}"))
}

pub(crate) async fn run(arguments: Arguments, client: &ClientArguments) -> Result<(), Error> {
    let mut objects = Vec::new();
    // All is read before anything is done: a mistake in the last document leaves the cluster as it was.
    for path in files(&arguments.file)? {
        let text = read(&path)?;
        for document in documents(&text) {
            let object = object(&document);
            objects.push(object.map_err(|why| Error::Usage(format!("{}: {why}", path.display())))?);
        }
    }
    if objects.is_empty() {
        return Err(Error::Usage("nothing to apply: there is no document in what -f names".to_owned()));
    }
    // What services need comes before them.
    let order = |object: &Object| match object {
        Object::Secret(_) => 0,
        Object::Volume(_) => 1,
        Object::Service(_) => 2,
    };
    objects.sort_by_key(order);
    let mut services = Vec::new();
    for object in objects {
        let which = object.name();
        let applied = match object {
            Object::Secret(request) => apply_secret(client, request).await,
            Object::Volume(request) => apply_volume(client, request).await,
            Object::Service(spec) => apply_service(client, *spec).await.map(|service| services.push(service)),
        };
        applied.map_err(|error| match error {
            Error::Refused(status) => Error::Object { which, status },
            other => other,
        })?;
    }
    wait::ready(client, services, arguments.wait).await
}

fn is_there(outcome: Result<(), tonic::Status>) -> Result<bool, Error> {
    match outcome {
        Ok(()) => Ok(true),
        Err(status) if status.code() == Code::NotFound => Ok(false),
        Err(status) => Err(status.into()),
    }
}

async fn apply_secret(client: &ClientArguments, request: v1::CreateSecretRequest) -> Result<(), Error> {
    let mut api = client.secrets().await?;
    let (kind, name) = (request.kind, request.name.clone());
    let word = kind_word(kind);
    let known = api.get_secret_by_name(v1::GetSecretByNameRequest { kind, secret: name.clone() }).await;
    let known = known.map(|known| known.into_inner().secret.unwrap_or_default());
    // What is found may be another whose id begins like this name.
    let is_it = known.as_ref().is_ok_and(|known| known.name == name);
    if is_there(known.as_ref().map(drop).map_err(Clone::clone))? && is_it {
        let known = known.unwrap_or_default();
        let update = v1::UpdateSecretRequest { kind, secret: known.id, data: request.data, request_id: request_id() };
        let before = known.sequence;
        let after = api.update_secret(update).await?.into_inner().secret.unwrap_or_default().sequence;
        say!("{word} {name} {}", if after == before { "unchanged" } else { "updated" });
    } else {
        api.create_secret(request).await?;
        say!("{word} {name} created");
    }
    Ok(())
}

async fn apply_volume(client: &ClientArguments, request: v1::CreateVolumeRequest) -> Result<(), Error> {
    let mut api = client.volumes().await?;
    let name = request.name.clone();
    let known = api.get_volume_by_name(v1::GetVolumeByNameRequest { volume: name.clone() }).await;
    match known.map(|known| known.into_inner().volume.unwrap_or_default()) {
        Ok(known)
            if known.name == name
                && known.driver_options == request.driver_options
                && known.exclusive == request.exclusive =>
        {
            say!("volume {name} unchanged");
        }
        Ok(known) if known.name != name => {
            // Another, whose id begins like this name.
            api.create_volume(request).await?;
            say!("volume {name} created");
        }
        Ok(_) => {
            return Err(Error::Usage(format!("volume {name}: is there with other options, which cannot be changed")));
        }
        Err(status) if status.code() == Code::NotFound => {
            api.create_volume(request).await?;
            say!("volume {name} created");
        }
        Err(status) => return Err(status.into()),
    }
    Ok(())
}

async fn apply_service(client: &ClientArguments, spec: v1::ServiceSpec) -> Result<v1::Service, Error> {
    let name = spec.name.clone();
    let mut api = client.services().await?;
    let known = match service::get(client, &name).await {
        // Another one's id may begin like this name.
        Ok(known) => Some(known).filter(|known| known.spec.as_ref().is_some_and(|spec| spec.name == name)),
        Err(Error::Refused(status)) if status.code() == Code::NotFound => None,
        Err(error) => return Err(error),
    };
    let (applied, what) = match known {
        None => {
            let request = v1::CreateServiceRequest { spec: Some(spec), request_id: request_id() };
            (api.create_service(request).await?.into_inner().service, "created")
        }
        Some(known) => {
            let request = v1::UpdateServiceRequest {
                service: known.id.clone(),
                spec: Some(spec),
                version: known.version,
                request_id: request_id(),
            };
            let updated = api.update_service(request).await?.into_inner().service;
            let same = updated.as_ref().is_some_and(|updated| updated.spec == known.spec);
            (updated, if same { "unchanged" } else { "updated" })
        }
    };
    say!("service {name} {what}");
    Ok(applied.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::documents;

    #[test]
    fn nothing_of_a_file_is_dropped() {
        let texts = |text: &str| documents(text).iter().map(|text| text.trim().to_owned()).collect::<Vec<_>>();
        assert_eq!(texts("a: 1\n---\nb: 2\n"), ["a: 1", "b: 2"]);
        assert_eq!(texts("--- {a: 1}\n--- {b: 2}\n---\nc: 3"), ["{a: 1}", "{b: 2}", "c: 3"]);
        assert_eq!(texts("---\ta: 1\n...\n--- # only words\nb: 2"), ["a: 1", "# only words\nb: 2"]);
        assert_eq!(texts("a: |\n  --- inside\n  ----\n----x"), ["a: |\n  --- inside\n  ----\n----x"]);
        assert_eq!(texts("# nothing\n---\n\n--- \n"), Vec::<String>::new());
        // Lines keep their numbers.
        assert_eq!(documents("a: 1\n--- {b: 2}\n")[1].lines().position(|line| line.contains('b')), Some(1));
    }
}
