use std::collections::BTreeSet;

use warren_proto::v1;
use warren_spec::{ImageName, Policy, User};

use super::{Invalid, MAX_TEXT, MAX_TIMEOUT, invalid, text};
use crate::messages::convert;

/// The kernel's longest hostname.
const MAX_HOSTNAME: usize = 63;
/// The kernel's largest number of processes (PID_MAX_LIMIT).
const MAX_PIDS: i64 = 4 << 20;
/// containerd's limit for a label's name and value together.
const MAX_LABEL: usize = 4096;
/// A mount needs a page of memory at least, and no node has more than this.
const TMPFS_SIZES: std::ops::RangeInclusive<i64> = 4096..=1 << 50;
/// The bits that chmod(1) sets.
const MAX_MODE: u32 = 0o7777;
/// Mounts, devices and the like of one container.
const MAX_LIST: usize = 256;

/// A container's spec, checked.
pub(super) fn check(spec: Option<v1::ContainerSpec>, policy: &Policy) -> Result<v1::ContainerSpec, Invalid> {
    let mut spec = spec.unwrap_or_default();
    for mount in spec.secrets.iter_mut().chain(&mut spec.configs) {
        if mount.on_update() == v1::OnUpdate::Unspecified {
            mount.set_on_update(v1::OnUpdate::Restart);
        }
    }
    image(&spec.image)?;
    words(&spec)?;
    labels(&spec)?;
    let stop_timeout = spec.stop_timeout.as_ref().map(convert::duration);
    if stop_timeout.is_some_and(|timeout| timeout > MAX_TIMEOUT) {
        return invalid("spec.container.stop_timeout", "is longer than a day");
    }
    if !spec.stop_signal.is_empty() && warren_spec::signal(&spec.stop_signal).is_none() {
        return invalid("spec.container.stop_signal", format!("{:?} is not a signal", spec.stop_signal));
    }
    if !spec.working_dir.is_empty() && !warren_spec::absolute(&spec.working_dir) {
        return invalid("spec.container.working_dir", format!("{:?} is not an absolute path", spec.working_dir));
    }
    if !spec.user.is_empty() {
        spec.user.parse::<User>().map_err(|error| Invalid::new("spec.container.user", error.to_string()))?;
    }
    hostname(&spec.hostname)?;
    if !(0..=MAX_PIDS).contains(&spec.pids_limit) {
        let why = format!("{} is not between 0 and {MAX_PIDS}", spec.pids_limit);
        return invalid("spec.container.pids_limit", why);
    }
    for (field, names) in [
        ("spec.container.capabilities_add", &spec.capabilities_add),
        ("spec.container.capabilities_drop", &spec.capabilities_drop),
    ] {
        if let Some(name) = names.iter().find(|name| warren_spec::capability(name).is_none()) {
            return invalid(field, format!("{name:?} is not a capability"));
        }
    }
    ulimits(&spec)?;
    for (name, value) in &spec.sysctls {
        if warren_spec::sysctl(name).is_none() {
            return invalid("spec.container.sysctls", format!("{name:?} is not one of those that a container may set"));
        }
        if value.is_empty() || value.len() > 256 || value.contains(|c: char| c.is_control()) {
            return invalid("spec.container.sysctls", format!("{value:?} is not a value of {name}"));
        }
    }
    devices(&spec)?;
    mounts(&spec)?;
    network(&spec)?;
    secrets(&spec)?;
    allowed(&spec, policy)?;
    if let Some(check) = &spec.health_check {
        health(check)?;
    }
    if v1::PullPolicy::try_from(spec.pull_policy).is_err() {
        return invalid("spec.container.pull_policy", format!("{} is not known", spec.pull_policy));
    }
    Ok(spec)
}

/// What the container wants of its node, and whether it may have it.
fn allowed(spec: &v1::ContainerSpec, policy: &Policy) -> Result<(), Invalid> {
    let refused = |field: String| move |not: warren_spec::NotAllowed| Invalid::new(field, not.to_string());
    if spec.privileged {
        policy.privileged().map_err(refused("spec.container.privileged".to_owned()))?;
    }
    if spec.network() == v1::NetworkMode::Host {
        policy.host_network().map_err(refused("spec.container.network".to_owned()))?;
    }
    for name in &spec.capabilities_add {
        policy.capability(name).map_err(refused("spec.container.capabilities_add".to_owned()))?;
    }
    for (i, device) in spec.devices.iter().enumerate() {
        policy.device(&device.source).map_err(refused(format!("spec.container.devices[{i}].source")))?;
    }
    for (i, mount) in spec.mounts.iter().enumerate().filter(|(_, mount)| mount.r#type() == v1::MountType::Bind) {
        policy.host_path(&mount.source).map_err(refused(format!("spec.container.mounts[{i}].source")))?;
    }
    Ok(())
}

fn image(image: &str) -> Result<(), Invalid> {
    const FIELD: &str = "spec.container.image";
    if image.is_empty() {
        return invalid(FIELD, "is missing");
    }
    if image.len() > 255 {
        return invalid(FIELD, "is longer than 255 bytes");
    }
    image.parse::<ImageName>().map(drop).map_err(|error| Invalid::new(FIELD, error.to_string()))
}

fn variable(name: &str) -> bool {
    !name.is_empty() && !name.contains(['=', '\0'])
}

/// Command, arguments and environment: what the kernel passes to the process.
fn words(spec: &v1::ContainerSpec) -> Result<(), Invalid> {
    const LONGEST: usize = warren_spec::MAX_STRING;
    if let Some((name, _)) = spec.env.iter().find(|(name, value)| name.len() + 1 + value.len() > LONGEST) {
        return invalid("spec.container.env", format!("{name:?} is longer than {LONGEST} bytes with its name"));
    }
    for (field, words) in [("spec.container.command", &spec.command), ("spec.container.args", &spec.args)] {
        if let Some(i) = words.iter().position(|word| word.len() > LONGEST) {
            return invalid(format!("{field}[{i}]"), format!("is longer than {LONGEST} bytes"));
        }
    }
    for key in spec.env.keys() {
        if !variable(key) {
            return invalid("spec.container.env", format!("{key:?} is not a variable's name"));
        }
    }
    let words = spec.command.iter().chain(&spec.args);
    if words.map(String::len).sum::<usize>() + text(&spec.env) > MAX_TEXT {
        return invalid("spec.container", format!("command, args and env are longer than {MAX_TEXT} bytes together"));
    }
    if spec.command.iter().chain(&spec.args).chain(spec.env.values()).any(|word| word.contains('\0')) {
        return invalid("spec.container", "command, args and env cannot hold NUL bytes");
    }
    Ok(())
}

/// Prefixes of labels that the agent and containerd use themselves.
const RESERVED_LABELS: [&str; 2] = ["warren.", "containerd.io/"];

fn labels(spec: &v1::ContainerSpec) -> Result<(), Invalid> {
    const FIELD: &str = "spec.container.labels";
    for (name, value) in &spec.labels {
        if name.is_empty() || name.len() + value.len() > MAX_LABEL {
            return invalid(FIELD, format!("{name:?} is empty, or longer than {MAX_LABEL} bytes with its value"));
        }
        if RESERVED_LABELS.iter().any(|reserved| name.starts_with(reserved)) {
            return invalid(FIELD, format!("{name:?} is reserved"));
        }
    }
    if text(&spec.labels) > MAX_TEXT {
        return invalid(FIELD, format!("are longer than {MAX_TEXT} bytes together"));
    }
    Ok(())
}

fn hostname(hostname: &str) -> Result<(), Invalid> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    let ends_well = |name: &str| !name.starts_with(['-', '.']) && !name.ends_with(['-', '.']);
    if hostname.len() > MAX_HOSTNAME || !hostname.bytes().all(allowed) || !ends_well(hostname) {
        let why = format!("{hostname:?} is no hostname: at most {MAX_HOSTNAME} letters, digits, '-' and '.'");
        return invalid("spec.container.hostname", why);
    }
    Ok(())
}

fn ulimits(spec: &v1::ContainerSpec) -> Result<(), Invalid> {
    let mut seen = BTreeSet::new();
    for (name, limit) in &spec.ulimits {
        let field = format!("spec.container.ulimits[{name:?}]");
        let Some(known) = warren_spec::ulimit(name) else { return invalid(field, "there is no such limit") };
        if !seen.insert(known) {
            return invalid(field, "is given twice");
        }
        let (soft, hard) = (limit.soft, limit.hard);
        if soft < -1 || hard < -1 {
            return invalid(field, "is negative; -1 is no limit");
        }
        if hard != -1 && (soft == -1 || soft > hard) {
            return invalid(field, format!("its soft limit {soft} is above its hard limit {hard}"));
        }
    }
    Ok(())
}

fn devices(spec: &v1::ContainerSpec) -> Result<(), Invalid> {
    if spec.devices.len() > MAX_LIST {
        return invalid("spec.container.devices", format!("are more than {MAX_LIST}"));
    }
    for (i, device) in spec.devices.iter().enumerate() {
        let field = |name: &str| format!("spec.container.devices[{i}].{name}");
        for (name, path) in [("source", &device.source), ("target", &device.target)] {
            let left_out = name == "target" && path.is_empty();
            if !left_out && (!warren_spec::absolute(path) || !warren_spec::inside(path, "/dev") || path == "/dev") {
                return invalid(field(name), format!("{path:?} is not a path below /dev"));
            }
        }
        let permissions: BTreeSet<char> = device.permissions.chars().collect();
        if permissions.len() != device.permissions.len() || !permissions.iter().all(|c| "rwm".contains(*c)) {
            return invalid(field("permissions"), format!("{:?} is not some of \"rwm\"", device.permissions));
        }
    }
    Ok(())
}

/// Secrets, configs and the registry's credentials.
fn secrets(spec: &v1::ContainerSpec) -> Result<(), Invalid> {
    if !spec.registry_secret.is_empty() && !warren_spec::secret_name(&spec.registry_secret) {
        let why = format!("{:?} is not a secret's name", spec.registry_secret);
        return invalid("spec.container.registry_secret", why);
    }
    let mut variables: BTreeSet<&String> = spec.env.keys().collect();
    for (list, mounts) in [("secrets", &spec.secrets), ("configs", &spec.configs)] {
        if mounts.len() > MAX_LIST {
            return invalid(format!("spec.container.{list}"), format!("are more than {MAX_LIST}"));
        }
        let mut targets = BTreeSet::new();
        for (i, mount) in mounts.iter().enumerate() {
            let field = |name: &str| format!("spec.container.{list}[{i}].{name}");
            if !warren_spec::secret_name(&mount.source) {
                return invalid(field("source"), format!("{:?} is not a name of one", mount.source));
            }
            if !mount.env.is_empty() {
                if !variable(&mount.env) {
                    return invalid(field("env"), format!("{:?} is not a variable's name", mount.env));
                }
                if !variables.insert(&mount.env) {
                    return invalid(field("env"), format!("{:?} is given twice", mount.env));
                }
                let plain = v1::SecretMount {
                    source: mount.source.clone(),
                    env: mount.env.clone(),
                    on_update: mount.on_update,
                    ..Default::default()
                };
                if *mount != plain {
                    return invalid(field("env"), "makes it a variable: target, mode, owner and signal are for files");
                }
                if mount.on_update() == v1::OnUpdate::Signal {
                    let why = "signal is for files: a process's variables stay as they are; restart or none";
                    return invalid(field("on_update"), why);
                }
                continue;
            }
            let target = if mount.target.is_empty() { &mount.source } else { &mount.target };
            let is_path = target != "/" && warren_spec::absolute(target);
            if !is_path && !warren_spec::secret_name(target) {
                let why = format!("{target:?} is neither a file's name nor an absolute path");
                return invalid(field("target"), why);
            }
            if is_path && NOT_TARGETS.iter().any(|own| warren_spec::inside(target, own)) {
                return invalid(field("target"), format!("{target:?} is the kernel's"));
            }
            if !targets.insert(target) || spec.mounts.iter().any(|other| other.target == *target) {
                return invalid(field("target"), format!("{target:?} is given twice"));
            }
            if mount.mode > 0o777 {
                return invalid(field("mode"), "is more than 0777");
            }
            for (name, principal) in [("user", &mount.user), ("group", &mount.group)] {
                if !principal.is_empty() && (principal.contains(':') || principal.parse::<User>().is_err()) {
                    return invalid(field(name), format!("{principal:?} is neither a name nor a number"));
                }
            }
            if v1::OnUpdate::try_from(mount.on_update).is_err() {
                return invalid(field("on_update"), format!("{} is not known", mount.on_update));
            }
            if !mount.signal.is_empty() && warren_spec::signal(&mount.signal).is_none() {
                return invalid(field("signal"), format!("{:?} is not a signal", mount.signal));
            }
        }
    }
    Ok(())
}

fn health(check: &v1::HealthCheck) -> Result<(), Invalid> {
    use v1::health_check::Check;

    let field = |name: &str| format!("spec.container.health_check.{name}");
    let port = |kind: &str, port: u32| match port {
        1..=65535 => Ok(()),
        _ => invalid(field(&format!("{kind}.port")), format!("{port} is not between 1 and 65535")),
    };
    match &check.check {
        None => return invalid(field("check"), "is missing: http, tcp, exec or grpc"),
        Some(Check::Http(http)) => {
            port("http", http.port)?;
            let plain = |text: &str| text.bytes().all(|byte| (0x21..0x7f).contains(&byte));
            if !http.path.is_empty() && (!http.path.starts_with('/') || !plain(&http.path)) {
                return invalid(field("http.path"), format!("{:?} is not a path of a URL", http.path));
            }
            let is_token =
                |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
            let bad = |(name, value): &(&String, &String)| !is_token(name) || value.contains(|c: char| c.is_control());
            if let Some((name, _)) = http.headers.iter().find(bad) {
                return invalid(field("http.headers"), format!("{name:?} or its value is not of a header"));
            }
        }
        Some(Check::Tcp(tcp)) => port("tcp", tcp.port)?,
        Some(Check::Grpc(grpc)) => port("grpc", grpc.port)?,
        Some(Check::Exec(exec)) => {
            if exec.command.is_empty() || exec.command.iter().any(|word| word.contains('\0')) {
                return invalid(field("exec.command"), "is missing, or has NUL bytes");
            }
        }
    }
    for (name, wire) in
        [("interval", &check.interval), ("timeout", &check.timeout), ("start_period", &check.start_period)]
    {
        let Some(wire) = wire else { continue };
        let duration = convert::duration(wire);
        if wire.seconds < 0 || wire.nanos < 0 || duration > MAX_TIMEOUT {
            return invalid(field(name), "is not between 0 and a day");
        }
        if name != "start_period" && !duration.is_zero() && duration < std::time::Duration::from_millis(100) {
            return invalid(field(name), "is less than 100 ms");
        }
    }
    if check.retries > 100 {
        return invalid(field("retries"), "is more than 100");
    }
    Ok(())
}

fn network(spec: &v1::ContainerSpec) -> Result<(), Invalid> {
    let Ok(mode) = v1::NetworkMode::try_from(spec.network) else {
        return invalid("spec.container.network", format!("{} is not known", spec.network));
    };
    let of_network = spec.sysctls.keys().find(|name| warren_spec::sysctl(name).is_some_and(|known| known.network));
    match of_network {
        Some(name) if mode == v1::NetworkMode::Host => {
            invalid("spec.container.sysctls", format!("{name} would be the node's own: its network is the node's"))
        }
        _ => Ok(()),
    }
}

/// The kernel's own file systems, which a mount would break.
const NOT_TARGETS: [&str; 2] = ["/proc", "/sys"];

fn mounts(spec: &v1::ContainerSpec) -> Result<(), Invalid> {
    if spec.mounts.len() > MAX_LIST {
        return invalid("spec.container.mounts", format!("are more than {MAX_LIST}"));
    }
    let mut targets = BTreeSet::new();
    for (i, mount) in spec.mounts.iter().enumerate() {
        let field = |name: &str| format!("spec.container.mounts[{i}].{name}");
        let target = mount.target.as_str();
        if !warren_spec::absolute(target) || target == "/" {
            return invalid(field("target"), format!("{target:?} is not an absolute path other than /"));
        }
        if NOT_TARGETS.iter().any(|own| warren_spec::inside(target, own)) {
            return invalid(field("target"), format!("{target:?} is the kernel's"));
        }
        if !targets.insert(target) {
            return invalid(field("target"), format!("{target:?} is mounted twice"));
        }
        let kind = v1::MountType::try_from(mount.r#type).unwrap_or_default();
        match kind {
            v1::MountType::Unspecified => return invalid(field("type"), "is missing or not known"),
            v1::MountType::Bind if !warren_spec::absolute(&mount.source) => {
                return invalid(field("source"), format!("{:?} is not an absolute path", mount.source));
            }
            v1::MountType::Tmpfs if !mount.source.is_empty() => {
                return invalid(field("source"), "a tmpfs has none");
            }
            v1::MountType::Volume if !warren_spec::secret_name(&mount.source) => {
                return invalid(field("source"), format!("{:?} is not a volume's name", mount.source));
            }
            v1::MountType::Tmpfs | v1::MountType::Bind | v1::MountType::Volume => {}
        }
        let is_tmpfs = kind == v1::MountType::Tmpfs;
        if mount.size_bytes != 0 && (!is_tmpfs || !TMPFS_SIZES.contains(&mount.size_bytes)) {
            return invalid(field("size_bytes"), "is for a tmpfs, from 4096 on");
        }
        if mount.mode != 0 && (!is_tmpfs || mount.mode > MAX_MODE) {
            return invalid(field("mode"), "is for a tmpfs: permission bits up to 07777");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> v1::ContainerSpec {
        v1::ContainerSpec { image: "nginx".to_owned(), ..Default::default() }
    }

    fn refused(change: impl FnOnce(&mut v1::ContainerSpec)) -> String {
        let mut spec = spec();
        change(&mut spec);
        check(Some(spec), &Policy::default()).expect_err("refused").field.into_owned()
    }

    fn tmpfs(target: &str) -> v1::Mount {
        v1::Mount { r#type: v1::MountType::Tmpfs.into(), target: target.to_owned(), ..Default::default() }
    }

    fn pair<V>(name: &str, value: V) -> std::collections::BTreeMap<String, V> {
        [(name.to_owned(), value)].into()
    }

    #[test]
    fn every_field_is_checked_and_named() {
        assert!(check(None, &Policy::default()).is_err_and(|error| error.field == "spec.container.image"));
        for image in ["UPPER", "a b", "nginx:", &"a".repeat(256)] {
            assert_eq!(refused(|spec| spec.image = image.to_owned()), "spec.container.image", "{image}");
        }
        assert_eq!(refused(|spec| spec.env = pair("A=B", String::new())), "spec.container.env");
        assert_eq!(refused(|spec| spec.env = pair("A", "x".repeat(131_070))), "spec.container.env");
        assert_eq!(refused(|spec| spec.args = vec!["x".repeat(131_072)]), "spec.container.args[0]");
        assert_eq!(refused(|spec| spec.args = vec!["a\0".to_owned()]), "spec.container");
        assert_eq!(refused(|spec| spec.stop_signal = "NOPE".to_owned()), "spec.container.stop_signal");
        for directory in ["relative", "/a/../b"] {
            assert_eq!(refused(|spec| spec.working_dir = directory.to_owned()), "spec.container.working_dir");
        }
        assert_eq!(refused(|spec| spec.user = "a b".to_owned()), "spec.container.user");
        assert_eq!(refused(|spec| spec.labels = pair("warren.service", String::new())), "spec.container.labels");
        for hostname in ["-a", "a_b", &"a".repeat(64)] {
            assert_eq!(refused(|spec| spec.hostname = hostname.to_owned()), "spec.container.hostname");
        }
        assert_eq!(refused(|spec| spec.pids_limit = -1), "spec.container.pids_limit");
        assert_eq!(refused(|spec| spec.privileged = true), "spec.container.privileged");
        assert_eq!(refused(|spec| spec.capabilities_add = vec!["NOPE".to_owned()]), "spec.container.capabilities_add");
        assert_eq!(
            refused(|spec| spec.capabilities_drop = vec!["NOPE".to_owned()]),
            "spec.container.capabilities_drop"
        );
        for (name, soft, hard) in [("files", 1, 1), ("nofile", 2, 1), ("nofile", -2, 1), ("nofile", -1, 1)] {
            let field = refused(|spec| spec.ulimits = pair(name, v1::Ulimit { soft, hard }));
            assert_eq!(field, format!("spec.container.ulimits[{name:?}]"));
        }
        assert_eq!(refused(|spec| spec.sysctls = pair("kernel.panic", "1".to_owned())), "spec.container.sysctls");
        for source in ["/etc/passwd", "/dev", "/dev/../etc", "null"] {
            let device = v1::Device { source: source.to_owned(), ..Default::default() };
            assert_eq!(refused(|spec| spec.devices = vec![device]), "spec.container.devices[0].source", "{source}");
        }
        let device = v1::Device { source: "/dev/null".to_owned(), permissions: "rx".to_owned(), ..Default::default() };
        assert_eq!(refused(|spec| spec.devices = vec![device]), "spec.container.devices[0].permissions");
        for target in ["", "relative", "/", "/proc/x", "/sys", "/a/../b"] {
            let field = refused(|spec| spec.mounts = vec![tmpfs(target)]);
            assert_eq!(field, "spec.container.mounts[0].target", "{target}");
        }
        assert_eq!(refused(|spec| spec.mounts = vec![tmpfs("/a"), tmpfs("/a")]), "spec.container.mounts[1].target");
        let mount = v1::Mount { r#type: v1::MountType::Bind.into(), ..tmpfs("/a") };
        assert_eq!(refused(|spec| spec.mounts = vec![mount]), "spec.container.mounts[0].source");
        let mount = v1::Mount { r#type: 0, ..tmpfs("/a") };
        assert_eq!(refused(|spec| spec.mounts = vec![mount]), "spec.container.mounts[0].type");
        let mount = v1::Mount { size_bytes: 1, ..tmpfs("/a") };
        assert_eq!(refused(|spec| spec.mounts = vec![mount]), "spec.container.mounts[0].size_bytes");
        for source in ["", "../../etc/shadow", "a/b", ".."] {
            let mount = v1::SecretMount { source: source.to_owned(), ..Default::default() };
            assert_eq!(refused(|spec| spec.secrets = vec![mount.clone()]), "spec.container.secrets[0].source");
            assert_eq!(refused(|spec| spec.configs = vec![mount]), "spec.container.configs[0].source");
        }
        for target in ["../x", "a/b", "/proc/x", "/a/../b", "/"] {
            let mount = v1::SecretMount { source: "s".to_owned(), target: target.to_owned(), ..Default::default() };
            assert_eq!(refused(|spec| spec.secrets = vec![mount]), "spec.container.secrets[0].target", "{target}");
        }
        let mount = v1::SecretMount { source: "s".to_owned(), ..Default::default() };
        assert_eq!(refused(|spec| spec.secrets = vec![mount.clone(), mount]), "spec.container.secrets[1].target");
        assert_eq!(refused(|spec| spec.registry_secret = "../x".to_owned()), "spec.container.registry_secret");
        let check = |check| Some(v1::HealthCheck { check, ..Default::default() });
        let http = |port, path: &str| {
            let http = v1::HttpCheck { port, path: path.to_owned(), ..Default::default() };
            check(Some(v1::health_check::Check::Http(http)))
        };
        for (wrong, field) in [
            (check(None), "check"),
            (http(0, ""), "http.port"),
            (http(80, "no slash"), "http.path"),
            (check(Some(v1::health_check::Check::Tcp(v1::TcpCheck { port: 65536 }))), "tcp.port"),
            (check(Some(v1::health_check::Check::Exec(v1::ExecCheck::default()))), "exec.command"),
            (http(80, "/").map(|check| v1::HealthCheck { retries: 101, ..check }), "retries"),
        ] {
            assert_eq!(refused(|spec| spec.health_check = wrong), format!("spec.container.health_check.{field}"));
        }
        let host = |spec: &mut v1::ContainerSpec| {
            spec.network = v1::NetworkMode::Host.into();
            spec.sysctls = pair("net.core.somaxconn", "1".to_owned());
        };
        assert_eq!(refused(host), "spec.container.sysctls");
        assert_eq!(refused(|spec| spec.network = 99), "spec.container.network");
        assert_eq!(refused(|spec| spec.network = v1::NetworkMode::Host.into()), "spec.container.network");
        assert_eq!(
            refused(|spec| spec.capabilities_add = vec!["chown".to_owned(), "ALL".to_owned()]),
            "spec.container.capabilities_add"
        );
        let device = v1::Device { source: "/dev/fuse".to_owned(), ..Default::default() };
        assert_eq!(refused(|spec| spec.devices = vec![device]), "spec.container.devices[0].source");
        let mount = v1::Mount { r#type: v1::MountType::Bind.into(), source: "/".to_owned(), ..tmpfs("/a") };
        assert_eq!(refused(|spec| spec.mounts = vec![mount]), "spec.container.mounts[0].source");
        let mount = v1::Mount { mode: 0o10000, ..tmpfs("/a") };
        assert_eq!(refused(|spec| spec.mounts = vec![mount]), "spec.container.mounts[0].mode");
    }

    #[test]
    fn what_is_right_passes_as_it_is() {
        let spec = v1::ContainerSpec {
            user: "www-data:33".to_owned(),
            working_dir: "/srv".to_owned(),
            capabilities_add: vec!["cap_net_admin".to_owned()],
            capabilities_drop: vec!["ALL".to_owned()],
            ulimits: pair("nofile", v1::Ulimit { soft: 100, hard: -1 }),
            sysctls: pair("net.core.somaxconn", "1024".to_owned()),
            mounts: vec![tmpfs("/tmp")],
            privileged: true,
            ..spec()
        };
        assert_eq!(check(Some(spec.clone()), &Policy::everything()), Ok(spec));
    }
}
