//! A manager's machine.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use warren_manager::{
    Policy, Vault,
    api::pinning::Unasked,
    clock::{Environment, Timestamp},
    control::liveness::{self, Liveness},
    core::{Core, Founding, Seams, Settings},
    state::{self, Change, State, Transaction},
};
use warren_proto::v1::{self, cluster_client::ClusterClient};
use warren_telemetry::{Meters, signals::Identity, table::Emitter};

use crate::{
    disk::Disk,
    network::{self, Wires},
    shared::{Running, Shared, manager_name},
};

/// A day in 2026, in milliseconds: when simulations begin.
const EPOCH: u64 = 1_780_000_000_000;
/// Between looks at who is heard.
const HEAR_PERIOD: Duration = Duration::from_millis(20);
/// Between looks at who should be a member.
const MEMBERS_PERIOD: Duration = Duration::from_millis(500);
/// How long a change of them may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// A clock that may be wrong, and dice.
#[derive(Debug)]
struct Machine {
    dice: AtomicU64,
    /// Milliseconds by which its clock is off.
    skew: Arc<AtomicI64>,
}

impl Environment for Machine {
    fn now(&self) -> Timestamp {
        let elapsed = turmoil::sim_elapsed().unwrap_or_default().as_millis() as u64;
        Timestamp((EPOCH + elapsed).saturating_add_signed(self.skew.load(Ordering::Relaxed)))
    }

    fn random(&self) -> u128 {
        let roll = || {
            let mut x = self.dice.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            u128::from(x ^ (x >> 31))
        };
        roll() << 64 | roll()
    }
}

/// What is of a manager's machine when its manager is not running.
#[derive(Clone)]
pub(crate) struct Hardware {
    pub(crate) id: u64,
    pub(crate) disk: Disk,
    pub(crate) skew: Arc<AtomicI64>,
    /// How often it was started.
    pub(crate) starts: Arc<AtomicU64>,
    /// Which version of the program it runs, from its next start on.
    pub(crate) newest_schema: Arc<AtomicU32>,
}

/// Runs a manager until its machine crashes.
pub(crate) async fn run(hardware: Hardware, seed: u64, shared: Shared) -> turmoil::Result {
    let Hardware { id, disk, skew, starts, newest_schema } = hardware;
    let start = starts.fetch_add(1, Ordering::Relaxed);
    let identity = Identity { service: "warren-manager", instance: id.to_string() };
    let meters = Meters::new(&identity, &[Emitter::Manager]);
    let founds = id == 1 && disk.is_empty();
    let settings = Settings {
        id,
        address: manager_name(id),
        snapshot_after: 100,
        snapshot_after_bytes: 64 << 20,
        profile: warren_raft::Profile::Lan,
        liveness: liveness::Timing { heartbeat: Duration::from_millis(500), ..liveness::Timing::default() },
        newest_schema: newest_schema.load(Ordering::Relaxed),
        policy: Policy::default(),
        registries: Arc::new(Unasked),
        vault: Vault::ephemeral()?,
        founding: founds.then(Founding::default),
    };
    // Ids must differ between starts, as a machine's dice do.
    let dice = AtomicU64::new(seed ^ (id << 48) ^ (start << 56));
    let seams =
        Seams { environment: Arc::new(Machine { dice, skew }), storage: Arc::new(disk), transport: Arc::new(Wires) };
    let shutdown = CancellationToken::new();
    let core = match Core::start(settings, seams, &meters, shutdown.clone()).await {
        Ok(core) => core,
        Err(error) => {
            // As a process would: it ends, and is started again some time.
            shared.trace(format!("{} could not start: {error}", manager_name(id)));
            return Ok(());
        }
    };
    let core = Arc::new(core);
    shared.manager_runs(id, Running { raft: core.raft().clone(), state: core.watch() });
    tokio::spawn(members(Arc::clone(&core), shared.clone()));
    tokio::spawn(hear(id, core.watch(), core.liveness(), shared));
    let serve_raft = network::serve_raft(core.raft().clone());
    let incoming = network::incoming().await?;
    let as_root = tower::util::MapRequestLayer::new(warren_manager::as_root);
    let serve_api = Server::builder().layer(as_root).add_routes(core.routes()).serve_with_incoming(incoming);
    tokio::select! {
        ended = serve_raft => ended?,
        ended = serve_api => ended?,
    }
    Ok(())
}

/// Tells the world which agents this manager hears: silence is measured by the host's clock, which outside nobody has.
async fn hear(id: u64, state: watch::Receiver<State>, liveness: Liveness, shared: Shared) {
    loop {
        let nodes: Vec<_> = state.borrow().nodes().map(|node| node.id.clone()).collect();
        let heard = nodes.iter().filter(|node| liveness.health(node).is_reachable());
        shared.hears(id, heard.map(ToString::to_string).collect());
        tokio::time::sleep(HEAR_PERIOD).await;
    }
}

/// While this manager leads, sees to it that the members are those that should be.
async fn members(core: Arc<Core>, shared: Shared) {
    loop {
        tokio::time::sleep(MEMBERS_PERIOD).await;
        let status = core.raft().status();
        if !status.is_leader {
            continue;
        }
        let wanted = shared.members();
        let state = core.state();
        let voters: BTreeSet<u64> = status.members.iter().filter(|m| m.voter).map(|m| m.id).collect();
        let known = status.members.iter().map(|member| member.id).chain(state.managers().map(|manager| manager.id));
        let known: BTreeSet<u64> = known.collect();
        // One change at a time, and joining before leaving: as an operator would. What fails is tried again.
        if let Some(id) = wanted.difference(&voters).next() {
            let outcome = tokio::time::timeout(PATIENCE, join(&core, *id)).await;
            shared.trace(format!("{} joins: {}", manager_name(*id), matches!(outcome, Ok(Ok(())))));
        } else if let Some(id) = known.difference(&wanted).next() {
            let outcome = tokio::time::timeout(PATIENCE, leave(status.id, *id)).await;
            shared.trace(format!("{} leaves: {}", manager_name(*id), matches!(outcome, Ok(Ok(())))));
        }
    }
}

/// Lets a manager in as one that has a token is let in, and has it take part as it asks for then.
async fn join(core: &Core, id: u64) -> Result<(), warren_raft::Error> {
    // Numbers are given in order; whoever had one and never came is turned out like any other.
    while core.state().manager(id).is_none() && core.state().next_manager() <= id {
        let next = core.state().next_manager();
        let manager =
            state::Manager { id: next, hostname: manager_name(next), created_at: Timestamp(EPOCH), voter: true };
        let transaction = Transaction { changes: vec![Change::AdmitManager(manager)], ..Transaction::default() };
        core.raft().propose(state::encode(&transaction, core.state().schema()).unwrap_or_default()).await?;
    }
    core.raft().add_voter(id, &manager_name(id)).await
}

/// Turns a manager out, by the API of the one that leads.
async fn leave(leader: u64, id: u64) -> Result<(), String> {
    let channel = network::connect(&manager_name(leader)).await.map_err(|error| error.to_string())?;
    let asked = ClusterClient::new(channel).remove_manager(v1::RemoveManagerRequest { id }).await;
    asked.map(drop).map_err(|status| status.message().to_owned())
}
