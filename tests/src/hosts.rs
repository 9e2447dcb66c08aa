use crate::world::{World, run};

/// Machines of a test's own, each a network namespace, on one network or cut off from it. Gone with the value.
#[derive(Debug)]
pub struct Hosts {
    names: Vec<String>,
}

fn ip(arguments: &str) {
    let _ = run("ip", &arguments.split(' ').collect::<Vec<_>>()).succeeded();
}

/// The network that hosts are on, and the one that those are on which are cut off.
const NETWORK: &str = "together";
const ELSEWHERE: &str = "elsewhere";

impl Hosts {
    /// So many machines, which reach each other and the test's own network.
    #[must_use]
    pub fn new(world: &World, count: usize) -> Self {
        for bridge in [NETWORK, ELSEWHERE] {
            ip(&format!("link add {bridge} type bridge"));
            ip(&format!("link set {bridge} up"));
        }
        let mut hosts = Self { names: Vec::new() };
        for at in 0..count {
            let name = format!("{}-{at}", world.cgroup_parent().trim_start_matches('/'));
            ip(&format!("netns add {name}"));
            hosts.names.push(name.clone());
            ip(&format!("link add wire{at} type veth peer name wire netns {name}"));
            ip(&format!("link set wire{at} master {NETWORK} up"));
            ip(&format!("-n {name} addr add {}/24 dev wire", Self::address(at)));
            ip(&format!("-n {name} link set wire up"));
            ip(&format!("-n {name} link set lo up"));
        }
        hosts
    }

    /// A machine's address.
    #[must_use]
    pub fn address(at: usize) -> String {
        format!("198.51.100.{}", at + 1)
    }

    /// A machine's network namespace.
    #[must_use]
    pub fn name(&self, at: usize) -> &str {
        &self.names[at]
    }

    /// Cuts a machine off from those that are not.
    pub fn cut_off(&self, at: usize) {
        ip(&format!("link set wire{at} master {ELSEWHERE}"));
    }

    /// Has all machines reach each other again.
    pub fn heal(&self) {
        for at in 0..self.names.len() {
            ip(&format!("link set wire{at} master {NETWORK}"));
        }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = run("ip", &["netns", "del", name]);
        }
    }
}
