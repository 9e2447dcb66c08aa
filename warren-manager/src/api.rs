//! The gRPC API: one file a resource. Errors become status codes in one place; every call is counted and timed in one layer.

mod cluster;
mod containers;
mod events;
mod exec;
mod health;
mod layer;
mod lock;
mod logs;
mod lookup;
mod nodes;
mod operators;
mod pages;
pub mod pinning;
mod raft;
mod secrets;
mod services;
mod stats;
mod volumes;

use std::sync::Arc;

use warren_proto::v1::{
    cluster_server::ClusterServer, containers_server::ContainersServer, dispatcher_server::DispatcherServer,
    events_server::EventsServer, exec_server::ExecServer, lock_server::LockServer, logs_server::LogsServer,
    nodes_server::NodesServer, operators_server::OperatorsServer, raft_server::RaftServer,
    secrets_server::SecretsServer, services_server::ServicesServer, stats_server::StatsServer,
    volumes_server::VolumesServer,
};

pub use layer::MetricsLayer;

pub use crate::error::{Error, status};
use crate::{
    access::peers::MAX_MESSAGE,
    agents::{Dispatcher, Relay},
    api::pinning::Pinning,
    clock::Environment,
    control::liveness::Liveness,
    messages::validate::Policy,
    metrics::ManagerMetrics,
    store::Store,
    telemetry::feed::Feed,
    trust::vault::Vault,
};

/// What every resource's service needs.
#[derive(Clone, Debug)]
pub struct Context {
    /// The state.
    pub store: Store,
    /// Who is alive.
    pub liveness: Liveness,
    /// The manager's instruments.
    pub metrics: Arc<ManagerMetrics>,
    /// Time and chance.
    pub environment: Arc<dyn Environment>,
    /// What services may ask for.
    pub policy: Policy,
    /// Who is asked what an image's name means.
    pub registries: Arc<dyn Pinning>,
    /// What opens secrets.
    pub vault: Vault,
}

/// A secret that is far too large is refused in words, too.
const MAX_SECRET_REQUEST: usize = 16 << 20;

/// What the API serves, as encoded descriptors.
const DESCRIPTORS: [&[u8]; 3] = [
    warren_proto::FILE_DESCRIPTOR_SET,
    tonic_health::pb::FILE_DESCRIPTOR_SET,
    tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
];

/// Bytes of a message to what strangers may call, too: a request for a certificate and a token are a tenth of that. What is larger is
/// refused by its length, before there is room for it.
const MAX_NEWCOMER: usize = 64 << 10;

/// All services of the API.
#[must_use]
pub(crate) fn router(context: &Context, dispatcher: Dispatcher, relay: Relay, feed: Feed) -> tonic::service::Routes {
    let mut routes = tonic::service::Routes::builder();
    let (health_reporter, health) = tonic_health::server::health_reporter();
    // The empty name, which stands for all of them, is serving from the start.
    drop(health_reporter);
    routes
        .add_service(
            ServicesServer::new(services::Services(context.clone())).max_decoding_message_size(MAX_SECRET_REQUEST),
        )
        .add_service(ContainersServer::new(containers::Containers(context.clone())))
        .add_service(NodesServer::new(nodes::Nodes::new(context.clone())))
        .add_service(
            SecretsServer::new(secrets::Secrets(context.clone())).max_decoding_message_size(MAX_SECRET_REQUEST),
        )
        .add_service(LogsServer::new(logs::Logs(context.clone(), relay.clone())))
        .add_service(ExecServer::new(exec::Exec(context.clone(), relay.clone())))
        .add_service(StatsServer::new(stats::Stats(context.clone(), relay)))
        .add_service(VolumesServer::new(volumes::Volumes(context.clone())))
        .add_service(ClusterServer::new(cluster::Cluster(context.clone())).max_decoding_message_size(MAX_NEWCOMER))
        .add_service(OperatorsServer::new(operators::Operators(context.clone())))
        .add_service(LockServer::new(lock::Open))
        .add_service(EventsServer::new(events::Events(context.clone(), feed)))
        .add_service(
            RaftServer::new(raft::Raft(context.store.raft().clone()))
                .max_decoding_message_size(MAX_MESSAGE)
                .max_encoding_message_size(MAX_MESSAGE),
        )
        .add_service(DispatcherServer::new(dispatcher))
        .add_service(health.max_decoding_message_size(MAX_NEWCOMER));
    // It knows its own description.
    let [own, health, _] = DESCRIPTORS;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(own)
        .register_encoded_file_descriptor_set(health)
        .build_v1();
    match reflection {
        Ok(reflection) => drop(routes.add_service(reflection)),
        Err(error) => tracing::error!(%error, "reflection is not served"),
    }
    routes.routes()
}
