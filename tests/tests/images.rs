//! Images from registries, and what is said when there is nothing to be had.

use std::{
    fs,
    io::Read as _,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use warren_tests::{
    Front, Inside, Process, Registry, RegistryOptions, Trouble, World, image_name, until, until_within,
};

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
    create(&world, "elsewhere", "registry.example/demo", &[]);
    let said = refusal(&world, "elsewhere");
    assert!(said.contains("no certificates of authorities are installed"), "{said}");
    // Without HTTPS none are needed.
    create(&world, "local", "localhost:1/demo", &[]);
    let said = refusal(&world, "local");
    assert!(said.contains("localhost:1 does not answer: Connection refused"), "{said}");
}

/// A layer with one file of so many bytes that no compression makes less.
fn layer(name: &str, size: usize) -> Vec<u8> {
    let mut state = name.bytes().fold(1_u64, |state, byte| state * 31 + u64::from(byte));
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend(state.to_le_bytes());
    }
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_data(&mut header, name, bytes.as_slice()).expect("memory");
    archive.into_inner().expect("memory")
}

/// Containers of a service that did not come to run, with why.
fn failures(world: &World, service: &str) -> Vec<String> {
    let containers = world.containers(service);
    let status = |container: &Value| container["status"]["message"].as_str().unwrap_or_default().to_owned();
    let failed = |container: &&Value| {
        let state = container["status"]["state"].as_str().unwrap_or_default();
        state.ends_with("FAILED") || state.ends_with("REJECTED")
    };
    containers.iter().filter(failed).map(status).collect()
}

#[test]
fn a_blob_comes_once_whoever_needs_it_at_the_same_time() {
    let (world, registry) = world("shared", RegistryOptions::default(), &[]);
    let archive = world.path("demo.tar");
    let (twice, large) = (layer("twice", 1 << 20), layer("large", 48 << 20));
    let large_digest = registry.put_blob("large", &large);
    registry.push_with(&archive, "twice", "v1", &[twice.clone(), twice], |_| {});
    for name in ["one", "two", "three"] {
        let own = layer(name, 1 << 20);
        registry.push_with(&archive, name, "v1", &[large.clone(), own], |config| config["author"] = json!(name));
    }
    let host = &registry.host;
    // By hand, in a process of its own, while the agent pulls the same.
    let services = ["one", "two", "three", "twice"];
    let by_hand = std::thread::scope(|scope| {
        let by_hand = scope.spawn(|| pull(&world, &format!("{host}/three:v1"), &[]));
        for name in services {
            create(&world, name, &format!("{host}/{name}:v1"), &[]);
        }
        by_hand.join().expect("no panic")
    });
    let _ = by_hand.succeeded();
    for name in services {
        let running = || world.containers(name).iter().any(|c| c["status"]["state"] == "CONTAINER_STATE_RUNNING");
        until_within(Duration::from_secs(60), "it runs", || {
            assert_eq!(failures(&world, name), Vec::<String>::new(), "{name}");
            running().then_some(())
        });
    }
    assert_eq!(registry.asked(&large_digest), 1);
}

#[test]
fn a_registry_that_hardly_answers_holds_up_nothing_else() {
    let (mut world, registry) = world("slow", RegistryOptions::default(), &[]);
    let slow = Front::start(&registry.host, Trouble::Dribbles);
    let archive = world.path("demo.tar");
    let shared = layer("shared", 1 << 20);
    for (name, layers) in [("a", [layer("a", 1 << 20)]), ("b", [layer("b", 1 << 20)]), ("good", [shared])] {
        registry.push_with(&archive, name, "v1", &layers, |config| config["author"] = json!(name));
    }
    create(&world, "a", &format!("{}/a:v1", slow.host), &[]);
    create(&world, "b", &format!("{}/b:v1", slow.host), &[]);
    // The same image is asked of the slow registry first, and then of a good one.
    create(&world, "stuck", &format!("{}/good:v1", slow.host), &[]);
    until("all three are being pulled", || (slow.asked() >= 3).then_some(()));
    let began = Instant::now();
    create(&world, "good", &format!("{}/good:v1", registry.host), &["--wait"]);
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    // What it has is there for whoever waited for the slow one, too.
    until_within(Duration::from_secs(20), "it runs", || (!Inside::all(&world, "stuck").is_empty()).then_some(()));
    let message = &world.containers("a")[0]["status"]["message"];
    assert!(message.as_str().is_some_and(|message| message.contains("pulling the image: ")), "{message}");
    let began = Instant::now();
    let _ = world.warren(&["service", "rm", "a", "--wait"]).succeeded();
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    let began = Instant::now();
    let _ = world.agent.take().expect("it runs").terminate();
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    // What was given up is not what became of it.
    world.start_agent(&[]);
    world.wait_ready();
    until("it is pulled again", || {
        let containers = world.containers("b");
        assert_eq!(containers.len(), 1, "{containers:?}");
        (containers[0]["status"]["state"] == "CONTAINER_STATE_PREPARING").then_some(())
    });
    drop(slow);
    let _ = world.warren(&["service", "rm", "b", "good", "stuck", "--wait"]).succeeded();
}

#[test]
fn what_has_come_of_a_blob_is_not_asked_for_again() {
    let (world, registry) = world("resumed", RegistryOptions::default(), &[]);
    let archive = world.path("demo.tar");
    let breaking = Front::start(&registry.host, Trouble::BreaksAfter(1 << 20));
    registry.push_with(&archive, "cut", "v1", &[layer("cut", 4 << 20)], |_| {});
    let began = Instant::now();
    create(&world, "cut", &format!("{}/cut:v1", breaking.host), &["--wait"]);
    // 4 MiB and the tar file's own bytes, a megabyte a connection, and the image's first layer.
    assert!(breaking.asked() < 10, "{} requests in {:?}", breaking.asked(), began.elapsed());
    assert_eq!(failures(&world, "cut"), Vec::<String>::new());
}

#[test]
fn a_mirror_that_lacks_a_blob_is_completed_by_the_registry() {
    let mut world = World::empty("lacking").and_containerd();
    let registry = Registry::start(&world, "registry", RegistryOptions::default());
    let archive = world.path("demo.tar");
    registry.push_with(&archive, "demo", "v1", &[layer("large", 1 << 20)], |_| {});
    let mirror = Front::start(&registry.host, Trouble::HasNone);
    let flag = format!("{}=http://{}", registry.host, mirror.host);
    world.start_manager();
    world.start_agent(&["--registry-mirror", &flag]);
    world.wait_ready();
    create(&world, "demo", &format!("{}/demo:v1", registry.host), &["--wait"]);
    assert!(mirror.asked() > 0, "the mirror was asked first");
}

#[test]
fn a_blob_whose_bytes_are_lost_is_pulled_again() {
    let (world, registry) = world("lost", RegistryOptions::default(), &[]);
    let archive = world.path("demo.tar");
    let lost = layer("lost", 1 << 20);
    let digest = registry.put_blob("demo", &lost);
    registry.push_with(&archive, "demo", "v1", &[lost], |_| {});
    let image = format!("{}/demo:v1", registry.host);
    let _ = pull(&world, &image, &[]).succeeded();
    // As a power cut leaves it: containerd knows the blob, and the file system has none of its bytes.
    let file =
        world.path("root/io.containerd.content.v1.content/blobs/sha256").join(digest.trim_start_matches("sha256:"));
    fs::write(&file, b"").expect("it is there");
    create(&world, "demo", &image, &["--wait"]);
    assert_eq!(registry.asked(&digest), 2);
}

/// An archive with these files.
fn write_archive(path: &std::path::Path, files: &[(String, Vec<u8>)]) {
    let mut archive = tar::Builder::new(fs::File::create(path).expect("writable"));
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, name, bytes.as_slice()).expect("writable");
    }
    archive.finish().expect("writable");
}

#[test]
fn archives_of_other_builders_are_imported_or_refused_in_words() {
    use sha2::{Digest as _, Sha256};

    let (world, registry) = world("builders", RegistryOptions::default(), &[]);
    let archive = world.path("demo.tar");
    let good = registry.push(&archive, "good", "v1", |config| config["architecture"] = json!(""));
    let manifest: Value = serde_json::from_slice(&fs::read(registry.blob(&good)).expect("a manifest")).expect("JSON");
    let blob = |digest: &str| {
        let bytes = fs::read(registry.blob(digest)).expect("a blob");
        (format!("blobs/{}", digest.replace(':', "/")), bytes)
    };
    let document = |document: &Value| {
        let bytes = document.to_string().into_bytes();
        let hex: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let entry = json!({ "digest": format!("sha256:{hex}"), "size": bytes.len() });
        (entry, (format!("blobs/sha256/{hex}"), bytes))
    };
    let (config, layer) = (&manifest["config"]["digest"], &manifest["layers"][0]["digest"]);
    let own = vec![blob(&good), blob(config.as_str().expect("text")), blob(layer.as_str().expect("text"))];
    let with = |kind: &str, entry: &Value, platform: Option<&str>| {
        let mut entry = entry.clone();
        entry["mediaType"] = json!(format!("application/vnd.{kind}"));
        if let Some(platform) = platform {
            entry["platform"] = json!({ "os": platform, "architecture": platform });
        }
        entry
    };
    let image = json!({ "digest": good, "size": own[0].1.len() });
    let (attestation, attestation_blob) = document(&json!({
        "schemaVersion": 2, "layers": [],
        "config": { "mediaType": "application/vnd.in-toto+json", "digest": good, "size": own[0].1.len() },
    }));
    // A list inside an index, as skopeo and buildkit make them, under whatever name.
    let (list, list_blob) = document(&json!({
        "schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.list.v2+json",
        "manifests": [
            with("oci.image.manifest.v1+json", &attestation, Some("unknown")),
            with("docker.distribution.manifest.v2+json", &image, None),
        ],
    }));
    let named = |entry: &Value, name: &str| {
        let mut entry = entry.clone();
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        entry
    };
    let index = |entries: &[Value]| {
        let index = json!({ "schemaVersion": 2, "manifests": entries });
        ("index.json".to_owned(), index.to_string().into_bytes())
    };
    let all = |first: (String, Vec<u8>)| {
        let mut files = vec![first, list_blob.clone(), attestation_blob.clone()];
        files.extend(own.clone());
        files
    };
    let path = world.path("other.tar");
    let import = |files: &[(String, Vec<u8>)], name: Option<&str>| {
        write_archive(&path, files);
        let mut command = World::binary("warren");
        command.args(["image", "import"]).arg(&path).arg("--containerd-socket").arg(world.containerd_socket());
        World::run(command.args(name.into_iter().flat_map(|name| ["--name", name])))
    };
    let list = with("docker.distribution.manifest.list.v2+json", &list, None);
    let imported = import(&all(index(&[named(&list, "localhost/nested:1")])), None).succeeded();
    assert_eq!(imported, "localhost/nested:1\n");
    let _ = world.warren(&["service", "create", "nested", "--image", "localhost/nested:1", "--wait"]).succeeded();
    let log = world.manager.as_ref().expect("it runs").log();
    assert!(!log.contains(" WARN "), "no registry is to be expected on localhost: {log}");
    // From a registry, too.
    let outer = |manifests: Value| json!({ "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests });
    let mut inner = outer(json!([with("oci.image.manifest.v1+json", &image, None)]));
    inner["annotations"] = json!({ "which": "inner" });
    let digest = registry.put_manifest("good", "inner", &inner);
    let entry = json!({ "digest": digest, "size": inner.to_string().len() });
    registry.put_manifest("good", "outer", &outer(json!([with("oci.image.index.v1+json", &entry, None)])));
    create(&world, "outer", &format!("{}/good:outer", registry.host), &["--wait"]);
    // Beside a signature, and with no name but a tag.
    let signed = index(&[attestation.clone(), named(&image, "latest")]);
    let _ = import(&all(signed.clone()), Some("localhost/signed")).succeeded();
    let refused = import(&all(signed), None).failed(1);
    assert!(refused.contains("only the tag \"latest\": give it one with --name"), "{refused}");
    // What cannot be used is known now.
    let refused = import(&all(index(&[named(&attestation, "localhost/x:1")])), None).failed(1);
    assert!(refused.contains("an artifact with a config of type application/vnd.in-toto+json"), "{refused}");
    let refused = import(&[("manifest.json".to_owned(), b"[]".to_vec())], None).failed(1);
    assert!(refused.contains("Docker's old format") && refused.contains("skopeo"), "{refused}");
    // What became unusable says why, and not that no registry has it.
    let (absent, _) = document(&json!({ "absent": true }));
    let partial = index(&[with("oci.image.manifest.v1+json", &named(&absent, "localhost/absent:1"), None)]);
    let refused = import(&all(partial), None).failed(1);
    assert!(refused.contains("is missing"), "{refused}");
    let deleted = config.as_str().expect("text");
    let _ = world.ctr(&["content", "rm", deleted]).succeeded();
    create(&world, "broken", "localhost/signed", &[]);
    let said = refusal(&world, "broken");
    assert!(said.contains(&format!("{deleted} is missing")), "{said}");
}
