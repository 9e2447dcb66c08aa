//! The OCI runtime spec of a container.

mod devices;
mod process;
mod seccomp;

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use oci_spec::{
    OciSpecError,
    image::Config as ImageConfig,
    runtime::{
        LinuxBuilder, LinuxCpuBuilder, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxMemoryBuilder,
        LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxPidsBuilder, LinuxResources,
        LinuxResourcesBuilder, Mount, MountBuilder, RootBuilder, Spec, SpecBuilder, get_default_maskedpaths,
        get_default_mounts, get_default_readonly_paths,
    },
};
use warren_proto::v1;
use warren_spec::{NotAllowed, Policy};

use super::{Error, VolumePath, users::Identity};
pub(super) use process::{last_of_each_name, with_same_env};

/// Length of a CPU period, in microseconds: the kernel's default.
const CPU_PERIOD: u64 = 100_000;
/// The weight of one core in `cpu.shares`.
const SHARES_PER_CORE: i64 = 1024;
/// Characters of a container's id in its hostname.
const HOSTNAME_ID: usize = 12;
/// Where the init program is in a container that wants one.
const INIT: &str = "/run/warren/init";
/// In one with secrets in its environment: the program that puts them there, and where it has them from.
pub(super) const ENV: &str = "/run/warren/env";
pub(super) const ENV_VALUES: &str = "/run/warren/env.values";

/// What a container is to be, apart from its image.
#[derive(Clone, Debug, Default)]
pub struct ContainerOptions {
    /// The container's id.
    pub id: String,
    /// What its service says.
    pub spec: v1::ContainerSpec,
    /// What it may use.
    pub resources: v1::Resources,
    /// Where its cgroup is made.
    pub cgroup_parent: PathBuf,
    /// The node's init program, for containers that want one.
    pub init: Option<PathBuf>,
    /// Its network.
    pub network: NetworkNamespace,
    /// Files of the node that it has at these places.
    pub files: Vec<(PathBuf, &'static str)>,
    /// Files and directories with secrets and configs.
    pub secrets: Vec<(PathBuf, String)>,
    /// Its secrets that are variables, if it has any: the program that it begins with, and the file for that.
    pub env: Option<(PathBuf, PathBuf)>,
    /// Where its volumes are, by name.
    pub volumes: BTreeMap<String, VolumePath>,
    /// What it may have of its node.
    pub policy: Policy,
    /// Processes that it may have unless its service says; 0 is no limit.
    pub pids_limit: i64,
}

/// Which network namespace a container is in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NetworkNamespace {
    /// A new one with nothing in it.
    #[default]
    Empty,
    /// The node's own.
    Node,
    /// The one that is kept there.
    Path(PathBuf),
}

/// A container's hostname: what its service says, or the beginning of its id.
pub(crate) fn hostname(id: &str, spec: &v1::ContainerSpec) -> String {
    if spec.hostname.is_empty() { id.chars().take(HOSTNAME_ID).collect() } else { spec.hostname.clone() }
}

impl ContainerOptions {
    fn hostname(&self) -> String {
        hostname(&self.id, &self.spec)
    }
}

/// Builds the spec from the image's configuration and the container's options.
pub(super) fn build(image: &ImageConfig, options: &ContainerOptions, identity: &Identity) -> Result<Spec, Error> {
    let spec = &options.spec;
    allowed(spec, &options.policy)?;
    let process = process::build(image, options, identity)?;
    let mounts = mounts(options)?;
    let (devices, rules) = if spec.privileged { devices::all()? } else { devices::named(&spec.devices)? };
    let assembled = || -> Result<Spec, OciSpecError> {
        let mut linux = LinuxBuilder::default()
            .namespaces(namespaces(&options.network)?)
            .cgroups_path(options.cgroup_parent.join(&options.id))
            .resources(resources(options, rules)?)
            .devices(devices)
            .sysctl(sysctls(options));
        if !spec.privileged {
            linux = linux
                .seccomp(seccomp::profile(&process::capabilities(spec)))
                .masked_paths(masked_paths())
                .readonly_paths(get_default_readonly_paths());
        } else {
            linux = linux.masked_paths(Vec::new()).readonly_paths(Vec::new());
        }
        SpecBuilder::default()
            .version("1.0.2")
            .hostname(options.hostname())
            .process(process)
            .root(RootBuilder::default().path("rootfs").readonly(spec.read_only).build()?)
            .mounts(mounts)
            .linux(linux.build()?)
            .build()
    };
    assembled().map_err(cannot_be_built)
}

/// Whether the container may have what it wants of this node. Its manager has looked at that too; a node's own policy is the node's.
fn allowed(spec: &v1::ContainerSpec, policy: &Policy) -> Result<(), Error> {
    let refused = |what: String| move |not: NotAllowed| Error::BadSpec(format!("{what} {not}"));
    if spec.privileged {
        policy.privileged().map_err(refused("privileged".to_owned()))?;
    }
    if spec.network() == v1::NetworkMode::Host {
        policy.host_network().map_err(refused("the node's network".to_owned()))?;
    }
    for name in &spec.capabilities_add {
        policy.capability(name).map_err(refused(format!("capability {name}")))?;
    }
    for device in &spec.devices {
        policy.device(&device.source).map_err(refused(format!("device {}", device.source)))?;
    }
    Ok(())
}

/// Where a path of the node leads, if containers may have that.
pub(crate) fn host_path(path: &Path, policy: &Policy) -> Result<PathBuf, String> {
    let shown = path.display();
    let led = path.canonicalize().map_err(|error| format!("{shown} of this node: {error}"))?;
    let text = led.to_str().ok_or_else(|| format!("{shown} of this node: is not UTF-8"))?;
    // What is allowed may be behind links as well.
    let real = |allowed: &String| Path::new(allowed).canonicalize().ok()?.to_str().map(str::to_owned);
    let policy = Policy { allow_host_path: policy.allow_host_path.iter().filter_map(real).collect(), ..policy.clone() };
    policy.host_path(text).map_err(|not| format!("{text} of this node {not}"))?;
    Ok(led)
}

/// What a container does not see: the usual, and what tells of other containers by their timing or power.
fn masked_paths() -> Vec<String> {
    let mut paths = get_default_maskedpaths();
    paths.extend(["/proc/interrupts", "/sys/devices/virtual/powercap"].map(str::to_owned));
    let processors = std::fs::read_dir("/sys/devices/system/cpu").into_iter().flatten().flatten();
    let throttles = processors.map(|processor| processor.path().join("thermal_throttle")).filter(|path| path.exists());
    paths.extend(throttles.map(|path| path.display().to_string()));
    paths
}

fn namespaces(network: &NetworkNamespace) -> Result<Vec<LinuxNamespace>, OciSpecError> {
    let own = [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Cgroup,
    ];
    let mut namespaces = Vec::new();
    for kind in own {
        namespaces.push(LinuxNamespaceBuilder::default().typ(kind).build()?);
    }
    let of_network = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network);
    match network {
        NetworkNamespace::Empty => namespaces.push(of_network.build()?),
        NetworkNamespace::Path(path) => namespaces.push(of_network.path(path).build()?),
        NetworkNamespace::Node => {}
    }
    Ok(namespaces)
}

/// Kernel parameters. In a network of its own a container may listen on any port and ping, whoever runs it, as with Docker.
fn sysctls(options: &ContainerOptions) -> HashMap<String, String> {
    let mut sysctls: HashMap<_, _> = options.spec.sysctls.clone().into_iter().collect();
    if options.network != NetworkNamespace::Node {
        for (name, value) in
            [("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")]
        {
            sysctls.entry(name.to_owned()).or_insert_with(|| value.to_owned());
        }
    }
    sysctls
}

pub(super) fn cannot_be_built(error: OciSpecError) -> Error {
    Error::BadSpec(format!("the container's spec cannot be built: {error}"))
}

/// The kernel's file systems, and then what the service and the agent mount, by depth: nothing hides what is below it.
fn mounts(options: &ContainerOptions) -> Result<Vec<Mount>, Error> {
    let spec = &options.spec;
    let mut kernels = get_default_mounts();
    let mut mounts = Vec::new();
    if spec.privileged {
        for mount in &mut kernels {
            let writable = mount.options().iter().flatten().filter(|option| *option != "ro").cloned().collect();
            mount.set_options(Some(writable));
        }
    }
    for (source, target) in &options.files {
        // A service's own mount of the same file counts more.
        if !spec.mounts.iter().any(|mount| mount.target == *target) {
            // The node's own are not the container's to change.
            mounts.push(bind(source, target, options.network == NetworkNamespace::Node)?);
        }
    }
    for wanted in &spec.mounts {
        mounts.push(self::mount(wanted, options)?);
    }
    for (source, target) in &options.secrets {
        mounts.push(bind_with(source, target, true, &["nosuid", "nodev", "noexec"])?);
    }
    if let Some((program, values)) = &options.env {
        mounts.push(bind(program, ENV, true)?);
        mounts.push(bind_with(values, ENV_VALUES, true, &["nosuid", "nodev", "noexec"])?);
    }
    if spec.init {
        let init = options.init.as_deref().ok_or_else(|| {
            Error::BadSpec("init: this node has no init program; install tini, or name one with --init-path".to_owned())
        })?;
        mounts.push(bind(init, INIT, true)?);
    }
    // Stable: of two at one place, the agent's comes last.
    mounts.sort_by_key(|mount| mount.destination().components().count());
    kernels.extend(mounts);
    Ok(kernels)
}

fn mount(wanted: &v1::Mount, of: &ContainerOptions) -> Result<Mount, Error> {
    match wanted.r#type() {
        v1::MountType::Tmpfs => {
            let mode = if wanted.mode == 0 { 0o1777 } else { wanted.mode };
            let mut options: Vec<_> = ["nosuid", "noexec", "nodev"].map(str::to_owned).into();
            options.push(format!("mode={mode:o}"));
            if wanted.size_bytes > 0 {
                options.push(format!("size={}", wanted.size_bytes));
            }
            if wanted.read_only {
                options.push("ro".to_owned());
            }
            let built = MountBuilder::default()
                .destination(&wanted.target)
                .typ("tmpfs")
                .source("tmpfs")
                .options(options)
                .build();
            built.map_err(cannot_be_built)
        }
        v1::MountType::Bind => {
            let source = host_path(Path::new(&wanted.source), &of.policy);
            let source = source.map_err(|why| Error::BadSpec(format!("mount {}: {why}", wanted.target)))?;
            bind(&source, &wanted.target, wanted.read_only)
        }
        v1::MountType::Volume => {
            let missing = || Error::BadSpec(format!("mount {}: there is no volume {:?}", wanted.target, wanted.source));
            bind(&of.volumes.get(&wanted.source).ok_or_else(missing)?.path, &wanted.target, wanted.read_only)
        }
        v1::MountType::Unspecified => Err(Error::BadSpec(format!("mount {}: has no type", wanted.target))),
    }
}

/// A file or directory of the node in a container. What is mounted below it later does not show up there.
fn bind(source: &Path, target: &str, read_only: bool) -> Result<Mount, Error> {
    bind_with(source, target, read_only, &[])
}

fn bind_with(source: &Path, target: &str, read_only: bool, more: &[&str]) -> Result<Mount, Error> {
    let access = if read_only { "ro" } else { "rw" };
    MountBuilder::default()
        .destination(target)
        .typ("bind")
        .source(source)
        .options(
            ["rbind", "rprivate", access].iter().chain(more).map(|option| (*option).to_owned()).collect::<Vec<_>>(),
        )
        .build()
        .map_err(cannot_be_built)
}

fn resources(options: &ContainerOptions, allowed: Vec<LinuxDeviceCgroup>) -> Result<LinuxResources, OciSpecError> {
    // Nothing but the devices that the runtime itself allows, and those that the service names.
    let mut devices = vec![LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build()?];
    devices.extend(allowed);
    let mut resources = LinuxResourcesBuilder::default().devices(devices).build()?;
    let limits = options.resources.limits.unwrap_or_default();
    let reservations = options.resources.reservations.unwrap_or_default();
    if limits.memory_bytes > 0 || reservations.memory_bytes > 0 {
        let mut memory = LinuxMemoryBuilder::default();
        if limits.memory_bytes > 0 {
            // Memory and swap together: no swap.
            memory = memory.limit(limits.memory_bytes).swap(limits.memory_bytes);
        }
        if reservations.memory_bytes > 0 {
            // The last to be reclaimed when the node runs short.
            memory = memory.reservation(reservations.memory_bytes);
        }
        resources.set_memory(Some(memory.build()?));
    }
    if limits.cpu_millis > 0 || reservations.cpu_millis > 0 {
        let mut cpu = LinuxCpuBuilder::default();
        if limits.cpu_millis > 0 {
            let quota = limits.cpu_millis.saturating_mul(CPU_PERIOD as i64) / 1000;
            cpu = cpu.quota(quota.max(1000)).period(CPU_PERIOD);
        }
        if reservations.cpu_millis > 0 {
            let shares = reservations.cpu_millis.saturating_mul(SHARES_PER_CORE) / 1000;
            cpu = cpu.shares(shares.max(2) as u64);
        }
        resources.set_cpu(Some(cpu.build()?));
    }
    let processes = if options.spec.pids_limit > 0 { options.spec.pids_limit } else { options.pids_limit };
    if processes > 0 {
        resources.set_pids(Some(LinuxPidsBuilder::default().limit(processes).build()?));
    }
    Ok(resources)
}

/// A device, and the rule that lets a container use it.
type Devices = (Vec<LinuxDevice>, Vec<LinuxDeviceCgroup>);

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn image() -> ImageConfig {
        serde_json::from_str(r#"{"Entrypoint":["/entry"],"Cmd":["a"],"Env":["A=1","PATH=/bin"],"User":"7:8"}"#)
            .expect("an image configuration")
    }

    pub(super) fn options(spec: v1::ContainerSpec) -> ContainerOptions {
        let id = "0123456789abcdefghijklmno".to_owned();
        let policy = Policy::everything();
        ContainerOptions { id, cgroup_parent: "/warren".into(), spec, policy, pids_limit: 77, ..Default::default() }
    }

    #[test]
    fn the_spec_confines_the_container() {
        let amounts = |cpu_millis, memory_bytes| Some(v1::ResourceAmounts { cpu_millis, memory_bytes });
        let spec = v1::ContainerSpec { pids_limit: 9, ..Default::default() };
        let resources = v1::Resources { limits: amounts(500, 1 << 24), reservations: amounts(250, 1 << 23) };
        let options = ContainerOptions { resources, ..options(spec) };
        let spec = build(&image(), &options, &Identity::ROOT).expect("a spec");
        assert_eq!(spec.hostname().as_deref(), Some("0123456789ab"));
        let linux = spec.linux().as_ref().expect("a Linux section");
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/warren/0123456789abcdefghijklmno")));
        assert!(linux.seccomp().as_ref().is_some_and(|s| s.syscalls().as_ref().is_some_and(|rules| rules.len() > 5)));
        let resources = linux.resources().as_ref().expect("resources");
        let memory = resources.memory().as_ref().expect("memory");
        assert_eq!(
            (memory.limit(), memory.swap(), memory.reservation()),
            (Some(1 << 24), Some(1 << 24), Some(1 << 23))
        );
        let cpu = resources.cpu().as_ref().expect("cpu");
        assert_eq!((cpu.quota(), cpu.shares()), (Some(50_000), Some(256)));
        assert_eq!(resources.pids().as_ref().map(|pids| pids.limit()), Some(9));
        let spec =
            build(&image(), &super::tests::options(v1::ContainerSpec::default()), &Identity::ROOT).expect("a spec");
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().clone()).expect("resources");
        assert_eq!(resources.pids().as_ref().map(|pids| pids.limit()), Some(77), "what the node says");
    }

    #[test]
    fn a_node_gives_what_its_own_policy_allows() {
        let refused = |spec, policy: &Policy| {
            let options = ContainerOptions { policy: policy.clone(), ..options(spec) };
            build(&image(), &options, &Identity::ROOT).map(drop).map_err(|error| error.to_string())
        };
        let closed = Policy::default();
        let plain = || v1::ContainerSpec { capabilities_add: vec!["CHOWN".to_owned()], ..Default::default() };
        assert_eq!(refused(plain(), &closed), Ok(()));
        let host = v1::ContainerSpec { network: v1::NetworkMode::Host.into(), ..plain() };
        let device = v1::Device { source: "/dev/null".to_owned(), ..Default::default() };
        for (spec, why) in [
            (v1::ContainerSpec { privileged: true, ..plain() }, "privileged is not allowed: --allow-privileged"),
            (host, "the node's network is not allowed: --allow-host-network"),
            (
                v1::ContainerSpec { capabilities_add: vec!["all".to_owned()], ..plain() },
                "capability all is not allowed: --allow-capability ALL",
            ),
            (
                v1::ContainerSpec { devices: vec![device], ..plain() },
                "device /dev/null is not allowed: --allow-device /dev/null",
            ),
        ] {
            let said = refused(spec.clone(), &closed).expect_err(why);
            assert!(said.starts_with(why), "{said}");
            assert_eq!(refused(spec, &Policy::everything()), Ok(()));
        }
        // Where a path leads counts, not how it is called.
        let directory = tempfile::tempdir().expect("a directory");
        let (real, link) = (directory.path().join("real"), directory.path().join("link"));
        std::fs::create_dir(&real).expect("writable");
        std::os::unix::fs::symlink("/etc", &link).expect("writable");
        let bind = |source: &Path| v1::ContainerSpec {
            mounts: vec![v1::Mount {
                r#type: v1::MountType::Bind.into(),
                source: source.display().to_string(),
                target: "/x".to_owned(),
                ..Default::default()
            }],
            ..plain()
        };
        let open = Policy { allow_host_path: vec![directory.path().display().to_string()], ..Policy::default() };
        assert_eq!(refused(bind(&real), &open), Ok(()));
        let led = refused(bind(&link), &open).expect_err("it leads elsewhere");
        assert!(led.starts_with("mount /x: /etc of this node is not allowed: --allow-host-path /etc"), "{led}");
        assert!(refused(bind(&real), &closed).is_err());
    }

    #[test]
    fn mounts_are_made_by_depth() {
        let mount = |kind: v1::MountType, source: &str, target: &str| v1::Mount {
            r#type: kind.into(),
            source: source.to_owned(),
            target: target.to_owned(),
            ..Default::default()
        };
        let mounts = vec![
            mount(v1::MountType::Bind, "/usr", "/s/a/b"),
            mount(v1::MountType::Bind, "/etc", "/etc"),
            mount(v1::MountType::Tmpfs, "", "/s/a/"),
        ];
        let mut options = options(v1::ContainerSpec { mounts, ..Default::default() });
        options.files = vec![(PathBuf::from("/dev/null"), "/etc/hosts")];
        let made = super::mounts(&options).expect("mounts");
        let at = |target: &str| made.iter().position(|mount| mount.destination() == Path::new(target)).expect(target);
        assert!(at("/proc") < at("/etc") && at("/etc") < at("/etc/hosts"));
        assert!(at("/s/a") < at("/s/a/b"));
    }

    #[test]
    fn what_is_not_on_the_node_is_named() {
        let refused = |spec| build(&image(), &options(spec), &Identity::ROOT).expect_err("refused").to_string();
        let missing = v1::Mount { source: "/none/such".to_owned(), target: "/x".to_owned(), ..Default::default() };
        let bind = v1::Mount { r#type: v1::MountType::Bind.into(), ..missing };
        let why = refused(v1::ContainerSpec { mounts: vec![bind], ..Default::default() });
        assert!(why.starts_with("mount /x: /none/such of this node: "), "{why}");
        let device = v1::Device { source: "/dev/none-such".to_owned(), ..Default::default() };
        let why = refused(v1::ContainerSpec { devices: vec![device], ..Default::default() });
        assert!(why.starts_with("device /dev/none-such of this node: "), "{why}");
        let why = refused(v1::ContainerSpec { init: true, ..Default::default() });
        assert!(why.starts_with("init: this node has no init program"), "{why}");
    }
}
