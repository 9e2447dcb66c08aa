use std::sync::Arc;

use tonic::{Request, Response, Status};
use warren_proto::v1::{self, volumes_server};

use super::{Context, Error, lookup, pages::page};
use crate::{
    ids::VolumeId,
    messages::{
        convert,
        validate::{Invalid, object_name},
    },
    state::{Change, State, Transaction, Volume, needed_volumes},
};

#[derive(Clone, Debug)]
pub(super) struct Volumes(pub(super) Context);

/// Labels and options together.
const MAX_TEXT: usize = 64 << 10;
const OPTIONS: [&str; 3] = ["device", "o", "type"];

fn checked(request: &v1::CreateVolumeRequest, policy: &warren_spec::Policy) -> Result<(), Invalid> {
    object_name(&request.name)?;
    if !matches!(request.driver.as_str(), "" | "local") {
        return Err(Invalid::new("driver", format!("{:?} is not known; there is local", request.driver)));
    }
    let options = &request.driver_options;
    if let Some(unknown) = options.keys().find(|name| !OPTIONS.contains(&name.as_str())) {
        return Err(Invalid::new("driver_options", format!("{unknown:?} is not known: type, device or o")));
    }
    let text = options.iter().chain(&request.labels);
    if text.map(|(name, value)| name.len() + value.len()).sum::<usize>() > MAX_TEXT {
        return Err(Invalid::new("labels", format!("and options are longer than {MAX_TEXT} bytes together")));
    }
    if options.values().any(|value| value.contains(|c: char| c.is_control())) {
        return Err(Invalid::new("driver_options", "have control characters in them"));
    }
    let option = |name: &str| options.get(name).map(String::as_str).unwrap_or_default();
    let (kind, device) = (option("type"), option("device"));
    match kind {
        "" if !device.is_empty() || !option("o").is_empty() => {
            Err(Invalid::new("driver_options.type", "is missing: bind, tmpfs or nfs"))
        }
        "" | "tmpfs" => Ok(()),
        "bind" if !warren_spec::absolute(device) => {
            Err(Invalid::new("driver_options.device", format!("{device:?} is not an absolute path")))
        }
        "nfs" | "nfs4" if !device.contains(":/") => {
            Err(Invalid::new("driver_options.device", format!("{device:?} is not :/path or host:/path")))
        }
        "nfs" | "nfs4" if !option("o").split(',').any(|option| option.starts_with("addr=")) => {
            Err(Invalid::new("driver_options.o", "has no addr= with the server's address"))
        }
        "bind" => {
            let allowed = policy.host_path(device);
            allowed.map_err(|not| Invalid::new("driver_options.device", not.to_string()))
        }
        "nfs" | "nfs4" => Ok(()),
        other => Err(Invalid::new("driver_options.type", format!("{other:?} is not bind, tmpfs or nfs"))),
    }
}

fn shown(volume: &Volume, state: &State) -> v1::Volume {
    let uses =
        |service: &&Arc<crate::state::Service>| needed_volumes(&service.spec.container).any(|name| name == volume.name);
    let mut users: Vec<_> = state.services().filter(uses).map(|service| service.spec.name.clone()).collect();
    users.sort();
    convert::volume(volume, &users)
}

impl Volumes {
    /// A new volume, checked.
    pub(super) fn first(&self, state: &State, request: v1::CreateVolumeRequest) -> Result<Volume, Error> {
        checked(&request, &self.0.policy.containers)?;
        let node = match request.node.as_str() {
            "" => None,
            name => Some(lookup::node(state, name)?.id.clone()),
        };
        Ok(Volume {
            id: VolumeId::generate(&*self.0.environment),
            version: 0,
            name: request.name,
            options: request.driver_options,
            labels: request.labels,
            created_at: self.0.environment.now(),
            node,
            exclusive: request.exclusive,
        })
    }

    async fn create(&self, mut request: v1::CreateVolumeRequest) -> Result<v1::Volume, Error> {
        let state = self.0.store.read().await?;
        let request_id = std::mem::take(&mut request.request_id);
        let volume = self.first(&state, request)?;
        let name = volume.name.clone();
        let changes = vec![Change::CreateVolume(Box::new(volume))];
        self.0.store.transact(&Transaction { request_id, changes, ..Transaction::default() }).await?;
        let state = self.0.store.view();
        Ok(shown(&*lookup::volume(&state, &name)?, &state))
    }

    async fn delete(&self, request: v1::DeleteVolumeRequest) -> Result<(), Error> {
        let state = self.0.store.read().await?;
        if state.has_done(&request.request_id) {
            return Ok(());
        }
        let known = lookup::volume(&state, &request.volume)?;
        let changes = vec![Change::DeleteVolume { id: known.id.clone(), force: request.force }];
        self.0
            .store
            .transact(&Transaction { request_id: request.request_id, changes, ..Transaction::default() })
            .await?;
        Ok(())
    }
}

#[tonic::async_trait]
impl volumes_server::Volumes for Volumes {
    async fn create_volume(
        &self,
        request: Request<v1::CreateVolumeRequest>,
    ) -> Result<Response<v1::CreateVolumeResponse>, Status> {
        let volume = self.create(request.into_inner()).await?;
        Ok(Response::new(v1::CreateVolumeResponse { volume: Some(volume) }))
    }

    async fn get_volume_by_name(
        &self,
        request: Request<v1::GetVolumeByNameRequest>,
    ) -> Result<Response<v1::GetVolumeByNameResponse>, Status> {
        let state = self.0.store.read().await.map_err(super::status)?;
        let volume = lookup::volume(&state, &request.into_inner().volume)?;
        Ok(Response::new(v1::GetVolumeByNameResponse { volume: Some(shown(&volume, &state)) }))
    }

    async fn list_volumes(
        &self,
        request: Request<v1::ListVolumesRequest>,
    ) -> Result<Response<v1::ListVolumesResponse>, Status> {
        let request = request.into_inner();
        let state = self.0.store.read().await.map_err(super::status)?;
        let mut volumes: Vec<_> = state.volumes().map(Arc::clone).collect();
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        let key = |volume: &Arc<Volume>| volume.name.clone();
        let shown = |volume: Arc<Volume>| Ok(shown(&volume, &state));
        let (volumes, next_page_token) = page(volumes, key, (request.page_size, &request.page_token), shown)?;
        Ok(Response::new(v1::ListVolumesResponse { volumes, next_page_token }))
    }

    async fn delete_volume(
        &self,
        request: Request<v1::DeleteVolumeRequest>,
    ) -> Result<Response<v1::DeleteVolumeResponse>, Status> {
        self.delete(request.into_inner()).await?;
        Ok(Response::new(v1::DeleteVolumeResponse {}))
    }
}
