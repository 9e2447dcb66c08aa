//! Who may call what: every method that is served, by everybody that there is.

use std::{
    error::Error as _,
    net::TcpListener,
    path::Path,
    time::{Duration, SystemTime},
};

use prost::Message as _;
use tempfile::TempDir;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status, client::Grpc, transport::Channel};
use tonic_prost::ProstCodec;
use warren_manager::{
    Options, Policy, Vault,
    control::liveness,
    core::Networks,
    data::formation,
    state::{SCHEMA, Sealed},
};
use warren_pki::{Authority, Credentials, Dialer, Identity, Request as CertificateRequest, Role, Token};
use warren_proto::v1::{
    self, agent_message, cluster_client::ClusterClient, dispatcher_client::DispatcherClient,
    events_client::EventsClient, nodes_client::NodesClient, operators_client::OperatorsClient,
    services_client::ServicesClient,
};

struct Manager {
    directory: TempDir,
    address: String,
    worker_token: Token,
    authority: Authority,
    cluster: String,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

/// What signs a cluster's certificates, from the directory of a founder who has not started yet.
fn authority(directory: &Path, cluster: &str) -> Authority {
    let founding = std::fs::read(directory.join("founding.json")).expect("a founder's");
    let founding: serde_json::Value = serde_json::from_slice(&founding).expect("JSON");
    let sealed: Sealed = serde_json::from_value(founding["authority"]["key"].clone()).expect("a key");
    let key = Vault::open(directory).expect("a vault").open_authority(cluster, &sealed).expect("its own");
    Authority::from_pem(founding["authority"]["certificate"].as_str().expect("PEM"), &key).expect("an authority")
}

impl Manager {
    async fn start() -> Self {
        Self::start_as(|_, _, _| ()).await
    }

    /// Starts one, whose directory something is done to before.
    async fn start_as(before: impl FnOnce(&Path, &Authority, &str)) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let data_dir = directory.path().join("data");
        let founded = formation::found(&data_dir, "here").expect("founded");
        let authority = authority(&data_dir, &founded.cluster_id);
        before(&data_dir, &authority, &founded.cluster_id);
        let address = format!("127.0.0.1:{}", free_port());
        let options = Options {
            hostname: "machine".to_owned(),
            data_dir,
            listen_addr: address.parse().expect("an address"),
            advertise_addr: None,
            bootstrap: false,
            socket: directory.path().join("w.sock"),
            metrics_addr: format!("127.0.0.1:{}", free_port()).parse().expect("an address"),
            unlock_key: None,
            snapshot_after: 1000,
            snapshot_after_bytes: 64 << 20,
            profile: warren_raft::Profile::Lan,
            newest_schema: SCHEMA,
            liveness: liveness::Timing {
                heartbeat: Duration::from_millis(20),
                tolerated: 3,
                ..liveness::Timing::default()
            },
            policy: Policy::default(),
            networks: Networks::default(),
            registries: warren_registry::Options::default(),
            telemetry: warren_telemetry::Options::default(),
        };
        let shutdown = CancellationToken::new();
        let (started, serving) = tokio::sync::oneshot::channel();
        let token = shutdown.clone();
        let task = tokio::spawn(async move {
            let outcome = warren_manager::run(options, token, || started.send(()).expect("the test waits")).await;
            outcome.expect("the manager starts");
        });
        serving.await.expect("the manager serves");
        let (worker_token, cluster) = (founded.worker_token, founded.cluster_id);
        Self { directory, address, worker_token, authority, cluster, shutdown, task }
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.expect("it ends");
    }

    fn identity(&self, role: Role, id: &str) -> Identity {
        Identity { cluster: self.cluster.clone(), role, id: id.to_owned() }
    }

    fn sign(&self, authority: &Authority, identity: &Identity, at: SystemTime) -> Credentials {
        let request = CertificateRequest::new().expect("a request");
        let day = Duration::from_secs(24 * 3600);
        let certificate = authority.sign(request.pem(), identity, at, day).expect("a certificate");
        Credentials::new(&request.key_pem(), &certificate, self.authority.certificate_pem()).expect("credentials")
    }

    fn dial(&self, credentials: &Credentials) -> Channel {
        Dialer::new(&self.address, credentials).expect("an address").lazy()
    }

    fn nobody(&self) -> Channel {
        Dialer::newcomer(&self.address, &self.worker_token).expect("an address").lazy()
    }

    fn root(&self) -> Channel {
        Dialer::socket(self.directory.path().join("w.sock")).expect("a path").lazy()
    }

    /// Comes with a token, but not for what it is not to be for.
    async fn come(
        &self,
        token: &Token,
        not: &[v1::Role],
    ) -> Result<(v1::JoinClusterResponse, CertificateRequest), Status> {
        let request = CertificateRequest::new().expect("a request");
        let asked = v1::JoinClusterRequest {
            secret: token.secret(),
            certificate_request: request.pem().to_owned(),
            taken: not.iter().map(|role| i32::from(*role)).collect(),
            ..Default::default()
        };
        let joined = ClusterClient::new(self.nobody()).join_cluster(asked).await?.into_inner();
        Ok((joined, request))
    }

    async fn invite(&self, name: &str) -> Token {
        let request = v1::CreateOperatorRequest { name: name.to_owned(), lifetime: None };
        let made = OperatorsClient::new(self.root()).create_operator(request).await.expect("invited").into_inner();
        assert_eq!(made.managers, [self.address.as_str()]);
        made.token.parse().expect("a token")
    }

    /// Lets an operator in as `warren login` does.
    async fn log_in(&self, name: &str) -> Credentials {
        let (joined, request) = self.come(&self.invite(name).await, &[]).await.expect("let in");
        assert_eq!(joined.role(), v1::Role::Admin);
        assert!(joined.key_of_secrets.is_empty(), "an operator opens no secrets");
        Credentials::new(&request.key_pem(), &joined.certificate, &joined.authorities).expect("credentials")
    }

    /// Lets a node in as `warren cluster join` does.
    async fn join(&self) -> (String, Credentials) {
        let (joined, request) = self.come(&self.worker_token, &[]).await.expect("let in");
        assert_eq!(joined.role(), v1::Role::Worker);
        assert!(joined.key_of_secrets.is_empty(), "a node opens no secrets itself");
        let credentials = Credentials::new(&request.key_pem(), &joined.certificate, &joined.authorities);
        (joined.id, credentials.expect("credentials"))
    }
}

/// `/package.Service/Method` of everything that is served.
fn methods() -> Vec<String> {
    let sets = [
        warren_proto::FILE_DESCRIPTOR_SET,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
    ];
    let files = sets.into_iter().flat_map(|set| prost_types::FileDescriptorSet::decode(set).expect("descriptors").file);
    files
        .flat_map(|file| {
            let package = file.package().to_owned();
            let path = move |service: &str, method: &str| format!("/{package}.{service}/{method}");
            let services = file.service.clone();
            services
                .into_iter()
                .flat_map(|service| {
                    let name = service.name().to_owned();
                    service.method.into_iter().map(move |method| (name.clone(), method.name().to_owned()))
                })
                .map(move |(service, method)| path(&service, &method))
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Calls a method with an empty message; one that goes on for ever has been let in.
async fn call(channel: &Channel, path: &str) -> Result<(), Status> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = path.parse().expect("a path");
    let called = grpc.unary::<(), (), _>(Request::new(()), path, ProstCodec::default());
    match tokio::time::timeout(Duration::from_millis(300), called).await {
        Ok(answer) => answer.map(drop),
        Err(_) => Ok(()),
    }
}

/// Whether the caller was turned away before anybody looked at what they want.
fn is_turned_away(answer: &Result<(), Status>, code: Code) -> bool {
    let at_the_door = |message: &str| message.starts_with("the role ") || message.starts_with("this needs a ");
    answer.as_ref().is_err_and(|status| status.code() == code && at_the_door(status.message()))
}

/// Methods that are for those without a certificate, for nodes, and for managers. All others are for operators and root.
const EVERYBODY: [&str; 2] = ["/warren.v1.Cluster/JoinCluster", "/grpc.health.v1.Health/Check"];
const MEMBERS: [&str; 5] = [
    "/grpc.health.v1.Health/Watch",
    "/warren.v1.Cluster/GetClusterInfo",
    "/warren.v1.Cluster/RequestCertificate",
    "/warren.v1.Cluster/ConfirmAuthorities",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
];
const NODES: [&str; 5] = [
    "/warren.v1.Nodes/RegisterNode",
    "/warren.v1.Dispatcher/Session",
    "/warren.v1.Dispatcher/UploadLogs",
    "/warren.v1.Dispatcher/UploadStats",
    "/warren.v1.Dispatcher/ServeExec",
];
const MANAGERS: [&str; 2] = ["/warren.v1.Cluster/EnterManager", "/warren.v1.Raft/Exchange"];

#[tokio::test]
async fn everybody_may_call_what_is_for_them_and_nothing_else() {
    let manager = Manager::start().await;
    let now = SystemTime::now();
    let (id, worker) = manager.join().await;
    let own = Credentials::load(&manager.directory.path().join("data/identity")).expect("readable").expect("there");
    let callers: [(&str, Channel, Code, Vec<&str>); 3] = [
        ("nobody", manager.nobody(), Code::Unauthenticated, EVERYBODY.to_vec()),
        ("a node", manager.dial(&worker), Code::PermissionDenied, [&EVERYBODY[..], &MEMBERS, &NODES].concat()),
        ("a manager", manager.dial(&own), Code::PermissionDenied, [&EVERYBODY[..], &MEMBERS, &MANAGERS].concat()),
    ];
    let methods = methods();
    assert!(methods.len() >= 40, "{methods:?}");
    for known in [&EVERYBODY[..], &MEMBERS, &NODES, &MANAGERS].concat() {
        assert!(methods.iter().any(|method| method == known), "{known} is not served");
    }
    for (who, channel, code, allowed) in &callers {
        for method in &methods {
            let answer = call(channel, method).await;
            let expected = !allowed.contains(&method.as_str());
            assert_eq!(is_turned_away(&answer, *code), expected, "{who} at {method}: {answer:?}");
        }
    }
    // An operator may do everything but take part in consensus and speak for nodes: what a node is told holds secrets.
    let operator = manager.dial(&manager.log_in("ada").await);
    for method in &methods {
        let answer = call(&operator, method).await;
        let expected = [&MANAGERS[..], &NODES].concat().contains(&method.as_str());
        assert_eq!(is_turned_away(&answer, Code::PermissionDenied), expected, "an operator at {method}: {answer:?}");
    }
    // Root may speak for the node of this machine, too.
    for method in &methods {
        let answer = call(&manager.root(), method).await;
        let expected = MANAGERS.contains(&method.as_str());
        assert_eq!(is_turned_away(&answer, Code::PermissionDenied), expected, "root at {method}: {answer:?}");
    }

    // Those who were let in, and removed.
    let (removed_node, removed_worker) = manager.join().await;
    let removed = v1::RemoveNodeRequest { node: removed_node, ..Default::default() };
    let _ = NodesClient::new(manager.root()).remove_node(removed).await.expect("removed");
    let removed_operator = manager.log_in("eve").await;
    let removed = v1::DeleteOperatorRequest { operator: "eve".to_owned() };
    let _ = OperatorsClient::new(manager.root()).delete_operator(removed).await.expect("removed");
    // Certificates that look right: of another authority, run out, of somebody who was never let in.
    let another = Authority::generate(&manager.cluster, now).expect("an authority");
    let days_ago = now - Duration::from_secs(3 * 24 * 3600);
    let as_worker = manager.identity(Role::Worker, &id);
    let signed = |role, id: &str| manager.sign(&manager.authority, &manager.identity(role, id), now);
    let unbelieved = [
        ("of another authority", manager.sign(&another, &as_worker, now)),
        ("run out", manager.sign(&manager.authority, &as_worker, days_ago)),
    ];
    for (who, credentials) in &unbelieved {
        for method in &methods {
            // The connection is refused: nobody answers the call.
            let answer = call(&manager.dial(credentials), method).await;
            assert!(answer.as_ref().is_err_and(|status| status.source().is_some()), "{who} at {method}: {answer:?}");
        }
    }
    let strangers = [
        ("a node that was removed", removed_worker),
        ("an operator who was removed", removed_operator),
        ("a stranger", signed(Role::Worker, "stranger")),
        ("a manager that there is not", signed(Role::Manager, "9")),
        ("one who calls himself root", signed(Role::Admin, "root")),
        ("one with an operator's name", signed(Role::Admin, "ada")),
    ];
    for (who, credentials) in &strangers {
        for method in &methods {
            let answer = call(&manager.dial(credentials), method).await;
            let refused = answer.as_ref().is_err_and(|status| {
                status.code() == Code::PermissionDenied && status.message().contains("no longer, in this cluster")
            });
            assert!(refused, "{who} at {method}: {answer:?}");
        }
    }
    manager.stop().await;
}

#[tokio::test]
async fn a_node_speaks_for_itself_until_it_is_removed() {
    let manager = Manager::start().await;
    let (id, worker) = manager.join().await;
    let (other, other_worker) = manager.join().await;
    let channel = manager.dial(&worker);
    let register = async |channel: &Channel, node_id: &str| {
        let description = v1::NodeDescription { hostname: "host".to_owned(), ..Default::default() };
        let request = v1::RegisterNodeRequest { node_id: node_id.to_owned(), description: Some(description) };
        NodesClient::new(channel.clone()).register_node(request).await.map(drop)
    };
    let session = async |channel: &Channel, node_id: &str| {
        let (sender, messages) = tokio::sync::mpsc::channel(1);
        let hello = v1::Hello { node_id: node_id.to_owned(), boot_id: "boot".to_owned() };
        let hello = v1::AgentMessage { message: Some(agent_message::Message::Hello(hello)) };
        sender.send(hello).await.expect("room");
        let messages = ReceiverStream::new(messages);
        let answers = DispatcherClient::new(channel.clone()).session(messages).await?.into_inner();
        Ok::<_, Status>((sender, answers))
    };
    register(&channel, &id).await.expect("its own");
    let (said, _answers) = session(&channel, &id).await.expect("its own");
    for refused in [register(&channel, &other).await, session(&channel, &other).await.map(drop)] {
        let refused = refused.expect_err("another's");
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
    }
    // Nor under the name of one that is there, by which people and metrics know it.
    let refused = register(&manager.dial(&other_worker), &other).await.expect_err("its name");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(refused.message().contains("is host too, and is running"), "{refused:?}");
    // Saying that somebody else is calling is for managers that pass calls on.
    let mut forged = Request::new(v1::ListServicesRequest::default());
    forged.metadata_mut().insert("warren-caller", "admin|root|here".parse().expect("ASCII"));
    let refused = ServicesClient::new(channel.clone()).list_services(forged).await.expect_err("forged");
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");

    // A certificate for another key, as the same.
    let request = CertificateRequest::new().expect("a request");
    let asked = v1::RequestCertificateRequest { certificate_request: request.pem().to_owned() };
    let renewed = ClusterClient::new(channel.clone()).request_certificate(asked).await.expect("renewed").into_inner();
    let renewed = Credentials::new(&request.key_pem(), &renewed.certificate, &renewed.authorities);
    let renewed = renewed.expect("credentials");
    assert_eq!(renewed.identity(), worker.identity());
    register(&manager.dial(&renewed), &id).await.expect("the same");

    let mut nodes = NodesClient::new(manager.root());
    for attempt in 0.. {
        match nodes.remove_node(v1::RemoveNodeRequest { node: id.clone(), ..Default::default() }).await {
            Ok(_) => break,
            Err(status) => assert!(attempt < 100, "{status:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // It is not listened to any longer either, though it has not hung up.
    tokio::time::timeout(Duration::from_secs(5), said.closed()).await.expect("the session is over");
    for credentials in [&worker, &renewed] {
        let refused = register(&manager.dial(credentials), &id).await.expect_err("removed");
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
        assert!(refused.message().contains("no longer"), "{refused:?}");
    }
    manager.stop().await;
}

#[tokio::test]
async fn an_operator_works_from_elsewhere_until_removed() {
    let manager = Manager::start().await;
    let token = manager.invite("ada").await;
    // It is not for machines, and that is found out without using it up.
    let refused = manager.come(&token, &[v1::Role::Admin]).await.expect_err("not wanted");
    assert_eq!((refused.code(), refused.message()), (Code::FailedPrecondition, "the token is for an operator"));
    let (joined, request) = manager.come(&token, &[]).await.expect("let in");
    let refused = manager.come(&token, &[]).await.expect_err("used up");
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
    let ada = Credentials::new(&request.key_pem(), &joined.certificate, &joined.authorities).expect("credentials");
    let mut root = OperatorsClient::new(manager.root());
    for (name, code) in [("ada", Code::AlreadyExists), ("root", Code::InvalidArgument), ("a b", Code::InvalidArgument)]
    {
        let again = v1::CreateOperatorRequest { name: name.to_owned(), lifetime: None };
        assert_eq!(root.create_operator(again).await.expect_err(name).code(), code, "{name}");
    }

    // Who did not come in time may be invited again.
    let brief = v1::CreateOperatorRequest {
        name: "eve".to_owned(),
        lifetime: Some(pbjson_types::Duration { seconds: 0, nanos: 1_000_000 }),
    };
    let _ = root.create_operator(brief.clone()).await.expect("invited");
    tokio::time::sleep(Duration::from_millis(20)).await;
    let _ = root.create_operator(brief).await.expect("invited again");

    // What she does is known as hers.
    let channel = manager.dial(&ada);
    let mut operators = OperatorsClient::new(channel.clone());
    let invited = v1::CreateOperatorRequest { name: "bob".to_owned(), lifetime: None };
    let _ = operators.create_operator(invited).await.expect("she may");
    let follow = v1::StreamEventsRequest { follow: true, ..Default::default() };
    let mut events = EventsClient::new(channel.clone()).stream_events(follow).await.expect("she may").into_inner();
    let of_bob = loop {
        let event = events.message().await.expect("it goes on").expect("an event").event.expect("an event");
        if event.object_name == "bob" {
            break event;
        }
    };
    let actor = of_bob.actor.expect("somebody");
    assert_eq!((of_bob.r#type.as_str(), actor.id.as_str(), actor.role.as_str()), ("operator.invited", "ada", "admin"));
    assert!(actor.address.starts_with("127.0.0.1:"), "{actor:?}");

    // A certificate for another key, as the same.
    let request = CertificateRequest::new().expect("a request");
    let asked = v1::RequestCertificateRequest { certificate_request: request.pem().to_owned() };
    let renewed = ClusterClient::new(channel.clone()).request_certificate(asked).await.expect("renewed").into_inner();
    let renewed = Credentials::new(&request.key_pem(), &renewed.certificate, &renewed.authorities);
    let renewed = renewed.expect("credentials");
    assert_eq!(renewed.identity(), ada.identity());

    // What she follows ends with her, and neither certificate is of use, nor when another of her name is let in.
    let _ = root.delete_operator(v1::DeleteOperatorRequest { operator: "ada".to_owned() }).await.expect("removed");
    let ended = loop {
        match tokio::time::timeout(Duration::from_secs(5), events.message()).await.expect("it ends") {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended as if there were no more"),
            Err(status) => break status,
        }
    };
    assert_eq!(ended.code(), Code::PermissionDenied, "{ended:?}");
    let other = manager.log_in("ada").await;
    assert_ne!(other.identity().id, ada.identity().id);
    for credentials in [&ada, &renewed] {
        let mut services = ServicesClient::new(manager.dial(credentials));
        let refused = services.list_services(v1::ListServicesRequest::default()).await.expect_err("removed");
        assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
        assert!(refused.message().contains("no longer"), "{refused:?}");
    }
    let mut services = ServicesClient::new(manager.dial(&other));
    let _ = services.list_services(v1::ListServicesRequest::default()).await.expect("she may");
    manager.stop().await;
}

#[tokio::test]
async fn a_manager_whose_certificate_has_run_out_gives_itself_another() {
    let year = Duration::from_secs(365 * 24 * 3600);
    let manager = Manager::start_as(|directory, authority, cluster| {
        let identity = Identity { cluster: cluster.to_owned(), role: Role::Manager, id: "1".to_owned() };
        let request = CertificateRequest::new().expect("a request");
        let then = SystemTime::now() - year;
        let certificate = authority.sign(request.pem(), &identity, then, Duration::from_secs(60)).expect("signed");
        let kept = directory.join(warren_manager::data::data_dir::IDENTITY);
        Credentials::create(&kept, &request.key_pem(), &certificate, authority.certificate_pem()).expect("kept");
    })
    .await;
    // Who comes by its port gets to see it.
    let mut joined = Err("nobody has tried");
    for _ in 0..100 {
        let channel = Dialer::newcomer(&manager.address, &manager.worker_token).expect("an address").connect().await;
        joined = channel.map(drop).map_err(|_| "it is not believed");
        if joined.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    joined.expect("it has a valid one");
    let (_, worker) = manager.join().await;
    let info = ClusterClient::new(manager.dial(&worker)).get_cluster_info(v1::GetClusterInfoRequest {}).await;
    assert_eq!(info.expect("it answers").into_inner().manager_id, 1);
    manager.stop().await;
}

#[tokio::test]
async fn a_manager_that_cannot_read_the_state_is_not_let_in() {
    let manager = Manager::start().await;
    let wanted = v1::GenerateJoinTokenRequest { role: v1::Role::Manager.into(), lifetime: None };
    let made = ClusterClient::new(manager.root()).generate_join_token(wanted).await.expect("made").into_inner();
    let token: Token = made.token.parse().expect("a token");
    let come = async |schema| {
        let request = CertificateRequest::new().expect("a request");
        let asked = v1::JoinClusterRequest {
            secret: token.secret(),
            certificate_request: request.pem().to_owned(),
            schema,
            ..Default::default()
        };
        ClusterClient::new(manager.nobody()).join_cluster(asked).await.map(|joined| joined.into_inner().id)
    };
    // One that does not say is of the first version that might be asked.
    for schema in [0, SCHEMA - 1] {
        let refused = come(schema).await.expect_err("it is too old");
        assert_eq!(refused.code(), Code::FailedPrecondition);
        assert!(
            refused
                .message()
                .contains(&format!("up to schema {}, and the cluster's is of schema {SCHEMA}", schema.max(5))),
            "{refused}"
        );
    }
    assert_eq!(come(SCHEMA).await.expect("let in"), "2");
    manager.stop().await;
}
