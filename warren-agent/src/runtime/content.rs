//! The content store: blobs by digest.

use std::{collections::HashMap, io::Read};

use bytes::Bytes;
use containerd_client::{
    services::v1 as api,
    tonic::{Code, Status},
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream};

use super::{Containerd, Error};

/// Bytes sent in one message.
const CHUNK: usize = 1 << 20;
/// Chunks read ahead of the daemon.
const CHUNKS_AHEAD: usize = 4;

impl Containerd {
    /// Whether a blob is there.
    pub(super) async fn has_blob(&self, digest: &str) -> Result<bool, Error> {
        let request = self.request(api::InfoRequest { digest: digest.to_owned() });
        match self.client().content().info(request).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(Error::call("looking for content")(status)),
        }
    }

    /// Reads a whole blob: manifests and configurations, not layers.
    pub(super) async fn read_blob(&self, digest: &str) -> Result<Vec<u8>, Error> {
        let request = self.request(api::ReadContentRequest { digest: digest.to_owned(), offset: 0, size: 0 });
        let mut stream =
            self.client().content().read(request).await.map_err(Error::call("reading content"))?.into_inner();
        let mut blob = Vec::new();
        while let Some(part) = stream.message().await.map_err(Error::call("reading content"))? {
            blob.extend(part.data);
        }
        Ok(blob)
    }

    /// Writes a blob, which containerd checks against its digest, and labels it. It may be there already.
    pub(super) async fn write_blob(
        &self,
        digest: &str,
        size: u64,
        labels: HashMap<String, String>,
        body: impl Read + Send + 'static,
    ) -> Result<(), Error> {
        if self.has_blob(digest).await? {
            return self.label_blob(digest, labels).await;
        }
        let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
        let message = Message { reference: format!("warren-{digest}"), digest: digest.to_owned(), size: size as i64 };
        let commit_labels = labels.clone();
        let pump = tokio::task::spawn_blocking(move || message.send_all(body, commit_labels, &sender));
        let written = self.receive_written(receiver).await;
        match pump.await {
            Ok(Err(source)) => {
                return Err(Error::bad_image(digest, format!("its bytes cannot be read: {source}")));
            }
            Ok(Ok(())) => {}
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
        match written {
            Err(status) if status.code() == Code::AlreadyExists => self.label_blob(digest, labels).await,
            Err(status) if status.code() == Code::FailedPrecondition => Err(Error::bad_image(digest, status.message())),
            other => other.map_err(Error::call("writing content")),
        }
    }

    /// Writes a blob from a stream, which containerd checks against its digest. What an attempt that was cut short wrote of it is
    /// thrown away. `arrived` hears of bytes as they come.
    pub(super) async fn write_stream<S, E>(
        &self,
        digest: &str,
        size: u64,
        mut body: S,
        arrived: impl Fn(u64) + Send + 'static,
    ) -> Result<Result<(), E>, Error>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + Unpin + 'static,
        E: Send + 'static,
    {
        let message = Message { reference: format!("warren-{digest}"), digest: digest.to_owned(), size: size as i64 };
        let abort = self.request(api::AbortRequest { r#ref: message.reference.clone() });
        // There rarely is one.
        let _ = self.client().content().abort(abort).await;
        let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
        let pump = tokio::spawn(async move {
            let mut offset = 0;
            while let Some(part) = body.next().await {
                for data in part?.chunks(CHUNK) {
                    let write = message.base(api::WriteAction::Write, offset);
                    offset += data.len() as i64;
                    arrived(data.len() as u64);
                    if sender.send(api::WriteContentRequest { data: data.to_vec(), ..write }).await.is_err() {
                        // The daemon ended the stream and says why there.
                        return Ok(());
                    }
                }
            }
            // As above.
            let _ = sender.send(message.base(api::WriteAction::Commit, offset)).await;
            Ok(())
        });
        let written = self.receive_written(receiver).await;
        let pumped = pump.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
        if let Err(error) = pumped {
            return Ok(Err(error));
        }
        match written {
            Err(status) if status.code() == Code::AlreadyExists => Ok(Ok(())),
            Err(status) if status.code() == Code::FailedPrecondition => Err(Error::bad_image(digest, status.message())),
            other => other.map(Ok).map_err(Error::call("writing content")),
        }
    }

    async fn receive_written(&self, requests: mpsc::Receiver<api::WriteContentRequest>) -> Result<(), Status> {
        let request = self.unlimited_request(ReceiverStream::new(requests));
        let mut answers = self.client().content().write(request).await?.into_inner();
        while answers.message().await?.is_some() {}
        Ok(())
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

struct Message {
    reference: String,
    digest: String,
    size: i64,
}

impl Message {
    fn base(&self, action: api::WriteAction, offset: i64) -> api::WriteContentRequest {
        api::WriteContentRequest {
            action: action.into(),
            r#ref: self.reference.clone(),
            total: self.size,
            expected: self.digest.clone(),
            offset,
            ..Default::default()
        }
    }

    fn send_all(
        &self,
        mut body: impl Read,
        labels: HashMap<String, String>,
        to: &mpsc::Sender<api::WriteContentRequest>,
    ) -> std::io::Result<()> {
        let mut offset = 0;
        loop {
            let mut data = Vec::with_capacity(CHUNK);
            let read = body.by_ref().take(CHUNK as u64).read_to_end(&mut data)?;
            if read == 0 {
                break;
            }
            let message = api::WriteContentRequest { data, ..self.base(api::WriteAction::Write, offset) };
            offset += read as i64;
            if to.blocking_send(message).is_err() {
                // The daemon ended the stream and says why there.
                return Ok(());
            }
        }
        let commit = api::WriteContentRequest { labels, ..self.base(api::WriteAction::Commit, offset) };
        // As above.
        let _ = to.blocking_send(commit);
        Ok(())
    }
}
