//! Operators: they create, change, look at and delete services, at whatever manager, and remember what they were told.

use std::{error::Error as _, time::Duration};

use rand::{Rng as _, SeedableRng as _, seq::SliceRandom as _};
use rand_xoshiro::Xoshiro256PlusPlus;
use tonic::{Code, Status};
use warren_proto::v1::{
    self, secrets_client::SecretsClient, service_spec::Mode, services_client::ServicesClient,
    volumes_client::VolumesClient,
};

use crate::{
    history::{Call, Operation, Outcome},
    network,
    shared::Shared,
};

/// Services that operators quarrel about, by name. Some want a port of their nodes, and some an exclusive volume, and some of these the
/// same.
const SERVICES: usize = 12;
const WITH_PORT: std::ops::Range<usize> = 0..3;
const WITH_VOLUME: std::ops::Range<usize> = 3..6;
const VOLUMES: usize = 2;
const WITH_SECRET: std::ops::Range<usize> = 6..9;
/// The secret of those; each value of it replaces their containers.
const SECRET: &str = "key";
/// What a service is set to: so many containers, and this many times another image, other resources and other ports.
const MOST_REPLICAS: u32 = 8;
const VARIANTS: u32 = 4;
/// After this an operator no longer knows what became of a call.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often a call whose outcome is not known is repeated, as what it is.
const REPEATS: usize = 2;
/// Calls of each operator that must be answered once nothing goes wrong any more.
const CALM_CALLS: u64 = 5;

fn number(name: &str) -> Option<usize> {
    name.strip_prefix("svc-")?.parse().ok()
}

/// All services that there may be.
pub(crate) fn services() -> impl Iterator<Item = String> {
    (0..SERVICES).map(|number| format!("svc-{number}"))
}

/// The port of its node that a container of this service has. Two services want the same.
fn port(service: &str, variant: u32) -> Option<u32> {
    let number = number(service).filter(|number| WITH_PORT.contains(number))?;
    Some(8000 + number as u32 % 2 + 10 * (variant % 2))
}

/// The volume that a container of this service has to itself. Two services want the same.
pub(crate) fn volume(service: &str) -> Option<String> {
    number(service).filter(|number| WITH_VOLUME.contains(number)).map(|number| format!("vol-{}", number % VOLUMES))
}

fn spec(name: &str, value: u32) -> v1::ServiceSpec {
    let (variant, replicas) = (value / MOST_REPLICAS, value % MOST_REPLICAS);
    let published = |host_port| v1::Port {
        container_port: 80,
        host_port,
        publish_mode: v1::PublishMode::Host.into(),
        ..Default::default()
    };
    let mount = |source| v1::Mount {
        r#type: v1::MountType::Volume.into(),
        source,
        target: "/data".to_owned(),
        ..Default::default()
    };
    let has_secret = number(name).is_some_and(|number| WITH_SECRET.contains(&number));
    let secret = has_secret.then(|| v1::SecretMount {
        source: SECRET.to_owned(),
        on_update: v1::OnUpdate::Restart.into(),
        ..Default::default()
    });
    v1::ServiceSpec {
        name: name.to_owned(),
        mode: Some(Mode::Replicated(v1::Replicated { replicas: replicas.into() })),
        container: Some(v1::ContainerSpec {
            image: format!("{IMAGE}{variant}"),
            mounts: volume(name).map(mount).into_iter().collect(),
            secrets: secret.into_iter().collect(),
            ..Default::default()
        }),
        resources: Some(v1::Resources {
            reservations: Some(v1::ResourceAmounts { cpu_millis: i64::from(variant) * 100, memory_bytes: 0 }),
            limits: None,
        }),
        ports: port(name, variant).map(published).into_iter().collect(),
        ..Default::default()
    }
}

/// Makes the volumes, which any node reaches.
async fn create_volumes(shared: &Shared, dice: &mut Xoshiro256PlusPlus) {
    let mut missing: Vec<String> = (0..VOLUMES).map(|number| format!("vol-{number}")).collect();
    while let Some(name) = missing.last().filter(|_| !shared.is_calm()) {
        let managers = shared.manager_names();
        let manager = &managers[dice.random_range(0..managers.len())];
        let options = [("type", "nfs"), ("device", ":/data"), ("o", "addr=192.0.2.1")];
        let request = v1::CreateVolumeRequest {
            name: name.clone(),
            driver_options: options.map(|(name, value)| (name.to_owned(), value.to_owned())).into(),
            exclusive: true,
            ..Default::default()
        };
        let asked = async {
            let channel = network::connect(manager).await.ok()?;
            Some(VolumesClient::new(channel).create_volume(request).await.map_err(|status| status.code()))
        };
        match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Some(Ok(_) | Err(Code::AlreadyExists))) => drop(missing.pop()),
            _ => tokio::time::sleep(Duration::from_millis(dice.random_range(20..200))).await,
        }
    }
}

/// What the images of services' containers are called, before their variant.
const IMAGE: &str = "demo:";

/// What a service is set to, as its image and its replicas say it.
pub(crate) fn value(image: &str, replicas: u32) -> Option<u32> {
    let variant: u32 = image.strip_prefix(IMAGE)?.parse().ok()?;
    Some(variant * MOST_REPLICAS + replicas)
}

fn value_of(service: Option<v1::Service>) -> Option<u32> {
    let spec = service?.spec?;
    match spec.mode? {
        Mode::Replicated(replicated) => value(&spec.container?.image, u32::try_from(replicated.replicas).ok()?),
        Mode::Global(_) => None,
    }
}

/// Gives the secret another value, if there is one, or else makes it. False when nobody says that it is done.
async fn set_secret(managers: &[String], dice: &mut Xoshiro256PlusPlus, shared: &Shared) -> bool {
    let data = dice.random::<[u8; 8]>().to_vec();
    let name = || SECRET.to_owned();
    let request_id = format!("{:016x}", dice.random::<u64>());
    let create = v1::CreateSecretRequest { name: name(), data: data.clone(), ..Default::default() };
    let update = v1::UpdateSecretRequest { secret: name(), data, request_id, ..Default::default() };
    for manager in managers {
        let asked = async {
            let mut secrets = SecretsClient::new(network::connect(manager).await.ok()?);
            match secrets.update_secret(update.clone()).await {
                Ok(_) => Some(true),
                Err(status) if status.code() == Code::NotFound => {
                    secrets.create_secret(create.clone()).await.ok().map(|_| true)
                }
                Err(_) => None,
            }
        };
        if let Ok(Some(_)) = tokio::time::timeout(PATIENCE, asked).await {
            shared.trace("the secret has another value".to_owned());
            return true;
        }
    }
    false
}

/// Works until the faults end, and a little longer.
pub(crate) async fn run(number: u64, seed: u64, shared: Shared) -> turmoil::Result {
    let mut dice = Xoshiro256PlusPlus::seed_from_u64(seed ^ 0x0e7a ^ (number << 40));
    while !set_secret(&shared.manager_names(), &mut dice, &shared).await {
        tokio::time::sleep(Duration::from_millis(dice.random_range(20..200))).await;
    }
    create_volumes(&shared, &mut dice).await;
    let mut left = CALM_CALLS;
    while left > 0 {
        tokio::time::sleep(Duration::from_millis(dice.random_range(20..400))).await;
        let mut managers = shared.manager_names();
        managers.shuffle(&mut dice);
        if dice.random_range(0..20) == 0 {
            set_secret(&managers, &mut dice, &shared).await;
        }
        let key = format!("svc-{}", dice.random_range(0..SERVICES));
        // Of those that share a volume only one can run.
        let most = if volume(&key).is_some() { 1 } else { 5 };
        let value = dice.random_range(1..=most) + MOST_REPLICAS * dice.random_range(0..VARIANTS);
        let operation = match dice.random_range(0..10) {
            0..3 => Operation::Create(value),
            3..6 => Operation::Set(value),
            6 => Operation::Delete,
            _ => Operation::Read,
        };
        let is_calm = shared.is_calm();
        let called = turmoil::sim_elapsed().unwrap_or_default();
        let request = format!("{:016x}", dice.random::<u64>());
        let outcome = call_until_known(&managers, &Asked { key: &key, operation, request, shared: &shared }).await;
        let returned = turmoil::sim_elapsed().unwrap_or_default();
        shared.trace(format!("operator {number}: {key} {operation:?} {outcome:?}"));
        if is_calm && outcome.is_known() {
            left -= 1;
        }
        shared.record(Call { key, operation, outcome, called, returned });
    }
    shared.operator_is_done();
    Ok(())
}

/// What an operator asks for.
struct Asked<'a> {
    key: &'a str,
    operation: Operation,
    /// What tells its repetitions from other requests.
    request: String,
    shared: &'a Shared,
}

/// Repeats a call whose outcome is not known: what was done by the first is not done again by the second.
async fn call_until_known(managers: &[String], asked: &Asked<'_>) -> Outcome {
    let mut outcome = tokio::time::timeout(PATIENCE, call_any(managers, asked)).await.unwrap_or(Outcome::Unknown);
    for _ in 0..REPEATS {
        if outcome != Outcome::Unknown {
            break;
        }
        let repeated = tokio::time::timeout(PATIENCE, call_any(managers, asked)).await.unwrap_or(Outcome::Unknown);
        // The first may be under way still, whatever the second was refused for.
        if matches!((asked.operation, repeated), (Operation::Read, _) | (_, Outcome::Done)) {
            outcome = repeated;
        }
    }
    outcome
}

/// Asks one after the other until one leads.
async fn call_any(managers: &[String], asked: &Asked<'_>) -> Outcome {
    for manager in managers {
        let outcome = call(manager, asked).await;
        if outcome != Outcome::NotDone {
            return outcome;
        }
    }
    Outcome::NotDone
}

async fn call(manager: &str, asked: &Asked<'_>) -> Outcome {
    let Asked { key, operation, request, shared } = asked;
    let (key, request_id) = (*key, request.clone());
    let outcome = |answer: Result<Outcome, Status>| answer.unwrap_or_else(|status| refused(&status, shared));
    // Nothing was asked yet.
    let Ok(channel) = network::connect(manager).await else { return Outcome::NotDone };
    let mut services = ServicesClient::new(channel);
    match *operation {
        Operation::Create(value) => {
            let request = v1::CreateServiceRequest { spec: Some(spec(key, value)), request_id };
            outcome(services.create_service(request).await.map(|_| Outcome::Done))
        }
        Operation::Set(value) => {
            let request = v1::UpdateServiceRequest {
                service: key.to_owned(),
                spec: Some(spec(key, value)),
                version: 0,
                request_id,
                restart: false,
            };
            outcome(services.update_service(request).await.map(|_| Outcome::Done))
        }
        Operation::Delete => {
            let request = v1::DeleteServiceRequest { service: key.to_owned(), request_id };
            outcome(services.delete_service(request).await.map(|_| Outcome::Done))
        }
        Operation::Read => {
            let read = services.get_service(v1::GetServiceRequest { service: key.to_owned() }).await;
            outcome(read.map(|answer| Outcome::Read(value_of(answer.into_inner().service))))
        }
    }
}

fn refused(status: &Status, shared: &Shared) -> Outcome {
    match status.code() {
        // Where another service has the port on the same node.
        Code::AlreadyExists if status.message().starts_with("spec.ports") => Outcome::NotDone,
        Code::AlreadyExists => Outcome::Exists,
        Code::NotFound => Outcome::Absent,
        Code::Aborted => Outcome::NotDone,
        Code::Unavailable if status.message().starts_with("this manager does not lead") => Outcome::NotDone,
        // The connection has ended, or the manager does not know.
        _ if status.source().is_some() => Outcome::Unknown,
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => Outcome::Unknown,
        code => {
            shared.fail(format!("an operator was told {code:?}: {}", status.message()));
            Outcome::Unknown
        }
    }
}
