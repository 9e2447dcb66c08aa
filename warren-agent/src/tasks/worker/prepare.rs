//! From an assignment to a process: the image, volumes, the network, the record, the task.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use warren_proto::v1;
use warren_registry::Credentials;
use warren_spec::{ImageName, InvalidImageName};

use super::{Ending, PULL_NEWS, Phase, RETRY, RuntimePhase, Worker, label};
use crate::{
    network::{Files, Mounted},
    runtime::{self, ContainerOptions, LocalImage, NetworkNamespace, VolumePath, Wanted},
};

/// What an error of getting an image makes of a container.
fn ending(error: runtime::Error) -> Ending {
    match error {
        runtime::Error::Cancelled => Ending::Cancelled,
        error if error.is_transient() => Ending::Failed(error.to_string()),
        error => Ending::Rejected(error.to_string()),
    }
}

/// Repeats a call while the daemon is away; other errors end the container.
pub(super) async fn retry<T, F>(call: impl Fn() -> F) -> Result<T, Ending>
where
    F: Future<Output = Result<T, runtime::Error>>,
{
    /// A daemon that is away longer than this may as well be away for good.
    const PATIENCE: Duration = Duration::from_secs(60);
    let began = Instant::now();
    loop {
        match call().await {
            Ok(value) => return Ok(value),
            Err(error) if error.is_transient() && began.elapsed() < PATIENCE => tokio::time::sleep(RETRY).await,
            Err(error) if error.is_transient() => return Err(Ending::Failed(error.to_string())),
            Err(error) => return Err(Ending::Rejected(error.to_string())),
        }
    }
}

impl Worker {
    pub(super) async fn prepare(&mut self) -> Result<(), Ending> {
        let Some(assignment) = self.assignment.clone() else { return Err(Ending::Cancelled) };
        let spec = assignment.spec.clone().unwrap_or_default();
        let removing = self.removing.clone();
        // Neither changes anything of the container's: what nobody wants any more ends at once.
        let image = removing.run_until_cancelled(self.image(&spec)).await.unwrap_or(Err(Ending::Cancelled))?;
        self.unpack(&image).await?;
        if spec.stop_signal.is_empty()
            && let Some(signal) = image.config.stop_signal().as_deref().and_then(warren_spec::signal)
        {
            self.stop.signal = signal;
        }
        let mut labels: HashMap<_, _> = spec.labels.clone().into_iter().collect();
        labels.extend(self.stop.labels());
        labels.insert(label::SERVICE.to_owned(), assignment.service_name.clone());
        let volumes = self.volumes(&assignment).await?;
        // What an attempt that was cut short left would be in the way.
        retry(|| self.shared.containerd.delete_task(&self.id)).await?;
        let rootfs = retry(|| self.shared.containerd.prepare_container(&image, &self.id, &spec)).await?;
        rootfs.fill(&spec, &volumes).await.map_err(|error| Ending::Failed(error.to_string()))?;
        let secrets = self.shared.secrets.write(&self.id, &spec, |mount| rootfs.owner(mount));
        let secrets = secrets.map_err(|error| Ending::Failed(error.to_string()))?;
        let env = self.shared.secrets.write_env(&self.id, &spec, rootfs.user());
        let env = env.map_err(|error| Ending::Failed(error.to_string()))?;
        let (network, files) = self.connect(&spec).await?;
        let options = ContainerOptions {
            id: self.id.clone(),
            network,
            files,
            secrets,
            env: env.map(|values| (self.shared.node.env_helper.clone(), values)),
            volumes,
            spec,
            resources: assignment.resources.unwrap_or_default(),
            cgroup_parent: self.shared.node.cgroup_parent.clone(),
            init: self.shared.node.init.clone(),
            policy: self.shared.node.policy.clone(),
            pids_limit: self.shared.node.pids_limit,
        };
        retry(|| self.shared.containerd.create_container(&image, &rootfs, &options, labels.clone())).await?;
        self.shared.registrar.register(&self.id, &assignment.service_name, self.stop.signal);
        Ok(())
    }

    /// Who asks the image's registry: whom the service's secret names.
    pub(super) fn credentials(&self, spec: &v1::ContainerSpec, image: &ImageName) -> Result<Credentials, Ending> {
        if spec.registry_secret.is_empty() {
            return Ok(Credentials::Anonymous);
        }
        let value = self.shared.secrets.value(v1::SecretKind::Secret, &spec.registry_secret);
        let value = value.map_err(|error| Ending::Failed(error.to_string()))?;
        Credentials::parse(&value, image.registry()).map_err(|error| Ending::Rejected(error.to_string()))
    }

    /// Finds the image or has it pulled, and says how far that is.
    pub(super) async fn image(&self, spec: &v1::ContainerSpec) -> Result<LocalImage, Ending> {
        let began = Instant::now();
        let name: ImageName =
            spec.image.parse().map_err(|error: InvalidImageName| Ending::Rejected(error.to_string()))?;
        let wanted = Wanted {
            credentials: self.credentials(spec, &name)?,
            name,
            digest: Some(spec.image_digest.clone()).filter(|digest| !digest.is_empty()),
            policy: spec.pull_policy(),
        };
        let mut said = Instant::now();
        let watch = |come: u64, all: u64| {
            let megabytes = |bytes: u64| bytes as f64 / 1e6;
            let message = match all {
                0 => "pulling the image".to_owned(),
                all => format!("pulling the image: {:.1} of {:.1} MB", megabytes(come), megabytes(all)),
            };
            // Each is an entry of the manager's log.
            if all == 0 || said.elapsed() >= PULL_NEWS {
                said = Instant::now();
                self.note(|status| status.message = message);
            }
        };
        let image = self.shared.images.ensure(&wanted, watch).await.map_err(ending)?;
        self.shared.timings.phase(RuntimePhase::Pull, began.elapsed());
        Ok(image)
    }

    /// Makes the image's layers snapshots.
    pub(super) async fn unpack(&self, image: &LocalImage) -> Result<(), Ending> {
        let began = Instant::now();
        self.shared.images.unpack(image, &self.removing).await.map_err(ending)?;
        self.shared.timings.phase(RuntimePhase::Unpack, began.elapsed());
        Ok(())
    }

    /// Makes the container's volumes available.
    pub(super) async fn volumes(&self, assignment: &v1::Assignment) -> Result<BTreeMap<String, VolumePath>, Ending> {
        let began = Instant::now();
        let (volumes, id, wanted) = (self.shared.volumes.clone(), self.id.clone(), assignment.volumes.clone());
        if wanted.is_empty() {
            return Ok(BTreeMap::new());
        }
        // A file server may take its time: not on a thread that serves others.
        let mounted = tokio::task::spawn_blocking(move || volumes.mount(&id, &wanted)).await;
        let mounted = mounted.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
        let paths = mounted.map_err(|error| Ending::Failed(error.to_string()))?;
        self.shared.timings.phase(RuntimePhase::Volumes, began.elapsed());
        Ok(paths)
    }

    /// Gives the container its place in the network that its service wants, and the files that say so.
    pub(super) async fn connect(&self, spec: &v1::ContainerSpec) -> Result<(NetworkNamespace, Vec<Mounted>), Ending> {
        let began = Instant::now();
        let files = self.shared.network.files();
        let hostname = runtime::hostname(&self.id, spec);
        let (namespace, addresses) = match spec.network() {
            v1::NetworkMode::Host => return Ok((NetworkNamespace::Node, Files::of_the_node())),
            v1::NetworkMode::None => (NetworkNamespace::Empty, Vec::new()),
            v1::NetworkMode::Cluster | v1::NetworkMode::Unspecified => {
                let attached = self.shared.network.attach(&self.id).await;
                let attachment = attached.map_err(|error| Ending::Failed(format!("network: {error}")))?;
                (NetworkNamespace::Path(attachment.namespace), attachment.addresses)
            }
        };
        let written = files.write(&self.id, &hostname, &addresses);
        let files = written.map_err(|error| Ending::Failed(format!("network: writing its files: {error}")))?;
        self.note(|status| status.addresses = addresses.iter().map(ToString::to_string).collect());
        self.shared.timings.phase(RuntimePhase::Network, began.elapsed());
        Ok((namespace, files))
    }

    /// Values have changed that the container may have asked to hear of.
    pub(super) async fn renew(&self, changed: &[(v1::SecretKind, String)]) {
        let spec = self.assignment.as_ref().and_then(|assignment| assignment.spec.as_ref());
        let Some(spec) = spec.filter(|_| self.lifecycle.phase() == Phase::Running) else { return };
        let (signal, errors) = self.shared.secrets.renew(&self.id, spec, changed);
        for error in errors {
            tracing::warn!(container = self.id, %error, "a container does not have the newest secrets");
        }
        if let Some(signal) = signal {
            self.signal(signal, false).await;
        }
    }

    pub(super) async fn start(&self) -> Result<(), Ending> {
        let failed = |error: runtime::Error| Ending::Failed(error.to_string());
        let began = Instant::now();
        let owner = self.assignment.as_ref().map_or((String::new(), 0), |a| (a.service_id.clone(), a.slot));
        let output = self.shared.logs.uri(&self.id, owner.0, owner.1);
        let output = output.map_err(|error| Ending::Failed(format!("its log cannot be kept: {error}")))?;
        let limit = self.shared.node.runtime_timeout;
        let late = async |what: &str| Ending::Failed(self.end_shim(what).await);
        let created = tokio::time::timeout(limit, self.shared.containerd.create_task(&self.id, &output)).await;
        let pid = match created {
            Ok(created) => created.map_err(failed),
            Err(_) => Err(late("create").await),
        };
        let pid = pid.inspect_err(|_| self.shared.timings.failed("create"))?;
        let created = began.elapsed();
        // Whatever becomes of its start.
        self.note(|status| status.pid = pid);
        self.shared.timings.phase(RuntimePhase::Create, created);
        let began = Instant::now();
        let started = tokio::time::timeout(limit, self.shared.containerd.start_task(&self.id)).await;
        let started = match started {
            Ok(started) => started.map_err(failed),
            Err(_) => Err(late("start").await),
        };
        started.inspect_err(|_| self.shared.timings.failed("start"))?;
        let started = began.elapsed();
        self.shared.timings.phase(RuntimePhase::Start, started);
        self.note(|status| {
            let runtime = status.runtime.get_or_insert_default();
            runtime.create_nanos = created.as_nanos() as u64;
            runtime.start_nanos = started.as_nanos() as u64;
        });
        Ok(())
    }
}
