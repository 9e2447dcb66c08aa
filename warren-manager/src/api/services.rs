use std::{collections::BTreeSet, sync::Arc, time::Instant};

use prost::Message as _;
use tokio::task::JoinSet;
use tonic::{Request, Response, Status, Streaming};
use warren_proto::v1::{self, services_server};
use warren_registry::Credentials;
use warren_spec::{ImageName, InvalidImageName};

use super::{Context, Error, lookup, pages::page, secrets::Secrets, volumes::Volumes};
use crate::{
    ids::{NodeId, ServiceId},
    messages::{convert, validate},
    state::{Change, Expected, Mode, Node, Rejection, Service, ServiceSpec, State, Transaction, protocol_name},
    store,
};

#[derive(Clone, Debug)]
pub(super) struct Services(pub(super) Context);

/// Thousands of them are remembered.
const MAX_REQUEST_ID: usize = 64;

impl Services {
    async fn write(&self, request_id: String, change: Change) -> Result<(), Error> {
        if request_id.len() > MAX_REQUEST_ID {
            let why = format!("is longer than {MAX_REQUEST_ID} bytes");
            return Err(validate::Invalid::new("request_id", why).into());
        }
        self.0.store.transact(&Transaction { request_id, changes: vec![change], ..Transaction::default() }).await?;
        Ok(())
    }

    /// Who asks the registry: whom the service's secret names.
    fn credentials(&self, container: &v1::ContainerSpec, image: &ImageName) -> Result<Credentials, Error> {
        const FIELD: &str = "spec.container.registry_secret";
        if container.registry_secret.is_empty() {
            return Ok(Credentials::Anonymous);
        }
        let state = self.0.store.view();
        let missing = || validate::Invalid::new(FIELD, format!("there is no secret {:?}", container.registry_secret));
        let secret = state.secret_named(v1::SecretKind::Secret, &container.registry_secret).ok_or_else(missing)?;
        let value = self.0.vault.open_sealed(&secret.id, secret.sequence, &secret.sealed)?;
        let parsed = Credentials::parse(&value, image.registry());
        Ok(parsed.map_err(|error| validate::Invalid::new(FIELD, error.to_string()))?)
    }

    /// The spec with its image's digest: that of the spec before if the image has not changed, else what the registry says.
    async fn pinned(&self, mut spec: ServiceSpec, before: Option<&ServiceSpec>) -> Result<ServiceSpec, Error> {
        const FIELD: &str = "spec.container.image";
        let container = Arc::make_mut(&mut spec.container);
        container.image_digest = match before.filter(|before| before.container.image == container.image) {
            Some(before) => before.container.image_digest.clone(),
            None if container.pull_policy() == v1::PullPolicy::Never => String::new(),
            None => {
                let image = container.image.parse::<ImageName>();
                let image =
                    image.map_err(|error: InvalidImageName| validate::Invalid::new(FIELD, error.to_string()))?;
                let credentials = self.credentials(container, &image)?;
                let digest = self.0.registries.digest(&image, &credentials).await;
                digest.map_err(|error| validate::Invalid::new(FIELD, error.to_string()))?.unwrap_or_default()
            }
        };
        Ok(spec)
    }

    /// Whether a validated spec can be a service's in this state, and on these nodes. `before` is what it is now.
    fn check(&self, state: &State, spec: &ServiceSpec, before: Option<&ServiceSpec>) -> Result<(), Error> {
        Self::check_schema(state, spec)?;
        Self::check_variables(state, spec)?;
        Self::check_names(state, spec, before)?;
        self.check_ports(state, spec, before)
    }

    /// Whether every manager can read what the spec has: while one is of an earlier version, new things wait.
    fn check_schema(state: &State, spec: &ServiceSpec) -> Result<(), Error> {
        match spec.since() {
            Some((since, field)) if state.schema() < since => Err(validate::Invalid::new(
                field,
                "needs all managers to be of this version: see `warren cluster info`",
            )
            .into()),
            _ => Ok(()),
        }
    }

    /// Whether the secrets that a service wants as variables fit into one each.
    fn check_variables(state: &State, spec: &ServiceSpec) -> Result<(), Error> {
        const LONGEST: u64 = warren_spec::MAX_STRING as u64;
        let lists = [
            ("secrets", v1::SecretKind::Secret, &spec.container.secrets),
            ("configs", v1::SecretKind::Config, &spec.container.configs),
        ];
        for (list, kind, mounts) in lists {
            for (i, mount) in mounts.iter().enumerate().filter(|(_, mount)| !mount.env.is_empty()) {
                let size = state.secret_named(kind, &mount.source).map_or(0, |secret| secret.size);
                if size + 1 + mount.env.len() as u64 > LONGEST {
                    let why = format!(
                        "{:?} has {size} bytes: with its name a variable has {LONGEST} at the most",
                        mount.source
                    );
                    return Err(validate::Invalid::new(format!("spec.container.{list}[{i}].env"), why).into());
                }
            }
        }
        Ok(())
    }

    /// Whether containers would have names that are too long, or another's: `web-1` is the first container of `web`.
    fn check_names(state: &State, spec: &ServiceSpec, before: Option<&ServiceSpec>) -> Result<(), Error> {
        const FIELD: &str = "spec.name";
        /// Of a DNS label.
        const MAX_LABEL: usize = 63;
        let slots = |mode: Mode| if let Mode::Replicated(replicas) = mode { replicas } else { 0 };
        let replicas = slots(spec.mode);
        if before.is_some_and(|before| before.name == spec.name && slots(before.mode) >= replicas) {
            return Ok(());
        }
        let longest = spec.name.len() + 1 + replicas.to_string().len();
        if replicas > 0 && longest > MAX_LABEL {
            let why = format!(
                "is too long: its containers are called {}-{replicas} and so on, and a name may have {MAX_LABEL} characters",
                spec.name
            );
            return Err(validate::Invalid::new(FIELD, why).into());
        }
        let own = before.and_then(|before| state.service_named(&before.name)).map(|own| own.id.clone());
        // The service that has a container of this name, if there is one.
        let slot_of = |name: &str| {
            let (service, slot) = name.rsplit_once('-')?;
            let plain = !slot.starts_with('0') && slot.bytes().all(|byte| byte.is_ascii_digit());
            Some((service.to_owned(), slot.parse::<u32>().ok().filter(|_| plain)?))
        };
        if let Some((service, slot)) = slot_of(&spec.name)
            && let Some(other) = state.service_named(&service).filter(|other| Some(&other.id) != own.as_ref())
            && slot <= slots(other.spec.mode)
        {
            let why = format!("{:?} is a container of service {service:?}", spec.name);
            return Err(validate::Invalid::new(FIELD, why).into());
        }
        let clashes = |other: &&Arc<Service>| {
            Some(&other.id) != own.as_ref()
                && slot_of(&other.spec.name).is_some_and(|(service, slot)| service == spec.name && slot <= replicas)
        };
        if let Some(other) = state.services().find(clashes) {
            let why = format!("one of its containers would be called like service {:?}", other.spec.name);
            return Err(validate::Invalid::new(FIELD, why).into());
        }
        Ok(())
    }

    /// Whether the ports that a service is to publish, and did not before, are anybody's already: Warren's own, or a process's of a
    /// node. Other services' are the state's to check.
    fn check_ports(&self, state: &State, spec: &ServiceSpec, before: Option<&ServiceSpec>) -> Result<(), Error> {
        /// Agents' metrics, VXLAN and WireGuard, wherever they are not set otherwise.
        const OWN: [(u32, v1::Protocol, &str); 3] = [
            (9465, v1::Protocol::Tcp, "the agents' metrics"),
            (4789, v1::Protocol::Udp, "the overlay between nodes"),
            (51820, v1::Protocol::Udp, "the encrypted overlay between nodes"),
        ];
        let [api, metrics] = self.0.policy.own_ports.map(u32::from);
        let managers =
            [(api, v1::Protocol::Tcp, "the managers' API"), (metrics, v1::Protocol::Tcp, "the managers' metrics")];
        let nodes: Vec<_> = state.nodes().filter(|node| self.0.liveness.health(&node.id).is_reachable()).collect();
        for (i, port) in spec.ports.iter().enumerate().filter(|(_, port)| port.host_port != 0) {
            let (number, protocol) = (port.host_port, port.protocol());
            let is_alike = |other: &&v1::Port| (other.host_port, other.protocol()) == (number, protocol);
            if before.is_some_and(|before| before.ports.iter().find(is_alike).is_some()) {
                continue;
            }
            let shown = format!("{number}/{}", protocol_name(port));
            let taken = |why: String| validate::Invalid::new(format!("spec.ports[{i}].host_port"), why);
            if let Some((.., what)) = managers.iter().chain(&OWN).find(|own| (own.0, own.1) == (number, protocol)) {
                return Err(taken(format!("{shown} is Warren's own: {what}")).into());
            }
            let listens = |node: &&&Arc<Node>| self.0.liveness.listens(&node.id, number, protocol);
            let listening = nodes.iter().filter(listens).count();
            // On its nodes alone, one that is free will do.
            let is_taken = if port.publish_mode() == v1::PublishMode::Host {
                listening > 0 && listening == nodes.len()
            } else {
                listening > 0
            };
            if let Some(node) = nodes.iter().find(listens).filter(|_| is_taken) {
                let hostname = &node.description.hostname;
                return Err(taken(format!("a process of node {hostname} listens on {shown}")).into());
            }
            // What publishes a port follows the service at once, and not only its next containers: where both run it would be both's.
            let own = before.and_then(|before| state.service_named(&before.name));
            let shares = |other: &&Arc<Service>| {
                let theirs = other.spec.node_ports().any(|theirs| is_alike(&theirs));
                theirs && own.is_some_and(|own| own.id != other.id && share_a_node(state, own, other))
            };
            if let Some(other) = state.services().find(shares) {
                let service = other.spec.name.clone();
                return Err(store::Error::Rejected(Rejection::PortTaken { port: shown, service }).into());
            }
        }
        Ok(())
    }

    fn wire(&self, service: &Service, state: &State) -> v1::Service {
        convert::service(service, state, |node| self.0.liveness.health(node))
    }

    /// A service as it is now.
    fn shown(&self, name: &str) -> Result<v1::Service, Error> {
        let state = self.0.store.view();
        Ok(self.wire(&*lookup::service(&state, name)?, &state))
    }

    async fn create(&self, request: v1::CreateServiceRequest) -> Result<v1::Service, Error> {
        let spec = self.pinned(validate::service_spec(request.spec, &self.0.policy)?, None).await?;
        // A client that repeats a request after a lost answer is answered with what it made.
        let known = self.0.store.read().await?;
        if !known.has_done(&request.request_id) {
            self.check(&known, &spec, None)?;
        }
        let name = spec.name.clone();
        let change = self.first(spec);
        self.write(request.request_id, change).await?;
        self.shown(&name)
    }

    async fn update(&self, request: v1::UpdateServiceRequest) -> Result<v1::Service, Error> {
        let spec = validate::service_spec(request.spec, &self.0.policy)?;
        let state = self.0.store.read().await?;
        if state.has_done(&request.request_id) {
            // Repeated after a lost answer; a service that was renamed is no longer found as it was named.
            return self.shown(&spec.name).or_else(|_| self.shown(&request.service));
        }
        let known = lookup::service(&state, &request.service)?;
        self.check(&state, &spec, Some(&known.spec))?;
        let spec = self.pinned(spec, Some(&known.spec)).await?;
        let change = self.next(&known, spec, request.version, request.restart);
        self.write(request.request_id, change).await?;
        self.shown(known.id.as_str())
    }

    /// What creates a service.
    fn first(&self, spec: ServiceSpec) -> Change {
        let now = self.0.environment.now();
        let service = Service {
            id: ServiceId::generate(&*self.0.environment),
            version: 0,
            created_at: now,
            updated_at: now,
            generation: 1,
            virtual_index: 0,
            spec,
        };
        Change::PutService { service: Box::new(service), expected: Expected::Absent }
    }

    /// What gives a service another spec.
    fn next(&self, known: &Service, spec: ServiceSpec, version: u64, restart: bool) -> Change {
        let service = Service {
            updated_at: self.0.environment.now(),
            generation: known.generation + u64::from(restart || runs_something_else(&known.spec, &spec)),
            spec,
            ..Service::clone(known)
        };
        // Without a version of the caller's, what this read saw still must not be overwritten unseen.
        let expected = if version == 0 { known.version } else { version };
        Change::PutService { service: Box::new(service), expected: Expected::Version(expected) }
    }

    /// What would make an object, in a state that is not there yet. `None` where it is as it is.
    fn planned(&self, state: &State, object: v1::validate_objects_request::Object) -> Result<Option<Change>, Error> {
        use v1::validate_objects_request::Object;

        match object {
            Object::Service(spec) => {
                let spec = validate::service_spec(Some(spec), &self.0.policy)?;
                let known = state.service_named(&spec.name).cloned();
                self.check(state, &spec, known.as_ref().map(|known| &known.spec))?;
                Ok(Some(match known {
                    Some(known) => self.next(&known, spec, 0, false),
                    None => self.first(spec),
                }))
            }
            Object::Secret(request) => {
                let (secret, known) = (Secrets(self.0.clone()).first(request)?, state);
                let is_there = known.secret_named(secret.kind, &secret.name).is_some();
                let change = Change::PutSecret { secret: Box::new(secret), expected: Expected::Absent };
                Ok((!is_there).then_some(change))
            }
            Object::Volume(request) => {
                let volume = Volumes(self.0.clone()).first(state, request)?;
                let is_there = state.volume_named(&volume.name).is_some();
                Ok((!is_there).then(|| Change::CreateVolume(Box::new(volume))))
            }
        }
    }

    /// What would be refused of objects that are made one after the other. Registries are asked of all images at once: slow ones do not
    /// add up.
    async fn refused(
        &self,
        objects: Vec<v1::validate_objects_request::Object>,
    ) -> Result<Vec<v1::InvalidObject>, Error> {
        let now = self.0.store.read().await?;
        let mut state = now.clone();
        let mut invalid = Vec::new();
        let mut images = JoinSet::new();
        // Credentials that come with it are not those that are there.
        let renewed = objects.iter().filter_map(|object| match object {
            v1::validate_objects_request::Object::Secret(request) => Some(request.name.clone()),
            _ => None,
        });
        let renewed: BTreeSet<String> = renewed.collect();
        for (index, object) in (0..).zip(objects) {
            let planned = self.planned(&state, object).and_then(|change| {
                let Some(change) = change else { return Ok(()) };
                if let Change::PutService { service, .. } = &change {
                    let before = now.service_named(&service.spec.name).map(|known| known.spec.clone());
                    let (services, spec) = (self.clone(), service.spec.clone());
                    // With whose credentials, is not known before there are any.
                    let secret = &spec.container.registry_secret;
                    let is_known =
                        now.secret_named(v1::SecretKind::Secret, secret).is_some() && !renewed.contains(secret);
                    if secret.is_empty() || is_known {
                        images.spawn(async move { (index, services.pinned(spec, before.as_ref()).await.map(drop)) });
                    }
                }
                let next = state.revision() + 1;
                let transaction = Transaction { changes: vec![change], ..Transaction::default() };
                state.apply(next, &transaction).map(drop).map_err(|rejected| store::Error::Rejected(rejected).into())
            });
            if let Err(error) = planned {
                invalid.push(refusal(index, &error));
            }
        }
        while let Some(asked) = images.join_next().await {
            if let Ok((index, Err(error))) = asked
                && invalid.iter().all(|known: &v1::InvalidObject| known.index != index)
            {
                invalid.push(refusal(index, &error));
            }
        }
        invalid.sort_by_key(|object| object.index);
        Ok(invalid)
    }

    async fn delete(&self, request: v1::DeleteServiceRequest) -> Result<(), Error> {
        let state = self.0.store.read().await?;
        if state.has_done(&request.request_id) {
            return Ok(());
        }
        let known = lookup::service(&state, &request.service)?;
        let change = Change::DeleteService { id: known.id.clone(), expected: Expected::Any, ports_stay: true };
        self.write(request.request_id, change).await
    }
}

/// What is wrong with an object, and where.
fn refusal(index: u32, error: &Error) -> v1::InvalidObject {
    let (field, why) = match error {
        Error::Invalid(invalid) => (invalid.field.to_string(), invalid.why.clone()),
        Error::Store(store::Error::Rejected(Rejection::Unknown { field, what })) => {
            (field.clone(), format!("there is no {what}"))
        }
        Error::Store(store::Error::Rejected(Rejection::PortTaken { .. })) => {
            ("spec.ports".to_owned(), error.to_string())
        }
        other => (String::new(), other.to_string()),
    };
    v1::InvalidObject { index, field, why }
}

/// Whether a node has containers of both services.
fn share_a_node(state: &State, one: &Service, other: &Service) -> bool {
    let nodes = |service: &Service| -> BTreeSet<NodeId> {
        let own = state.containers_of(&service.id).filter(|container| container.holds_resources());
        own.filter_map(|container| container.node.clone()).collect()
    };
    !nodes(one).is_disjoint(&nodes(other))
}

/// Whether containers of the old spec must be replaced. How many there are, and what happens when one ends, they need not
/// know.
fn runs_something_else(old: &ServiceSpec, new: &ServiceSpec) -> bool {
    // As an earlier manager has stored it.
    let mut container = v1::ContainerSpec::clone(&old.container);
    validate::say_in_full(&mut container);
    (&container, &old.resources, &old.name) != (&*new.container, &new.resources, &new.name)
}

#[tonic::async_trait]
impl services_server::Services for Services {
    async fn create_service(
        &self,
        request: Request<v1::CreateServiceRequest>,
    ) -> Result<Response<v1::CreateServiceResponse>, Status> {
        let began = Instant::now();
        let service = self.create(request.into_inner()).await;
        self.0.metrics.service_create.record(began.elapsed().as_secs_f64());
        Ok(Response::new(v1::CreateServiceResponse { service: Some(service?) }))
    }

    async fn update_service(
        &self,
        request: Request<v1::UpdateServiceRequest>,
    ) -> Result<Response<v1::UpdateServiceResponse>, Status> {
        let began = Instant::now();
        let service = self.update(request.into_inner()).await;
        self.0.metrics.service_update.record(began.elapsed().as_secs_f64());
        Ok(Response::new(v1::UpdateServiceResponse { service: Some(service?) }))
    }

    async fn validate_objects(
        &self,
        request: Request<Streaming<v1::ValidateObjectsRequest>>,
    ) -> Result<Response<v1::ValidateObjectsResponse>, Status> {
        /// A file of manifests with more is a mistake.
        const MOST: usize = 10_000;
        const MOST_BYTES: usize = 64 << 20;
        let mut from = request.into_inner();
        let (mut objects, mut bytes) = (Vec::new(), 0);
        while let Some(message) = from.message().await? {
            bytes += message.encoded_len();
            objects.extend(message.object);
            if objects.len() > MOST || bytes > MOST_BYTES {
                let why = format!("are more than {MOST}, or larger than {MOST_BYTES} bytes together");
                return Err(Error::from(validate::Invalid::new("object", why)).into());
            }
        }
        let invalid = self.refused(objects).await?;
        Ok(Response::new(v1::ValidateObjectsResponse { invalid }))
    }

    async fn delete_service(
        &self,
        request: Request<v1::DeleteServiceRequest>,
    ) -> Result<Response<v1::DeleteServiceResponse>, Status> {
        let began = Instant::now();
        let deleted = self.delete(request.into_inner()).await;
        self.0.metrics.service_delete.record(began.elapsed().as_secs_f64());
        deleted?;
        Ok(Response::new(v1::DeleteServiceResponse {}))
    }

    async fn get_service(
        &self,
        request: Request<v1::GetServiceRequest>,
    ) -> Result<Response<v1::GetServiceResponse>, Status> {
        self.0.store.read().await.map_err(super::status)?;
        let service = self.shown(&request.into_inner().service)?;
        Ok(Response::new(v1::GetServiceResponse { service: Some(service) }))
    }

    async fn list_services(
        &self,
        request: Request<v1::ListServicesRequest>,
    ) -> Result<Response<v1::ListServicesResponse>, Status> {
        let request = request.into_inner();
        let state = self.0.store.read().await.map_err(super::status)?;
        let mut services: Vec<_> = state.services().map(Arc::clone).collect();
        services.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
        let key = |service: &Arc<Service>| service.spec.name.clone();
        let shown = |service: Arc<Service>| Ok(self.wire(&service, &state));
        let (services, next_page_token) = page(services, key, (request.page_size, &request.page_token), shown)?;
        Ok(Response::new(v1::ListServicesResponse { services, next_page_token }))
    }
}
