//! Which of an image's manifests is for this machine. Images are made by many builders: indexes are nested, list what is no
//! image, leave platforms out or blank, and are called what they are not. What a document is shows in what it has.

use std::collections::HashMap;

use bytes::Bytes;
use containerd_client::types::Descriptor;
use oci_spec::image as oci;
use serde::{Deserialize, de::DeserializeOwned};

use warren_registry::not_json;

use super::Error;

/// Documents that are looked at before an image is given up, and how deep they may be nested. Builders nest once.
const MAX_DOCUMENTS: usize = 64;
const MAX_DEPTH: usize = 4;
/// Bytes of a document: an index, a manifest, a configuration. Those of real images are smaller by orders of magnitude, and as much is read
/// into memory.
pub(super) const MAX_DOCUMENT: u64 = 4 << 20;
/// Layers of an image: overlayfs takes no more.
const MAX_LAYERS: usize = 500;

/// What the configurations of images are; whatever else has one is an artifact.
const CONFIGURATIONS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// A reference to a blob. Sizes are bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Entry {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: String,
    pub(super) size: u64,
    platform: Option<Platform>,
    pub(super) annotations: Option<HashMap<String, String>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    variant: Option<String>,
}

impl Entry {
    /// A reference that says nothing of platforms.
    pub(super) fn new(media_type: String, digest: String, size: u64) -> Self {
        Self { media_type, digest, size, ..Self::default() }
    }

    pub(super) fn descriptor(&self) -> Descriptor {
        Descriptor {
            media_type: self.media_type.clone(),
            digest: self.digest.clone(),
            size: i64::try_from(self.size).unwrap_or(i64::MAX),
            ..Default::default()
        }
    }
}

/// The labels that keep what a document refers to from the garbage collector.
pub(super) fn label(kind: &str) -> String {
    format!("containerd.io/gc.ref.content.{kind}")
}

/// A manifest: what an image is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Manifest {
    pub(super) config: Entry,
    pub(super) layers: Vec<Entry>,
}

impl Manifest {
    /// Bytes of all layers, as they come.
    pub(super) fn size(&self) -> u64 {
        self.layers.iter().fold(0, |sum, layer| sum.saturating_add(layer.size))
    }

    pub(super) fn labels(&self) -> HashMap<String, String> {
        let layers = self.layers.iter().enumerate().map(|(i, layer)| (label(&format!("l.{i}")), layer.digest.clone()));
        layers.chain([(label("config"), self.config.digest.clone())]).collect()
    }
}

/// What the digest of an image, or of an entry of an index, refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Document {
    Index(Vec<Entry>),
    Manifest(Manifest),
}

impl Document {
    /// What it is, where nothing says so.
    pub(super) fn media_type(&self) -> &'static str {
        match self {
            Self::Index(_) => "application/vnd.oci.image.index.v1+json",
            Self::Manifest(_) => "application/vnd.oci.image.manifest.v1+json",
        }
    }

    /// Reads one.
    ///
    /// # Errors
    ///
    /// In words, when it is neither.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Raw {
            schema_version: Option<u32>,
            manifests: Option<Vec<Entry>>,
            config: Option<Entry>,
            layers: Option<Vec<Entry>>,
        }
        let raw: Raw = serde_json::from_slice(bytes)
            .map_err(|error| format!("its manifest cannot be read: {}", not_json(&error)))?;
        let checked = |entries: Vec<Entry>| match entries.iter().find(|entry| !warren_spec::is_digest(&entry.digest)) {
            Some(bad) => Err(format!("its manifest refers to {:?}, which is not a supported digest", bad.digest)),
            None => Ok(entries),
        };
        match (raw.manifests, raw.config) {
            // Whoever read it as the other would run something else than was looked at.
            (Some(_), Some(_)) => Err("its manifest is an index and an image at once".to_owned()),
            (Some(manifests), _) => Ok(Self::Index(checked(manifests)?)),
            (None, Some(config)) => {
                let config = checked(vec![config])?.remove(0);
                let layers = raw.layers.as_ref().map_or(0, Vec::len);
                if layers > MAX_LAYERS {
                    return Err(format!("it has {layers} layers, and no file system takes more than {MAX_LAYERS}"));
                }
                Ok(Self::Manifest(Manifest { config, layers: checked(raw.layers.unwrap_or_default())? }))
            }
            (None, None) if raw.schema_version == Some(1) => {
                Err("its manifest is of Docker's schema 1, which is not supported".to_owned())
            }
            (None, None) => Err("its manifest has neither a config nor a list of manifests".to_owned()),
        }
    }
}

/// What a configuration says that matters here.
#[derive(Debug, Deserialize)]
pub(super) struct Configuration {
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    os: Option<String>,
    #[serde(default)]
    pub(super) config: Option<oci::Config>,
    #[serde(default)]
    rootfs: Option<Rootfs>,
}

#[derive(Debug, Deserialize)]
struct Rootfs {
    diff_ids: Option<Vec<String>>,
}

impl Configuration {
    /// The digests of the layers as they are unpacked.
    pub(super) fn diff_ids(&mut self) -> Vec<String> {
        self.rootfs.take().and_then(|rootfs| rootfs.diff_ids).unwrap_or_default()
    }

    /// Whether it is for this machine. One that does not say is.
    fn check(&self) -> Result<(), String> {
        let said = |word: &Option<String>| word.clone().filter(|word| !word.is_empty());
        let (os, architecture) = (said(&self.os), said(&self.architecture));
        let machine = machine();
        if os.as_ref().is_none_or(|os| os == "linux") && architecture.as_ref().is_none_or(|own| own == machine) {
            return Ok(());
        }
        let or_blank = |word: Option<String>| word.unwrap_or_else(|| "any".to_owned());
        Err(format!("it is for {}/{}, this node is linux/{machine}", or_blank(os), or_blank(architecture)))
    }
}

/// This machine's architecture as images name it.
fn machine() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// How well an entry of an index fits this machine; less is better, and `None` is not at all.
fn fit(entry: &Entry, machine: &str) -> Option<u32> {
    let Some(platform) = &entry.platform else { return Some(100) };
    let (os, architecture) = (platform.os.as_str(), platform.architecture.as_str());
    if !["", "linux"].contains(&os) || !["", machine].contains(&architecture) {
        return None;
    }
    if os.is_empty() || architecture.is_empty() {
        return Some(100);
    }
    // The variant that every such machine runs comes first.
    Some(match platform.variant.as_deref() {
        None | Some("" | "v1" | "v8") => 0,
        Some(other) => 1 + other.trim_start_matches('v').parse::<u32>().unwrap_or(50).min(50),
    })
}

/// The entries that may be for this machine, with their places in the index, best first.
fn fitting(entries: Vec<Entry>, machine: &str) -> Vec<(usize, Entry)> {
    let fits = |(i, entry): (usize, Entry)| fit(&entry, machine).map(|fit| (fit, i, entry));
    let mut fitting: Vec<_> = entries.into_iter().enumerate().filter_map(fits).collect();
    fitting.sort_by_key(|(fit, i, _)| (*fit, *i));
    fitting.into_iter().take(MAX_DOCUMENTS).map(|(_, i, entry)| (i, entry)).collect()
}

fn platforms(entries: &[Entry]) -> String {
    let named = entries.iter().filter_map(|entry| entry.platform.as_ref()).filter(|platform| platform.os != "unknown");
    let mut named: Vec<_> = named.map(|platform| format!("{}/{}", platform.os, platform.architecture)).collect();
    named.dedup();
    if named.is_empty() { String::new() } else { format!(", only for {}", named.join(", ")) }
}

/// Where an image's documents are: a registry, containerd, an archive.
pub(super) trait Source {
    /// The bytes of an index or manifest; `None` if it is not there.
    async fn manifest(&self, entry: &Entry) -> Result<Option<Bytes>, Error>;
    /// The bytes of a configuration; `None` if it is not there.
    async fn configuration(&self, entry: &Entry) -> Result<Option<Bytes>, Error>;
}

/// A document on the way to an image's manifest.
#[derive(Clone, Debug)]
pub(super) struct Passed {
    pub(super) entry: Entry,
    pub(super) bytes: Bytes,
    pub(super) labels: HashMap<String, String>,
}

/// The manifest that is for this machine.
#[derive(Debug)]
pub(super) struct Chosen {
    /// What leads to it and then itself, from the image's target on.
    pub(super) path: Vec<Passed>,
    pub(super) manifest: Manifest,
    pub(super) configuration: Configuration,
}

/// Finds what is for this machine below an image's target.
///
/// # Errors
///
/// When there is nothing, with the first reason; when the source fails.
pub(super) async fn choose(source: &impl Source, image: &str, target: Entry) -> Result<Chosen, Error> {
    let mut todo = vec![(target, Vec::<Passed>::new())];
    let mut reasons = Vec::new();
    for _ in 0..MAX_DOCUMENTS {
        let Some((entry, path)) = todo.pop() else { break };
        if entry.size > MAX_DOCUMENT {
            reasons.push(format!("{} is larger than {MAX_DOCUMENT} bytes", entry.digest));
            continue;
        }
        let Some(bytes) = source.manifest(&entry).await? else {
            reasons.push(format!("{} is missing", entry.digest));
            continue;
        };
        match Document::parse(&bytes) {
            Err(why) => reasons.push(why),
            Ok(Document::Index(_)) if path.len() >= MAX_DEPTH => {
                reasons.push("its indexes are nested too deep".to_owned());
            }
            Ok(Document::Index(entries)) => {
                let nothing = format!("it has nothing for linux/{}{}", machine(), platforms(&entries));
                let fitting = fitting(entries, machine());
                if fitting.is_empty() {
                    reasons.push(nothing);
                }
                for (i, child) in fitting.into_iter().rev() {
                    let labels = HashMap::from([(label(&format!("m.{i}")), child.digest.clone())]);
                    let passed = Passed { entry: entry.clone(), bytes: bytes.clone(), labels };
                    todo.push((child, path.iter().cloned().chain([passed]).collect()));
                }
            }
            Ok(Document::Manifest(manifest)) => match image_of(source, &manifest).await? {
                Ok(configuration) => {
                    let passed = Passed { entry, bytes, labels: manifest.labels() };
                    let path = path.into_iter().chain([passed]).collect();
                    return Ok(Chosen { path, manifest, configuration });
                }
                Err(why) => reasons.push(why),
            },
        }
    }
    let why = reasons.into_iter().next().unwrap_or_else(|| "it lists too many manifests".to_owned());
    Err(Error::bad_image(image, why))
}

/// The configuration of a manifest, if it is an image's and for this machine.
async fn image_of(source: &impl Source, manifest: &Manifest) -> Result<Result<Configuration, String>, Error> {
    let kind = &manifest.config.media_type;
    if !kind.is_empty() && !CONFIGURATIONS.contains(&kind.as_str()) {
        return Ok(Err(format!("it is an artifact with a config of type {kind}, not an image")));
    }
    if manifest.config.size > MAX_DOCUMENT {
        return Ok(Err(format!("its configuration is larger than {MAX_DOCUMENT} bytes")));
    }
    let Some(bytes) = source.configuration(&manifest.config).await? else {
        return Ok(Err(format!("{} is missing", manifest.config.digest)));
    };
    let configuration = parse_json::<Configuration>(&manifest.config.digest, &bytes);
    Ok(configuration.and_then(|configuration| configuration.check().map(|()| configuration)))
}

fn parse_json<T: DeserializeOwned>(digest: &str, bytes: &[u8]) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|error| format!("{digest}: {}", not_json(&error)))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use sha2::{Digest as _, Sha256};

    use super::*;

    #[derive(Default)]
    struct Blobs(HashMap<String, Bytes>);

    impl Source for Blobs {
        async fn manifest(&self, entry: &Entry) -> Result<Option<Bytes>, Error> {
            Ok(self.0.get(&entry.digest).cloned())
        }

        async fn configuration(&self, entry: &Entry) -> Result<Option<Bytes>, Error> {
            self.manifest(entry).await
        }
    }

    impl Blobs {
        fn put(&mut self, document: &Value) -> Value {
            let bytes = document.to_string().into_bytes();
            let hex: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
            let (digest, size) = (format!("sha256:{hex}"), bytes.len());
            self.0.insert(digest.clone(), bytes.into());
            json!({ "digest": digest, "size": size })
        }

        fn image(&mut self, config: &Value) -> Value {
            let mut config = self.put(config);
            config["mediaType"] = json!(CONFIGURATIONS[0]);
            self.put(&json!({ "schemaVersion": 2, "config": config, "layers": [] }))
        }

        fn index(&mut self, entries: &[&Value]) -> Value {
            self.put(&json!({ "schemaVersion": 2, "manifests": entries }))
        }

        async fn chosen(&self, target: &Value) -> Result<String, String> {
            let target = serde_json::from_value(target.clone()).expect("an entry");
            let chosen = choose(self, "x", target).await.map_err(|error| error.to_string())?;
            Ok(chosen.path.last().expect("a manifest").entry.digest.clone())
        }
    }

    fn with(entry: &Value, os: &str, architecture: &str, variant: Option<&str>) -> Value {
        let mut entry = entry.clone();
        entry["platform"] = json!({ "os": os, "architecture": architecture, "variant": variant });
        entry
    }

    #[test]
    fn whatever_comes_is_read_or_refused() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let entry = json!({ "mediaType": "x", "digest": digest, "size": 3, "platform": { "os": "linux" } });
        let manifest = json!({ "schemaVersion": 2, "config": entry, "layers": [entry, entry] }).to_string();
        let index = json!({ "schemaVersion": 2, "manifests": [entry, entry], "annotations": { "a": "b" } }).to_string();
        let configuration = json!({
            "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [digest] },
            "config": { "Env": ["A=b"], "User": "1:2", "Cmd": ["x"], "Volumes": { "/v": {} }, "WorkingDir": "/w" },
        });
        let configuration = configuration.to_string();
        warren_fuzz::fuzz(&[manifest.as_bytes(), index.as_bytes(), configuration.as_bytes()], |bytes| {
            match Document::parse(bytes) {
                Ok(Document::Index(entries)) => drop(fitting(entries, machine())),
                Ok(Document::Manifest(manifest)) => assert!(manifest.labels().len() <= MAX_LAYERS + 1),
                Err(why) => assert!(why.len() < 4096, "{} bytes", why.len()),
            }
            match parse_json::<Configuration>("it", bytes) {
                Ok(configuration) => drop(configuration.check()),
                Err(why) => assert!(why.len() < 4096, "{} bytes", why.len()),
            }
        });
    }

    #[tokio::test]
    async fn images_of_all_builders_are_understood() {
        let mut blobs = Blobs::default();
        let own = machine();
        let good = blobs.image(&json!({ "os": "linux", "architecture": own, "rootfs": { "diff_ids": [] } }));
        let alien = blobs.image(&json!({ "os": "linux", "architecture": "s390x", "rootfs": {} }));
        let blank = blobs.image(&json!({ "os": "", "architecture": "", "config": null, "rootfs": null }));
        let silent = blobs.image(&json!({ "rootfs": { "type": "layers" } }));
        let artifact = blobs.put(&json!({
            "schemaVersion": 2,
            "config": { "mediaType": "application/vnd.oci.empty.v1+json", "digest": good["digest"], "size": 1 },
        }));
        let attestation = with(&artifact, "unknown", "unknown", None);
        let inner =
            blobs.index(&[&attestation, &with(&alien, "linux", "s390x", None), &with(&good, "linux", own, None)]);
        let fast = blobs.image(&json!({ "os": "linux", "architecture": own, "variant": "v3" }));
        let absent = json!({ "digest": format!("sha256:{}", "0".repeat(64)), "size": 1 });
        let digest = |image: &Value| image["digest"].as_str().expect("a digest").to_owned();
        for (what, target, expected) in [
            ("a manifest", good.clone(), &good),
            ("blank words", blank.clone(), &blank),
            ("no words", silent.clone(), &silent),
            ("an index", inner.clone(), &good),
            ("an index in an index", blobs.index(&[&inner]), &good),
            ("an artifact without a platform first", blobs.index(&[&artifact, &good]), &good),
            ("a stranger without a platform first", blobs.index(&[&alien, &good]), &good),
            ("a blank platform", blobs.index(&[&with(&good, "", "", None)]), &good),
            (
                "what says its platform before what does not",
                blobs.index(&[&silent, &with(&good, "linux", own, None)]),
                &good,
            ),
            (
                "the oldest variant",
                blobs.index(&[&with(&fast, "linux", own, Some("v3")), &with(&good, "linux", own, Some("v2"))]),
                &good,
            ),
            ("an entry that is not there", blobs.index(&[&absent, &good]), &good),
        ] {
            assert_eq!(blobs.chosen(&target).await, Ok(digest(expected)), "{what}");
        }
        let mut deep = good.clone();
        for _ in 0..10 {
            deep = blobs.index(&[&deep]);
        }
        let others = blobs.index(&[&with(&alien, "linux", "s390x", None), &attestation]);
        let lists_nothing = blobs.index(&[]);
        let both = blobs.put(&json!({ "schemaVersion": 2, "manifests": [good], "config": good }));
        let layer = json!({ "digest": good["digest"], "size": u64::MAX });
        let layered = blobs.put(&json!({ "schemaVersion": 2, "config": good, "layers": vec![&layer; 501] }));
        let large = json!({ "digest": format!("sha256:{}", "1".repeat(64)), "size": MAX_DOCUMENT + 1 });
        let verbose = blobs.put(&json!({
            "schemaVersion": 2,
            "config": { "mediaType": CONFIGURATIONS[0], "digest": good["digest"], "size": 3_u64 << 30 },
        }));
        let odd = blobs.put(&json!({ "schemaVersion": 2, "manifests": [{ "digest": "../../etc/passwd", "size": 1 }] }));
        let old = blobs.put(&json!({ "schemaVersion": 1, "fsLayers": [] }));
        for (target, words) in [
            (alien, format!("it is for linux/s390x, this node is linux/{own}")),
            (others, format!("it has nothing for linux/{own}, only for linux/s390x")),
            (lists_nothing, format!("it has nothing for linux/{own}")),
            (artifact, "it is an artifact with a config of type application/vnd.oci.empty.v1+json".to_owned()),
            (absent, "is missing".to_owned()),
            (deep, "nested too deep".to_owned()),
            (both, "an index and an image at once".to_owned()),
            (odd, "not a supported digest".to_owned()),
            (old, "schema 1".to_owned()),
            (layered, "it has 501 layers".to_owned()),
            (large, "is larger than 4194304 bytes".to_owned()),
            (verbose, "its configuration is larger than 4194304 bytes".to_owned()),
        ] {
            let why = blobs.chosen(&target).await.expect_err(&words);
            assert!(why.contains(&words), "{why}");
        }
    }
}
