//! How registries are reached, as flags.

use std::path::PathBuf;

use clap::Args;

use crate::Options;

/// How registries are reached. Proxies are taken from `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`.
#[derive(Args, Clone, Debug, Default)]
pub struct RegistryArguments {
    /// Registry mirror, tried before the registry, as docker.io=mirror.example:5000 or
    /// `docker.io=http://mirror.example:5000`; may be repeated or comma-separated.
    #[arg(long, env = "WARREN_REGISTRY_MIRRORS", value_name = "REGISTRY=HOST", value_delimiter = ',', value_parser = mirror)]
    pub registry_mirror: Vec<(String, String)>,
    /// Registry or mirror to reach over plain HTTP; always allowed for those on this machine.
    #[arg(long, env = "WARREN_REGISTRY_PLAIN", value_name = "HOST", value_delimiter = ',')]
    pub registry_plain: Vec<String>,
    /// PEM file of additional CA certificates to trust.
    #[arg(long, env = "WARREN_REGISTRY_CA", value_name = "FILE", value_delimiter = ',')]
    pub registry_ca: Vec<PathBuf>,
}

fn mirror(text: &str) -> Result<(String, String), String> {
    let (registry, host) = text.split_once('=').ok_or("a mirror is REGISTRY=HOST")?;
    if host.split_once("://").is_some_and(|(scheme, _)| scheme != "http" && scheme != "https") {
        return Err(format!("{host:?} is neither http:// nor https://"));
    }
    Ok((registry.to_owned(), host.to_owned()))
}

impl RegistryArguments {
    /// As the registries want them.
    #[must_use]
    pub fn options(&self) -> Options {
        let mut options = Options {
            plain: self.registry_plain.iter().cloned().collect(),
            ca_files: self.registry_ca.clone(),
            ..Options::default()
        };
        for (registry, host) in &self.registry_mirror {
            options.mirrors.entry(registry.clone()).or_default().push(host.clone());
        }
        options
    }
}
