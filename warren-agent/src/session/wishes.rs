//! What a manager wants of containers now and then: what they write, what they use, and commands run in them.
//!
//! Each answer is a call on a connection of its own. A reader that stands still holds up what is sent to it, and on a shared
//! connection that would be the heartbeats as well.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use warren_pki::Dialer;
use warren_proto::v1::{self, dispatcher_client::DispatcherClient};
use warren_telemetry::Source;

use super::{Options, positive};
use crate::{
    exec::Execs,
    logs::{self, Logs},
    stats,
    tasks::Board,
};

/// Fulfils wishes.
pub(super) struct Wishes {
    manager: Dialer,
    board: Board,
    logs: Logs,
    execs: Execs,
    sources: Vec<Arc<dyn Source>>,
}

impl Wishes {
    pub(super) fn new(manager: Dialer, options: &Options, board: Board) -> Self {
        let (logs, execs, sources) = (options.logs.clone(), options.execs.clone(), options.sources.clone());
        Self { manager, board, logs, execs, sources }
    }

    /// Calls the manager. What hinders it ends the session too, and whoever waits is told by the manager.
    fn call<F: Future<Output = ()> + Send>(&self, call: impl FnOnce(DispatcherClient<Channel>) -> F + Send + 'static) {
        let manager = self.manager.clone();
        tokio::spawn(async move {
            match manager.connect().await {
                Ok(channel) => call(DispatcherClient::new(channel)).await,
                Err(error) => tracing::debug!(%error, "no connection for an answer"),
            }
        });
    }

    pub(super) fn logs(&self, wish: v1::LogRequest) {
        let (directory, board) = (self.logs.directory(&wish.container_id), self.board.clone());
        self.call(move |dispatcher| upload_logs(dispatcher, directory, board, wish));
    }

    pub(super) fn stats(&self, wish: v1::StatsWish) {
        let (board, sources) = (self.board.clone(), self.sources.clone());
        self.call(move |dispatcher| upload_stats(dispatcher, board, sources, wish));
    }

    pub(super) fn exec(&self, wish: v1::ExecWish) {
        let Some(start) = wish.start else { return self.execs.cancel(&wish.id) };
        let execs = self.execs.clone();
        self.call(move |dispatcher| execs.serve(dispatcher, wish.id, start));
    }
}

/// Lines that are sent together.
const LINES: usize = 256;

/// Sends a manager what a container has written, and writes, until nobody reads it any more.
async fn upload_logs(
    mut dispatcher: DispatcherClient<Channel>,
    directory: PathBuf,
    board: Board,
    request: v1::LogRequest,
) {
    let (sender, receiver) = mpsc::channel(16);
    let (lines, mut waiting) = mpsc::channel(LINES);
    let query = logs::Query {
        follow: request.follow,
        tail: request.tail.map(|tail| tail as usize),
        since: request.since.and_then(|since| {
            SystemTime::try_from(prost_types::Timestamp { seconds: since.seconds, nanos: since.nanos }).ok()
        }),
    };
    let id = request.container_id;
    let reading = tokio::task::spawn_blocking(move || {
        // Nobody reads any more, or the container has ended.
        let runs =
            || !lines.is_closed() && board.get(&id).is_some_and(|status| status.state() < v1::ContainerState::Complete);
        logs::read(&directory, &query, runs, |line| lines.blocking_send(line).is_ok())
    });
    let first = v1::UploadLogsRequest { id: request.id, lines: Vec::new() };
    let sending = async {
        if sender.send(first).await.is_err() {
            return;
        }
        let mut batch = Vec::new();
        while waiting.recv_many(&mut batch, LINES).await > 0 {
            let upload = v1::UploadLogsRequest { id: String::new(), lines: std::mem::take(&mut batch) };
            if sender.send(upload).await.is_err() {
                return;
            }
        }
        drop(sender);
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = sending => {}
        // It answers when it has everything, or when nobody wants more.
        _ = dispatcher.upload_logs(ReceiverStream::new(receiver)) => {}
    }
    drop(waiting);
    if let Ok(Err(error)) = reading.await {
        tracing::debug!(%error, "a container's log could not be read");
    }
}

/// Tells a manager what this node's containers use, until nobody looks any more.
async fn upload_stats(
    mut dispatcher: DispatcherClient<Channel>,
    board: Board,
    sources: Vec<Arc<dyn Source>>,
    wish: v1::StatsWish,
) {
    const DEFAULT: Duration = Duration::from_secs(1);
    let (sender, receiver) = mpsc::channel(1);
    let sending = async {
        let first = v1::UploadStatsRequest { id: wish.id, stats: None };
        if sender.send(first).await.is_err() {
            return;
        }
        let mut tick = tokio::time::interval(positive(wish.interval, DEFAULT));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let running = board.running();
            let sources = sources.clone();
            // Hundreds of small files.
            let read = tokio::task::spawn_blocking(move || stats::read(&running, &sources)).await;
            let Ok(stats) = read else { return };
            if sender.send(v1::UploadStatsRequest { id: String::new(), stats: Some(stats) }).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = sending => {}
        _ = dispatcher.upload_stats(ReceiverStream::new(receiver)) => {}
    }
}
