//! Processes in containers that run already.

use std::time::Duration;

use containerd_client::{services::v1 as api, tonic::Code};
use oci_spec::runtime::{Process, Spec};
use prost_types::Any;

use super::{Containerd, Error};

/// containerd's name for a process of an OCI runtime spec as JSON.
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const SIGKILL: u32 = 9;
/// How long a killed process may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

impl Containerd {
    /// The process that a container was made with: its user, environment and limits.
    pub(super) async fn process_of(&self, id: &str) -> Result<Process, Error> {
        let request = self.request(api::GetContainerRequest { id: id.to_owned() });
        let answer = self.client().containers().get(request).await.map_err(Error::call("looking at a container"))?;
        let spec = answer.into_inner().container.and_then(|container| container.spec).unwrap_or_default();
        let spec: Spec = serde_json::from_slice(&spec.value)
            .map_err(|error| Error::BadSpec(format!("the container's spec cannot be read: {error}")))?;
        spec.process().clone().ok_or_else(|| Error::BadSpec("the container's spec has no process".to_owned()))
    }

    /// Runs a command in a container as its first process runs, and returns its exit code; `None` if it took longer than
    /// `limit` and was killed. What it writes is lost.
    ///
    /// # Errors
    ///
    /// When it cannot be started: no such program in the image, for one.
    pub async fn run_in(&self, id: &str, command: &[String], limit: Duration) -> Result<Option<i32>, Error> {
        let mut process = self.process_of(id).await?;
        process.set_args(Some(command.to_vec())).set_terminal(Some(false));
        let exec_id = format!("check-{:016x}", rand::random::<u64>());
        // No streams at all: one without the other makes the shim crash, and the container with it.
        self.add_process(id, &exec_id, &process).await?;
        let ran = self.start_and_wait(id, &exec_id, limit).await;
        let delete = self.request(api::DeleteProcessRequest { container_id: id.to_owned(), exec_id: exec_id.clone() });
        // It goes with the container otherwise.
        let _ = self.client().tasks().delete_process(delete).await;
        ran
    }

    pub(super) async fn add_process(&self, id: &str, exec_id: &str, process: &Process) -> Result<(), Error> {
        let value = serde_json::to_vec(process).map_err(|error| Error::BadSpec(error.to_string()))?;
        let exec = self.request(api::ExecProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            spec: Some(Any { type_url: PROCESS_TYPE.to_owned(), value }),
            ..Default::default()
        });
        self.client().tasks().exec(exec).await.map_err(Error::call("adding a process"))?;
        Ok(())
    }

    async fn start_and_wait(&self, id: &str, exec_id: &str, limit: Duration) -> Result<Option<i32>, Error> {
        let wait = api::WaitRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned() };
        let wait = self.unlimited_request(wait);
        let mut tasks = self.client().tasks();
        let start = self.request(api::StartRequest { container_id: id.to_owned(), exec_id: exec_id.to_owned() });
        let began = std::time::Instant::now();
        tasks.start(start).await.map_err(Error::call("starting a process"))?;
        let exited = tasks.wait(wait);
        tokio::pin!(exited);
        let code =
            |answer: containerd_client::tonic::Response<api::WaitResponse>| answer.into_inner().exit_status as i32;
        match tokio::time::timeout(limit.saturating_sub(began.elapsed()), &mut exited).await {
            Ok(answer) => answer.map(|answer| Some(code(answer))).map_err(Error::call("waiting for a process")),
            Err(_) => {
                let kill = self.request(api::KillRequest {
                    container_id: id.to_owned(),
                    exec_id: exec_id.to_owned(),
                    signal: SIGKILL,
                    all: false,
                });
                match self.client().tasks().kill(kill).await {
                    Err(status) if status.code() != Code::NotFound => {
                        return Err(Error::call("killing a process")(status));
                    }
                    _ => {}
                }
                // It can only be deleted once it is gone.
                let _ = tokio::time::timeout(KILL_PATIENCE, exited).await;
                Ok(None)
            }
        }
    }
}
