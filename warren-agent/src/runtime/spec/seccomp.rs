use std::collections::BTreeSet;

use oci_spec::runtime::{Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSyscall, LinuxSyscallBuilder};

/// containerd's default profile (contrib/seccomp of containerd 1.7, Apache-2.0) for the default capabilities, without
/// io_uring, which later versions dropped.
const DEFAULT: &str = include_str!("../seccomp.json");

/// System calls that go with a capability (the same source, `DefaultProfile`).
const BY_CAPABILITY: [(&str, &[&str]); 13] = [
    ("BPF", &["bpf"]),
    ("DAC_READ_SEARCH", &["open_by_handle_at"]),
    ("PERFMON", &["perf_event_open"]),
    (
        "SYS_ADMIN",
        &[
            "bpf",
            "clone",
            "clone3",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "perf_event_open",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "syslog",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    ("SYS_BOOT", &["reboot"]),
    ("SYS_MODULE", &["delete_module", "finit_module", "init_module"]),
    ("SYS_NICE", &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    ("SYS_PACCT", &["acct"]),
    ("SYS_PTRACE", &["kcmp", "pidfd_getfd", "process_madvise", "process_vm_readv", "process_vm_writev", "ptrace"]),
    ("SYS_RAWIO", &["iopl", "ioperm"]),
    ("SYS_TIME", &["clock_settime", "clock_settime64", "settimeofday", "stime"]),
    ("SYS_TTY_CONFIG", &["vhangup"]),
    ("SYSLOG", &["syslog"]),
];

/// The profile of a container with these capabilities: one that may do something may also make the calls for it.
pub(super) fn profile(capabilities: &BTreeSet<&'static str>) -> LinuxSeccomp {
    let mut profile: LinuxSeccomp = serde_json::from_str(DEFAULT).expect("the embedded profile is tested");
    profile.set_architectures(Some(match std::env::consts::ARCH {
        "aarch64" => vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm],
        _ => vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32],
    }));
    let extra: BTreeSet<&str> = BY_CAPABILITY
        .iter()
        .filter(|(capability, _)| capabilities.contains(capability))
        .flat_map(|(_, calls)| calls.iter().copied())
        .collect();
    if !extra.is_empty() {
        let mut rules = profile.syscalls().clone().unwrap_or_default();
        // A call that is let through whole needs no rule about its arguments or its error.
        rules.retain(|rule| !rule.names().iter().any(|name| extra.contains(name.as_str()) && is_partial(rule)));
        let names: Vec<_> = extra.into_iter().map(str::to_owned).collect();
        let rule = LinuxSyscallBuilder::default().names(names).action(LinuxSeccompAction::ScmpActAllow).build();
        rules.push(rule.expect("names and an action are a rule"));
        profile.set_syscalls(Some(rules));
    }
    profile
}

fn is_partial(rule: &LinuxSyscall) -> bool {
    rule.args().is_some() || rule.action() != LinuxSeccompAction::ScmpActAllow
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(profile: &LinuxSeccomp, name: &str) -> Vec<LinuxSyscall> {
        let rules = profile.syscalls().iter().flatten();
        rules.filter(|rule| rule.names().iter().any(|known| known == name)).cloned().collect()
    }

    #[test]
    fn a_capability_brings_its_system_calls() {
        let plain = profile(&BTreeSet::from(["CHOWN"]));
        assert!(names(&plain, "mount").is_empty());
        assert!(names(&plain, "clone3").iter().all(is_partial));
        let admin = profile(&BTreeSet::from(["SYS_ADMIN"]));
        for call in ["mount", "clone3", "clone"] {
            let rules = names(&admin, call);
            assert!(rules.len() == 1 && !is_partial(&rules[0]), "{call}");
        }
    }
}
