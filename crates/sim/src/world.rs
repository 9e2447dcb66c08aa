//! The world: machines, what goes wrong with them, and what must hold whatever does.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::SmallRng, seq::IndexedRandom as _};
use sha2::{Digest as _, Sha256};
use turmoil::Sim;
use warren_manager::state::{ContainerState, Mode, State};

use crate::{
    agent::{self, Agent},
    disk::Disk,
    history,
    manager::{self, Hardware},
    operator,
    shared::Shared,
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
/// Every so many revisions the states of managers are compared byte by byte.
const COMPARED: u64 = 5;

/// One run.
struct World<'a> {
    sim: Sim<'a>,
    shared: Shared,
    dice: SmallRng,
    hardware: BTreeMap<u64, Hardware>,
    agents: Vec<Agent>,
    crashed: BTreeSet<String>,
    next_manager: u64,
    digests: BTreeMap<u64, (u64, String)>,
    seen: BTreeMap<u64, u64>,
    /// Which manager has been hearing which agents without a break, and since when.
    heard: BTreeMap<String, (u64, Duration)>,
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
    let mut dice = SmallRng::seed_from_u64(seed);
    let managers = if dice.random_bool(0.5) { 3 } else { 5 };
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
        };
        let (host, shared) = (own.clone(), shared.clone());
        sim.host(manager::name(id), move || manager::run(host.clone(), seed, shared.clone()));
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
    };
    world.live(SETTLE)?;
    let end = world.sim.elapsed() + FAULTS;
    while world.sim.elapsed() < end {
        world.go_wrong();
        let pause = Duration::from_millis(world.dice.random_range(100..1500));
        world.live(pause)?;
    }
    world.heal();
    world.converge()?;
    history::check(&world.shared.calls())?;
    let calls = world.shared.calls().len();
    world.shared.trace(format!("{calls} calls of operators can be put in an order"));
    Ok(world.shared.digest())
}

impl World<'_> {
    /// Lets time pass, and looks at everything after every step.
    fn live(&mut self, time: Duration) -> Result<(), String> {
        let end = self.sim.elapsed() + time;
        while self.sim.elapsed() < end {
            self.sim.step().map_err(|error| format!("a machine failed: {error}"))?;
            self.shared.set_now(self.sim.elapsed());
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
                    self.shared.trace(format!("{} is no longer heard by {}", agent.id, manager::name(leader)));
                }
            } else if self.heard.get(&agent.id).is_none_or(|(by, _)| *by != leader) {
                self.heard.insert(agent.id.clone(), (leader, now));
            }
        }
        self.check_slots(leader)
    }

    /// No two containers have the same port of a node, nor the same exclusive volume, whoever knows of them.
    fn check_exclusive(&self) -> Result<(), String> {
        let mut held = BTreeMap::new();
        for agent in &self.agents {
            for service in agent.services() {
                let port = operator::port(&service).map(|port| format!("port {port} of {}", agent.id));
                for what in port.into_iter().chain(operator::volume(&service)) {
                    if let Some(other) = held.insert(what.clone(), &agent.id) {
                        return Err(format!("two containers hold {what}, on {other} and {}", agent.id));
                    }
                }
            }
        }
        Ok(())
    }

    /// No two containers have the same slot on nodes that the leader reaches.
    fn check_slots(&self, leader: u64) -> Result<(), String> {
        let mut slots = BTreeMap::new();
        for agent in &self.agents {
            let (Some((manager, since)), Some((_, heard))) = (agent.settled(), self.heard.get(&agent.id)) else {
                continue;
            };
            if manager != manager::name(leader) || self.sim.elapsed() < since.max(*heard) + SETTLED {
                continue;
            }
            for (slot, id) in agent.running() {
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
        let managers = (1..=MANAGERS).map(manager::name);
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

    fn restart(&mut self, name: String) {
        self.crashed.remove(&name);
        self.shared.trace(format!("{name} starts"));
        if let Some(id) = name.strip_prefix('m').and_then(|id| id.parse().ok()) {
            self.shared.manager_crashed(id);
            self.seen.remove(&id);
        }
        self.sim.bounce(name.as_str());
    }

    /// Some machines on one side, the others on the other.
    fn sides(&mut self) -> (Vec<String>, Vec<String>) {
        let names = self.names();
        let share = [0.1, 0.3, 0.5].choose(&mut self.dice).copied().unwrap_or(0.5);
        let dice = &mut self.dice;
        names.into_iter().partition(|_| dice.random_bool(share))
    }

    fn go_wrong(&mut self) {
        match self.dice.random_range(0..16) {
            0..3 => {
                let id = self.any_manager();
                self.crash(manager::name(id));
            }
            3..6 => {
                let crashed: Vec<String> = self.crashed.iter().cloned().collect();
                if let Some(name) = crashed.choose(&mut self.dice) {
                    self.restart(name.clone());
                }
            }
            6 => {
                let (one, other) = self.sides();
                self.shared.trace(format!("a partition: {one:?}"));
                for a in &one {
                    for b in &other {
                        self.sim.partition(a.as_str(), b.as_str());
                    }
                }
            }
            7 => {
                let id = self.any_manager();
                let one = [manager::name(id)];
                let others: Vec<String> = self.names().into_iter().filter(|name| *name != one[0]).collect();
                let to_it = self.dice.random_bool(0.5);
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
                    manager::name(id),
                    if full { "full" } else { "empty" }
                ));
                self.hardware[&id].disk.set_full(full);
            }
            11 => {
                let id = self.any_manager();
                let latency = Duration::from_millis(self.dice.random_range(1..400));
                self.shared.trace(format!("the disk of {} takes {latency:?}", manager::name(id)));
                self.hardware[&id].disk.set_latency(latency);
            }
            12 => {
                let id = self.any_manager();
                let step = self.dice.random_range(-3_600_000..3_600_000);
                self.shared.trace(format!("the clock of {} steps by {step} ms", manager::name(id)));
                self.hardware[&id].skew.fetch_add(step, Ordering::Relaxed);
            }
            13 => {
                let number = self.dice.random_range(0..AGENT_MACHINES);
                self.crash(machine(number));
            }
            14 => {
                let rate = if self.dice.random_bool(0.5) { 0.002 } else { 0.0 };
                self.shared.trace(format!("links fail at {rate}"));
                self.sim.set_fail_rate(rate);
            }
            _ => self.change_members(),
        }
        self.restart_stopped();
    }

    /// A manager whose consensus has stopped says so in its health: whoever looks after processes starts it anew.
    fn restart_stopped(&mut self) {
        let stopped: Vec<u64> = self
            .shared
            .managers()
            .into_iter()
            .filter(|(_, running)| running.raft.status().failure.is_some())
            .map(|(id, _)| id)
            .collect();
        for id in stopped {
            self.crash(manager::name(id));
        }
        for id in 1..=MANAGERS {
            let name = manager::name(id);
            if !self.crashed.contains(&name) && !self.sim.is_host_running(name.as_str()) {
                // It has ended by itself.
                self.crashed.insert(name);
            }
        }
    }

    fn repair(&mut self) {
        self.shared.trace("links are repaired".to_owned());
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
    fn heal(&mut self) {
        self.shared.trace("all is well again".to_owned());
        self.shared.calm();
        self.sim.set_fail_rate(0.0);
        self.repair();
        let hardware: Vec<Hardware> = self.hardware.values().cloned().collect();
        for own in hardware {
            own.disk.set_full(false);
            own.disk.set_latency(DISK);
            own.skew.store(0, Ordering::Relaxed);
        }
        self.restart_stopped();
        let crashed: Vec<String> = self.crashed.iter().cloned().collect();
        for name in crashed {
            self.restart(name);
        }
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
                Err(_) => self.restart_again(),
            }
        }
    }

    /// What could not start, or has stopped, while links were still down is started again.
    fn restart_again(&mut self) {
        self.restart_stopped();
        let crashed: Vec<String> = self.crashed.iter().cloned().collect();
        for name in crashed {
            self.restart(name);
        }
    }

    fn is_converged(&self) -> Result<(), String> {
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
            states.push((*id, running.state.borrow().clone()));
        }
        let (first, state) = states.first().ok_or("nobody is left")?;
        for (id, other) in &states[1..] {
            if digest(state)? != digest(other)? {
                return Err(format!("managers {first} and {id} differ"));
            }
        }
        let mut wanted = BTreeMap::new();
        for service in state.services() {
            let Mode::Replicated(replicas) = service.spec.mode else { continue };
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
        if let Some((slot, _)) = wanted.iter().find(|(_, held)| held.is_none()) {
            return Err(format!("slot {slot:?} has no container"));
        }
        for container in state.containers() {
            let runs = wanted.get(&(container.service.to_string(), container.slot));
            let is_it = runs.is_some_and(|held| held.as_deref() == Some(container.id.as_str()));
            if is_it != (container.status.state == ContainerState::Running) && !container.status.state.is_terminal() {
                return Err(format!("container {} is recorded as {}", container.id, container.status.state.name()));
            }
        }
        Ok(())
    }
}
