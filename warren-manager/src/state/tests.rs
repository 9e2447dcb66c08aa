use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use proptest::{prelude::*, strategy::ValueTree as _};
use warren_proto::v1;

use super::*;
use crate::clock::Timestamp;

/// A cluster in which nothing is yet.
pub(crate) fn founded() -> State {
    let network = ClusterNetwork::of_random(7);
    let (id, created_at) = ("cluster".to_owned(), Timestamp(0));
    let cluster = Cluster { id, created_at, network, authority: None, lock: None, rotation: None };
    State { cluster: Some(Arc::new(cluster)), ..State::default() }
}

pub(crate) fn service(id: &str, name: &str, replicas: u32) -> Service {
    Service {
        id: id.into(),
        version: 0,
        created_at: Timestamp(1),
        updated_at: Timestamp(1),
        generation: 1,
        virtual_index: 0,
        spec: ServiceSpec {
            name: name.to_owned(),
            labels: BTreeMap::new(),
            mode: Mode::Replicated(replicas),
            container: Arc::new(v1::ContainerSpec { image: "demo".to_owned(), ..Default::default() }),
            resources: Resources::default(),
            restart: RestartPolicy { condition: RestartCondition::Any, delay: Duration::from_secs(1), max_attempts: 0 },
            ports: Vec::new(),
            endpoint_mode: v1::EndpointMode::Unspecified,
            constraints: Vec::new(),
            lost_after: Duration::ZERO,
        },
    }
}

pub(crate) fn node(id: &str, cpu_millis: u64, memory_bytes: u64) -> Node {
    let resources = Amounts { cpu_millis, memory_bytes };
    let description = Description { hostname: id.to_owned(), resources, ..Description::default() };
    Node {
        id: id.into(),
        version: 0,
        created_at: Timestamp(1),
        description,
        subnet_index: 0,
        availability: Availability::Active,
        labels: BTreeMap::new(),
    }
}

/// A service's revision as it is now.
pub(crate) fn revision(service: &Service) -> Arc<Revision> {
    Arc::new(Revision {
        service: service.id.clone(),
        number: service.generation,
        made_at: 0,
        spec: service.spec.container.clone(),
        resources: service.spec.resources,
        ports: service.spec.ports.clone(),
        constraints: service.spec.constraints.clone(),
        values: BTreeMap::new(),
    })
}

pub(crate) fn container(id: &str, service: &Service, slot: u32, created_at: u64) -> Container {
    Container {
        id: id.into(),
        version: 0,
        service: service.id.clone(),
        service_name: service.spec.name.clone(),
        slot,
        pinned: None,
        node: None,
        created_at: Timestamp(created_at),
        desired: Desired::Running,
        status: Status::new(ContainerState::New, "", Timestamp(created_at)),
        revision: revision(service),
        failures: 0,
    }
}

/// Applies changes, each as a transaction of its own.
pub(crate) fn apply(state: &mut State, changes: impl IntoIterator<Item = Change>) -> Vec<Reply> {
    changes
        .into_iter()
        .map(|change| {
            let index = state.revision() + 1;
            state.apply(index, &Transaction { changes: vec![change], ..Transaction::default() })
        })
        .collect()
}

pub(crate) fn put(service: Service) -> Change {
    Change::PutService { service: Box::new(service), expected: Expected::Any }
}

pub(crate) fn observe(id: &str, node: &str, state: ContainerState, at: u64) -> Change {
    let mut status = Status::new(state, "", Timestamp(at));
    if state.is_terminal() {
        status.finished_at = Some(Timestamp(at));
    }
    Change::Observe { id: id.into(), node: node.into(), status: Box::new(status) }
}

#[test]
fn names_are_used_once_and_can_be_used_again() {
    let mut state = founded();
    let replies = apply(&mut state, [put(service("a", "web", 1)), put(service("b", "web", 1))]);
    assert_eq!(replies, [Ok(1), Err(Rejection::NameTaken("web".to_owned()))]);
    assert_eq!(state.service_named("web").map(|s| s.id.as_str()), Some("a"));
    apply(&mut state, [put(service("a", "renamed", 1)), put(service("b", "web", 1))]);
    assert_eq!(state.service_named("web").map(|s| s.id.as_str()), Some("b"));
    apply(&mut state, [Change::DeleteService { id: "b".into(), expected: Expected::Any, ports_stay: true }]);
    assert!(state.service_named("web").is_none());
}

#[test]
fn a_port_is_published_once_in_the_whole_cluster() {
    use v1::PublishMode::{Host, Ingress};
    let publishing = |id: &str, host_port, mode: v1::PublishMode| {
        let mut service = service(id, id, 1);
        let publish_mode = mode.into();
        service.spec.ports = vec![v1::Port { container_port: 80, host_port, publish_mode, ..Default::default() }];
        put(service)
    };
    let mut state = founded();
    let taken = |port: &str, by: &str| Err(Rejection::PortTaken { port: port.to_owned(), service: by.to_owned() });
    let changes = [
        publishing("a", 80, Ingress),
        publishing("b", 80, Ingress),
        publishing("b", 80, Host),
        publishing("b", 81, Host),
        publishing("c", 81, Host),
        publishing("d", 81, Ingress),
        // Its own it may keep.
        publishing("a", 80, Ingress),
        publishing("a", 0, Ingress),
        publishing("d", 0, Ingress),
    ];
    let replies: Vec<_> = apply(&mut state, changes).into_iter().map(|reply| reply.map(drop)).collect();
    let b_has_it = taken("81/tcp", "b");
    assert_eq!(
        replies,
        [Ok(()), taken("80/tcp", "a"), taken("80/tcp", "a"), Ok(()), Ok(()), b_has_it, Ok(()), Ok(()), Ok(())]
    );
}

#[test]
fn a_write_that_saw_an_older_version_is_refused() {
    let mut state = founded();
    apply(&mut state, [put(service("a", "web", 1)), put(service("a", "web", 2))]);
    let stale = Change::PutService { service: Box::new(service("a", "web", 9)), expected: Expected::Version(1) };
    assert!(matches!(apply(&mut state, [stale])[0], Err(Rejection::Conflict(_))));
    let absent = Change::PutService { service: Box::new(service("a", "web", 9)), expected: Expected::Absent };
    assert!(matches!(apply(&mut state, [absent])[0], Err(Rejection::Conflict(_))));
    let fresh = Change::PutService { service: Box::new(service("a", "web", 9)), expected: Expected::Version(2) };
    assert!(apply(&mut state, [fresh])[0].is_ok());
}

#[test]
fn a_transaction_is_all_or_nothing() {
    let mut state = founded();
    let missing = Change::DeleteService { id: "nope".into(), expected: Expected::Any, ports_stay: true };
    let transaction = Transaction { changes: vec![put(service("a", "web", 1)), missing], ..Transaction::default() };
    assert!(state.apply(1, &transaction).is_err());
    assert_eq!(state.services().count(), 0);
    assert!(state.service_named("web").is_none());
}

fn by_root(changes: Vec<Change>) -> Transaction {
    let actor = Actor { id: "root".to_owned(), role: "admin".to_owned(), address: "here".to_owned() };
    Transaction { origin: Some(Origin { actor, at: Timestamp(9) }), changes, ..Transaction::default() }
}

#[test]
fn what_somebody_changed_is_remembered_and_what_failed_is_not() {
    let mut state = founded();
    let mut changed = service("a", "web", 5);
    Arc::make_mut(&mut changed.spec.container).image = "newer".to_owned();
    let labels = BTreeMap::from([("zone".to_owned(), Some("eu".to_owned()))]);
    let drained = Change::SetNode { id: "n".into(), availability: Some(Availability::Drained), labels };
    for (at, changes) in [
        vec![put(service("a", "web", 3))],
        vec![put(changed)],
        vec![put(service("b", "web", 1))],
        vec![Change::PutNode(Box::new(node("n", 1, 1)))],
        vec![drained],
        vec![Change::DeleteService { id: "a".into(), expected: Expected::Any, ports_stay: true }],
    ]
    .into_iter()
    .enumerate()
    {
        let _ = state.apply(at as u64 + 1, &by_root(changes));
    }
    // What the cluster does by itself is told of otherwise.
    apply(&mut state, [put(service("c", "other", 1))]);
    let told: Vec<_> = state
        .events()
        .map(|event| (event.revision, event.kind.as_str(), event.name.as_str(), event.message.as_str()))
        .collect();
    let expected = [
        (1, "service.created", "web", "image demo"),
        (2, "service.updated", "web", "replicas 3 -> 5, image demo -> newer"),
        (4, "node.joined", "n", ""),
        (5, "node.drained", "n", "zone=eu"),
        (6, "service.deleted", "web", ""),
    ];
    assert_eq!(told, expected);
    let restored = State::from_bytes(&state.to_bytes().expect("bytes")).expect("a state");
    assert!(restored.events().eq(state.events()));
    for at in 10..10 + EVENTS as u64 {
        let _ = state.apply(at, &by_root(vec![put(service("a", "web", 1))]));
    }
    assert_eq!(state.events().count(), EVENTS);
}

#[test]
fn an_agent_does_not_change_what_operators_say_of_its_node() {
    let mut state = founded();
    let labels = BTreeMap::from([("zone".to_owned(), Some("eu".to_owned()))]);
    apply(
        &mut state,
        [
            Change::PutNode(Box::new(node("n", 1, 1))),
            Change::SetNode { id: "n".into(), availability: Some(Availability::Cordoned), labels },
            Change::PutNode(Box::new(node("n", 2, 2))),
        ],
    );
    let known = state.node(&"n".into()).expect("a node");
    assert_eq!((known.availability, known.label("zone")), (Availability::Cordoned, Some("eu")));
    assert_eq!(known.description.resources.cpu_millis, 2);
    let missing = Change::SetNode { id: "x".into(), availability: None, labels: BTreeMap::new() };
    assert!(apply(&mut state, [missing])[0].is_err());
}

#[test]
fn the_authority_changes_in_steps_that_members_confirm() {
    let mut state = founded();
    let authority = |name: &str| SealedAuthority {
        certificate: name.to_owned(),
        key: Sealed { key: String::new(), value: String::new() },
    };
    let mut cluster = state.cluster().expect("a cluster").clone();
    cluster.authority = Some(authority("old"));
    state.cluster = Some(Arc::new(cluster));
    let manager = Manager { id: 1, hostname: "m".to_owned(), created_at: Timestamp(1), voter: true };
    let token = JoinToken {
        hash: "hash".to_owned(),
        role: TokenRole::Worker,
        created_at: Timestamp(1),
        expires_at: Timestamp(u64::MAX),
    };
    let believed = |state: &State| state.cluster().expect("a cluster").authorities();
    let confirm = |member: &str, digest: &str| Change::Certify { member: member.to_owned(), digest: digest.to_owned() };
    apply(
        &mut state,
        [
            Change::AdmitManager(manager),
            Change::AdmitNode { id: "n".into() },
            Change::PutToken(token),
            Change::CreateOperator(invited("a", "ada")),
            Change::CreateOperator(invited("b", "bob")),
            admit_operator("a"),
            // Nobody waits for this.
            confirm("manager 1", "x"),
            Change::BeginRotation(authority("new")),
        ],
    );
    assert_eq!(believed(&state), "old\nnew");
    assert!(apply(&mut state, [Change::BeginRotation(authority("newer"))])[0].is_err(), "one at a time");
    assert_eq!(state.uncertified("x").collect::<Vec<_>>(), ["manager 1", "node n", "operator a"]);
    apply(&mut state, [confirm("manager 1", "x"), confirm("node n", "y"), confirm("operator a", "x")]);
    assert_eq!(state.uncertified("x").collect::<Vec<_>>(), ["node n"]);
    assert!(apply(&mut state, [Change::AdvanceRotation { signs: true }])[0].is_err(), "that is not where it is");
    apply(&mut state, [Change::AdvanceRotation { signs: false }]);
    assert_eq!((believed(&state).as_str(), state.tokens().count()), ("new\nold", 0));
    let left: Vec<_> = state.operators().map(|operator| operator.name.as_str()).collect();
    assert_eq!(left, ["ada"], "invitations name the old one");
    assert_eq!(state.uncertified("x").count(), 3, "each step is confirmed anew");
    apply(&mut state, [Change::DeleteOperator { id: "a".into() }]);
    assert_eq!(state.uncertified("x").count(), 2, "who is removed is not waited for");
    apply(&mut state, [Change::AdvanceRotation { signs: true }]);
    assert_eq!(believed(&state), "new");
    assert!(apply(&mut state, [Change::AdvanceRotation { signs: true }])[0].is_err());
}

#[test]
fn a_request_repeated_is_done_once_and_answered_the_same() {
    let mut state = founded();
    let request = |service| Transaction {
        origin: None,
        request_id: "r1".to_owned(),
        changes: vec![Change::PutService { service: Box::new(service), expected: Expected::Absent }],
    };
    assert_eq!(state.apply(1, &request(service("a", "web", 1))), Ok(1));
    // The client did not hear the answer and tries again; the manager made another id meanwhile.
    assert_eq!(state.apply(2, &request(service("b", "web", 1))), Ok(1));
    assert_eq!(state.services().count(), 1);
    let restored = State::from_bytes(&state.to_bytes().expect("bytes")).expect("a state");
    let mut restored = restored;
    assert_eq!(restored.apply(3, &request(service("c", "web", 1))), Ok(1));
}

#[test]
fn observed_states_only_rise_and_only_their_node_reports_them() {
    let mut state = founded();
    let web = service("a", "web", 1);
    apply(
        &mut state,
        [
            put(web.clone()),
            Change::PutNode(Box::new(node("n", 1, 1))),
            Change::CreateContainer(Box::new(container("c", &web, 1, 1))),
            Change::Assign { id: "c".into(), node: "n".into(), at: Timestamp(2) },
            observe("c", "n", ContainerState::Running, 3),
            observe("c", "n", ContainerState::Preparing, 4),
            observe("c", "other", ContainerState::Failed, 5),
        ],
    );
    let current = |state: &State| state.container(&"c".into()).map(|c| c.status.state);
    assert_eq!(current(&state), Some(ContainerState::Running));
    apply(&mut state, [observe("c", "n", ContainerState::Complete, 6), observe("c", "n", ContainerState::Failed, 7)]);
    assert_eq!(current(&state), Some(ContainerState::Complete), "an end is final");
    // What the scheduler planned on an old state does nothing.
    apply(&mut state, [Change::Assign { id: "c".into(), node: "n".into(), at: Timestamp(8) }]);
    assert_eq!(current(&state), Some(ContainerState::Complete));
}

#[test]
fn watchers_miss_nothing_or_are_told_so() {
    let mut state = founded();
    let web = service("a", "web", 1);
    apply(&mut state, [put(web.clone())]);
    for (i, slot) in (1..).take(HISTORY + 10).enumerate() {
        apply(&mut state, [Change::CreateContainer(Box::new(container(&format!("c{i}"), &web, slot, 1)))]);
    }
    let last = state.revision();
    assert_eq!(state.changes_since(last - 5).expect("known").count(), 5);
    assert!(state.changes_since(2).is_none(), "forgotten");
}

#[test]
fn a_state_of_a_later_version_is_named_whatever_its_shape() {
    let refused = State::from_bytes(br#"{"schema": 99, "everything": "else"}"#).expect_err("is of the future");
    assert!(refused.to_string().contains("of schema 99, this manager reads 3 to 7"), "{refused}");
    assert!(State::from_bytes(br#"{"schema": 5}"#).is_err());
}

#[test]
fn a_slot_has_one_container_that_is_to_run() {
    let mut state = founded();
    let web = service("a", "web", 1);
    apply(&mut state, [put(web.clone())]);
    let mut create = |id: &str, slot| {
        let index = state.revision() + 1;
        let changes = vec![Change::CreateContainer(Box::new(container(id, &web, slot, 1)))];
        let reply = state.apply(index, &Transaction { changes, ..Transaction::default() });
        (reply.is_ok(), state.clone())
    };
    assert!(create("one", 1).0);
    let (refused, _) = create("two", 1);
    assert!(!refused, "another leader has planned the same");
    assert!(create("three", 2).0);
    apply(&mut state, [Change::Remove { id: "one".into() }]);
    let changes = vec![Change::CreateContainer(Box::new(container("two", &web, 1, 1)))];
    let index = state.revision() + 1;
    assert!(state.apply(index, &Transaction { changes, ..Transaction::default() }).is_ok());
}

#[test]
fn ids_of_members_are_never_used_again() {
    let mut state = founded();
    let admit =
        |id| Change::AdmitManager(Manager { id, hostname: "m".to_owned(), created_at: Timestamp(1), voter: true });
    let mut does = |change: Change| {
        let index = state.revision() + 1;
        let done = state.apply(index, &Transaction { changes: vec![change], ..Transaction::default() }).is_ok();
        (done, state.clone())
    };
    assert!(does(admit(1)).0 && does(admit(2)).0);
    assert!(!does(admit(2)).0 && !does(admit(4)).0, "the next one is 3");
    assert!(does(Change::RemoveManager { id: 2 }).0);
    assert!(!does(Change::RemoveManager { id: 2 }).0 && !does(admit(2)).0);
    let node_id = NodeId::from("n");
    assert!(does(Change::AdmitNode { id: node_id.clone() }).0);
    assert!(!does(Change::AdmitNode { id: node_id.clone() }).0);
    assert!(does(Change::PutNode(Box::new(node("n", 1, 1)))).0);
    let (_, before) = does(admit(3));
    assert!(before.is_admitted(&node_id) && before.manager(2).is_none());
    let (_, after) = does(Change::DeleteNode { id: node_id.clone() });
    assert!(!after.is_admitted(&node_id) && !after.is_new_node(&node_id));
    assert!(!does(Change::AdmitNode { id: node_id.clone() }).0);
    let restored = State::from_bytes(&after.to_bytes().expect("bytes")).expect("the same");
    assert_eq!((restored.next_manager(), restored.is_new_node(&node_id)), (4, false));
}

#[test]
fn tokens_end_with_their_time_or_their_role() {
    let mut state = founded();
    let token = |hash: &str, role, at: u64| {
        Change::PutToken(JoinToken {
            hash: hash.to_owned(),
            role,
            created_at: Timestamp(at),
            expires_at: Timestamp(at + 10),
        })
    };
    apply(&mut state, [token("a", TokenRole::Worker, 0), token("b", TokenRole::Worker, 5)]);
    apply(&mut state, [token("c", TokenRole::Manager, 12)]);
    assert!(state.token("a").is_none() && state.token("b").is_some(), "the first has run out");
    apply(&mut state, [Change::RevokeTokens { role: TokenRole::Worker }]);
    assert!(state.token("b").is_none() && state.token("c").is_some());
}

fn invited(id: &str, name: &str) -> Operator {
    let invitation = Invitation { hash: format!("hash of {id}"), expires_at: Timestamp(10) };
    Operator { id: id.into(), name: name.to_owned(), created_at: Timestamp(1), invitation: Some(invitation) }
}

fn admit_operator(id: &str) -> Change {
    Change::AdmitOperator { id: id.into(), hash: format!("hash of {id}") }
}

#[test]
fn an_invitation_is_for_one_operator_once() {
    let mut state = founded();
    apply(&mut state, [Change::CreateOperator(invited("a", "ada"))]);
    assert!(apply(&mut state, [Change::CreateOperator(invited("b", "ada"))])[0].is_err(), "her name is taken");
    let found = |state: &State, at| state.invited("hash of a", Timestamp(at)).map(|operator| operator.name.clone());
    assert_eq!((found(&state, 9).as_deref(), found(&state, 10)), (Some("ada"), None));
    let wrong = Change::AdmitOperator { id: "a".into(), hash: "another".to_owned() };
    assert!(apply(&mut state, [wrong])[0].is_err());
    assert!(apply(&mut state, [admit_operator("a")])[0].is_ok());
    assert!(apply(&mut state, [admit_operator("a")])[0].is_err(), "it is used up");
    assert_eq!(found(&state, 9), None);
    let mut restored = State::from_bytes(&state.to_bytes().expect("bytes")).expect("a state");
    assert_eq!(restored.operator_named("ada"), state.operator_named("ada"));
    restored.forget_whom_it_let_in();
    assert_eq!(restored.operators().count(), 0);
    assert!(apply(&mut state, [Change::DeleteOperator { id: "a".into() }])[0].is_ok());
    assert!(apply(&mut state, [Change::DeleteOperator { id: "a".into() }])[0].is_err());
}

fn id(prefix: &'static str, count: u8) -> impl Strategy<Value = String> + Clone {
    (0..count).prop_map(move |number| format!("{prefix}{number}"))
}

/// What becomes of containers.
fn container_change() -> impl Strategy<Value = Change> {
    let (container_id, node_id, service_id) = (id("c", 6), id("n", 3), id("s", 3));
    let observed = prop::sample::select(&ContainerState::ALL[3..]);
    let at = Timestamp(5);
    prop_oneof![
        (container_id.clone(), service_id.clone()).prop_map(|(id, s)| Change::CreateContainer(Box::new(container(
            &id,
            &service(&s, "any", 1),
            1,
            1
        )))),
        (container_id.clone(), service_id, 1u64..5, 1u32..3).prop_map(move |(id, service, generation, slot)| {
            let (id, service) = (id.as_str().into(), service.as_str().into());
            Change::Create(NewContainer { id, service, generation, slot, pinned: None, failures: 0, at })
        }),
        (container_id.clone(), node_id.clone()).prop_map(move |(id, node)| Change::Assign {
            id: id.as_str().into(),
            node: node.as_str().into(),
            at
        }),
        container_id.clone().prop_map(move |id| Change::Refuse {
            id: id.as_str().into(),
            message: "full".to_owned(),
            at
        }),
        container_id.clone().prop_map(|id| Change::Remove { id: id.as_str().into() }),
        (container_id.clone(), node_id, observed).prop_map(|(id, node, state)| observe(&id, &node, state, 9)),
        container_id.prop_map(|id| Change::DeleteContainer { id: id.as_str().into() }),
    ]
}

/// A service that may want a secret, a volume and a port.
fn any_service() -> impl Strategy<Value = Service> {
    (id("s", 3), id("name", 3), 0u32..4, 1u64..5, 0u32..3).prop_map(|(id, name, replicas, generation, port)| {
        let (image, secret, volume) = (format!("image{generation}"), generation % 2 == 0, generation > 2);
        let mut made = service(&id, &name, replicas);
        made.generation = generation;
        let mounted = v1::SecretMount {
            source: "secret0".to_owned(),
            on_update: v1::OnUpdate::Restart.into(),
            ..Default::default()
        };
        let mount = v1::Mount {
            r#type: v1::MountType::Volume.into(),
            source: "volume0".to_owned(),
            target: "/data".to_owned(),
            ..Default::default()
        };
        made.spec.container = Arc::new(v1::ContainerSpec {
            image,
            secrets: Some(mounted).filter(|_| secret).into_iter().collect(),
            mounts: Some(mount).filter(|_| volume).into_iter().collect(),
            ..Default::default()
        });
        made.spec.ports = vec![v1::Port { container_port: 80 + port, host_port: 80, ..Default::default() }];
        made
    })
}

/// What users and operators make.
fn object_change() -> impl Strategy<Value = Change> {
    let sealed = || Sealed { key: String::new(), value: String::new() };
    let secret =
        (id("x", 2), id("secret", 2), any::<bool>(), 1u32..4).prop_map(move |(id, name, config, sequence)| Secret {
            id: id.as_str().into(),
            version: 0,
            kind: if config { v1::SecretKind::Config } else { v1::SecretKind::Secret },
            name,
            labels: BTreeMap::new(),
            created_at: Timestamp(1),
            updated_at: Timestamp(1),
            sequence,
            size: 1,
            sealed: sealed(),
        });
    let volume = (id("v", 2), id("volume", 2), any::<bool>()).prop_map(|(id, name, exclusive)| Volume {
        id: id.as_str().into(),
        version: 0,
        name,
        options: BTreeMap::new(),
        labels: BTreeMap::new(),
        created_at: Timestamp(1),
        node: None,
        exclusive,
    });
    let availability = prop::option::of(prop::sample::select(vec![
        Availability::Active,
        Availability::Cordoned,
        Availability::Drained,
    ]));
    let node_id = id("n", 3);
    prop_oneof![
        4 => any_service().prop_map(put),
        1 => id("s", 3).prop_map(|id| Change::DeleteService {
            id: id.as_str().into(),
            expected: Expected::Any,
            ports_stay: true
        }),
        2 => secret.prop_map(|secret| Change::PutSecret { secret: Box::new(secret), expected: Expected::Any }),
        1 => id("x", 2).prop_map(|id| Change::DeleteSecret { id: id.as_str().into() }),
        2 => volume.prop_map(|volume| Change::CreateVolume(Box::new(volume))),
        1 => (id("v", 2), any::<bool>()).prop_map(|(id, force)| Change::DeleteVolume { id: id.as_str().into(), force }),
        3 => node_id.clone().prop_map(|id| Change::PutNode(Box::new(node(&id, 1000, 1000)))),
        1 => (node_id.clone(), availability, any::<bool>()).prop_map(|(id, availability, set)| Change::SetNode {
            id: id.as_str().into(),
            availability,
            labels: BTreeMap::from([("zone".to_owned(), set.then(|| "eu".to_owned()))]),
        }),
        1 => node_id.prop_map(|id| Change::DeleteNode { id: id.as_str().into() }),
    ]
}

/// What becomes of the cluster and its members.
fn cluster_change() -> impl Strategy<Value = Change> {
    let sealed = || Sealed { key: String::new(), value: String::new() };
    let authority = move |certificate: String| SealedAuthority { certificate, key: sealed() };
    let token = |(hash, manager, expires_at)| JoinToken {
        hash,
        role: if manager { TokenRole::Manager } else { TokenRole::Worker },
        created_at: Timestamp(3),
        expires_at: Timestamp(expires_at),
    };
    let operator_id = id("o", 3);
    prop_oneof![
        Just(Change::FoundCluster(Box::new(founded().cluster.map(|known| (*known).clone()).expect("founded")))),
        (OLDEST_WRITTEN_SCHEMA..=SCHEMA).prop_map(Change::RaiseSchema),
        any::<bool>().prop_map(move |locked| Change::SetLock(locked.then(sealed))),
        id("authority", 2).prop_map(move |certificate| Change::BeginRotation(authority(certificate))),
        any::<bool>().prop_map(|signs| Change::AdvanceRotation { signs }),
        (id("node n", 3), id("digest", 2)).prop_map(|(member, digest)| Change::Certify { member, digest }),
        (1u64..4).prop_map(|id| Change::AdmitManager(Manager {
            id,
            hostname: format!("m{id}"),
            created_at: Timestamp(1),
            voter: true
        })),
        (1u64..4, any::<bool>()).prop_map(|(id, voter)| Change::SetManager { id, voter }),
        (1u64..4).prop_map(|id| Change::RemoveManager { id }),
        id("n", 3).prop_map(|id| Change::AdmitNode { id: id.as_str().into() }),
        (id("token", 3), any::<bool>(), 2u64..6).prop_map(token).prop_map(Change::PutToken),
        any::<bool>().prop_map(|manager| Change::RevokeTokens {
            role: if manager { TokenRole::Manager } else { TokenRole::Worker }
        }),
        operator_id.clone().prop_map(|id| Change::CreateOperator(invited(&id, &format!("name of {id}")))),
        operator_id.clone().prop_map(|id| admit_operator(&id)),
        operator_id.prop_map(|id| Change::DeleteOperator { id: id.as_str().into() }),
    ]
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![4 => container_change(), 4 => object_change(), 1 => cluster_change()]
}

/// What asks something else of a service's containers is its next generation, and nothing else is.
fn as_the_api_has_it(state: &State, change: &Change) -> Change {
    let mut change = change.clone();
    if let Change::PutService { service, .. } = &mut change {
        service.generation = state
            .service(&service.id)
            .map_or(1, |known| known.generation + u64::from(known.spec.container != service.spec.container));
    }
    change
}

/// Counts kinds of changes: a new one has to be named here, and then to be made above.
fn kind_of(change: &Change) -> usize {
    match change {
        Change::FoundCluster(_) => 0,
        Change::RaiseSchema(_) => 1,
        Change::SetLock(_) => 2,
        Change::BeginRotation(_) => 3,
        Change::AdvanceRotation { .. } => 4,
        Change::Certify { .. } => 5,
        Change::AdmitManager(_) => 6,
        Change::SetManager { .. } => 7,
        Change::RemoveManager { .. } => 8,
        Change::AdmitNode { .. } => 9,
        Change::PutToken(_) => 10,
        Change::RevokeTokens { .. } => 11,
        Change::CreateOperator(_) => 12,
        Change::AdmitOperator { .. } => 13,
        Change::DeleteOperator { .. } => 14,
        Change::PutService { .. } => 15,
        Change::DeleteService { .. } => 16,
        Change::PutSecret { .. } => 17,
        Change::DeleteSecret { .. } => 18,
        Change::CreateVolume(_) => 19,
        Change::DeleteVolume { .. } => 20,
        Change::PutNode(_) => 21,
        Change::SetNode { .. } => 22,
        Change::DeleteNode { .. } => 23,
        Change::CreateContainer(_) => 24,
        Change::Create(_) => 25,
        Change::Assign { .. } => 26,
        Change::Refuse { .. } => 27,
        Change::Remove { .. } => 28,
        Change::Observe { .. } => 29,
        Change::DeleteContainer { .. } => 30,
    }
}

#[test]
fn histories_have_every_change() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let made = (0..3000).map(|_| change().new_tree(&mut runner).expect("a change").current());
    let kinds: BTreeSet<_> = made.map(|change| kind_of(&change)).collect();
    assert_eq!(kinds, (0..31).collect());
}

proptest! {
    #[test]
    fn any_history_gives_the_same_bytes_and_survives_a_snapshot(changes in prop::collection::vec(change(), 0..60)) {
        let (mut one, mut two) = (founded(), founded());
        let mut gone = BTreeSet::new();
        for (i, change) in changes.iter().enumerate() {
            // Ids are random: no service has one that another had.
            match change {
                Change::PutService { service, .. } if gone.contains(&service.id) => continue,
                Change::DeleteService { id, .. } if one.service(id).is_some() => drop(gone.insert(id.clone())),
                _ => {}
            }
            let transaction = Transaction { changes: vec![as_the_api_has_it(&one, change)], ..Transaction::default() };
            prop_assert_eq!(one.apply(i as u64 + 1, &transaction), two.apply(i as u64 + 1, &transaction));
            if i % 7 == 3 {
                // One of them is restarted from a snapshot now and then.
                two = State::from_bytes(&two.to_bytes().expect("bytes")).expect("a state");
            }
        }
        prop_assert_eq!(one.to_bytes().expect("bytes"), two.to_bytes().expect("bytes"));
        // The indices say what the tables say.
        for state in [&one, &two] {
            let subnets: BTreeSet<_> = state.nodes().map(|node| node.subnet_index).collect();
            prop_assert_eq!(subnets.len(), state.nodes().count(), "two nodes have one subnet");
            let addresses: BTreeSet<_> = state.services().map(|service| service.virtual_index).collect();
            prop_assert_eq!(addresses.len(), state.services().count(), "two services have one address");
            for node in state.nodes() {
                let indexed = state.containers_on(&node.id).count();
                prop_assert_eq!(indexed, state.containers().filter(|c| c.node.as_ref() == Some(&node.id)).count());
            }
            for service in state.services() {
                let indexed = state.containers_of(&service.id).count();
                prop_assert_eq!(indexed, state.containers().filter(|c| c.service == service.id).count());
                prop_assert_eq!(state.service_named(&service.spec.name).map(|s| &s.id), Some(&service.id));
            }
        }
    }
}

/// A service with a published port, as its number and the port that it leads to.
fn publishing(generation: u64, container_port: u32, image: &str) -> Service {
    let mut web = service("s", "web", 2);
    web.generation = generation;
    web.spec.container = Arc::new(v1::ContainerSpec { image: image.to_owned(), ..Default::default() });
    web.spec.ports = vec![v1::Port { container_port, host_port: 80, ..Default::default() }];
    web
}

fn create(id: &str, generation: u64, slot: u32) -> Change {
    let (service, at) = ("s".into(), Timestamp(1));
    Change::Create(NewContainer { id: id.into(), service, generation, slot, pinned: None, failures: 0, at })
}

/// Each container's id, the number of its revision, its image, and the port that it listens on.
fn made_of(state: &State) -> Vec<(String, u64, String, u32)> {
    let of = |container: &Arc<Container>| {
        let revision = &container.revision;
        (container.id.to_string(), revision.number, revision.spec.image.clone(), revision.ports[0].container_port)
    };
    state.containers().map(of).collect()
}

#[test]
fn a_container_keeps_what_it_was_made_of() {
    for schema in [OLDEST_WRITTEN_SCHEMA, SCHEMA] {
        let mut state = State { schema: Schema(schema), ..founded() };
        apply(&mut state, [put(publishing(1, 8000, "one")), create("a", 1, 1), create("b", 1, 2)]);
        // Another image is another revision, also where ports change with it; what runs keeps its own.
        let replies = apply(
            &mut state,
            [
                put(publishing(2, 9000, "two")),
                Change::Remove { id: "b".into() },
                Change::DeleteContainer { id: "b".into() },
                create("late", 1, 2),
                create("c", 2, 2),
            ],
        );
        assert_eq!(replies[3], Err(Rejection::Conflict("service \"web\"".to_owned())));
        let own = |id: &str, number, image: &str, port| (id.to_owned(), number, image.to_owned(), port);
        // In words of earlier versions ports are the service's.
        let kept = |services| if schema == SCHEMA { 8000 } else { services };
        assert_eq!(made_of(&state), [own("a", 1, "one", kept(9000)), own("c", 2, "two", 9000)]);
        // What asks nothing else of those that run is theirs at once.
        apply(&mut state, [put(publishing(2, 9001, "two"))]);
        let newest = if schema == SCHEMA { 3 } else { 2 };
        let expected = [own("a", 1, "one", kept(9001)), own("c", newest, "two", 9001)];
        assert_eq!(made_of(&state), expected);
        assert_eq!(state.service(&"s".into()).map(|service| service.generation), Some(newest));
        let bytes = state.to_bytes().expect("bytes");
        let restored = State::from_bytes(&bytes).expect("a state");
        assert_eq!(restored.to_bytes().expect("bytes"), bytes);
        assert_eq!(made_of(&restored), expected);
        assert_eq!(restored.revisions_of(&"s".into()).count(), if schema == SCHEMA { 3 } else { 2 });
        let text = String::from_utf8(bytes).expect("JSON");
        assert_eq!(text.contains("\"revisions\""), schema == SCHEMA, "{text}");
    }
}

#[test]
fn revisions_are_bounded_and_go_with_their_last_container() {
    let mut state = State { schema: Schema(SCHEMA), ..founded() };
    apply(&mut state, [put(publishing(1, 80, "1")), create("a", 1, 1)]);
    for number in 2..=30 {
        apply(&mut state, [put(publishing(number, 80, &number.to_string()))]);
    }
    let numbers = |state: &State| state.revisions_of(&"s".into()).map(|one| one.number).collect::<Vec<_>>();
    let newest: Vec<_> = (21..=30).collect();
    assert_eq!(numbers(&state), [&[1], &newest[..]].concat(), "those that are in use, and the latest");
    apply(&mut state, [Change::DeleteService { id: "s".into(), expected: Expected::Any, ports_stay: true }]);
    assert_eq!(numbers(&state), [1]);
    let mut state = State::from_bytes(&state.to_bytes().expect("bytes")).expect("a state");
    assert_eq!(made_of(&state), [("a".to_owned(), 1, "1".to_owned(), 80)]);
    apply(&mut state, [Change::DeleteContainer { id: "a".into() }]);
    assert!(state.revisions.is_empty() && state.users.is_empty());
}

#[test]
fn another_value_of_a_secret_is_another_revision() {
    let mut state = State { schema: Schema(SCHEMA), ..founded() };
    let secret = |sequence| {
        let secret = Secret {
            id: "x".into(),
            version: 0,
            kind: v1::SecretKind::Secret,
            name: "key".to_owned(),
            labels: BTreeMap::new(),
            created_at: Timestamp(1),
            updated_at: Timestamp(1),
            sequence,
            size: 1,
            sealed: Sealed { key: String::new(), value: String::new() },
        };
        Change::PutSecret { secret: Box::new(secret), expected: Expected::Any }
    };
    let mut web = publishing(1, 80, "one");
    let mut mount = v1::SecretMount { source: "key".to_owned(), ..Default::default() };
    mount.set_on_update(v1::OnUpdate::Restart);
    Arc::make_mut(&mut web.spec.container).secrets = vec![mount];
    apply(&mut state, [secret(1), put(web), create("a", 1, 1), secret(2)]);
    let values: Vec<_> = state.revisions_of(&"s".into()).map(|one| (one.number, one.values["secret/key"])).collect();
    assert_eq!(values, [(1, 1), (2, 2)]);
    let [first, second] = [1, 2].map(|number| Arc::clone(&state.revisions[&("s".into(), number)]));
    assert!(Arc::ptr_eq(&first.spec, &second.spec), "it is the same spec");
}

#[test]
fn what_many_containers_share_is_stored_once() {
    const CONTAINERS: u32 = 10_000;
    let mut state = State { schema: Schema(SCHEMA), ..founded() };
    let mut web = service("s", "web", CONTAINERS);
    let env = [("LARGE".to_owned(), "x".repeat(100 << 10))].into();
    web.spec.container = Arc::new(v1::ContainerSpec { env, ..Default::default() });
    let creations = (1..=CONTAINERS).map(|slot| create(&format!("container-{slot}"), 1, slot));
    let changes = std::iter::once(put(web)).chain(creations).collect();
    state.apply(1, &Transaction { changes, ..Transaction::default() }).expect("made");
    let bytes = state.to_bytes().expect("bytes");
    // What a store makes of it.
    let stored = zstd::encode_all(bytes.as_slice(), 1).expect("compressed");
    assert!(stored.len() < 2 << 20, "{} of {} bytes", stored.len(), bytes.len());
    assert!(bytes.len() < 8 << 20, "{}", bytes.len());
    let restored = State::from_bytes(&bytes).expect("a state");
    let mut specs = restored.containers().map(|container| Arc::as_ptr(&container.revision));
    let first = specs.next();
    assert!(first.is_some() && specs.all(|spec| Some(spec) == first), "and kept once");
}
