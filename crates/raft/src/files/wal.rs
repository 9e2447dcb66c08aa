//! How log entries, votes and ids look on disk.

use std::io::{self, Read, Write};

use openraft::{entry::RaftPayload as _, vote::RaftLeaderId as _};
use raft_log::codeq::{Decode, Encode};

use crate::{
    storage::Durable,
    types::{LogId, Payload, Vote},
};

/// The log's types.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wal;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct WalLogId(pub(crate) LogId);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd)]
pub(crate) struct WalVote(pub(crate) Vote);

#[derive(Clone, Debug)]
pub(crate) struct WalPayload {
    pub(crate) payload: Payload,
}

/// Who waits for a write to be durable.
pub(crate) struct Waiter(pub(crate) Durable);

impl raft_log::Callback for Waiter {
    fn send(self, result: Result<(), io::Error>) {
        (self.0)(result);
    }
}

impl raft_log::Types for Wal {
    type LogId = WalLogId;
    type LogPayload = WalPayload;
    type Vote = WalVote;
    type Callback = Waiter;
    type UserData = String;

    fn log_index(log_id: &Self::LogId) -> u64 {
        log_id.0.index
    }

    fn payload_size(payload: &Self::LogPayload) -> u64 {
        // What it weighs in the cache; a membership's real size does not matter.
        match &payload.payload {
            openraft::EntryPayload::Normal(proposal) => proposal.0.len() as u64 + 64,
            other => 256 + u64::from(other.get_membership().is_some()),
        }
    }
}

/// Largest payload that is believed when read: larger ones are corruption.
const MAX_PAYLOAD: u32 = 64 << 20;

fn invalid(why: impl ToString) -> io::Error {
    // Never `UnexpectedEof`, which the log takes for a write that was cut short and silently drops.
    io::Error::new(io::ErrorKind::InvalidData, why.to_string())
}

impl Encode for WalLogId {
    fn encode<W: Write>(&self, mut to: W) -> io::Result<usize> {
        let leader = &self.0.leader_id;
        Ok(leader.term().encode(&mut to)? + leader.node_id().encode(&mut to)? + self.0.index.encode(&mut to)?)
    }
}

impl Decode for WalLogId {
    fn decode<R: Read>(mut from: R) -> io::Result<Self> {
        let (term, node) = (u64::decode(&mut from)?, u64::decode(&mut from)?);
        let index = u64::decode(&mut from)?;
        let leader = openraft::impls::leader_id_adv::LeaderId::new(term, node);
        Ok(Self(LogId::new(leader.to_committed(), index)))
    }
}

impl Encode for WalVote {
    fn encode<W: Write>(&self, mut to: W) -> io::Result<usize> {
        let leader = &self.0.leader_id;
        let written = leader.term().encode(&mut to)? + leader.node_id().encode(&mut to)?;
        Ok(written + u8::from(self.0.committed).encode(&mut to)?)
    }
}

impl Decode for WalVote {
    fn decode<R: Read>(mut from: R) -> io::Result<Self> {
        let (term, node) = (u64::decode(&mut from)?, u64::decode(&mut from)?);
        match u8::decode(&mut from)? {
            0 => Ok(Self(Vote::new(term, node))),
            1 => Ok(Self(Vote::new_committed(term, node))),
            _ => Err(invalid("a vote is neither committed nor not")),
        }
    }
}

/// A payload as JSON, framed by its length and the length's complement: a damaged length must not pass for the end of the
/// file.
impl Encode for WalPayload {
    fn encode<W: Write>(&self, mut to: W) -> io::Result<usize> {
        let bytes = serde_json::to_vec(&self.payload).map_err(invalid)?;
        let len = u32::try_from(bytes.len()).ok().filter(|len| *len <= MAX_PAYLOAD);
        let len = len.ok_or_else(|| invalid("an entry is too large"))?;
        let framing = len.encode(&mut to)? + (!len).encode(&mut to)?;
        to.write_all(&bytes)?;
        Ok(framing + bytes.len())
    }
}

impl Decode for WalPayload {
    fn decode<R: Read>(mut from: R) -> io::Result<Self> {
        let (len, complement) = (u32::decode(&mut from)?, u32::decode(&mut from)?);
        if len != !complement || len > MAX_PAYLOAD {
            return Err(invalid("an entry's length is damaged"));
        }
        let mut bytes = vec![0; len as usize];
        from.read_exact(&mut bytes)?;
        Ok(Self { payload: serde_json::from_slice(&bytes).map_err(invalid)? })
    }
}
