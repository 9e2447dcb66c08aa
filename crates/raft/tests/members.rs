//! Consensus among several managers in one process: nothing in the crate may assume that there is one.

use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use warren_raft::{
    Files, Freeze, Node, Observer, Options, Profile, SnapshotOperation, StateMachine, Transport, TransportError,
    Unobserved,
};

/// Keeps every command in order, and replies with how many there are.
#[derive(Clone, Default)]
struct Journal(Arc<Mutex<Vec<String>>>);

impl StateMachine for Journal {
    fn apply(&mut self, _index: u64, command: &str) -> io::Result<String> {
        let mut journal = self.0.lock().expect("no panics");
        journal.push(command.to_owned());
        Ok(journal.len().to_string())
    }

    fn freeze(&self) -> Freeze {
        let commands = self.0.lock().expect("no panics").clone();
        Box::new(move || serde_json::to_vec(&commands).map_err(io::Error::other))
    }

    fn restore(&mut self, state: &[u8]) -> io::Result<()> {
        *self.0.lock().expect("no panics") = serde_json::from_slice(state).map_err(io::Error::other)?;
        Ok(())
    }
}

#[derive(Clone, Default)]
struct Channels {
    nodes: Arc<RwLock<HashMap<String, Node>>>,
    /// Whether what is larger than a heartbeat is lost on its way.
    narrow: Arc<AtomicBool>,
}

/// Larger than any message without entries.
const ENTRIES: usize = 4096;

impl Transport for Channels {
    fn call<'a>(
        &'a self,
        address: &'a str,
        message: Vec<u8>,
        patience: Duration,
    ) -> BoxFuture<'a, Result<Vec<u8>, TransportError>> {
        Box::pin(async move {
            if message.len() > ENTRIES && self.narrow.load(Ordering::Relaxed) {
                return Err(TransportError("too much".to_owned()));
            }
            let node = self.nodes.read().expect("no panics").get(address).cloned();
            let node = node.ok_or_else(|| TransportError(format!("{address} is away")))?;
            let answer = tokio::time::timeout(patience.max(Duration::from_secs(1)), node.handle(&message)).await;
            let answer = answer.map_err(|_| TransportError("too late".to_owned()))?;
            answer.map_err(|error| TransportError(error.to_string()))
        })
    }
}

fn files(directory: &Path, id: u64) -> Arc<Files> {
    Arc::new(Files::new(directory.join(id.to_string())))
}

fn options(id: u64) -> Options {
    Options {
        id,
        address: format!("manager-{id}"),
        profile: Profile::Lan,
        snapshot_after: 20,
        snapshot_after_bytes: 1 << 20,
    }
}

/// Starts a manager that the others reach; the first founds the cluster.
async fn start(options: &Options, directory: &Path, channels: &Channels, journal: Journal) -> Node {
    let (machine, transport) = (Box::new(journal), Arc::new(channels.clone()));
    let files = files(directory, options.id);
    let node = if options.id == 1 {
        Node::start(options, files, machine, transport, Arc::new(Unobserved)).await
    } else {
        Node::join(options, files, machine, transport, Arc::new(Unobserved)).await
    };
    let node = node.expect("starts");
    channels.nodes.write().expect("no panics").insert(options.address.clone(), node.clone());
    node
}

async fn until<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    for _ in 0..600 {
        if let Some(found) = check() {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("never: {what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn three_managers_agree_and_survive_the_loss_of_one() {
    let directory = tempfile::tempdir().expect("a directory");
    let channels = Channels::default();
    let mut nodes = HashMap::new();
    let mut journals = HashMap::new();
    for id in 1..=3 {
        let journal = Journal::default();
        nodes.insert(id, start(&options(id), directory.path(), &channels, journal.clone()).await);
        journals.insert(id, journal);
    }
    until("manager 1 leads", || nodes[&1].status().is_leader.then_some(())).await;
    // More than a snapshot's worth, so that the others get a snapshot and the rest as entries.
    for i in 1..=50 {
        assert_eq!(nodes[&1].propose(format!("command {i}")).await.expect("commits"), i.to_string());
    }
    nodes[&1].add_voter(2, "manager-2").await.expect("joins");
    nodes[&1].add_voter(3, "manager-3").await.expect("joins");
    for id in 2..=3 {
        until("it caught up", || (journals[&id].0.lock().expect("no panics").len() == 50).then_some(())).await;
    }
    assert!(nodes[&2].propose("refused".to_owned()).await.is_err(), "a follower commits nothing itself");

    channels.nodes.write().expect("no panics").remove("manager-1");
    nodes[&1].shutdown().await;
    let leader = until("another leads", || {
        [2, 3].into_iter().find(|id| nodes[id].status().is_leader && nodes[id].status().leader == Some(*id))
    })
    .await;
    assert_eq!(nodes[&leader].propose("after the loss".to_owned()).await.expect("commits"), "51");
    nodes[&leader].linearize().await.expect("a majority answers");
    let follower = 5 - leader;
    until("the follower has it", || (journals[&follower].0.lock().expect("no panics").len() == 51).then_some(())).await;
    for node in nodes.values() {
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_be_reached_gets_no_vote() {
    let directory = tempfile::tempdir().expect("a directory");
    let transport = Arc::new(warren_raft::Disconnected);
    let own = options(1);
    let started =
        Node::start(&own, files(directory.path(), 1), Box::new(Journal::default()), transport, Arc::new(Unobserved));
    let node = started.await.expect("starts");
    until("it leads", || node.status().is_leader.then_some(())).await;
    assert_eq!(node.propose("it has begun".to_owned()).await.expect("commits"), "1");
    let refused = node.add_voter(2, "nowhere").await.expect_err("it is not there").to_string();
    assert!(refused.contains("manager 2 cannot be reached at nowhere"), "{refused}");
    assert_eq!(node.propose("it goes on".to_owned()).await.expect("commits"), "2");
    assert_eq!(node.status().members.iter().filter(|member| member.voter).count(), 1);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_far_behind_gets_no_vote_before_they_have_caught_up() {
    let directory = tempfile::tempdir().expect("a directory");
    let channels = Channels::default();
    let start = async |id: u64| {
        // What is missing comes as entries, not as a snapshot.
        let options = Options { snapshot_after: 100_000, snapshot_after_bytes: 1 << 30, ..options(id) };
        start(&options, directory.path(), &channels, Journal::default()).await
    };
    let (leader, newcomer) = (start(1).await, start(2).await);
    until("it leads", || leader.status().is_leader.then_some(())).await;
    for i in 0..200 {
        let _ = leader.propose(format!("{i:01000}")).await.expect("commits");
    }
    channels.narrow.store(true, Ordering::Relaxed);
    let adding = tokio::spawn({
        let leader = leader.clone();
        async move { leader.add_voter(2, "manager-2").await }
    });
    until("it is heard", || leader.status().answers(2).then_some(())).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let voters = || leader.status().members.iter().filter(|member| member.voter).count();
    assert_eq!(voters(), 1);
    assert!(leader.status().lag[&2] >= 200, "{:?}", leader.status().lag);
    channels.narrow.store(false, Ordering::Relaxed);
    adding.await.expect("no panic").expect("joins");
    assert_eq!(voters(), 2);
    newcomer.shutdown().await;
    leader.shutdown().await;
}

/// Counts snapshots.
#[derive(Debug, Default)]
struct Snapshots(Mutex<usize>);

impl Observer for Snapshots {
    fn log_synced(&self, _: Duration) {}
    fn applied(&self, _: Duration) {}
    fn snapshot(&self, operation: SnapshotOperation, ok: bool, _took: Duration, _bytes: u64) {
        if operation == SnapshotOperation::Build && ok {
            *self.0.lock().expect("no panics") += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_of_few_large_entries_is_large_enough_for_a_snapshot() {
    let directory = tempfile::tempdir().expect("a directory");
    let options = Options { snapshot_after: 100_000, snapshot_after_bytes: 1 << 20, ..options(1) };
    let snapshots = Arc::new(Snapshots::default());
    let transport = Arc::new(warren_raft::Disconnected);
    let (files, machine) = (files(directory.path(), 1), Box::new(Journal::default()));
    let node = Node::start(&options, files, machine, transport, snapshots.clone()).await.expect("starts");
    until("it leads", || node.status().is_leader.then_some(())).await;
    let built = || *snapshots.0.lock().expect("no panics");
    for _ in 0..3 {
        let _ = node.propose("x".repeat(300 << 10)).await.expect("commits");
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(built(), 0, "less than a MiB");
    let _ = node.propose("x".repeat(300 << 10)).await.expect("commits");
    until("it is built", || (built() == 1).then_some(())).await;
    node.shutdown().await;
}

/// In one thread: what consensus does by itself has no time to be done meanwhile.
#[tokio::test]
async fn a_restarted_manager_knows_the_members_at_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let join = async || {
        let (own, files) = (options(1), files(directory.path(), 1));
        let transport = Arc::new(warren_raft::Disconnected);
        let joined = Node::join(&own, files, Box::new(Journal::default()), transport, Arc::new(Unobserved));
        joined.await.expect("starts")
    };
    let nobody = join().await;
    assert_eq!(nobody.status().members, [], "there is no log yet");
    nobody.shutdown().await;
    let (own, transport) = (options(1), Arc::new(warren_raft::Disconnected));
    let founder =
        Node::start(&own, files(directory.path(), 1), Box::new(Journal::default()), transport, Arc::new(Unobserved));
    let founder = founder.await.expect("starts");
    assert!(founder.is_alone());
    founder.shutdown().await;
    let restarted = join().await;
    assert!(restarted.is_alone());
    restarted.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_manager_has_every_command_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let start = async |journal: &Journal| {
        let transport = Arc::new(warren_raft::Disconnected);
        let node = Node::start(
            &options(1),
            files(directory.path(), 1),
            Box::new(journal.clone()),
            transport,
            Arc::new(Unobserved),
        )
        .await
        .expect("starts");
        node.recovered().await.expect("recovers");
        node
    };
    let mut expected = Vec::new();
    for round in 0..3 {
        let journal = Journal::default();
        let node = start(&journal).await;
        assert_eq!(*journal.0.lock().expect("no panics"), expected, "round {round}");
        until("it leads", || node.status().is_leader.then_some(())).await;
        // The snapshot covers some of them and the log the rest.
        for i in 0..33 {
            let command = format!("{round}.{i}");
            node.propose(command.clone()).await.expect("commits");
            expected.push(command);
        }
        node.shutdown().await;
    }
}

/// Whoever was to lose their vote by a change that was left half done may lead by now, and take another member out.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_goes_on_from_half_of_another() {
    let directory = tempfile::tempdir().expect("a directory");
    let channels = Channels::default();
    let mut nodes = HashMap::new();
    for id in 1..=3 {
        nodes.insert(id, start(&options(id), directory.path(), &channels, Journal::default()).await);
    }
    until("manager 1 leads", || nodes[&1].status().is_leader.then_some(())).await;
    nodes[&1].add_voter(2, "manager-2").await.expect("joins");
    nodes[&1].add_voter(3, "manager-3").await.expect("joins");

    // Whoever takes manager 2 out goes away half-way.
    {
        let removing = nodes[&1].remove(2);
        let half = async {
            while !nodes[&1].status().is_joint {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            () = half => {}
            _ = removing => panic!("the change was not seen half done"),
        }
    }
    until("manager 2 leads", || {
        let leader = [1, 2, 3].into_iter().find(|id| nodes[id].status().is_leader)?;
        if leader != 2 {
            let others = nodes[&leader].clone();
            tokio::spawn(async move { others.hand_over().await });
        }
        (leader == 2 && nodes[&2].status().leader == Some(2)).then_some(())
    })
    .await;
    assert!(nodes[&2].status().is_joint);
    nodes[&2].remove(1).await.expect("manager 1 is taken out");
    assert_eq!(nodes[&2].status().failure, None);
    let votes = |node: &Node| -> Vec<u64> {
        node.status().members.iter().filter(|member| member.voter).map(|member| member.id).collect()
    };
    until("manager 3 alone votes", || (votes(&nodes[&3]) == [3]).then_some(())).await;
    for node in nodes.values() {
        node.shutdown().await;
    }
}
