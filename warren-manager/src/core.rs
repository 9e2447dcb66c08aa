//! A manager without its sockets: state, loops and API over clock, dice, storage and transport that it is given. A process
//! gives it the machine's ([`crate::run`]), a simulation its own. Timers are tokio's.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;
use warren_raft::{Node, Profile, Storage, Transport};
use warren_telemetry::{Checks, Meters};

pub use crate::trust::founding::{Founding, Networks};
use crate::{
    agents::{Dispatcher, Relay},
    api::{self, Context, MetricsLayer, pinning::Pinning},
    clock::Environment,
    control::{
        controller::Controller,
        liveness::{self, Liveness},
    },
    ids,
    messages::validate::Policy,
    metrics::ManagerMetrics,
    state::{
        Actor, Change, Cluster, ClusterNetwork, InvalidNetwork, JoinToken, Machine, Manager, Origin, State, Transaction,
    },
    store::{self, Store},
    telemetry::{self, Collected, feed::Feed},
    trust::{founding::TOKEN_LIFETIME, vault::Vault},
};

/// What a manager takes from around it.
#[derive(Clone)]
pub struct Seams {
    /// Time and chance.
    pub environment: Arc<dyn Environment>,
    /// Where log and snapshots are kept.
    pub storage: Arc<dyn Storage>,
    /// The way to other managers.
    pub transport: Arc<dyn Transport>,
}

impl std::fmt::Debug for Seams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seams").field("storage", &self.storage).finish_non_exhaustive()
    }
}

/// Which manager it is, and how it works.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Its id, never used by another.
    pub id: u64,
    /// Where other managers reach it.
    pub address: String,
    /// Log entries between snapshots, at most.
    pub snapshot_after: u64,
    /// Bytes of the log between snapshots, about.
    pub snapshot_after_bytes: u64,
    /// How far apart the managers are.
    pub profile: Profile,
    /// Heartbeats of agents.
    pub liveness: liveness::Timing,
    /// The newest schema of the state that is read and written; an earlier one than the program's keeps the way back to an earlier
    /// program open.
    pub newest_schema: u32,
    /// What services may ask for.
    pub policy: Policy,
    /// Who is asked what an image's name means.
    pub registries: Arc<dyn Pinning>,
    /// What opens secrets.
    pub vault: Vault,
    /// The cluster that this manager is to found; `None` for a manager of one that there is.
    pub founding: Option<Founding>,
}

/// How long a stopping manager waits for its loops.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

const HAND_OVER_LOOK: Duration = Duration::from_millis(10);

/// Why a core cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cluster could not have such networks.
    #[error(transparent)]
    Network(#[from] InvalidNetwork),
    /// Consensus.
    #[error(transparent)]
    Raft(#[from] warren_raft::Error),
    /// The state.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// A running manager that nobody can reach but through [`Core::routes`].
#[derive(Debug)]
pub struct Core {
    store: Store,
    liveness: Liveness,
    routes: Routes,
    measured: MetricsLayer,
    tasks: TaskTracker,
}

impl Core {
    /// Starts one: opens its storage, takes part in consensus, and reconciles and schedules until `shutdown`.
    ///
    /// # Errors
    ///
    /// When the storage cannot be used, or no majority can be reached.
    pub async fn start(
        settings: Settings,
        seams: Seams,
        meters: &Meters,
        shutdown: CancellationToken,
    ) -> Result<Self, Error> {
        let Seams { environment, storage, transport } = seams;
        let metrics = Arc::new(ManagerMetrics::new(meters));
        let raft_options = warren_raft::Options {
            id: settings.id,
            address: settings.address,
            profile: settings.profile,
            snapshot_after: settings.snapshot_after,
            snapshot_after_bytes: settings.snapshot_after_bytes,
        };
        let (machine, view) = Machine::of_schema(settings.newest_schema);
        let observer: Arc<dyn warren_raft::Observer> = metrics.clone();
        let machine = Box::new(machine);
        let raft = match settings.founding {
            Some(_) => Node::start(&raft_options, storage, machine, transport, observer).await?,
            None => Node::join(&raft_options, storage, machine, transport, observer).await?,
        };
        let store = Store::new(raft.clone(), view, Arc::clone(&metrics), Arc::clone(&environment));
        // With others, it takes part as soon as they are there; who calls waits for them.
        if settings.founding.is_some() || raft.is_alone() {
            raft.recovered().await?;
        }
        if let Some(founding) = settings.founding {
            found_cluster(&store, &*environment, settings.id, settings.newest_schema, founding).await?;
        }
        let leads = leadership(&raft, shutdown.clone());

        let liveness = Liveness::new(settings.liveness);
        let collected = Collected::default();
        telemetry::export(meters, &store, &collected, &liveness, &metrics);
        let context = Context {
            store: store.clone(),
            liveness: liveness.clone(),
            metrics: Arc::clone(&metrics),
            environment: Arc::clone(&environment),
            policy: settings.policy,
            registries: settings.registries,
            vault: settings.vault.clone(),
        };
        let feed = Feed::new(store.clone(), liveness.clone(), Arc::clone(&metrics), leads.clone());
        let relay = Relay::default();
        let dispatcher = Dispatcher::new(
            store.clone(),
            liveness.clone(),
            collected,
            Arc::clone(&metrics),
            settings.vault,
            relay.clone(),
            leads,
        );
        let routes = api::router(&context, dispatcher, relay, feed.clone());
        let tasks = TaskTracker::new();
        let controller = Controller::new(store.clone(), liveness.clone(), Arc::clone(&metrics), environment);
        tasks.spawn(controller.run(shutdown.clone()));
        tasks.spawn(shutdown.clone().run_until_cancelled_owned(feed.run()));
        tasks.spawn(shutdown.clone().run_until_cancelled_owned(keep_members(store.clone(), settings.id)));
        tasks.spawn(shutdown.clone().run_until_cancelled_owned(tell_of_managers(store.raft().clone())));
        let raising = raise_schema(store.clone(), settings.id, settings.newest_schema);
        tasks.spawn(shutdown.clone().run_until_cancelled_owned(raising));
        tasks.spawn(count_leader_changes(raft, Arc::clone(&metrics), shutdown));
        Ok(Self { store, liveness, routes, measured: MetricsLayer::new(&metrics), tasks })
    }

    /// The API.
    #[must_use]
    pub fn routes(&self) -> Routes {
        self.routes.clone()
    }

    /// What counts, times and traces the API's calls.
    #[must_use]
    pub fn measured(&self) -> MetricsLayer {
        self.measured.clone()
    }

    /// The state as this manager has it now.
    #[must_use]
    pub fn state(&self) -> State {
        self.store.view()
    }

    /// Its part in consensus.
    #[must_use]
    pub fn raft(&self) -> &Node {
        self.store.raft()
    }

    /// Which nodes it hears, while it leads.
    #[must_use]
    pub fn liveness(&self) -> Liveness {
        self.liveness.clone()
    }

    /// Follows the state.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<State> {
        self.store.watch()
    }

    /// Whether it does its work at all.
    #[must_use]
    pub fn health(&self) -> Checks {
        health(self.store.raft())
    }

    /// Whether it can do all of its work.
    #[must_use]
    pub fn ready(&self) -> Checks {
        ready(&self.store)
    }

    /// Has another manager lead, if this one does and there is another: for one that is to stop, which would be missed for an
    /// election otherwise.
    pub async fn hand_over(&self) {
        let raft = self.raft();
        let status = raft.status();
        let is_other = |member: &warren_raft::Member| member.voter && member.id != status.id;
        if !status.is_leader || !status.members.iter().any(is_other) {
            return;
        }
        if let Err(error) = raft.hand_over().await {
            tracing::warn!(%error, "nobody else could be asked to lead");
            return;
        }
        let end = tokio::time::Instant::now() + STOP_PATIENCE;
        while raft.status().leader.is_none_or(|leader| leader == status.id) && tokio::time::Instant::now() < end {
            tokio::time::sleep(HAND_OVER_LOOK).await;
        }
    }

    /// Waits for its loops, which end with `shutdown`, and stops taking part in consensus.
    pub async fn stop(self) {
        self.tasks.close();
        // One that waits for a majority may wait for ever.
        let _ = tokio::time::timeout(STOP_PATIENCE, self.tasks.wait()).await;
        self.store.raft().shutdown().await;
    }
}

/// Gives a new cluster its identity.
async fn found_cluster(
    store: &Store,
    environment: &dyn Environment,
    manager: u64,
    schema: u32,
    founding: Founding,
) -> Result<(), Error> {
    if store.view().cluster().is_some() {
        return Ok(());
    }
    let now = environment.now();
    let id = founding.cluster_id.unwrap_or_else(|| ids::NodeId::generate(environment).to_string());
    let network = founding.networks.complete(ClusterNetwork::of_random(environment.random()))?;
    let authority = founding.authority;
    let cluster = Cluster { id, created_at: now, network, authority, lock: None, rotation: None };
    let mut changes = vec![Change::RaiseSchema(schema), Change::FoundCluster(Box::new(cluster))];
    let founder = Manager { id: manager, hostname: founding.hostname, created_at: now, voter: true };
    changes.push(Change::AdmitManager(founder));
    changes.extend(founding.tokens.into_iter().map(|(hash, role)| {
        Change::PutToken(JoinToken { hash, role, created_at: now, expires_at: now.after(TOKEN_LIFETIME) })
    }));
    let actor = Actor { id: manager.to_string(), role: "manager".to_owned(), address: String::new() };
    let origin = Some(Origin { actor, at: now });
    store.transact(&Transaction { changes, origin, ..Transaction::default() }).await?;
    Ok(())
}

/// A leader that hears of no majority notices it by looking: nothing tells it.
const LOOK: Duration = Duration::from_millis(500);

/// Whether this manager leads, and a majority follows it.
fn leadership(raft: &Node, shutdown: CancellationToken) -> watch::Receiver<bool> {
    let (sender, leads) = watch::channel(false);
    let raft = raft.clone();
    tokio::spawn(async move {
        let look = || {
            let status = raft.status();
            let now = telemetry::leads(&status);
            sender.send_if_modified(|known| std::mem::replace(known, now) != now);
        };
        let follow = async {
            tokio::join!(raft.watch(|_| look()), async {
                loop {
                    tokio::time::sleep(LOOK).await;
                    look();
                }
            })
        };
        shutdown.run_until_cancelled(follow).await;
    });
    leads
}

/// Between looks at whether the members are what they should be.
const MEMBERS_PERIOD: Duration = Duration::from_secs(1);
/// A change of the voters that is half done for so many looks is finished: whoever made it is gone.
const JOINT_LOOKS: u32 = 3;

/// While this manager leads, finishes what others left half done of the members. Never ends.
async fn keep_members(store: Store, own: u64) {
    let raft = store.raft();
    let mut joint_for = 0;
    loop {
        tokio::time::sleep(MEMBERS_PERIOD).await;
        let status = raft.status();
        joint_for = if status.is_leader && status.is_joint { joint_for + 1 } else { 0 };
        let done = if joint_for >= JOINT_LOOKS {
            joint_for = 0;
            raft.settle().await
        } else if status.is_leader && !status.is_joint {
            let state = store.view();
            let is_demoted = |member: &&warren_raft::Member| {
                member.voter && member.id != status.id && state.manager(member.id).is_some_and(|manager| !manager.voter)
            };
            let is_promoted = |member: &&warren_raft::Member| {
                !member.voter
                    && status.answers(member.id)
                    && state.manager(member.id).is_some_and(|manager| manager.voter)
            };
            // One that was being removed may have come in again meanwhile. Without what was said of managers there is nothing to go by.
            let is_stranger = |state: &State, member: &&warren_raft::Member| {
                member.id != status.id && state.manager(status.id).is_some() && state.manager(member.id).is_none()
            };
            let strange = status.members.iter().any(|member| is_stranger(&state, &member));
            // What this manager has applied may be behind whom it knows of.
            let certain = if strange { store.read().await.ok() } else { None };
            let stranger = certain.and_then(|state| status.members.iter().find(|member| is_stranger(&state, member)));
            if let Some(member) = stranger {
                raft.remove(member.id).await
            } else if let Some(member) = status.members.iter().find(is_demoted) {
                raft.demote(member.id).await
            } else if let Some(member) = status.members.iter().find(is_promoted) {
                raft.add_voter(member.id, &member.address).await
            } else {
                Ok(())
            }
        } else {
            Ok(())
        };
        if status.is_leader
            && let Err(error) = advance_rotation(&store, own).await
        {
            tracing::warn!(%error, "the change of the authority does not go on; trying again");
        }
        if let Err(error) = done {
            tracing::warn!(%error, "the managers are not what they should be; trying again");
        }
    }
}

/// So many looks after it has begun to lead, a manager has heard of every other that is there.
const FIRST_LOOKS: u32 = 6;

/// Says in the log who leads; and, while this manager does, which others do not answer, and which do again. Never ends.
async fn tell_of_managers(raft: Node) {
    let (mut silent, mut looks, mut known) = (BTreeSet::new(), 0, None);
    loop {
        tokio::time::sleep(MEMBERS_PERIOD).await;
        let status = raft.status();
        let leader = telemetry::leader(&status);
        if leader != known {
            match leader {
                Some(id) if id == status.id => tracing::info!(term = status.term, "this manager leads"),
                Some(id) => tracing::info!(manager = id, term = status.term, "another manager leads"),
                None => tracing::warn!("no manager leads, as far as this one knows: writes are refused"),
            }
            known = leader;
        }
        if !status.is_leader {
            (silent, looks) = (BTreeSet::new(), 0);
            continue;
        }
        looks += 1;
        if looks < FIRST_LOOKS {
            continue;
        }
        for member in &status.members {
            let (manager, address) = (member.id, &member.address);
            if status.answers(manager) {
                if silent.remove(&manager) {
                    tracing::info!(manager, address, "a manager answers again");
                }
            } else if silent.insert(manager) {
                tracing::warn!(manager, address, "a manager does not answer");
            }
        }
        silent.retain(|id| status.members.iter().any(|member| member.id == *id));
    }
}

/// While this manager leads, has the cluster write the newest schema that every manager reads. Ends when that is the newest here.
async fn raise_schema(store: Store, own: u64, newest: u32) {
    while store.view().schema() < newest {
        tokio::time::sleep(MEMBERS_PERIOD).await;
        let status = store.raft().status();
        // Who has no cluster yet has no members to ask.
        if !status.is_leader || store.view().cluster().is_none() {
            continue;
        }
        let Some(all) = store.raft().all_read().await.filter(|all| *all > store.view().schema()) else { continue };
        match store.transact(&own_transaction(&store, own, Change::RaiseSchema(all))).await {
            Ok(_) => {
                tracing::info!(schema = all, "every manager reads this schema of the state; it is written from here on")
            }
            Err(error) => tracing::warn!(%error, "the schema of the state is not raised yet; trying again"),
        }
    }
}

/// A change that a manager makes of its own accord.
fn own_transaction(store: &Store, own: u64, change: Change) -> Transaction {
    let actor = Actor { id: own.to_string(), role: "manager".to_owned(), address: String::new() };
    let origin = Some(Origin { actor, at: store.now() });
    Transaction { origin, changes: vec![change], ..Transaction::default() }
}

/// Goes on with a change of the authority once every member is known to have followed so far.
async fn advance_rotation(store: &Store, own: u64) -> Result<(), store::Error> {
    let state = store.view();
    let Some(cluster) = state.cluster() else { return Ok(()) };
    let Some(rotation) = &cluster.rotation else { return Ok(()) };
    let digest = warren_pki::authorities_digest(&cluster.authorities());
    if state.uncertified(&digest).next().is_some() {
        return Ok(());
    }
    let advance = Change::AdvanceRotation { signs: rotation.signs };
    store.transact(&own_transaction(store, own, advance)).await.map(drop)
}

async fn count_leader_changes(raft: Node, metrics: Arc<ManagerMetrics>, shutdown: CancellationToken) {
    let mut known = None;
    let count = raft.watch(|status| {
        // One that is elected again has been without the others' trust for a moment.
        let leads = status.leader.map(|leader| (status.term, leader));
        if leads.is_some() && leads != known {
            known = leads;
            metrics.leader_changes.add(1);
        }
    });
    shutdown.run_until_cancelled(count).await;
}

fn health(raft: &Node) -> Checks {
    let mut checks = Checks::default();
    let raft = raft.clone();
    checks.add("raft", move || raft.status().failure.map_or(Ok(()), Err));
    checks
}

fn ready(store: &Store) -> Checks {
    let mut checks = Checks::default();
    let raft = store.raft().clone();
    checks.add("raft", move || {
        let status = raft.status();
        if let Some(failure) = status.failure {
            return Err(failure);
        }
        if !store::quorum_ok(&status) {
            return Err("no leader with a majority is known".to_owned());
        }
        match status.last_log_index.saturating_sub(status.applied_index) {
            0..1000 => Ok(()),
            behind => Err(format!("{behind} log entries are not applied yet")),
        }
    });
    checks
}
