//! This machine's network as it was before an agent ran on it, so that it can be so again.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use crate::run::find;

/// What an agent changes and nobody else changes back.
const SETTINGS: [&str; 2] = ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"];
/// The agent's own links begin so.
const LINKS: [&str; 2] = ["wrn", "warren-vxlan"];

/// What there was.
#[derive(Debug)]
pub(crate) struct Before {
    settings: Vec<(&'static str, String)>,
    /// Addresses of the loopback link.
    addresses: BTreeSet<String>,
}

fn output(program: &str, arguments: &[&str]) -> String {
    let Some(program) = find(program) else { return String::new() };
    let output = Command::new(program).args(arguments).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

/// A word of each line.
fn words(text: &str, at: usize) -> impl Iterator<Item = String> {
    text.lines().filter_map(move |line| line.split_whitespace().nth(at).map(str::to_owned))
}

fn addresses() -> BTreeSet<String> {
    words(&output("ip", &["-o", "address", "show", "dev", "lo"]), 3).collect()
}

impl Before {
    pub(crate) fn look() -> Self {
        let settings = SETTINGS.into_iter().filter_map(|path| Some((path, fs::read_to_string(path).ok()?)));
        Self { settings: settings.collect(), addresses: addresses() }
    }

    /// Makes it so again. `namespaces` is where the agent kept containers' network namespaces.
    pub(crate) fn restore(&self, namespaces: &Path) {
        for kept in fs::read_dir(namespaces).into_iter().flatten().flatten() {
            // One that is not mounted is removed with its directory.
            let _ = rustix::mount::unmount(kept.path(), rustix::mount::UnmountFlags::DETACH);
        }
        // What is not there need not be removed.
        let _ = output("nft", &["delete", "table", "inet", "warren"]);
        for link in words(&output("ip", &["-o", "link"]), 1) {
            let name = link.trim_end_matches(':').split('@').next().unwrap_or_default().to_owned();
            if LINKS.iter().any(|own| name.starts_with(own)) {
                let _ = output("ip", &["link", "delete", &name]);
            }
        }
        for address in addresses().difference(&self.addresses) {
            let _ = output("ip", &["address", "delete", address, "dev", "lo"]);
        }
        for family in ["-4", "-6"] {
            // Of virtual addresses: the only routes to loopback that an agent adds.
            for route in output("ip", &[family, "route", "show", "dev", "lo", "proto", "static"]).lines() {
                let mut arguments = vec![family, "route", "delete"];
                arguments.extend(route.split_whitespace().take(1));
                arguments.extend(["dev", "lo"]);
                let _ = output("ip", &arguments);
            }
        }
        for (path, value) in &self.settings {
            let _ = fs::write(path, value);
        }
    }
}
