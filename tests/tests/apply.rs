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
fn errors_are_named_and_nothing_is_done() {
    let world = World::with_warren("errors");
    let good = "apiVersion: warren.io/v1\nkind: Volume\nmetadata: {name: data}\nspec: {driver: local}\n---\n";
    for (text, words) in [
        (
            "kind: Service\nmetadata: {name: x}\nspec: {image: y, replicsa: 3}",
            "manifest.yaml:9: service x: spec.replicsa: unknown field `replicsa`; allowed are image, replicas, ",
        ),
        (
            "kind: Service\nmetadata: {name: x}\nspec: {image: y, ports: [{containerPort: eighty}]}",
            "manifest.yaml:9: service x: spec.ports[0].containerPort: is to be a whole number; for example: ports: [",
        ),
        ("kind: Service\nmetadata: {name: x}\nspec: {image: y, env: [{nam: A}]}", "unknown field `nam`"),
        (
            "kind: Service\nmetadata: {name: x}\nspec: {image: y, healthCheck: {type: tcp, endpoint: web}}",
            "manifest.yaml:9: service x: spec.healthCheck.endpoint: \"web\" has no port; for example: healthCheck: {",
        ),
        (
            "kind: Service\nmetadata: {name: x}\nspec: {image: y, stopTimeout: soon}",
            "spec.stopTimeout: \"soon\" is not a duration",
        ),
        ("kind: Service\nmetadata: {nam: x}\nspec: {image: y}", "unknown field `nam`"),
        (
            "kind: Deployment\nmetadata: {name: x}\nspec: {}",
            "manifest.yaml:7: deployment x: kind: \"Deployment\" is not known",
        ),
        ("kind: Secret\nmetadata: {name: x}\nspec: {data: '*'}", "secret x: spec.data: is not base64"),
        (
            "kind: Service\nmetadata: {name: x}\nspec:\n  image: y\n  restartPolicy: 5",
            "manifest.yaml:11: service x: spec.restartPolicy: \"5\" is not any, on-failure, on-failure:ATTEMPTS or never; for \
             example: restartPolicy: on-failure, or {condition: on-failure",
        ),
        (
            "kind: Service\nmetadata: {name: x}\nspec: {image: y, command: sh}",
            "spec.command: is to be a list; for example: command: [",
        ),
        (
            "kind: Volume\nmetadata: {name: data}\nspec: {}",
            "manifest.yaml:8: volume data: metadata.name: is given twice",
        ),
        // What the manager alone knows, in the manifest's own words.
        (
            "kind: Service\nmetadata: {name: x}\nspec:\n  image: localhost/x\n  healthCheck: {type: exec}",
            "manifest.yaml:11: service x: spec.healthCheck.command: is missing, or has NUL bytes; for example: healthCheck: {",
        ),
        (
            "kind: Service\nmetadata: {name: x}\nspec:\n  image: localhost/x\n  volumes: [\"data:/data\"]\n  tmpfs: [/a, b]",
            "manifest.yaml:12: service x: spec.tmpfs[1].target: \"b\" is not an absolute path",
        ),
        (
            "kind: Service\nmetadata: {name: x}\nspec:\n  image: localhost/x\n  secrets: [none]",
            "manifest.yaml:11: service x: spec.secrets[0]: there is no secret \"none\"",
        ),
        ("kind: Service\nmetadata: {name: x}\nspec: {image: UPPER}", "manifest.yaml:9: service x: spec.image: "),
        ("kind: Service\nmetadata: {name: -x}\nspec: {image: y}", "manifest.yaml:8: service -x: metadata.name: "),
        ("kind: [", "manifest.yaml:7: "),
    ] {
        let error = apply(&world, &format!("{good}apiVersion: warren.io/v1\n{text}\n")).failed(2);
        assert!(error.contains(words), "{error} does not say {words}");
    }
    let old = apply(&world, "apiVersion: apps/v1\nkind: Volume\nmetadata: {name: x}\nspec: {}").failed(2);
    assert!(old.contains("apiVersion: \"apps/v1\" is not warren.io/v1"), "{old}");
    assert_eq!(world.warren(&["volume", "ls", "--format", "json"]).succeeded().trim(), "[]", "the good one neither");
    let _ = world.warren(&["apply", "-f", "/none/such.yaml"]).failed(1);
    // All of them at once, whichever document they are in, and what the others of the file make counts.
    let service = |name: &str, more: &str| {
        format!(
            "---\napiVersion: warren.io/v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{image: localhost/y, {more}}}\n"
        )
    };
    let several = [
        good.to_owned(),
        service("uses", "volumes: [\"data:/data\"], ports: [\"8081:80\"]"),
        service("clashes", "ports: [\"8081:80\"]"),
        service("lacks", "configs: [none]"),
    ];
    let refused = apply(&world, &several.concat());
    let (code, error) = (refused.code, refused.stderr);
    assert_eq!(code, 2, "{error}");
    for words in [
        "2 errors; nothing was changed:",
        "manifest.yaml:15: service clashes: spec.ports: port 8081/tcp is published by service \"uses\"",
        "manifest.yaml:20: service lacks: spec.configs[0]: there is no config \"none\"",
    ] {
        assert!(error.contains(words), "{error} does not say {words}");
    }
    assert_eq!(world.warren(&["volume", "ls", "--format", "json"]).succeeded().trim(), "[]");
    assert_eq!(world.warren(&["service", "ls", "--format", "json"]).succeeded().trim(), "[]");
}

#[test]
fn the_command_lines_words_are_a_manifests_too() {
    let world = World::with_warren("words");
    let text = format!(
        r#"
apiVersion: warren.io/v1
kind: Service
metadata: {{name: web}}
spec:
  image: {image}
  command: [sh, -c, "trap 'exit 0' TERM; touch /tmp/ok; httpd -p 80 -h /tmp; while :; do sleep 0.05; done"]
  ports: ["8080:80", "published=5353,target=53,protocol=udp,mode=host"]
  volumes: ["data:/data:ro", "source=data,target=/again", "/etc:/in"]
  tmpfs: [/tmp, "/scratch:size=1M,mode=0700"]
  healthCheck: http://:80/ok
  restartPolicy: on-failure:3
  stopTimeout: ~
  user:
  env:
  ports: ~
"#,
        image = image_name()
    );
    let twice = apply(&world, &text).failed(2);
    assert!(twice.contains("duplicate mapping key `ports`"), "{twice}");
    let volume = "---\napiVersion: warren.io/v1\nkind: Volume\nmetadata: {name: data}\nspec: {}\n";
    let _ = apply(&world, &(text.replace("  ports: ~\n", "") + volume)).succeeded();
    let spec = service(&world, "web")["spec"].clone();
    let protocol = |name: &str| format!("PROTOCOL_{name}");
    for (path, expected) in [
        (
            "/ports/0",
            json!({"containerPort": 80, "hostPort": 8080, "protocol": protocol("TCP"), "publishMode": "PUBLISH_MODE_INGRESS"}),
        ),
        (
            "/ports/1",
            json!({"containerPort": 53, "hostPort": 5353, "protocol": protocol("UDP"), "publishMode": "PUBLISH_MODE_HOST"}),
        ),
        (
            "/container/mounts/0",
            json!({"type": "MOUNT_TYPE_VOLUME", "source": "data", "target": "/data", "readOnly": true}),
        ),
        ("/container/mounts/1", json!({"type": "MOUNT_TYPE_VOLUME", "source": "data", "target": "/again"})),
        ("/container/mounts/2", json!({"type": "MOUNT_TYPE_BIND", "source": "/etc", "target": "/in"})),
        (
            "/container/mounts/4",
            json!({"type": "MOUNT_TYPE_TMPFS", "target": "/scratch", "sizeBytes": "1048576", "mode": 448}),
        ),
        ("/container/healthCheck", json!({"http": {"port": 80, "path": "/ok"}})),
        ("/restart", json!({"condition": "RESTART_CONDITION_ON_FAILURE", "delay": "1s", "maxAttempts": 3})),
    ] {
        assert_eq!(spec.pointer(path), Some(&expected), "{path} of {spec}");
    }
    assert_eq!(spec.pointer("/container/stopTimeout"), None);
}
