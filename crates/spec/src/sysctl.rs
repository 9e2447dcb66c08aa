/// A sysctl that a service may set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SafeSysctl {
    /// Its name, with dots.
    pub name: &'static str,
    /// Whether it belongs to the network namespace: a container in the node's own cannot have it.
    pub network: bool,
}

const fn network(name: &'static str) -> SafeSysctl {
    SafeSysctl { name, network: true }
}

/// Those that the kernel keeps apart by namespace and that cannot take memory or time from other containers: Kubernetes's
/// safe set (kubernetes.io, "Using sysctls in a Kubernetes Cluster"), and the length of accept queues.
const SAFE: [SafeSysctl; 13] = [
    SafeSysctl { name: "kernel.shm_rmid_forced", network: false },
    network("net.core.somaxconn"),
    network("net.ipv4.ip_local_port_range"),
    network("net.ipv4.ip_local_reserved_ports"),
    network("net.ipv4.ip_unprivileged_port_start"),
    network("net.ipv4.ping_group_range"),
    network("net.ipv4.tcp_fin_timeout"),
    network("net.ipv4.tcp_keepalive_intvl"),
    network("net.ipv4.tcp_keepalive_probes"),
    network("net.ipv4.tcp_keepalive_time"),
    network("net.ipv4.tcp_rmem"),
    network("net.ipv4.tcp_syncookies"),
    network("net.ipv4.tcp_wmem"),
];

/// A sysctl that a service may set, by name.
#[must_use]
pub fn sysctl(name: &str) -> Option<SafeSysctl> {
    SAFE.into_iter().find(|known| known.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_safe_sysctls_are_known() {
        assert_eq!(sysctl("net.core.somaxconn").map(|known| known.network), Some(true));
        assert_eq!(sysctl("kernel.shm_rmid_forced").map(|known| known.network), Some(false));
        assert_eq!(sysctl("kernel.panic"), None);
    }
}
