use proptest::prelude::*;

use super::*;
use crate::{
    control::scheduler,
    ids::ContainerId,
    state::{
        ContainerState,
        tests::{apply, founded, node, observe, put, service},
    },
};

/// A cluster in which nothing happens by itself: tests play the agents.
struct World {
    state: State,
    now: u64,
    down: Vec<&'static str>,
    made: u32,
}

impl World {
    fn new(nodes: &[&'static str]) -> Self {
        let mut state = founded();
        apply(&mut state, nodes.iter().map(|id| Change::PutNode(Box::new(node(id, 100_000, 1 << 40)))));
        Self { state, now: 1_000_000, down: Vec::new(), made: 0 }
    }

    fn health(&self, node: &NodeId) -> Health {
        if self.down.contains(&node.as_str()) { Health::Down } else { Health::Ready }
    }

    fn plan(&self) -> Plan {
        plan(&self.state, |node| self.health(node), Timestamp(self.now))
    }

    /// One round of the controller.
    fn cycle(&mut self) -> Plan {
        let plan = self.plan();
        apply(&mut self.state, plan.changes.clone());
        for creation in &plan.create {
            self.made += 1;
            let id = ContainerId::from(format!("c{:05}", self.made));
            apply(&mut self.state, [creation.change(id, Timestamp(self.now))]);
        }
        let placed = scheduler::plan(&self.state, |node| self.health(node));
        let at = Timestamp(self.now);
        apply(&mut self.state, placed.assignments.into_iter().map(|(id, node)| Change::Assign { id, node, at }));
        self.now += 10;
        plan
    }

    /// Every agent that is up does what it is told.
    fn agents_obey(&mut self) {
        let reports: Vec<_> = self
            .state
            .containers()
            .filter_map(|c| {
                let node = c.node.as_ref().filter(|node| self.health(node) == Health::Ready)?;
                let state = match c.desired {
                    Desired::Running if !c.status.state.is_terminal() => ContainerState::Running,
                    Desired::Removed if !c.status.state.is_terminal() => ContainerState::Shutdown,
                    _ => return None,
                };
                Some(observe(c.id.as_str(), node.as_str(), state, self.now))
            })
            .collect();
        apply(&mut self.state, reports);
    }

    fn settle(&mut self) {
        for _ in 0..20 {
            self.cycle();
            self.agents_obey();
        }
    }

    fn fail(&mut self, id: &ContainerId) {
        let node = self.state.container(id).and_then(|c| c.node.clone()).expect("it is on a node");
        apply(&mut self.state, [observe(id.as_str(), node.as_str(), ContainerState::Failed, self.now)]);
    }

    fn live(&self) -> Vec<Arc<Container>> {
        let live = |c: &&Arc<Container>| c.desired == Desired::Running && !c.status.state.is_terminal();
        self.state.containers().filter(live).map(Arc::clone).collect()
    }

    /// Containers that may be running on nodes that can be reached.
    fn reachable(&self) -> usize {
        let runs = |c: &&Arc<Container>| {
            let up = c.node.as_ref().is_some_and(|node| self.health(node) == Health::Ready);
            up && !c.status.state.is_terminal()
        };
        self.state.containers().filter(runs).count()
    }
}

#[test]
fn a_service_is_filled_scaled_and_emptied() {
    let mut world = World::new(&["a", "b"]);
    apply(&mut world.state, [put(service("s", "web", 3))]);
    world.settle();
    let slots: Vec<_> = world.live().iter().map(|c| c.slot).collect();
    assert_eq!(slots, [1, 2, 3]);
    apply(&mut world.state, [put(service("s", "web", 1))]);
    world.settle();
    assert_eq!(world.state.containers().count(), 1, "records of slots that are gone go too");
    apply(
        &mut world.state,
        [Change::DeleteService { id: "s".into(), expected: crate::state::Expected::Any, ports_stay: true }],
    );
    world.settle();
    assert_eq!(world.state.containers().count(), 0);
    assert_eq!(world.cycle(), Plan::default(), "nothing is left to do");
}

#[test]
fn a_container_that_keeps_failing_is_replaced_later_and_later() {
    let mut world = World::new(&["a"]);
    apply(&mut world.state, [put(service("s", "web", 1))]);
    world.settle();
    let mut delays = Vec::new();
    for _ in 0..12 {
        let id = world.live()[0].id.clone();
        world.fail(&id);
        let plan = world.plan();
        assert!(plan.create.is_empty());
        let due = plan.wake_at().expect("a time");
        delays.push((due.0 - world.now) / 1000);
        world.now = due.0;
        assert_eq!(world.cycle().create.len(), 1);
        world.agents_obey();
    }
    assert_eq!(delays, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
    assert!(world.state.containers().count() <= KEPT_PER_SLOT + 1);
}

#[test]
fn of_a_container_that_no_node_has_had_nothing_is_left() {
    let mut world = World::new(&[]);
    apply(&mut world.state, [put(service("s", "web", 1))]);
    world.settle();
    let waiting = world.live()[0].id.clone();
    let mut other = service("s", "web", 1);
    other.generation = 2;
    apply(&mut world.state, [put(other)]);
    world.settle();
    assert!(world.state.container(&waiting).is_none(), "it was never more than wanted");
    assert_eq!(world.state.containers().count(), 1);
}

#[test]
fn policies_decide_whether_an_ended_container_is_replaced() {
    for (condition, ended, replaced) in [
        (RestartCondition::Any, ContainerState::Complete, true),
        (RestartCondition::OnFailure, ContainerState::Complete, false),
        (RestartCondition::OnFailure, ContainerState::Failed, true),
        (RestartCondition::Never, ContainerState::Failed, false),
    ] {
        let mut world = World::new(&["a"]);
        let mut web = service("s", "web", 1);
        web.spec.restart.condition = condition;
        apply(&mut world.state, [put(web)]);
        world.settle();
        let id = world.live()[0].id.clone();
        apply(&mut world.state, [observe(id.as_str(), "a", ended, world.now)]);
        world.now += 10_000;
        world.settle();
        assert_eq!(world.live().len() == 1, replaced, "{condition:?} {ended:?}");
    }
}

#[test]
fn a_slot_is_given_up_after_its_attempts() {
    let mut world = World::new(&["a"]);
    let mut web = service("s", "web", 1);
    web.spec.restart.max_attempts = 3;
    apply(&mut world.state, [put(web)]);
    for _ in 0..3 {
        world.settle();
        let id = world.live()[0].id.clone();
        world.fail(&id);
        world.now += 600_000;
    }
    world.settle();
    assert!(world.live().is_empty());
    assert_eq!(world.made, 3);
}

#[test]
fn containers_of_a_node_that_is_down_run_elsewhere_if_there_is_elsewhere() {
    let mut world = World::new(&["a", "b"]);
    apply(&mut world.state, [put(service("s", "web", 4))]);
    world.settle();
    world.down = vec!["a"];
    world.settle();
    let live = world.live();
    assert_eq!(live.len(), 4);
    assert!(live.iter().all(|c| c.node.as_ref().is_some_and(|node| node.as_str() == "b")));
    // It comes back: what it still runs is told to go.
    world.down.clear();
    world.settle();
    assert_eq!(world.reachable(), 4);

    let mut alone = World::new(&["a"]);
    apply(&mut alone.state, [put(service("s", "web", 2))]);
    alone.settle();
    alone.down = vec!["a"];
    alone.settle();
    assert_eq!((alone.live().len(), alone.made), (2, 2), "with nowhere to go they are left alone");
}

#[test]
fn a_lost_container_is_told_to_go_before_another_takes_its_slot() {
    let mut world = World::new(&["a", "b"]);
    apply(&mut world.state, [put(service("s", "web", 1))]);
    world.settle();
    let node = world.live()[0].node.clone().expect("it is on a node");
    world.down = vec![if node.as_str() == "a" { "a" } else { "b" }];
    let first = world.plan();
    assert_eq!((first.create.len(), first.changes.len()), (0, 1), "{first:?}");
    // While that was being written, its node came back: there is nothing to replace before it is gone.
    apply(&mut world.state, first.changes);
    let down = std::mem::take(&mut world.down);
    assert!(world.plan().create.is_empty());
    world.down = down;
    assert_eq!(world.plan().create.len(), 1);
}

#[test]
fn a_drained_node_is_left_one_container_at_a_time() {
    let mut world = World::new(&["a", "b"]);
    let mut everywhere = service("g", "everywhere", 1);
    everywhere.spec.mode = Mode::Global;
    apply(&mut world.state, [put(service("s", "web", 6)), put(everywhere)]);
    world.settle();
    let on = |world: &World, service: &str, node: &str| {
        let live = world.live();
        live.iter().filter(|c| c.service_name == service && c.node.as_ref().is_some_and(|n| n.as_str() == node)).count()
    };
    assert_eq!((on(&world, "web", "a"), on(&world, "everywhere", "a")), (3, 1));
    let set =
        |availability| Change::SetNode { id: "a".into(), availability: Some(availability), labels: BTreeMap::new() };
    apply(&mut world.state, [set(Availability::Cordoned)]);
    world.settle();
    assert_eq!((on(&world, "web", "a"), on(&world, "everywhere", "a")), (3, 1), "it keeps what it has");
    apply(&mut world.state, [set(Availability::Drained)]);
    for _ in 0..30 {
        world.cycle();
        let is_up = |c: &&Arc<Container>| c.service_name == "web" && c.status.state == ContainerState::Running;
        let up = world.live().iter().filter(is_up).count();
        assert!(up >= 5, "{up} of 6 are up");
        world.agents_obey();
    }
    assert_eq!((on(&world, "web", "a"), on(&world, "web", "b"), on(&world, "everywhere", "a")), (0, 6, 0));
    assert_eq!(world.cycle(), Plan::default(), "nothing is left to do");
    // A node that is none for a service is left by it alone.
    apply(&mut world.state, [set(Availability::Active)]);
    let mut constrained = service("s", "web", 6);
    constrained.spec.constraints = vec!["node.hostname==a".parse().expect("a constraint")];
    apply(&mut world.state, [put(constrained)]);
    world.settle();
    assert_eq!((on(&world, "web", "a"), on(&world, "everywhere", "b"), on(&world, "everywhere", "a")), (6, 1, 1));
}

fn set(node: &str, availability: Availability) -> Change {
    Change::SetNode { id: node.into(), availability: Some(availability), labels: BTreeMap::new() }
}

#[test]
fn what_nobody_else_could_run_is_left_where_it_is() {
    let mut world = World::new(&["a", "b"]);
    let mut bound = service("s", "bound", 1);
    bound.spec.constraints = vec!["node.hostname==a".parse().expect("a constraint")];
    apply(&mut world.state, [put(bound)]);
    world.settle();
    world.down = vec!["a"];
    assert_eq!(world.plan(), Plan::default(), "b is not for it");
    apply(&mut world.state, [put(service("t", "web", 2))]);
    world.down.clear();
    world.settle();
    world.down = vec!["a"];
    apply(&mut world.state, [set("b", Availability::Cordoned)]);
    assert_eq!(world.plan(), Plan::default(), "b takes nothing");
    apply(&mut world.state, [set("b", Availability::Active)]);
    assert_eq!(world.plan().changes.len(), 1);
}

#[test]
fn a_cordoned_node_keeps_its_container_of_a_global_service_and_holds_nobody_up() {
    let mut world = World::new(&["a", "b", "c"]);
    let everywhere = |generation| {
        let mut everywhere = service("g", "everywhere", 1);
        everywhere.spec.mode = Mode::Global;
        everywhere.generation = generation;
        put(everywhere)
    };
    apply(&mut world.state, [everywhere(1)]);
    world.settle();
    apply(&mut world.state, [set("b", Availability::Cordoned), everywhere(2)]);
    world.settle();
    let generations = |world: &World| {
        let live = world.live();
        let running =
            live.iter().filter(|c| c.status.state == ContainerState::Running && c.desired == Desired::Running);
        running.map(|c| (c.node.as_ref().map(ToString::to_string), c.revision.number)).collect::<BTreeMap<_, _>>()
    };
    let on = |node: &str, generation| (Some(node.to_owned()), generation);
    assert_eq!(generations(&world), BTreeMap::from([on("a", 2), on("b", 1), on("c", 2)]));
    assert_eq!(world.plan(), Plan::default());
    apply(&mut world.state, [set("b", Availability::Active)]);
    world.settle();
    assert_eq!(generations(&world), BTreeMap::from([on("a", 2), on("b", 2), on("c", 2)]));
}

#[test]
fn a_container_of_which_nobody_hears_does_not_serve() {
    let mut world = World::new(&["a", "b", "c"]);
    let mut patient = service("s", "web", 2);
    patient.spec.lost_after = Duration::from_secs(600);
    apply(&mut world.state, [put(patient)]);
    world.settle();
    let nodes: Vec<String> = world.live().iter().filter_map(|c| c.node.as_ref().map(ToString::to_string)).collect();
    let silent = ["a", "b", "c"].into_iter().find(|node| *node == nodes[0]).expect("one of them");
    apply(&mut world.state, [set(&nodes[1], Availability::Drained)]);
    world.down = vec![silent];
    assert_eq!(world.plan().changes, [], "the other is the only one that serves");
    world.down.clear();
    assert_eq!(world.plan().changes.len(), 1);
}

#[test]
fn a_service_waits_for_its_node_as_long_as_it_says() {
    let mut world = World::new(&["a", "b"]);
    let mut patient = service("s", "web", 2);
    patient.spec.lost_after = Duration::from_secs(60);
    apply(&mut world.state, [put(patient)]);
    world.settle();
    let plan_when_down_for = |world: &World, seconds: u64| {
        let standing = |node: &NodeId| match node.as_str() {
            "a" => Standing { health: Health::Down, down_for: Duration::from_secs(seconds) },
            _ => Health::Ready.into(),
        };
        plan(&world.state, standing, Timestamp(world.now))
    };
    let waits = plan_when_down_for(&world, 20);
    assert_eq!((waits.create.len(), waits.changes.len()), (0, 0), "{waits:?}");
    assert_eq!(waits.wake_at(), Some(Timestamp(world.now + 40_000)));
    let gives_up = plan_when_down_for(&world, 60);
    assert_eq!(gives_up.changes.len(), 1, "{gives_up:?}");
    assert_eq!(gives_up.wake_at(), None);
}

#[test]
fn a_changed_spec_replaces_one_container_at_a_time() {
    let mut world = World::new(&["a", "b"]);
    apply(&mut world.state, [put(service("s", "web", 4))]);
    world.settle();
    let mut changed = service("s", "web", 4);
    changed.generation = 2;
    Arc::make_mut(&mut changed.spec.container).image = "newer".to_owned();
    apply(&mut world.state, [put(changed)]);
    for _ in 0..40 {
        world.cycle();
        let running = world.live().iter().filter(|c| c.status.state == ContainerState::Running).count();
        assert!(running >= 3, "{running} of 4 are up");
        world.agents_obey();
    }
    assert_eq!(world.live().len(), 4);
    assert!(world.live().iter().all(|c| c.revision.number == 2));
}

#[test]
fn an_update_is_not_held_up_by_containers_that_serve_nobody() {
    let mut world = World::new(&["a"]);
    let mut web = service("s", "web", 2);
    web.spec.resources.reservations.cpu_millis = 60_000;
    apply(&mut world.state, [put(web)]);
    world.settle();
    let states = |world: &World| world.live().iter().map(|c| c.status.state).collect::<Vec<_>>();
    assert_eq!(states(&world), [ContainerState::Running, ContainerState::New], "the second does not fit");
    let mut smaller = service("s", "web", 2);
    smaller.generation = 2;
    apply(&mut world.state, [put(smaller)]);
    world.settle();
    assert_eq!(states(&world), [ContainerState::Running, ContainerState::Running]);
    assert!(world.live().iter().all(|c| c.revision.number == 2));

    let mut global = World::new(&["a", "b"]);
    let mut agent = service("s", "agent", 0);
    agent.spec.mode = Mode::Global;
    apply(&mut global.state, [put(agent.clone())]);
    global.settle();
    global.down = vec!["a"];
    agent.generation = 2;
    apply(&mut global.state, [put(agent)]);
    global.settle();
    let on = |world: &World, node: &str| {
        let node = node.into();
        world.live().iter().find(|c| c.pinned.as_ref() == Some(&node)).map(|c| c.revision.number)
    };
    assert_eq!((on(&global, "a"), on(&global, "b")), (Some(1), Some(2)));
    global.down.clear();
    global.settle();
    assert_eq!((on(&global, "a"), on(&global, "b")), (Some(2), Some(2)));
}

#[test]
fn a_global_service_follows_the_nodes() {
    let mut world = World::new(&["a", "b"]);
    let mut agent = service("s", "agent", 0);
    agent.spec.mode = Mode::Global;
    apply(&mut world.state, [put(agent)]);
    world.settle();
    assert_eq!(world.live().len(), 2);
    apply(&mut world.state, [Change::PutNode(Box::new(node("c", 1000, 1000)))]);
    world.settle();
    assert_eq!(world.live().len(), 3);
    apply(&mut world.state, [Change::DeleteNode { id: "a".into() }]);
    world.settle();
    assert_eq!(world.live().len(), 2);
}

#[derive(Clone, Debug)]
enum Happening {
    Scale(u32),
    Obey,
    Fail(prop::sample::Index),
    Down(bool),
    Change,
    Wait,
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        (0u32..6).prop_map(Happening::Scale),
        Just(Happening::Obey),
        Just(Happening::Obey),
        any::<prop::sample::Index>().prop_map(Happening::Fail),
        any::<bool>().prop_map(Happening::Down),
        Just(Happening::Change),
        Just(Happening::Wait),
    ]
}

proptest! {
    #[test]
    fn never_more_than_asked_for_and_in_the_end_exactly(happenings in prop::collection::vec(happening(), 0..60)) {
        let mut world = World::new(&["a", "b", "c"]);
        let (mut replicas, mut generation) = (2, 1);
        let spec = |replicas, generation| {
            let mut web = service("s", "web", replicas);
            web.generation = generation;
            put(web)
        };
        apply(&mut world.state, [spec(replicas, generation)]);
        for happening in happenings {
            match happening {
                Happening::Scale(n) => {
                    replicas = n;
                    apply(&mut world.state, [spec(replicas, generation)]);
                }
                Happening::Obey => world.agents_obey(),
                Happening::Fail(index) => {
                    let running: Vec<_> = world.live().into_iter().filter(|c| c.node.is_some()).collect();
                    if !running.is_empty() {
                        world.fail(&index.get(&running).id.clone());
                    }
                }
                Happening::Down(down) => world.down = if down { vec!["a"] } else { Vec::new() },
                Happening::Change => {
                    generation += 1;
                    apply(&mut world.state, [spec(replicas, generation)]);
                }
                Happening::Wait => world.now += 400_000,
            }
            world.cycle();
            let not_ended = world.state.containers().filter(|c| !c.status.state.is_terminal());
            // A node that comes back still runs what was replaced, until it is told.
            let comes_back = |c: &Container| c.desired == Desired::Removed && c.node == Some("a".into());
            let mut slots = BTreeSet::new();
            for container in not_ended.filter(|c| !comes_back(c)) {
                let is_up = container.node.as_ref().is_none_or(|node| world.health(node) == Health::Ready);
                prop_assert!(!is_up || slots.insert(container.slot), "slot {} has two", container.slot);
            }
            prop_assert!(world.live().iter().all(|c| c.slot <= replicas), "a slot that is gone has a container");
        }
        world.down.clear();
        for _ in 0..40 {
            world.now += 400_000;
            world.cycle();
            world.agents_obey();
        }
        prop_assert_eq!(world.reachable(), replicas as usize);
        prop_assert!(world.live().iter().all(|c| c.revision.number == generation));
    }
}
