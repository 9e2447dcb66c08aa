use std::{
    collections::HashMap,
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// What a registry that means harm answers.
#[derive(Clone, Debug)]
pub enum Harm {
    /// These bytes, of this type.
    Bytes(&'static str, Vec<u8>),
    /// This beginning, and then blanks for ever.
    Endless(Vec<u8>),
    /// That a token is to be fetched from there first.
    Realm(String),
    /// That it is somewhere else.
    Elsewhere(String),
}

/// A registry that answers whatever a test wants.
#[derive(Debug)]
pub struct Hostile {
    /// Where it is, as HOST:PORT.
    pub host: String,
    answers: Arc<Mutex<HashMap<String, Harm>>>,
    sent: Arc<AtomicU64>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Hostile {
    /// Starts one at this address of this machine. It ends with the process.
    ///
    /// # Panics
    ///
    /// When the address is not this machine's.
    #[must_use]
    pub fn start(address: &str) -> Self {
        let listener = TcpListener::bind((address, 0)).expect("an address of this machine");
        let host = format!("{address}:{}", listener.local_addr().expect("an address").port());
        let hostile = Self { host, answers: Arc::default(), sent: Arc::default(), asked: Arc::default() };
        let (answers, sent, asked) =
            (Arc::clone(&hostile.answers), Arc::clone(&hostile.sent), Arc::clone(&hostile.asked));
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (answers, sent, asked) = (Arc::clone(&answers), Arc::clone(&sent), Arc::clone(&asked));
                // Whoever hangs up has heard enough.
                thread::spawn(move || drop(answer(stream, &answers, &sent, &asked)));
            }
        });
        hostile
    }

    /// Answers a path so from now on; one that ends with a slash stands for all that are directly below.
    pub fn say(&self, path: impl Into<String>, harm: Harm) {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).insert(path.into(), harm);
    }

    /// Bytes that it has sent so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// The paths that it was asked for.
    #[must_use]
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has an image of this configuration and these layers; returns its name.
    #[must_use]
    pub fn image(&self, repository: &str, mut configuration: Value, layers: &[Vec<u8>]) -> String {
        let blob = |bytes: Vec<u8>, kind: &str| {
            let (digest, size) = (digest(&bytes), bytes.len());
            self.say(format!("/v2/{repository}/blobs/{digest}"), Harm::Bytes("application/octet-stream", bytes));
            json!({ "mediaType": kind, "digest": digest, "size": size })
        };
        let layers: Vec<_> =
            layers.iter().map(|layer| blob(layer.clone(), "application/vnd.oci.image.layer.v1.tar+gzip")).collect();
        if configuration.get("rootfs").is_none() {
            // What they unpack to is not what is said: nobody comes so far.
            let diffs: Vec<_> = layers.iter().map(|layer| layer["digest"].clone()).collect();
            configuration["rootfs"] = json!({ "type": "layers", "diff_ids": diffs });
        }
        let config = blob(configuration.to_string().into_bytes(), "application/vnd.oci.image.config.v1+json");
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers }).to_string().into_bytes();
        let kind = "application/vnd.oci.image.manifest.v1+json";
        for reference in ["latest".to_owned(), digest(&manifest)] {
            let path = format!("/v2/{repository}/manifests/{reference}");
            self.say(path, Harm::Bytes(kind, manifest.clone()));
        }
        format!("{}/{repository}", self.host)
    }
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// A layer of one file of zeros, of so many times 64 MiB; a thousandth of that is sent.
///
/// # Panics
///
/// Never: it is made in memory.
#[must_use]
pub fn zeros(times: u64) -> Vec<u8> {
    const PART: usize = 64 << 20;
    let gzip = |bytes: &[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).expect("memory");
        encoder.finish().expect("memory")
    };
    let mut header = tar::Header::new_gnu();
    header.set_path("zeros").expect("short");
    header.set_size(times * PART as u64);
    header.set_mode(0o644);
    header.set_cksum();
    // Members of gzip one after the other are one file.
    let (mut layer, part) = (gzip(header.as_bytes()), gzip(&vec![0; PART]));
    for _ in 0..times {
        layer.extend(&part);
    }
    layer.extend(gzip(&[0; 1024]));
    layer
}

fn answer(
    mut stream: TcpStream,
    answers: &Mutex<HashMap<String, Harm>>,
    sent: &AtomicU64,
    asked: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut head = vec![first.clone()];
    for line in lines.by_ref() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        head.push(line);
    }
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    asked.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
    let plain = path.split('?').next().unwrap_or_default();
    let directory = plain.rfind('/').map_or("", |end| &plain[..=end]);
    let harm = {
        let answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.get(plain).or_else(|| answers.get(directory)).cloned()
    };
    let mut write = |bytes: &[u8]| {
        sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        stream.write_all(bytes)
    };
    match harm {
        Some(Harm::Bytes(kind, bytes)) => {
            let length = bytes.len();
            write(
                format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")
                    .as_bytes(),
            )?;
            write(&bytes)
        }
        Some(Harm::Endless(bytes)) => {
            write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")?;
            write(&bytes)?;
            let blanks = vec![b' '; 1 << 16];
            loop {
                write(&blanks)?;
            }
        }
        Some(Harm::Realm(realm)) => write(
            format!(
                "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer realm=\"{realm}\",service=\"x\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            )
            .as_bytes(),
        ),
        Some(Harm::Elsewhere(location)) => write(
            format!("HTTP/1.1 307 Elsewhere\r\nLocation: {location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                .as_bytes(),
        ),
        None => write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"),
    }
}
