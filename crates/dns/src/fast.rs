//! The question that nearly everybody asks, for the address of a service, answered from bytes to bytes. Whatever is not exactly
//! that is left to the whole server, which gives the same answer to this question, too.

use std::net::IpAddr;

use hickory_server::proto::rr::RecordType;
use rand::seq::SliceRandom as _;

use crate::zone::{TTL, Zone};

const HEADER: usize = 12;
const MAX_LABEL: usize = 63;
/// Of the second pair of bytes: a response, an operation that is no query, an answer cut short.
const NOT_PLAIN: u16 = 0b1111_1010_0000_0000;
const RESPONSE: u16 = 1 << 15;
const AUTHORITATIVE: u16 = 1 << 10;
const RECURSION_DESIRED: u16 = 1 << 8;
const RECURSION_AVAILABLE: u16 = 1 << 7;
const CHECKING_DISABLED: u16 = 1 << 4;
const CLASS_IN: u16 = 1;
/// A name that stands where the question has it.
const SAME_NAME: [u8; 2] = [0xc0, HEADER as u8];
const OPT: u16 = 41;
/// Without EDNS.
const MIN_PAYLOAD: u16 = 512;

/// A plain question for an address.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Question<'a> {
    /// Header and question, as they came.
    message: &'a [u8],
    name: &'a [u8],
    pub(crate) kind: RecordType,
    /// What the client takes, if it speaks EDNS.
    payload: Option<u16>,
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

impl<'a> Question<'a> {
    /// Reads a request; `None` for what is not this simple.
    pub(crate) fn read(bytes: &'a [u8]) -> Option<Self> {
        let counts = [word(bytes, 4)?, word(bytes, 6)?, word(bytes, 8)?, word(bytes, 10)?];
        let [1, 0, 0, additional @ (0 | 1)] = counts else { return None };
        if word(bytes, 2)? & NOT_PLAIN != 0 {
            return None;
        }
        let mut end = HEADER;
        // A name in a question is not compressed; one that claims to be is looked at elsewhere.
        loop {
            match usize::from(*bytes.get(end)?) {
                0 => break,
                length @ 1..=MAX_LABEL => end += 1 + length,
                _ => return None,
            }
        }
        end += 1;
        if end - HEADER > 255 {
            return None;
        }
        let kind = match word(bytes, end)? {
            1 => RecordType::A,
            28 => RecordType::AAAA,
            _ => return None,
        };
        let name = &bytes[HEADER..end];
        end += 4;
        if word(bytes, end - 2)? != CLASS_IN {
            return None;
        }
        let payload = match additional {
            0 if bytes.len() == end => None,
            // The root's name, OPT, payload, extended code and version, flags, and options that do not matter here.
            1 if bytes.get(end)? == &0
                && word(bytes, end + 1)? == OPT
                && bytes.get(end + 6)? == &0
                && bytes.len() == end + 11 + usize::from(word(bytes, end + 9)?) =>
            {
                Some(word(bytes, end + 3)?)
            }
            _ => return None,
        };
        Some(Self { message: &bytes[..end], name, kind, payload })
    }

    /// Writes the answer to `out`; false if the zone has none, or not this simply. `scratch` is for its use.
    pub(crate) fn answer(&self, zone: &Zone, max_payload: u16, scratch: &mut Vec<IpAddr>, out: &mut Vec<u8>) -> bool {
        let length = usize::from(self.name[0]);
        let (label, domain) = self.name[1..].split_at(length.min(self.name.len() - 1));
        if length == 0 || !(domain == [0] || domain.eq_ignore_ascii_case(zone.domain_bytes())) {
            return false;
        }
        let mut lower = [0; MAX_LABEL];
        let lower = &mut lower[..length];
        lower.copy_from_slice(label);
        lower.make_ascii_lowercase();
        scratch.clear();
        let known = std::str::from_utf8(lower).is_ok_and(|label| zone.addresses(label, scratch));
        scratch.retain(|address| address.is_ipv4() == (self.kind == RecordType::A));
        if !known || scratch.is_empty() {
            return false;
        }
        scratch.shuffle(&mut rand::rng());
        self.write(scratch, max_payload, out)
    }

    fn write(&self, addresses: &[IpAddr], max_payload: u16, out: &mut Vec<u8>) -> bool {
        out.clear();
        out.extend_from_slice(self.message);
        let asked = u16::from_be_bytes([self.message[2], self.message[3]]);
        let flags = RESPONSE | AUTHORITATIVE | RECURSION_AVAILABLE | asked & (RECURSION_DESIRED | CHECKING_DISABLED);
        out[2..4].copy_from_slice(&flags.to_be_bytes());
        out[6..8].copy_from_slice(&(addresses.len() as u16).to_be_bytes());
        let own_type = u16::from(self.kind).to_be_bytes();
        for address in addresses {
            out.extend_from_slice(&SAME_NAME);
            out.extend_from_slice(&own_type);
            out.extend_from_slice(&CLASS_IN.to_be_bytes());
            out.extend_from_slice(&TTL.to_be_bytes());
            let mut data = |octets: &[u8]| {
                out.extend_from_slice(&(octets.len() as u16).to_be_bytes());
                out.extend_from_slice(octets);
            };
            match address {
                IpAddr::V4(v4) => data(&v4.octets()),
                IpAddr::V6(v6) => data(&v6.octets()),
            }
        }
        let payload = self.payload.map(|payload| payload.clamp(MIN_PAYLOAD, max_payload));
        if let Some(payload) = payload {
            out.push(0);
            out.extend_from_slice(&OPT.to_be_bytes());
            out.extend_from_slice(&payload.to_be_bytes());
            // Neither an extended code nor flags nor options.
            out.extend_from_slice(&[0; 6]);
        } else {
            out[10..12].copy_from_slice(&[0, 0]);
        }
        // What is longer is cut off properly elsewhere.
        out.len() <= usize::from(payload.unwrap_or(MIN_PAYLOAD))
    }
}

#[cfg(test)]
mod tests {
    use hickory_server::{
        net::xfer::Protocol,
        proto::{
            op::{DnsResponse, Edns, Message, MessageType, OpCode, Query, ResponseCode},
            rr::{LowerName, Name},
        },
        server::Request,
    };
    use proptest::prelude::*;
    use warren_proto::v1;

    use super::*;
    use crate::zone::Answer;

    const MAX: u16 = 1232;

    fn zone(endpoints: u8) -> Zone {
        let addresses = |i: u8| vec![format!("10.128.0.{i}"), format!("fd00::{i:x}")];
        let endpoint =
            |i| v1::Endpoint { slot: u32::from(i), addresses: addresses(i), healthy: true, ..Default::default() };
        let service = |id: &str, name: &str, mode: v1::EndpointMode| v1::ServiceEntry {
            id: id.to_owned(),
            name: name.to_owned(),
            virtual_addresses: vec!["10.127.0.1".to_owned()],
            endpoint_mode: mode.into(),
            endpoints: (1..=endpoints).map(endpoint).collect(),
            ..Default::default()
        };
        let mut zone = Zone::new("Warren.example", &[]).expect("a zone");
        let services = [service("1", "web", v1::EndpointMode::Dnsrr), service("2", "db", v1::EndpointMode::Vip)];
        zone.update(&[], services.iter());
        zone
    }

    fn request(name: &str, kind: RecordType, edns: Option<u16>) -> Vec<u8> {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).expect("a name"), kind));
        if let Some(payload) = edns {
            let mut edns = Edns::new();
            edns.set_max_payload(payload);
            message.set_edns(edns);
        }
        message.to_vec().expect("encodable")
    }

    fn answered(zone: &Zone, request: &[u8]) -> Option<Message> {
        let mut out = Vec::new();
        let answered = Question::read(request)?.answer(zone, MAX, &mut Vec::new(), &mut out);
        answered.then(|| DnsResponse::from_buffer(out).expect("a message").into_message())
    }

    #[test]
    fn whatever_comes_is_read_or_refused() {
        let zone = zone(3);
        let good = [
            request("web.warren.example.", RecordType::A, Some(4096)),
            request("db.", RecordType::AAAA, None),
            request("x.y.z.example.", RecordType::TXT, Some(100)),
        ];
        let good: Vec<_> = good.iter().map(Vec::as_slice).collect();
        let (mut scratch, mut out) = (Vec::new(), Vec::new());
        warren_fuzz::fuzz(&good, |bytes| {
            out.clear();
            if let Some(question) = Question::read(bytes) {
                let _ = question.answer(&zone, MAX, &mut scratch, &mut out);
                assert!(out.len() <= usize::from(MAX), "{} bytes", out.len());
            }
        });
    }

    #[test]
    fn a_plain_question_is_answered() {
        let zone = zone(3);
        for name in ["web.warren.example.", "WEB.Warren.EXAMPLE.", "web."] {
            for edns in [None, Some(100), Some(4096)] {
                let request = request(name, RecordType::A, edns);
                let answer = answered(&zone, &request).expect("an answer");
                assert_eq!((answer.metadata.id, answer.metadata.response_code), (7, ResponseCode::NoError));
                assert_eq!(answer.metadata.message_type, MessageType::Response);
                assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
                assert!(answer.metadata.recursion_desired && !answer.metadata.truncation);
                // As it was asked, letter for letter.
                assert_eq!(answer.queries[0].name().to_ascii(), name);
                let mut addresses: Vec<_> = answer.answers.iter().map(|record| record.data.to_string()).collect();
                addresses.sort();
                assert_eq!(addresses, ["10.128.0.1", "10.128.0.2", "10.128.0.3"]);
                assert!(
                    answer.answers.iter().all(|record| record.ttl == TTL && record.name == *answer.queries[0].name())
                );
                assert_eq!(answer.edns.map(|edns| edns.max_payload()), edns.map(|payload| payload.clamp(512, MAX)));
            }
        }
        let of = |name: &str, kind| {
            answered(&zone, &request(name, kind, None)).map(|answer| answer.answers[0].data.to_string())
        };
        assert_eq!(of("web-2.", RecordType::AAAA).as_deref(), Some("fd00::2"));
        assert_eq!(of("db.warren.example.", RecordType::A).as_deref(), Some("10.127.0.1"));
        // There is nothing, or no such thing, or it takes more than this.
        for (name, kind) in [
            ("db.", RecordType::AAAA),
            ("none.", RecordType::A),
            ("web.example.", RecordType::A),
            ("vip.web.", RecordType::A),
            ("web.", RecordType::SRV),
            (".", RecordType::A),
        ] {
            assert_eq!(of(name, kind), None, "{name}");
        }
    }

    #[test]
    fn what_does_not_fit_is_left_to_others() {
        let zone = zone(60);
        assert_eq!(answered(&zone, &request("web.", RecordType::A, None)), None, "60 addresses in 512 bytes");
        let answer = answered(&zone, &request("web.", RecordType::A, Some(4096))).expect("an answer");
        assert_eq!(answer.answers.len(), 60);
        assert_eq!(answered(&zone, &request("web.", RecordType::AAAA, Some(4096))), None, "more than {MAX} bytes");
    }

    #[test]
    fn what_is_not_plain_is_left_to_others() {
        let plain = request("web.", RecordType::A, None);
        assert!(Question::read(&plain).is_some());
        let changed = |at: usize, value: u8| {
            let mut bytes = plain.clone();
            bytes[at] = value;
            bytes
        };
        for (what, bytes) in [
            ("a response", changed(2, 0x81)),
            ("a notification", changed(2, 0x21)),
            ("cut short", changed(2, 0x03)),
            ("two questions", changed(5, 2)),
            ("an answer", changed(7, 1)),
            ("another class", changed(plain.len() - 1, 3)),
            ("a pointer", changed(HEADER, 0xc0)),
            ("something behind", [plain.clone(), vec![0]].concat()),
            ("an empty message", Vec::new()),
        ] {
            assert_eq!(Question::read(&bytes), None, "{what}");
        }
        for length in 0..plain.len() {
            assert_eq!(Question::read(&plain[..length]), None, "{length} bytes of it");
        }
    }

    proptest! {
        /// Whatever comes, it is not answered otherwise than the whole server would.
        #[test]
        fn nothing_is_answered_that_is_no_question(
            mut bytes in prop_oneof![
                Just(request("web.", RecordType::A, None)),
                Just(request("web-1.warren.example.", RecordType::AAAA, Some(1000))),
            ],
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            cut in any::<prop::sample::Index>(),
            whole in any::<bool>(),
        ) {
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if !whole {
                bytes.truncate(cut.index(bytes.len()));
            }
            let zone = zone(3);
            if let Some(answer) = answered(&zone, &bytes) {
                let request = Request::from_bytes(bytes, ([127, 0, 0, 1], 1).into(), Protocol::Udp).expect("it is one");
                let info = request.request_info().expect("a question");
                let name: &LowerName = info.query.name();
                let Some(Answer::Found { mut records, .. }) = zone.answer(name, info.query.query_type()) else {
                    panic!("answered {name}");
                };
                let mut answers = answer.answers.clone();
                let key = |record: &hickory_server::proto::rr::Record| record.data.to_string();
                records.sort_by_key(key);
                answers.sort_by_key(key);
                let data = |records: &[hickory_server::proto::rr::Record]| records.iter().map(key).collect::<Vec<_>>();
                prop_assert_eq!(data(&records), data(&answers));
            }
        }
    }
}
