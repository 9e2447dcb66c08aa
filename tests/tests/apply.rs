//! Manifests: every documented key reaches the service, and what is not documented is refused.

use std::fs;

use serde_json::{Value, json};
use warren_tests::{Inside, Output, World, image_name};

fn apply(world: &World, text: &str) -> Output {
    let file = world.path("manifest.yaml");
    fs::write(&file, text).expect("writable");
    world.warren(&["apply", "-f", &file.display().to_string(), "--wait"])
}

fn service(world: &World, name: &str) -> Value {
    let shown = world.warren(&["service", "inspect", name, "--format", "json"]).succeeded();
    serde_json::from_str(&shown).expect("JSON")
}

#[test]
fn what_a_manifest_says_is_what_runs() {
    let world = World::with_warren("apply");
    let text = format!(
        r#"
apiVersion: warren.io/v1
kind: Service
metadata: {{name: web, labels: {{app: web}}}}
spec:
  image: {image}
  replicas: 2
  mode: replicated
  command: [sh, -c]
  args: ["trap 'exit 0' TERM; touch /tmp/ok; httpd -p 80 -h /tmp; while :; do sleep 0.05; done"]
  env: [{{name: PORT, value: 80}}, {{name: LEVEL, value: NO}}, {{name: VERSION, value: 1.10}}]
  labels: {{team: blue}}
  user: "0"
  workingDir: /tmp
  stopSignal: TERM
  stopTimeout: 7
  ports: [{{name: http, containerPort: 80, hostPort: 8080, protocol: tcp, publishMode: ingress}}]
  secrets: [db-password, {{source: db-password, target: /etc/pw, mode: 0440, onUpdate: restart}}]
  volumes:
    - {{source: pg-data, target: /data, readOnly: false}}
    - {{source: /etc/hostname, target: /in/hostname, readOnly: true}}
  tmpfs: [{{target: /scratch, size: 1M, mode: "0700"}}]
  healthCheck: {{type: http, endpoint: "http://localhost:80/ok", interval: 1s, timeout: 5s, retries: 3, startPeriod: 10s}}
  resources:
    limits: {{cpuShares: 512, memoryBytes: 67108864}}
    reservations: {{cpus: 0.125, memory: 32M}}
    pids: 100
  restartPolicy: {{condition: on-failure, maxAttempts: 3, delay: 5s}}
  ulimits: {{nofile: {{soft: 100, hard: 200}}, core: 0}}
  capDrop: [CHOWN]
---
apiVersion: warren.io/v1
kind: Secret
metadata: {{name: db-password}}
spec: {{type: Opaque, data: cGFzc3dvcmQxMjM=}}
---
apiVersion: v1
kind: Volume
metadata: {{name: pg-data}}
spec: {{driver: local, driverOpts: {{}}}}
"#,
        image = image_name()
    );
    let first = apply(&world, &text).succeeded();
    assert_eq!(apply(&world, &text).succeeded(), first.replace("created", "unchanged"));
    assert_eq!(first, "secret db-password created\nvolume pg-data created\nservice web created\n");
    let spec = service(&world, "web")["spec"].clone();
    for (path, expected) in [
        ("/labels", json!({"app": "web"})),
        ("/replicated/replicas", json!("2")),
        ("/container/env", json!({"PORT": "80", "LEVEL": "NO", "VERSION": "1.10"})),
        ("/container/labels", json!({"team": "blue"})),
        ("/container/stopTimeout", json!("7s")),
        ("/container/healthCheck/http", json!({"port": 80, "path": "/ok"})),
        ("/container/healthCheck/startPeriod", json!("10s")),
        ("/container/pidsLimit", json!("100")),
        ("/container/capabilitiesDrop", json!(["CHOWN"])),
        ("/resources/limits", json!({"cpuMillis": "500", "memoryBytes": "67108864"})),
        ("/resources/reservations", json!({"cpuMillis": "125", "memoryBytes": "33554432"})),
        ("/restart", json!({"condition": "RESTART_CONDITION_ON_FAILURE", "delay": "5s", "maxAttempts": 3})),
        (
            "/ports",
            json!([{"name": "http", "containerPort": 80, "hostPort": 8080, "protocol": "PROTOCOL_TCP",
                    "publishMode": "PUBLISH_MODE_INGRESS"}]),
        ),
    ] {
        assert_eq!(spec.pointer(path), Some(&expected), "{path} of {spec}");
    }
    let inside = &Inside::all(&world, "web")[0];
    let read = |path: &str| fs::read_to_string(format!("/proc/{}/root{path}", inside.pid)).expect("readable");
    assert_eq!(
        (read("/run/secrets/db-password"), read("/etc/pw")),
        ("password123".to_owned(), "password123".to_owned())
    );
    assert!(inside.mount("/scratch").contains("size=1024k") && !read("/in/hostname").is_empty());
    assert_eq!(inside.shell(&world, "touch /data/there").0, 0);

    // Again it is as it was: nothing is replaced. With the other form of variables, and a directory.
    let containers = || Inside::all(&world, "web").into_iter().map(|container| container.id).collect::<Vec<_>>();
    let before = containers();
    let other = text.replace(
        "[{name: PORT, value: 80}, {name: LEVEL, value: NO}, {name: VERSION, value: 1.10}]",
        "{PORT: 80, LEVEL: NO, VERSION: 1.10}",
    );
    assert_ne!(other, text);
    let directory = world.path("manifests");
    fs::create_dir(&directory).expect("writable");
    let only_service = other.split("\n---").next().expect("a document");
    fs::write(directory.join("web.yml"), only_service).expect("writable");
    fs::write(directory.join("README"), "not a manifest").expect("writable");
    let again = world.warren(&["apply", "-f", &directory.display().to_string()]).succeeded();
    assert_eq!(again, "service web unchanged\n");
    assert_eq!(containers(), before);
    let changed = apply(&world, &only_service.replace("replicas: 2", "replicas: 1")).succeeded();
    assert_eq!(changed, "service web updated\n");
    assert_eq!(containers().len(), 1);
}

#[test]
fn mistakes_are_named_and_nothing_is_done() {
    let world = World::with_warren("mistakes");
    let good = "apiVersion: warren.io/v1\nkind: Volume\nmetadata: {name: data}\nspec: {driver: local}\n---\n";
    for (text, words) in [
        (
            "kind: Service\nmetadata: {name: x}\nspec: {image: y, replicsa: 3}",
            "Service x: line 9 column 18: unknown field `replicsa`",
        ),
        ("kind: Service\nmetadata: {name: x}\nspec: {image: y, ports: [{containerPort: eighty}]}", "Service x: line 9"),
        ("kind: Service\nmetadata: {name: x}\nspec: {image: y, env: [{nam: A}]}", "unknown field `nam`"),
        (
            "kind: Service\nmetadata: {name: x}\nspec: {image: y, healthCheck: {type: tcp, endpoint: web}}",
            "healthCheck.endpoint",
        ),
        ("kind: Service\nmetadata: {name: x}\nspec: {image: y, stopTimeout: soon}", "\"soon\" is not a duration"),
        ("kind: Service\nmetadata: {nam: x}\nspec: {image: y}", "unknown field `nam`"),
        ("kind: Deployment\nmetadata: {name: x}\nspec: {}", "Deployment x: the kind is not known"),
        ("kind: Secret\nmetadata: {name: x}\nspec: {data: '*'}", "Secret x: spec.data: is not base64"),
        ("kind: [", "manifest.yaml: "),
    ] {
        let error = apply(&world, &format!("{good}apiVersion: warren.io/v1\n{text}\n")).failed(2);
        assert!(error.contains(words), "{error} does not say {words}");
    }
    let old = apply(&world, "apiVersion: apps/v1\nkind: Volume\nmetadata: {name: x}\nspec: {}").failed(2);
    assert!(old.contains("apiVersion: \"apps/v1\" is not warren.io/v1"), "{old}");
    assert_eq!(world.warren(&["volume", "ls", "--format", "json"]).succeeded().trim(), "[]", "the good one neither");
    let _ = world.warren(&["apply", "-f", "/none/such.yaml"]).failed(1);
}
