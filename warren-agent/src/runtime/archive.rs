//! Importing images from OCI archives: an OCI image layout in an uncompressed tar file.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use containerd_client::types::Descriptor;
use oci_spec::image as oci;

use warren_spec::ImageName;

use super::{Containerd, Error, image::descriptor};

/// Manifests and configurations larger than this are not read into memory.
const MAX_JSON: u64 = 4 << 20;

/// Where a file is in the archive.
#[derive(Clone, Copy)]
struct Entry {
    offset: u64,
    size: u64,
}

struct Archive {
    path: PathBuf,
    entries: HashMap<String, Entry>,
}

impl Archive {
    fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Io { action: "reading", path: path.to_owned(), source };
        let mut entries = HashMap::new();
        // Opening a pipe would wait for its writer, and it could not be read twice.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Err(Error::bad_image(path.display().to_string(), "it is no regular file"));
        }
        let mut archive = tar::Archive::new(File::open(path).map_err(failed)?);
        let listed: io::Result<()> = archive.entries_with_seek().and_then(|listing| {
            for entry in listing {
                let entry = entry?;
                let name = entry.path()?.to_string_lossy().trim_start_matches("./").to_owned();
                entries.insert(name, Entry { offset: entry.raw_file_position(), size: entry.size() });
            }
            Ok(())
        });
        // What the library says would quote the bytes.
        listed.map_err(|_| Error::bad_image(path.display().to_string(), "it is no uncompressed tar archive"))?;
        Ok(Self { path: path.to_owned(), entries })
    }

    fn bad(&self, why: impl ToString) -> Error {
        Error::bad_image(self.path.display().to_string(), why)
    }

    fn entry(&self, name: &str) -> Result<Entry, Error> {
        self.entries.get(name).copied().ok_or_else(|| self.bad(format!("{name} is missing")))
    }

    fn reader(&self, entry: Entry) -> Result<io::Take<File>, Error> {
        let failed = |source| Error::Io { action: "reading", path: self.path.clone(), source };
        let mut file = File::open(&self.path).map_err(failed)?;
        file.seek(SeekFrom::Start(entry.offset)).map_err(failed)?;
        Ok(file.take(entry.size))
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, Error> {
        let entry = self.entry(name)?;
        if entry.size > MAX_JSON {
            return Err(self.bad(format!("{name} is too large to be what it should be")));
        }
        let mut bytes = Vec::new();
        let read = self.reader(entry)?.read_to_end(&mut bytes);
        read.map_err(|source| Error::Io { action: "reading", path: self.path.clone(), source })?;
        Ok(bytes)
    }

    fn json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T, Error> {
        serde_json::from_slice(&self.read(name)?).map_err(|error| self.bad(format!("{name}: {error}")))
    }
}

fn blob_path(digest: &oci::Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.digest())
}

/// Imports the images of an archive and returns their names. `name` names the archive's only image; otherwise each has its
/// name in an annotation.
///
/// # Errors
///
/// When the archive is no OCI image layout, is incomplete, or holds bytes that do not match their digests.
pub async fn import(containerd: &Containerd, path: &Path, name: Option<&ImageName>) -> Result<Vec<String>, Error> {
    let path = path.to_owned();
    let opened = tokio::task::spawn_blocking(move || Archive::open(&path)).await;
    let archive = opened.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
    let index: oci::ImageIndex = archive.json("index.json")?;
    if name.is_some() && index.manifests().len() != 1 {
        return Err(archive.bad("it holds several images, so they cannot be given one name"));
    }
    let leased = containerd.with_lease().await?;
    let imported = import_all(&leased, &archive, &index, name).await;
    leased.end_lease().await;
    imported
}

async fn import_all(
    containerd: &Containerd,
    archive: &Archive,
    index: &oci::ImageIndex,
    name: Option<&ImageName>,
) -> Result<Vec<String>, Error> {
    let mut names = Vec::new();
    for target in index.manifests() {
        let full = match name {
            Some(name) => name.clone(),
            None => annotated_name(archive, target)?,
        };
        import_blob_tree(containerd, archive, target).await?;
        containerd.put_image(&full.to_string(), descriptor(target)).await?;
        names.push(full.to_string());
    }
    if names.is_empty() {
        return Err(archive.bad("it holds no image"));
    }
    Ok(names)
}

fn annotated_name(archive: &Archive, target: &oci::Descriptor) -> Result<ImageName, Error> {
    let annotations = target.annotations().as_ref();
    let annotated = annotations.and_then(|annotations| {
        let full = annotations.get("io.containerd.image.name");
        full.or_else(|| annotations.get("org.opencontainers.image.ref.name"))
    });
    let annotated = annotated.ok_or_else(|| archive.bad("its image has no name: give it one"))?;
    annotated.parse().map_err(|error| archive.bad(error))
}

/// Imports a manifest with its configuration and layers, or an index with its manifests. Children first: a parent's labels
/// keep them.
async fn import_blob_tree(containerd: &Containerd, archive: &Archive, target: &oci::Descriptor) -> Result<(), Error> {
    let blob = archive.read(&blob_path(target.digest()))?;
    let mut labels = HashMap::new();
    let is_index = *target.media_type() == oci::MediaType::ImageIndex;
    if is_index {
        let index: oci::ImageIndex = serde_json::from_slice(&blob).map_err(|error| archive.bad(error))?;
        for (i, manifest) in index.manifests().iter().enumerate() {
            // Archives often hold one platform of an image that names several.
            if archive.entries.contains_key(&blob_path(manifest.digest())) {
                Box::pin(import_blob_tree(containerd, archive, manifest)).await?;
                labels.insert(format!("containerd.io/gc.ref.content.m.{i}"), manifest.digest().to_string());
            }
        }
    } else {
        let manifest: oci::ImageManifest = serde_json::from_slice(&blob).map_err(|error| archive.bad(error))?;
        for (i, layer) in manifest.layers().iter().enumerate() {
            import_blob(containerd, archive, &descriptor(layer), layer.digest()).await?;
            labels.insert(format!("containerd.io/gc.ref.content.l.{i}"), layer.digest().to_string());
        }
        let config = manifest.config();
        import_blob(containerd, archive, &descriptor(config), config.digest()).await?;
        labels.insert("containerd.io/gc.ref.content.config".to_owned(), config.digest().to_string());
    }
    let size = blob.len() as u64;
    containerd.write_blob(target.digest().as_ref(), size, labels, io::Cursor::new(blob)).await
}

async fn import_blob(
    containerd: &Containerd,
    archive: &Archive,
    blob: &Descriptor,
    digest: &oci::Digest,
) -> Result<(), Error> {
    let entry = archive.entry(&blob_path(digest))?;
    if entry.size != blob.size as u64 {
        return Err(archive.bad(format!("{} has {} bytes instead of {}", blob.digest, entry.size, blob.size)));
    }
    containerd.write_blob(&blob.digest, entry.size, HashMap::new(), archive.reader(entry)?).await
}
