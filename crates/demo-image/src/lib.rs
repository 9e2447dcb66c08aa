//! A small container image made from a static busybox, as an OCI archive: for trying Warren without a registry.

use std::{
    fs::File,
    io::{self, Write},
    path::Path,
    process::Command,
};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// The image's full name.
pub const NAME: &str = "localhost/warren-demo:latest";

struct Blob {
    digest: String,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(bytes: Vec<u8>) -> Self {
        let digest = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        Self { digest, bytes }
    }

    fn json(value: &Value) -> Self {
        Self::new(value.to_string().into_bytes())
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({ "mediaType": media_type, "digest": format!("sha256:{}", self.digest), "size": self.bytes.len() })
    }
}

/// Writes the archive to `to`. `busybox` must be a static binary.
///
/// # Errors
///
/// When busybox cannot be run or read, or the archive not be written.
pub fn write(busybox: &Path, to: &Path) -> io::Result<()> {
    let layer = Blob::new(layer(busybox)?);
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = Blob::json(&json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Env": ["PATH=/bin"], "Cmd": ["sh", "-c", DEFAULT_SCRIPT] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", layer.digest)] },
    }));
    let manifest = Blob::json(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config.descriptor("application/vnd.oci.image.config.v1+json"),
        "layers": [layer.descriptor("application/vnd.oci.image.layer.v1.tar")],
    }));
    let mut target = manifest.descriptor("application/vnd.oci.image.manifest.v1+json");
    target["annotations"] = json!({ "io.containerd.image.name": NAME, "org.opencontainers.image.ref.name": "latest" });
    let index = json!({ "schemaVersion": 2, "manifests": [target] }).to_string();

    let mut archive = tar::Builder::new(File::create(to)?);
    append(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#, 0o644)?;
    append(&mut archive, "index.json", index.as_bytes(), 0o644)?;
    for blob in [layer, config, manifest] {
        append(&mut archive, &format!("blobs/sha256/{}", blob.digest), &blob.bytes, 0o644)?;
    }
    archive.into_inner()?.flush()
}

/// Waits, and ends at once when asked to: a shell as pid 1 ignores SIGTERM unless it traps it.
const DEFAULT_SCRIPT: &str = "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done";

/// Root, and somebody who is not.
const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\ndemo:x:1000:1000:demo:/tmp:/bin/sh\n";
const GROUP: &[u8] = b"root:x:0:\ndemo:x:1000:\nusers:x:100:demo\n";

fn layer(busybox: &Path) -> io::Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    for directory in ["bin", "dev", "etc", "proc", "root", "sys", "tmp"] {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(if directory == "tmp" { 0o1777 } else { 0o755 });
        header.set_size(0);
        layer.append_data(&mut header, directory, io::empty())?;
    }
    append(&mut layer, "bin/busybox", &std::fs::read(busybox)?, 0o755)?;
    append(&mut layer, "etc/passwd", PASSWD, 0o644)?;
    append(&mut layer, "etc/group", GROUP, 0o644)?;
    let applets = Command::new(busybox).arg("--list").output()?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines().filter(|applet| *applet != "busybox") {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_mode(0o777);
        header.set_size(0);
        layer.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    layer.into_inner()
}

fn append(archive: &mut tar::Builder<impl Write>, path: &str, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_mode(mode);
    header.set_size(bytes.len() as u64);
    archive.append_data(&mut header, path, bytes)
}
