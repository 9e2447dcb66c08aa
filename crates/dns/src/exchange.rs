//! A question to other resolvers, one after the other, until one answers it.
//!
//! Sockets are connected, so that a port that nobody listens on is known at once. A server that does not understand EDNS is asked without
//! it. One that fails or refuses is not believed before the others have been asked.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use hickory_server::proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RecordType},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

/// A server that does not answer within this time is left for the next one, and asked again after that.
const TIMEOUT: Duration = Duration::from_millis(1000);
const ATTEMPTS: usize = 2;
/// What a datagram may have on every path (DNS flag day 2020).
const PAYLOAD: u16 = 1232;
/// More than an answer to such a question has.
const MAX_DATAGRAM: usize = 4096;
/// How long a server that did not understand EDNS is asked without it.
const PLAIN_FOR: Duration = Duration::from_secs(300);

/// Why nobody answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    /// Nobody can.
    Unreachable,
    /// Somebody may have, and did not in time.
    Timeout,
}

/// Servers, in the order in which they are asked.
#[derive(Debug, Default)]
pub(crate) struct Servers {
    servers: Vec<SocketAddr>,
    /// Those that are asked without EDNS, until then.
    plain: Mutex<HashMap<SocketAddr, Instant>>,
}

impl Servers {
    pub(crate) fn new(servers: Vec<SocketAddr>) -> Self {
        Self { servers, plain: Mutex::default() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.servers.is_empty()
    }

    /// Asks, and returns the first answer that says that there is something, or nothing; else the last that says anything.
    pub(crate) async fn ask(&self, name: &Name, kind: RecordType) -> Result<Message, Problem> {
        let mut last = None;
        let mut problem = Problem::Unreachable;
        for _ in 0..ATTEMPTS {
            let mut is_silent = false;
            for server in &self.servers {
                match self.ask_one(*server, name, kind).await {
                    Ok(answer) if is_final(answer.metadata.response_code) => return Ok(answer),
                    Ok(answer) => last = Some(answer),
                    Err(error) if error.kind() == io::ErrorKind::TimedOut => is_silent = true,
                    Err(error) => tracing::debug!(%server, %error, "a resolver cannot be asked"),
                }
            }
            if !is_silent {
                // Whoever can answer has.
                break;
            }
            problem = Problem::Timeout;
        }
        last.ok_or(problem)
    }

    fn is_plain(&self, server: SocketAddr) -> bool {
        let mut plain = self.plain.lock().unwrap_or_else(PoisonError::into_inner);
        plain.retain(|_, until| *until > Instant::now());
        plain.contains_key(&server)
    }

    async fn ask_one(&self, server: SocketAddr, name: &Name, kind: RecordType) -> io::Result<Message> {
        let with_edns = !self.is_plain(server);
        let answer = exchange(server, name, kind, with_edns).await?;
        let code = answer.metadata.response_code;
        if !with_edns || !matches!(code, ResponseCode::FormErr | ResponseCode::NotImp | ResponseCode::BADVERS) {
            return Ok(answer);
        }
        let plain = exchange(server, name, kind, false).await?;
        if plain.metadata.response_code != code {
            let mut known = self.plain.lock().unwrap_or_else(PoisonError::into_inner);
            known.insert(server, Instant::now() + PLAIN_FOR);
        }
        Ok(plain)
    }
}

/// Whether other servers would say the same.
fn is_final(code: ResponseCode) -> bool {
    matches!(code, ResponseCode::NoError | ResponseCode::NXDomain)
}

async fn exchange(server: SocketAddr, name: &Name, kind: RecordType, with_edns: bool) -> io::Result<Message> {
    let mut question = Message::new(rand::random(), MessageType::Query, OpCode::Query);
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(name.clone(), kind));
    if with_edns {
        let mut edns = Edns::new();
        edns.set_max_payload(PAYLOAD);
        question.set_edns(edns);
    }
    let bytes = question.to_vec().map_err(io::Error::other)?;
    let answer = timeout(TIMEOUT, by_udp(server, &question, &bytes)).await??;
    if !answer.metadata.truncation {
        return Ok(answer);
    }
    timeout(TIMEOUT, by_tcp(server, &question, &bytes)).await?
}

/// Whether an answer is to this question. One that only says that the question is malformed need not repeat it.
fn is_answer(answer: &Message, question: &Message) -> bool {
    let same = answer.metadata.id == question.metadata.id && answer.metadata.message_type == MessageType::Response;
    let repeated = match (answer.queries.as_slice(), question.queries.as_slice()) {
        ([theirs], [ours]) => {
            theirs.name() == ours.name()
                && theirs.query_type() == ours.query_type()
                && theirs.query_class() == ours.query_class()
        }
        ([], _) => !is_final(answer.metadata.response_code),
        _ => false,
    };
    same && repeated
}

async fn by_udp(server: SocketAddr, question: &Message, bytes: &[u8]) -> io::Result<Message> {
    let any: SocketAddr =
        if server.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(bytes).await?;
    let mut buffer = vec![0; MAX_DATAGRAM];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // What is not an answer to this may be a late one to another, or a lie.
        if let Ok(answer) = Message::from_vec(&buffer[..length])
            && is_answer(&answer, question)
        {
            return Ok(answer);
        }
    }
}

async fn by_tcp(server: SocketAddr, question: &Message, bytes: &[u8]) -> io::Result<Message> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), bytes].concat()).await?;
    let mut buffer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut buffer).await?;
    let answer = Message::from_vec(&buffer).map_err(io::Error::other)?;
    if is_answer(&answer, question) { Ok(answer) } else { Err(io::Error::other("an answer to another question")) }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use hickory_server::proto::rr::{RData, Record, rdata::A};

    use super::*;

    /// A server that answers each query with what `answer` makes of it, and how often it was asked.
    async fn server(answer: impl Fn(Message) -> Option<Vec<u8>> + Send + 'static) -> (SocketAddr, Arc<AtomicUsize>) {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let address = socket.local_addr().expect("an address");
        let asked = Arc::<AtomicUsize>::default();
        let count = Arc::clone(&asked);
        tokio::spawn(async move {
            let mut buffer = vec![0; MAX_DATAGRAM];
            while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
                count.fetch_add(1, Ordering::Relaxed);
                let query = Message::from_vec(&buffer[..length]).expect("a query");
                if let Some(bytes) = answer(query) {
                    let _ = socket.send_to(&bytes, from).await;
                }
            }
        });
        (address, asked)
    }

    fn response(query: &Message, code: ResponseCode) -> Message {
        let mut response = Message::response(query.metadata.id, OpCode::Query);
        response.metadata.response_code = code;
        response.add_query(query.queries[0].clone());
        response
    }

    fn found(query: &Message) -> Vec<u8> {
        let mut response = response(query, ResponseCode::NoError);
        let address = A::new(192, 0, 2, 7);
        response.add_answer(Record::from_rdata(query.queries[0].name().clone(), 60, RData::A(address)));
        response.to_vec().expect("a message")
    }

    async fn ask(servers: &Servers) -> Result<(ResponseCode, usize), Problem> {
        let name = Name::from_ascii("x.example.").expect("a name");
        let answer = servers.ask(&name, RecordType::A).await?;
        Ok((answer.metadata.response_code, answer.answers.len()))
    }

    #[test]
    fn whatever_comes_is_read_or_refused() {
        let name = Name::from_ascii("a.example.").expect("a name");
        let mut question = Message::new(7, MessageType::Query, OpCode::Query);
        question.add_query(Query::query(name, RecordType::A));
        let (plain, found) = (question.to_vec().expect("encodable"), found(&question));
        let mut answers = 0;
        warren_fuzz::fuzz(&[&found, &plain], |bytes| {
            if let Ok(answer) = Message::from_vec(bytes) {
                answers += u32::from(is_answer(&answer, &question));
            }
        });
        assert!(answers > 0, "some are still right");
    }

    #[tokio::test]
    async fn a_server_that_does_not_understand_edns_is_asked_without_it() {
        for header_only in [false, true] {
            let (address, asked) = server(move |query| {
                if query.edns.is_none() {
                    return Some(found(&query));
                }
                let bytes = response(&query, ResponseCode::FormErr).to_vec().expect("a message");
                let mut header = bytes[..12].to_vec();
                header[4..6].fill(0);
                Some(if header_only { header } else { bytes })
            })
            .await;
            let servers = Servers::new(vec![address]);
            assert_eq!(ask(&servers).await, Ok((ResponseCode::NoError, 1)));
            assert_eq!(ask(&servers).await, Ok((ResponseCode::NoError, 1)));
            assert_eq!(asked.load(Ordering::Relaxed), 3, "it is remembered");
        }
    }

    #[tokio::test]
    async fn one_that_fails_or_refuses_is_not_the_last_word() {
        let failing = |code| server(move |query| Some(response(&query, code).to_vec().expect("a message")));
        let (refuses, _) = failing(ResponseCode::Refused).await;
        let (fails, _) = failing(ResponseCode::ServFail).await;
        let (knows, _) = server(|query| Some(found(&query))).await;
        assert_eq!(ask(&Servers::new(vec![refuses, fails, knows])).await, Ok((ResponseCode::NoError, 1)));
        let began = Instant::now();
        assert_eq!(ask(&Servers::new(vec![fails, refuses])).await, Ok((ResponseCode::Refused, 0)));
        let (denies, _) = failing(ResponseCode::NXDomain).await;
        assert_eq!(ask(&Servers::new(vec![denies, knows])).await, Ok((ResponseCode::NXDomain, 0)));
        assert!(began.elapsed() < TIMEOUT);
    }

    #[tokio::test]
    async fn where_nobody_listens_nobody_is_waited_for() {
        let closed = UdpSocket::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address");
        let began = Instant::now();
        assert_eq!(ask(&Servers::new(vec![closed, closed])).await, Err(Problem::Unreachable));
        assert!(began.elapsed() < TIMEOUT / 2, "{:?}", began.elapsed());
        let (silent, _) = server(|_| None).await;
        assert_eq!(ask(&Servers::new(vec![silent])).await, Err(Problem::Timeout));
    }

    #[tokio::test]
    async fn answers_to_other_questions_are_no_answers() {
        let (address, _) = server(|query| {
            let mut other = Message::from_vec(&found(&query)).expect("a message");
            other.metadata.id = other.metadata.id.wrapping_add(1);
            Some(other.to_vec().expect("a message"))
        })
        .await;
        assert_eq!(ask(&Servers::new(vec![address])).await, Err(Problem::Timeout));
    }
}
