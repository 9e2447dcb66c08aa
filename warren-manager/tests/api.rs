//! The API of a manager in this process: pages, watches, compare-and-swap, and a scripted agent on the wire.

use std::{net::TcpListener, time::Duration};

use tempfile::TempDir;
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Streaming, transport::Channel};
use warren_manager::{Options, Policy, control::liveness, core::Networks};
use warren_pki::Dialer;
use warren_proto::v1::{
    self, agent_message, containers_client::ContainersClient, dispatcher_client::DispatcherClient, manager_message,
    nodes_client::NodesClient, service_spec::Mode, services_client::ServicesClient, watch_containers_response::Change,
};

struct Manager {
    channel: Channel,
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    _directory: TempDir,
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

impl Manager {
    async fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("w.sock");
        let address = format!("127.0.0.1:{}", free_port());
        let options = Options {
            hostname: "machine".to_owned(),
            data_dir: directory.path().join("data"),
            listen_addr: address.parse().expect("an address"),
            advertise_addr: None,
            bootstrap: true,
            socket: socket.clone(),
            metrics_addr: format!("127.0.0.1:{}", free_port()).parse().expect("an address"),
            unlock_key: None,
            snapshot_after: 1000,
            snapshot_after_bytes: 64 << 20,
            profile: warren_raft::Profile::Lan,
            newest_schema: warren_manager::state::SCHEMA,
            liveness: liveness::Timing {
                heartbeat: Duration::from_millis(100),
                tolerated: 5,
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
        let channel = Dialer::socket(socket).expect("a path").connect().await.expect("it answers");
        Self { channel, shutdown, task, _directory: directory }
    }

    fn services(&self) -> ServicesClient<Channel> {
        ServicesClient::new(self.channel.clone())
    }

    fn containers(&self) -> ContainersClient<Channel> {
        ContainersClient::new(self.channel.clone())
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.expect("it ends");
    }

    async fn create(&self, name: &str, replicas: i64) -> v1::Service {
        let request = v1::CreateServiceRequest { spec: Some(spec(name, replicas)), request_id: String::new() };
        self.services().create_service(request).await.expect("created").into_inner().service.expect("a service")
    }
}

fn spec(name: &str, replicas: i64) -> v1::ServiceSpec {
    v1::ServiceSpec {
        name: name.to_owned(),
        mode: Some(Mode::Replicated(v1::Replicated { replicas })),
        container: Some(v1::ContainerSpec { image: "demo".to_owned(), ..Default::default() }),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_page_and_prefixes_find() {
    let manager = Manager::start().await;
    for i in 0..7 {
        manager.create(&format!("s-{i}"), 0).await;
    }
    let (mut names, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = v1::ListServicesRequest { page_size: 3, page_token };
        let page = manager.services().list_services(request).await.expect("a page").into_inner();
        assert!(page.services.len() <= 3);
        names.extend(page.services.into_iter().filter_map(|service| service.spec).map(|spec| spec.name));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(names, ["s-0", "s-1", "s-2", "s-3", "s-4", "s-5", "s-6"]);
    let bad = v1::ListServicesRequest { page_size: 3, page_token: "nonsense".to_owned() };
    assert_eq!(manager.services().list_services(bad).await.expect_err("refused").code(), Code::InvalidArgument);

    let known = manager.create("by-prefix", 0).await;
    let get = |name: &str| v1::GetServiceRequest { service: name.to_owned() };
    let found = manager.services().get_service(get(&known.id[..20])).await.expect("found").into_inner();
    assert_eq!(found.service.map(|service| service.id), Some(known.id));
    let ambiguous = manager.services().get_service(get("")).await.expect_err("nothing is named so");
    assert_eq!(ambiguous.code(), Code::NotFound);
    manager.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_writers_who_saw_the_same_one_is_refused() {
    let manager = Manager::start().await;
    let seen = manager.create("web", 0).await;
    let update = |replicas| v1::UpdateServiceRequest {
        service: "web".to_owned(),
        spec: Some(spec("web", replicas)),
        version: seen.version,
        request_id: String::new(),
        restart: false,
    };
    manager.services().update_service(update(1)).await.expect("the first");
    let second = manager.services().update_service(update(2)).await.expect_err("the second");
    assert_eq!(second.code(), Code::Aborted);
    // A retry with the request's own id is the same request.
    let request = v1::CreateServiceRequest { spec: Some(spec("once", 0)), request_id: "r-1".to_owned() };
    let first = manager.services().create_service(request.clone()).await.expect("created").into_inner();
    let again = manager.services().create_service(request).await.expect("answered").into_inner();
    assert_eq!(first, again);
    manager.stop().await;
}

/// An agent as the wire sees it.
struct Agent {
    sender: tokio::sync::mpsc::Sender<v1::AgentMessage>,
    incoming: Streaming<v1::ManagerMessage>,
}

impl Agent {
    async fn connect(manager: &Manager, id: &str) -> Self {
        let description = v1::NodeDescription {
            hostname: id.to_owned(),
            resources: Some(v1::ResourceAmounts { cpu_millis: 1000, memory_bytes: 1 << 30 }),
            ..Default::default()
        };
        let request = v1::RegisterNodeRequest { node_id: id.to_owned(), description: Some(description) };
        NodesClient::new(manager.channel.clone()).register_node(request).await.expect("registered");
        let (sender, outgoing) = tokio::sync::mpsc::channel(16);
        let hello = v1::Hello { node_id: id.to_owned(), boot_id: "b".to_owned() };
        let hello = v1::AgentMessage { message: Some(agent_message::Message::Hello(hello)) };
        sender.send(hello).await.expect("open");
        let session = DispatcherClient::new(manager.channel.clone()).session(ReceiverStream::new(outgoing)).await;
        let mut agent = Self { sender, incoming: session.expect("a session").into_inner() };
        let first = agent.incoming.next().await.expect("open").expect("a message").message;
        assert!(matches!(first, Some(manager_message::Message::Welcome(_))), "{first:?}");
        agent
    }

    async fn assignments(&mut self) -> v1::Assignments {
        loop {
            let message = tokio::time::timeout(Duration::from_secs(10), self.incoming.next()).await;
            match message.expect("in time").expect("open").expect("a message").message {
                Some(manager_message::Message::Assignments(assignments)) => return assignments,
                _ => continue,
            }
        }
    }

    async fn report(&self, id: &str, state: v1::ContainerState) {
        let status = v1::ContainerStatus { state: state.into(), ..Default::default() };
        let statuses = vec![v1::ReportedStatus { container_id: id.to_owned(), status: Some(status) }];
        let message = agent_message::Message::Status(v1::StatusReport { statuses, sent_at: None });
        self.sender.send(v1::AgentMessage { message: Some(message) }).await.expect("open");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_gets_a_complete_set_and_then_differences() {
    let manager = Manager::start().await;
    let mut agent = Agent::connect(&manager, "node1").await;
    let first = agent.assignments().await;
    assert_eq!((first.kind(), first.changed.len()), (v1::AssignmentKind::Complete, 0));

    manager.create("web", 2).await;
    let mut assigned = Vec::new();
    let mut at = first.results_in;
    while assigned.len() < 2 {
        let next = agent.assignments().await;
        assert_eq!((next.kind(), next.applies_to), (v1::AssignmentKind::Incremental, at));
        at = next.results_in;
        assigned.extend(next.changed);
    }
    for assignment in &assigned {
        assert_eq!(assignment.desired_state(), v1::ContainerState::Running);
        agent.report(&assignment.container_id, v1::ContainerState::Running).await;
    }
    let delete = v1::DeleteServiceRequest { service: "web".to_owned(), request_id: String::new() };
    manager.services().delete_service(delete).await.expect("deleted");
    let mut leaving = Vec::new();
    while leaving.len() < 2 {
        leaving.extend(agent.assignments().await.changed);
    }
    // The agent is asked about each until it has reported its end.
    for assignment in &leaving {
        assert_eq!(assignment.desired_state(), v1::ContainerState::Removed);
        agent.report(&assignment.container_id, v1::ContainerState::Shutdown).await;
    }
    let mut removed = Vec::new();
    while removed.len() < 2 {
        removed.extend(agent.assignments().await.removed);
    }
    // A session of a node that nobody registered is refused.
    let (sender, outgoing) = tokio::sync::mpsc::channel(1);
    let hello = v1::Hello { node_id: "stranger".to_owned(), boot_id: String::new() };
    let hello = v1::AgentMessage { message: Some(agent_message::Message::Hello(hello)) };
    sender.send(hello).await.expect("open");
    let refused = DispatcherClient::new(manager.channel.clone()).session(ReceiverStream::new(outgoing)).await;
    assert_eq!(refused.expect_err("refused").code(), Code::NotFound);
    manager.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_shows_what_is_there_and_every_change_after() {
    let manager = Manager::start().await;
    manager.create("web", 1).await;
    let mut agent = Agent::connect(&manager, "node1").await;
    let assignment = loop {
        if let Some(assignment) = agent.assignments().await.changed.pop() {
            break assignment;
        }
    };
    let listed = manager.containers().list_containers(v1::ListContainersRequest::default()).await.expect("a list");
    let revision = listed.into_inner().revision;
    let watch = async |since_revision| {
        let request = v1::WatchContainersRequest { service: String::new(), since_revision };
        manager.containers().watch_containers(request).await.map(tonic::Response::into_inner)
    };
    let mut from_start = watch(0).await.expect("a watch");
    let mut from_list = watch(revision).await.expect("a watch");
    let state_of = |response: v1::WatchContainersResponse| match response.change {
        Some(Change::Changed(container)) => (container.id.clone(), container.status.unwrap_or_default().state()),
        other => panic!("not a change: {other:?}"),
    };
    let (id, _) = state_of(from_start.next().await.expect("open").expect("a message"));
    assert_eq!(id, assignment.container_id);

    agent.report(&assignment.container_id, v1::ContainerState::Running).await;
    for watch in [&mut from_start, &mut from_list] {
        loop {
            let response = tokio::time::timeout(Duration::from_secs(10), watch.next()).await;
            let response = response.expect("in time").expect("open").expect("a message");
            assert!(response.revision >= revision);
            if state_of(response).1 == v1::ContainerState::Running {
                break;
            }
        }
    }
    let delete = v1::DeleteServiceRequest { service: "web".to_owned(), request_id: String::new() };
    manager.services().delete_service(delete).await.expect("deleted");
    agent.report(&assignment.container_id, v1::ContainerState::Shutdown).await;
    loop {
        let response = tokio::time::timeout(Duration::from_secs(10), from_list.next()).await;
        if let Some(Change::Deleted(id)) = response.expect("in time").expect("open").expect("a message").change {
            assert_eq!(id, assignment.container_id);
            break;
        }
    }
    manager.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_node_is_down_and_can_be_removed() {
    let manager = Manager::start().await;
    let agent = Agent::connect(&manager, "node1").await;
    let mut nodes = NodesClient::new(manager.channel.clone());
    let remove = || v1::RemoveNodeRequest { node: "node1".to_owned(), ..Default::default() };
    assert_eq!(nodes.remove_node(remove()).await.expect_err("it is up").code(), Code::FailedPrecondition);
    drop(agent);
    let mut status = v1::NodeStatus::Ready;
    for _ in 0..100 {
        let node = nodes.get_node(v1::GetNodeRequest { node: "node1".to_owned() }).await.expect("known").into_inner();
        status = node.node.map(|node| node.status()).unwrap_or_default();
        if status == v1::NodeStatus::Down {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(status, v1::NodeStatus::Down);
    nodes.remove_node(remove()).await.expect("removed");
    assert_eq!(nodes.remove_node(remove()).await.expect_err("gone").code(), Code::NotFound);
    manager.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_repeated_is_answered_like_the_first_time() {
    let manager = Manager::start().await;
    let seen = manager.create("web", 0).await;
    let rename = || v1::UpdateServiceRequest {
        service: "web".to_owned(),
        spec: Some(spec("site", 0)),
        version: seen.version,
        request_id: "rename-1".to_owned(),
        restart: false,
    };
    for _ in 0..2 {
        let renamed = manager.services().update_service(rename()).await.expect("renamed").into_inner().service;
        assert_eq!(renamed.and_then(|service| service.spec).map(|spec| spec.name).as_deref(), Some("site"));
    }
    let delete =
        |request_id: &str| v1::DeleteServiceRequest { service: "site".to_owned(), request_id: request_id.to_owned() };
    manager.services().delete_service(delete("delete-1")).await.expect("deleted");
    manager.services().delete_service(delete("delete-1")).await.expect("answered again");
    let another = manager.services().delete_service(delete("delete-2")).await.expect_err("it is gone");
    assert_eq!(another.code(), Code::NotFound);
    manager.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_describes_itself_and_its_health() {
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };

    let manager = Manager::start().await;
    let health = HealthClient::new(manager.channel.clone()).check(HealthCheckRequest::default()).await;
    assert_eq!(health.expect("answered").into_inner().status(), ServingStatus::Serving);

    let ask = |question| ServerReflectionRequest { host: String::new(), message_request: Some(question) };
    let questions = [
        ask(MessageRequest::ListServices(String::new())),
        ask(MessageRequest::FileContainingSymbol("warren.v1.Services.CreateService".to_owned())),
        ask(MessageRequest::FileContainingSymbol("warren.v1.Nothing".to_owned())),
    ];
    let mut client = ServerReflectionClient::new(manager.channel.clone());
    let answers = client.server_reflection_info(tokio_stream::iter(questions)).await.expect("answered").into_inner();
    let answers: Vec<_> = answers.filter_map(|answer| answer.ok()?.message_response).collect().await;
    let Some(MessageResponse::ListServicesResponse(list)) = answers.first() else { panic!("{answers:?}") };
    let services: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
    for name in ["Services", "Containers", "Nodes", "Cluster", "Dispatcher"] {
        assert!(services.contains(&format!("warren.v1.{name}").as_str()), "{name} is not among {services:?}");
    }
    let Some(MessageResponse::FileDescriptorResponse(file)) = answers.get(1) else { panic!("{answers:?}") };
    let described = file.file_descriptor_proto.iter().any(|file| file.windows(13).any(|name| name == b"CreateService"));
    assert!(described, "the file that has CreateService is not the answer");
    assert!(matches!(answers.get(2), Some(MessageResponse::ErrorResponse(_)) | None), "{answers:?}");
    manager.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_believed_what_can_be() {
    let manager = Manager::start().await;
    let described = |hostname: &str| v1::NodeDescription {
        hostname: hostname.to_owned(),
        resources: Some(v1::ResourceAmounts { cpu_millis: 1000, memory_bytes: 1 << 30 }),
        ..Default::default()
    };
    let register = async |id: &str, description: v1::NodeDescription| {
        let request = v1::RegisterNodeRequest { node_id: id.to_owned(), description: Some(description) };
        NodesClient::new(manager.channel.clone()).register_node(request).await
    };
    let own = register("node1", described("one")).await.expect("registered").into_inner();
    let labels = |name: &str, value: &str| [(name.to_owned(), value.to_owned())].into();
    let one = || described("one");
    let too_many = (0..65).map(|number| (format!("l{number}"), String::new())).collect();
    let invented = Some(v1::ResourceAmounts { cpu_millis: i64::MAX, memory_bytes: 1 });
    let at = |address: &str| v1::NodeDescription { address: address.to_owned(), ..one() };
    for (description, why) in [
        (v1::NodeDescription { labels: labels("a b", "c"), ..one() }, "description.labels: \"agent/a b\" is not"),
        (
            v1::NodeDescription { labels: labels("zone", &"x".repeat(200)), ..one() },
            "description.labels: the value of \"zone\" is longer",
        ),
        (v1::NodeDescription { labels: too_many, ..one() }, "description.labels: are more than 64"),
        (v1::NodeDescription { resources: invented, ..one() }, "description.resources: are more than any machine has"),
        (at("169.254.169.254"), "is no address of a machine"),
        (at("10.128.3.4"), "is of the cluster's own networks"),
    ] {
        let refused = register("node1", description).await.expect_err(why);
        assert!(refused.message().contains(why), "{refused}");
    }
    // A hostname that services wait for is not taken by calling oneself so.
    let constraints = vec!["node.hostname==safe".to_owned()];
    let request = v1::CreateServiceRequest {
        spec: Some(v1::ServiceSpec { constraints, ..spec("vault", 0) }),
        request_id: String::new(),
    };
    manager.services().create_service(request).await.expect("created");
    let renamed = register("node1", described("safe")).await.expect_err("refused");
    assert_eq!(renamed.code(), Code::FailedPrecondition);
    assert!(renamed.message().contains("the constraints of service vault name this hostname"), "{}", renamed.message());
    register("node1", described("other")).await.expect("any other will do");
    let safe = register("node2", described("safe")).await.expect("the one that it is").into_inner();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let taken = register("node3", described("safe")).await.expect_err("refused, though the other is down");
    assert_eq!(taken.code(), Code::FailedPrecondition);
    let left = register("node2", described("left")).await.expect_err("nor is it left");
    assert_eq!(left.code(), Code::FailedPrecondition);
    drop((own, safe));
    // Each other description is a log entry.
    let mut outcomes = Vec::new();
    for number in 0..30 {
        outcomes
            .push(register("node1", described(&format!("name-{number}"))).await.map_err(|status| status.code()).err());
    }
    assert_eq!(outcomes.last(), Some(&Some(Code::ResourceExhausted)), "{outcomes:?}");
    manager.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_reports_is_its_own() {
    let manager = Manager::start().await;
    let mut agent = Agent::connect(&manager, "node1").await;
    let other = Agent::connect(&manager, "node2").await;
    let _ = agent.assignments().await;
    manager.create("web", 1).await;
    let container = loop {
        let containers = manager.containers().list_containers(v1::ListContainersRequest::default()).await;
        let listed = containers.expect("listed").into_inner().containers;
        if let Some(assigned) = listed.into_iter().find(|container| !container.node_id.is_empty()) {
            break assigned;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let (own, stranger) = if container.node_id == "node1" { (&agent, &other) } else { (&other, &agent) };
    let say = async |agent: &Agent, addresses: &[&str], message: String| {
        let status = v1::ContainerStatus {
            state: v1::ContainerState::Running.into(),
            addresses: addresses.iter().map(|address| (*address).to_owned()).collect(),
            message,
            ..Default::default()
        };
        let statuses = vec![v1::ReportedStatus { container_id: container.id.clone(), status: Some(status) }];
        let message = agent_message::Message::Status(v1::StatusReport { statuses, sent_at: None });
        agent.sender.send(v1::AgentMessage { message: Some(message) }).await.expect("open");
    };
    say(stranger, &[], "it is another's".to_owned()).await;
    let foreign = ["169.254.169.254", "127.0.0.1", "10.191.255.2", "192.0.2.1"];
    say(own, &foreign, "x".repeat(100_000)).await;
    let status = loop {
        let request = v1::GetContainerRequest { container: container.id.clone() };
        let shown = manager.containers().get_container(request).await.expect("shown").into_inner();
        let status = shown.container.expect("it").status.expect("one");
        if status.state() == v1::ContainerState::Running {
            break status;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(status.addresses, Vec::<String>::new());
    assert!(status.message.starts_with("xxx") && status.message.len() < 1100, "{}", status.message.len());
    let request = v1::GetNodeRequest { node: container.node_id.clone() };
    let node = NodesClient::new(manager.channel.clone()).get_node(request).await.expect("shown").into_inner();
    let conditions = node.node.expect("it").conditions;
    let [condition] = conditions.as_slice() else { panic!("{conditions:?}") };
    assert_eq!((condition.r#type.as_str(), condition.blocks_scheduling), ("reports_refused", false));
    assert!(condition.message.contains("is not an address of this node's containers"), "{}", condition.message);
    // Another session in its name ends the first.
    let node = container.node_id.clone();
    let (mut first, _) = if node == "node1" { (agent, other) } else { (other, agent) };
    let _second = Agent::connect(&manager, &node).await;
    let ended = loop {
        match tokio::time::timeout(Duration::from_secs(5), first.incoming.next()).await.expect("in time") {
            Some(Ok(_)) => {}
            Some(Err(status)) => break status,
            None => panic!("it says why"),
        }
    };
    assert_eq!(ended.code(), Code::Aborted, "{ended}");
    manager.stop().await;
}
