//! What a manager wants of containers now and then: what they write, what they use, and commands run in them.
//!
//! Each answer is a call on a connection of its own. A reader that stands still holds up what is sent to it, and on a shared
//! connection that would be the heartbeats as well.

use std::{
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
        let (logs, board) = (self.logs.clone(), self.board.clone());
        self.call(move |dispatcher| upload_logs(dispatcher, logs, board, wish));
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

/// Sends a manager what a container has written, and writes, until nobody reads it any more.
async fn upload_logs(mut dispatcher: DispatcherClient<Channel>, logs: Logs, board: Board, request: v1::LogRequest) {
    let (sender, receiver) = mpsc::channel(16);
    let query = logs::Query {
        follow: request.follow,
        tail: request.tail.map(|tail| tail as usize),
        since: request.since.and_then(|since| {
            SystemTime::try_from(prost_types::Timestamp { seconds: since.seconds, nanos: since.nanos }).ok()
        }),
    };
    let mut wanted = vec![(request.container_id.clone(), 0)];
    if request.container_id.is_empty() {
        let gone = |container: &String| !request.except.contains(container);
        wanted = logs.kept_of(&request.service_id).into_iter().filter(|(container, _)| gone(container)).collect();
    }
    let first = v1::UploadLogsRequest { id: request.id, ..Default::default() };
    let sending = async {
        if sender.send(first).await.is_err() {
            return;
        }
        for (container, slot) in wanted {
            let runs = || board.get(&container).is_some_and(|status| status.state() < v1::ContainerState::Complete);
            let (lines, mut waiting) = mpsc::channel(1);
            let directory = logs.directory(&container);
            let reading = logs::read(&directory, &query, runs, lines);
            let passing = async {
                while let Some(lines) = waiting.recv().await {
                    let container_id = container.clone();
                    let upload = v1::UploadLogsRequest { lines, container_id, slot, ..Default::default() };
                    if sender.send(upload).await.is_err() {
                        return;
                    }
                }
            };
            if let (Err(error), ()) = tokio::join!(reading, passing) {
                tracing::debug!(container, %error, "a container's log could not be read");
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
