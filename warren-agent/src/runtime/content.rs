//! The content store: blobs by digest.
//!
//! A blob is written through an *ingest*, which containerd keeps when its writer goes away: the next writer of the same
//! reference goes on where the last one ended. An ingest has one writer at a time on the whole node, whichever process it is in.

use std::{
    collections::HashMap,
    io::Read,
    time::{Duration, Instant},
};

use containerd_client::{
    services::v1 as api,
    tonic::{Code, Status, Streaming},
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{Containerd, Error, manifest::MAX_DOCUMENT};

/// Bytes sent in one message.
pub(super) const CHUNK: usize = 1 << 20;
/// Chunks read ahead of the daemon.
const CHUNKS_AHEAD: usize = 4;
/// Between attempts to open an ingest that another writer holds.
const LOCK_POLL: Duration = Duration::from_millis(200);
/// A writer in another process that adds nothing for this long is not waited for: the blob is written beside it.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

impl Containerd {
    /// Reads a whole blob: manifests and configurations, not layers. `None` if it is not there. What is larger than such a document may be is an
    /// error, whatever its size was said to be.
    pub(super) async fn read_blob(&self, digest: &str) -> Result<Option<Vec<u8>>, Error> {
        let read = async {
            let request = self.request(api::ReadContentRequest { digest: digest.to_owned(), offset: 0, size: 0 });
            let mut stream = self.client().content().read(request).await?.into_inner();
            let mut blob = Vec::new();
            while let Some(part) = stream.message().await? {
                if (blob.len() + part.data.len()) as u64 > MAX_DOCUMENT {
                    return Err(Status::invalid_argument(format!("{digest} is larger than {MAX_DOCUMENT} bytes")));
                }
                blob.extend(part.data);
            }
            Ok::<_, Status>(blob)
        };
        match read.await {
            Ok(blob) => Ok(Some(blob)),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(Error::call("reading content")(status)),
        }
    }

    /// Whether a blob's bytes are there, and as many as there should be: a power cut can leave containerd's record of a blob
    /// without them.
    pub(super) async fn is_whole(&self, digest: &str, size: u64) -> Result<bool, Error> {
        let Some(last) = size.checked_sub(1) else { return Ok(true) };
        let offset = i64::try_from(last).unwrap_or(i64::MAX);
        let request = self.request(api::ReadContentRequest { digest: digest.to_owned(), offset, size: 1 });
        let read = async {
            let mut stream = self.client().content().read(request).await?.into_inner();
            Ok::<_, Status>(stream.message().await?.is_some_and(|part| part.data.len() == 1))
        };
        match read.await {
            Ok(whole) => Ok(whole),
            Err(status) if matches!(status.code(), Code::NotFound | Code::OutOfRange | Code::Unknown) => Ok(false),
            Err(status) => Err(Error::call("reading content")(status)),
        }
    }

    /// Forgets a blob; one that is not there is what is wanted.
    pub(super) async fn delete_blob(&self, digest: &str) -> Result<(), Error> {
        let request = self.request(api::DeleteContentRequest { digest: digest.to_owned() });
        match self.client().content().delete(request).await {
            Err(status) if status.code() != Code::NotFound => Err(Error::call("removing content")(status)),
            _ => Ok(()),
        }
    }

    /// Writes a blob, which containerd checks against its digest, and labels it. It may be there already.
    pub(super) async fn write_blob(
        &self,
        digest: &str,
        size: u64,
        labels: HashMap<String, String>,
        body: impl Read + Send + 'static,
    ) -> Result<(), Error> {
        let Some(mut ingest) = self.open_ingest(digest, size, |_| {}).await? else {
            return self.label_blob(digest, labels).await;
        };
        if ingest.offset() == size && size > 0 {
            // Another namespace has it, or an earlier writer ended just before its commit.
            self.commit_ingest(ingest, labels.clone()).await?;
            return self.label_blob(digest, labels).await;
        }
        ingest.restart();
        let (sender, mut chunks) = mpsc::channel(CHUNKS_AHEAD);
        let pump = tokio::task::spawn_blocking(move || send_chunks(body, &sender));
        let written = async {
            while let Some(chunk) = chunks.recv().await {
                ingest.write(chunk).await?;
            }
            Ok::<_, Error>(())
        };
        let written = written.await;
        drop(chunks);
        match pump.await {
            Ok(Err(source)) => {
                self.abort_ingest(ingest).await;
                return Err(Error::bad_image(digest, format!("its bytes cannot be read: {source}")));
            }
            Ok(Ok(())) => {}
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
        written?;
        self.commit_ingest(ingest, labels.clone()).await?;
        // One that another writer committed first has that writer's labels.
        self.label_blob(digest, labels).await
    }

    /// Opens the ingest of a blob, once no other process of this node is writing it; `None` if the blob is there. `watch` hears how
    /// many bytes another writer has written.
    pub(super) async fn open_ingest(
        &self,
        digest: &str,
        size: u64,
        mut watch: impl FnMut(u64),
    ) -> Result<Option<Ingest>, Error> {
        let mut reference = format!("warren-{digest}");
        let mut seen = (0, Instant::now());
        loop {
            match self.try_open_ingest(&reference, digest, size).await {
                Ok(ingest) => return Ok(Some(ingest)),
                Err(status) if status.code() == Code::AlreadyExists => return Ok(None),
                Err(status) if is_locked(&status) => {
                    let written = self.ingested(&reference).await;
                    watch(written);
                    if written != seen.0 {
                        seen = (written, Instant::now());
                    } else if seen.1.elapsed() >= LOCK_PATIENCE {
                        reference = format!("warren-{digest}-{:016x}", rand::random::<u64>());
                        continue;
                    }
                    tokio::time::sleep(LOCK_POLL).await;
                }
                Err(status) => return Err(Error::call("writing content")(status)),
            }
        }
    }

    async fn try_open_ingest(&self, reference: &str, digest: &str, size: u64) -> Result<Ingest, Status> {
        let template = api::WriteContentRequest {
            r#ref: reference.to_owned(),
            total: i64::try_from(size).unwrap_or(i64::MAX),
            expected: digest.to_owned(),
            ..Default::default()
        };
        let (sender, requests) = mpsc::channel(1);
        let stat = api::WriteContentRequest { action: api::WriteAction::Stat.into(), ..template.clone() };
        // The receiver is just below.
        let _ = sender.send(stat).await;
        let request = self.unlimited_request(ReceiverStream::new(requests));
        let mut answers = self.client().content().write(request).await?.into_inner();
        let Some(answer) = answers.message().await? else {
            return Err(Status::unavailable("containerd ended the transfer"));
        };
        let offset = u64::try_from(answer.offset).unwrap_or_default();
        Ok(Ingest { template, sender, answers, offset })
    }

    /// How many bytes an ingest has.
    async fn ingested(&self, reference: &str) -> u64 {
        let request = self.request(api::StatusRequest { r#ref: reference.to_owned() });
        let status = self.client().content().status(request).await.ok();
        let status = status.and_then(|answer| answer.into_inner().status);
        status.and_then(|status| u64::try_from(status.offset).ok()).unwrap_or_default()
    }

    /// Makes an ingest the blob of its digest. One whose bytes are others is thrown away.
    pub(super) async fn commit_ingest(&self, ingest: Ingest, labels: HashMap<String, String>) -> Result<(), Error> {
        let (digest, reference) = (ingest.template.expected.clone(), ingest.template.r#ref.clone());
        match ingest.commit(labels).await {
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            Err(status) if status.code() == Code::FailedPrecondition => {
                self.abort(reference).await;
                Err(Error::bad_image(digest, status.message()))
            }
            other => other.map_err(Error::call("writing content")),
        }
    }

    /// Throws away what an ingest has.
    pub(super) async fn abort_ingest(&self, ingest: Ingest) {
        let reference = ingest.template.r#ref.clone();
        drop(ingest);
        self.abort(reference).await;
    }

    async fn abort(&self, reference: String) {
        let request = self.request(api::AbortRequest { r#ref: reference });
        if let Err(status) = self.client().content().abort(request).await {
            // containerd collects it after a day.
            tracing::debug!(message = status.message(), "could not abort an ingest");
        }
    }

    /// Labels a blob; labels are what keeps other blobs and snapshots from the garbage collector.
    pub(super) async fn label_blob(&self, digest: &str, labels: HashMap<String, String>) -> Result<(), Error> {
        if labels.is_empty() {
            return Ok(());
        }
        let paths = labels.keys().map(|label| format!("labels.{label}")).collect();
        let request = self.request(api::UpdateRequest {
            info: Some(api::Info { digest: digest.to_owned(), labels, ..Default::default() }),
            update_mask: Some(prost_types::FieldMask { paths }),
        });
        self.client().content().update(request).await.map_err(Error::call("labelling content"))?;
        Ok(())
    }
}

/// Whether an ingest has another writer now: containerd says so as `UNAVAILABLE`, which a daemon that is away is too.
fn is_locked(status: &Status) -> bool {
    status.code() == Code::Unavailable && status.message().contains("locked")
}

/// The writing end of an ingest. Dropping it keeps the bytes that were written, for the next one.
#[derive(Debug)]
pub(super) struct Ingest {
    template: api::WriteContentRequest,
    sender: mpsc::Sender<api::WriteContentRequest>,
    answers: Streaming<api::WriteContentResponse>,
    offset: u64,
}

impl Ingest {
    /// Bytes that it has.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Begins again at the first byte.
    pub(super) fn restart(&mut self) {
        // containerd truncates what is written to at 0.
        self.offset = 0;
    }

    /// Adds bytes, at most [`CHUNK`] of them.
    pub(super) async fn write(&mut self, data: Vec<u8>) -> Result<(), Error> {
        let size = data.len() as u64;
        self.send(api::WriteAction::Write, data, HashMap::new()).await.map_err(Error::call("writing content"))?;
        self.offset += size;
        Ok(())
    }

    async fn commit(mut self, labels: HashMap<String, String>) -> Result<(), Status> {
        self.send(api::WriteAction::Commit, Vec::new(), labels).await
    }

    async fn send(
        &mut self,
        action: api::WriteAction,
        data: Vec<u8>,
        labels: HashMap<String, String>,
    ) -> Result<(), Status> {
        let offset = i64::try_from(self.offset).unwrap_or(i64::MAX);
        let request = api::WriteContentRequest { action: action.into(), data, labels, offset, ..self.template.clone() };
        // If it is not taken, the daemon ended the stream and says why there.
        let _ = self.sender.send(request).await;
        match self.answers.message().await? {
            Some(_) => Ok(()),
            None => Err(Status::unavailable("containerd ended the transfer")),
        }
    }
}

fn send_chunks(mut body: impl Read, to: &mpsc::Sender<Vec<u8>>) -> std::io::Result<()> {
    loop {
        let mut chunk = Vec::with_capacity(CHUNK);
        let read = body.by_ref().take(CHUNK as u64).read_to_end(&mut chunk)?;
        if read == 0 || to.blocking_send(chunk).is_err() {
            // Nobody wants more, and why is known there.
            return Ok(());
        }
    }
}
