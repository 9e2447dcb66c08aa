//! A team's application, from Debian's packages: nginx, an API, Redis and PostgreSQL on two nodes, operated under load.
//!
//! What is asked is that it comes back from everything that is done to it and keeps what it has acknowledged. How many requests each
//! operation loses is written to stderr: a figure, not a condition.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use warren_tests::{
    Outside, Process, Registry, RegistryOptions, World, both_ready, find, free_port, run, start_second, until,
    until_within,
};

/// Clients that ask at once.
const CLIENTS: usize = 4;
/// How long each waits between requests.
const PAUSE: Duration = Duration::from_millis(10);

/// A layer of programs with the libraries that they are linked with, and other files.
struct Layer(tar::Builder<Vec<u8>>, BTreeSet<PathBuf>);

impl Layer {
    fn new() -> Self {
        let mut archive = tar::Builder::new(Vec::new());
        // containerd takes no holes.
        archive.sparse(false);
        Self(archive, BTreeSet::new())
    }

    /// A program, under another path than its own perhaps.
    fn program(&mut self, from: &Path, to: &str) {
        let linked = Command::new("ldd").arg(from).output().expect("ldd");
        for line in String::from_utf8_lossy(&linked.stdout).lines() {
            let words = line.split_whitespace();
            let library = words.map(PathBuf::from).find(|word| word.is_absolute());
            if let Some(library) = library.filter(|library| self.1.insert(library.clone())) {
                self.0
                    .append_path_with_name(library.canonicalize().expect("a library"), relative(&library))
                    .expect("appended");
            }
        }
        self.0
            .append_path_with_name(from.canonicalize().expect("a program"), relative(Path::new(to)))
            .expect("appended");
    }

    fn directory(&mut self, path: &str, owner: u64, mode: u32) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(mode);
        header.set_uid(owner);
        header.set_gid(owner);
        header.set_size(0);
        self.0.append_data(&mut header, relative(Path::new(path)), &[][..]).expect("appended");
    }

    fn tree(&mut self, from: &Path, to: &str) {
        self.0.append_dir_all(relative(Path::new(to)), from).expect("appended");
    }

    fn file(&mut self, path: &str, mode: u32, content: &str) {
        let mut header = tar::Header::new_gnu();
        header.set_mode(mode);
        header.set_size(content.len() as u64);
        self.0.append_data(&mut header, relative(Path::new(path)), content.as_bytes()).expect("appended");
    }

    fn finished(self) -> Vec<u8> {
        self.0.into_inner().expect("written")
    }
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// The newest PostgreSQL of this machine: its directory of programs, and what it shares.
fn postgres() -> (PathBuf, PathBuf) {
    let all = fs::read_dir("/usr/lib/postgresql").expect("postgresql is missing: run `cargo xtask setup --tests`");
    let newest = all.flatten().map(|entry| entry.file_name()).max().expect("a version");
    (Path::new("/usr/lib/postgresql").join(&newest), Path::new("/usr/share/postgresql").join(newest))
}

/// As its image's maker would have it: the first start makes the database.
const DATABASE: &str = r#"#!/bin/sh
set -e
if [ ! -s /data/pg/PG_VERSION ]; then
  rm -rf /data/new
  initdb -D /data/new -U app --pwfile=/run/secrets/db-password --auth=scram-sha-256 --locale=C --encoding=UTF8 >&2
  echo 'host all all all scram-sha-256' >> /data/new/pg_hba.conf
  mv /data/new /data/pg
fi
exec postgres -D /data/pg -c listen_addresses='*' -c unix_socket_directories=/tmp
"#;

/// Puts the application's images there.
fn push_images(world: &World, registry: &Registry) {
    let (lib, share) = postgres();
    let push = |name: &str, tag: &str, layer: Layer, set: &[(&str, Value)]| {
        let _ = registry.push_with(&world.path("demo.tar"), name, tag, &[layer.finished()], |config| {
            config["config"]["Env"] = json!(["PATH=/usr/lib/postgresql/bin:/usr/bin:/usr/sbin:/bin"]);
            config["config"]["User"] = json!("demo");
            for (key, value) in set {
                config["config"][*key] = value.clone();
            }
        });
    };

    let mut layer = Layer::new();
    layer.program(&find("nginx"), "/usr/sbin/nginx");
    for directory in ["/var/log/nginx", "/var/lib/nginx", "/run"] {
        layer.directory(directory, 0, 0o755);
    }
    let command = json!(["/usr/sbin/nginx", "-g", "daemon off;"]);
    push("nginx", "1", layer, &[("Cmd", command), ("User", json!("")), ("StopSignal", json!("SIGQUIT"))]);

    let mut layer = Layer::new();
    layer.program(&find("redis-server"), "/usr/bin/redis-server");
    layer.directory("/data", 1000, 0o700);
    let command = json!([
        "redis-server",
        "--appendonly",
        "yes",
        "--dir",
        "/data",
        "--protected-mode",
        "no",
        "--bind",
        "*",
        "-::*"
    ]);
    push("redis", "7", layer, &[("Cmd", command)]);

    let mut layer = Layer::new();
    // PostgreSQL finds what it shares by where it is itself.
    let at = lib.display().to_string();
    for program in ["postgres", "initdb", "pg_isready"] {
        layer.program(&lib.join("bin").join(program), &format!("{at}/bin/{program}"));
    }
    layer.tree(&lib.join("lib"), &format!("{at}/lib"));
    layer.tree(&share, &share.display().to_string());
    layer.directory("/data", 1000, 0o700);
    layer.file("/usr/bin/start-database", 0o755, DATABASE);
    let path = json!([format!("PATH={at}/bin:/usr/bin:/bin")]);
    let command = json!(["/usr/bin/start-database"]);
    push("postgres", "15", layer, &[("Cmd", command), ("Env", path), ("StopSignal", json!("SIGINT"))]);

    let mut layer = Layer::new();
    let api = World::binary("warren-application");
    layer.program(Path::new(api.get_program()), "/usr/bin/api");
    push("api", "1", layer, &[("Cmd", json!(["/usr/bin/api"]))]);
}

/// How a request went.
#[derive(Clone, Debug)]
struct Asked {
    at: Instant,
    answer: Result<String, String>,
}

/// The answer's body.
fn ask(port: u16, path: &str) -> Result<String, String> {
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let failed = |what: &str, error: std::io::Error| format!("{what}: {error}");
    let mut stream =
        TcpStream::connect_timeout(&address, Duration::from_secs(3)).map_err(|e| failed("connecting", e))?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("it is a socket");
    let request = format!("GET {path} HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).map_err(|e| failed("asking", e))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|e| failed("reading", e))?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("no whole answer")?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status == "200" { Ok(body.trim_end().to_owned()) } else { Err(format!("status {status}")) }
}

/// Clients that count, without end.
struct Load {
    end: Arc<AtomicBool>,
    asked: Arc<Mutex<Vec<Asked>>>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    fn start(port: u16) -> Self {
        let (end, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let client = |_| {
            let (end, asked) = (Arc::clone(&end), Arc::clone(&asked));
            std::thread::spawn(move || {
                while !end.load(Ordering::Relaxed) {
                    let at = Instant::now();
                    let answer = ask(port, "/hit");
                    asked.lock().unwrap_or_else(PoisonError::into_inner).push(Asked { at, answer });
                    std::thread::sleep(PAUSE);
                }
            })
        };
        let clients = (0..CLIENTS).map(client).collect();
        Self { end, asked, clients }
    }

    fn since(&self, at: Instant) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.iter().filter(|one| one.at >= at).cloned().collect()
    }

    /// Does something, waits until fifty requests in a row are answered, and writes how many were lost.
    fn during(&self, what: &str, operation: impl FnOnce()) {
        const IN_A_ROW: usize = 50;
        let began = Instant::now();
        operation();
        let done = Instant::now();
        until_within(Duration::from_secs(60), &format!("it answers after: {what}"), || {
            let asked = self.since(done);
            let row = asked.iter().rev().take_while(|one| one.answer.is_ok()).count();
            (row >= IN_A_ROW).then_some(())
        });
        let asked = self.since(began);
        let lost: Vec<_> = asked.iter().filter_map(|one| one.answer.as_ref().err()).collect();
        let mut kinds: Vec<_> = lost.iter().map(|why| why.as_str()).collect::<BTreeSet<_>>().into_iter().collect();
        kinds.truncate(4);
        // Past the test's capture: these are figures for people.
        let mut stderr = std::io::stderr();
        let (seconds, all) = (began.elapsed().as_secs_f64(), asked.len());
        let _ = writeln!(stderr, "application: {what}: lost {} of {all} in {seconds:.1} s {kinds:?}", lost.len());
    }

    /// Ends, and has the numbers that were acknowledged.
    fn stop(mut self) -> Vec<i64> {
        self.end.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            client.join().expect("the client did not panic");
        }
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.iter().filter_map(|one| number(one.answer.as_ref().ok()?)).collect()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

/// How many files and directories are in a directory; none where there is none.
fn entries(path: &Path) -> usize {
    fs::read_dir(path).into_iter().flatten().flatten().count()
}

/// Whether a path is a cgroup of this name, and none is in it.
fn is_empty_group(path: &str, name: &str) -> bool {
    let mut below = fs::read_dir(path).into_iter().flatten().flatten();
    path.ends_with(&format!("/{name}")) && !below.any(|entry| entry.path().is_dir())
}

fn number(answer: &str) -> Option<i64> {
    answer.split(' ').find_map(|word| word.strip_prefix("n=")?.parse().ok())
}

/// Whether `count` answers in a row have this in them: nobody answers otherwise any more.
fn all_say(port: u16, count: usize, what: &str) -> bool {
    (0..count).all(|_| ask(port, "/hit").is_ok_and(|answer| answer.contains(what)))
}

#[test]
fn an_application_is_operated_under_load() {
    let world = World::empty("application");
    let other = Outside::new(&world);
    let mut world = world.and_containerd();
    let registry =
        Registry::start(&world, "registry", RegistryOptions { address: Some(Outside::HERE), ..Default::default() });
    push_images(&world, &registry);
    let plain = ["--registry-plain", registry.host.as_str()];
    let start_manager = |world: &mut World| {
        let mut command = world.manager_command();
        command.args(plain);
        world.start_manager_as(command);
    };
    let first = [&["--advertise-addr", Outside::HERE], &plain[..]].concat();
    start_manager(&mut world);
    world.start_agent(&first);
    let second: Process = start_second(&world, &other, &plain);
    world.wait_ready();
    both_ready(&world);

    let port = free_port();
    let manifest = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/application.yaml")).expect("readable");
    let manifest = manifest.replace("REGISTRY", &registry.host).replace("PORT", &port.to_string());
    let (lib, _) = postgres();
    let manifest = manifest.replace("/usr/lib/postgresql/bin", &format!("{}/bin", lib.display()));
    let file = world.path("application.yaml");
    let apply = |world: &World, manifest: &str| {
        fs::write(&file, manifest).expect("writable");
        let file = file.display().to_string();
        let _ = world.warren(&["apply", "-f", &file, "--wait", "--timeout", "180"]).succeeded();
    };
    // Everything at once, in an order that suits none of them: what is not there yet is waited for.
    apply(&world, &manifest);
    let answer = ask(port, "/hit").expect("it is ready");
    assert!(answer.starts_with("hello n=1 version=1 key=first-key by="), "{answer}");

    let load = Load::start(port);
    let warren = |world: &World, arguments: &[&str]| world.warren(arguments).succeeded();
    load.during("nothing", || std::thread::sleep(Duration::from_secs(2)));
    load.during("scaling the API from 2 to 4", || {
        let _ = warren(&world, &["service", "scale", "api", "4", "--wait"]);
    });
    load.during("scaling it back to 2", || {
        let _ = warren(&world, &["service", "scale", "api", "2", "--wait"]);
    });
    load.during("an update of the API", || apply(&world, &manifest.replace("VERSION: 1", "VERSION: 2")));
    until("only the new version answers", || all_say(port, 20, " version=2 ").then_some(()));
    load.during("another secret for the API", || {
        let key = world.path("key");
        fs::write(&key, "second-key").expect("writable");
        let _ = warren(&world, &["secret", "update", "api-key", &key.display().to_string()]);
        let _ = warren(&world, &["service", "wait", "api", "--timeout", "120"]);
    });
    until("only the new key is used", || all_say(port, 20, " key=second-key ").then_some(()));
    load.during("a restart of nginx", || {
        let _ = warren(&world, &["service", "restart", "front", "--wait"]);
    });
    load.during("draining a node", || {
        let _ = warren(&world, &["node", "drain", "node-2", "--wait"]);
    });
    load.during("having it back, and scaling to 4", || {
        let _ = warren(&world, &["node", "uncordon", "node-2"]);
        let _ = warren(&world, &["service", "scale", "api", "4", "--wait"]);
    });
    load.during("an API container killed", || {
        let _ = warren(&world, &["container", "kill", "api-1"]);
        let _ = warren(&world, &["service", "wait", "api", "--timeout", "60"]);
    });
    load.during("the database killed", || {
        let _ = warren(&world, &["container", "kill", "db-1"]);
        let _ = warren(&world, &["service", "wait", "db", "--timeout", "120"]);
    });
    load.during("the manager killed and started", || {
        world.manager.take().expect("it runs").kill();
        std::thread::sleep(Duration::from_secs(1));
        start_manager(&mut world);
        both_ready(&world);
    });
    load.during("the agent killed and started", || {
        world.agent.take().expect("it runs").kill();
        std::thread::sleep(Duration::from_secs(1));
        world.start_agent(&first);
        world.wait_ready();
    });

    // What was acknowledged is kept, each once.
    let acknowledged = load.stop();
    let unique: BTreeSet<_> = acknowledged.iter().collect();
    assert_eq!(unique.len(), acknowledged.len(), "a number was given out twice");
    let kept: usize = ask(port, "/count").expect("it answers").parse().expect("a number");
    assert!(kept > acknowledged.len(), "{kept} are kept, {} were acknowledged", acknowledged.len());
    assert!(acknowledged.len() > 1000, "{} requests are no load", acknowledged.len());

    // All of it goes, and leaves nothing.
    let _ = warren(&world, &["service", "rm", "front", "api", "redis", "db", "--wait"]);
    let _ = warren(&world, &["volume", "rm", "db", "redis"]);
    let _ = warren(&world, &["secret", "rm", "db-password", "api-key"]);
    let _ = warren(&world, &["config", "rm", "greeting", "nginx.conf"]);
    until("nothing is left of its containers", || {
        // The other agent's own group, in which its containers were.
        let is_left = |left: &String| !left.strip_prefix("cgroup ").is_some_and(|path| is_empty_group(path, "node-2"));
        world.leftovers().iter().all(|left| !is_left(left)).then_some(())
    });
    until("nothing is left on the other node", || {
        world.ctr_of("node-2", &["containers", "ls", "-q"]).succeeded().trim().is_empty().then_some(())
    });
    until("nor of its volumes", || (entries(&world.path("agent/volumes/data")) == 0).then_some(()));
    assert!(ask(port, "/hit").is_err(), "the port is nobody's");
    let rules = run("nft", &["list", "ruleset"]).succeeded();
    assert!(!rules.contains(&port.to_string()), "{rules}");
    assert_eq!(entries(&world.path("netns")), 0, "a network namespace is left");
    let secrets = fs::read_dir(world.path("secrets")).into_iter().flatten().flatten();
    assert!(secrets.into_iter().all(|entry| entries(&entry.path()) == 0), "files of secrets are left");
    drop(second);
}
