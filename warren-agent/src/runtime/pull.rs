//! Pulling images: from a registry into containerd's content store, each blob once, whichever images need it. What has come of a
//! blob when its transfer is interrupted is not asked for again.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio_util::sync::CancellationToken;
use warren_registry::{Blob, Credentials, Manifest, Registries, Repository};
use warren_spec::ImageName;

use super::{
    Containerd, Error,
    content::{CHUNK, Ingest},
    image::Room,
    manifest::{self, Entry, Passed, Source},
};

/// Layers of an image that come at once.
const PARALLEL: usize = 3;
/// How often a transfer looks whether bytes come at all.
const LOOK: Duration = Duration::from_secs(1);
/// A transfer that brings less than [`SLOW`] bytes in this time lets others go first that have another registry to ask.
const SLOW_FOR: Duration = Duration::from_secs(5);
const SLOW: u64 = 64 << 10;
/// Interruptions in a row, without a byte between them, after which a transfer fails.
const INTERRUPTIONS: u32 = 3;
/// Before a transfer that was interrupted goes on.
const RETRY: Duration = Duration::from_secs(1);

/// How far a pull is, in bytes. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<[AtomicU64; 2]>);

impl Progress {
    /// Bytes that have come, and all that are to come; both zero until that is known.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        (self.0[0].load(Ordering::Relaxed), self.0[1].load(Ordering::Relaxed))
    }

    fn expect(&self, bytes: u64) {
        self.0[1].fetch_add(bytes, Ordering::Relaxed);
    }
}

/// One blob's part of a pull's progress.
struct Part<'a> {
    progress: &'a Progress,
    bytes: u64,
}

impl Part<'_> {
    fn is_at(&mut self, bytes: u64) {
        let come = &self.progress.0[0];
        if bytes >= self.bytes {
            come.fetch_add(bytes - self.bytes, Ordering::Relaxed);
        } else {
            come.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
        }
        self.bytes = bytes;
    }
}

/// A blob on its way, as those that wait for it see it.
#[derive(Debug, Default)]
pub(super) struct Transfer {
    arrived: AtomicU64,
    /// The registries that the waiting pulls would use.
    waiting: Mutex<Vec<String>>,
    /// Registries that were too slow for those that wait.
    slow: Mutex<BTreeSet<String>>,
}

impl Transfer {
    /// Whether a waiting pull would use another registry.
    fn is_awaited_elsewhere(&self, host: &str) -> bool {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|other| other != host)
    }

    /// Whether this registry was slow before, and another may be asked.
    fn is_slow(&self, host: &str) -> bool {
        self.slow.lock().unwrap_or_else(PoisonError::into_inner).contains(host) && self.is_awaited_elsewhere(host)
    }

    fn wait<'a>(&'a self, host: &'a str) -> Waiting<'a> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(host.to_owned());
        Waiting { transfer: self, host }
    }
}

struct Waiting<'a> {
    transfer: &'a Transfer,
    host: &'a str,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut waiting = self.transfer.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = waiting.iter().position(|host| host == self.host) {
            waiting.swap_remove(own);
        }
    }
}

/// Pulls an image for this machine and names it here.
///
/// # Errors
///
/// When no registry has it for this machine, or what comes is not what its digest says; [`Error::Cancelled`] once `cancelled` is.
pub(super) async fn pull(
    containerd: &Containerd,
    registries: &Registries,
    (name, credentials): (&ImageName, &Credentials),
    progress: &Progress,
    cancelled: &CancellationToken,
) -> Result<(), Error> {
    let found = cancelled.run_until_cancelled(registries.find(name, credentials)).await;
    let (repository, target) = found.ok_or(Error::Cancelled)??;
    // Nothing that has come is collected as garbage before the image's name keeps it.
    let leased = containerd.with_lease().await?;
    // A mirror may have an image's manifest and not all of the rest.
    let origin = registries.origin(name, credentials)?;
    let room = Room::of(&leased).await;
    let repositories = [&repository, &origin];
    let puller = Puller { containerd: &leased, room, repositories, name, progress, target: &target };
    let pulled = cancelled.run_until_cancelled(puller.pull()).await.unwrap_or(Err(Error::Cancelled));
    leased.end_lease().await;
    pulled
}

struct Puller<'a> {
    containerd: &'a Containerd,
    room: Room,
    /// The one that has the manifest, and the registry itself: the same unless that is a mirror.
    repositories: [&'a Repository; 2],
    name: &'a ImageName,
    progress: &'a Progress,
    target: &'a Manifest,
}

impl Source for Puller<'_> {
    async fn manifest(&self, entry: &Entry) -> Result<Option<Bytes>, Error> {
        if entry.digest == self.target.digest {
            return Ok(Some(self.target.bytes.clone()));
        }
        let [first, origin] = self.repositories;
        let mut manifest = first.manifest_at(&entry.digest).await;
        if manifest.is_err() && first.host() != origin.host() {
            manifest = origin.manifest_at(&entry.digest).await;
        }
        match manifest {
            Ok(manifest) => Ok(Some(manifest.bytes)),
            Err(warren_registry::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn configuration(&self, entry: &Entry) -> Result<Option<Bytes>, Error> {
        self.pull_blob(entry, &Progress::default()).await?;
        Ok(self.containerd.read_blob(&entry.digest).await?.map(Bytes::from))
    }
}

/// What became of an attempt.
enum Attempt {
    Done,
    /// Nothing comes, and somebody else may know better.
    Yielded,
}

impl Puller<'_> {
    async fn pull(&self) -> Result<(), Error> {
        let Manifest { digest, media_type, bytes } = self.target.clone();
        let target = Entry::new(media_type, digest, bytes.len() as u64);
        let name = self.name.to_string();
        // Its configuration comes before its layers, which may be large: what is for another machine is of no use here.
        let chosen = manifest::choose(self, &name, target.clone()).await?;
        let size = chosen.manifest.size();
        if size > self.containerd.max_image() {
            return Err(Error::image_too_large(&name, self.containerd.max_image()));
        }
        self.progress.expect(size);
        let pull_layer = |layer: Entry| async move { self.pull_blob(&layer, self.progress).await };
        let layers = chosen.manifest.layers.into_iter().map(pull_layer);
        stream::iter(layers).buffer_unordered(PARALLEL).try_collect::<()>().await?;
        // Children first: a parent's labels keep them.
        for Passed { entry, bytes, labels } in chosen.path.into_iter().rev() {
            self.containerd.write_blob(&entry.digest, bytes.len() as u64, labels, io::Cursor::new(bytes)).await?;
        }
        self.containerd.put_image(&name, target.descriptor()).await
    }

    async fn pull_blob(&self, blob: &Entry, progress: &Progress) -> Result<(), Error> {
        let [first, origin] = self.repositories;
        match self.pull_blob_from(first, blob, progress).await {
            Err(Error::Registry(error)) if first.host() != origin.host() => {
                tracing::warn!(mirror = first.host(), %error, "mirror failed; asking the registry");
                self.pull_blob_from(origin, blob, progress).await
            }
            other => other,
        }
    }

    async fn pull_blob_from(&self, from: &Repository, blob: &Entry, progress: &Progress) -> Result<(), Error> {
        let slot = self.containerd.transfers().slot(&blob.digest);
        let mut part = Part { progress, bytes: 0 };
        loop {
            let turn = {
                let waiting = slot.shared.wait(from.host());
                let turn = slot.turn.lock();
                tokio::pin!(turn);
                loop {
                    if let Ok(turn) = tokio::time::timeout(LOOK, &mut turn).await {
                        drop(waiting);
                        break turn;
                    }
                    part.is_at(slot.shared.arrived.load(Ordering::Relaxed));
                }
            };
            if slot.shared.is_slow(from.host()) {
                drop(turn);
                tokio::task::yield_now().await;
                continue;
            }
            let attempt = self.transfer(from, blob, &slot.shared, &mut part).await?;
            drop(turn);
            if matches!(attempt, Attempt::Done) {
                part.is_at(blob.size);
                return Ok(());
            }
        }
    }

    /// Brings a blob here, across interruptions.
    async fn transfer(
        &self,
        from: &Repository,
        blob: &Entry,
        transfer: &Transfer,
        part: &mut Part<'_>,
    ) -> Result<Attempt, Error> {
        let mut interruptions = 0;
        loop {
            let opened = self.containerd.open_ingest(&blob.digest, blob.size, |written| part.is_at(written)).await?;
            let Some(mut ingest) = opened else {
                if self.containerd.is_whole(&blob.digest, blob.size).await? {
                    return Ok(Attempt::Done);
                }
                tracing::warn!(digest = blob.digest, "containerd lost the bytes of a blob; pulling it again");
                self.containerd.delete_blob(&blob.digest).await?;
                // While its file is there containerd takes it for whole, and records it again.
                self.containerd.collect_garbage().await?;
                continue;
            };
            let before = ingest.offset();
            match self.copy(from, blob, &mut ingest, transfer, part).await {
                Ok(Attempt::Yielded) => return Ok(Attempt::Yielded),
                Ok(Attempt::Done) => {
                    self.containerd.commit_ingest(ingest, HashMap::new()).await?;
                    return Ok(Attempt::Done);
                }
                Err(Error::Registry(error)) if error.is_transient() => {
                    interruptions = if ingest.offset() > before { 1 } else { interruptions + 1 };
                    if interruptions >= INTERRUPTIONS {
                        return Err(error.into());
                    }
                    tracing::debug!(digest = blob.digest, %error, "a transfer was interrupted; resuming");
                    tokio::time::sleep(RETRY).await;
                }
                Err(error @ Error::Registry(_)) => {
                    // The next attempt must not go on from such bytes.
                    self.containerd.abort_ingest(ingest).await;
                    return Err(error);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Copies what an ingest lacks of a blob.
    async fn copy(
        &self,
        from: &Repository,
        blob: &Entry,
        ingest: &mut Ingest,
        transfer: &Transfer,
        part: &mut Part<'_>,
    ) -> Result<Attempt, Error> {
        if ingest.offset() > blob.size {
            ingest.restart();
        }
        if ingest.offset() == blob.size && blob.size > 0 {
            return Ok(Attempt::Done);
        }
        let Blob { stream, offset } = from.blob(&blob.digest, ingest.offset()).await?;
        if offset == 0 {
            ingest.restart();
        }
        // What is there already goes into one message.
        let mut chunks = stream.ready_chunks(64);
        // When it was last quick, and where.
        let mut quick = (Instant::now(), ingest.offset());
        let mut looked = Instant::now();
        loop {
            if looked.elapsed() >= LOOK {
                self.room.check().await?;
                looked = Instant::now();
            }
            match tokio::time::timeout(LOOK, chunks.next()).await {
                Ok(None) => break,
                Ok(Some(ready)) => Self::store(from, blob, ingest, ready).await?,
                Err(_) => {}
            }
            transfer.arrived.store(ingest.offset(), Ordering::Relaxed);
            part.is_at(ingest.offset());
            if ingest.offset() - quick.1 >= SLOW {
                quick = (Instant::now(), ingest.offset());
            } else if quick.0.elapsed() >= SLOW_FOR && transfer.is_awaited_elsewhere(from.host()) {
                transfer.slow.lock().unwrap_or_else(PoisonError::into_inner).insert(from.host().to_owned());
                return Ok(Attempt::Yielded);
            }
        }
        if ingest.offset() < blob.size {
            let why = format!("{} ended after {} of {} bytes", blob.digest, ingest.offset(), blob.size);
            return Err(from.interrupted(why).into());
        }
        Ok(Attempt::Done)
    }

    async fn store(
        from: &Repository,
        blob: &Entry,
        ingest: &mut Ingest,
        ready: Vec<io::Result<Bytes>>,
    ) -> Result<(), Error> {
        let mut data = Vec::with_capacity(ready.iter().flatten().map(Bytes::len).sum());
        let mut broken = None;
        for chunk in ready {
            match chunk {
                Ok(chunk) => data.extend(chunk),
                Err(error) => {
                    // What follows is about an end that came too early.
                    broken = Some(from.broken(&blob.digest, &error));
                    break;
                }
            }
        }
        if ingest.offset() + data.len() as u64 > blob.size {
            let why = format!("{} has more bytes than the {} that its manifest says", blob.digest, blob.size);
            return Err(from.unusable(why).into());
        }
        for data in data.chunks(CHUNK) {
            ingest.write(data.to_vec()).await?;
        }
        broken.map_or(Ok(()), |error| Err(error.into()))
    }
}
