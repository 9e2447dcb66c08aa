use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{Process, TokenServer, World, find, free_port, until};

/// A real registry (Debian's docker-registry) on loopback.
#[derive(Debug)]
pub struct Registry {
    process: Process,
    root: PathBuf,
    authorization: Option<String>,
    /// Who gives out tokens for it.
    pub tokens: Option<TokenServer>,
    scheme: &'static str,
    ca: Option<PathBuf>,
    /// Host and port, as images' names have them.
    pub host: String,
}

/// What a registry is to be like.
#[derive(Clone, Copy, Debug, Default)]
pub struct RegistryOptions<'a> {
    /// A user and a password, without which nobody gets anything.
    pub user: Option<(&'a str, &'a str)>,
    /// That user is known to a server of tokens, and not to the registry itself.
    pub tokens: bool,
    /// HTTPS, with a certificate of an authority of its own.
    pub tls: bool,
    /// Where it listens, for other nodes; 127.0.0.1 unless given.
    pub address: Option<&'a str>,
}

/// The blobs of an archive (an OCI layout), by path.
fn blobs(archive: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(fs::File::open(archive).expect("an archive"));
    let mut blobs = BTreeMap::new();
    for entry in archive.entries().expect("a tar file") {
        let mut entry = entry.expect("an entry");
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).expect("readable");
        blobs.insert(entry.path().expect("a path").to_string_lossy().into_owned(), bytes);
    }
    blobs
}

impl Registry {
    /// Starts one whose files are below the world's directory.
    #[must_use]
    pub fn start(world: &World, name: &str, options: RegistryOptions<'_>) -> Self {
        let root = world.path(name);
        fs::create_dir(&root).expect("writable");
        let port = free_port();
        let host = format!("{}:{port}", options.address.unwrap_or("127.0.0.1"));
        let mut config = format!(
            "version: 0.1\nlog: {{level: info, accesslog: {{disabled: false}}}}\nstorage: {{filesystem: {{rootdirectory: {}}}, \
             delete: {{enabled: true}}}}\nhttp:\n  addr: {host}\n",
            root.display()
        );
        let mut ca = None;
        if options.tls {
            let authority = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).expect("a certificate");
            let (certificate, key) = (root.join("cert.pem"), root.join("key.pem"));
            fs::write(&certificate, authority.cert.pem()).expect("writable");
            fs::write(&key, authority.signing_key.serialize_pem()).expect("writable");
            config += &format!("  tls: {{certificate: {}, key: {}}}\n", certificate.display(), key.display());
            ca = Some(certificate);
        }
        let mut authorization = None;
        let mut tokens = None;
        if let Some(user) = options.user.filter(|_| options.tokens) {
            let certificate = root.join("tokens.pem");
            let server = TokenServer::start(user, &certificate);
            config += &server.configuration(&certificate);
            tokens = Some(server);
        } else if let Some((user, password)) = options.user {
            let mut htpasswd = Command::new(find("htpasswd"));
            let listed = htpasswd.args(["-Bbn", user, password]).output().expect("htpasswd");
            let file = root.join("htpasswd");
            fs::write(&file, listed.stdout).expect("writable");
            config += &format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", file.display());
            authorization = Some(format!("Basic {}", base64(&format!("{user}:{password}"))));
        }
        let file = root.join("config.yml");
        fs::write(&file, config).expect("writable");
        let mut command = Command::new(find("docker-registry"));
        command.arg("serve").arg(&file);
        let process = Process::start(name, &mut command, world.directory.path());
        let scheme = if options.tls { "https" } else { "http" };
        let registry = Self { process, root, authorization, tokens, scheme, ca, host };
        until("the registry answers", || registry.request("GET", "/v2/", &[]).map(drop));
        registry
    }

    /// The authority of its certificate.
    #[must_use]
    pub fn ca(&self) -> &Path {
        self.ca.as_deref().expect("it speaks HTTPS")
    }

    /// A request by curl, which speaks whatever the registry does: the response's headers.
    fn request(&self, method: &str, target: &str, arguments: &[&str]) -> Option<String> {
        let url = if target.starts_with("http") {
            target.to_owned()
        } else {
            format!("{}://{}{target}", self.scheme, self.host)
        };
        let mut curl = Command::new(find("curl"));
        curl.args(["--http1.1", "--silent", "--show-error", "--fail", "--dump-header", "-", "--output", "/dev/null"]);
        if let Some(ca) = &self.ca {
            curl.arg("--cacert").arg(ca);
        }
        let path = target.split_once("/v2/").map_or("", |(_, path)| path);
        let repository = path.split(['/', '?']).next().unwrap_or_default();
        let token = self.tokens.as_ref().map(|tokens| tokens.may_push(repository));
        if let Some(authorization) = token.as_ref().or(self.authorization.as_ref()) {
            curl.args(["--header", &format!("Authorization: {authorization}")]);
        }
        let output = curl.args(["--request", method]).args(arguments).arg(&url).output().expect("curl");
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn put(&self, target: &str, bytes: &[u8], media_type: &str) -> String {
        let body = self.root.join("body");
        fs::write(&body, bytes).expect("writable");
        let (data, kind) = (format!("@{}", body.display()), format!("Content-Type: {media_type}"));
        let put = self.request("PUT", target, &["--data-binary", &data, "--header", &kind]);
        put.unwrap_or_else(|| panic!("{target} cannot be put"))
    }

    /// Puts bytes there and returns their digest.
    pub fn put_blob(&self, repository: &str, bytes: &[u8]) -> String {
        let digest = sha256(bytes);
        let upload = format!("/v2/{repository}/blobs/uploads/");
        let answer = self.request("POST", &upload, &["--data", ""]).expect("an upload");
        let location = answer.lines().find_map(|line| line.strip_prefix("Location: ")).expect("a location");
        let location = location.trim();
        let separator = if location.contains('?') { '&' } else { '?' };
        let _ = self.put(&format!("{location}{separator}digest={digest}"), bytes, "application/octet-stream");
        digest
    }

    /// Puts an archive's image there and returns its digest. `change` changes its configuration.
    pub fn push(
        &self,
        archive: &Path,
        repository: &str,
        tag: &str,
        change: impl FnOnce(&mut serde_json::Value),
    ) -> String {
        self.push_with(archive, repository, tag, &[], change)
    }

    /// The same with more layers on top: uncompressed tar files.
    pub fn push_with(
        &self,
        archive: &Path,
        repository: &str,
        tag: &str,
        layers: &[Vec<u8>],
        change: impl FnOnce(&mut serde_json::Value),
    ) -> String {
        let blobs = blobs(archive);
        let json = |path: &str| -> serde_json::Value { serde_json::from_slice(&blobs[path]).expect("JSON") };
        let path =
            |digest: &serde_json::Value| format!("blobs/{}", digest.as_str().expect("a digest").replace(':', "/"));
        let mut manifest = json(&path(&json("index.json")["manifests"][0]["digest"]));
        for layer in manifest["layers"].as_array().expect("layers") {
            self.put_blob(repository, &blobs[&path(&layer["digest"])]);
        }
        let mut config = json(&path(&manifest["config"]["digest"]));
        for layer in layers {
            let digest = self.put_blob(repository, layer);
            config["rootfs"]["diff_ids"].as_array_mut().expect("a list").push(digest.as_str().into());
            manifest["layers"].as_array_mut().expect("a list").push(serde_json::json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": layer.len(),
            }));
        }
        change(&mut config);
        let config = config.to_string().into_bytes();
        manifest["config"]["digest"] = self.put_blob(repository, &config).into();
        manifest["config"]["size"] = config.len().into();
        self.put_manifest(repository, tag, &manifest)
    }

    /// Puts a manifest or an index there and returns its digest.
    pub fn put_manifest(&self, repository: &str, tag: &str, manifest: &serde_json::Value) -> String {
        let bytes = manifest.to_string().into_bytes();
        let media_type = manifest["mediaType"].as_str().expect("a media type");
        let _ = self.put(&format!("/v2/{repository}/manifests/{tag}"), &bytes, media_type);
        sha256(&bytes)
    }

    /// Where it keeps a blob.
    #[must_use]
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        self.root.join("docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
    }

    /// The digest of the first layer of an image.
    #[must_use]
    pub fn layer(&self, manifest: &str) -> String {
        let manifest: serde_json::Value =
            serde_json::from_slice(&fs::read(self.blob(manifest)).expect("a manifest")).expect("JSON");
        manifest["layers"][0]["digest"].as_str().expect("a digest").to_owned()
    }

    /// How often something was asked for.
    #[must_use]
    pub fn asked(&self, what: &str) -> usize {
        // The registry logs a request when it is done with it.
        std::thread::sleep(Duration::from_millis(50));
        self.process.log().lines().filter(|line| line.contains("\"GET ") && line.contains(what)).count()
    }
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest as _, Sha256};

    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn base64(text: &str) -> String {
    use base64::{Engine as _, engine::general_purpose::STANDARD};

    STANDARD.encode(text)
}
