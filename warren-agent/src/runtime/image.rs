//! Images: their manifests, and their layers as snapshots.

use std::{
    collections::HashMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use bytes::Bytes;
use containerd_client::{
    services::v1::{self as api, snapshots as snap},
    tonic::Code,
    types::Descriptor,
};
use oci_spec::image as oci;
use sha2::{Digest as _, Sha256};
use warren_spec::ImageName;

use super::{
    Containerd, Error,
    manifest::{self, Chosen, Entry, Source},
};
use crate::conditions;

/// Between looks at how large a layer has become.
const LOOK: Duration = Duration::from_secs(1);

/// Where images are kept, and whether there is room.
pub(super) struct Room(Vec<PathBuf>);

impl Room {
    pub(super) async fn of(containerd: &Containerd) -> Self {
        Self(containerd.directories().await)
    }

    /// Nothing wrong with the file systems.
    ///
    /// # Errors
    ///
    /// When one is all but full. A disk that does not answer is for others to notice.
    pub(super) async fn check(&self) -> Result<(), Error> {
        conditions::disk_trouble(self.0.clone()).await.map_or(Ok(()), |why| Err(Error::NoRoom(why)))
    }
}

/// The snapshotter that every containerd has.
pub(super) const SNAPSHOTTER: &str = "overlayfs";

/// An image that is on this node, for this machine.
#[derive(Clone, Debug)]
pub struct LocalImage {
    /// Its full name.
    pub name: String,
    /// How to run it.
    pub config: oci::Config,
    target_digest: String,
    manifest_digest: String,
    config_digest: String,
    layers: Vec<Descriptor>,
    diff_ids: Vec<String>,
}

impl LocalImage {
    /// The digest that its name stands for: a manifest's, or an index's.
    #[must_use]
    pub fn target(&self) -> &str {
        &self.target_digest
    }

    /// The manifest's digest.
    #[must_use]
    pub fn digest(&self) -> &str {
        &self.manifest_digest
    }
}

impl Source for Containerd {
    async fn manifest(&self, entry: &Entry) -> Result<Option<Bytes>, Error> {
        Ok(self.read_blob(&entry.digest).await?.map(Bytes::from))
    }

    async fn configuration(&self, entry: &Entry) -> Result<Option<Bytes>, Error> {
        self.manifest(entry).await
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
        let target_digest = target.digest.clone();
        let target = Entry::new(target.media_type, target.digest, target.size.unsigned_abs());
        let Chosen { path, manifest, mut configuration } = manifest::choose(self, &name, target).await?;
        let diff_ids = configuration.diff_ids();
        if diff_ids.len() != manifest.layers.len() {
            return Err(Error::bad_image(name, "its manifest and its configuration differ in their layers"));
        }
        Ok(LocalImage {
            name,
            config: configuration.config.unwrap_or_default(),
            manifest_digest: path.last().map_or_else(|| target_digest.clone(), |last| last.entry.digest.clone()),
            target_digest,
            config_digest: manifest.config.digest,
            layers: manifest.layers.iter().map(Entry::descriptor).collect(),
            diff_ids,
        })
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

    /// The first of the image's layers that is needed, because it is not unpacked, and not there whole.
    pub(super) async fn damaged_layer(&self, image: &LocalImage) -> Result<Option<String>, Error> {
        let mut parent = String::new();
        let mut unpacked = true;
        for (layer, diff_id) in image.layers.iter().zip(&image.diff_ids) {
            parent = chain_id(&parent, diff_id);
            unpacked = unpacked && self.has_snapshot(&parent).await?;
            if !unpacked && !self.is_whole(&layer.digest, layer.size.unsigned_abs()).await? {
                return Ok(Some(layer.digest.clone()));
            }
        }
        Ok(None)
    }

    /// Makes the image's layers snapshots, unless they are, and returns the topmost's key. To be called under a lease.
    pub(super) async fn unpack(&self, image: &LocalImage) -> Result<String, Error> {
        let mut parent = String::new();
        let mut unpacked = false;
        // What its layers may still take.
        let mut left = self.max_image();
        for (layer, diff_id) in image.layers.iter().zip(&image.diff_ids) {
            let chain = chain_id(&parent, diff_id);
            if !self.has_snapshot(&chain).await? {
                let slot = self.unpacking().slot(&chain);
                let _turn = slot.turn.lock().await;
                // Whoever had the turn before may have done it.
                if !self.has_snapshot(&chain).await? {
                    self.unpack_layer(image, layer, diff_id, (&parent, &chain), left).await?;
                }
                unpacked = true;
            }
            if left < u64::MAX {
                let taken = self.usage(&chain).await?;
                left = left.checked_sub(taken).ok_or_else(|| Error::image_too_large(&image.name, self.max_image()))?;
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
        (parent, chain): (&str, &str),
        left: u64,
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
        let mut client = self.client().diff();
        let applied = tokio::select! {
            applied = client.apply(apply) => applied.map_err(Error::call("unpacking a layer")),
            why = self.outgrown(image, &key, left) => Err(why),
        };
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
                        // Another process's unpacking was faster.
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

    /// Why a layer that is being unpacked must not grow any further, once it is so: a few megabytes may become terabytes.
    async fn outgrown(&self, image: &LocalImage, key: &str, left: u64) -> Error {
        let room = Room::of(self).await;
        let mut pause = LOOK;
        loop {
            tokio::time::sleep(pause).await;
            let began = Instant::now();
            if let Err(why) = room.check().await {
                return why;
            }
            // The daemon walks through all files of it.
            match self.usage(key).await {
                Ok(taken) if taken > left => return Error::image_too_large(&image.name, self.max_image()),
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, "how large a layer has become is not known"),
            }
            pause = LOOK.max(began.elapsed() * 10);
        }
    }

    /// Bytes that a snapshot takes without its parents.
    async fn usage(&self, key: &str) -> Result<u64, Error> {
        let request = self.request(snap::UsageRequest { snapshotter: SNAPSHOTTER.to_owned(), key: key.to_owned() });
        let usage = self.client().snapshots().usage(request).await.map_err(Error::call("measuring a layer"))?;
        Ok(usage.into_inner().size.unsigned_abs())
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

/// The name of a stack of layers (image-spec, "ChainID").
fn chain_id(parent: &str, diff_id: &str) -> String {
    if parent.is_empty() {
        return diff_id.to_owned();
    }
    let digest = Sha256::digest(format!("{parent} {diff_id}"));
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_are_named_as_the_specification_says() {
        assert_eq!(chain_id("", "sha256:a"), "sha256:a");
        // sha256 of "sha256:a sha256:b"
        let both = "sha256:970a948bffa8de94d6e22d747ba8c95030e6e546909f98f54e99a13005e173a8";
        assert_eq!(chain_id("sha256:a", "sha256:b"), both);
    }
}
