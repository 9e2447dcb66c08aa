//! Images: their names, their manifests, and their layers as snapshots.

use std::{collections::HashMap, fmt, str::FromStr};

use containerd_client::{
    services::v1::{self as api, snapshots as snap},
    tonic::Code,
    types::Descriptor,
};
use oci_spec::image as oci;
use sha2::{Digest as _, Sha256};

use super::{Containerd, Error};

/// The snapshotter that every containerd has.
pub(super) const SNAPSHOTTER: &str = "overlayfs";
const DEFAULT_REGISTRY: &str = "docker.io";

/// An image's full name: registry, repository, and tag or digest. `nginx` is `docker.io/library/nginx:latest`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ImageName(String);

/// A string that names no image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not an image's name: {why}")]
pub struct InvalidImageName {
    name: String,
    why: &'static str,
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ImageName {
    type Err = InvalidImageName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let invalid = |why| InvalidImageName { name: name.to_owned(), why };
        if name.is_empty() {
            return Err(invalid("it is empty"));
        }
        if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/:@".contains(&b)) {
            return Err(invalid("it holds characters that no image name does"));
        }
        let (rest, digest) = match name.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (name, None),
        };
        if digest.is_some_and(|digest| digest.parse::<oci::Digest>().is_err()) {
            return Err(invalid("what follows @ is no digest"));
        }
        // A first component is a registry if it could be a host's name; anything else is a repository of Docker Hub.
        let (registry, path) = match rest.split_once('/') {
            Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => (first, path.to_owned()),
            Some(_) => (DEFAULT_REGISTRY, rest.to_owned()),
            None => (DEFAULT_REGISTRY, format!("library/{rest}")),
        };
        let (repository, tag) = match path.rsplit_once(':') {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (path.as_str(), None),
        };
        let well_formed = |component: &str| {
            !component.is_empty()
                && component.starts_with(|c: char| c.is_ascii_alphanumeric())
                && !component.bytes().any(|b| b.is_ascii_uppercase() || b == b':')
        };
        // A host and a port; what is not checked here, resolving the host will be.
        if !registry.starts_with(|c: char| c.is_ascii_alphanumeric()) || registry.matches(':').count() > 1 {
            return Err(invalid("what stands before the first slash is no registry"));
        }
        if !repository.split('/').all(well_formed) {
            return Err(invalid("its repository must be lower-case words between slashes"));
        }
        if tag.is_some_and(|tag| tag.is_empty() || tag.len() > 128 || tag.contains('/')) {
            return Err(invalid("its tag is empty or too long"));
        }
        let suffix = match (tag, digest) {
            (_, Some(digest)) => format!("@{digest}"),
            (Some(tag), None) => format!(":{tag}"),
            (None, None) => ":latest".to_owned(),
        };
        Ok(Self(format!("{registry}/{repository}{suffix}")))
    }
}

/// An image that is on this node, for this machine.
#[derive(Clone, Debug)]
pub struct LocalImage {
    /// Its full name.
    pub name: String,
    /// How to run it.
    pub config: oci::Config,
    manifest_digest: String,
    config_digest: String,
    layers: Vec<Descriptor>,
    diff_ids: Vec<String>,
}

impl LocalImage {
    /// The manifest's digest.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.manifest_digest
    }
}

impl Containerd {
    /// Finds an image on this node.
    ///
    /// # Errors
    ///
    /// When there is none of this name, or none for this machine, or what is there is incomplete.
    pub async fn image(&self, name: &ImageName) -> Result<LocalImage, Error> {
        let name = name.to_string();
        let request = self.request(api::GetImageRequest { name: name.clone() });
        let image = match self.client().images().get(request).await {
            Ok(answer) => answer.into_inner().image,
            Err(status) if status.code() == Code::NotFound => None,
            Err(status) => return Err(Error::call("looking for an image")(status)),
        };
        let Some(target) = image.and_then(|image| image.target) else { return Err(Error::NoSuchImage(name)) };
        let (manifest_digest, manifest) = self.manifest_for_this_machine(&name, &target).await?;
        let config_digest = manifest.config().digest().to_string();
        let config: oci::ImageConfiguration = self.read_json(&name, &config_digest).await?;
        let diff_ids = config.rootfs().diff_ids().clone();
        if diff_ids.len() != manifest.layers().len() {
            return Err(Error::bad_image(name, "its manifest and its configuration differ in their layers"));
        }
        Ok(LocalImage {
            name,
            config: config.config().clone().unwrap_or_default(),
            manifest_digest,
            config_digest,
            layers: manifest.layers().iter().map(descriptor).collect(),
            diff_ids,
        })
    }

    async fn read_json<T: serde::de::DeserializeOwned>(&self, image: &str, digest: &str) -> Result<T, Error> {
        let blob = match self.read_blob(digest).await {
            Err(error) if error.is_not_found() => {
                return Err(Error::bad_image(image, format!("{digest} is missing")));
            }
            other => other?,
        };
        serde_json::from_slice(&blob).map_err(|error| Error::bad_image(image, format!("{digest}: {error}")))
    }

    async fn manifest_for_this_machine(
        &self,
        image: &str,
        target: &Descriptor,
    ) -> Result<(String, oci::ImageManifest), Error> {
        let is_index = target.media_type.contains("index") || target.media_type.contains("manifest.list");
        let digest = if is_index {
            let index: oci::ImageIndex = self.read_json(image, &target.digest).await?;
            let machine = machine();
            let fits = |descriptor: &&oci::Descriptor| {
                descriptor
                    .platform()
                    .as_ref()
                    .is_none_or(|platform| *platform.architecture() == machine && *platform.os() == oci::Os::Linux)
            };
            let Some(found) = index.manifests().iter().find(fits) else {
                return Err(Error::bad_image(image, format!("it has nothing for linux/{machine}")));
            };
            found.digest().to_string()
        } else {
            target.digest.clone()
        };
        let manifest = self.read_json(image, &digest).await?;
        Ok((digest, manifest))
    }

    /// Names an image; a name that is taken moves.
    pub(super) async fn put_image(&self, name: &str, target: Descriptor) -> Result<(), Error> {
        let image = api::Image { name: name.to_owned(), target: Some(target), ..Default::default() };
        let create = self.request(api::CreateImageRequest { image: Some(image.clone()), ..Default::default() });
        match self.client().images().create(create).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {
                let update = self.request(api::UpdateImageRequest {
                    image: Some(image),
                    update_mask: Some(prost_types::FieldMask { paths: vec!["target".to_owned()] }),
                    ..Default::default()
                });
                self.client().images().update(update).await.map_err(Error::call("renaming an image"))?;
                Ok(())
            }
            Err(status) => Err(Error::call("naming an image")(status)),
        }
    }

    /// Makes the image's layers snapshots, unless they are, and returns the topmost's key. To be called under a lease.
    pub(super) async fn unpack(&self, image: &LocalImage) -> Result<String, Error> {
        let mut parent = String::new();
        let mut unpacked = false;
        for (layer, diff_id) in image.layers.iter().zip(&image.diff_ids) {
            let chain = chain_id(&parent, diff_id);
            if !self.has_snapshot(&chain).await? {
                self.unpack_layer(image, layer, diff_id, &parent, &chain).await?;
                unpacked = true;
            }
            parent = chain;
        }
        if unpacked {
            let label = format!("containerd.io/gc.ref.snapshot.{SNAPSHOTTER}");
            self.label_blob(&image.config_digest, HashMap::from([(label, parent.clone())])).await?;
        }
        Ok(parent)
    }

    async fn has_snapshot(&self, key: &str) -> Result<bool, Error> {
        let request =
            self.request(snap::StatSnapshotRequest { snapshotter: SNAPSHOTTER.to_owned(), key: key.to_owned() });
        match self.client().snapshots().stat(request).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(Error::call("looking for a snapshot")(status)),
        }
    }

    async fn unpack_layer(
        &self,
        image: &LocalImage,
        layer: &Descriptor,
        diff_id: &str,
        parent: &str,
        chain: &str,
    ) -> Result<(), Error> {
        let key = format!("extract-{:016x} {chain}", rand::random::<u64>());
        let prepare = self.request(snap::PrepareSnapshotRequest {
            snapshotter: SNAPSHOTTER.to_owned(),
            key: key.clone(),
            parent: parent.to_owned(),
            ..Default::default()
        });
        let prepared =
            self.client().snapshots().prepare(prepare).await.map_err(Error::call("preparing a layer's snapshot"))?;
        let apply = self.unlimited_request(api::ApplyRequest {
            diff: Some(layer.clone()),
            mounts: prepared.into_inner().mounts,
            ..Default::default()
        });
        let applied = self.client().diff().apply(apply).await.map_err(Error::call("unpacking a layer"));
        let result = match applied {
            Ok(answer) => {
                let unpacked = answer.into_inner().applied.unwrap_or_default().digest;
                if unpacked == diff_id {
                    let commit = self.request(snap::CommitSnapshotRequest {
                        snapshotter: SNAPSHOTTER.to_owned(),
                        name: chain.to_owned(),
                        key: key.clone(),
                        ..Default::default()
                    });
                    match self.client().snapshots().commit(commit).await {
                        Ok(_) => return Ok(()),
                        // Another container's unpacking was faster.
                        Err(status) if status.code() == Code::AlreadyExists => Ok(()),
                        Err(status) => Err(Error::call("committing a layer's snapshot")(status)),
                    }
                } else {
                    Err(Error::bad_image(&image.name, format!("a layer unpacks to {unpacked} instead of {diff_id}")))
                }
            }
            Err(error) => Err(error),
        };
        self.remove_snapshot(&key).await?;
        result
    }

    /// Removes a snapshot; one that is not there is what is wanted.
    pub(super) async fn remove_snapshot(&self, key: &str) -> Result<(), Error> {
        let request =
            self.request(snap::RemoveSnapshotRequest { snapshotter: SNAPSHOTTER.to_owned(), key: key.to_owned() });
        match self.client().snapshots().remove(request).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(Error::call("removing a snapshot")(status)),
        }
    }
}

/// This machine's architecture as images name it.
fn machine() -> oci::Arch {
    match std::env::consts::ARCH {
        "x86_64" => oci::Arch::Amd64,
        "aarch64" => oci::Arch::ARM64,
        other => oci::Arch::Other(other.to_owned()),
    }
}

/// The name of a stack of layers (image-spec, "ChainID").
fn chain_id(parent: &str, diff_id: &str) -> String {
    if parent.is_empty() {
        return diff_id.to_owned();
    }
    let digest = Sha256::digest(format!("{parent} {diff_id}"));
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

pub(super) fn descriptor(from: &oci::Descriptor) -> Descriptor {
    Descriptor {
        media_type: from.media_type().to_string(),
        digest: from.digest().to_string(),
        size: from.size() as i64,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_completed() {
        for (short, full) in [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:1.27", "docker.io/library/nginx:1.27"),
            ("grafana/grafana", "docker.io/grafana/grafana:latest"),
            ("ghcr.io/a/b:v1", "ghcr.io/a/b:v1"),
            ("localhost/demo", "localhost/demo:latest"),
            ("localhost:5000/demo:x", "localhost:5000/demo:x"),
        ] {
            assert_eq!(short.parse::<ImageName>().map(|name| name.to_string()), Ok(full.to_owned()));
        }
        let digest = format!("sha256:{}", "ab".repeat(32));
        let name: ImageName = format!("nginx:1@{digest}").parse().expect("a name");
        assert_eq!(name.to_string(), format!("docker.io/library/nginx@{digest}"));
    }

    #[test]
    fn nonsense_is_no_name() {
        for name in ["", "UPPER", "a b", "nginx:", "a//b", "nginx@sha256:12", "/nginx", "a:b:c", "../etc"] {
            assert!(name.parse::<ImageName>().is_err(), "{name:?}");
        }
    }

    #[test]
    fn chains_are_named_as_the_specification_says() {
        assert_eq!(chain_id("", "sha256:a"), "sha256:a");
        // sha256 of "sha256:a sha256:b"
        assert_eq!(chain_id("sha256:a", "sha256:b").len(), "sha256:".len() + 64);
        assert_ne!(chain_id("sha256:a", "sha256:b"), chain_id("sha256:b", "sha256:a"));
    }
}
