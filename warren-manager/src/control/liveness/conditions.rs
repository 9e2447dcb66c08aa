use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use tokio::time::Instant;
use warren_proto::v1;

use crate::clock::Timestamp;

/// A node's clock may be this far from the leader's: what is sent may be on its way for a while.
const SKEW: Duration = Duration::from_secs(10);
/// Times that are this far off are left as they are, in milliseconds: they were on their way.
const TOLERATED: i64 = 2000;
/// More than an agent has to say, and longer.
const MAX_CONDITIONS: usize = 16;
const MAX_TYPE: usize = 32;
const MAX_MESSAGE: usize = 512;
const MAX_LISTENERS: usize = 4096;

const CLOCK_SKEWED: &str = "clock_skewed";
const REPORTS_REFUSED: &str = "reports_refused";
/// For how long it is said that reports were refused, after the last one.
const REFUSED_FOR: Duration = Duration::from_secs(600);

/// The conditions that this version knows; see `NodeCondition` in the API.
pub const CONDITIONS: [&str; 8] = [
    "clock_skewed",
    "containerd_unavailable",
    "disk_full",
    "dns_failed",
    "network_failed",
    "port_conflict",
    "probes_absent",
    "reports_refused",
];

/// Something that is wrong with a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// A word, like "disk_full".
    pub kind: String,
    /// In words.
    pub message: String,
    /// Since when.
    pub since: Timestamp,
    /// Whether the node is given no containers while it holds.
    pub blocks: bool,
}

/// What is wrong with a node: what its agent says, and its clock as the leader sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Conditions {
    reported: BTreeMap<String, Condition>,
    clock: Option<Condition>,
    /// What it said that cannot be, and until when that is shown.
    refused: Option<(Condition, Instant)>,
    /// What is to be added to the node's times to make them the leader's, in milliseconds. Kept while it is about right: a status that is
    /// reported again is the same then.
    shift: i64,
    /// Ports that processes of the node listen on; not a condition, and told with them.
    listeners: BTreeSet<(u32, i32)>,
}

fn millis(time: Timestamp) -> i64 {
    i64::try_from(time.0).unwrap_or(i64::MAX)
}

fn is_type(text: &str) -> bool {
    (1..=MAX_TYPE).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

impl Conditions {
    /// Takes what an agent says instead of what it said before; whether that is another set.
    pub(super) fn set(&mut self, reported: Vec<v1::NodeCondition>, now: Timestamp) -> bool {
        let mut conditions = BTreeMap::new();
        let is_agents = |kind: &str| is_type(kind) && ![CLOCK_SKEWED, REPORTS_REFUSED].contains(&kind);
        for reported in reported.into_iter().filter(|reported| is_agents(&reported.r#type)).take(MAX_CONDITIONS) {
            let since = self.reported.get(&reported.r#type).map_or(now, |known| known.since);
            let condition = Condition {
                kind: reported.r#type.clone(),
                message: reported.message.chars().take(MAX_MESSAGE).collect(),
                since,
                blocks: reported.blocks_scheduling,
            };
            conditions.insert(reported.r#type, condition);
        }
        let changed = !conditions.keys().eq(self.reported.keys());
        self.reported = conditions;
        changed
    }

    /// Compares the node's clock; whether it became wrong or right by that.
    pub(super) fn set_clock(&mut self, clock: Timestamp, now: Timestamp) -> bool {
        let (ahead, behind) = (clock.since(now), now.since(clock));
        let wrong = match (ahead > SKEW, behind > SKEW) {
            (true, _) => Some(format!("its clock is {} s ahead of the leader's", ahead.as_secs())),
            (_, true) => Some(format!("its clock is {} s behind the leader's", behind.as_secs())),
            _ => None,
        };
        let exact = millis(now) - millis(clock);
        if (exact - self.shift).abs() > TOLERATED {
            self.shift = if exact.abs() > TOLERATED { exact } else { 0 };
        }
        let changed = wrong.is_some() != self.clock.is_some();
        self.clock = wrong.map(|message| Condition {
            kind: CLOCK_SKEWED.to_owned(),
            message,
            since: self.clock.as_ref().map_or(now, |known| known.since),
            blocks: false,
        });
        changed
    }

    /// Takes note that something was refused of what the node reports; whether that is new.
    pub(super) fn set_refused(&mut self, message: String, now: Timestamp, at: Instant) -> bool {
        let known = self.refused.take().filter(|(_, until)| at < *until);
        let is_new = known.is_none();
        let since = known.map_or(now, |(known, _)| known.since);
        let condition = Condition { kind: REPORTS_REFUSED.to_owned(), message, since, blocks: false };
        self.refused = Some((condition, at + REFUSED_FOR));
        is_new
    }

    pub(super) fn set_listeners(&mut self, listeners: &[v1::NodeListener]) {
        let ports = listeners.iter().take(MAX_LISTENERS).map(|listener| (listener.port, listener.protocol));
        self.listeners = ports.collect();
    }

    pub(super) fn listens(&self, port: u32, protocol: v1::Protocol) -> bool {
        self.listeners.contains(&(port, protocol.into()))
    }

    pub(super) fn shift(&self) -> i64 {
        self.shift
    }

    pub(super) fn blocks(&self) -> bool {
        self.reported.values().any(|condition| condition.blocks)
    }

    pub(super) fn all(&self, at: Instant) -> Vec<Condition> {
        let refused = self.refused.iter().filter(|(_, until)| at < *until).map(|(condition, _)| condition);
        let mut all: Vec<_> = self.clock.iter().chain(refused).chain(self.reported.values()).cloned().collect();
        all.sort_by(|a, b| a.kind.cmp(&b.kind));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(kind: &str, message: &str, blocks_scheduling: bool) -> v1::NodeCondition {
        v1::NodeCondition { r#type: kind.to_owned(), message: message.to_owned(), since: None, blocks_scheduling }
    }

    #[test]
    fn what_an_agent_says_replaces_what_it_said_and_keeps_its_time() {
        let mut conditions = Conditions::default();
        assert!(!conditions.set(Vec::new(), Timestamp(1000)));
        let full = || said("disk_full", "1 MiB left", true);
        assert!(
            conditions.set(vec![full(), said("Bad type", "", true), said(&"x".repeat(99), "", true)], Timestamp(2000))
        );
        assert!(conditions.blocks());
        assert!(!conditions.set(vec![said("disk_full", "0 MiB left", true)], Timestamp(3000)), "only its words");
        let [only] = conditions.all(Instant::now()).try_into().expect("one");
        assert_eq!((only.message.as_str(), only.since), ("0 MiB left", Timestamp(2000)));
        assert!(conditions.set(vec![said("probes_absent", "", false)], Timestamp(4000)));
        assert!(!conditions.blocks());
    }

    #[test]
    fn a_clock_that_is_far_off_is_a_condition() {
        let mut conditions = Conditions::default();
        let now = Timestamp(10_000_000);
        assert!(!conditions.set_clock(Timestamp(10_009_000), now));
        assert!(conditions.set_clock(Timestamp(13_600_000), now));
        assert_eq!(conditions.all(Instant::now())[0].message, "its clock is 3600 s ahead of the leader's");
        assert!(!conditions.set_clock(Timestamp(6_400_000), now), "it is wrong as before");
        assert_eq!(conditions.all(Instant::now())[0].message, "its clock is 3600 s behind the leader's");
        assert!(!conditions.blocks());
        assert_eq!(conditions.shift(), 3_600_000);
        conditions.set_clock(Timestamp(6_400_900), now);
        assert_eq!(conditions.shift(), 3_600_000, "it is about the same");
        assert!(conditions.set_clock(now, now));
        assert_eq!(conditions.shift(), 0);
        assert!(conditions.all(Instant::now()).is_empty());
    }

    #[test]
    fn what_was_refused_is_shown_for_a_while() {
        let mut conditions = Conditions::default();
        let (now, at) = (Timestamp(1000), Instant::now());
        assert!(conditions.set_refused("an address".to_owned(), now, at));
        assert!(!conditions.set_refused("another".to_owned(), Timestamp(2000), at + REFUSED_FOR / 2), "it is known");
        let [only] = conditions.all(at + REFUSED_FOR).try_into().expect("one");
        assert_eq!((only.message.as_str(), only.since, only.blocks), ("another", now, false));
        assert!(conditions.all(at + REFUSED_FOR * 2).is_empty());
        assert!(conditions.set_refused("again".to_owned(), Timestamp(3000), at + REFUSED_FOR * 2));
        let _ = conditions.set(vec![said("reports_refused", "nothing of the kind", false)], now);
        assert_eq!(conditions.all(at + REFUSED_FOR * 2)[0].message, "again", "it is not the node's to say");
    }
}
