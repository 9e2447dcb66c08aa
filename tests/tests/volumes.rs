//! Volumes: what outlives containers, where it is, and who has it.

use std::{fs, path::PathBuf, process::Command};

use serde_json::Value;
use warren_tests::{Inside, Process, Registry, RegistryOptions, WELL_BEHAVED, World, find, image_name, run, until};

fn create(world: &World, arguments: &[&str]) {
    let _ = world.warren(&[&["volume", "create"][..], arguments].concat()).succeeded();
}

fn inspect(world: &World, name: &str) -> Value {
    let shown = world.warren(&["volume", "inspect", name, "--format", "json"]).succeeded();
    serde_json::from_str(&shown).expect("JSON")
}

fn replaced(world: &World, service: &str, before: &Inside) -> Inside {
    let _ = before.shell(world, "kill -9 -1; kill -TERM 1");
    until("another runs", || Inside::all(world, service).into_iter().find(|container| container.id != before.id))
}

#[test]
fn a_volume_outlives_its_containers_and_goes_with_its_record() {
    let mut world = World::with_warren("volume");
    create(&world, &["data", "--label", "team=blue"]);
    let options = ["--mount", "type=volume,source=data,target=/data", "--restart-delay-ms", "10"];
    let first = Inside::of(&world, "db", &options);
    assert_eq!(first.shell(&world, "echo kept > /data/file").0, 0);
    let second = replaced(&world, "db", &first);
    assert_eq!(second.shell(&world, "cat /data/file").1, "kept\n");
    // Another service has it too, to read.
    let reader = Inside::of(&world, "reader", &["--mount", "type=volume,source=data,target=/in,readonly"]);
    assert_eq!(reader.shell(&world, "cat /in/file").1, "kept\n");
    assert_ne!(reader.shell(&world, "touch /in/no").0, 0);
    let volume = inspect(&world, "data");
    assert_eq!(volume["usedBy"], serde_json::json!(["db", "reader"]));
    assert_eq!(volume["labels"]["team"], "blue");
    assert_eq!(volume["nodeId"].as_str(), Some(second.node.as_str()), "it is where its first container was");
    let directory = world.path("agent/volumes/data").join(volume["id"].as_str().expect("an id"));
    assert!(directory.join("file").exists());
    let mounts = ["operation=\"mount\"", "result=\"success\""];
    assert_eq!(world.agent_metrics().sum("warren_volume_operations_total", &mounts), 3.0);
    // With everybody restarted it is still there, and who uses it is known.
    world.agent.take().expect("it runs").kill();
    world.manager.take().expect("it runs").kill();
    world.start_manager();
    world.start_agent(&[]);
    world.wait_ready();
    let in_use = world.warren(&["volume", "rm", "data"]).failed(1);
    assert!(in_use.contains("volume \"data\" is in use by db, reader"), "{in_use}");
    let _ = world.warren(&["service", "rm", "reader", "--wait"]).succeeded();
    // Forced, it goes once its containers have; they keep it until then.
    let _ = world.warren(&["volume", "rm", "data", "--force"]).succeeded();
    assert_eq!(second.shell(&world, "cat /data/file").1, "kept\n");
    // And so does the rest of the service.
    let _ = world.warren(&["service", "scale", "db", "0"]).succeeded();
    let _ = world.warren(&["service", "rm", "db", "--wait"]).succeeded();
    until("its data is gone", || (!directory.exists()).then_some(()));
    assert_eq!(world.manager_metrics().sum("warren_volumes_total", &[]), 0.0);
    assert_eq!(
        world.agent_metrics().sum("warren_volume_operations_total", &["operation=\"remove\"", "result=\"success\""]),
        1.0
    );
    // An unused one goes without force, and its name can be used again.
    create(&world, &["data"]);
    let _ = world.warren(&["volume", "rm", "data"]).succeeded();
}

#[test]
fn one_container_at_a_time_has_an_exclusive_volume() {
    let world = World::with_warren("exclusive");
    create(&world, &["own", "--exclusive"]);
    let options = ["--mount", "type=volume,source=own,target=/data", "--restart-delay-ms", "10"];
    let first = Inside::of(&world, "db", &options);
    let other = ["service", "create", "other", "--image", image_name()];
    let _ = world.warren(&[&other[..], &options].concat()).succeeded();
    let waiting = |service: &str| {
        world.container_when(service, "it waits", |c| {
            c["status"]["message"].as_str().is_some_and(|message| message.contains("a volume is another container's"))
        })
    };
    let _ = waiting("other");
    // Once it is free, who has waited longest gets it, and its former owner waits.
    let _ = first.shell(&world, "kill -9 -1; kill -TERM 1");
    until("the other has it now", || (Inside::all(&world, "other").len() == 1).then_some(()));
    let _ = waiting("db");
    let _ = world.warren(&["service", "rm", "other", "--wait"]).succeeded();
    until("it has it again", || (Inside::all(&world, "db").len() == 1).then_some(()));
}

#[test]
fn volumes_may_be_binds_and_memory() {
    let world = World::with_warren("types");
    let shared = world.path("shared");
    fs::create_dir(&shared).expect("writable");
    fs::write(shared.join("file"), "the node's").expect("writable");
    create(&world, &["bound", "--opt", "type=bind", "--opt", &format!("device={}", shared.display())]);
    create(&world, &["memory", "--opt", "type=tmpfs", "--opt", "o=size=1m,nosuid,mode=0750"]);
    let options = [
        "--mount",
        "type=volume,source=bound,target=/bound",
        "--mount",
        "type=volume,source=memory,target=/memory",
        "--restart-delay-ms",
        "10",
    ];
    let inside = Inside::of(&world, "both", &options);
    assert_eq!(inside.shell(&world, "cat /bound/file").1, "the node's");
    let memory = inside.mount("/memory");
    for part in ["tmpfs", "size=1024k", "nosuid", "mode=750"] {
        assert!(memory.contains(part), "{part} is not in {memory}");
    }
    // Memory is shared by those who use it at the same time, and gone with the last.
    let again = Inside::of(&world, "again", &options);
    assert_eq!(inside.shell(&world, "echo here > /memory/x").0, 0);
    assert_eq!(again.shell(&world, "cat /memory/x").1, "here\n");
    let mounted = || {
        fs::read_to_string("/proc/self/mounts")
            .expect("readable")
            .contains(&world.path("agent/volumes").display().to_string())
    };
    assert!(mounted());
    let _ = world.warren(&["service", "rm", "both", "again", "--wait"]).succeeded();
    until("it is unmounted", || (!mounted()).then_some(()));
    let _ = world.warren(&["volume", "rm", "bound", "memory"]).succeeded();
    assert!(shared.join("file").exists(), "a bound directory is not the volume's to remove");

    // A file server that is not there is said in words.
    create(&world, &["remote", "--opt", "type=nfs", "--opt", "device=:/export", "--opt", "o=addr=127.0.0.1,vers=4"]);
    let nfs = [
        "service",
        "create",
        "nfs",
        "--image",
        image_name(),
        "--restart",
        "never",
        "--mount",
        "type=volume,source=remote,target=/r",
    ];
    let _ = world.warren(&nfs).succeeded();
    let failed = world.container_when("nfs", "it fails", |c| c["status"]["state"] == "CONTAINER_STATE_FAILED");
    assert!(failed["status"]["message"].as_str().unwrap_or_default().starts_with("volume \"remote\": "), "{failed}");
    assert_eq!(inspect(&world, "remote")["nodeId"], Value::Null, "every node could mount it");

    for (arguments, field) in [
        (&["../x"][..], "name"),
        (&["x", "--driver", "ceph"], "driver"),
        (&["x", "--opt", "type=ext4"], "driver_options.type"),
        (&["x", "--opt", "device=/x"], "driver_options.type"),
        (&["x", "--opt", "type=bind", "--opt", "device=x"], "driver_options.device"),
        (&["x", "--opt", "type=nfs", "--opt", "device=:/x"], "driver_options.o"),
        (&["x", "--opt", "size=1"], "driver_options"),
    ] {
        let error = world.warren(&[&["volume", "create"][..], arguments].concat()).failed(2);
        assert!(error.starts_with(&format!("error: {field}: ")), "{error}");
    }
    let missing = ["service", "create", "x", "--image", "x", "--mount", "type=volume,source=nobody,target=/x"];
    let missing = world.warren(&missing).failed(2);
    assert!(missing.contains("spec.container.mounts: there is no volume \"nobody\""), "{missing}");
}

/// The kernel's own file server, in this test's network, with one directory for everybody.
struct FileServer {
    _mountd: Process,
    directory: PathBuf,
}

impl FileServer {
    fn start(world: &World) -> Self {
        let directory = world.path("exported");
        fs::create_dir(&directory).expect("writable");
        // What an exported tmpfs is called, which has no device to be called by.
        let _ = run("mount", &["-t", "nfsd", "nfsd", "/proc/fs/nfsd"]).succeeded();
        fs::create_dir_all("/var/lib/nfs").expect("writable");
        for table in ["etab", "rmtab"] {
            fs::write(format!("/var/lib/nfs/{table}"), "").expect("writable");
        }
        let exported = format!("*:{}", directory.display());
        let options = "rw,fsid=0,no_root_squash,no_subtree_check,insecure";
        let _ = run("exportfs", &["-o", options, &exported]).succeeded();
        let mut mountd = Command::new(find("rpc.mountd"));
        let mountd =
            Process::start("mountd", mountd.args(["--foreground", "-N", "2", "-N", "3"]), world.directory.path());
        // Nobody has to be waited for who had files open before.
        let _ = run("rpc.nfsd", &["-N", "3", "--port", "2049", "--grace-time", "10", "2"]).succeeded();
        Self { _mountd: mountd, directory }
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        let _ = run("rpc.nfsd", &["0"]);
        let _ = run("exportfs", &["-ua"]);
        let _ = run("umount", &["/proc/fs/nfsd"]);
    }
}

#[test]
#[ignore = "a kernel with NFS is needed: `cargo xtask kernels` has some"]
fn a_file_servers_directory_is_a_volume() {
    let world = World::with_warren("nfs");
    let server = FileServer::start(&world);
    fs::write(server.directory.join("file"), "the server's").expect("writable");
    let options = "o=addr=localhost,vers=4.2,soft,timeo=50,nosuid";
    create(&world, &["remote", "--opt", "type=nfs", "--opt", "device=:/", "--opt", options]);
    let inside = Inside::of(&world, "user", &["--mount", "type=volume,source=remote,target=/remote"]);
    assert_eq!(inside.shell(&world, "cat /remote/file").1, "the server's");
    assert_eq!(inside.shell(&world, "echo the container > /remote/answer").0, 0);
    assert_eq!(fs::read_to_string(server.directory.join("answer")).expect("readable"), "the container\n");
    let mount = inside.mount("/remote");
    assert!(mount.contains(" nfs4 ") && mount.contains("nosuid"), "{mount}");
    let _ = world.warren(&["service", "rm", "user", "--wait"]).succeeded();
    until("it is unmounted", || {
        (!fs::read_to_string("/proc/self/mounts").expect("readable").contains(" nfs4 ")).then_some(())
    });
    assert!(server.directory.join("answer").exists(), "what the server has is not the volume's to remove");
    // The last that the kernel has to say to the server, it says after the mount is gone from the list.
    drop(world);
    drop(server);
}

#[test]
fn containers_go_where_their_volume_is() {
    let world = World::empty("affinity");
    let network = world.cgroup_parent().trim_start_matches('/').to_owned();
    let _ = run("ip", &["netns", "add", &network]).succeeded();
    let mut world = world.and_containerd();
    world.start_manager();
    world.start_agent(&[]);
    let second = world.start_other_agent("node-2", &network, &[]);
    until("both nodes are ready", || {
        (world.warren(&["node", "ls"]).succeeded().matches("ready").count() == 2).then_some(())
    });
    create(&world, &["far", "--node", "node-2"]);
    create(&world, &["near"]);
    world.create("far", 3, &["--mount", "type=volume,source=far,target=/data"], WELL_BEHAVED);
    world.create("near", 3, &["--mount", "type=volume,source=near,target=/data"], WELL_BEHAVED);
    let nodes = |service: &str| {
        let mut nodes: Vec<_> = Inside::all(&world, service).into_iter().map(|container| container.node).collect();
        nodes.dedup();
        nodes
    };
    assert_eq!(nodes("far").len(), 1);
    assert_eq!(nodes("near").len(), 1, "the first decides for all");
    assert_eq!(inspect(&world, "far")["nodeId"].as_str(), nodes("far").first().map(String::as_str));
    // Its node is away: its containers wait for it, whoever else has room.
    let _ = world.warren(&["service", "rm", "far", "near", "--wait"]).succeeded();
    // Asked, not killed: it may still be deleting tasks.
    let _ = second.terminate();
    until("the node is down", || world.warren(&["node", "ls"]).succeeded().contains("down").then_some(()));
    let again = ["service", "create", "far", "--image", image_name(), "--mount", "type=volume,source=far,target=/data"];
    let _ = world.warren(&again).succeeded();
    let waiting = world.container_when("far", "it waits", |c| c["status"]["state"] == "CONTAINER_STATE_PENDING");
    let message = waiting["status"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("1 a volume is on another node") && message.contains("1 not heard of"), "{message}");
    let _ = run("ip", &["netns", "del", &network]);
}

/// A layer with a directory of the demo user's, and files in it.
fn layer_with_data() -> Vec<u8> {
    let mut layer = tar::Builder::new(Vec::new());
    let mut add = |path: &str, kind: tar::EntryType, mode: u32, owner: u64, content: &str| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner);
        header.set_gid(owner);
        header.set_mtime(1_000_000_000);
        if kind == tar::EntryType::Symlink {
            header.set_size(0);
            layer.append_link(&mut header, path, content).expect("appended");
        } else {
            header.set_size(content.len() as u64);
            layer.append_data(&mut header, path, content.as_bytes()).expect("appended");
        }
    };
    add("data", tar::EntryType::Directory, 0o2750, 1000, "");
    add("data/seed", tar::EntryType::Regular, 0o600, 1000, "from the image\n");
    add("data/sub", tar::EntryType::Directory, 0o700, 33, "");
    add("data/sub/passwd", tar::EntryType::Symlink, 0o777, 0, "/etc/shadow");
    add("by-link", tar::EntryType::Symlink, 0o777, 0, "/data");
    layer.into_inner().expect("written")
}

#[test]
fn a_new_volume_is_as_the_image_has_it_there() {
    let world = World::with_warren("seeded");
    let registry = Registry::start(&world, "registry", RegistryOptions::default());
    let _ = registry.push_with(&world.path("demo.tar"), "seeded", "v1", &[layer_with_data()], |_| {});
    let image = format!("{}/seeded:v1", registry.host);
    for name in ["one", "two", "bare"] {
        create(&world, &[name]);
    }
    let service = |name: &str, image: &str, volume: &str, target: &str| {
        let mount = format!("source={volume},target={target}");
        let arguments = ["service", "create", name, "--image", image, "--user", "demo", "--mount", &mount, "--wait"];
        let _ = world.warren(&[&arguments[..], &["--", "sh", "-c", WELL_BEHAVED]].concat()).succeeded();
        Inside::only(&world, name)
    };
    let one = service("one", &image, "one", "/data");
    let (code, said) =
        one.shell(&world, "cat /data/seed; stat -c '%a %u:%g %Y' /data /data/seed; touch /data/new && echo written");
    assert_eq!(
        (code, said.as_str()),
        (0, "from the image\n2750 1000:1000 1000000000\n600 1000:1000 1000000000\nwritten\n")
    );
    let directory =
        |name: &str| world.path("agent/volumes/data").join(inspect(&world, name)["id"].as_str().expect("an id"));
    let link = fs::read_link(directory("one").join("sub/passwd")).expect("a link");
    assert_eq!(link, PathBuf::from("/etc/shadow"), "what is linked to was not followed");
    // By way of a link in the image; what is there already is left as it is.
    let two = service("two", &image, "two", "/by-link");
    assert_eq!(two.shell(&world, "cat /by-link/seed").1, "from the image\n");
    let again = service("again", &image, "one", "/data");
    assert_eq!(again.shell(&world, "rm /data/seed; ls /data").1, "new\nsub\n");
    let _ = world.warren(&["service", "rm", "again", "one", "--wait"]).succeeded();
    let third = service("third", &image, "one", "/data");
    assert_eq!(third.shell(&world, "ls /data").1, "new\nsub\n");
    // Where the image has nothing, it is the user's.
    let bare = service("bare", image_name(), "bare", "/no/such/place");
    let (code, said) = bare.shell(&world, "touch /no/such/place/x && stat -c '%a %u:%g' /no/such/place");
    assert_eq!((code, said.as_str()), (0, "755 1000:1000\n"));
}
