//! How many questions wait for an answer from elsewhere, and how many of one client.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::LOCAL;

/// Requests that are being answered by the whole server, those that wait for the node's resolvers among them.
const ANSWERING: usize = 4096;

/// The same of one client.
const OF_ONE_ASKER: usize = ANSWERING / 8;

/// Requests that are being answered, and whose they are.
#[derive(Clone, Default)]
pub(super) struct Answering(Arc<Mutex<Counts>>);

#[derive(Default)]
struct Counts {
    waiting: usize,
    of_client: HashMap<IpAddr, usize>,
    local: usize,
}

/// One request's place, which it gives back.
pub(super) struct Turn {
    among: Answering,
    client: IpAddr,
    /// Whether the node's resolvers may be asked.
    pub(super) may_forward: bool,
}

impl Answering {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        // Every change leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a client's request, if there is one. What waits for the node's resolvers does not keep what is known here from being
    /// answered, nor does one client's keep others' from being asked.
    pub(super) fn turn(&self, client: IpAddr) -> Option<Turn> {
        let mut counts = self.counts();
        let own = counts.of_client.get(&client).copied().unwrap_or(0);
        let may_forward = counts.waiting < ANSWERING && own < OF_ONE_ASKER;
        if may_forward {
            counts.waiting += 1;
            counts.of_client.insert(client, own + 1);
        } else if counts.local < LOCAL {
            counts.local += 1;
        } else {
            return None;
        }
        Some(Turn { among: self.clone(), client, may_forward })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut counts = self.among.counts();
        if !self.may_forward {
            counts.local -= 1;
            return;
        }
        counts.waiting -= 1;
        if let Some(own) = counts.of_client.get_mut(&self.client) {
            *own -= 1;
            if *own == 0 {
                counts.of_client.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_client_waits_for_keeps_nobody_from_asking() {
        let answering = Answering::default();
        let [greedy, other] = ["192.0.2.1", "192.0.2.2"].map(|text| text.parse().expect("an address"));
        let mut turns: Vec<_> = (0..OF_ONE_ASKER).filter_map(|_| answering.turn(greedy)).collect();
        assert!(turns.iter().all(|turn| turn.may_forward));
        let one_more = answering.turn(greedy).expect("what is known here is still answered");
        assert!(!one_more.may_forward);
        assert!(answering.turn(other).is_some_and(|turn| turn.may_forward));
        turns.pop();
        assert!(answering.turn(greedy).is_some_and(|turn| turn.may_forward));
        drop((turns, one_more));
        let counts = answering.counts();
        assert_eq!((counts.waiting, counts.local, counts.of_client.len()), (0, 0, 0));
    }
}
