use std::{
    collections::{BTreeSet, HashMap},
    path::{Component, Path, PathBuf},
};

use oci_spec::{
    image::Config as ImageConfig,
    runtime::{
        Capabilities, LinuxCapabilitiesBuilder, PosixRlimit, PosixRlimitBuilder, Process, ProcessBuilder, UserBuilder,
    },
};
use rustix::{
    process::{Resource, getrlimit},
    thread::{CapabilitySet, capabilities as own_capabilities},
};
use warren_proto::v1;
use warren_spec::{CAPABILITIES, DEFAULT_CAPABILITIES};

use super::{super::Error, ContainerOptions, ENV, ENV_VALUES, INIT, Identity, cannot_be_built};

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Variables of a process: the runtime sets each by looking through all others, and no image has a hundredth of these.
const MAX_VARIABLES: usize = 10_000;

/// Open files: enough for servers, and what Debian's shells have.
const SOFT_FILES: u64 = 1024;
const HARD_FILES: u64 = 1 << 20;

/// The container's first process.
pub(super) fn build(image: &ImageConfig, options: &ContainerOptions, identity: &Identity) -> Result<Process, Error> {
    let spec = &options.spec;
    let args = arguments(image, options)?;
    let working_dir = working_dir(image, spec)?;
    let env = environment(image, options, identity);
    if env.len() > MAX_VARIABLES {
        let why = format!("its environment has {} variables, and {MAX_VARIABLES} are the most", env.len());
        return Err(Error::BadSpec(why));
    }
    let named =
        |names: BTreeSet<&str>| -> Capabilities { names.into_iter().filter_map(|name| name.parse().ok()).collect() };
    let all = named(capabilities(spec));
    if let Some(missing) = not_own(&capabilities(spec)) {
        return Err(Error::BadSpec(format!(
            "capability {missing} cannot be given: this node's agent does not have it"
        )));
    }
    let effective = if identity.uid == 0 { all.clone() } else { named(ambient(spec)) };
    // What is ambient stays with the programs that another user than root executes.
    let ambient = if identity.uid == 0 { Capabilities::new() } else { effective.clone() };
    let rlimits = rlimits(spec)?;
    let assembled = || {
        let capabilities = LinuxCapabilitiesBuilder::default()
            .bounding(all)
            .effective(effective.clone())
            .permitted(effective)
            .inheritable(ambient.clone())
            .ambient(ambient)
            .build()?;
        let user = UserBuilder::default()
            .uid(identity.uid)
            .gid(identity.gid)
            .additional_gids(identity.groups.clone())
            .build()?;
        ProcessBuilder::default()
            .terminal(false)
            .user(user)
            .args(args)
            .env(env)
            .cwd(working_dir)
            .capabilities(capabilities)
            .no_new_privileges(spec.no_new_privileges.unwrap_or(!spec.privileged))
            .rlimits(rlimits)
            .build()
    };
    assembled().map_err(cannot_be_built)
}

/// Where a process begins. What an image says may be relative, and must not lead to what the runtime has open at the time.
fn working_dir(image: &ImageConfig, spec: &v1::ContainerSpec) -> Result<String, Error> {
    let of_image = image.working_dir().clone().filter(|directory| !directory.is_empty());
    let said = if spec.working_dir.is_empty() { of_image.unwrap_or_default() } else { spec.working_dir.clone() };
    let mut path = PathBuf::from("/");
    for component in Path::new(&said).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => drop(path.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    let path = path.to_string_lossy().into_owned();
    if warren_spec::inside(&path, "/proc") {
        return Err(Error::BadSpec(format!("working directory {said}: nothing begins in /proc")));
    }
    Ok(path)
}

fn environment(image: &ImageConfig, options: &ContainerOptions, identity: &Identity) -> Vec<String> {
    let mut env =
        vec![DEFAULT_PATH.to_owned(), format!("HOSTNAME={}", options.hostname()), format!("HOME={}", identity.home)];
    env.extend(image.env().clone().unwrap_or_default());
    env.extend(options.spec.env.iter().map(|(name, value)| format!("{name}={value}")));
    // What is a secret is no image's to say.
    let secrets = options.spec.secrets.iter().chain(&options.spec.configs).map(|mount| mount.env.as_str());
    let secrets: BTreeSet<_> = secrets.filter(|name| !name.is_empty()).collect();
    env.retain(|entry| !secrets.contains(entry.split('=').next().unwrap_or_default()));
    last_of_each_name(env)
}

/// The command line: a service's command replaces the image's entrypoint and, as Docker has it, its command too.
fn arguments(image: &ImageConfig, options: &ContainerOptions) -> Result<Vec<String>, Error> {
    let spec = &options.spec;
    let entrypoint = image.entrypoint().clone().unwrap_or_default();
    let image_args = image.cmd().clone().unwrap_or_default();
    let mut args = if spec.command.is_empty() { entrypoint } else { spec.command.clone() };
    if !spec.args.is_empty() {
        args.extend(spec.args.iter().cloned());
    } else if spec.command.is_empty() {
        args.extend(image_args);
    }
    if args.is_empty() {
        return Err(Error::BadSpec("neither the service nor its image says what to run".to_owned()));
    }
    if options.env.is_some() {
        args.splice(0..0, [ENV, ENV_VALUES].map(str::to_owned));
    }
    if spec.init {
        args.splice(0..0, [INIT.to_owned(), "--".to_owned()]);
    }
    Ok(args)
}

/// The command line of another process of a container, which has the same secrets in its environment as the first one.
pub(in super::super) fn with_same_env(first: &Process, command: &[String]) -> Vec<String> {
    let words: Vec<_> = first.args().iter().flatten().map(String::as_str).collect();
    let after_init = words.strip_prefix(&[INIT, "--"]).unwrap_or(&words);
    let has_values = after_init.starts_with(&[ENV, ENV_VALUES]);
    let through: &[&str] = if has_values { &[ENV, ENV_VALUES] } else { &[] };
    through.iter().map(|word| (*word).to_owned()).chain(command.iter().cloned()).collect()
}

/// One entry a variable, the last one's value, in the order of first mention. An image may name very many.
pub(in super::super) fn last_of_each_name(env: Vec<String>) -> Vec<String> {
    let mut places: HashMap<String, usize> = HashMap::new();
    let mut result: Vec<String> = Vec::new();
    for entry in env {
        let name = entry.split('=').next().unwrap_or_default().to_owned();
        let place = *places.entry(name).or_insert(result.len());
        match result.get_mut(place) {
            Some(known) => *known = entry,
            None => result.push(entry),
        }
    }
    result
}

/// What another user than root may do: no more than the service adds by name.
fn ambient(spec: &v1::ContainerSpec) -> BTreeSet<&'static str> {
    if spec.privileged { BTreeSet::new() } else { changed(BTreeSet::new(), spec) }
}

/// What a container may do as root. ALL is what the agent itself has.
pub(super) fn capabilities(spec: &v1::ContainerSpec) -> BTreeSet<&'static str> {
    if spec.privileged {
        return own().collect();
    }
    // What the agent does not have it cannot give: that is no matter, unless the service names it.
    let may_have: BTreeSet<_> = own().collect();
    changed(DEFAULT_CAPABILITIES.into_iter().filter(|name| may_have.contains(name)).collect(), spec)
}

fn own() -> impl Iterator<Item = &'static str> {
    CAPABILITIES.into_iter().filter(|name| not_own(&BTreeSet::from([*name])).is_none())
}

/// What is dropped goes first, then what is added comes: a name counts more than ALL, and what is added more than what is dropped.
fn changed(mut set: BTreeSet<&'static str>, spec: &v1::ContainerSpec) -> BTreeSet<&'static str> {
    let known =
        |names: &[String]| -> BTreeSet<_> { names.iter().filter_map(|name| warren_spec::capability(name)).collect() };
    let (dropped, added) = (known(&spec.capabilities_drop), known(&spec.capabilities_add));
    if dropped.contains("ALL") {
        set.clear();
    }
    if added.contains("ALL") {
        set.extend(own());
    }
    set.retain(|name| !dropped.contains(name));
    set.extend(added.into_iter().filter(|name| *name != "ALL"));
    set
}

/// A capability of these that the agent does not have, and so could not give; defaults that it lacks are no matter.
fn not_own(wanted: &BTreeSet<&'static str>) -> Option<&'static str> {
    let own = own_capabilities(None).map(|sets| sets.permitted).unwrap_or(CapabilitySet::all());
    let has = |name: &&str| {
        let bit = CAPABILITIES.iter().position(|known| known == name);
        bit.is_some_and(|bit| own.bits() & (1 << bit) != 0)
    };
    wanted.iter().find(|name| !has(name)).copied()
}

fn rlimits(spec: &v1::ContainerSpec) -> Result<Vec<PosixRlimit>, Error> {
    let own_files = getrlimit(Resource::Nofile).maximum.unwrap_or(HARD_FILES);
    let mut limits = Vec::new();
    if !spec.ulimits.keys().any(|name| name.eq_ignore_ascii_case("nofile")) {
        // More than the agent may have itself, the runtime could not give.
        let hard = own_files.min(HARD_FILES);
        limits.push(rlimit("nofile", SOFT_FILES.min(hard), hard)?);
    }
    if !spec.ulimits.keys().any(|name| name.eq_ignore_ascii_case("core")) {
        // What a process has in memory is in its core dump, its secrets too.
        limits.push(rlimit("core", 0, 0)?);
    }
    // -1 is no limit, which is what the kernel's largest number means.
    let amount = |value: i64| u64::try_from(value).unwrap_or(u64::MAX);
    for (name, limit) in &spec.ulimits {
        limits.push(rlimit(name, amount(limit.soft), amount(limit.hard))?);
    }
    Ok(limits)
}

fn rlimit(name: &str, soft: u64, hard: u64) -> Result<PosixRlimit, Error> {
    let kind = serde_json::from_value(format!("RLIMIT_{}", name.to_ascii_uppercase()).into());
    let kind = kind.map_err(|_| Error::BadSpec(format!("ulimit {name}: there is no such limit")))?;
    if let Some(own) = own_hard_limit(name)
        && hard > own
        && not_own(&BTreeSet::from(["SYS_RESOURCE"])).is_some()
    {
        let hard = if hard == u64::MAX { "no limit".to_owned() } else { hard.to_string() };
        let why = format!("ulimit {name}: {hard} cannot be given: this node's agent is itself limited to {own}");
        return Err(Error::BadSpec(why));
    }
    PosixRlimitBuilder::default()
        .typ::<oci_spec::runtime::PosixRlimitType>(kind)
        .soft(soft)
        .hard(hard)
        .build()
        .map_err(cannot_be_built)
}

/// The agent's own hard limit; `None` if it has none.
fn own_hard_limit(name: &str) -> Option<u64> {
    let resource = match warren_spec::ulimit(name)? {
        "as" => Resource::As,
        "core" => Resource::Core,
        "cpu" => Resource::Cpu,
        "data" => Resource::Data,
        "fsize" => Resource::Fsize,
        "locks" => Resource::Locks,
        "memlock" => Resource::Memlock,
        "msgqueue" => Resource::Msgqueue,
        "nice" => Resource::Nice,
        "nofile" => Resource::Nofile,
        "nproc" => Resource::Nproc,
        "rss" => Resource::Rss,
        "rtprio" => Resource::Rtprio,
        "rttime" => Resource::Rttime,
        "sigpending" => Resource::Sigpending,
        "stack" => Resource::Stack,
        _ => return None,
    };
    getrlimit(resource).maximum
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{image, options},
        *,
    };

    #[test]
    fn nothing_begins_in_the_kernels_own_files() {
        let image = |directory: &str| -> ImageConfig {
            serde_json::from_value(serde_json::json!({ "WorkingDir": directory })).expect("a configuration")
        };
        let directory = |of_image: &str, of_service: &str| {
            let spec = v1::ContainerSpec { working_dir: of_service.to_owned(), ..Default::default() };
            working_dir(&image(of_image), &spec).map_err(|error| error.to_string())
        };
        for (of_image, of_service, expected) in [
            ("", "", "/"),
            ("/srv/", "", "/srv"),
            ("srv/./x", "", "/srv/x"),
            ("/a/../../b", "", "/b"),
            ("/srv", "/home", "/home"),
        ] {
            assert_eq!(directory(of_image, of_service), Ok(expected.to_owned()), "{of_image} {of_service}");
        }
        for (of_image, of_service) in [("/proc/self/fd/7", ""), ("/a/../proc/self", ""), ("", "/proc/self/fd/8")] {
            let why = directory(of_image, of_service).expect_err("refused");
            assert!(why.contains("nothing begins in /proc"), "{why}");
        }
    }

    #[test]
    fn a_service_overrides_its_image() {
        let args = |command: &[&str], args: &[&str], init| {
            let own = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
            let spec = v1::ContainerSpec { command: own(command), args: own(args), init, ..Default::default() };
            arguments(&image(), &options(spec))
        };
        assert_eq!(args(&[], &[], false).expect("a command"), ["/entry", "a"]);
        assert_eq!(args(&[], &["b"], false).expect("a command"), ["/entry", "b"]);
        assert_eq!(args(&["/sh"], &[], false).expect("a command"), ["/sh"]);
        assert_eq!(args(&["/sh"], &["-c"], true).expect("a command"), [INIT, "--", "/sh", "-c"]);
        assert!(arguments(&ImageConfig::default(), &options(v1::ContainerSpec::default())).is_err());
    }

    #[test]
    fn variables_that_are_secrets_come_by_a_program_and_in_no_spec() {
        let helper = Some(("/lib/env".into(), "/run/values".into()));
        let with_env = |init| {
            let spec = v1::ContainerSpec { init, ..Default::default() };
            let options = ContainerOptions { env: helper.clone(), ..options(spec) };
            build(&image(), &options, &Identity::ROOT).expect("a process")
        };
        let shell = ["sh".to_owned()];
        for (init, first) in [(false, &[][..]), (true, &[INIT, "--"])] {
            let process = with_env(init);
            let expected = [first, &[ENV, ENV_VALUES, "/entry", "a"]].concat();
            assert_eq!(process.args().clone().expect("arguments"), expected);
            assert_eq!(with_same_env(&process, &shell), [ENV, ENV_VALUES, "sh"]);
        }
        let without = build(&image(), &options(v1::ContainerSpec::default()), &Identity::ROOT).expect("a process");
        assert_eq!(with_same_env(&without, &shell), ["sh"]);
    }

    #[test]
    fn who_runs_it_decides_what_it_may() {
        let spec = v1::ContainerSpec { env: [("A".to_owned(), "2".to_owned())].into(), ..Default::default() };
        let identity = Identity { uid: 7, gid: 8, groups: vec![9], home: "/home/seven".to_owned() };
        let process = build(&image(), &options(spec.clone()), &identity).expect("a process");
        let env = ["PATH=/bin", "HOSTNAME=0123456789ab", "HOME=/home/seven", "A=2"].map(str::to_owned);
        assert_eq!(process.env().as_deref(), Some(&env[..]));
        assert_eq!(process.no_new_privileges(), Some(true));
        let user = process.user();
        assert_eq!((user.uid(), user.gid(), user.additional_gids().clone()), (7, 8, Some(vec![9])));
        let capabilities = process.capabilities().as_ref().expect("capabilities");
        assert!(capabilities.effective().as_ref().is_some_and(Capabilities::is_empty));
        assert_eq!(capabilities.bounding().as_ref().map(Capabilities::len), Some(DEFAULT_CAPABILITIES.len()));
        // What the service adds stays with its programs, and setuid ones work where it wants them to.
        let added = v1::ContainerSpec {
            capabilities_add: vec!["NET_RAW".to_owned()],
            no_new_privileges: Some(false),
            ..spec.clone()
        };
        let process = build(&image(), &options(added), &identity).expect("a process");
        assert_eq!(process.no_new_privileges(), Some(false));
        let capabilities = process.capabilities().as_ref().expect("capabilities");
        let net_raw = Capabilities::from([oci_spec::runtime::Capability::NetRaw]);
        for set in
            [capabilities.effective(), capabilities.permitted(), capabilities.inheritable(), capabilities.ambient()]
        {
            assert_eq!(set.as_ref(), Some(&net_raw));
        }
        let process = build(&image(), &options(spec), &Identity::ROOT).expect("a process");
        let capabilities = process.capabilities().as_ref().expect("capabilities");
        assert_eq!(capabilities.effective(), capabilities.bounding());
    }

    #[test]
    fn capabilities_are_dropped_and_then_added() {
        let set = |add: &[&str], drop: &[&str]| {
            let own = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
            capabilities(&v1::ContainerSpec {
                capabilities_add: own(add),
                capabilities_drop: own(drop),
                ..Default::default()
            })
        };
        assert_eq!(set(&[], &[]), BTreeSet::from(DEFAULT_CAPABILITIES));
        assert_eq!(set(&["CAP_NET_ADMIN"], &["all"]), BTreeSet::from(["NET_ADMIN"]));
        assert!(!set(&[], &["chown"]).contains("CHOWN"));
        assert!(!set(&["ALL"], &["NET_RAW"]).contains("NET_RAW"));
        assert!(set(&["ALL"], &["ALL"]).len() > 14);
        assert!(set(&["ALL"], &[]).is_superset(&BTreeSet::from(DEFAULT_CAPABILITIES)));
    }
}
