//! Secrets and configs, from a file to a container's file and nowhere else.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::MetadataExt as _,
    path::Path,
    process::{Command, Stdio},
};

use warren_tests::{Inside, Registry, RegistryOptions, World, image_name, until};

/// A value that is nowhere by chance.
const VALUE: &str = "Xyzzy-fROTz-4711-plugh";
/// Runs until it is told to stop, and counts the signals that tell of news.
const COUNTS: &str =
    "n=0; trap 'n=$((n+1)); echo $n > /tmp/news' HUP; trap 'exit 0' TERM; while :; do sleep 0.05; done";

fn secret(world: &World, kind: &str, verb: &str, name: &str, value: &str) -> warren_tests::Output {
    let mut command = World::binary("warren");
    command.args(["--manager", &world.manager_address(), kind, verb, name, "-"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("warren");
    child.stdin.take().expect("a pipe").write_all(value.as_bytes()).expect("written");
    let output = child.wait_with_output().expect("warren");
    warren_tests::Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Files below a directory that hold the value.
fn holders(directory: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(metadata) = path.symlink_metadata() else { continue };
        if metadata.is_dir() {
            holders(&path, found);
        } else if metadata.is_file() {
            let bytes = fs::read(&path).unwrap_or_default();
            let holds = bytes.windows(VALUE.len()).any(|window| window == VALUE.as_bytes());
            if holds {
                found.push(path.display().to_string());
            }
        }
    }
}

#[test]
fn a_secret_is_a_file_in_memory_and_nowhere_else() {
    let world = World::with_warren("secret");
    let id = secret(&world, "secret", "create", "password", VALUE).succeeded();
    assert_eq!(id.trim().len(), 25);
    let _ = secret(&world, "config", "create", "settings", "colour = red\n").succeeded();
    let options = [
        "--secret",
        "password",
        "--secret",
        "source=password,target=/etc/own,mode=0440,uid=root,gid=users",
        "--secret",
        "source=password,target=numbers,uid=33,gid=33",
        "--config",
        "settings",
        "--user",
        "demo",
    ];
    let inside = Inside::of(&world, "web", &options);
    let root = format!("/proc/{}/root", inside.pid);
    for (path, mode, uid, gid) in [
        ("/run/secrets/password", 0o400, 1000, 1000),
        ("/etc/own", 0o440, 0, 100),
        ("/run/secrets/numbers", 0o400, 33, 33),
    ] {
        let file = format!("{root}{path}");
        assert_eq!(fs::read_to_string(&file).expect("a file"), VALUE, "{path}");
        let metadata = fs::metadata(&file).expect("a file");
        assert_eq!((metadata.mode() & 0o777, metadata.uid(), metadata.gid()), (mode, uid, gid), "{path}");
    }
    assert!(inside.mount("/run/secrets").contains("tmpfs"), "{}", inside.mount("/run/secrets"));
    assert!(inside.mount("/run/secrets").contains(" ro,"), "{}", inside.mount("/run/secrets"));
    // Its user can read what is its own, and by group what is its group's.
    let (_, read) =
        inside.shell(&world, "cat /run/configs/settings /etc/own /run/secrets/password; cat /run/secrets/numbers");
    assert!(read.starts_with(&format!("colour = red\n{VALUE}{VALUE}")) && read.contains("denied"), "{read}");
    let stranger = ["service", "create", "stranger", "--image", image_name(), "--restart", "never"];
    let _ = world.warren(&[&stranger[..], &["--secret", "source=password,uid=nobody"]].concat()).succeeded();
    let refused = world.container_when("stranger", "it failed", |c| c["status"]["state"] == "CONTAINER_STATE_FAILED");
    let why = refused["status"]["message"].as_str().unwrap_or_default();
    assert!(why.contains("secret \"password\"") && why.contains("no user \"nobody\""), "{why}");
    let _ = world.warren(&["service", "rm", "stranger", "--wait"]).succeeded();

    // Every way there is to look.
    for arguments in [
        &["secret", "ls"][..],
        &["secret", "ls", "--format", "json"],
        &["secret", "inspect", "password"],
        &["secret", "inspect", "password", "--format", "json"],
        &["service", "inspect", "web", "--format", "json"],
        &["service", "ps", "web", "--format", "json"],
        &["container", "inspect", &inside.id, "--format", "json"],
    ] {
        let shown = world.warren(arguments);
        assert!(!shown.stdout.contains(VALUE) && !shown.stderr.contains(VALUE), "{arguments:?}");
    }
    // Also not in what base64, which JSON has for bytes, makes of it.
    let shown = world.warren(&["secret", "inspect", "password", "--format", "json"]).succeeded();
    assert!(!shown.contains("\"data\""), "{shown}");
    let config = world.warren(&["config", "inspect", "settings"]).succeeded();
    assert!(config.contains("colour = red"), "a config may be read: {config}");
    let errors = [
        secret(&world, "secret", "create", "password", VALUE).failed(5),
        secret(&world, "secret", "create", "../escape", VALUE).failed(2),
        secret(&world, "secret", "update", "nobody", VALUE).failed(3),
        world.warren(&["secret", "rm", "password"]).failed(1),
    ];
    assert!(errors[3].contains("secret \"password\" is in use by web"), "{}", errors[3]);
    assert!(errors.iter().all(|error| !error.contains(VALUE)), "{errors:?}");
    for port in [world.manager_port, world.agent_port] {
        assert!(!world.get(port, "/metrics").expect("metrics").1.contains(VALUE));
    }
    // On disk: logs, the manager's log and snapshots, the agent's cache, containerd's records. The tmpfs is not a disk.
    let secrets = world.path("secrets").display().to_string();
    let (mut found, mut in_memory) = (Vec::new(), Vec::new());
    holders(world.directory.path(), &mut found);
    in_memory.extend(found.iter().filter(|path| path.starts_with(&secrets)).cloned());
    found.retain(|path| !path.starts_with(&secrets) && !path.contains("/rootfs/"));
    assert_eq!(found, Vec::<String>::new());
    assert_eq!(in_memory.len(), 3, "the search finds what there is: {in_memory:?}");
    for process in fs::read_dir("/proc").expect("a directory").flatten() {
        for file in ["cmdline", "environ"] {
            let bytes = fs::read(process.path().join(file)).unwrap_or_default();
            let text = String::from_utf8_lossy(&bytes);
            assert!(!text.contains(VALUE), "{}: {text}", process.path().display());
        }
    }
    assert_eq!(world.manager_metrics().sum("warren_secrets_total", &[]), 1.0);
    assert_eq!(world.manager_metrics().sum("warren_secret_deliveries_total", &["result=\"delivered\""]), 2.0);

    let _ = world.warren(&["service", "rm", "web", "--wait"]).succeeded();
    until("its files are gone", || fs::read_dir(&secrets).expect("a directory").next().is_none().then_some(()));
    let _ = world.warren(&["secret", "rm", "password"]).succeeded();
    let _ = world.warren(&["config", "rm", "settings"]).succeeded();
}

#[test]
fn another_value_reaches_containers_as_their_services_want() {
    let mut world = World::with_warren("update");
    let _ = secret(&world, "secret", "create", "key", "one").succeeded();
    let create = |name: &str, option: &str| world.create(name, 1, &["--secret", option], COUNTS);
    create("none", "source=key,on-update=none");
    create("signal", "source=key,on-update=signal,signal=HUP");
    create("own", "source=key,target=/etc/key,on-update=signal");
    // What is done unless it is said otherwise.
    create("restart", "key");
    let before = ["none", "signal", "own", "restart"].map(|name| Inside::only(&world, name));
    let read = |container: &Inside, file: &str| {
        fs::read_to_string(format!("/proc/{}/root{file}", container.pid)).unwrap_or_default()
    };
    // With everybody restarted in between: values come from the log, and no container is touched.
    world.agent.take().expect("it runs").kill();
    world.manager.take().expect("it runs").kill();
    world.start_manager();
    world.start_agent(&[]);
    world.wait_ready();
    assert_eq!(secret(&world, "secret", "update", "key", "one").succeeded(), "key 1\n", "no news");
    assert_eq!(secret(&world, "secret", "update", "key", "two").succeeded(), "key 2\n");
    until("the container is told", || (read(&before[1], "/tmp/news") == "1\n").then_some(()));
    assert_eq!(read(&before[1], "/run/secrets/key"), "two");
    until("the other too", || (read(&before[2], "/tmp/news") == "1\n").then_some(()));
    assert_eq!(read(&before[2], "/etc/key"), "two");
    let replaced = until("one is replaced", || {
        Inside::all(&world, "restart").into_iter().find(|container| container.id != before[3].id)
    });
    assert_eq!(read(&replaced, "/run/secrets/key"), "two");
    assert_eq!(
        (Inside::only(&world, "none").id.as_str(), read(&before[0], "/run/secrets/key")),
        (before[0].id.as_str(), "one".into())
    );
    assert_eq!(read(&before[0], "/tmp/news"), "", "it did not ask");
    // As large as one may be, and one byte more.
    let largest = "x".repeat(500 << 10);
    let _ = secret(&world, "secret", "create", "large", &largest).succeeded();
    let larger = secret(&world, "secret", "create", "larger", &format!("{largest}x")).failed(2);
    assert!(larger.contains("data: is 512001 bytes long, not 1 to 512000"), "{larger}");
    // What the service names must be there when it is created.
    let missing = world.warren(&["service", "create", "x", "--image", image_name(), "--secret", "nobody"]).failed(2);
    assert!(missing.contains("spec.container.secrets: there is no secret \"nobody\""), "{missing}");
    let escape = world.warren(&["service", "create", "x", "--image", "x", "--secret", "../../etc/shadow"]).failed(2);
    assert!(escape.contains("spec.container.secrets[0].source"), "{escape}");
}

#[test]
fn a_registrys_credentials_are_a_secret() {
    let mut world = World::empty("credentials").and_containerd();
    let options = RegistryOptions { user: Some(("ann", VALUE)), ..RegistryOptions::default() };
    let registry = Registry::start(&world, "registry", options);
    world.start_manager();
    world.start_agent(&[]);
    world.wait_ready();
    registry.push(&world.path("demo.tar"), "demo", "v1", |config| config["config"]["Env"] = serde_json::json!(["A=b"]));
    let _ = secret(&world, "secret", "create", "login", &format!("ann:{VALUE}")).succeeded();
    let _ = secret(&world, "secret", "create", "wrong", "ann:nothing").succeeded();
    let image = format!("{}/demo:v1", registry.host);
    let create = |name: &str, secret: &str| {
        world.warren(&[
            "service",
            "create",
            name,
            "--image",
            &image,
            "--registry-secret",
            secret,
            "--wait",
            "--timeout",
            "20",
        ])
    };
    let refused = create("bad", "wrong").failed(2);
    assert!(refused.contains("with these credentials"), "{refused}");
    let _ = create("good", "login").succeeded();
    let mut log = Command::new("cat");
    let logs = log.args([world.path("agent.log"), world.path("manager.log")]).output().expect("cat");
    assert!(!String::from_utf8_lossy(&logs.stdout).contains(VALUE));
}

#[test]
fn a_secret_can_be_a_variable_and_is_nowhere_else() {
    let world = World::with_warren("variable");
    let _ = secret(&world, "secret", "create", "password", VALUE).succeeded();
    let _ = secret(&world, "config", "create", "colour", "dark red\nand blue").succeeded();
    let options =
        ["--secret", "source=password,env=DB_PASSWORD", "--config", "source=colour,env=COLOUR", "--user", "demo"];
    let inside = Inside::of(&world, "web", &[&options[..], &["--env", "PLAIN=1"]].concat());
    let environment = |inside: &Inside| -> Vec<String> {
        let all = until("it is the command", || Some(inside.proc("environ")).filter(|all| all.contains("DB_PASSWORD")));
        all.split('\0').map(str::to_owned).collect()
    };
    let variables = environment(&inside);
    for wanted in [format!("DB_PASSWORD={VALUE}"), "COLOUR=dark red\nand blue".to_owned(), "PLAIN=1".to_owned()] {
        assert!(variables.contains(&wanted), "{variables:?}");
    }
    // What is run in it later has the same; who is not its user, nothing of it.
    let asked = |id: &str, user: &[&str]| {
        let command = ["--", "sh", "-c", "echo \"[$DB_PASSWORD]\""];
        world.warren(&[&["container", "exec"], user, &[id], &command].concat())
    };
    assert_eq!(asked(&inside.id, &[]).succeeded().trim(), format!("[{VALUE}]"));
    let given = asked(&inside.id, &["--env", "DB_PASSWORD=mine"]).succeeded();
    assert_eq!(given.trim(), "[mine]", "what is given by hand counts more");
    let other = asked(&inside.id, &["--user", "65534"]);
    assert_eq!((other.code, other.stdout.trim()), (0, "[]"));
    assert!(other.stderr.contains("left out"), "{}", other.stderr);
    assert_eq!(world.warren(&["container", "exec", &inside.id, "--", "no-such-program"]).code, 127);
    // It is in no spec, here or at the manager, and on no disk.
    for arguments in [
        &["service", "inspect", "web", "--format", "json"][..],
        &["container", "inspect", &inside.id, "--format", "json"],
    ] {
        assert!(!world.warren(arguments).succeeded().contains(VALUE), "{arguments:?}");
    }
    assert!(!world.ctr(&["containers", "info", &inside.id]).stdout.contains(VALUE));
    let mut found = Vec::new();
    holders(world.directory.path(), &mut found);
    let secrets = world.path("secrets").display().to_string();
    assert!(found.iter().any(|path| path.starts_with(&secrets)), "the search finds what there is: {found:?}");
    found.retain(|path| !path.starts_with(&secrets) && !path.contains("/rootfs/"));
    assert_eq!(found, Vec::<String>::new());
    // Another value is another environment: the container is replaced.
    let _ = secret(&world, "secret", "update", "password", "another").succeeded();
    until("it is replaced", || {
        let all = Inside::all(&world, "web");
        let [now] = all.as_slice() else { return None };
        (now.id != inside.id && environment(now).contains(&"DB_PASSWORD=another".to_owned())).then_some(())
    });
    // An init program comes first, and a command that is not there is said as a shell says it.
    let first = Inside::of(&world, "first", &[&options[..], &["--init"]].concat());
    assert!(first.proc("comm").contains("init"), "{}", first.proc("comm"));
    assert_eq!(asked(&first.id, &[]).succeeded().trim(), "[another]");
    let missing = ["service", "create", "missing", "--image", image_name(), "--restart", "never"];
    let _ = world.warren(&[&missing[..], &options, &["--", "no-such-program"]].concat()).succeeded();
    let ended = world.container_when("missing", "it ends", |c| c["status"]["exitCode"].is_number());
    assert_eq!(ended["status"]["exitCode"], 127);
    // What cannot be a variable.
    let _ = secret(&world, "secret", "create", "zero", "a\0b").succeeded();
    let _ = world.warren(&[
        "service",
        "create",
        "zero",
        "--image",
        image_name(),
        "--restart",
        "never",
        "--secret",
        "source=zero,env=Z",
    ]);
    let refused = world.container_when("zero", "it fails", |c| c["status"]["state"] == "CONTAINER_STATE_FAILED");
    let why = refused["status"]["message"].as_str().unwrap_or_default();
    assert!(why.contains("secret \"zero\" cannot be an environment variable: it has a zero byte"), "{why}");
    let _ = secret(&world, "secret", "create", "long", &"x".repeat(131_072)).succeeded();
    let create = |more: &[&str]| {
        let create = ["service", "create", "wrong", "--image", image_name()];
        world.warren(&[&create[..], more].concat()).failed(2)
    };
    let refused = create(&["--secret", "source=password,env=A,target=/x"]);
    assert!(refused.contains("spec.container.secrets[0].env: makes it a variable"), "{refused}");
    let refused = create(&["--secret", "source=password,env=A", "--env", "A=1"]);
    assert!(refused.contains("spec.container.secrets[0].env: \"A\" is given twice"), "{refused}");
    let refused = create(&["--secret", "source=long,env=A"]);
    assert!(refused.contains("spec.container.secrets[0].env: \"long\" has 131072 bytes"), "{refused}");
    let create_wrong = ["service", "create", "wrong", "--image", image_name(), "--secret", "source=password,env="];
    let refused = world.warren(&create_wrong);
    assert!(refused.code == 2 && refused.stderr.contains("names no variable"), "{}", refused.stderr);
    let refused = create(&["--secret", "source=password,env=A,on-update=signal"]);
    assert!(refused.contains("spec.container.secrets[0].on_update: signal is for files"), "{refused}");
}
