//! The care of a cluster's state: backup and restore, what becomes of it when a majority is lost, of a version before, and of
//! damaged files; the authority's change, and locked managers.

use std::{fs, path::Path, process::Stdio, time::Duration};

use rustix::process::Signal;
use serde_json::Value;
use warren_tests::{
    WELL_BEHAVED, World,
    cluster::{self, Manager, all_vote, leader},
    image_name, run, until, until_within,
};

fn create(manager: &Manager, name: &str, replicas: u32, options: &[&str]) {
    let replicas = replicas.to_string();
    let arguments = ["service", "create", name, "--image", image_name(), "--replicas", &replicas];
    let _ = manager.warren(&[&arguments[..], options, &["--", "sh", "-c", WELL_BEHAVED]].concat()).succeeded();
}

fn names(manager: &Manager) -> Vec<String> {
    let listed = manager.warren(&["service", "ls", "--format", "json"]).succeeded();
    let listed: Vec<Value> = serde_json::from_str(&listed).expect("a list");
    listed.iter().map(|service| service["spec"]["name"].as_str().expect("a name").to_owned()).collect()
}

fn join(world: &World, token: &str, manager: &str) {
    let mut join = World::binary("warren");
    join.args(["cluster", "join", "--token", token, manager]).arg("--data-dir").arg(world.directory.path());
    let _ = World::run(&mut join).succeeded();
}

/// A cluster of one manager.
fn one(world: &World, name: &str) -> (Manager, String) {
    let mut managers = [Manager::new(world, name)];
    let worker_token = cluster::found(&mut managers);
    let [manager] = managers;
    (manager, worker_token)
}

#[test]
fn a_cluster_begins_again_from_its_backup() {
    let mut world = World::with_containerd("backup");
    let (mut manager, worker_token) = one(&world, "m1");
    join(&world, &worker_token, &manager.address());
    world.start_agent(&[]);
    let secret = world.path("secret");
    fs::write(&secret, "what only containers read").expect("writable");
    let _ = manager.warren(&["secret", "create", "key", &secret.display().to_string()]).succeeded();
    create(&manager, "web", 2, &["--secret", "key", "--wait"]);
    let before = manager.running("web");
    assert_eq!(before.len(), 2);
    let _ = manager.warren(&["operator", "create", "ada"]).succeeded();
    let file = world.path("backup");
    let made = manager.warren(&["cluster", "backup", &file.display().to_string()]).succeeded();
    assert!(made.contains("bytes of cluster"), "{made}");
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(fs::metadata(&file).expect("a file").permissions().mode() & 0o777, 0o600);
    // What comes after it is not in it.
    create(&manager, "late", 1, &["--wait"]);
    assert_eq!(world.tasks().len(), 3);
    let address = manager.address();
    manager.kill();
    fs::remove_dir_all(manager.directory.join("manager")).expect("there");

    // Not a bit may be another, and none missing.
    let bytes = fs::read(&file).expect("readable");
    let wrong = world.path("wrong");
    for (content, why) in [
        (bytes[..bytes.len() - 1].to_vec(), "its checksum does not match"),
        ([&bytes[..100], b"x", &bytes[101..]].concat(), "its checksum does not match"),
        (b"nonsense".to_vec(), "it is cut off"),
    ] {
        fs::write(&wrong, content).expect("writable");
        let refused = manager.cluster(&["restore", &wrong.display().to_string()]).failed(8);
        assert!(refused.contains(why) && refused.contains(&wrong.display().to_string()), "{refused}");
    }
    let restored = manager.cluster(&["restore", &file.display().to_string(), "--advertise-addr", &address]).succeeded();
    assert!(restored.contains("its only manager is 102"), "{restored}");
    assert!(manager.cluster(&["restore", &file.display().to_string()]).failed(5).contains("is a manager's already"));
    manager.start();
    until("it leads", || manager.info().filter(|info| info["leaderId"] == "102"));
    assert_eq!(names(&manager), ["web"]);
    let let_in = ["operator", "cluster token"].map(|what| {
        let listed: Vec<_> = what.split(' ').chain(["ls", "--format", "json"]).collect();
        manager.warren(&listed).succeeded()
    });
    assert_eq!(let_in, ["[]\n", "[]\n"], "who was invited may have been turned out since");
    let events = manager.warren(&["events", "--type", "cluster.restored"]).succeeded();
    assert!(events.contains("with manager 102") && events.contains("by root"), "{events}");
    // The node finds it, keeps what is in the backup and removes what is not.
    until_within(Duration::from_secs(60), "the later one is gone", || (world.tasks().len() == 2).then_some(()));
    until("the others are known as before", || (manager.running("web") == before).then_some(()));
    // Its secrets can be opened: another container gets it.
    let _ = manager.warren(&["service", "scale", "web", "3"]).succeeded();
    until("a third runs", || (manager.running("web").len() == 3).then_some(()));
    let read = manager.warren(&["container", "exec", "web-3", "--", "cat", "/run/secrets/key"]);
    assert_eq!(read.stdout, "what only containers read", "{}", read.stderr);
    // Others join it, under numbers that nobody had.
    let token = manager.warren(&["cluster", "token", "create", "--role", "manager"]).succeeded();
    let mut second = Manager::new(&world, "m2");
    let _ = second.cluster(&["join", "--token", token.trim(), &manager.address()]).succeeded();
    second.start();
    all_vote(&[manager, second]);
}

#[test]
fn a_cluster_goes_on_with_what_one_manager_has() {
    let mut world = World::with_containerd("recover");
    let mut managers: Vec<_> = ["m1", "m2", "m3"].iter().map(|name| Manager::new(&world, name)).collect();
    let worker_token = cluster::found(&mut managers);
    let led = leader(&managers);
    let (left, other) = ((led + 1) % 3, (led + 2) % 3);
    join(&world, &worker_token, &managers[left].address());
    world.start_agent(&[]);
    create(&managers[left], "web", 2, &["--wait"]);
    let before = managers[left].running("web");
    until("the one that is left has it too", || managers[left].has_caught_up().then_some(()));
    let running = managers[left].cluster(&["recover"]).failed(8);
    assert!(running.contains("stop it first"), "{running}");
    for at in [led, other] {
        managers[at].kill();
    }
    assert_eq!(managers[left].warren(&["service", "ls"]).code, 4, "there is no majority");
    managers[left].stop();

    let looked = managers[left].cluster(&["recover"]).succeeded();
    assert!(looked.contains("WARNING") && looked.contains("nothing was changed"), "{looked}");
    assert!(!managers[left].directory.join("manager/raft.recovered").exists());
    let done = managers[left].cluster(&["recover", "--force"]).succeeded();
    assert!(done.contains("is the whole cluster now"), "{done}");
    let again = managers[left].cluster(&["recover", "--force"]).succeeded();
    assert!(again.contains("is the whole cluster already"), "{again}");
    managers[left].start();
    until("it leads alone", || (managers[left].voters() == 1 && managers[left].has_caught_up()).then_some(()));
    assert_eq!(managers[left].running("web"), before);
    until_within(Duration::from_secs(60), "the node is back", || {
        let listed = managers[left].warren(&["node", "ls"]).stdout;
        listed.contains("ready").then_some(())
    });
    let _ = managers[left].warren(&["service", "scale", "web", "3"]).succeeded();
    until("a third runs", || (managers[left].running("web").len() == 3).then_some(()));
    assert!(before.iter().all(|container| managers[left].running("web").contains(container)));
    let events = managers[left].warren(&["events", "--type", "cluster.recovered"]).succeeded();
    assert!(events.contains(&format!("with manager {} alone", managers[left].id())), "{events}");
    // One that was given up is not believed any more.
    managers[other].start();
    until("it is refused", || {
        managers[other].log().contains("this manager was removed from the cluster").then_some(())
    });
    assert_eq!(managers[left].voters(), 1);
    // What the lost ones may have revoked lets nobody in, and a new one takes a number that nobody can have had.
    let listed = managers[left].warren(&["cluster", "token", "ls"]).succeeded();
    assert_eq!(listed.lines().count(), 1, "{listed}");
    let token = managers[left].warren(&["cluster", "token", "create", "--role", "manager"]).succeeded();
    let mut fourth = Manager::new(&world, "m4");
    let _ = fourth.cluster(&["join", "--token", token.trim(), &managers[left].address()]).succeeded();
    fourth.start();
    until("two vote", || (fourth.voters() == 2).then_some(()));
    assert_eq!(fourth.id(), "104");
}

/// What the versions before left: a snapshot and a log behind it, of a manager that was killed.
const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures");

#[test]
fn what_the_versions_before_wrote_is_read() {
    let world = World::empty("upgrade");
    for schema in [3, 4, 5, 6] {
        let mut manager = Manager::new(&world, &format!("m{schema}"));
        let directory = manager.directory.display().to_string();
        let left = format!("{FIXTURES}/manager-schema-{schema}.tar.gz");
        let _ = run("tar", &["-xzf", &left, "-C", &directory]).succeeded();
        let identity = || fs::read_to_string(manager.directory.join("manager/manager.json")).expect("readable");
        assert!(identity().contains(&format!("\"format\": {}", schema.min(5))), "{}", identity());
        manager.start();
        until("it leads", || manager.info().filter(|info| info["leaderId"] == "1"));
        let mut expected: Vec<_> =
            (1..=16).filter(|number| *number != 12).map(|number| format!("svc-{number}")).collect();
        expected.sort();
        assert_eq!(names(&manager), expected);
        let inspect = |name: &str| -> Value {
            let shown = manager.warren(&["service", "inspect", name, "--format", "json"]).succeeded();
            serde_json::from_str(&shown).expect("JSON")
        };
        assert_eq!(inspect("svc-3")["spec"]["replicated"]["replicas"], "5");
        assert!(manager.warren(&["secret", "ls"]).succeeded().contains("password"));
        assert!(manager.warren(&["volume", "ls"]).succeeded().contains("data"));
        let events = manager.warren(&["events", "--type", "service.deleted"]).succeeded();
        match schema {
            3 => assert!(events.is_empty(), "{events}"),
            _ => {
                assert!(events.contains("svc-12") && events.contains("by root"), "{events}");
                assert_eq!(inspect("svc-15")["spec"]["constraints"], serde_json::json!(["node.labels.zone==eu"]));
                assert_eq!(inspect("svc-15")["spec"]["lostAfter"], "90s");
            }
        }
        // Its containers are made of what they were, whatever the words for it.
        let containers = |manager: &Manager, service: &str| -> Vec<Value> {
            let shown = manager.warren(&["service", "ps", service, "--format", "json"]).succeeded();
            serde_json::from_str(&shown).expect("JSON")
        };
        if schema > 4 {
            until("the schema is raised", || (self::schema(&manager) == Some(7)).then_some(()));
            let images: Vec<_> = containers(&manager, "svc-3").iter().map(|one| one["spec"]["image"].clone()).collect();
            assert_eq!(images, vec![Value::from("demo:3"); 5]);
            until("they are of the newest revision", || {
                let mut all = containers(&manager, "svc-4");
                all.retain(|one| one["desiredState"] == "CONTAINER_STATE_RUNNING");
                let is_newest = |one: &Value| one["revision"] == "21" && one["spec"]["env"]["A"] == "20";
                (all.len() == 2 && all.iter().all(is_newest)).then_some(())
            });
        }
        // It goes on in its own words, and reads both after a restart.
        create(&manager, "new", 0, &["--constraint", "node.labels.a==b"]);
        let _ = manager.warren(&["operator", "create", "ada"]).succeeded();
        manager.kill();
        manager.start();
        until("it leads again", || manager.info().filter(|info| info["leaderId"] == "1"));
        if schema > 4 {
            assert_eq!(containers(&manager, "svc-3").len(), 5);
        }
        assert!(names(&manager).contains(&"new".to_owned()));
        assert!(manager.warren(&["operator", "ls"]).succeeded().contains("ada"));
        let identity = fs::read_to_string(manager.directory.join("manager/manager.json")).expect("readable");
        assert!(identity.contains("\"format\": 5"), "an older version must not use it any more: {identity}");
    }
}

fn schema(manager: &Manager) -> Option<u64> {
    manager.info()?["schema"].as_u64()
}

/// Managers that are held to a schema read and write what the version of that schema did.
#[test]
fn a_cluster_is_upgraded_one_manager_at_a_time() {
    let mut world = World::with_containerd("rolling");
    let old = ["--max-schema", "5"];
    let mut managers: Vec<_> = ["m1", "m2", "m3"].iter().map(|name| Manager::new(&world, name).with(&old)).collect();
    let worker_token = cluster::found(&mut managers);
    join(&world, &worker_token, &managers[0].address());
    world.start_agent(&[]);
    create(&managers[0], "web", 2, &["--wait"]);
    let before = managers[0].running("web");
    assert!(managers.iter().all(|manager| schema(manager) == Some(5)));

    // The leader first: it hands over, and comes back as a follower of the version before.
    let new = leader(&managers);
    managers[new].stop();
    managers[new].instead(&[]);
    managers[new].start();
    cluster::follows(&managers, new);
    create(&managers[new], "one", 0, &[]);
    // It leads, and the others read what it writes: of the two that are left, it alone has the last entry.
    let leading = leader(&managers);
    assert_ne!(leading, new);
    let behind = 3 - new - leading;
    let signal = |managers: &[Manager], signal| managers[behind].process.as_ref().expect("it runs").signal(signal);
    signal(&managers, Signal::STOP);
    create(&managers[leading], "ahead", 0, &[]);
    let written = managers[leading].applied().expect("it answers");
    until("the new one has it", || (managers[new].applied()? >= written).then_some(()));
    managers[leading].kill();
    signal(&managers, Signal::CONT);
    assert_eq!(leader(&managers), new);
    managers[leading].start();
    cluster::follows(&managers, leading);
    create(&managers[(new + 1) % 3], "two", 0, &[]);
    assert!(managers.iter().all(|manager| schema(manager) == Some(5)));
    // It crashes half-way: one of the version before goes on from what it wrote.
    managers[new].kill();
    let leading = leader(&managers);
    create(&managers[leading], "three", 0, &[]);
    assert_eq!(names(&managers[leading]), ["ahead", "one", "three", "two", "web"]);
    managers[new].start();
    cluster::follows(&managers, new);

    // The others, the leader last. While one is not there, nobody knows what it reads.
    let last = leader(&managers);
    assert_ne!(last, new);
    let second = 3 - new - last;
    managers[second].stop();
    managers[second].instead(&[]);
    managers[second].start();
    cluster::follows(&managers, second);
    managers[last].stop();
    create(&managers[second], "four", 0, &[]);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(schema(&managers[new]), Some(5));
    managers[last].instead(&[]);
    managers[last].start();
    for manager in &managers {
        until("the schema is raised", || (schema(manager) == Some(7)).then_some(()));
        until("all is there", || (names(manager) == ["ahead", "four", "one", "three", "two", "web"]).then_some(()));
    }
    assert_eq!(managers[0].running("web"), before, "its containers have run on");
    let events = managers[0].warren(&["events", "--type", "cluster.schema_raised"]).succeeded();
    assert_eq!(events.lines().filter(|line| line.contains("cluster.schema_raised")).count(), 1, "{events}");

    // There is no way back.
    let back = (leader(&managers) + 1) % 3;
    managers[back].stop();
    managers[back].instead(&old);
    // Nor does one come in that is held back.
    let other = (back + 1) % 3;
    let token = managers[other].warren(&["cluster", "token", "create", "--role", "manager"]).succeeded();
    let mut late = Manager::new(&world, "m4").with(&old);
    let _ = late.cluster(&["join", "--token", token.trim(), &managers[other].address()]).succeeded();
    late.start();
    until("it is told why", || late.log().contains("reads the state up to schema 5").then_some(()));
    assert_eq!(managers[other].info().expect("it answers")["managers"].as_array().map(Vec::len), Some(3));
    late.stop();
    let refused = World::run(managers[back].command().stdin(Stdio::null()).env("RUST_BACKTRACE", "0"));
    assert_eq!(refused.code, 8, "{}{}", refused.stdout, refused.stderr);
    let why =
        "is unusable: the log holds a transaction of schema 7, this manager reads 3 to 5: another version wrote it";
    assert!(refused.stderr.contains(why), "{}", refused.stderr);
    let events = managers[new].warren(&["events", "--type", "manager"]).succeeded();
    assert!(["1 (", "2 (", "3 ("].iter().all(|number| events.contains(number)), "{events}");
    managers[back].instead(&[]);
    managers[back].start();
    cluster::follows(&managers, back);
}

/// The files below a directory, with their sizes.
fn files(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(directory).expect("readable").flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[test]
fn a_damaged_file_is_named() {
    let world = World::empty("damaged");
    let (mut manager, _) = one(&world, "m1");
    manager.kill();
    let mut manager = manager.with(&["--snapshot-after", "20"]);
    manager.start();
    until("it leads again", || manager.info().filter(|info| info["leaderId"] == "1"));
    for number in 0..60 {
        create(&manager, &format!("svc-{number}"), 0, &[]);
    }
    let data = manager.directory.join("manager");
    until("there is a snapshot", || data.join("raft/snapshot/current.snapshot").exists().then_some(()));
    manager.stop();
    let kept = world.path("kept");
    let _ = run("cp", &["-a", &data.display().to_string(), &kept.display().to_string()]).succeeded();
    let mut tried = 0;
    for file in files(&kept) {
        let whole = fs::read(&file).expect("readable");
        let relative = file.strip_prefix(&kept).expect("below").to_owned();
        if whole.is_empty() {
            continue;
        }
        // Another byte in its middle, and its end missing. A log's end may be missing: it was never acknowledged.
        let mut other = whole.clone();
        other[whole.len() / 2] ^= 0x55;
        let mut damages = vec![other];
        if !relative.starts_with("raft/log") {
            damages.push(whole[..whole.len() / 2].to_vec());
        }
        for damaged in damages {
            fs::remove_dir_all(&data).expect("there");
            let _ = run("cp", &["-a", &kept.display().to_string(), &data.display().to_string()]).succeeded();
            fs::write(data.join(&relative), &damaged).expect("writable");
            let mut command = manager.command();
            let output = World::run(command.stdin(Stdio::null()).env("RUST_BACKTRACE", "0"));
            let said = format!("{}{}", output.stdout, output.stderr);
            assert_eq!(output.code, 8, "{}: {said}", relative.display());
            let last = output.stderr.trim_end().lines().last().unwrap_or_default().to_owned();
            let part = match relative.components().nth(1).map(|part| part.as_os_str().to_string_lossy().into_owned()) {
                Some(_) if relative.starts_with("raft") => data.join("raft").display().to_string(),
                _ => data.join(&relative).display().to_string(),
            };
            assert!(last.contains(&part), "{} is not named: {said}", relative.display());
            tried += 1;
        }
    }
    assert!(tried >= 8, "only {tried}");
    // What is well-formed all the same: a certificate's file that ends early, and another manager's number.
    for file in ["identity/identity.pem", "manager.json"] {
        fs::remove_dir_all(&data).expect("there");
        let _ = run("cp", &["-a", &kept.display().to_string(), &data.display().to_string()]).succeeded();
        let whole = fs::read_to_string(data.join(file)).expect("readable");
        let changed = match file {
            "manager.json" => whole.replace("\"id\": 1", "\"id\": 2"),
            _ => whole.trim_end().rsplit_once('\n').expect("lines").0.to_owned(),
        };
        assert_ne!(changed, whole);
        fs::write(data.join(file), changed).expect("writable");
        let output = World::run(manager.command().stdin(Stdio::null()).env("RUST_BACKTRACE", "0"));
        assert_eq!(output.code, 8, "{file}: {}{}", output.stdout, output.stderr);
        let last = output.stderr.trim_end().lines().last().unwrap_or_default();
        assert!(last.contains(&data.join(file).display().to_string()), "{file}: {last}");
    }
    // What is missing is not made anew, as if there had never been any.
    for missing in ["raft", "secrets.key", "manager.json", "identity"] {
        fs::remove_dir_all(&data).expect("there");
        let _ = run("cp", &["-a", &kept.display().to_string(), &data.display().to_string()]).succeeded();
        let _ = run("rm", &["-r", &data.join(missing).display().to_string()]).succeeded();
        let output = World::run(manager.command().stdin(Stdio::null()).env("RUST_BACKTRACE", "0"));
        assert_eq!(output.code, 8, "{missing}: {}{}", output.stdout, output.stderr);
        let last = output.stderr.trim_end().lines().last().unwrap_or_default();
        assert!(last.contains(&data.display().to_string()), "{missing}: {last}");
    }
}

#[test]
fn the_authority_is_replaced_while_everything_goes_on() {
    let mut world = World::with_containerd("authority");
    let mut managers: Vec<_> = ["m1", "m2", "m3"].iter().map(|name| Manager::new(&world, name)).collect();
    let worker_token = cluster::found(&mut managers);
    join(&world, &worker_token, &managers[0].address());
    world.start_agent(&[]);
    create(&managers[0], "web", 2, &["--wait"]);
    let before = managers[0].running("web");
    let identities = |managers: &[Manager]| {
        let own = managers.iter().map(|manager| manager.directory.join("manager/identity/identity.pem"));
        let all = own.chain([world.path("agent/identity/identity.pem")]);
        all.map(|path| fs::read_to_string(path).expect("an identity")).collect::<Vec<_>>()
    };
    // The certificates behind one's own are the authorities.
    let authorities = |identity: &str| identity.matches("BEGIN CERTIFICATE").count() - 1;
    let old = identities(&managers);
    let operator = |name: &str, arguments: &[&str]| {
        World::run(World::binary("warren").arg("--identity").arg(world.path(name)).args(arguments))
    };
    for name in ["ada", "bob"] {
        let printed = managers[1].warren(&["operator", "create", name]).succeeded();
        let _ = operator(name, &printed.split_whitespace().skip(1).collect::<Vec<_>>()).succeeded();
        let _ = operator(name, &["node", "ls"]).succeeded();
    }
    let _ = managers[1].warren(&["cluster", "ca", "rotate"]).succeeded();
    let again = managers[1].warren(&["cluster", "ca", "rotate"]).failed(1);
    assert!(again.contains("is being changed already"), "{again}");
    // It waits for whoever has logged in, until they use the cluster or are removed.
    let waits_for = || managers[0].info().map(|info| info["rotation"]["waitsFor"].clone());
    let both = serde_json::json!(["operator ada", "operator bob"]);
    let orders = [both.clone(), serde_json::json!(["operator bob", "operator ada"])];
    until("it waits for operators alone", || waits_for().filter(|waits| orders.contains(waits)));
    // As if they had asked a while ago.
    let _ = run("touch", &["-d", "2 minutes ago", &world.path("ada/managers.json").display().to_string()]).succeeded();
    until("it waits for one of them", || {
        let _ = operator("ada", &["node", "ls"]).succeeded();
        waits_for().filter(|waits| *waits == serde_json::json!(["operator bob"]))
    });
    let _ = managers[2].warren(&["operator", "rm", "bob"]).succeeded();
    until_within(Duration::from_secs(60), "every member has followed", || {
        let _ = operator("ada", &["node", "ls"]).succeeded();
        managers[0].info()?["rotation"].is_null().then_some(())
    });
    until_within(Duration::from_secs(60), "nobody believes the old one", || {
        let now = identities(&managers);
        let done = now.iter().zip(&old).all(|(new, old)| {
            let last = |identity: &str| identity.rsplit("-----BEGIN CERTIFICATE-----").next().map(str::to_owned);
            authorities(new) == 1 && last(new) != last(old)
        });
        done.then_some(())
    });
    // Everybody still reaches everybody, also anew.
    let _ = managers[2].warren(&["service", "scale", "web", "3"]).succeeded();
    until("a third runs", || (managers[2].running("web").len() == 3).then_some(()));
    assert!(before.iter().all(|container| managers[2].running("web").contains(container)));
    for manager in &mut managers {
        manager.kill();
        manager.start();
    }
    until("they answer again", || (managers[0].running("web").len() == 3).then_some(()));
    until_within(Duration::from_secs(60), "the node is in session", || {
        managers[0].warren(&["node", "ls"]).stdout.contains("ready").then_some(())
    });
    let _ = operator("ada", &["node", "ls"]).succeeded();
    // What was signed by the old one lets nobody in.
    assert!(
        operator("bob", &["node", "ls"]).failed(6).contains("if the cluster's authority was replaced, log in again")
    );
    let refused = Manager::new(&world, "m4").cluster(&["join", "--token", &worker_token, &managers[0].address()]);
    assert!(refused.stderr.contains("not of the cluster that the token is for"), "{}", refused.stderr);
    let token = managers[0].warren(&["cluster", "token", "create", "--role", "manager"]).succeeded();
    let mut fourth = Manager::new(&world, "m5");
    let _ = fourth.cluster(&["join", "--token", token.trim(), &managers[0].address()]).succeeded();
    fourth.start();
    until("four vote", || (fourth.voters() == 4).then_some(()));
}

#[test]
fn a_locked_manager_waits_for_its_key() {
    let world = World::empty("locked");
    let (mut manager, _) = one(&world, "m1");
    let key_file = manager.directory.join("manager/secrets.key");
    let open = fs::read_to_string(&key_file).expect("a key");
    let printed = manager.warren(&["cluster", "autolock", "on"]).succeeded();
    let key = printed.split_whitespace().find(|word| word.starts_with("WRNKEY-1-")).expect("a key").to_owned();
    until("its key is locked", || (fs::read_to_string(&key_file).expect("a key") != open).then_some(()));
    assert_eq!(manager.warren(&["cluster", "unlock-key"]).succeeded().trim(), key);
    manager.kill();

    manager.start();
    let refused = until("it waits", || {
        let asked = manager.warren(&["service", "ls"]);
        asked.stderr.contains("is locked").then_some(asked)
    });
    assert!(refused.failed(4).contains("`warren cluster unlock`"));
    let unlock = |key: &str| {
        let mut command = manager.warren_command();
        World::run(command.args(["cluster", "unlock"]).env("WARREN_UNLOCK_KEY", key))
    };
    assert!(unlock("WRNKEY-1-wrong").failed(6).contains("does not fit"));
    let _ = unlock(&key).succeeded();
    until("it leads", || manager.info().filter(|info| info["leaderId"] == "1"));
    assert!(unlock(&key).failed(1).contains("not locked"));
    // Another key: the old one is of no use.
    let rotated = manager.warren(&["cluster", "unlock-key", "--rotate"]).succeeded().trim().to_owned();
    assert_ne!(rotated, key);
    // One that joins a locked cluster is locked too, once it knows.
    let token = manager.warren(&["cluster", "token", "create", "--role", "manager"]).succeeded();
    let mut second = Manager::new(&world, "m2");
    let _ = second.cluster(&["join", "--token", token.trim(), &manager.address()]).succeeded();
    second.start();
    let key_of_second = second.directory.join("manager/secrets.key");
    until("it is locked", || fs::read_to_string(&key_of_second).ok()?.contains("locked").then_some(()));
    // A backup of it is of no use without the key either.
    let file = world.path("backup").display().to_string();
    let _ = manager.warren(&["cluster", "backup", &file]).succeeded();
    let elsewhere = Manager::new(&world, "elsewhere");
    assert!(elsewhere.cluster(&["restore", &file]).failed(6).contains("no unlock key was given"));
    let _ = elsewhere.cluster(&["restore", &file, "--unlock-key", &rotated]).succeeded();

    manager.kill();
    let mut command = manager.command();
    command.env("WARREN_UNLOCK_KEY", &key);
    assert!(World::run(&mut command).failed(8).contains("does not fit"));
    let mut manager = manager.with(&["--unlock-key", &rotated]);
    manager.start();
    until("both vote", || (manager.voters() == 2).then_some(()));
    let _ = manager.warren(&["cluster", "autolock", "off"]).succeeded();
    until("its key is open", || fs::read_to_string(&key_file).ok()?.contains("open").then_some(()));
    assert!(manager.warren(&["cluster", "unlock-key"]).failed(1).contains("not locked"));
}

#[test]
fn a_manager_loses_its_vote_and_gets_it_back() {
    let world = World::empty("voters");
    let mut managers: Vec<_> = ["m1", "m2", "m3"].iter().map(|name| Manager::new(&world, name)).collect();
    let _ = cluster::found(&mut managers);
    let led = leader(&managers);
    let other = (led + 1) % 3;
    let id = managers[led].id();
    // The one that leads hands over first.
    let _ = managers[other].warren(&["node", "demote", &id]).succeeded();
    until("two vote", || (managers[other].voters() == 2).then_some(()));
    assert_ne!(leader(&managers), led);
    create(&managers[led], "web", 0, &[]);
    until("it follows all the same", || managers[led].has_caught_up().then_some(()));
    // It stays so when it starts again.
    managers[led].kill();
    managers[led].start();
    until("it follows again", || managers[led].has_caught_up().then_some(()));
    create(&managers[led], "more", 0, &[]);
    assert_eq!(managers[led].voters(), 2);
    let _ = managers[led].warren(&["node", "promote", &id]).succeeded();
    all_vote(&managers);
    assert!(managers[other].warren(&["node", "demote", "9"]).failed(3).contains("there is no manager"));
    let several = managers[other].warren(&["node", "demote", &hostname()]).failed(2);
    assert!(several.contains("name one by its number"), "{several}");
    let events = managers[other].warren(&["events", "--type", "manager"]).succeeded();
    assert!(events.contains("manager.demoted") && events.contains("manager.promoted"), "{events}");
}

fn hostname() -> String {
    run("uname", &["-n"]).succeeded().trim().to_owned()
}
