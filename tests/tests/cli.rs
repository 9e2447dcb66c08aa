//! The command `warren`: tables for people, JSON for programs.

use serde_json::Value;
use warren_tests::{WELL_BEHAVED, World, image_name, until};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn every_verb_shows_what_it_should() {
    let world = World::with_warren("cli");
    let options = ["--env", "COLOUR=blue", "--label", "tier=front", "--limit-memory", "64M", "--limit-cpu", "0.5"];
    world.create("web", 2, &options, WELL_BEHAVED);

    let table = world.warren(&["service", "ls"]).succeeded();
    let row = table.lines().find(|line| line.contains(" web ")).expect("a row");
    assert!(row.contains("replicated") && row.contains("2/2") && row.contains(image_name()), "{table}");
    let inspected = world.warren(&["service", "inspect", "web"]).succeeded();
    for words in ["COLOUR=blue", "tier=front", "500 millicores, 64 MiB", "2 of 2"] {
        assert!(inspected.contains(words), "{words} is not in\n{inspected}");
    }
    let service = json(&world.warren(&["service", "inspect", "web", "--format", "json"]).succeeded());
    assert_eq!(service["spec"]["container"]["env"]["COLOUR"], "blue");
    assert_eq!(service["status"]["running"], 2);
    let yaml = world.warren(&["service", "inspect", "web", "--format", "yaml"]).succeeded();
    assert!(yaml.starts_with("apiVersion: warren.io/v1\nkind: Service\n"), "{yaml}");
    let manifest = serde_saphyr::from_str::<Value>(&yaml).expect("YAML");
    assert_eq!(manifest["spec"]["image"], service["spec"]["container"]["image"]);
    assert_eq!(manifest["status"]["id"], service["id"]);
    for (filter, found) in [("spec.labels.tier=front", 1), ("spec.labels.tier!=front", 0), ("status.running=2", 1)] {
        let services = json(&world.warren(&["service", "ls", "--filter", filter, "--format", "json"]).succeeded());
        assert_eq!(services.as_array().map(Vec::len), Some(found), "{filter}");
    }
    let refused = world.warren(&["node", "ls", "--filter", "status=dwon"]).failed(2);
    assert!(refused.contains("--filter status: \"dwon\" is none of "), "{refused}");

    let listed = json(&world.warren(&["container", "ls", "--service", "web", "--format", "json"]).succeeded());
    let id = listed[0]["id"].as_str().expect("an id").to_owned();
    let by_prefix = json(&world.warren(&["container", "inspect", &id[..18], "--format", "json"]).succeeded());
    assert_eq!(by_prefix["id"], id.as_str());
    let shown = world.warren(&["container", "inspect", &id]).succeeded();
    assert!(shown.contains("running") && shown.contains(image_name()), "{shown}");
    let on_node = world.warren(&["container", "ls", "--node", "node-1"]).succeeded();
    assert_eq!(on_node.lines().count(), 3, "{on_node}");

    let nodes = world.warren(&["node", "ls"]).succeeded();
    let row = nodes.lines().find(|line| line.contains("node-1")).expect("a row");
    assert!(row.contains("ready") && row.contains("kernel"), "{nodes}");
    let node = json(&world.warren(&["node", "inspect", "node-1", "--format", "json"]).succeeded());
    assert_eq!(node["description"]["probes"]["lifecycle"], true);
    assert!(world.warren(&["node", "inspect", "node-1"]).succeeded().contains("timed by"));

    let version = world.warren(&["version"]).succeeded();
    let (own, manager) = version.trim().split_once('\n').expect("two lines");
    assert_eq!(
        own.split_whitespace().skip(1).collect::<Vec<_>>(),
        manager.split_whitespace().skip(1).collect::<Vec<_>>()
    );
    let version = json(&world.warren(&["version", "--format", "json"]).succeeded());
    assert!(version["warren"].is_string() && version["manager"] == version["warren"], "{version}");
    for shell in ["bash", "zsh", "fish"] {
        assert!(world.warren(&["completion", shell]).succeeded().contains("warren"), "{shell}");
    }
    // What a shell's script asks at the end of a word: options, and names as the cluster has them.
    let completed = |words: &[&str]| {
        let mut command = World::binary("warren");
        command.env("WARREN_COMPLETE", "bash").env("WARREN_MANAGER", world.manager_address());
        let index = words.len().to_string();
        command.env("_CLAP_COMPLETE_INDEX", index).env("_CLAP_IFS", "\n").args(["--", "warren"]).args(words);
        World::run(&mut command).succeeded()
    };
    assert_eq!(completed(&["service", "inspect", "we"]), "web");
    assert_eq!(completed(&["container", "logs", "web-"]), "web-1\nweb-2");
    assert_eq!(completed(&["node", "drain", ""]).lines().next(), Some("node-1"));
    assert_eq!(completed(&["secret", "rm", "nothing"]), "");
    assert!(completed(&["--manager", "unix:///nowhere", "service", "rm", "we"]).is_empty());
    assert!(completed(&["service", "ps", "--a"]).contains("--all"));

    // What the service says has reached the container.
    let (running, pid) = world.tasks().pop().expect("a task");
    assert!(listed.as_array().is_some_and(|all| all.iter().any(|container| container["id"] == running.as_str())));
    let environment = std::fs::read_to_string(format!("/proc/{pid}/environ")).expect("readable");
    assert!(environment.split('\0').any(|entry| entry == "COLOUR=blue"), "{environment}");
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("readable");
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    assert_eq!((field("Seccomp:"), field("NoNewPrivs:")), (Some("2"), Some("1")));
    // The 14 capabilities of containerd's default set.
    assert_eq!(field("CapBnd:"), Some("00000000a80425fb"));
}

#[test]
fn scaling_touches_no_container_that_stays() {
    let world = World::with_warren("scale");
    world.create("web", 3, &[], WELL_BEHAVED);
    let before = world.tasks();
    // Scaling alone touches nobody.
    let _ = world.warren(&["service", "scale", "web", "4", "--wait"]).succeeded();
    assert!(before.iter().all(|task| world.tasks().contains(task)));
    let _ = world.warren(&["service", "scale", "web", "0", "--wait"]).succeeded();
    until("nothing is left", || world.leftovers().is_empty().then_some(()));
}

#[test]
fn what_inspect_writes_can_be_applied() {
    let world = World::with_warren("written");
    let options = [
        "--env",
        "A=b: c",
        "--label",
        "tier=front",
        "--publish",
        "name=http,published=18461,target=80",
        "--limit-memory",
        "64M",
    ];
    world.create(
        "web",
        2,
        &[&options[..], &["--health", "exec:true", "--stop-timeout", "3s", "--restart-delay", "1m30s"]].concat(),
        WELL_BEHAVED,
    );
    let manifest = world.warren(&["service", "inspect", "web", "--format", "yaml"]).succeeded();
    let file = world.path("web.yaml");
    let apply = |text: &str| {
        std::fs::write(&file, text).expect("writable");
        world.warren(&["apply", "-f", &file.display().to_string(), "--wait"]).succeeded()
    };
    let before = world.tasks();
    assert_eq!(apply(&manifest), "service web unchanged\n", "{manifest}");
    assert_eq!(world.tasks(), before, "nothing is replaced");
    // It is what the service was made by.
    let _ = world.warren(&["service", "rm", "web", "--wait"]).succeeded();
    assert_eq!(apply(&manifest.replace("replicas: 2", "replicas: 1")), "service web created\n");
    assert_eq!(world.tasks().len(), 1);
    let again = world.warren(&["service", "inspect", "web", "--format", "yaml"]).succeeded();
    let spec = |text: &str| text.split("\nstatus:").next().map(str::to_owned);
    assert_eq!(spec(&again), spec(&manifest.replace("replicas: 2", "replicas: 1")));
}
