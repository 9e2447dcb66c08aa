//! DNS: a server that answers, fails or is silent by the name asked for, and a client that asks.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// How a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// UDP over IPv4.
    Udp4,
    /// UDP over IPv6.
    Udp6,
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
}

/// What came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A response code.
    Code(u8),
    /// Nothing.
    Nothing,
}

/// Answers on one port, over UDP and TCP, IPv4 and IPv6. A name that begins with `nx` does not exist, `fail` fails, `drop`
/// is never answered, `second` is answered when asked for again.
#[derive(Debug)]
pub struct DnsServer {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

const POLL: Duration = Duration::from_millis(50);

impl DnsServer {
    /// Serves until it is dropped.
    #[must_use]
    pub fn start(port: u16) -> Self {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        // A socket each: a dual-stack one would answer IPv4 clients through IPv6 addresses.
        let v4: SocketAddr = ([127, 0, 0, 1], port).into();
        let v6: SocketAddr = (Ipv6Addr::LOCALHOST, port).into();
        let mut threads = Vec::new();
        for address in [v4, v6] {
            let udp = UdpSocket::bind(address).expect("a free port");
            udp.set_read_timeout(Some(POLL)).expect("a socket option");
            let (stopped, count) = (Arc::clone(&stop), Arc::clone(&answered));
            threads.push(std::thread::spawn(move || serve_udp(&udp, &stopped, &count)));
            let tcp = TcpListener::bind(address).expect("a free port");
            tcp.set_nonblocking(true).expect("a socket option");
            let (stopped, count) = (Arc::clone(&stop), Arc::clone(&answered));
            threads.push(std::thread::spawn(move || serve_tcp(&tcp, &stopped, &count)));
        }
        Self { stop, answered, threads }
    }

    /// How many queries were answered.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::SeqCst)
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// The answer to a query, if it gets one. `seen` remembers names that were asked for.
fn respond(query: &[u8], seen: &mut Vec<Vec<u8>>) -> Option<Vec<u8>> {
    let label = &query[13..13 + usize::from(query[12])];
    let code = if label.starts_with(b"nx") {
        3
    } else if label.starts_with(b"fail") {
        2
    } else if label.starts_with(b"drop") {
        return None;
    } else if label.starts_with(b"second") && !seen.contains(&label.to_vec()) {
        seen.push(label.to_vec());
        return None;
    } else {
        0
    };
    let mut response = query.to_vec();
    response[2] = 0x81;
    response[3] = 0x80 | code;
    Some(response)
}

fn serve_udp(socket: &UdpSocket, stop: &AtomicBool, answered: &AtomicU64) {
    let mut seen = Vec::new();
    let mut buffer = [0; 1500];
    while !stop.load(Ordering::SeqCst) {
        let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
        if len > 17
            && let Some(response) = respond(&buffer[..len], &mut seen)
        {
            answered.fetch_add(1, Ordering::SeqCst);
            let _ = socket.send_to(&response, from);
        }
    }
}

fn serve_tcp(listener: &TcpListener, stop: &AtomicBool, answered: &AtomicU64) {
    let mut seen = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        let Ok((mut stream, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        };
        let _ = stream.set_nonblocking(false);
        let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
        let mut buffer = [0; 1500];
        let Ok(len) = stream.read(&mut buffer) else { continue };
        if len > 19
            && let Some(response) = respond(&buffer[2..len], &mut seen)
        {
            answered.fetch_add(1, Ordering::SeqCst);
            let mut framed = (response.len() as u16).to_be_bytes().to_vec();
            framed.extend(response);
            let _ = stream.write_all(&framed);
        }
    }
}

/// A query's bytes.
fn query(id: u16, name: &str, qtype: u16) -> Vec<u8> {
    let mut message = id.to_be_bytes().to_vec();
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    message.push(0);
    message.extend(qtype.to_be_bytes());
    message.extend([0, 1]);
    message
}

/// A query as it is over TCP, behind its length.
#[must_use]
pub fn framed_query(id: u16, name: &str, qtype: u16) -> Vec<u8> {
    let message = query(id, name, qtype);
    let mut framed = (message.len() as u16).to_be_bytes().to_vec();
    framed.extend(message);
    framed
}

/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_millis(400);

/// Asks for `name`, `tries` times over UDP from one socket with one id, as resolvers do.
#[must_use]
pub fn ask(transport: Transport, port: u16, id: u16, name: &str, qtype: u16, tries: u32) -> Answer {
    let message = query(id, name, qtype);
    let mut buffer = [0; 1500];
    match transport {
        Transport::Udp4 | Transport::Udp6 => {
            let socket = udp(transport, port);
            for _ in 0..tries {
                socket.send(&message).expect("sends");
                if let Ok(len) = socket.recv(&mut buffer)
                    && len > 3
                {
                    return Answer::Code(buffer[3] & 15);
                }
            }
        }
        Transport::Tcp4 | Transport::Tcp6 => {
            let address: SocketAddr = match transport {
                Transport::Tcp4 => ([127, 0, 0, 1], port).into(),
                _ => (Ipv6Addr::LOCALHOST, port).into(),
            };
            let mut stream = TcpStream::connect(address).expect("connects");
            stream.set_read_timeout(Some(PATIENCE)).expect("a socket option");
            stream.write_all(&framed_query(id, name, qtype)).expect("sends");
            if let Ok(len) = stream.read(&mut buffer)
                && len > 5
            {
                return Answer::Code(buffer[5] & 15);
            }
        }
    }
    Answer::Nothing
}

fn udp(transport: Transport, port: u16) -> UdpSocket {
    let (from, to): (SocketAddr, SocketAddr) = match transport {
        Transport::Udp6 => ((Ipv6Addr::LOCALHOST, 0).into(), (Ipv6Addr::LOCALHOST, port).into()),
        _ => (([127, 0, 0, 1], 0).into(), ([127, 0, 0, 1], port).into()),
    };
    let socket = UdpSocket::bind(from).expect("a socket");
    socket.connect(to).expect("connects");
    socket.set_read_timeout(Some(PATIENCE)).expect("a socket option");
    socket
}

/// Sends queries that nobody answers, from one socket, without waiting.
pub fn ask_silently(port: u16, count: u16) {
    let socket = udp(Transport::Udp4, port);
    for id in 0..count {
        socket.send(&query(id, "drop.test", 1)).expect("sends");
    }
}

/// A shell script that asks one DNS query over TCP, of a server beside it, in its own network namespace. The server answers,
/// or takes the query and says nothing.
#[must_use]
pub fn script_that_asks(port: u16, answered: bool) -> String {
    // Id 0x0102, one question: name.test, A, IN; 27 bytes behind their length.
    const QUESTION: &str = r"\000\001\000\000\000\000\000\000\004name\004test\000\000\001\000\001";
    let query = format!(r"printf '\000\033\001\002\001\000{QUESTION}'");
    let answer = format!(r"head -c 29 >/dev/null; printf '\000\033\001\002\201\200{QUESTION}'");
    let server = if answered {
        format!("echo \"{}\" >/tmp/s; nc -l -p {port} -e sh /tmp/s", answer.replace('\\', r"\\"))
    } else {
        // Its input has no end: at one it would close the connection, perhaps before the query has come.
        format!("mkfifo /tmp/f; nc -l -p {port} <>/tmp/f >/dev/null")
    };
    // Until the server listens, the connection is refused.
    let client = format!("until {query} | nc 127.0.0.1 {port} >/dev/null; do sleep 0.1; done");
    format!("trap 'exit 0' TERM; ({server}) & ({client}) & while :; do sleep 0.05; done")
}
