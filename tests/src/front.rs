use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

/// What ails a registry's larger blobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A byte comes every ten seconds.
    Dribbles,
    /// Each connection breaks after so many bytes.
    BreaksAfter(u64),
    /// They are not there.
    HasNone,
}

/// Configurations come whole.
const SMALL: u64 = 4096;

/// Stands before a server of HTTP, passes everything on, and has trouble with blobs.
#[derive(Debug)]
pub struct Front {
    /// Host and port.
    pub host: String,
    /// Blobs of some size that were asked for.
    asked: Arc<AtomicUsize>,
    ended: Arc<AtomicBool>,
}

impl Front {
    /// Stands before `host`.
    #[must_use]
    pub fn start(host: &str, trouble: Trouble) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let (asked, ended) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let front = Self { host: address.to_string(), asked: Arc::clone(&asked), ended: Arc::clone(&ended) };
        let behind = host.to_owned();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                let (behind, asked, ended) = (behind.clone(), Arc::clone(&asked), Arc::clone(&ended));
                // A connection that breaks is the test's.
                thread::spawn(move || drop(pass(client, &behind, trouble, &asked, &ended)));
            }
        });
        front
    }

    /// How often a blob of some size was asked for.
    #[must_use]
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // Wakes the one that accepts.
        drop(TcpStream::connect(&self.host));
    }
}

/// The lines up to the first empty one.
fn head(stream: &mut impl Read) -> io::Result<String> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

/// One request a connection.
fn pass(
    mut client: TcpStream,
    behind: &str,
    trouble: Trouble,
    asked: &AtomicUsize,
    ended: &AtomicBool,
) -> io::Result<()> {
    let request = head(&mut client)?;
    let mut server = TcpStream::connect(behind)?;
    server.write_all(request.replacen("\r\n", "\r\nConnection: close\r\n", 1).as_bytes())?;
    let response = head(&mut server)?;
    let lower = response.to_lowercase();
    let size = lower.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse::<u64>().ok());
    let is_troubled = request.contains("/blobs/") && size.is_none_or(|size| size > SMALL);
    if is_troubled {
        asked.fetch_add(1, Ordering::Relaxed);
    }
    if is_troubled && trouble == Trouble::HasNone {
        return client.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    client.write_all(response.replacen("\r\n", "\r\nConnection: close\r\n", 1).as_bytes())?;
    match trouble {
        Trouble::Dribbles if is_troubled => {
            let mut byte = [0];
            while !ended.load(Ordering::Relaxed) && server.read(&mut byte)? > 0 {
                client.write_all(&byte)?;
                thread::sleep(Duration::from_secs(10));
            }
        }
        Trouble::BreaksAfter(bytes) if is_troubled => {
            io::copy(&mut server.take(bytes), &mut client)?;
        }
        _ => drop(io::copy(&mut server, &mut client)?),
    }
    Ok(())
}
