//! How many connections a port has, and with whom: nobody takes the places of the others.
//!
//! A new connection is never refused. Where there are too many, an old one goes: of the same client where that one has more than its
//! share, else of the client that has most. So who opens thousands only ever closes its own, and who connects for a moment is served.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

/// Such errors of accept as too many open files do not go away at once.
const PAUSE: Duration = Duration::from_millis(50);

/// What tells one client from another by its address: all of an IPv4 address, the first 64 bits of an IPv6 one, for that is
/// what one machine has at the least.
#[must_use]
pub fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

impl Connections<IpAddr> {
    /// Waits for the next connection and gives it a place. What fails is logged, and tried again.
    ///
    /// Cancel safe: a connection that was not returned is the next call's.
    pub async fn accept(&self, listener: &TcpListener) -> (TcpStream, SocketAddr, Place<IpAddr>) {
        loop {
            match listener.accept().await {
                Ok((stream, address)) => return (stream, address, self.enter(client(address.ip()))),
                Err(error) => {
                    tracing::warn!(%error, listener = ?listener.local_addr().ok(), "a connection could not be accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// Lets this process open as many files as it may at all.
pub fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, wanted) {
        tracing::warn!(%error, limit = limit.current, "no more files may be open at a time");
    }
}

/// So many connections, or fewer where this process may open few files: the rest is kept for its work.
#[must_use]
pub fn at_most(wanted: usize) -> usize {
    let files =
        getrlimit(Resource::Nofile).current.map_or(usize::MAX, |files| usize::try_from(files).unwrap_or(usize::MAX));
    wanted.min(files / 8).max(1)
}

/// The connections of one kind, by client. Cheap to clone.
#[derive(Debug)]
pub struct Connections<K> {
    total: usize,
    each: usize,
    held: Arc<Mutex<All<K>>>,
}

impl<K> Clone for Connections<K> {
    fn clone(&self) -> Self {
        Self { held: Arc::clone(&self.held), ..*self }
    }
}

#[derive(Debug)]
struct All<K> {
    next: u64,
    count: usize,
    /// Each client's, the oldest first. No client is here without any.
    of: HashMap<K, BTreeMap<u64, oneshot::Sender<()>>>,
}

/// One connection's place, which it gives back when this is dropped.
#[derive(Debug)]
pub struct Place<K: Clone + Eq + Hash> {
    among: Connections<K>,
    client: K,
    number: u64,
    given_up: oneshot::Receiver<()>,
}

impl<K: Clone + Eq + Hash> Connections<K> {
    /// At most `total` of all clients, and at most `each` of one.
    ///
    /// # Panics
    ///
    /// When either is zero.
    #[must_use]
    pub fn new(total: usize, each: usize) -> Self {
        assert!(total > 0 && each > 0, "there is room for one");
        let all = All { next: 0, count: 0, of: HashMap::new() };
        Self { total, each, held: Arc::new(Mutex::new(all)) }
    }

    /// A place for a new connection with this client.
    #[must_use]
    pub fn enter(&self, client: K) -> Place<K> {
        let mut all = self.all();
        if all.of.get(&client).is_some_and(|own| own.len() >= self.each) {
            all.give_up_oldest(&client);
        } else if all.count >= self.total
            && let Some(most) = all.of.iter().max_by_key(|(_, own)| own.len()).map(|(most, _)| most.clone())
        {
            all.give_up_oldest(&most);
        }
        let number = all.next;
        all.next += 1;
        all.count += 1;
        let (sender, given_up) = oneshot::channel();
        all.of.entry(client.clone()).or_default().insert(number, sender);
        Place { among: self.clone(), client, number, given_up }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.all().count
    }

    fn all(&self) -> MutexGuard<'_, All<K>> {
        // Every change leaves it whole.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Clone + Eq + Hash> All<K> {
    fn give_up_oldest(&mut self, client: &K) {
        if let Some(oldest) = self.of.get(client).and_then(|own| own.keys().next().copied()) {
            // Its owner is told by that the sender is gone.
            self.remove(client, oldest);
        }
    }

    fn remove(&mut self, client: &K, number: u64) {
        let Some(own) = self.of.get_mut(client) else { return };
        if own.remove(&number).is_some() {
            self.count -= 1;
        }
        if own.is_empty() {
            self.of.remove(client);
        }
    }
}

impl<K: Clone + Eq + Hash> Place<K> {
    /// Returns when the connection has to go, because there are too many.
    pub async fn given_up(&mut self) {
        // Nothing is ever sent: that the sender is gone says it.
        let _ = (&mut self.given_up).await;
    }
}

impl<K: Clone + Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        self.among.all().remove(&self.client, self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_given_up<K: Clone + Eq + Hash>(place: &mut Place<K>) -> bool {
        place.given_up.try_recv() == Err(oneshot::error::TryRecvError::Closed)
    }

    #[test]
    fn who_has_too_many_loses_its_own_oldest() {
        let connections = Connections::new(100, 2);
        let (mut other, mut first) = (connections.enter("b"), connections.enter("a"));
        let (mut second, mut third) = (connections.enter("a"), connections.enter("a"));
        let gone = [&mut other, &mut first, &mut second, &mut third].map(is_given_up);
        assert_eq!(gone, [false, true, false, false]);
        assert_eq!(connections.count(), 3);
        drop(first);
        assert_eq!(connections.count(), 3, "its place was another's already");
        drop((other, second, third));
        assert_eq!(connections.count(), 0);
        assert!(connections.all().of.is_empty(), "nobody is remembered");
    }

    #[test]
    fn whoever_has_most_makes_room_for_others() {
        let connections = Connections::new(10, 8);
        let mut quiet = [connections.enter(1), connections.enter(2)];
        let mut greedy: Vec<_> = (0..8).map(|_| connections.enter(3)).collect();
        let mut late = connections.enter(4);
        assert_eq!(connections.count(), 10);
        assert!(!quiet.iter_mut().any(is_given_up) && !is_given_up(&mut late));
        let gone: Vec<_> = greedy.iter_mut().map(is_given_up).collect();
        assert_eq!(gone, [true, false, false, false, false, false, false, false]);
    }

    #[tokio::test]
    async fn a_place_that_is_given_up_says_so() {
        let connections = Connections::new(1, 1);
        let mut first = connections.enter(());
        let second = connections.enter(());
        tokio::time::timeout(std::time::Duration::from_secs(5), first.given_up()).await.expect("told");
        drop(second);
    }

    #[test]
    fn clients_are_told_apart_by_what_one_machine_has() {
        let of = |text: &str| client(text.parse().expect("an address"));
        assert_eq!(of("2001:db8:1:2::1"), of("2001:db8:1:2:ffff::9"));
        assert_ne!(of("2001:db8:1:2::1"), of("2001:db8:1:3::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }

    #[test]
    fn all_open_files_that_are_allowed_are_taken() {
        let maximum = getrlimit(Resource::Nofile).maximum;
        setrlimit(Resource::Nofile, Rlimit { current: Some(100), maximum }).expect("fewer may be");
        assert_eq!(at_most(1000), 12);
        raise_open_files();
        assert_eq!(getrlimit(Resource::Nofile).current, maximum);
    }
}
