//! `warren apply`: makes the cluster what files say. A key that is not known is an error, with its path: what was misspelt is
//! never left out in silence.

use std::{
    collections::BTreeSet,
    io::Read as _,
    path::{Path, PathBuf},
};

use clap::Args;
use tonic::Code;
use warren_manifest::{Invalid, Object, Source, documents, kind_word, object, path_in_manifest};
use warren_proto::v1;

use crate::{
    client::ClientArguments,
    error::Error,
    objects::{request_id, service},
    output::say,
    wait::{self, WaitArguments},
};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Manifest file, directory of .yaml, .yml and .json files, or - for stdin; may be repeated.
    #[arg(long, short, required = true, value_name = "FILE|DIR|-")]
    file: Vec<PathBuf>,
    #[command(flatten)]
    wait: WaitArguments,
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

/// What is wrong with all documents, as one error.
fn refuse(invalid: &[String]) -> Result<(), Error> {
    match invalid {
        [] => Ok(()),
        [one] => Err(Error::Usage(one.clone())),
        several => {
            Err(Error::Usage(format!("{} errors; nothing was changed:\n  {}", several.len(), several.join("\n  "))))
        }
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
        Some(Invalid::new(path, invalid.why).shown(source, &object.name()))
    });
    refuse(&shown.collect::<Vec<_>>())
}

pub(crate) async fn run(arguments: Arguments, client: &ClientArguments) -> Result<(), Error> {
    let (mut objects, mut errors) = (Vec::new(), Vec::new());
    let mut names = BTreeSet::new();
    // All is read before anything is done: an error in the last document leaves the cluster as it was.
    for path in files(&arguments.file)? {
        for (lines_before, text) in documents(&read(&path)?) {
            let source = Source { file: path.clone(), lines_before, text };
            match object(&source) {
                (_, Ok(object)) if names.insert(object.name()) => objects.push((source, object)),
                (which, Ok(_)) => errors.push(Invalid::new("metadata.name", "is given twice").shown(&source, &which)),
                (which, Err(invalid)) => errors.push(invalid.shown(&source, &which)),
            }
        }
    }
    refuse(&errors)?;
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
        api.create_secret(v1::CreateSecretRequest { request_id: request_id(), ..request }).await?;
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
            let request = v1::CreateVolumeRequest { request_id: request_id(), ..request };
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
