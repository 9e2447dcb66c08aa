//! Bringing the programs into the kernel, once, and finding them again.

use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    os::fd::OwnedFd,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::Array,
    programs::{BtfTracePoint, CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, ProgramError, links::FdLink},
};
use rustix::fs::{FlockOperation, Mode, OFlags};
use warren_agent_ebpf::abi::{self, COUNTS, Config, Meta, RUNTIMES};

use super::{
    Error, OBJECT,
    maps::{self, Maps},
    migrate,
    offsets::Kernel,
};

/// The programs compare a packet's ports with as many.
pub const MAX_DNS_PORTS: usize = 4;

/// How the probes work.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where maps, programs and attachments are pinned: a directory on bpffs, mounted if need be.
    pub pin_dir: PathBuf,
    /// The cgroup whose sockets' DNS queries are timed, under the v2 mount; `/` is all of the host.
    pub dns_cgroup: PathBuf,
    /// Count only containers that were registered beforehand, not everything that a known runtime makes.
    pub registered_only: bool,
    /// A DNS query that waits longer counts as unanswered.
    pub dns_timeout: Duration,
    /// DNS answers slower than this are reported one by one. Zero reports none.
    pub dns_slow: Duration,
    /// Ports taken for DNS; at most [`MAX_DNS_PORTS`], others are ignored.
    pub dns_ports: Vec<u16>,
}

/// What a program is attached to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Hook {
    Tracepoint(&'static str),
    Skb(CgroupSkbAttachType),
}

/// The programs by name, with the probe each belongs to and what it is attached to.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// The function's name in the object, and the pin's.
    pub name: &'static str,
    /// `lifecycle` or `dns`.
    pub probe: &'static str,
    pub(super) hook: Hook,
}

const fn tracepoint(name: &'static str, tracepoint: &'static str) -> Program {
    Program { name, probe: "lifecycle", hook: Hook::Tracepoint(tracepoint) }
}

/// All programs.
pub const PROGRAMS: [Program; 10] = [
    tracepoint("on_exec", "sched_process_exec"),
    tracepoint("on_exit", "sched_process_exit"),
    tracepoint("on_signal", "signal_generate"),
    tracepoint("on_oom", "mark_victim"),
    tracepoint("on_cgroup_mkdir", "cgroup_mkdir"),
    tracepoint("on_cgroup_attach", "cgroup_attach_task"),
    tracepoint("on_cgroup_populated", "cgroup_notify_populated"),
    tracepoint("on_cgroup_rmdir", "cgroup_rmdir"),
    Program { name: "dns_egress", probe: "dns", hook: Hook::Skb(CgroupSkbAttachType::Egress) },
    Program { name: "dns_ingress", probe: "dns", hook: Hook::Skb(CgroupSkbAttachType::Ingress) },
];

impl Maps {
    /// Opens the probes that an earlier agent left in the kernel, or brings them there.
    ///
    /// # Errors
    ///
    /// See [`Error`]; nothing stays attached after one.
    pub fn open(options: &Options) -> Result<Self, Error> {
        if OBJECT.is_empty() {
            return Err(Error::NotBuilt);
        }
        mount_bpffs(&options.pin_dir)?;
        create_dir(&options.pin_dir)?;
        let lock = lock(&options.pin_dir)?;
        let directory = migrate::directory(&options.pin_dir, abi::HASH);

        let kernel = Kernel::running()?;
        let cgroup = cgroup_directory(options)?;
        let config = config(options, &kernel);
        let programs = fingerprint(&config, &cgroup);
        let newest = migrate::newest(&options.pin_dir);
        let other = newest.as_ref().filter(|(path, _)| *path != directory);
        if other.is_some() || !is_current(&directory, programs) {
            let probes = Probes { kernel: &kernel, config: &config, cgroup: &cgroup, programs };
            match other {
                Some((before, meta)) => probes.replace(before, meta, &directory)?,
                None => probes.install(&directory)?,
            }
            release_memory();
        }
        migrate::remove_others(&options.pin_dir, &directory);
        Self::from_pins(&directory, lock)
    }

    /// Detaches the probes under `pin_dir` and forgets what they counted.
    ///
    /// # Errors
    ///
    /// When the pins cannot be removed.
    pub fn remove(pin_dir: &Path) -> Result<(), Error> {
        for layout in migrate::layouts(pin_dir) {
            migrate::remove(&layout)?;
        }
        // Others may have pins there, or it may be bpffs itself: then it stays.
        let _ = fs::remove_dir(pin_dir);
        Ok(())
    }
}

/// What the names of pins begin with that keep programs attached, and of programs' own.
const LINK: &str = "link_";
const PROGRAM: &str = "program_";

pub(super) fn link_pin(directory: &Path, program: &str) -> PathBuf {
    directory.join(format!("{LINK}{program}"))
}

pub(super) fn program_pin(directory: &Path, program: &str) -> PathBuf {
    directory.join(format!("{PROGRAM}{program}"))
}

/// Mounts bpffs where the pins are to be, unless it is.
fn mount_bpffs(pin_dir: &Path) -> Result<(), Error> {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    let existing = pin_dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let stat = rustix::fs::statfs(existing).map_err(|error| Error::Io {
        action: "looking at",
        path: existing.into(),
        source: error.into(),
    })?;
    if stat.f_type == BPF_FS_MAGIC {
        return Ok(());
    }
    let mount_point = Path::new("/sys/fs/bpf");
    // Over another place's filesystem a mount would not help; over a bpffs it would hide what is pinned there.
    if !pin_dir.starts_with(mount_point) {
        return Err(Error::NotBpffs(pin_dir.to_owned()));
    }
    rustix::mount::mount("bpf", mount_point, "bpf", rustix::mount::MountFlags::empty(), None)
        .map_err(|error| Error::Io { action: "mounting bpffs on", path: mount_point.into(), source: error.into() })
}

fn create_dir(path: &Path) -> Result<(), Error> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|source| Error::Io {
        action: "creating",
        path: path.into(),
        source,
    })
}

fn lock(pin_dir: &Path) -> Result<OwnedFd, Error> {
    let failed =
        |source: rustix::io::Errno| Error::Io { action: "locking", path: pin_dir.into(), source: source.into() };
    let fd = rustix::fs::open(pin_dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed)?;
    match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(fd),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::InUse(pin_dir.into())),
        Err(error) => Err(failed(error)),
    }
}

/// Where the v2 hierarchy is mounted: at the top, or beside v1 ones.
pub(crate) fn cgroup2_mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mut fields = mounts.lines().map(|line| line.split(' '));
    fields.find_map(|mut line| {
        let (target, kind) = (line.nth(1)?, line.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(target))
    })
}

/// The directory of the cgroup to attach to, made if need be: containers' parent may not exist yet.
fn cgroup_directory(options: &Options) -> Result<PathBuf, Error> {
    let mount = cgroup2_mount().ok_or(Error::NoCgroup2)?;
    let relative = options.dns_cgroup.strip_prefix("/").unwrap_or(&options.dns_cgroup);
    let directory = mount.join(relative);
    fs::create_dir_all(&directory).map_err(|source| Error::Io {
        action: "creating",
        path: directory.clone(),
        source,
    })?;
    Ok(directory)
}

fn config(options: &Options, kernel: &Kernel) -> Config {
    let mut dns_ports = [0; MAX_DNS_PORTS];
    for (slot, port) in dns_ports.iter_mut().zip(&options.dns_ports) {
        *slot = port.to_be();
    }
    let ns = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    Config {
        dns_slow_ns: ns(options.dns_slow),
        dns_timeout_ns: ns(options.dns_timeout),
        dns_ports,
        registered_only: options.registered_only.into(),
        oom_argument_is_pid: kernel.oom_argument_is_pid.into(),
    }
}

/// Tells whether the programs in the kernel are those this agent would load. Within one build the hash is stable, and
/// another build is reason enough to load anew.
fn fingerprint(config: &Config, cgroup: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    OBJECT.hash(&mut hasher);
    format!("{config:?}").hash(&mut hasher);
    // A cgroup that was removed and made again has another inode; what was attached to the old one is gone.
    let inode = fs::metadata(cgroup).map(|metadata| std::os::unix::fs::MetadataExt::ino(&metadata)).unwrap_or(0);
    (cgroup, inode).hash(&mut hasher);
    hasher.finish().max(1)
}

fn is_current(directory: &Path, programs: u64) -> bool {
    let pinned = PROGRAMS.iter().all(|program| link_pin(directory, program.name).exists());
    pinned && maps::read_meta(directory).is_ok_and(|meta| meta.programs == programs)
}

/// Detaches what is attached by removing the pins that hold it; the maps stay.
fn detach(directory: &Path) {
    // Another version's have other names.
    let is_program = |entry: &fs::DirEntry| {
        let name = entry.file_name();
        name.to_str().is_some_and(|name| name.starts_with(LINK) || name.starts_with(PROGRAM))
    };
    for pin in fs::read_dir(directory).into_iter().flatten().flatten().filter(is_program) {
        // One that cannot be removed fails the next step, with a name.
        let _ = fs::remove_file(pin.path());
    }
}

/// What is brought into the kernel.
struct Probes<'a> {
    kernel: &'a Kernel,
    config: &'a Config,
    cgroup: &'a Path,
    /// See [`fingerprint`].
    programs: u64,
}

impl Probes<'_> {
    /// Attaches the programs of a layout in the place of those there are of it; its maps stay, if there are any.
    fn install(&self, directory: &Path) -> Result<(), Error> {
        let before = maps::read_meta(directory).ok().filter(|meta| meta.epoch != 0);
        let before = before.unwrap_or_else(|| Meta { epoch: rand::random::<u64>().max(1), ..Meta::default() });
        create_dir(directory)?;
        let mut ebpf = self.load(directory)?;
        // The verifier has accepted all of them: only now do the ones before go. What happens in the milliseconds until the new
        // ones are attached is not seen; attaching them first would count it twice.
        detach(directory);
        self.attach(&mut ebpf, directory)?;
        maps::make_room_for_overflow(directory)?;
        let generation = before.generation.max(1);
        maps::write_meta(directory, Meta { programs: self.programs, generation, counts: COUNTS, ..before })
    }

    /// Attaches the programs of a layout in the place of those of another, whose counts it takes over.
    fn replace(&self, other: &Path, meta: &Meta, directory: &Path) -> Result<(), Error> {
        tracing::info!(from = %other.display(), "replacing the probes of another version, and taking over what they counted");
        let unfinished = migrate::unfinished(directory);
        migrate::remove(&unfinished)?;
        create_dir(&unfinished)?;
        let mut ebpf = self.load(&unfinished)?;
        detach(other);
        maps::make_room_for_overflow(&unfinished)?;
        migrate::take_over(other, meta, &unfinished)?;
        self.attach(&mut ebpf, &unfinished)?;
        let generation = meta.generation + 1;
        let meta = Meta { epoch: meta.epoch, programs: self.programs, generation, counts: COUNTS };
        maps::write_meta(&unfinished, meta)?;
        migrate::finish(&unfinished, directory)
    }

    /// Loads the programs, with the maps that are pinned in a directory; those that are not are made there.
    fn load(&self, directory: &Path) -> Result<Ebpf, Error> {
        let pins: Vec<PathBuf> = maps::NAMES.iter().map(|name| directory.join(name)).collect();
        // Parsed once: it is megabytes.
        let btf = Btf::from_sys_fs().map_err(|error| Error::Btf(error.to_string()))?;
        let mut loader = EbpfLoader::new();
        loader.btf(Some(&btf));
        loader.override_global("OFFSETS", &self.kernel.offsets, true);
        loader.override_global("CONFIG", self.config, true);
        for (name, pin) in maps::NAMES.iter().zip(&pins) {
            loader.map_pin_path(name, pin.as_path());
        }
        let mut ebpf = loader.load(OBJECT).map_err(Box::new)?;
        drop(loader);
        name_runtimes(&mut ebpf)?;
        for program in PROGRAMS {
            load(&mut ebpf, program, &btf)?;
        }
        Ok(ebpf)
    }

    /// Attaches what is loaded, all or nothing.
    fn attach(&self, ebpf: &mut Ebpf, directory: &Path) -> Result<(), Error> {
        let attached = PROGRAMS.into_iter().try_for_each(|program| {
            let link = attach(ebpf, program, self.cgroup, directory)?;
            let pin = link_pin(directory, program.name);
            // The pin keeps the program attached; the handle is not needed.
            link.pin(&pin).map(drop).map_err(|error| Error::Pin { path: pin, source: error.into() })
        });
        attached.inspect_err(|_| detach(directory))
    }
}

fn name_runtimes(ebpf: &mut Ebpf) -> Result<(), Error> {
    let failed = |source| Error::Map { map: "RUNTIMES", source };
    let map = ebpf.map_mut("RUNTIMES").ok_or(Error::Btf("the object has no map RUNTIMES".to_owned()))?;
    let mut runtimes: Array<_, u64> = map.try_into().map_err(failed)?;
    for (index, name) in (0..).zip(RUNTIMES) {
        let mut bytes = [0; 8];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        runtimes.set(index, u64::from_ne_bytes(bytes), 0).map_err(failed)?;
    }
    Ok(())
}

fn found(ebpf: &mut Ebpf, program: Program) -> Result<&mut aya::programs::Program, Error> {
    let missing = || Error::Btf(format!("the object has no program {}", program.name));
    ebpf.program_mut(program.name).ok_or_else(missing)
}

fn failed(program: Program) -> impl Fn(ProgramError) -> Error {
    move |source| Error::Program { program: program.name, source: Box::new(source) }
}

fn load(ebpf: &mut Ebpf, program: Program, btf: &Btf) -> Result<(), Error> {
    let found = found(ebpf, program)?;
    match program.hook {
        Hook::Tracepoint(tracepoint) => {
            let loaded: Result<&mut BtfTracePoint, _> = found.try_into();
            loaded.and_then(|loaded| loaded.load(tracepoint, btf)).map_err(failed(program))
        }
        Hook::Skb(_) => {
            let loaded: Result<&mut CgroupSkb, _> = found.try_into();
            loaded.and_then(CgroupSkb::load).map_err(failed(program))
        }
    }
}

fn attach(ebpf: &mut Ebpf, program: Program, cgroup: &Path, pins: &Path) -> Result<FdLink, Error> {
    let failed = failed(program);
    let pin = program_pin(pins, program.name);
    let pinning = |error: aya::pin::PinError| Error::Pin { path: pin.clone(), source: error.into() };
    let found = found(ebpf, program)?;
    match program.hook {
        Hook::Tracepoint(_) => {
            let loaded: &mut BtfTracePoint = found.try_into().map_err(&failed)?;
            loaded.pin(&pin).map_err(pinning)?;
            let id = loaded.attach().map_err(&failed)?;
            Ok(loaded.take_link(id).map_err(&failed)?.into())
        }
        Hook::Skb(direction) => {
            let loaded: &mut CgroupSkb = found.try_into().map_err(&failed)?;
            loaded.pin(&pin).map_err(pinning)?;
            let directory = fs::File::open(cgroup).map_err(|source| Error::Io {
                action: "opening",
                path: cgroup.into(),
                source,
            })?;
            // `Single` through a BPF link is what the kernel calls multi: others may attach beside it.
            let id = loaded.attach(directory, direction, CgroupAttachMode::Single).map_err(&failed)?;
            let link = loaded.take_link(id).map_err(&failed)?;
            link.try_into().map_err(|error: aya::programs::links::LinkError| Error::Pin {
                path: link_pin(pins, program.name),
                source: error.into(),
            })
        }
    }
}

/// Gives the memory that parsing the kernel's types took back to the system: it is more than the agent needs from then on.
fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers and may be called at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
