//! The OCI runtime spec of a container.

use std::{path::PathBuf, time::Duration};

use oci_spec::{
    OciSpecError,
    image::Config as ImageConfig,
    runtime::{
        Arch, Capabilities, Capability, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxCpuBuilder,
        LinuxDeviceCgroupBuilder, LinuxMemoryBuilder, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResources,
        LinuxResourcesBuilder, LinuxSeccomp, PosixRlimitBuilder, PosixRlimitType, Process, ProcessBuilder, RootBuilder,
        Spec, SpecBuilder, UserBuilder, get_default_maskedpaths, get_default_mounts, get_default_readonly_paths,
    },
};
use rustix::process::{Resource, getrlimit};

use super::Error;

/// From the stop signal to SIGKILL unless a service says otherwise.
pub const DEFAULT_STOP_TIMEOUT: Duration = Duration::from_secs(10);

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a container may do as root: Docker's and containerd's default set.
const CAPABILITIES: [Capability; 14] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// containerd's default profile (contrib/seccomp of containerd 1.7, Apache-2.0) for [`CAPABILITIES`], without io_uring,
/// which later versions dropped.
const SECCOMP: &str = include_str!("seccomp.json");

/// Open files: enough for servers, and what Debian's shells have.
const SOFT_FILES: u64 = 1024;
const HARD_FILES: u64 = 1 << 20;

/// Length of a CPU period, in microseconds: the kernel's default.
const CPU_PERIOD: u64 = 100_000;
/// The weight of one core in `cpu.shares`.
const SHARES_PER_CORE: i64 = 1024;

/// What a service says about its containers, as far as the spec is concerned.
#[derive(Clone, Debug, Default)]
pub struct ContainerOptions {
    /// The container's id.
    pub id: String,
    /// Replaces the image's entrypoint.
    pub command: Vec<String>,
    /// Replaces the image's command.
    pub args: Vec<String>,
    /// Added to the image's environment, as NAME=value.
    pub env: Vec<String>,
    /// Where its cgroup is made.
    pub cgroup_parent: PathBuf,
    /// Thousandths of a core it may use; 0 is no limit.
    pub cpu_limit_millis: i64,
    /// Thousandths of a core that it is weighted by; 0 is the kernel's default.
    pub cpu_reservation_millis: i64,
    /// Bytes it may use; 0 is no limit.
    pub memory_limit_bytes: i64,
}

/// Builds the spec from the image's configuration and the service's options.
pub(super) fn build(image: &ImageConfig, options: &ContainerOptions) -> Result<Spec, Error> {
    let spec = assemble(image, options);
    spec.map_err(|error| Error::BadSpec(format!("the container's spec cannot be built: {error}")))?
}

fn assemble(image: &ImageConfig, options: &ContainerOptions) -> Result<Result<Spec, Error>, OciSpecError> {
    let args = match arguments(image, options) {
        Ok(args) => args,
        Err(error) => return Ok(Err(error)),
    };
    let user = match numeric_user(image.user().as_deref().unwrap_or_default()) {
        Ok(user) => user,
        Err(error) => return Ok(Err(error)),
    };
    let namespaces = [
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Network,
        LinuxNamespaceType::Cgroup,
    ];
    let namespaces: Result<Vec<_>, _> =
        namespaces.into_iter().map(|kind| LinuxNamespaceBuilder::default().typ(kind).build()).collect();
    let linux = LinuxBuilder::default()
        .namespaces(namespaces?)
        .cgroups_path(options.cgroup_parent.join(&options.id))
        .resources(resources(options)?)
        .seccomp(seccomp())
        .masked_paths(get_default_maskedpaths())
        .readonly_paths(get_default_readonly_paths())
        .build()?;
    let spec = SpecBuilder::default()
        .version("1.0.2")
        .hostname(options.id.chars().take(63).collect::<String>())
        .process(process(image, options, args, user)?)
        .root(RootBuilder::default().path("rootfs").readonly(false).build()?)
        .mounts(get_default_mounts())
        .linux(linux)
        .build()?;
    Ok(Ok(spec))
}

fn process(
    image: &ImageConfig,
    options: &ContainerOptions,
    args: Vec<String>,
    (uid, gid): (u32, u32),
) -> Result<Process, OciSpecError> {
    let mut env = vec![DEFAULT_PATH.to_owned()];
    env.extend(image.env().clone().unwrap_or_default());
    env.extend(options.env.iter().cloned());
    let cwd = image.working_dir().clone().filter(|dir| !dir.is_empty()).unwrap_or_else(|| "/".to_owned());

    let all: Capabilities = CAPABILITIES.into_iter().collect();
    let effective = if uid == 0 { all.clone() } else { Capabilities::new() };
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(all)
        .effective(effective.clone())
        .permitted(effective)
        .inheritable(Capabilities::new())
        .ambient(Capabilities::new())
        .build()?;
    // More than the agent may have itself, the runtime could not give.
    let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(HARD_FILES).min(HARD_FILES);
    let files = PosixRlimitBuilder::default()
        .typ(PosixRlimitType::RlimitNofile)
        .soft(SOFT_FILES.min(hard))
        .hard(hard)
        .build()?;
    ProcessBuilder::default()
        .terminal(false)
        .user(UserBuilder::default().uid(uid).gid(gid).build()?)
        .args(args)
        .env(last_of_each_name(env))
        .cwd(cwd)
        .capabilities(capabilities)
        .no_new_privileges(true)
        .rlimits(vec![files])
        .build()
}

/// The command line: a service's command replaces the image's entrypoint and, as Docker has it, its command too.
fn arguments(image: &ImageConfig, options: &ContainerOptions) -> Result<Vec<String>, Error> {
    let entrypoint = image.entrypoint().clone().unwrap_or_default();
    let image_args = image.cmd().clone().unwrap_or_default();
    let mut args = if options.command.is_empty() { entrypoint } else { options.command.clone() };
    if !options.args.is_empty() {
        args.extend(options.args.iter().cloned());
    } else if options.command.is_empty() {
        args.extend(image_args);
    }
    if args.is_empty() {
        return Err(Error::BadSpec("neither the service nor its image says what to run".to_owned()));
    }
    Ok(args)
}

/// A user and a group by number. Names need the image's own files and are not looked up yet.
fn numeric_user(user: &str) -> Result<(u32, u32), Error> {
    if user.is_empty() || user == "root" {
        return Ok((0, 0));
    }
    let (uid, gid) = user.split_once(':').unwrap_or((user, "0"));
    match (uid.parse(), gid.parse()) {
        (Ok(uid), Ok(gid)) => Ok((uid, gid)),
        _ => Err(Error::BadSpec(format!("the image's user {user:?} is a name; only numbers work so far"))),
    }
}

/// One entry a variable, the last one's value, in the order of first mention.
fn last_of_each_name(env: Vec<String>) -> Vec<String> {
    fn name(entry: &str) -> &str {
        entry.split('=').next().unwrap_or_default()
    }
    let mut result: Vec<String> = Vec::new();
    for entry in env {
        match result.iter_mut().find(|known| name(known) == name(&entry)) {
            Some(known) => *known = entry,
            None => result.push(entry),
        }
    }
    result
}

fn resources(options: &ContainerOptions) -> Result<LinuxResources, OciSpecError> {
    // Nothing but the devices that the runtime itself allows.
    let no_devices = LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build()?;
    let mut resources = LinuxResourcesBuilder::default().devices(vec![no_devices]).build()?;
    if options.memory_limit_bytes > 0 {
        // Memory and swap together: no swap.
        let limit = options.memory_limit_bytes;
        resources.set_memory(Some(LinuxMemoryBuilder::default().limit(limit).swap(limit).build()?));
    }
    if options.cpu_limit_millis > 0 || options.cpu_reservation_millis > 0 {
        let mut cpu = LinuxCpuBuilder::default();
        if options.cpu_limit_millis > 0 {
            let quota = options.cpu_limit_millis.saturating_mul(CPU_PERIOD as i64) / 1000;
            cpu = cpu.quota(quota.max(1000)).period(CPU_PERIOD);
        }
        if options.cpu_reservation_millis > 0 {
            let shares = options.cpu_reservation_millis.saturating_mul(SHARES_PER_CORE) / 1000;
            cpu = cpu.shares(shares.max(2) as u64);
        }
        resources.set_cpu(Some(cpu.build()?));
    }
    Ok(resources)
}

fn seccomp() -> LinuxSeccomp {
    let mut profile: LinuxSeccomp = serde_json::from_str(SECCOMP).expect("the embedded profile is tested");
    profile.set_architectures(Some(match std::env::consts::ARCH {
        "aarch64" => vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm],
        _ => vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32],
    }));
    profile
}

/// A signal by name, with or without SIG, or by number.
#[must_use]
pub fn parse_signal(signal: &str) -> Option<u32> {
    const NAMES: [(&str, u32); 12] = [
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("ABRT", 6),
        ("KILL", 9),
        ("USR1", 10),
        ("USR2", 12),
        ("ALRM", 14),
        ("TERM", 15),
        ("CONT", 18),
        ("WINCH", 28),
        ("PWR", 30),
    ];
    /// Linux's first real-time signal as glibc numbers it; RTMIN+3 is what systemd stops at.
    const RTMIN: u32 = 34;
    let upper = signal.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = name.strip_prefix("RTMIN") {
        let offset: u32 = if offset.is_empty() { 0 } else { offset.strip_prefix('+')?.parse().ok()? };
        return Some(RTMIN + offset).filter(|number| *number < 64);
    }
    let named = NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    named.or_else(|| name.parse().ok().filter(|number| (1..64).contains(number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageConfig {
        serde_json::from_str(r#"{"Entrypoint":["/entry"],"Cmd":["a"],"Env":["A=1","PATH=/bin"],"User":"7:8"}"#)
            .expect("an image configuration")
    }

    fn options() -> ContainerOptions {
        ContainerOptions { id: "c1".to_owned(), cgroup_parent: "/warren".into(), ..Default::default() }
    }

    #[test]
    fn a_service_overrides_its_image() {
        let args = |command: &[&str], args: &[&str]| {
            let own = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
            arguments(&image(), &ContainerOptions { command: own(command), args: own(args), ..options() })
        };
        assert_eq!(args(&[], &[]).expect("a command"), ["/entry", "a"]);
        assert_eq!(args(&[], &["b"]).expect("a command"), ["/entry", "b"]);
        assert_eq!(args(&["/sh"], &[]).expect("a command"), ["/sh"]);
        assert_eq!(args(&["/sh"], &["-c"]).expect("a command"), ["/sh", "-c"]);
        assert!(arguments(&ImageConfig::default(), &options()).is_err());
    }

    #[test]
    fn the_spec_confines_the_container() {
        let options = ContainerOptions {
            env: vec!["A=2".to_owned()],
            memory_limit_bytes: 1 << 24,
            cpu_limit_millis: 500,
            ..options()
        };
        let spec = build(&image(), &options).expect("a spec");
        let process = spec.process().as_ref().expect("a process");
        assert_eq!(process.env().as_deref(), Some(&["PATH=/bin".to_owned(), "A=2".to_owned()][..]));
        assert_eq!(process.no_new_privileges(), Some(true));
        assert_eq!((process.user().uid(), process.user().gid()), (7, 8));
        let capabilities = process.capabilities().as_ref().expect("capabilities");
        assert!(capabilities.effective().as_ref().is_some_and(Capabilities::is_empty));
        assert_eq!(capabilities.bounding().as_ref().map(Capabilities::len), Some(CAPABILITIES.len()));
        let linux = spec.linux().as_ref().expect("a Linux section");
        assert_eq!(linux.cgroups_path().as_deref(), Some("/warren/c1".as_ref()));
        assert!(linux.seccomp().as_ref().is_some_and(|s| s.syscalls().as_ref().is_some_and(|rules| rules.len() > 5)));
        let resources = linux.resources().as_ref().expect("resources");
        assert_eq!(resources.memory().as_ref().and_then(|memory| memory.limit()), Some(1 << 24));
        assert_eq!(resources.cpu().as_ref().and_then(|cpu| cpu.quota()), Some(50_000));
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [("SIGTERM", 15), ("term", 15), ("9", 9), ("SIGRTMIN+3", 37), ("usr1", 10)] {
            assert_eq!(parse_signal(text), Some(number), "{text}");
        }
        for text in ["", "0", "64", "SIGNOPE", "RTMIN+99", "-1"] {
            assert_eq!(parse_signal(text), None, "{text}");
        }
    }
}
