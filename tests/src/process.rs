use std::{
    env,
    fs::File,
    hash::{BuildHasher as _, RandomState},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        LazyLock,
        atomic::{AtomicU16, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

/// A process of this test, killed when the test is done with it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, its output going to a file in `directory`.
    pub fn start(name: &str, command: &mut Command, directory: &Path) -> Self {
        let log = directory.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log).expect("a log file");
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a log file"))
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| panic!("{name} cannot be started: {error}"));
        Self { child, name: name.to_owned(), log }
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            // One that has exited cannot be signalled.
            let _ = kill_process(pid, signal);
        }
    }

    /// Kills it as a crash would.
    pub fn kill(mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }

    /// Asks it to end, and waits until it has.
    pub fn terminate(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        let what = format!("{} ends", self.name);
        until(&what, || self.child.try_wait().expect("a child"))
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }

    /// What it wrote so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// How long a process of a failed test may take to end.
const CLEAN_UP_PATIENCE: Duration = Duration::from_secs(30);

impl Drop for Process {
    fn drop(&mut self) {
        // One that has started others, as `xtask up` does, ends them if it is asked. A test that succeeds has done so itself.
        if std::thread::panicking() {
            self.signal(Signal::TERM);
            let deadline = Instant::now() + CLEAN_UP_PATIENCE;
            while self.is_running() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        if self.is_running() {
            self.signal(Signal::KILL);
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- {} ---\n{}", self.name, self.log());
        }
    }
}

/// Waits until `check` finds something, for 30 seconds at most.
pub fn until<T>(what: &str, check: impl FnMut() -> Option<T>) -> T {
    until_within(Duration::from_secs(30), what, check)
}

/// Waits until `check` finds something.
pub fn until_within<T>(patience: Duration, what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(Instant::now() < deadline, "never within {patience:?}: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Where a program is, also in directories that only root's search path has.
#[must_use]
pub fn find(program: &str) -> PathBuf {
    find_program(program).unwrap_or_else(|| panic!("{program} is missing: run `cargo xtask setup --tests`"))
}

/// The same; `None` where it is nowhere.
#[must_use]
pub fn find_program(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    directories.map(|directory| directory.join(program)).find(|candidate| candidate.is_file())
}

/// The kernel knows no such kind of address.
const EAFNOSUPPORT: i32 = 97;

/// A port that nobody uses now, on all addresses and for UDP as well, and that the kernel gives to no connection meanwhile: a
/// manager that is started again finds it free.
#[must_use]
pub fn free_port() -> u16 {
    /// Below those that connections are given (`ip_local_port_range`).
    const PORTS: std::ops::Range<u16> = 10_000..32_768;
    // Never one twice, and in each test program others.
    static NEXT: LazyLock<AtomicU16> = LazyLock::new(|| AtomicU16::new(RandomState::new().hash_one(()) as u16));
    for _ in 0..100 {
        let port = PORTS.start + NEXT.fetch_add(1, Ordering::Relaxed) % (PORTS.end - PORTS.start);
        let tcp = match TcpListener::bind(("::", port)) {
            // A kernel without IPv6.
            Err(error) if error.raw_os_error() == Some(EAFNOSUPPORT) => TcpListener::bind(("0.0.0.0", port)),
            other => other,
        };
        if tcp.is_ok() && std::net::UdpSocket::bind(("0.0.0.0", port)).is_ok() {
            return port;
        }
    }
    panic!("no port is free for both TCP and UDP");
}
