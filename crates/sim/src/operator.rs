//! Operators: they create, change, look at and delete services, at whatever manager, and remember what they were told.

use std::{error::Error as _, time::Duration};

use rand::{Rng as _, SeedableRng as _, rngs::SmallRng, seq::SliceRandom as _};
use tonic::{Code, Status};
use warren_proto::v1::{self, service_spec::Mode, services_client::ServicesClient, volumes_client::VolumesClient};

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
pub(crate) fn port(service: &str) -> Option<u32> {
    number(service).filter(|number| WITH_PORT.contains(number)).map(|number| 8000 + number as u32 % 2)
}

/// The volume that a container of this service has to itself. Two services want the same.
pub(crate) fn volume(service: &str) -> Option<String> {
    number(service).filter(|number| WITH_VOLUME.contains(number)).map(|number| format!("vol-{}", number % VOLUMES))
}

fn spec(name: &str, replicas: u32) -> v1::ServiceSpec {
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
    v1::ServiceSpec {
        name: name.to_owned(),
        mode: Some(Mode::Replicated(v1::Replicated { replicas: replicas.into() })),
        container: Some(v1::ContainerSpec {
            image: "demo".to_owned(),
            mounts: volume(name).map(mount).into_iter().collect(),
            ..Default::default()
        }),
        ports: port(name).map(published).into_iter().collect(),
        ..Default::default()
    }
}

/// Makes the volumes, which any node reaches.
async fn create_volumes(shared: &Shared, dice: &mut SmallRng) {
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

fn replicas(service: Option<v1::Service>) -> Option<u32> {
    match service?.spec?.mode? {
        Mode::Replicated(replicated) => u32::try_from(replicated.replicas).ok(),
        Mode::Global(_) => None,
    }
}

/// Works until the faults end, and a little longer.
pub(crate) async fn run(number: u64, seed: u64, shared: Shared) -> turmoil::Result {
    let mut dice = SmallRng::seed_from_u64(seed ^ 0x0e7a ^ (number << 40));
    create_volumes(&shared, &mut dice).await;
    let mut left = CALM_CALLS;
    while left > 0 {
        tokio::time::sleep(Duration::from_millis(dice.random_range(20..400))).await;
        let mut managers = shared.manager_names();
        managers.shuffle(&mut dice);
        let key = format!("svc-{}", dice.random_range(0..SERVICES));
        // Of those that share a volume only one can run.
        let most = if volume(&key).is_some() { 1 } else { 5 };
        let operation = match dice.random_range(0..10) {
            0..3 => Operation::Create(dice.random_range(1..=most)),
            3..6 => Operation::Set(dice.random_range(1..=most)),
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
        Operation::Create(replicas) => {
            let request = v1::CreateServiceRequest { spec: Some(spec(key, replicas)), request_id };
            outcome(services.create_service(request).await.map(|_| Outcome::Done))
        }
        Operation::Set(replicas) => {
            let request = v1::UpdateServiceRequest {
                service: key.to_owned(),
                spec: Some(spec(key, replicas)),
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
            outcome(read.map(|answer| Outcome::Read(replicas(answer.into_inner().service))))
        }
    }
}

fn refused(status: &Status, shared: &Shared) -> Outcome {
    match status.code() {
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
