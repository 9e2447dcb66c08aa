//! The world: machines, what goes wrong with them, and what must hold whatever does.

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::PanicHookInfo,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, seq::IndexedRandom as _};
use rand_xoshiro::Xoshiro256PlusPlus;
use sha2::{Digest as _, Sha256};
use turmoil::Sim;
use warren_manager::{
    ids::ContainerId,
    state::{ContainerState, Desired, Mode, OLDEST_WRITTEN_SCHEMA, SCHEMA, State},
};

use crate::{
    agent::{self, Agent},
    disk::Disk,
    history::{self, Call, Operation, Outcome},
    manager::{self, Hardware},
    operator,
    shared::{Shared, manager_name},
};

/// Managers that there may be; three or five take part at first.
const MANAGERS: u64 = 8;
const AGENTS: usize = 50;
/// Machines that the agents are on: an agent alone on each would be simulated no differently, only slower.
const AGENT_MACHINES: usize = 10;
const OPERATORS: u64 = 3;

const TICK: Duration = Duration::from_millis(5);
const SETTLE: Duration = Duration::from_secs(3);
const FAULTS: Duration = Duration::from_secs(25);
/// How long everything may take to be well again once nothing goes wrong any more.
const CALM: Duration = Duration::from_secs(90);
const DISK: Duration = Duration::from_millis(5);
/// An agent that has been in its session for this long has done what it was told at first.
const SETTLED: Duration = Duration::from_secs(2);
/// How long a container may run on after the leader has decided that it is to end, while nothing keeps its node from being told.
const LEAVES: Duration = Duration::from_secs(3);
/// Within this everybody has noticed that links are whole again.
const NOTICED: Duration = Duration::from_secs(3);
/// Within this what went wrong before has been put right.
const MENDED: Duration = Duration::from_secs(6);
/// An agent that is without a session for no longer is well: what runs on it stays there. A new leader gives it more time.
const GAP: Duration = Duration::from_millis(1500);
const FAILOVER: Duration = Duration::from_secs(5);
/// What consensus says when it stops because a disk is full.
const FULL: &str = "no storage space";
/// Every so many revisions the states of managers are compared byte by byte.
const COMPARED: u64 = 5;

/// One run.
struct World<'a> {
    sim: Sim<'a>,
    shared: Shared,
    dice: Xoshiro256PlusPlus,
    hardware: BTreeMap<u64, Hardware>,
    agents: Vec<Agent>,
    crashed: BTreeSet<String>,
    next_manager: u64,
    digests: BTreeMap<u64, (u64, String)>,
    seen: BTreeMap<u64, u64>,
    /// Which manager has been hearing which agents without a break, and since when.
    heard: BTreeMap<String, (u64, Duration)>,
    /// Which agents have been in a session with whoever led, without a break that matters, and who that was last.
    well: BTreeMap<String, (Stretch, String)>,
    /// Which slots of which services the leader wants.
    wanted: BTreeMap<(String, u32, u64), Stretch>,
    /// Containers' revisions, as the leader knew them last.
    revisions: BTreeMap<String, u64>,
    /// Until when the leader wanted which containers to run.
    kept: BTreeMap<String, Duration>,
    /// Since when no link has been cut, nor might be.
    whole: Option<Duration>,
    fails: bool,
    /// Whether links are cut at all in this run: where they are not, agents are well for longer.
    cuts: bool,
}

/// What has panicked, in whatever task.
static PANICKED: OnceLock<String> = OnceLock::new();

/// Notes that something has panicked, which ends the run.
pub(crate) fn panicked(what: &PanicHookInfo<'_>) {
    let _ = PANICKED.set(what.to_string());
}

/// From when to when something was so.
#[derive(Clone, Copy)]
struct Stretch {
    since: Duration,
    until: Duration,
}

impl Stretch {
    fn begin(now: Duration) -> Self {
        Self { since: now, until: now }
    }

    /// It is so now; if it has not been for longer than the gap, that is another stretch.
    fn prolong(&mut self, now: Duration, gap: Duration) {
        if now > self.until + gap {
            self.since = now;
        }
        self.until = now;
    }
}

fn machine(number: usize) -> String {
    format!("a{number}")
}

fn digest(state: &State) -> Result<String, String> {
    let bytes = state.to_bytes().map_err(|error| error.to_string())?;
    Ok(Sha256::digest(&bytes).iter().take(8).map(|byte| format!("{byte:02x}")).collect())
}

/// Runs a seed; returns what tells this run from another.
pub(crate) fn run(seed: u64, says: bool) -> Result<String, String> {
    let mut dice = Xoshiro256PlusPlus::seed_from_u64(seed);
    let managers = if dice.random_bool(0.5) { 3 } else { 5 };
    let cuts = dice.random_bool(0.7);
    // Half of the clusters are upgraded under way: each manager at one of its starts.
    let schema = if dice.random_bool(0.5) { OLDEST_WRITTEN_SCHEMA } else { SCHEMA };
    let shared = Shared::new((1..=managers).collect(), says);
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .tick_duration(TICK)
        .simulation_duration(SETTLE + FAULTS + CALM * 2)
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(20))
        .tcp_capacity(1 << 16)
        .enable_random_order()
        .build();
    let mut hardware = BTreeMap::new();
    for id in 1..=MANAGERS {
        let own = Hardware {
            id,
            disk: Disk::new(DISK),
            skew: Arc::new(AtomicI64::new(0)),
            starts: Arc::new(AtomicU64::new(0)),
            // Who joins one day is of the new version: it may be told to read what the others have raised the schema to.
            newest_schema: Arc::new(AtomicU32::new(if id <= managers { schema } else { SCHEMA })),
        };
        let (host, shared) = (own.clone(), shared.clone());
        sim.host(manager_name(id), move || manager::run(host.clone(), seed, shared.clone()));
        hardware.insert(id, own);
    }
    let agents: Vec<Agent> = (0..AGENTS).map(|number| Agent::new(number, seed, shared.clone())).collect();
    for number in 0..AGENT_MACHINES {
        let own: Vec<Agent> = agents.iter().skip(number).step_by(AGENT_MACHINES).cloned().collect();
        sim.host(machine(number), move || agent::run(own.clone()));
    }
    for number in 0..OPERATORS {
        let shared = shared.clone();
        sim.host(format!("o{number}"), move || operator::run(number, seed, shared.clone()));
    }
    let mut world = World {
        sim,
        shared,
        dice,
        hardware,
        agents,
        crashed: BTreeSet::new(),
        next_manager: managers + 1,
        digests: BTreeMap::new(),
        seen: BTreeMap::new(),
        heard: BTreeMap::new(),
        well: BTreeMap::new(),
        wanted: BTreeMap::new(),
        revisions: BTreeMap::new(),
        kept: BTreeMap::new(),
        whole: Some(Duration::ZERO),
        fails: false,
        cuts,
    };
    world.live(SETTLE)?;
    let end = world.sim.elapsed() + FAULTS;
    while world.sim.elapsed() < end {
        world.go_wrong()?;
        let pause = Duration::from_millis(world.dice.random_range(100..1500));
        world.live(pause)?;
    }
    world.heal()?;
    world.converge()?;
    let mut calls = world.shared.calls();
    let (asked, answered) = (calls.len(), calls.iter().filter(|call| call.outcome.is_known()).count());
    // What is there in the end is what was acknowledged.
    calls.extend(world.last_look());
    history::check(&calls)?;
    world.shared.trace(format!("{asked} calls of operators, {answered} answered, can be put in an order"));
    let started = world.shared.started();
    world.shared.trace(format!("{started} containers were started"));
    if started == 0 {
        return Err("no container ever ran".to_owned());
    }
    Ok(world.shared.digest())
}

impl World<'_> {
    /// Lets time pass, and looks at everything after every step.
    fn live(&mut self, time: Duration) -> Result<(), String> {
        let end = self.sim.elapsed() + time;
        while self.sim.elapsed() < end {
            self.sim.step().map_err(|error| format!("a machine failed: {error}"))?;
            self.shared.set_now(self.sim.elapsed());
            if let Some(what) = PANICKED.get() {
                return Err(what.clone());
            }
            self.shared.failure().map_or(Ok(()), Err)?;
            self.check().map_err(|why| format!("after {:.3} s: {why}", self.sim.elapsed().as_secs_f64()))?;
        }
        Ok(())
    }

    fn check(&mut self) -> Result<(), String> {
        self.check_exclusive()?;
        let managers = self.shared.managers();
        let mut current = None;
        for (id, running) in &managers {
            let status = running.raft.status();
            if status.is_leader {
                // A term may have several, one after the other: the one with the higher number supersedes.
                current = current.max(Some((status.term, *id)));
            }
            let state = running.state.borrow();
            let revision = state.revision();
            let before = self.seen.insert(*id, revision).unwrap_or(0);
            if revision < before {
                return Err(format!("manager {id} went back from revision {before} to {revision}"));
            }
            if revision != before && revision % COMPARED == 0 {
                let own = digest(&state)?;
                let (other, known) = self.digests.entry(revision).or_insert_with(|| (*id, own.clone()));
                if *known != own {
                    return Err(format!("managers {other} and {id} differ at revision {revision}"));
                }
            }
        }
        // What a leader that was deposed, or has crashed, told its agents is not what the present one knows.
        let Some((_, leader)) = current else { return Ok(()) };
        let now = self.sim.elapsed();
        let heard = self.shared.heard(leader);
        for agent in &self.agents {
            if !heard.contains(&agent.id) {
                if self.heard.remove(&agent.id).is_some() {
                    self.shared.trace(format!("{} is no longer heard by {}", agent.id, manager_name(leader)));
                }
            } else if self.heard.get(&agent.id).is_none_or(|(by, _)| *by != leader) {
                self.heard.insert(agent.id.clone(), (leader, now));
            }
        }
        self.note_what_is_wanted(leader);
        self.check_slots(leader)?;
        self.check_stays(leader)
    }

    fn note_what_is_wanted(&mut self, leader: u64) {
        let now = self.sim.elapsed();
        let managers = self.shared.managers();
        let Some(running) = managers.get(&leader) else { return };
        let state = running.state.borrow();
        for container in state.containers() {
            self.revisions.insert(container.id.to_string(), container.revision.number);
            if container.desired == Desired::Running {
                self.kept.insert(container.id.to_string(), now);
            }
        }
        for service in state.services() {
            let Mode::Replicated(replicas) = service.spec.mode else { continue };
            for slot in 1..=replicas {
                let key = (service.id.to_string(), slot, service.generation);
                self.wanted.entry(key).or_insert(Stretch::begin(now)).prolong(now, TICK * 2);
            }
        }
    }

    /// No agent that is well is told to stop a container that is wanted: not when managers restart, nor when another leads.
    fn check_stays(&mut self, leader: u64) -> Result<(), String> {
        let now = self.sim.elapsed();
        let leader = manager_name(leader);
        // By what is lost on the way to a manager an agent is not well, and does not know.
        let hears = self.whole.is_some_and(|whole| now > whole + NOTICED);
        for agent in &self.agents {
            if hears && agent.settled().is_some_and(|(manager, _)| manager == leader) {
                let (well, with) =
                    self.well.entry(agent.id.clone()).or_insert_with(|| (Stretch::begin(now), leader.clone()));
                well.prolong(now, if *with == leader { GAP } else { FAILOVER });
                with.clone_from(&leader);
            }
            let Some((well, _)) = self.well.get(&agent.id) else { continue };
            for told in agent.told_to_stop() {
                // One of an earlier revision is to go.
                let revision = self.revisions.get(&told.id).copied().unwrap_or_default();
                let wanted = self.wanted.get(&(told.slot.0.clone(), told.slot.1, revision)).copied();
                let was_wanted =
                    wanted.is_some_and(|wanted| now <= wanted.until + TICK && now >= wanted.since + MENDED);
                let was_well = now <= well.until + GAP && now >= well.since.max(told.since) + MENDED;
                if was_wanted && was_well {
                    let (service, slot) = told.slot;
                    return Err(format!(
                        "{} is well, and was told to stop {}, slot {slot} of service {service}",
                        agent.id, told.id
                    ));
                }
            }
        }
        Ok(())
    }

    /// No two containers have the same port of a node, nor the same exclusive volume, whoever knows of them.
    fn check_exclusive(&self) -> Result<(), String> {
        let mut held = BTreeMap::new();
        let managers = self.shared.managers();
        // A revision is the same, whoever knows it.
        let ports = |id: &str| {
            let id = ContainerId::from(id);
            let known = managers.values().find_map(|running| running.state.borrow().container(&id).cloned());
            known.map(|known| known.revision.node_ports().map(|port| port.host_port).collect::<Vec<_>>())
        };
        for agent in &self.agents {
            for (id, service, _) in agent.images() {
                let ports = ports(&id).unwrap_or_default().into_iter();
                let ports = ports.map(|port| format!("port {port} of {}", agent.id));
                for what in ports.chain(operator::volume(&service)) {
                    if let Some(other) = held.insert(what.clone(), &agent.id) {
                        return Err(format!("two containers hold {what}, on {other} and {}", agent.id));
                    }
                }
            }
        }
        Ok(())
    }

    /// No two containers have the same slot on nodes that the leader reaches, and none that is to end is there for long.
    fn check_slots(&self, leader: u64) -> Result<(), String> {
        let mut slots = BTreeMap::new();
        for agent in &self.agents {
            let (Some((manager, since)), Some((_, heard))) = (agent.settled(), self.heard.get(&agent.id)) else {
                continue;
            };
            if manager != manager_name(leader) || self.sim.elapsed() < since.max(*heard) + SETTLED {
                continue;
            }
            for (slot, id) in agent.running() {
                let kept = self.kept.get(&id).copied().unwrap_or_default();
                let told = self.whole.map(|whole| kept.max(since).max(*heard).max(whole + NOTICED) + LEAVES);
                if told.is_some_and(|told| self.sim.elapsed() > told) {
                    let node = &agent.id;
                    return Err(format!("{id} on {node} is to end, and runs on"));
                }
                if let Some((node, other)) = slots.insert(slot.clone(), (agent.id.clone(), id.clone())) {
                    let (service, number) = slot;
                    return Err(format!(
                        "slot {number} of service {service} has two containers: {other} on {node} and {id} on {}",
                        agent.id
                    ));
                }
            }
        }
        Ok(())
    }

    fn names(&self) -> Vec<String> {
        let managers = (1..=MANAGERS).map(manager_name);
        managers
            .chain((0..AGENT_MACHINES).map(machine))
            .chain((0..OPERATORS).map(|number| format!("o{number}")))
            .collect()
    }

    fn any_manager(&mut self) -> u64 {
        let members: Vec<u64> = self.shared.members().into_iter().collect();
        *members.choose(&mut self.dice).unwrap_or(&1)
    }

    fn crash(&mut self, name: String) {
        if self.crashed.insert(name.clone()) {
            self.shared.trace(format!("{name} crashes"));
            self.sim.crash(name.as_str());
            if let Some(id) = name.strip_prefix('m').and_then(|id| id.parse().ok()) {
                self.shared.manager_crashed(id);
                self.seen.remove(&id);
            }
            if let Some(number) = name.strip_prefix('a').and_then(|number| number.parse().ok()) {
                self.agents.iter().skip(number).step_by(AGENT_MACHINES).for_each(Agent::crash);
            }
        }
    }

    /// The processes of a machine's agents end; its containers do not.
    fn stop_agents(&mut self, number: usize) {
        let name = machine(number);
        if self.crashed.insert(name.clone()) {
            self.shared.trace(format!("the agents on {name} end"));
            self.sim.crash(name.as_str());
            self.agents.iter().skip(number).step_by(AGENT_MACHINES).for_each(Agent::stop_agent);
        }
    }

    fn restart(&mut self, name: String) {
        self.crashed.remove(&name);
        self.shared.trace(format!("{name} starts"));
        if let Some(id) = name.strip_prefix('m').and_then(|id| id.parse().ok()) {
            self.shared.manager_crashed(id);
            self.seen.remove(&id);
            if self.dice.random_bool(0.5) {
                self.upgrade(id);
            }
        }
        self.sim.bounce(name.as_str());
    }

    /// Gives a manager the new version, from its next start on.
    fn upgrade(&mut self, id: u64) {
        if self.hardware.get(&id).is_some_and(|own| own.newest_schema.swap(SCHEMA, Ordering::Relaxed) != SCHEMA) {
            self.shared.trace(format!("{} is upgraded", manager_name(id)));
        }
    }

    /// Some machines on one side, the others on the other.
    fn sides(&mut self) -> (Vec<String>, Vec<String>) {
        let names = self.names();
        let share = [0.1, 0.3, 0.5].choose(&mut self.dice).copied().unwrap_or(0.5);
        let dice = &mut self.dice;
        names.into_iter().partition(|_| dice.random_bool(share))
    }

    fn go_wrong(&mut self) -> Result<(), String> {
        match self.dice.random_range(0..17) {
            0..3 => {
                let id = self.any_manager();
                self.crash(manager_name(id));
            }
            3..6 => {
                let crashed: Vec<String> = self.crashed.iter().cloned().collect();
                if let Some(name) = crashed.choose(&mut self.dice) {
                    self.restart(name.clone());
                }
            }
            6 | 7 | 14 if !self.cuts => {}
            6 => {
                let (one, other) = self.sides();
                self.shared.trace(format!("a partition: {one:?}"));
                self.whole = None;
                for a in &one {
                    for b in &other {
                        self.sim.partition(a.as_str(), b.as_str());
                    }
                }
            }
            7 => {
                let id = self.any_manager();
                let one = [manager_name(id)];
                let others: Vec<String> = self.names().into_iter().filter(|name| *name != one[0]).collect();
                let to_it = self.dice.random_bool(0.5);
                self.whole = None;
                self.shared.trace(format!("nothing goes {} {}", if to_it { "to" } else { "from" }, one[0]));
                for other in &others {
                    let (from, to) = if to_it { (other, &one[0]) } else { (&one[0], other) };
                    self.sim.partition_oneway(from.as_str(), to.as_str());
                }
            }
            8..10 => self.repair(),
            10 => {
                let id = self.any_manager();
                let full = self.dice.random_bool(0.5);
                self.shared.trace(format!(
                    "the disk of {} is {}",
                    manager_name(id),
                    if full { "full" } else { "empty" }
                ));
                self.hardware[&id].disk.set_full(full);
            }
            11 => {
                let id = self.any_manager();
                let latency = Duration::from_millis(self.dice.random_range(1..400));
                self.shared.trace(format!("the disk of {} takes {latency:?}", manager_name(id)));
                self.hardware[&id].disk.set_latency(latency);
            }
            12 => {
                let id = self.any_manager();
                let step = self.dice.random_range(-3_600_000..3_600_000);
                self.shared.trace(format!("the clock of {} steps by {step} ms", manager_name(id)));
                self.hardware[&id].skew.fetch_add(step, Ordering::Relaxed);
            }
            13 => {
                let number = self.dice.random_range(0..AGENT_MACHINES);
                self.crash(machine(number));
            }
            14 => {
                self.fails = self.dice.random_bool(0.5);
                let rate = if self.fails { 0.002 } else { 0.0 };
                self.shared.trace(format!("links fail at {rate}"));
                self.sim.set_fail_rate(rate);
                if self.fails {
                    self.whole = None;
                }
            }
            15 => {
                let number = self.dice.random_range(0..AGENT_MACHINES);
                self.stop_agents(number);
            }
            _ => self.change_members(),
        }
        self.restart_stopped()
    }

    /// A manager whose consensus has stopped says so in its health: whoever looks after processes starts it anew. A full disk is the only
    /// reason that there is.
    fn restart_stopped(&mut self) -> Result<(), String> {
        for (id, running) in self.shared.managers() {
            let Some(why) = running.raft.status().failure else { continue };
            if !why.contains(FULL) {
                return Err(format!("{} has stopped: {why}", manager_name(id)));
            }
            self.crash(manager_name(id));
        }
        for id in 1..=MANAGERS {
            let name = manager_name(id);
            if !self.crashed.contains(&name) && !self.sim.is_host_running(name.as_str()) {
                // It has ended by itself.
                self.crashed.insert(name);
            }
        }
        Ok(())
    }

    fn repair(&mut self) {
        self.shared.trace("links are repaired".to_owned());
        if !self.fails {
            self.whole = Some(self.sim.elapsed());
        }
        let names = self.names();
        for (at, a) in names.iter().enumerate() {
            for b in &names[at + 1..] {
                self.sim.repair(a.as_str(), b.as_str());
            }
        }
    }

    /// A manager joins or leaves for good; there are always at least three, and their numbers are never used again.
    fn change_members(&mut self) {
        let mut members = self.shared.members();
        if self.next_manager <= MANAGERS && (members.len() <= 3 || self.dice.random_bool(0.5)) {
            members.insert(self.next_manager);
            self.next_manager += 1;
        } else if members.len() > 3 {
            let id = self.any_manager();
            members.remove(&id);
        }
        self.shared.trace(format!("the managers are to be {members:?}"));
        self.shared.set_members(members);
    }

    /// Nothing goes wrong any more.
    fn heal(&mut self) -> Result<(), String> {
        self.shared.trace("all is well again".to_owned());
        self.shared.calm();
        self.sim.set_fail_rate(0.0);
        self.fails = false;
        self.repair();
        let hardware: Vec<Hardware> = self.hardware.values().cloned().collect();
        for own in hardware {
            if own.newest_schema.load(Ordering::Relaxed) != SCHEMA {
                self.upgrade(own.id);
                self.crash(manager_name(own.id));
            }
            own.disk.set_full(false);
            own.disk.set_latency(DISK);
            own.skew.store(0, Ordering::Relaxed);
        }
        self.restart_again()
    }

    /// Waits until everything is as operators want it.
    fn converge(&mut self) -> Result<(), String> {
        let end = self.sim.elapsed() + CALM;
        loop {
            self.live(Duration::from_millis(500))?;
            match self.is_converged() {
                Ok(()) => {
                    self.shared.trace("all is as it should be".to_owned());
                    return Ok(());
                }
                Err(why) if self.sim.elapsed() >= end => return Err(format!("not well again after {CALM:?}: {why}")),
                Err(_) => self.restart_again()?,
            }
        }
    }

    /// What could not start, or has stopped, while links were still down is started again.
    fn restart_again(&mut self) -> Result<(), String> {
        self.restart_stopped()?;
        let crashed: Vec<String> = self.crashed.iter().cloned().collect();
        for name in crashed {
            self.restart(name);
        }
        Ok(())
    }

    /// What every manager knows of the services in the end, as answers to a last question.
    fn last_look(&self) -> Vec<Call> {
        let now = self.sim.elapsed();
        let (managers, members) = (self.shared.managers(), self.shared.members());
        let Some(running) = members.iter().find_map(|id| managers.get(id)) else { return Vec::new() };
        let state = running.state.borrow();
        let look = |key: String| {
            let service = state.services().find(|service| service.spec.name.as_str() == key);
            let outcome = match service.map(|service| (service.spec.container.image.as_str(), service.spec.mode)) {
                Some((image, Mode::Replicated(replicas))) => Outcome::Read(operator::value(image, replicas)),
                Some((_, Mode::Global)) => Outcome::Unknown,
                None => Outcome::Absent,
            };
            Call { key, operation: Operation::Read, outcome, called: now, returned: now }
        };
        operator::services().map(look).collect()
    }

    fn is_converged(&self) -> Result<(), String> {
        let done = self.shared.operators_done();
        if done < OPERATORS {
            return Err(format!("{done} of {OPERATORS} operators were answered"));
        }
        let managers = self.shared.managers();
        let members = self.shared.members();
        let mut states = Vec::new();
        let mut leader = None;
        for id in &members {
            let running = managers.get(id).ok_or_else(|| format!("manager {id} does not run"))?;
            let status = running.raft.status();
            let voters: BTreeSet<u64> = status.members.iter().filter(|m| m.voter).map(|m| m.id).collect();
            if voters != members || status.members.len() != members.len() {
                return Err(format!("manager {id} knows voters {voters:?} instead of {members:?}"));
            }
            if status.leader.is_none() || leader.replace(status.leader).is_some_and(|other| other != status.leader) {
                return Err("they do not agree on a leader".to_owned());
            }
            let state = running.state.borrow().clone();
            let admitted: BTreeSet<u64> = state.managers().map(|manager| manager.id).collect();
            if admitted != members {
                return Err(format!("the state of manager {id} knows managers {admitted:?} instead of {members:?}"));
            }
            if state.schema() != SCHEMA {
                return Err(format!("the state of manager {id} is of schema {}", state.schema()));
            }
            states.push((*id, state));
        }
        let (first, state) = states.first().ok_or("nobody is left")?;
        for (id, other) in &states[1..] {
            if digest(state)? != digest(other)? {
                return Err(format!("managers {first} and {id} differ"));
            }
        }
        // What waits for a volume that another service's container has waits for long.
        let volumes: BTreeSet<String> = self
            .agents
            .iter()
            .flat_map(Agent::images)
            .filter_map(|(_, service, _)| operator::volume(&service))
            .collect();
        let mut wanted = BTreeMap::new();
        let mut waiting = BTreeSet::new();
        for service in state.services() {
            let Mode::Replicated(replicas) = service.spec.mode else { continue };
            if operator::volume(service.spec.name.as_str()).is_some_and(|volume| volumes.contains(&volume)) {
                waiting.insert(service.id.to_string());
            }
            for slot in 1..=replicas {
                wanted.insert((service.id.to_string(), slot), None::<String>);
            }
        }
        for agent in &self.agents {
            for (slot, id) in agent.running() {
                let held = wanted.get_mut(&slot).ok_or_else(|| format!("{id} on {} is nobody's", agent.id))?;
                if let Some(other) = held.replace(id.clone()) {
                    return Err(format!("{other} and {id} have the same slot"));
                }
            }
        }
        if let Some((slot, _)) = wanted.iter().find(|((service, _), held)| held.is_none() && !waiting.contains(service))
        {
            return Err(format!("slot {slot:?} has no container"));
        }
        for (id, service, image) in self.agents.iter().flat_map(Agent::images) {
            let of_service = state.service_named(&service).map(|service| service.spec.container.image.as_str());
            if of_service != Some(image.as_str()) {
                return Err(format!("{id} of {service} runs {image}, and not {of_service:?}"));
            }
        }
        for container in state.containers() {
            let generation = state.service(&container.service).map(|service| service.generation);
            if !container.status.state.is_terminal() && generation != Some(container.revision.number) {
                return Err(format!(
                    "{} of {} is {} on {:?}, wanted {:?}, of revision {} and not {generation:?}",
                    container.id,
                    container.service_name,
                    container.status.state.name(),
                    container.node,
                    container.desired,
                    container.revision.number
                ));
            }
            let runs = wanted.get(&(container.service.to_string(), container.slot));
            let is_it = runs.is_some_and(|held| held.as_deref() == Some(container.id.as_str()));
            if is_it != (container.status.state == ContainerState::Running) && !container.status.state.is_terminal() {
                return Err(format!("container {} is recorded as {}", container.id, container.status.state.name()));
            }
        }
        Ok(())
    }
}
