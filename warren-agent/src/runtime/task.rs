//! Containers and their tasks.

use std::{
    collections::{BTreeSet, HashMap},
    time::SystemTime,
};

use containerd_client::{
    services::v1::{self as api, snapshots as snap},
    tonic::Code,
    types::{
        Mount,
        v1::{Process, Status},
    },
};
use futures::{StreamExt as _, TryStreamExt as _};
use prost_types::Any;
use rustix::process::{Pid, Signal, kill_process};
use warren_proto::v1;

use super::{
    ContainerOptions, Containerd, Error, LocalImage, RootFs, client::MAX_MESSAGE, image::SNAPSHOTTER, spec,
    users::Identity,
};

const RUNTIME: &str = "io.containerd.runc.v2";
/// containerd's name for an OCI runtime spec as JSON.
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// Tasks that are asked after at a time.
const ASKED_TOGETHER: usize = 32;

/// Kills the process that containerd has beside a container, by the container's id, which is nobody else's.
pub(crate) fn kill_shim(id: &str) {
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let command = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
        let is_shim = words.first().is_some_and(|program| program.ends_with(b"/containerd-shim-runc-v2"));
        if is_shim && words.windows(2).any(|pair| pair == [&b"-id"[..], id.as_bytes()]) {
            // Gone already, if not.
            let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
        }
    }
}

/// Where a task is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskState {
    /// Created, not started.
    Created,
    /// Running, or paused.
    Running,
    /// Its first process has exited.
    Stopped {
        /// 128 + signal for a signal.
        exit_code: i32,
        /// When, if the daemon knows.
        at: Option<SystemTime>,
    },
    /// The daemon cannot tell just now.
    Unknown,
}

/// A container found on containerd.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its id.
    pub id: String,
    /// Its labels.
    pub labels: HashMap<String, String>,
    /// Its task, with the process id in the host's namespace; `None` if there is none.
    pub task: Option<(TaskState, u32)>,
}

fn state(process: &Process) -> TaskState {
    match process.status() {
        Status::Created => TaskState::Created,
        Status::Running | Status::Paused | Status::Pausing => TaskState::Running,
        Status::Stopped => TaskState::Stopped {
            exit_code: process.exit_status as i32,
            // Go's zero time lies before the epoch.
            at: process.exited_at.filter(|at| at.seconds > 0).and_then(|at| at.try_into().ok()),
        },
        Status::Unknown => TaskState::Unknown,
    }
}

impl Containerd {
    /// Makes a container's files. Its record comes next.
    ///
    /// # Errors
    ///
    /// When the image cannot be unpacked, or has no such user, or containerd refuses.
    pub async fn prepare_container(
        &self,
        image: &LocalImage,
        id: &str,
        spec: &v1::ContainerSpec,
    ) -> Result<RootFs, Error> {
        RootFs::new(self, image, id, spec).await
    }

    /// Makes a container's record. Its task comes next. What was made is undone on failure, its files too.
    ///
    /// # Errors
    ///
    /// When the spec cannot be built, or containerd refuses.
    pub async fn create_container(
        &self,
        image: &LocalImage,
        rootfs: &RootFs,
        options: &ContainerOptions,
        labels: HashMap<String, String>,
    ) -> Result<(), Error> {
        let created = rootfs.leased().create_leased(image, &rootfs.identity, options, labels).await;
        if created.as_ref().is_err_and(|error| !error.is_transient()) {
            self.remove_container(&options.id).await?;
        }
        created
    }

    /// Makes a container's own snapshot of its image's topmost.
    pub(super) async fn prepare_snapshot(&self, id: &str, parent: String) -> Result<(), Error> {
        let prepare = self.request(snap::PrepareSnapshotRequest {
            snapshotter: SNAPSHOTTER.to_owned(),
            key: id.to_owned(),
            parent,
            ..Default::default()
        });
        match self.client().snapshots().prepare(prepare).await {
            Ok(_) => Ok(()),
            // Left by an attempt that was cut short.
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            Err(status) => Err(Error::call("preparing a container's snapshot")(status)),
        }
    }

    async fn create_leased(
        &self,
        image: &LocalImage,
        identity: &Identity,
        options: &ContainerOptions,
        labels: HashMap<String, String>,
    ) -> Result<(), Error> {
        let id = &options.id;
        let spec = spec::build(&image.config, options, identity)?;
        let spec = serde_json::to_vec(&spec).map_err(|error| Error::BadSpec(error.to_string()))?;
        let container = api::Container {
            id: id.clone(),
            labels,
            image: image.name.clone(),
            runtime: Some(api::container::Runtime { name: RUNTIME.to_owned(), options: None }),
            spec: Some(Any { type_url: SPEC_TYPE.to_owned(), value: spec }),
            snapshotter: SNAPSHOTTER.to_owned(),
            snapshot_key: id.clone(),
            ..Default::default()
        };
        let create = self.request(api::CreateContainerRequest { container: Some(container) });
        match self.client().containers().create(create).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            Err(status) => Err(Error::call("creating a container")(status)),
        }
    }

    /// How a container's files are mounted.
    pub(super) async fn mounts(&self, id: &str) -> Result<Vec<Mount>, Error> {
        let request = self.request(snap::MountsRequest { snapshotter: SNAPSHOTTER.to_owned(), key: id.to_owned() });
        let answer = self.client().snapshots().mounts(request).await;
        Ok(answer.map_err(Error::call("mounting a snapshot"))?.into_inner().mounts)
    }

    /// Creates a container's task, which executes the runtime's create, and returns its process id. `output` says where what it
    /// writes goes, as a URI that containerd knows.
    ///
    /// # Errors
    ///
    /// When the runtime fails: no such program in the image, for one.
    pub async fn create_task(&self, id: &str, output: &str) -> Result<u32, Error> {
        let create = self.unlimited_request(api::CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs: self.mounts(id).await?,
            stdout: output.to_owned(),
            stderr: output.to_owned(),
            ..Default::default()
        });
        let answer = self.client().tasks().create(create).await.map_err(Error::call("creating a task"))?;
        Ok(answer.into_inner().pid)
    }

    /// Starts a created task.
    ///
    /// # Errors
    ///
    /// When the runtime fails.
    pub async fn start_task(&self, id: &str) -> Result<(), Error> {
        let request = self.unlimited_request(api::StartRequest { container_id: id.to_owned(), ..Default::default() });
        self.client().tasks().start(request).await.map_err(Error::call("starting a task"))?;
        Ok(())
    }

    /// Signals a container's first process, or `all` of them. One that has exited is no error.
    ///
    /// # Errors
    ///
    /// When containerd refuses.
    pub async fn kill_task(&self, id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let request = self.request(api::KillRequest { container_id: id.to_owned(), signal, all, ..Default::default() });
        match self.client().tasks().kill(request).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(Error::call("signalling a task")(status)),
        }
    }

    /// Waits for a task's exit and returns its code and time.
    ///
    /// # Errors
    ///
    /// When there is no such task or the daemon goes away meanwhile.
    pub async fn wait_task(&self, id: &str) -> Result<(i32, Option<SystemTime>), Error> {
        let request = self.unlimited_request(api::WaitRequest { container_id: id.to_owned(), ..Default::default() });
        let answer = self.client().tasks().wait(request).await.map_err(Error::call("waiting for a task"))?.into_inner();
        let at = answer.exited_at.filter(|at| at.seconds > 0).and_then(|at| at.try_into().ok());
        Ok((answer.exit_status as i32, at))
    }

    /// Where a container's task is; `None` when it has none.
    ///
    /// # Errors
    ///
    /// When the daemon does not answer.
    pub async fn task(&self, id: &str) -> Result<Option<(TaskState, u32)>, Error> {
        let request = self.request(api::GetRequest { container_id: id.to_owned(), ..Default::default() });
        match self.client().tasks().get(request).await {
            Ok(answer) => Ok(answer.into_inner().process.map(|process| (state(&process), process.pid))),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(Error::call("looking at a task")(status)),
        }
    }

    /// Deletes a task that has exited; one that is not there is no error.
    ///
    /// # Errors
    ///
    /// When it still runs.
    pub async fn delete_task(&self, id: &str) -> Result<(), Error> {
        let request = self.unlimited_request(api::DeleteTaskRequest { container_id: id.to_owned() });
        match self.client().tasks().delete(request).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::NotFound => Ok(()),
            Err(status) => Err(Error::call("deleting a task")(status)),
        }
    }

    /// Removes a container's record and snapshot; what is not there is no error.
    ///
    /// # Errors
    ///
    /// When its task has not been deleted.
    pub async fn remove_container(&self, id: &str) -> Result<(), Error> {
        let request = self.request(api::DeleteContainerRequest { id: id.to_owned() });
        match self.client().containers().delete(request).await {
            Ok(_) => {}
            Err(status) if status.code() == Code::NotFound => {}
            Err(status) => return Err(Error::call("removing a container")(status)),
        }
        self.remove_snapshot(id).await
    }

    /// Names of the images that containers were made from.
    pub(super) async fn images_in_use(&self) -> Result<BTreeSet<String>, Error> {
        let request = self.request(api::ListContainersRequest::default());
        let mut client = self.client().containers().max_decoding_message_size(MAX_MESSAGE);
        let listed = client.list(request).await.map_err(Error::call("listing containers"))?.into_inner();
        Ok(listed.containers.into_iter().map(|container| container.image).collect())
    }

    /// All containers of the namespace with their tasks.
    ///
    /// # Errors
    ///
    /// When the daemon does not answer.
    pub async fn containers(&self) -> Result<Vec<Found>, Error> {
        let request = self.request(api::ListContainersRequest::default());
        let mut client = self.client().containers().max_decoding_message_size(MAX_MESSAGE);
        let listed = client.list(request).await.map_err(Error::call("listing containers"))?.into_inner();
        // Asked one by one: a list leaves out tasks whose shim is slow to answer.
        let asked = futures::stream::iter(listed.containers).map(async |container| {
            let task = match self.task(&container.id).await {
                // One that nothing is known of keeps nobody from the others.
                Err(error) if !matches!(error, Error::Unavailable { .. }) => {
                    tracing::warn!(container = container.id, %error, "nothing is known of a container's task");
                    Some((TaskState::Unknown, 0))
                }
                task => task?,
            };
            Ok(Found { id: container.id, labels: container.labels, task })
        });
        asked.buffer_unordered(ASKED_TOGETHER).try_collect().await
    }
}
