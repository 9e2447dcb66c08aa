//! A service as the manifest that would make it so: what `apply` reads, written.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use warren_proto::v1::{self, health_check::Check, service_spec::Mode};

/// A point in time in UTC, to the second, as RFC 3339 has it.
pub fn time(time: &pbjson_types::Timestamp) -> String {
    let at = time::OffsetDateTime::from_unix_timestamp(time.seconds).unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    at.format(&time::format_description::well_known::Rfc3339).unwrap_or_default()
}

/// A service as a manifest, without what goes without saying; under `status`, which `apply` passes over, what is known of it.
pub fn manifest_of(service: &v1::Service) -> Value {
    let v1::Service { id, version, created_at, updated_at, spec, status, virtual_addresses, revision } =
        service.clone();
    let spec = spec.unwrap_or_default();
    let metadata = Keys::default().text("name", spec.name.clone()).pairs("labels", spec.labels.clone());
    let status = status.unwrap_or_default();
    let status = json!({
        "id": id,
        "version": version,
        "revision": revision,
        "createdAt": created_at.as_ref().map(time),
        "updatedAt": updated_at.as_ref().map(time),
        "virtualAddresses": virtual_addresses,
        "desired": status.desired,
        "running": status.running,
        "imageDigest": spec.container.as_ref().map(|container| container.image_digest.clone()),
    });
    json!({
        "apiVersion": "warren.io/v1",
        "kind": "Service",
        "metadata": metadata.0,
        "spec": spec_of(spec),
        "status": status,
    })
}

/// A map in the making. What says nothing is left out.
#[derive(Debug, Default)]
struct Keys(Map<String, Value>);

impl Keys {
    fn any(mut self, key: &str, value: Option<Value>) -> Self {
        if let Some(value) = value {
            self.0.insert(key.to_owned(), value);
        }
        self
    }

    fn text(self, key: &str, text: String) -> Self {
        self.any(key, Some(text).filter(|text| !text.is_empty()).map(Value::String))
    }

    fn list(self, key: &str, list: impl IntoIterator<Item = impl Into<Value>>) -> Self {
        let list: Vec<Value> = list.into_iter().map(Into::into).collect();
        self.any(key, Some(list).filter(|list| !list.is_empty()).map(Value::Array))
    }

    fn pairs(self, key: &str, pairs: BTreeMap<String, String>) -> Self {
        self.map(key, pairs.into_iter().map(|(name, value)| (name, Value::String(value))).collect())
    }

    fn map(self, key: &str, map: Map<String, Value>) -> Self {
        self.any(key, Some(map).filter(|map| !map.is_empty()).map(Value::Object))
    }

    fn number(self, key: &str, number: impl Into<i64>) -> Self {
        let number = number.into();
        self.any(key, (number != 0).then(|| json!(number)))
    }

    fn yes(self, key: &str, is_so: bool) -> Self {
        self.any(key, is_so.then_some(Value::Bool(true)))
    }

    fn duration(self, key: &str, duration: Option<pbjson_types::Duration>) -> Self {
        self.any(key, duration.map(|duration| Value::String(duration_of(&duration))))
    }

    /// Permission bits, 0 being what goes without saying.
    fn mode(self, key: &str, mode: u32) -> Self {
        self.any(key, (mode != 0).then(|| Value::String(format!("{mode:04o}"))))
    }

    fn bytes(self, key: &str, bytes: i64) -> Self {
        self.any(key, (bytes != 0).then(|| Value::String(bytes_of(bytes))))
    }
}

/// `90s`, `500ms`.
fn duration_of(duration: &pbjson_types::Duration) -> String {
    let nanos = i128::from(duration.seconds) * 1_000_000_000 + i128::from(duration.nanos);
    match (nanos % 1_000_000_000, nanos % 1_000_000) {
        (0, _) => format!("{}s", nanos / 1_000_000_000),
        (_, 0) => format!("{}ms", nanos / 1_000_000),
        _ => format!("{}s", nanos as f64 / 1e9),
    }
}

/// In the largest unit that is exact.
fn bytes_of(bytes: i64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    let exact = units.iter().find(|(shift, _)| bytes % (1_i64 << shift) == 0);
    exact.map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

// Every field is named: one that is new does not compile until it is written, or said to be nothing that people write.
fn spec_of(spec: v1::ServiceSpec) -> Map<String, Value> {
    let endpoint_mode = spec.endpoint_mode();
    let v1::ServiceSpec {
        name: _,
        labels: _,
        mode,
        container,
        resources,
        restart,
        ports,
        endpoint_mode: _,
        constraints,
        lost_after,
    } = spec;
    let container = container.unwrap_or_default();
    let (network, pull_policy) = (container.network(), container.pull_policy());
    let v1::ContainerSpec {
        image,
        command,
        args,
        env,
        stop_signal,
        stop_timeout,
        working_dir,
        user,
        labels,
        hostname,
        read_only,
        init,
        capabilities_add,
        capabilities_drop,
        ulimits,
        sysctls,
        devices,
        privileged,
        pids_limit,
        mounts,
        network: _,
        pull_policy: _,
        // Found by the manager.
        image_digest: _,
        health_check,
        secrets,
        configs,
        registry_secret,
        no_new_privileges,
    } = container;
    let keys = match mode {
        Some(Mode::Global(v1::Global {})) => Keys::default().text("mode", "global".to_owned()),
        Some(Mode::Replicated(v1::Replicated { replicas })) => Keys::default().any("replicas", Some(json!(replicas))),
        None => Keys::default(),
    };
    let ulimit = |(name, v1::Ulimit { soft, hard })| (name, json!({"soft": soft, "hard": hard}));
    let (tmpfs, volumes): (Vec<_>, Vec<_>) =
        mounts.into_iter().partition(|mount| mount.r#type() == v1::MountType::Tmpfs);
    keys.text("image", image)
        .list("command", command)
        .list("args", args)
        .pairs("env", env)
        .text("stopSignal", stop_signal)
        .duration("stopTimeout", stop_timeout)
        .text("workingDir", working_dir)
        .text("user", user)
        .pairs("labels", labels)
        .text("hostname", hostname)
        .yes("readOnly", read_only)
        .yes("init", init)
        .list("capAdd", capabilities_add)
        .list("capDrop", capabilities_drop)
        .map("ulimits", ulimits.into_iter().map(ulimit).collect())
        .pairs("sysctls", sysctls)
        .list("devices", devices.into_iter().map(device_of))
        .yes("privileged", privileged)
        .any("noNewPrivileges", no_new_privileges.map(Value::Bool))
        .list("volumes", volumes.into_iter().map(volume_of))
        .list("tmpfs", tmpfs.into_iter().map(tmpfs_of))
        .any(
            "network",
            match network {
                v1::NetworkMode::Host => Some("host".into()),
                v1::NetworkMode::None => Some("none".into()),
                v1::NetworkMode::Cluster | v1::NetworkMode::Unspecified => None,
            },
        )
        .any(
            "pullPolicy",
            match pull_policy {
                v1::PullPolicy::Always => Some("Always".into()),
                v1::PullPolicy::Never => Some("Never".into()),
                v1::PullPolicy::IfNotPresent | v1::PullPolicy::Unspecified => None,
            },
        )
        .any("healthCheck", health_check.and_then(check_of))
        .list("secrets", secrets.into_iter().map(secret_of))
        .list("configs", configs.into_iter().map(secret_of))
        .text("registrySecret", registry_secret)
        .map("resources", resources_of(resources.unwrap_or_default(), pids_limit))
        .any("restartPolicy", restart.map(restart_of))
        .list("ports", ports.into_iter().map(port_of))
        .any("endpointMode", (endpoint_mode == v1::EndpointMode::Vip).then(|| "vip".into()))
        .list("constraints", constraints)
        .duration("lostAfter", lost_after)
        .0
}

fn device_of(v1::Device { source, target, permissions }: v1::Device) -> String {
    match (target.as_str(), permissions.as_str()) {
        ("", "") => source,
        (target, "") => format!("{source}:{target}"),
        (target, permissions) => format!("{source}:{target}:{permissions}"),
    }
}

fn volume_of(
    v1::Mount { r#type: _, source, target, read_only, size_bytes: _, mode: _ }: v1::Mount,
) -> Map<String, Value> {
    Keys::default().text("source", source).text("target", target).yes("readOnly", read_only).0
}

fn tmpfs_of(
    v1::Mount { r#type: _, source: _, target, read_only: _, size_bytes, mode }: v1::Mount,
) -> Map<String, Value> {
    Keys::default().text("target", target).bytes("size", size_bytes).mode("mode", mode).0
}

fn check_of(check: v1::HealthCheck) -> Option<Value> {
    let v1::HealthCheck { check, interval, timeout, retries, start_period } = check;
    let endpoint = |scheme: &str, port: u32, path: &str| format!("{scheme}://localhost:{port}{path}");
    let keys = match check? {
        Check::Http(v1::HttpCheck { port, path, tls, headers }) => {
            let scheme = if tls { "https" } else { "http" };
            let keys = Keys::default().text("type", scheme.to_owned()).text("endpoint", endpoint(scheme, port, &path));
            keys.pairs("headers", headers)
        }
        Check::Tcp(v1::TcpCheck { port }) => {
            Keys::default().text("type", "tcp".to_owned()).text("endpoint", endpoint("tcp", port, ""))
        }
        Check::Grpc(v1::GrpcCheck { port, service }) => {
            let path = if service.is_empty() { String::new() } else { format!("/{service}") };
            Keys::default().text("type", "grpc".to_owned()).text("endpoint", endpoint("grpc", port, &path))
        }
        Check::Exec(v1::ExecCheck { command }) => {
            Keys::default().text("type", "exec".to_owned()).list("command", command)
        }
    };
    let keys = keys.duration("interval", interval).duration("timeout", timeout).number("retries", retries);
    Some(Value::Object(keys.duration("startPeriod", start_period).0))
}

fn secret_of(secret: v1::SecretMount) -> Map<String, Value> {
    let on_update = secret.on_update();
    let v1::SecretMount { source, target, mode, uid, gid, on_update: _, signal, user, group, env } = secret;
    let whose = |name: String, number: u32| if name.is_empty() && number != 0 { number.to_string() } else { name };
    let on_update = match on_update {
        v1::OnUpdate::None => "none",
        v1::OnUpdate::Signal => "signal",
        v1::OnUpdate::Restart | v1::OnUpdate::Unspecified => "",
    };
    Keys::default()
        .text("source", source)
        .text("target", target)
        .mode("mode", mode)
        .text("uid", whose(user, uid))
        .text("gid", whose(group, gid))
        .text("onUpdate", on_update.to_owned())
        .text("signal", signal)
        .text("env", env)
        .0
}

fn resources_of(resources: v1::Resources, pids: i64) -> Map<String, Value> {
    let v1::Resources { reservations, limits } = resources;
    let amounts = |amounts: Option<v1::ResourceAmounts>| {
        let v1::ResourceAmounts { cpu_millis, memory_bytes } = amounts.unwrap_or_default();
        let cpus = (cpu_millis != 0).then(|| Value::String(format!("{}", cpu_millis as f64 / 1000.0)));
        Keys::default().any("cpus", cpus).bytes("memory", memory_bytes).0
    };
    Keys::default().map("reservations", amounts(reservations)).map("limits", amounts(limits)).number("pids", pids).0
}

fn restart_of(policy: v1::RestartPolicy) -> Value {
    let condition = match policy.condition() {
        v1::RestartCondition::Any | v1::RestartCondition::Unspecified => "any",
        v1::RestartCondition::OnFailure => "on-failure",
        v1::RestartCondition::Never => "never",
    };
    let v1::RestartPolicy { condition: _, delay, max_attempts } = policy;
    let keys = Keys::default().text("condition", condition.to_owned()).duration("delay", delay);
    Value::Object(keys.number("maxAttempts", max_attempts).0)
}

fn port_of(port: v1::Port) -> Map<String, Value> {
    let (protocol, mode) = (port.protocol(), port.publish_mode());
    let v1::Port { name, container_port, host_port, protocol: _, publish_mode: _ } = port;
    Keys::default()
        .text("name", name)
        .number("containerPort", container_port)
        .number("hostPort", host_port)
        .any("protocol", (protocol == v1::Protocol::Udp).then(|| "udp".into()))
        .any("publishMode", (mode == v1::PublishMode::Host).then(|| "host".into()))
        .0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Object, Source, object};

    /// Every key of the documented manifest.
    const FULL: &str = r#"
apiVersion: warren.io/v1
kind: Service
metadata: {name: full, labels: {tier: front, version: "1.10"}}
spec:
  image: registry.example.org/app:1.2
  replicas: 0
  command: [/bin/app, "--flag=a b"]
  args: ["no", "1", ""]
  env: {PORT: "8080", EMPTY: "", MULTI: "a\nb: c"}
  labels: {of: container}
  workingDir: /srv
  user: "1000:www-data"
  hostname: app
  readOnly: true
  init: true
  capAdd: [NET_ADMIN]
  capDrop: [ALL]
  ulimits: {nofile: {soft: 1024, hard: -1}}
  sysctls: {net.core.somaxconn: "512"}
  devices: ["/dev/fuse", "/dev/a:/dev/b", "/dev/a::r"]
  privileged: true
  noNewPrivileges: false
  stopSignal: SIGQUIT
  stopTimeout: 1500ms
  ports:
    - {name: http, containerPort: 80, hostPort: 8080}
    - {containerPort: 53, hostPort: 53, protocol: udp, publishMode: host}
  endpointMode: vip
  network: host
  secrets: [plain, {source: s, target: /run/s, mode: "0440", uid: www-data, gid: "33", onUpdate: signal, signal: HUP}]
  configs: [{source: c, onUpdate: none}]
  registrySecret: pull
  pullPolicy: Always
  volumes: ["data:/data:ro", "/srv/files:/files"]
  tmpfs: ["/tmp:size=64M,mode=1777", /run]
  healthCheck: {type: http, endpoint: "http://localhost:80/up?x=1", headers: {Host: a.b}, interval: 1m, timeout: 2s, retries: 4, startPeriod: 250ms}
  resources: {reservations: {cpus: 0.25, memory: 100000}, limits: {cpus: 2, memory: 3G}, pids: 100}
  restartPolicy: {condition: on-failure, delay: 2s, maxAttempts: 3}
  constraints: ["node.labels.zone==a"]
  lostAfter: 2m
"#;

    fn parsed(text: &str) -> v1::ServiceSpec {
        let source = Source { file: "m.yaml".into(), lines_before: 0, text: text.to_owned() };
        match object(&source).1 {
            Ok(Object::Service(spec)) => *spec,
            Ok(_) => panic!("not a service"),
            Err(invalid) => panic!("{}", invalid.shown(&source, "")),
        }
    }

    fn written(spec: v1::ServiceSpec) -> String {
        serde_saphyr::to_string(&manifest_of(&v1::Service { spec: Some(spec), ..Default::default() })).expect("YAML")
    }

    #[test]
    fn what_is_written_is_read_as_what_it_was() {
        let global = "apiVersion: v1\nkind: Service\nmetadata: {name: g}\nspec: {image: a, mode: global}";
        let checks = ["tcp://:5432", "grpc://:50051/a.B", "grpc://:1", "https://:443/", "exec:pg_isready -q"];
        let checked = checks.map(|check| {
            format!("apiVersion: v1\nkind: Service\nmetadata: {{name: c}}\nspec: {{image: a, healthCheck: {check:?}}}")
        });
        for text in [FULL, global].into_iter().chain(checked.iter().map(String::as_str)) {
            let spec = parsed(text);
            let yaml = written(spec.clone());
            assert_eq!(parsed(&yaml), spec, "{yaml}");
        }
        // The one above has them all: what a manifest has no key for would be lost here.
        let keys = manifest_of(&v1::Service { spec: Some(parsed(FULL)), ..Default::default() });
        let keys = keys["spec"].as_object().expect("a map").keys().cloned().collect::<Vec<_>>();
        let said = FULL.lines().filter_map(|line| line.strip_prefix("  ")?.split_once(':')).map(|(key, _)| key);
        let mut said: Vec<_> = said.filter(|key| !key.starts_with(' ')).collect();
        said.sort_unstable();
        assert_eq!(keys, said);
    }

    #[test]
    fn little_is_written_of_a_service_that_says_little() {
        let text = "apiVersion: v1\nkind: Service\nmetadata: {name: g}\nspec: {image: a}";
        assert_eq!(Value::Object(spec_of(parsed(text))), json!({"image": "a", "replicas": 1}));
        assert_eq!(bytes_of(64 << 20), "64M");
        assert_eq!(bytes_of(3 << 30), "3G");
        assert_eq!(bytes_of(1500), "1500");
    }
}
