//! The offsets that the programs need, from the running kernel's BTF.

use std::{fs, path::Path};

use warren_agent_ebpf::abi::Offsets;

use super::{Error, btf::Btf};

const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// What differs between kernels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    pub(super) offsets: Offsets,
    /// Before 6.1 the OOM tracepoint's argument is a pid.
    pub(super) oom_argument_is_pid: bool,
}

impl Kernel {
    /// Reads the running kernel's.
    pub(super) fn running() -> Result<Self, Error> {
        let path = Path::new(KERNEL_BTF);
        let raw = fs::read(path).map_err(|source| Error::Io { action: "reading", path: path.into(), source })?;
        Self::from_btf(&Btf::parse(&raw)?)
    }

    fn from_btf(btf: &Btf) -> Result<Self, Error> {
        let offsets = Offsets {
            task_real_parent: btf.offset("task_struct", "real_parent")?,
            task_tgid: btf.offset("task_struct", "tgid")?,
            task_pid: btf.offset("task_struct", "pid")?,
            task_exit_code: btf.offset("task_struct", "exit_code")?,
            task_signal: btf.offset("task_struct", "signal")?,
            task_mm: btf.offset("task_struct", "mm")?,
            task_cgroups: btf.offset("task_struct", "cgroups")?,
            task_thread_pid: btf.offset("task_struct", "thread_pid")?,
            task_cred: btf.offset("task_struct", "cred")?,
            cred_cap_effective: btf.offset("cred", "cap_effective")?,
            pid_level: btf.offset("pid", "level")?,
            signal_live: btf.offset("signal_struct", "live")?,
            mm_arg_start: btf.offset("mm_struct", "arg_start")?,
            mm_arg_end: btf.offset("mm_struct", "arg_end")?,
            css_set_dfl_cgrp: btf.offset("css_set", "dfl_cgrp")?,
            cgroup_kn: btf.offset("cgroup", "kn")?,
            cgroup_root: btf.offset("cgroup", "root")?,
            cgroup_level: btf.offset("cgroup", "level")?,
            cgroup_parent: btf.offset("cgroup", "self")? + btf.offset("cgroup_subsys_state", "parent")?,
            root_hierarchy_id: btf.offset("cgroup_root", "hierarchy_id")?,
            kernfs_id: btf.offset("kernfs_node", "id")?,
        };
        if btf.offset("cgroup", "self")? != 0 {
            return Err(Error::Btf("struct cgroup does not begin with its self".to_owned()));
        }
        let oom_argument_is_pid = btf.tracepoint_argument_is_pointer("mark_victim", 0) == Some(false);
        Ok(Self { offsets, oom_argument_is_pid })
    }
}
