//! Pulling images: from a registry into containerd's content store, each blob once.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use containerd_client::types::Descriptor;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use oci_spec::image as oci;
use warren_registry::{Credentials, Manifest, Registries, Repository};
use warren_spec::ImageName;

use super::{Containerd, Error, image};

/// Layers that come at once.
const PARALLEL: usize = 3;

/// How far a pull is, in bytes. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<[AtomicU64; 2]>);

impl Progress {
    /// Bytes that have come, and all that are to come; both zero until that is known.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        (self.0[0].load(Ordering::Relaxed), self.0[1].load(Ordering::Relaxed))
    }

    fn arrived(&self, bytes: u64) {
        self.0[0].fetch_add(bytes, Ordering::Relaxed);
    }

    fn expect(&self, bytes: u64) {
        self.0[1].fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Pulls an image for this machine and names it here.
///
/// # Errors
///
/// When no registry has it for this machine, or what comes is not what its digest says.
pub async fn pull(
    containerd: &Containerd,
    registries: &Registries,
    name: &ImageName,
    credentials: &Credentials,
    progress: &Progress,
) -> Result<(), Error> {
    let (repository, manifest) = registries.find(name, credentials).await?;
    // Nothing that has come is collected as garbage before the image's name keeps it.
    let leased = containerd.with_lease().await?;
    let puller = Puller { containerd: &leased, repository: &repository, name, progress };
    let pulled = puller.pull(&manifest).await;
    leased.end_lease().await;
    pulled
}

struct Puller<'a> {
    containerd: &'a Containerd,
    repository: &'a Repository,
    name: &'a ImageName,
    progress: &'a Progress,
}

impl Puller<'_> {
    fn bad(&self, why: impl ToString) -> Error {
        Error::bad_image(self.name.to_string(), why)
    }

    async fn pull(&self, target: &Manifest) -> Result<(), Error> {
        let name = self.name.to_string();
        if image::is_index(&target.media_type) {
            let index: oci::ImageIndex = serde_json::from_slice(&target.bytes).map_err(|error| self.bad(error))?;
            let (i, chosen) = image::for_this_machine(&name, &index)?;
            let manifest = self.repository.manifest_at(chosen.digest().as_ref()).await?;
            self.pull_manifest(&manifest).await?;
            let labels = HashMap::from([(format!("containerd.io/gc.ref.content.m.{i}"), manifest.digest)]);
            self.write(target, labels).await?;
        } else {
            self.pull_manifest(target).await?;
        }
        let descriptor = Descriptor {
            media_type: target.media_type.clone(),
            digest: target.digest.clone(),
            size: target.bytes.len() as i64,
            ..Default::default()
        };
        self.containerd.put_image(&name, descriptor).await
    }

    async fn pull_manifest(&self, source: &Manifest) -> Result<(), Error> {
        let manifest: oci::ImageManifest = serde_json::from_slice(&source.bytes).map_err(|error| self.bad(error))?;
        let config = manifest.config();
        self.pull_blob(config).await?;
        // Before its layers, which may be large: what is for another machine is of no use here.
        let bytes = self.containerd.read_blob(config.digest().as_ref()).await?;
        let configuration: oci::ImageConfiguration = serde_json::from_slice(&bytes).map_err(|error| self.bad(error))?;
        image::check_platform(&self.name.to_string(), &configuration)?;
        self.progress.expect(manifest.layers().iter().map(oci::Descriptor::size).sum());
        let layers = manifest.layers().clone().into_iter().map(|layer| async move { self.pull_blob(&layer).await });
        stream::iter(layers).buffer_unordered(PARALLEL).try_collect::<()>().await?;
        let mut labels: HashMap<_, _> = manifest
            .layers()
            .iter()
            .enumerate()
            .map(|(i, layer)| (format!("containerd.io/gc.ref.content.l.{i}"), layer.digest().to_string()))
            .collect();
        labels.insert("containerd.io/gc.ref.content.config".to_owned(), config.digest().to_string());
        self.write(source, labels).await
    }

    async fn write(&self, manifest: &Manifest, labels: HashMap<String, String>) -> Result<(), Error> {
        let bytes = manifest.bytes.clone();
        self.containerd.write_blob(&manifest.digest, bytes.len() as u64, labels, io::Cursor::new(bytes)).await
    }

    async fn pull_blob(&self, blob: &oci::Descriptor) -> Result<(), Error> {
        let (digest, size) = (blob.digest().to_string(), blob.size());
        if self.containerd.has_blob(&digest).await? {
            self.progress.arrived(size);
            return Ok(());
        }
        let body = self.repository.blob(&digest, size).await?;
        let progress = self.progress.clone();
        let written = self.containerd.write_stream(&digest, size, body, move |bytes| progress.arrived(bytes)).await?;
        written.map_err(|error| Error::Registry(self.repository.broken(&digest, &error)))
    }
}
