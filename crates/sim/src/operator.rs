//! Operators: they create, change, look at and delete services, at whatever manager, and remember what they were told.

use std::time::Duration;

use rand::{Rng as _, SeedableRng as _, rngs::SmallRng, seq::SliceRandom as _};
use tonic::{Code, Status};
use warren_proto::v1::{self, service_spec::Mode, services_client::ServicesClient};

use crate::{
    history::{Call, Operation, Outcome},
    network,
    shared::Shared,
};

/// Services that operators quarrel about.
const SERVICES: usize = 12;
/// After this an operator no longer knows what became of a call.
const PATIENCE: Duration = Duration::from_secs(3);

fn spec(name: &str, replicas: u32) -> v1::ServiceSpec {
    v1::ServiceSpec {
        name: name.to_owned(),
        mode: Some(Mode::Replicated(v1::Replicated { replicas: replicas.into() })),
        container: Some(v1::ContainerSpec { image: "demo".to_owned(), ..Default::default() }),
        ..Default::default()
    }
}

fn replicas(service: Option<v1::Service>) -> Option<u32> {
    match service?.spec?.mode? {
        Mode::Replicated(replicated) => u32::try_from(replicated.replicas).ok(),
        Mode::Global(_) => None,
    }
}

/// Works until the faults end.
pub(crate) async fn run(number: u64, seed: u64, shared: Shared) -> turmoil::Result {
    let mut dice = SmallRng::seed_from_u64(seed ^ 0x0e7a ^ (number << 40));
    while !shared.is_calm() {
        tokio::time::sleep(Duration::from_millis(dice.random_range(20..400))).await;
        let mut managers = shared.manager_names();
        managers.shuffle(&mut dice);
        let key = format!("svc-{}", dice.random_range(0..SERVICES));
        let operation = match dice.random_range(0..10) {
            0..3 => Operation::Create(dice.random_range(1..6)),
            3..6 => Operation::Set(dice.random_range(1..6)),
            6 => Operation::Delete,
            _ => Operation::Read,
        };
        let called = turmoil::sim_elapsed().unwrap_or_default();
        let outcome = tokio::time::timeout(PATIENCE, call_any(&managers, &key, operation)).await;
        let outcome = outcome.unwrap_or(Outcome::Unknown);
        let returned = turmoil::sim_elapsed().unwrap_or_default();
        shared.trace(format!("operator {number}: {key} {operation:?} {outcome:?}"));
        shared.record(Call { key, operation, outcome, called, returned });
    }
    Ok(())
}

/// Asks one after the other until one leads.
async fn call_any(managers: &[String], key: &str, operation: Operation) -> Outcome {
    for manager in managers {
        let outcome = call(manager, key, operation).await;
        if outcome != Outcome::NotDone {
            return outcome;
        }
    }
    Outcome::NotDone
}

async fn call(manager: &str, key: &str, operation: Operation) -> Outcome {
    // Nothing was asked yet.
    let Ok(channel) = network::connect(manager).await else { return Outcome::NotDone };
    let mut services = ServicesClient::new(channel);
    match operation {
        Operation::Create(replicas) => {
            let request = v1::CreateServiceRequest { spec: Some(spec(key, replicas)), request_id: String::new() };
            outcome(services.create_service(request).await.map(|_| Outcome::Done))
        }
        Operation::Set(replicas) => {
            let request = v1::UpdateServiceRequest {
                service: key.to_owned(),
                spec: Some(spec(key, replicas)),
                ..Default::default()
            };
            outcome(services.update_service(request).await.map(|_| Outcome::Done))
        }
        Operation::Delete => {
            let request = v1::DeleteServiceRequest { service: key.to_owned(), request_id: String::new() };
            outcome(services.delete_service(request).await.map(|_| Outcome::Done))
        }
        Operation::Read => {
            let read = services.get_service(v1::GetServiceRequest { service: key.to_owned() }).await;
            outcome(read.map(|answer| Outcome::Read(replicas(answer.into_inner().service))))
        }
    }
}

fn outcome(answer: Result<Outcome, Status>) -> Outcome {
    answer.unwrap_or_else(|status| match status.code() {
        Code::AlreadyExists => Outcome::Exists,
        Code::NotFound => Outcome::Absent,
        Code::Aborted => Outcome::NotDone,
        Code::Unavailable if status.message().starts_with("this manager does not lead") => Outcome::NotDone,
        _ => Outcome::Unknown,
    })
}
