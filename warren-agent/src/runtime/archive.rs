//! Importing images from OCI archives: an OCI image layout in an uncompressed tar file.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use warren_spec::ImageName;

use super::{
    Containerd, Error,
    manifest::{self, Document, Source},
};

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
}

fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

impl Source for Archive {
    async fn manifest(&self, entry: &manifest::Entry) -> Result<Option<Bytes>, Error> {
        // Archives often hold one platform of an image that names several.
        let path = blob_path(&entry.digest);
        if self.entries.contains_key(&path) { Ok(Some(self.read(&path)?.into())) } else { Ok(None) }
    }

    async fn configuration(&self, entry: &manifest::Entry) -> Result<Option<Bytes>, Error> {
        self.manifest(entry).await
    }
}

/// Imports the images of an archive and returns their names. `name` names the archive's only image; otherwise each has its
/// name in an annotation.
///
/// # Errors
///
/// When the archive is no OCI image layout, is incomplete, holds bytes that do not match their digests, or nothing that this machine
/// can run.
pub async fn import(containerd: &Containerd, path: &Path, name: Option<&ImageName>) -> Result<Vec<String>, Error> {
    let path = path.to_owned();
    let opened = tokio::task::spawn_blocking(move || Archive::open(&path)).await;
    let archive = opened.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
    if archive.entries.contains_key("manifest.json") && !archive.entries.contains_key("index.json") {
        let why = "it is an archive in Docker's old format; save it as an OCI archive, for example with \
                   `skopeo copy docker-archive:FILE oci-archive:OTHER`";
        return Err(archive.bad(why));
    }
    let bytes = archive.read("index.json")?;
    let Ok(Document::Index(targets)) = Document::parse(&bytes) else {
        return Err(archive.bad("its index.json lists no manifests"));
    };
    let leased = containerd.with_lease().await?;
    let imported = import_all(&leased, &archive, &targets, name).await;
    leased.end_lease().await;
    imported
}

async fn import_all(
    containerd: &Containerd,
    archive: &Archive,
    targets: &[manifest::Entry],
    name: Option<&ImageName>,
) -> Result<Vec<String>, Error> {
    let mut images = Vec::new();
    let mut unusable = None;
    for target in targets {
        // What cannot be run here is said now, and not once a container is to run. Signatures and the like may lie beside images.
        match manifest::choose(archive, &archive.path.display().to_string(), target.clone()).await {
            Ok(chosen) => {
                let path: Vec<_> = chosen.path.into_iter().map(|passed| passed.entry.digest).collect();
                images.push((target, path));
            }
            Err(error) => unusable = Some(error),
        }
    }
    if images.is_empty() {
        return Err(unusable.unwrap_or_else(|| archive.bad("it holds no image")));
    }
    if name.is_some() && images.len() != 1 {
        return Err(archive.bad("it holds several images, so they cannot be given one name"));
    }
    let named = images.into_iter().map(|target| match name {
        Some(name) => Ok((name.clone(), target)),
        None => annotated_name(archive, target.0).map(|name| (name, target)),
    });
    let named: Vec<_> = named.collect::<Result<_, Error>>()?;
    let mut names = Vec::new();
    for (full, (target, wanted)) in named {
        import_blob_tree(containerd, archive, target, &wanted, 0).await?;
        let mut descriptor = target.descriptor();
        if descriptor.media_type.is_empty() {
            let document = Document::parse(&archive.read(&blob_path(&target.digest))?);
            descriptor.media_type = document.map_err(|why| archive.bad(why))?.media_type().to_owned();
        }
        containerd.put_image(&full.to_string(), descriptor).await?;
        names.push(full.to_string());
    }
    Ok(names)
}

fn annotated_name(archive: &Archive, target: &manifest::Entry) -> Result<ImageName, Error> {
    let annotated = target.annotations.as_ref().and_then(|annotations| {
        let full = annotations.get("io.containerd.image.name");
        full.or_else(|| annotations.get("org.opencontainers.image.ref.name"))
    });
    let annotated = annotated.ok_or_else(|| archive.bad("its image has no name: give it one with --name"))?;
    // OCI has a tag alone there, as skopeo and buildah write it.
    if !annotated.contains(['/', ':']) {
        return Err(
            archive.bad(format!("its image has no name but only the tag {annotated:?}: give it one with --name"))
        );
    }
    annotated.parse().map_err(|error| archive.bad(error))
}

/// Indexes in indexes that an archive is followed into.
const MAX_DEPTH: usize = 8;

/// Imports a manifest with its configuration and layers, or an index with its manifests. Children first: a parent's labels
/// keep them.
async fn import_blob_tree(
    containerd: &Containerd,
    archive: &Archive,
    target: &manifest::Entry,
    wanted: &[String],
    depth: usize,
) -> Result<(), Error> {
    let blob = archive.read(&blob_path(&target.digest))?;
    let mut labels = HashMap::new();
    match Document::parse(&blob).map_err(|why| archive.bad(why))? {
        Document::Index(_) if depth >= MAX_DEPTH => return Err(archive.bad("its indexes are nested too deep")),
        Document::Index(manifests) => {
            for (i, manifest) in manifests.iter().enumerate() {
                // Archives often hold one platform of an image that names several.
                if archive.entries.contains_key(&blob_path(&manifest.digest)) {
                    Box::pin(import_blob_tree(containerd, archive, manifest, wanted, depth + 1)).await?;
                    labels.insert(manifest::label(&format!("m.{i}")), manifest.digest.clone());
                }
            }
        }
        Document::Manifest(manifest) => {
            for blob in manifest.layers.iter().chain([&manifest.config]) {
                // Of other platforms' images, archives often hold the manifest alone.
                if wanted.contains(&target.digest) || archive.entries.contains_key(&blob_path(&blob.digest)) {
                    import_blob(containerd, archive, blob).await?;
                }
            }
            labels = manifest.labels();
        }
    }
    let size = blob.len() as u64;
    containerd.write_blob(&target.digest, size, labels, io::Cursor::new(blob)).await
}

async fn import_blob(containerd: &Containerd, archive: &Archive, blob: &manifest::Entry) -> Result<(), Error> {
    let entry = archive.entry(&blob_path(&blob.digest))?;
    if entry.size != blob.size {
        return Err(archive.bad(format!("{} has {} bytes instead of {}", blob.digest, entry.size, blob.size)));
    }
    containerd.write_blob(&blob.digest, entry.size, HashMap::new(), archive.reader(entry)?).await
}
