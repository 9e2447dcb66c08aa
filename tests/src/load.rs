use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::runtime;
use tonic::{Code, transport::Channel};
use warren_pki::Dialer;
use warren_proto::v1::{self, service_spec::Mode, services_client::ServicesClient};

/// After this a call is repeated elsewhere: whoever was asked may be gone.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between attempts.
const PAUSE: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
struct Written {
    names: BTreeSet<String>,
    acknowledged_at: Vec<Instant>,
}

/// Clients that create services, and remember which were acknowledged. What is not, they repeat at the next manager, as the same
/// request.
#[derive(Debug)]
pub struct Load {
    end: Arc<AtomicBool>,
    written: Arc<Mutex<Written>>,
    clients: Vec<JoinHandle<()>>,
}

fn spec(name: &str) -> v1::ServiceSpec {
    v1::ServiceSpec {
        name: name.to_owned(),
        mode: Some(Mode::Replicated(v1::Replicated { replicas: 0 })),
        container: Some(v1::ContainerSpec {
            image: "written".to_owned(),
            pull_policy: v1::PullPolicy::Never.into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

async fn create(channel: &Channel, name: &str) -> Result<(), Code> {
    let request = v1::CreateServiceRequest { spec: Some(spec(name)), request_id: name.to_owned() };
    let mut services = ServicesClient::new(channel.clone());
    let called = services.create_service(request);
    match tokio::time::timeout(PATIENCE, called).await {
        Ok(answer) => answer.map(drop).map_err(|status| status.code()),
        Err(_) => Err(Code::DeadlineExceeded),
    }
}

impl Load {
    /// Begins: so many clients, at managers behind these sockets.
    ///
    /// # Panics
    ///
    /// When a socket's path is none.
    #[must_use]
    pub fn start(clients: usize, sockets: &[PathBuf]) -> Self {
        let (end, written) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Written::default())));
        let start = |client: usize| {
            let (end, written, sockets) = (Arc::clone(&end), Arc::clone(&written), sockets.to_vec());
            std::thread::spawn(move || {
                let runtime = runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(async {
                    let dial = |socket: &PathBuf| Dialer::socket(socket).expect("a path").lazy();
                    let channels: Vec<_> = sockets.iter().map(dial).collect();
                    let mut asked = client;
                    for number in 0.. {
                        let name = format!("w-{client}-{number}");
                        while !end.load(Ordering::Relaxed) {
                            match create(&channels[asked % channels.len()], &name).await {
                                Ok(()) => {
                                    let mut written = written.lock().unwrap_or_else(PoisonError::into_inner);
                                    written.names.insert(name.clone());
                                    written.acknowledged_at.push(Instant::now());
                                    break;
                                }
                                Err(_) => {
                                    asked += 1;
                                    tokio::time::sleep(PAUSE).await;
                                }
                            }
                        }
                        if end.load(Ordering::Relaxed) {
                            return;
                        }
                    }
                });
            })
        };
        let clients = (0..clients).map(start).collect();
        Self { end, written, clients }
    }

    /// How many writes were acknowledged so far.
    #[must_use]
    pub fn count(&self) -> usize {
        self.written.lock().unwrap_or_else(PoisonError::into_inner).names.len()
    }

    /// When the last of them was.
    #[must_use]
    pub fn last_acknowledged(&self) -> Option<Instant> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner).acknowledged_at.last().copied()
    }

    /// Ends: the names that were acknowledged, and the longest time in which none was.
    ///
    /// # Panics
    ///
    /// When a client has panicked.
    #[must_use]
    pub fn stop(mut self) -> (BTreeSet<String>, Duration) {
        self.end.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            client.join().expect("the client did not panic");
        }
        let mut written = std::mem::take(&mut *self.written.lock().unwrap_or_else(PoisonError::into_inner));
        written.acknowledged_at.sort();
        let gaps = written.acknowledged_at.windows(2).map(|pair| pair[1] - pair[0]);
        (written.names, gaps.max().unwrap_or_default())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}
