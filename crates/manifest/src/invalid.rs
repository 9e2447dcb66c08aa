//! What is wrong with manifests, in words that their writers know: file, line, the path in the document, what is allowed.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_saphyr::UserMessageFormatter;
use warren_proto::v1;

use crate::{Object, places::Places};

/// A document of a file, as it was read.
#[derive(Clone, Debug)]
pub struct Source {
    /// Which file; `-` is standard input.
    pub file: PathBuf,
    /// Lines of the file before it.
    pub lines_before: u64,
    /// What it says.
    pub text: String,
}

/// What is wrong with a document.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Invalid {
    /// Where, like `spec.ports[0]`; empty where that is not known.
    pub path: String,
    /// Why.
    pub why: String,
    line: Option<u64>,
}

impl Invalid {
    /// Of what stands at a path.
    pub fn new(path: impl Into<String>, why: impl Into<String>) -> Self {
        Self { path: path.into(), why: why.into(), line: None }
    }

    /// As people see it; `which` is the kind and the name of what the document is about.
    #[must_use]
    pub fn shown(&self, source: &Source, which: &str) -> String {
        let line = self.line.or_else(|| Places::of(&source.text).line_of(&self.path));
        let line = line.map(|line| format!(":{}", source.lines_before + line)).unwrap_or_default();
        let parts = [which, self.path.as_str(), self.why.as_str()];
        let said: Vec<_> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        // Where something is missing, or another's, how it is written was right.
        let is_about_others = ["there is no ", " is published by "].iter().any(|words| self.why.contains(words));
        let example = example(&self.path)
            .filter(|_| !is_about_others)
            .map(|example| format!("; for example: {example}"))
            .unwrap_or_default();
        format!("{}{line}: {}{example}", shown_path(&source.file), said.join(": "))
    }
}

fn shown_path(path: &Path) -> String {
    if path.as_os_str() == "-" { "stdin".to_owned() } else { path.display().to_string() }
}

/// How a key is written, for those where the type's name does not say it.
fn example(path: &str) -> Option<&'static str> {
    let key = path.strip_prefix("spec.")?;
    let end = key.find(['.', '[']).unwrap_or(key.len());
    Some(match &key[..end] {
        "command" | "args" => "command: [sh, -c, \"exec server\"]",
        "env" => "env: {PORT: 80}",
        "restartPolicy" => {
            "restartPolicy: on-failure, or {condition: on-failure, delay: 5s, maxAttempts: 3}; conditions are any, on-failure and never"
        }
        "stopTimeout" | "lostAfter" => "10s, 500ms, 2m, or a number of seconds",
        "ports" => "ports: [{containerPort: 80, hostPort: 8080}], or [\"8080:80\"]",
        "volumes" => "volumes: [{source: data, target: /data}], or [\"data:/data:ro\"]",
        "tmpfs" => "tmpfs: [{target: /tmp, size: 64M, mode: \"1777\"}]",
        "secrets" | "configs" => {
            "secrets: [db-password, {source: tls-key, target: /etc/tls.key, mode: 0440, uid: www-data}]"
        }
        "healthCheck" => {
            "healthCheck: {type: http, endpoint: \"http://:8080/health\", interval: 10s}, or {type: exec, command: [pg_isready]}"
        }
        "resources" => {
            "resources: {limits: {cpus: 0.5, memory: 64M}, reservations: {cpus: 0.25, memory: 32M}, pids: 100}"
        }
        "ulimits" => "ulimits: {nofile: 1024, nproc: {soft: 100, hard: 200}}",
        "labels" | "sysctls" => "a map of names to values",
        "constraints" => "constraints: [node.labels.disk==ssd]",
        _ => return None,
    })
}

/// Reads a document as a type. What is wrong with it is said without the text around it: that may be a secret's.
pub(crate) fn parse<T: DeserializeOwned>(source: &Source) -> Result<T, Invalid> {
    let text = source.text.as_str();
    serde_saphyr::from_str(text).map_err(|error| {
        let error = error.without_snippet();
        let said = error.render_with_formatter(&UserMessageFormatter);
        let said = said.lines().next().unwrap_or_default().trim_start_matches("error: ");
        let mut why = said.split(" at line ").next().unwrap_or_default().to_owned();
        if let Some(rest) = why.strip_prefix("line ") {
            // "line 3 column 5: ..."
            why = rest.split_once(": ").map_or(rest, |(_, rest)| rest).to_owned();
        }
        let Some(at) = error.location() else { return Invalid::new("", why) };
        let places = Places::of(text);
        let path = places.path_at(at.line(), at.column()).unwrap_or_default().to_owned();
        Invalid { path, why: plain(&why), line: Some(at.line()) }
    })
}

/// The parser's words in those of the field.
fn plain(why: &str) -> String {
    match why {
        "expected mapping start" => "is to be a map".to_owned(),
        "expected sequence start" => "is to be a list".to_owned(),
        "expected string scalar" => "is to be a text".to_owned(),
        "invalid i64" | "invalid u32" | "invalid u64" => "is to be a whole number".to_owned(),
        _ if why.starts_with("invalid boolean") => "is to be true or false".to_owned(),
        why => why.replace(", expected one of ", "; allowed are "),
    }
}

/// The path in a manifest of a field that the manager names.
#[must_use]
pub fn path_in_manifest(field: &str, why: &str, object: &Object) -> String {
    let Object::Service(spec) = object else {
        return match field {
            "" => String::new(),
            "name" => "metadata.name".to_owned(),
            "labels" => "metadata.labels".to_owned(),
            other => format!("spec.{}", camel_case(other)),
        };
    };
    let container = spec.container.clone().unwrap_or_default();
    let path = match field {
        "" => return String::new(),
        "spec.name" => return "metadata.name".to_owned(),
        "spec.labels" => return "metadata.labels".to_owned(),
        "spec.replicated.replicas" => return "spec.replicas".to_owned(),
        field => field.strip_prefix("spec.").unwrap_or(field),
    };
    let path = path.strip_prefix("container.").unwrap_or(path);
    // What is missing is named: where it is wanted, the manifest tells.
    let named = |name: &String| why.ends_with(&format!("{name:?}"));
    let place = match path {
        "mounts" => container.mounts.iter().position(|mount| named(&mount.source)),
        "secrets" => container.secrets.iter().position(|mount| named(&mount.source)),
        "configs" => container.configs.iter().position(|mount| named(&mount.source)),
        _ => None,
    };
    let placed = place.map(|i| format!("{path}[{i}]"));
    let path = placed.as_deref().unwrap_or(path);
    for (theirs, ours) in [
        ("capabilities_add", "capAdd"),
        ("capabilities_drop", "capDrop"),
        ("pids_limit", "resources.pids"),
        ("health_check.check", "healthCheck.type"),
        ("health_check.exec.command", "healthCheck.command"),
        ("health_check.http", "healthCheck.endpoint"),
        ("health_check.tcp", "healthCheck.endpoint"),
        ("health_check.grpc", "healthCheck.endpoint"),
        ("resources.limits.cpu_millis", "resources.limits.cpus"),
        ("resources.limits.memory_bytes", "resources.limits.memory"),
        ("resources.reservations.cpu_millis", "resources.reservations.cpus"),
        ("resources.reservations.memory_bytes", "resources.reservations.memory"),
    ] {
        if path.starts_with(theirs) {
            return format!("spec.{ours}");
        }
    }
    if let Some(rest) = path.strip_prefix("restart") {
        return format!("spec.restartPolicy{}", camel_case(rest));
    }
    // Volumes come first, then what is in memory.
    if let Some((i, rest)) = path.strip_prefix("mounts[").and_then(|rest| rest.split_once(']'))
        && let Ok(i) = i.parse::<usize>()
    {
        let is_volume = |mount: &&v1::Mount| mount.r#type() != v1::MountType::Tmpfs;
        let volumes = container.mounts.iter().filter(is_volume).count();
        let rest = camel_case(rest).replace("sizeBytes", "size");
        return if i < volumes {
            format!("spec.volumes[{i}]{rest}")
        } else {
            format!("spec.tmpfs[{}]{rest}", i - volumes)
        };
    }
    let path = path.replace("].user", "].uid").replace("].group", "].gid");
    format!("spec.{}", camel_case(&path))
}

fn camel_case(path: &str) -> String {
    let mut capital = false;
    let letters = path.chars().filter_map(|c| {
        if c == '_' {
            capital = true;
            return None;
        }
        Some(if std::mem::take(&mut capital) { c.to_ascii_uppercase() } else { c })
    });
    letters.collect()
}
