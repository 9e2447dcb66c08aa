//! Snapshots between managers, part by part: however large one is, no message is.

use std::sync::{Mutex, PoisonError};

use openraft::raft::SnapshotResponse;
use serde::{Deserialize, Serialize};

use crate::{
    snapshot::SnapshotBytes,
    types::{Config, SnapshotMeta, Vote},
};

/// Bytes of a snapshot in one message.
const PART: usize = 1 << 20;
/// Snapshots larger than this are refused, whatever their sender says.
const MAX_SNAPSHOT: usize = 4 << 30;
/// What a part begins with; JSON, as which everything else travels, does not.
const MARK: u8 = 1;

/// What a part is of; behind it are the bytes.
#[derive(Serialize, Deserialize)]
struct Head {
    vote: Vote,
    meta: SnapshotMeta,
    offset: usize,
    total: usize,
}

/// The answer to a part: what installing the whole led to, after the last one.
#[derive(Serialize, Deserialize)]
pub(crate) struct Taken {
    pub(crate) installed: Option<SnapshotResponse<Config>>,
}

pub(crate) fn is_part(message: &[u8]) -> bool {
    message.first() == Some(&MARK)
}

/// A snapshot's parts as messages.
pub(crate) fn parts(
    vote: Vote,
    meta: &SnapshotMeta,
    bytes: &[u8],
) -> impl Iterator<Item = Result<Vec<u8>, serde_json::Error>> {
    bytes.chunks(PART).enumerate().map(move |(at, part)| {
        let head = Head { vote, meta: meta.clone(), offset: at * PART, total: bytes.len() };
        let head = serde_json::to_vec(&head)?;
        let mut message = vec![MARK];
        message.extend((head.len() as u32).to_be_bytes());
        message.extend(head);
        message.extend(part);
        Ok(message)
    })
}

fn read(message: &[u8]) -> Option<(Head, &[u8])> {
    let (len, rest) = message.get(1..)?.split_first_chunk::<4>()?;
    let (head, part) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    Some((serde_json::from_slice(head).ok()?, part))
}

/// A snapshot that has come in, and the vote of who sent it.
type Whole = (Vote, openraft::alias::SnapshotOf<Config, SnapshotBytes>);

#[derive(Debug)]
struct Begun {
    vote: Vote,
    meta: SnapshotMeta,
    bytes: Vec<u8>,
}

/// The snapshot that comes in: one at a time, from its first part to its last.
#[derive(Debug, Default)]
pub(crate) struct Incoming(Mutex<Option<Begun>>);

impl Incoming {
    /// Takes a part; returns the whole when it was the last.
    ///
    /// # Errors
    ///
    /// When it does not go on where the one before ended: its sender begins again.
    pub(crate) fn take(&self, message: &[u8]) -> Result<Option<Whole>, String> {
        let (head, part) = read(message).ok_or("a part of a snapshot cannot be read")?;
        let mut begun = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if head.total > MAX_SNAPSHOT {
            return Err(format!("a snapshot of {} bytes is too large", head.total));
        }
        if head.offset == 0 {
            *begun = Some(Begun { vote: head.vote, meta: head.meta.clone(), bytes: Vec::new() });
        }
        let goes_on =
            |begun: &&mut Begun| (begun.vote, &begun.meta, begun.bytes.len()) == (head.vote, &head.meta, head.offset);
        let Some(current) = begun.as_mut().filter(goes_on) else {
            return Err("a part of a snapshot is not the next one".to_owned());
        };
        current.bytes.extend(part);
        match current.bytes.len() {
            len if len < head.total => Ok(None),
            len if len > head.total => {
                *begun = None;
                Err("a snapshot is larger than its sender said".to_owned())
            }
            _ => Ok(begun.take().map(|Begun { vote, meta, bytes }| {
                (vote, openraft::Snapshot { meta, snapshot: SnapshotBytes(bytes) })
            })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vote(term: u64) -> Vote {
        Vote::new(term, 1)
    }

    #[test]
    fn parts_in_order_are_the_whole_and_others_are_refused() {
        let meta = SnapshotMeta { last_log_id: None, last_membership: Default::default() };
        let bytes: Vec<u8> = (0..PART * 2 + 7).map(|at| at as u8).collect();
        let sent: Vec<_> = parts(vote(1), &meta, &bytes).map(|part| part.expect("encodes")).collect();
        assert_eq!(sent.len(), 3);
        assert!(sent.iter().all(|part| is_part(part) && part.len() < PART + 1000));
        let incoming = Incoming::default();
        assert!(incoming.take(&sent[1]).is_err(), "the first is missing");
        assert!(incoming.take(&sent[0]).expect("taken").is_none());
        assert!(incoming.take(&sent[2]).is_err(), "the second is missing");
        // Somebody else begins, and the first must begin again.
        let other: Vec<_> = parts(vote(2), &meta, b"other").map(|part| part.expect("encodes")).collect();
        assert_eq!(incoming.take(&other[0]).expect("taken").expect("whole").1.snapshot.0, b"other");
        assert!(incoming.take(&sent[1]).is_err());
        let mut whole = None;
        for part in &sent {
            whole = incoming.take(part).expect("taken");
        }
        let (from, whole) = whole.expect("whole");
        assert_eq!((from, whole.snapshot.0 == bytes), (vote(1), true));
        assert!(incoming.take(&[MARK, 0, 0]).is_err());
    }
}
