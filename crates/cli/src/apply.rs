//! `warren apply`: makes the cluster what files say. A key that is not known is an error, with its path: what was misspelt is
//! never left out in silence.

mod manifest;
mod mistakes;
mod places;
mod write;

pub(crate) use write::manifest_of;

use std::{
    collections::BTreeSet,
    io::Read as _,
    path::{Path, PathBuf},
};

use clap::Args;
use serde::{Deserialize, de::IgnoredAny};
use tonic::Code;
use warren_proto::v1::{self, SecretKind};

use crate::{
    client::ClientArguments,
    error::Error,
    objects::{request_id, service},
    output::say,
    wait::{self, WaitArguments},
};
use manifest::{SecretSpec, ServiceSpec, VolumeSpec};
use mistakes::{Mistake, Source, parse, path_in_manifest};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Manifest file, directory of .yaml, .yml and .json files, or - for stdin; may be repeated.
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
    /// What `inspect` says beside what is wanted.
    #[serde(default, rename = "status")]
    _status: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    name: String,
    #[serde(default, deserialize_with = "manifest::or_default")]
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
            let is_manifest =
                |path: &PathBuf| path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
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

/// The documents of a file, each with the number of lines before it.
fn documents(text: &str) -> Vec<(u64, String)> {
    // A mark of byte order, as some editors write it.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut documents = vec![(0, String::new())];
    for (i, line) in (0..).zip(text.lines()) {
        // What stands behind the dashes belongs to the document that they begin.
        let begins = if line.trim_end() == "---" {
            Some("")
        } else {
            line.strip_prefix("---").filter(|rest| rest.starts_with([' ', '\t']))
        };
        match (begins, documents.last_mut()) {
            (None, Some((_, document))) => {
                // An end without another beginning.
                if line.trim_end() != "..." {
                    document.push_str(line);
                }
                document.push('\n');
            }
            (rest, _) => documents.push((i, format!("{}\n", rest.unwrap_or_default()))),
        }
    }
    // A directive is about the document behind it.
    let says_nothing =
        |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#') || line.starts_with('%');
    documents.retain(|(_, document)| !document.lines().all(says_nothing));
    documents
}

/// What a document is about, and what is to be made so.
fn object(source: &Source) -> (String, Result<Object, Mistake>) {
    let document = match parse::<Document<IgnoredAny>>(source) {
        Ok(document) => document,
        Err(mistake) => return (String::new(), Err(mistake)),
    };
    let Document { api_version, kind, metadata, .. } = document;
    let which = format!("{} {}", kind.to_lowercase(), metadata.name);
    if !matches!(api_version.as_str(), "warren.io/v1" | "v1") {
        let why = format!("{api_version:?} is not warren.io/v1");
        return (which, Err(Mistake::new("apiVersion", why)));
    }
    let (name, labels) = (metadata.name, metadata.labels);
    let object = match kind.as_str() {
        "Service" => parse::<Document<ServiceSpec>>(source)
            .and_then(|document| Ok(Object::Service(Box::new(document.spec.into_proto(name, labels)?)))),
        "Secret" | "Config" => parse::<Document<SecretSpec>>(source).and_then(|document| {
            let kind = if kind == "Secret" { SecretKind::Secret } else { SecretKind::Config };
            let (data, request_id) = (document.spec.value()?, request_id());
            Ok(Object::Secret(v1::CreateSecretRequest { kind: kind.into(), name, labels, data, request_id }))
        }),
        "Volume" => {
            parse::<Document<VolumeSpec>>(source).map(|document| Object::Volume(document.spec.into_proto(name, labels)))
        }
        _ => Err(Mistake::new("kind", format!("{kind:?} is not known: Service, Secret, Config or Volume"))),
    };
    (which, object)
}

/// Mistakes as one error: all of them at once.
fn refuse(mistakes: &[String]) -> Result<(), Error> {
    match mistakes {
        [] => Ok(()),
        [one] => Err(Error::Usage(one.clone())),
        several => Err(Error::Usage(format!(
            "{} mistakes, and nothing was changed:\n  {}",
            several.len(),
            several.join("\n  ")
        ))),
    }
}

/// Asks the manager what it would refuse, before anything is made.
async fn validate(client: &ClientArguments, objects: &[(Source, Object)]) -> Result<(), Error> {
    let requests = objects.iter().map(|(_, object)| v1::ValidateObjectsRequest {
        object: Some(match object {
            Object::Service(spec) => v1::validate_objects_request::Object::Service(v1::ServiceSpec::clone(spec)),
            Object::Secret(request) => v1::validate_objects_request::Object::Secret(request.clone()),
            Object::Volume(request) => v1::validate_objects_request::Object::Volume(request.clone()),
        }),
    });
    let requests: Vec<_> = requests.collect();
    let answer = client.services().await?.validate_objects(tokio_stream::iter(requests)).await;
    let mut invalid = match answer {
        Ok(answer) => answer.into_inner().invalid,
        // A manager of an earlier version refuses them one by one.
        Err(status) if status.code() == Code::Unimplemented => return Ok(()),
        Err(status) => return Err(status.into()),
    };
    for (index, (_, object)) in (0..).zip(objects) {
        let differs = match object {
            Object::Volume(request) => match volume_named(client, &request.name).await? {
                Some(known) if !is_same_volume(&known, request) => Some(("driver_options", "options")),
                Some(known) if known.labels != request.labels => Some(("labels", "labels")),
                _ => None,
            },
            Object::Secret(request) => match secret_named(client, request.kind, &request.name).await? {
                Some(known) if known.labels != request.labels => Some(("labels", "labels")),
                _ => None,
            },
            Object::Service(_) => None,
        };
        if let Some((field, what)) = differs {
            let why = format!("is there with other {what}, which cannot be changed");
            invalid.push(v1::InvalidObject { index, field: field.to_owned(), why });
        }
    }
    let shown = invalid.into_iter().filter_map(|invalid| {
        let (source, object) = objects.get(invalid.index as usize)?;
        let path = path_in_manifest(&invalid.field, &invalid.why, object);
        Some(Mistake::new(path, invalid.why).shown(source, &object.name()))
    });
    refuse(&shown.collect::<Vec<_>>())
}

pub(crate) async fn run(arguments: Arguments, client: &ClientArguments) -> Result<(), Error> {
    let (mut objects, mut mistakes) = (Vec::new(), Vec::new());
    let mut names = BTreeSet::new();
    // All is read before anything is done: a mistake in the last document leaves the cluster as it was.
    for path in files(&arguments.file)? {
        for (lines_before, text) in documents(&read(&path)?) {
            let source = Source { file: path.clone(), lines_before, text };
            match object(&source) {
                (_, Ok(object)) if names.insert(object.name()) => objects.push((source, object)),
                (which, Ok(_)) => mistakes.push(Mistake::new("metadata.name", "is given twice").shown(&source, &which)),
                (which, Err(mistake)) => mistakes.push(mistake.shown(&source, &which)),
            }
        }
    }
    refuse(&mistakes)?;
    if objects.is_empty() {
        return Err(Error::Usage("nothing to apply: there is no document in what -f names".to_owned()));
    }
    // What services need comes before them.
    let order = |(_, object): &(Source, Object)| match object {
        Object::Secret(_) => 0,
        Object::Volume(_) => 1,
        Object::Service(_) => 2,
    };
    objects.sort_by_key(order);
    validate(client, &objects).await?;
    let mut services = Vec::new();
    for (_, object) in objects {
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

/// Whether nothing has this name. It may be the beginning of several ids.
fn is_unknown(status: &tonic::Status) -> bool {
    matches!(status.code(), Code::NotFound | Code::InvalidArgument)
}

/// A secret or config of exactly this name.
async fn secret_named(client: &ClientArguments, kind: i32, name: &str) -> Result<Option<v1::Secret>, Error> {
    let request = v1::GetSecretByNameRequest { kind, secret: name.to_owned() };
    match client.secrets().await?.get_secret_by_name(request).await {
        // What is found may be another whose id begins like this name.
        Ok(known) => Ok(known.into_inner().secret.filter(|known| known.name == name)),
        Err(status) if is_unknown(&status) => Ok(None),
        Err(status) => Err(status.into()),
    }
}

async fn apply_secret(client: &ClientArguments, request: v1::CreateSecretRequest) -> Result<(), Error> {
    let (kind, name) = (request.kind, request.name.clone());
    let word = kind_word(kind);
    let mut api = client.secrets().await?;
    if let Some(known) = secret_named(client, kind, &name).await? {
        let update = v1::UpdateSecretRequest { kind, secret: known.id, data: request.data, request_id: request_id() };
        let after = api.update_secret(update).await?.into_inner().secret.unwrap_or_default().sequence;
        say!("{word} {name} {}", if after == known.sequence { "unchanged" } else { "updated" });
    } else {
        api.create_secret(request).await?;
        say!("{word} {name} created");
    }
    Ok(())
}

/// A volume of exactly this name.
async fn volume_named(client: &ClientArguments, name: &str) -> Result<Option<v1::Volume>, Error> {
    let known =
        client.volumes().await?.get_volume_by_name(v1::GetVolumeByNameRequest { volume: name.to_owned() }).await;
    match known {
        // What is found may be another whose id begins like this name.
        Ok(known) => Ok(known.into_inner().volume.filter(|known| known.name == name)),
        Err(status) if is_unknown(&status) => Ok(None),
        Err(status) => Err(status.into()),
    }
}

fn is_same_volume(known: &v1::Volume, request: &v1::CreateVolumeRequest) -> bool {
    known.driver_options == request.driver_options && known.exclusive == request.exclusive
}

async fn apply_volume(client: &ClientArguments, request: v1::CreateVolumeRequest) -> Result<(), Error> {
    let name = request.name.clone();
    match volume_named(client, &name).await? {
        Some(known) if is_same_volume(&known, &request) => say!("volume {name} unchanged"),
        Some(_) => {
            return Err(Error::Usage(format!("volume {name}: is there with other options, which cannot be changed")));
        }
        None => {
            client.volumes().await?.create_volume(request).await?;
            say!("volume {name} created");
        }
    }
    Ok(())
}

async fn apply_service(client: &ClientArguments, spec: v1::ServiceSpec) -> Result<v1::Service, Error> {
    let name = spec.name.clone();
    let mut api = client.services().await?;
    let known = match service::get(client, &name).await {
        // Another one's id may begin like this name.
        Ok(known) => Some(known).filter(|known| known.spec.as_ref().is_some_and(|spec| spec.name == name)),
        Err(Error::Refused(status)) if is_unknown(&status) => None,
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
                ..Default::default()
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
        let texts = |text: &str| documents(text).iter().map(|(_, text)| text.trim().to_owned()).collect::<Vec<_>>();
        assert_eq!(texts("a: 1\n---\nb: 2\n"), ["a: 1", "b: 2"]);
        assert_eq!(texts("--- {a: 1}\n--- {b: 2}\n---\nc: 3"), ["{a: 1}", "{b: 2}", "c: 3"]);
        assert_eq!(texts("---\ta: 1\n...\n--- # only words\nb: 2"), ["a: 1", "# only words\nb: 2"]);
        assert_eq!(texts("a: |\n  --- inside\n  ----\n----x"), ["a: |\n  --- inside\n  ----\n----x"]);
        assert_eq!(texts("# nothing\n---\n\n--- \n"), Vec::<String>::new());
        assert_eq!(texts("\u{feff}# words\n---\na: 1"), ["a: 1"]);
        assert_eq!(texts("%YAML 1.1\n---\na: 1"), ["a: 1"]);
        // Where they are in the file is known.
        assert_eq!(documents("a: 1\n--- {b: 2}\n")[1].0, 1);
    }
}
