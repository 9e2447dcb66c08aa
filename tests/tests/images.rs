//! Images from registries, and what is said when there is nothing to be had.

use std::{fs, io::Read as _};

use serde_json::json;
use warren_tests::{Inside, Process, Registry, RegistryOptions, World, image_name, until};

/// A machine with all of Warren, its demo image only in a registry.
fn world(name: &str, options: RegistryOptions<'_>, agent: &[&str]) -> (World, Registry) {
    let mut world = World::empty(name).and_containerd();
    let registry = Registry::start(&world, "registry", options);
    let _ = world.ctr(&["images", "rm", image_name()]).succeeded();
    world.start_manager();
    world.start_agent(agent);
    world.wait_ready();
    (world, registry)
}

fn create(world: &World, name: &str, image: &str, options: &[&str]) {
    let mut arguments = vec!["service", "create", name, "--image", image, "--restart", "never"];
    arguments.extend(options);
    let _ = world.warren(&arguments).succeeded();
}

/// Why a service's only container was not run.
fn refusal(world: &World, name: &str) -> String {
    until("it is refused", || {
        let containers = world.containers(name);
        let status = &containers.first()?["status"];
        let ended =
            ["CONTAINER_STATE_REJECTED", "CONTAINER_STATE_FAILED"].iter().any(|state| status["state"] == *state);
        ended.then(|| status["message"].as_str().unwrap_or_default().to_owned())
    })
}

fn pull(world: &World, image: &str, more: &[&str]) -> warren_tests::Output {
    let mut command = World::binary("warren");
    command.args(["image", "pull", image]).arg("--containerd-socket").arg(world.containerd_socket()).args(more);
    World::run(&mut command)
}

#[test]
fn all_containers_run_the_bytes_that_the_name_meant_and_they_come_once() {
    let (world, registry) = world("pinned", RegistryOptions::default(), &["--keep-images-h", "0.001"]);
    let archive = world.path("demo.tar");
    let first = registry.push(&archive, "demo", "v1", |_| {});
    let image = format!("{}/demo:v1", registry.host);
    create(&world, "web", &image, &["--replicas", "5", "--wait"]);
    let spec = world.warren(&["service", "inspect", "web", "--format", "json"]).succeeded();
    assert!(spec.contains(&first), "{spec}");
    let layer = registry.layer(&first);
    assert_eq!(registry.asked(&layer), 1, "five containers, one pull");
    let pulled = world.agent_metrics().sum("warren_container_phase_duration_seconds_count", &["phase=\"pull\""]);
    assert_eq!(pulled, 5.0);
    // The tag moves: what runs, and what is added, stays what it was.
    let second = registry.push(&archive, "demo", "v1", |config| config["config"]["Env"] = json!(["PATH=/bin", "V=2"]));
    assert_ne!(first, second);
    let _ = world.warren(&["service", "scale", "web", "6", "--wait"]).succeeded();
    let with_two = |service: &str| {
        let all = Inside::all(&world, service);
        all.iter().filter(|container| container.proc("environ").contains("V=2")).count()
    };
    assert_eq!((Inside::all(&world, "web").len(), with_two("web")), (6, 0));
    create(&world, "new", &image, &["--wait"]);
    assert_eq!(with_two("new"), 1);
    // By digest, and by hand.
    let by_digest = format!("{}/demo@{first}", registry.host);
    create(&world, "digest", &by_digest, &["--wait"]);
    assert_eq!(with_two("digest"), 0);
    assert_eq!(pull(&world, &image, &[]).succeeded(), format!("{image} {second}\n"));
    let listed = || {
        let mut command = World::binary("warren");
        command.args(["image", "ls", "--containerd-socket"]).arg(world.containerd_socket());
        World::run(&mut command).succeeded()
    };
    assert!(listed().contains(&image) && listed().contains(&first), "{}", listed());
    // Nobody uses it any more.
    let _ = world.warren(&["service", "rm", "web", "new", "digest", "--wait"]).succeeded();
    until("unused images are removed", || (!listed().contains("demo")).then_some(()));
    until("and what was in them", || (!world.ctr(&["content", "ls"]).stdout.contains(&layer)).then_some(()));
}

#[test]
fn what_cannot_be_pulled_is_said_in_words() {
    let (world, registry) = world("broken", RegistryOptions::default(), &[]);
    let archive = world.path("demo.tar");
    let host = &registry.host;
    let good = registry.push(&archive, "good", "v1", |_| {});
    // Known when the service is created.
    for (image, words) in [
        (format!("{host}/good:none"), format!("{host} has no image {host}/good:none")),
        (format!("{host}/none"), format!("{host} has no image {host}/none:latest")),
    ] {
        let error = world.warren(&["service", "create", "none", "--image", &image]).failed(2);
        assert!(error.contains(&format!("spec.container.image: {words}")), "{error}");
    }
    // For another machine, alone and in an index.
    registry.push(&archive, "alien", "v1", |config| config["architecture"] = json!("s390x"));
    create(&world, "alien", &format!("{host}/alien:v1"), &[]);
    let said = refusal(&world, "alien");
    assert!(said.contains("it is for linux/s390x, this node is linux/"), "{said}");
    let size = fs::metadata(registry.blob(&good)).expect("a manifest").len();
    let entry = |architecture: &str| {
        json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": good, "size": size,
            "platform": { "architecture": architecture, "os": "linux" },
        })
    };
    let index = |entries: &[serde_json::Value]| {
        json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": entries,
        })
    };
    let own = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    registry.put_manifest("good", "others", &index(&[entry("s390x")]));
    registry.put_manifest("good", "all", &index(&[entry("s390x"), entry(own)]));
    create(&world, "others", &format!("{host}/good:others"), &[]);
    let said = refusal(&world, "others");
    assert!(said.contains("it has nothing for linux/"), "{said}");
    create(&world, "all", &format!("{host}/good:all"), &["--wait"]);

    // Layers that are missing, cut off, or something else.
    let damaged = |name: &str, damage: fn(&std::path::Path)| {
        let changed = |config: &mut serde_json::Value| config["config"]["Env"] = json!(["PATH=/bin", name]);
        let digest = registry.push(&archive, name, "v1", changed);
        let manifest = fs::read(registry.blob(&digest)).expect("a manifest");
        let manifest: serde_json::Value = serde_json::from_slice(&manifest).expect("JSON");
        let config = manifest["config"]["digest"].as_str().expect("a digest").to_owned();
        damage(&registry.blob(&config));
        create(&world, name, &format!("{host}/{name}:v1"), &[]);
        refusal(&world, name)
    };
    let said = damaged("missing", |blob| fs::remove_file(blob).expect("removable"));
    assert!(said.contains(host), "{said}");
    let said = damaged("cut", |blob| fs::write(blob, &fs::read(blob).expect("readable")[..20]).expect("writable"));
    assert!(said.contains("sha256:"), "{said}");
    let said = damaged("other", |blob| {
        let mut bytes = fs::read(blob).expect("readable");
        bytes[0] ^= 1;
        fs::write(blob, bytes).expect("writable");
    });
    assert!(said.contains("sha256:"), "{said}");

    // Never pulled, and not there; there, and never asked for.
    let image = format!("{host}/good:v1");
    create(&world, "never", &format!("{host}/unheard:of"), &["--pull", "never"]);
    let said = refusal(&world, "never");
    assert!(said.contains("is not on this node, and its service says never to pull it"), "{said}");
    let _ = pull(&world, &image, &[]).succeeded();
    create(&world, "here", &image, &["--pull", "never", "--wait"]);
    // A registry that is away: nodes go by the name, and say what they find.
    drop(registry);
    create(&world, "away", &image.replace(":v1", ":v2"), &[]);
    let said = refusal(&world, "away");
    assert!(said.contains("does not answer: "), "{said}");
}

#[test]
fn mirrors_are_asked_first_by_https_and_short_names_are_completed() {
    let mut world = World::empty("mirror").and_containerd();
    let mirror = Registry::start(&world, "mirror", RegistryOptions { tls: true, ..RegistryOptions::default() });
    let archive = world.path("demo.tar");
    mirror.push(&archive, "library/demo", "latest", |_| {});
    let flag = format!("docker.io=https://{}", mirror.host);
    let ca = mirror.ca().display().to_string();
    let reached = ["--registry-mirror", &flag, "--registry-ca", &ca];
    let mut manager = world.manager_command();
    manager.args(reached);
    world.start_manager_as(manager);
    world.start_agent(&reached);
    world.wait_ready();
    create(&world, "short", "demo", &["--wait"]);
    assert!(world.ctr(&["images", "ls", "-q"]).succeeded().contains("docker.io/library/demo@sha256:"));
    // Whoever does not know its authority does not believe it.
    let refused = pull(&world, "demo", &["--registry-mirror", &flag]).failed(4);
    assert!(refused.contains("index.docker.io") || refused.contains("docker.io does not answer"), "{refused}");
}

#[test]
fn a_registry_may_want_to_know_who_asks() {
    let (world, registry) =
        world("auth", RegistryOptions { user: Some(("ann", "pass:word")), ..RegistryOptions::default() }, &[]);
    let archive = world.path("demo.tar");
    registry.push(&archive, "demo", "v1", |_| {});
    let image = format!("{}/demo:v1", registry.host);
    let refused = world.warren(&["service", "create", "web", "--image", &image]).failed(2);
    assert!(refused.contains("does not let") && refused.contains("spec.container.image"), "{refused}");
    let file = world.path("credentials");
    for (text, right) in [("ann:wrong", false), ("ann:pass:word", true)] {
        fs::write(&file, text).expect("writable");
        let pulled = pull(&world, &image, &["--credentials", &file.display().to_string()]);
        if right {
            assert!(pulled.succeeded().starts_with(&image));
        } else {
            assert!(pulled.failed(1).contains("with these credentials"));
        }
    }
}

#[test]
fn a_server_of_tokens_may_stand_before_a_registry() {
    let options = RegistryOptions { user: Some(("ann", "pass:word")), tokens: true, ..RegistryOptions::default() };
    let (world, registry) = world("tokens", options, &[]);
    registry.push(&world.path("demo.tar"), "demo", "v1", |_| {});
    let image = format!("{}/demo:v1", registry.host);
    let tokens = registry.tokens.as_ref().expect("they are given out");
    assert_eq!(tokens.asked(), 0);
    let refused = world.warren(&["service", "create", "web", "--image", &image]).failed(2);
    assert!(refused.contains("does not let") && refused.contains("spec.container.image"), "{refused}");
    assert!(tokens.asked() > 0, "as somebody whom nobody knows");
    for (name, text) in [("wrong", "ann:wrong"), ("right", "ann:pass:word")] {
        let file = world.path(name);
        fs::write(&file, text).expect("writable");
        let _ = world.warren(&["secret", "create", name, &file.display().to_string()]).succeeded();
    }
    let refused =
        world.warren(&["service", "create", "web", "--image", &image, "--registry-secret", "wrong"]).failed(2);
    assert!(refused.contains("does not let"), "{refused}");
    // The manager asks with the secret, and so does the node.
    create(&world, "web", &image, &["--registry-secret", "right", "--wait"]);
    let spec = world.warren(&["service", "inspect", "web", "--format", "json"]).succeeded();
    assert!(spec.contains("sha256:"), "{spec}");
    assert_eq!(Inside::all(&world, "web").len(), 1);
}

#[test]
fn proxies_of_the_environment_are_used() {
    let mut world = World::empty("proxy").and_containerd();
    world.start_manager();
    let asked = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let proxy = format!("http://{}", asked.local_addr().expect("an address"));
    let mut command = World::binary("warren");
    command.args(["image", "pull", "registry.example/demo"]).env("HTTPS_PROXY", &proxy);
    command.arg("--containerd-socket").arg(world.containerd_socket());
    let pulled = std::thread::spawn(move || World::run(&mut command));
    asked.set_nonblocking(true).expect("a socket");
    let (mut stream, _) = until("the proxy is asked", || asked.accept().ok());
    let mut request = [0; 512];
    stream.set_nonblocking(false).expect("a socket");
    let read = stream.read(&mut request).expect("readable");
    let request = String::from_utf8_lossy(&request[..read]).into_owned();
    drop(stream);
    let _ = pulled.join().expect("it ends").failed(4);
    assert!(request.starts_with("CONNECT registry.example:443"), "{request}");
}

#[test]
fn without_certificates_of_authorities_what_is_there_still_runs() {
    let mut world = World::empty("distrust").and_containerd();
    let distrusting = |mut command: std::process::Command| {
        command.env("SSL_CERT_FILE", "/dev/null").env_remove("SSL_CERT_DIR");
        command
    };
    let manager = distrusting(world.manager_command());
    world.start_manager_as(manager);
    let mut agent = distrusting(world.agent_command());
    world.agent = Some(Process::start("agent", &mut agent, world.directory.path()));
    world.wait_ready();
    create(&world, "here", image_name(), &["--wait"]);
    create(&world, "elsewhere", "localhost:1/demo", &[]);
    let said = refusal(&world, "elsewhere");
    assert!(said.contains("no certificates of authorities are installed"), "{said}");
}
