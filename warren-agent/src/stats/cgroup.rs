//! cgroups, v1 and v2, and both beside each other.

use std::{
    fs, io,
    path::{Path, PathBuf},
    str::FromStr,
};

use warren_proto::v1;

/// cgroup v1 says "no limit" with the largest number of pages.
const NO_LIMIT: u64 = 1 << 62;

/// A mounted hierarchy of cgroups.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Hierarchy {
    /// Its controllers; of v2 those that no other hierarchy has.
    controllers: Vec<String>,
    v2: bool,
    /// The cgroup that is at the mount point.
    root: String,
    mount_point: PathBuf,
}

/// All of them.
#[derive(Clone, Debug)]
pub(super) struct Hierarchies(Vec<Hierarchy>);

/// Sets a limit of a cgroup, by its path below the mount points; it is made unless it is there.
///
/// # Errors
///
/// When there is no such controller, or the kernel refuses.
pub(crate) fn limit(cgroup: &Path, controller: &str, file: &str, value: &str) -> io::Result<()> {
    Hierarchies::of_this_process().limit(cgroup, controller, file, value)
}

/// Bounds what all processes of a cgroup may take of the processors together, in thousandths of one. The cgroup is made unless it is
/// there.
///
/// # Errors
///
/// As for [`limit`].
pub(crate) fn limit_cpu(cgroup: &Path, millis: u64) -> io::Result<()> {
    /// In microseconds: the kernel's default.
    const PERIOD: u64 = 100_000;
    let hierarchies = Hierarchies::of_this_process();
    let quota = PERIOD * millis / 1000;
    match hierarchies.directory("cpu", &everywhere(cgroup, "cpu")) {
        Some((_, true)) => hierarchies.limit(cgroup, "cpu", "cpu.max", &format!("{quota} {PERIOD}")),
        _ => hierarchies.limit(cgroup, "cpu", "cpu.cfs_quota_us", &quota.to_string()),
    }
}

/// Moves this process into a cgroup, as far as its processor time is concerned.
///
/// # Errors
///
/// When no cgroup has the controller, or the kernel refuses.
pub(crate) fn join_cpu(cgroup: &Path) -> io::Result<()> {
    let found = Hierarchies::of_this_process().directory("cpu", &everywhere(cgroup, "cpu"));
    let (directory, _) = found.ok_or(io::ErrorKind::NotFound)?;
    fs::write(directory.join("cgroup.procs"), "0")
}

/// What /proc says of a process that is in this cgroup of both versions.
fn everywhere(cgroup: &Path, controller: &str) -> String {
    format!("0::{0}\n1:{controller}:{0}", cgroup.display())
}

impl Hierarchies {
    pub(super) fn of_this_process() -> Self {
        Self::parse(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    }

    fn parse(mountinfo: &str) -> Self {
        let parse_line = |line: &str| {
            let (mount, filesystem) = line.split_once(" - ")?;
            let mut mount = mount.split(' ').skip(3);
            let (root, mount_point) = (mount.next()?, mount.next()?);
            let mut filesystem = filesystem.split(' ');
            let v2 = match filesystem.next()? {
                "cgroup" => false,
                "cgroup2" => true,
                _ => return None,
            };
            let controllers = filesystem.nth(1)?.split(',').map(str::to_owned).collect();
            Some(Hierarchy { controllers, v2, root: root.to_owned(), mount_point: PathBuf::from(mount_point) })
        };
        Self(mountinfo.lines().filter_map(parse_line).collect())
    }

    /// The directory of a process's cgroup that has a controller, and whether it is of v2. `cgroups` is the process's file in
    /// /proc.
    fn directory(&self, controller: &str, cgroups: &str) -> Option<(PathBuf, bool)> {
        let has = |hierarchy: &&Hierarchy| !hierarchy.v2 && hierarchy.controllers.iter().any(|c| c == controller);
        let hierarchy = self.0.iter().find(has).or_else(|| self.0.iter().find(|hierarchy| hierarchy.v2))?;
        let path = cgroups.lines().find_map(|line| {
            let (_, line) = line.split_once(':')?;
            let (controllers, path) = line.split_once(':')?;
            let same = if hierarchy.v2 {
                controllers.is_empty()
            } else {
                controllers.split(',').any(|listed| listed == controller)
            };
            same.then_some(path)
        })?;
        let below = Path::new(path).strip_prefix(&hierarchy.root).ok()?;
        Some((hierarchy.mount_point.join(below), hierarchy.v2))
    }

    /// Sets a limit of a cgroup that is made unless it is there; of v2, below controllers that its parents hand down.
    fn limit(&self, cgroup: &Path, controller: &str, file: &str, value: &str) -> io::Result<()> {
        let found = self.directory(controller, &everywhere(cgroup, controller));
        let (directory, v2) = found.ok_or_else(|| io::Error::other(format!("there are no cgroups of {controller}")))?;
        fs::create_dir_all(&directory)?;
        if v2 {
            let mount = self.0.iter().find(|hierarchy| hierarchy.v2).map(|hierarchy| &hierarchy.mount_point);
            let above: Vec<_> =
                directory.ancestors().skip(1).take_while(|path| mount.is_some_and(|m| path.starts_with(m))).collect();
            for parent in above.into_iter().rev() {
                fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"))?;
            }
        }
        fs::write(directory.join(file), value)
    }

    /// The processes of a process's cgroup, itself among them, and of those below it; host's ids.
    pub(super) fn processes(&self, cgroups: &str) -> Vec<u32> {
        let Some((directory, _)) = self.directory("pids", cgroups) else { return Vec::new() };
        let mut todo = vec![directory];
        let mut processes = Vec::new();
        while let Some(directory) = todo.pop() {
            let listed = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            processes.extend(listed.lines().filter_map(|line| line.parse::<u32>().ok()));
            let below = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
            todo.extend(below.filter(|path| path.is_dir()));
        }
        processes
    }

    /// The files of a process's cgroup that has a controller, and whether it is of v2.
    fn files(&self, controller: &str, cgroups: &str) -> Option<(Files, bool)> {
        self.directory(controller, cgroups).map(|(directory, v2)| (Files(directory), v2))
    }

    /// Of a process's cgroups: processor time in nanoseconds; memory in use without what can be taken back at once, and its limit,
    /// in bytes, where it is accounted for. What cannot be read, and no limit, is 0.
    pub(super) fn cpu_and_memory(&self, cgroups: &str) -> (u64, Option<(u64, u64)>) {
        let files = |controller| self.files(controller, cgroups);
        let cpu = match (files("cpuacct"), files("cpu")) {
            (Some((files, false)), _) => files.number("cpuacct.usage"),
            (_, Some((files, true))) => files.entry("cpu.stat", "usage_usec") * 1000,
            _ => 0,
        };
        let Some((files, v2)) = files("memory") else { return (cpu, None) };
        let [usage, limit, cache] = if v2 {
            ["memory.current", "memory.max", "inactive_file"]
        } else {
            ["memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"]
        };
        let memory = files.number(usage).saturating_sub(files.entry("memory.stat", cache));
        (cpu, Some((memory, Some(files.number(limit)).filter(|limit| *limit < NO_LIMIT).unwrap_or(0))))
    }

    /// What a process's cgroups have used. What cannot be read is 0.
    pub(super) fn usage(&self, cgroups: &str) -> v1::ContainerStats {
        let files = |controller| self.files(controller, cgroups);
        let (cpu_usage_nanos, memory) = self.cpu_and_memory(cgroups);
        let (memory_bytes, memory_limit_bytes) = memory.unwrap_or_default();
        let mut stats = v1::ContainerStats { cpu_usage_nanos, memory_bytes, memory_limit_bytes, ..Default::default() };
        match files("cpu") {
            Some((files, true)) => stats.cpu_throttled_nanos = files.entry("cpu.stat", "throttled_usec") * 1000,
            Some((files, false)) => stats.cpu_throttled_nanos = files.entry("cpu.stat", "throttled_time"),
            None => {}
        }
        if let Some((files, _)) = files("pids") {
            (stats.pids, stats.pids_limit) = (files.number("pids.current"), files.number("pids.max"));
        }
        if let Some((files, v2)) = files("blkio") {
            (stats.block_read_bytes, stats.block_write_bytes) =
                if v2 { files.io_v2("io.stat") } else { files.io_v1("blkio.throttle.io_service_bytes_recursive") };
        }
        stats
    }
}

/// The files of one cgroup.
struct Files(PathBuf);

impl Files {
    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.0.join(file)).unwrap_or_default()
    }

    /// A file that is a number; "max" is 0.
    fn number(&self, file: &str) -> u64 {
        parsed(self.read(file).trim())
    }

    /// A line of a file of names and numbers.
    fn entry(&self, file: &str, name: &str) -> u64 {
        let text = self.read(file);
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).map_or(0, parsed)
    }

    /// Lines like `8:0 rbytes=1 wbytes=2 rios=3`.
    fn io_v2(&self, file: &str) -> (u64, u64) {
        let text = self.read(file);
        let sum = |name| text.split_whitespace().filter_map(|word| word.strip_prefix(name)).map(parsed::<u64>).sum();
        (sum("rbytes="), sum("wbytes="))
    }

    /// Lines like `8:0 Read 1`.
    fn io_v1(&self, file: &str) -> (u64, u64) {
        let text = self.read(file);
        let sum = |name| {
            let lines = text.lines().filter_map(|line| line.split_once(' ')?.1.strip_prefix(name));
            lines.map(parsed::<u64>).sum()
        };
        (sum("Read "), sum("Write "))
    }
}

fn parsed<T: FromStr + Default>(text: &str) -> T {
    text.trim().parse().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(directory: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(directory).expect("a directory");
        for (name, text) in files {
            fs::write(directory.join(name), text).expect("writable");
        }
    }

    #[test]
    fn version_2_is_read() {
        let root = tempfile::tempdir().expect("a directory");
        let at = root.path().display();
        // As in a container: the mount's root is not the hierarchy's.
        let hierarchies = Hierarchies::parse(&format!(
            "22 1 0:20 / /proc rw - proc proc rw\n30 22 0:26 /pod {at} rw,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate\n"
        ));
        write(
            &root.path().join("warren/abc"),
            &[
                ("cpu.stat", "usage_usec 1500\nuser_usec 1000\nnr_throttled 2\nthrottled_usec 70\n"),
                ("memory.current", "5000\n"),
                ("memory.max", "max\n"),
                ("memory.stat", "anon 1\ninactive_file 2000\n"),
                ("pids.current", "3\n"),
                ("pids.max", "40\n"),
                ("io.stat", "8:0 rbytes=10 wbytes=20 rios=1 wios=1\n8:16 rbytes=1 wbytes=2 dbytes=9\n"),
            ],
        );
        let expected = v1::ContainerStats {
            cpu_usage_nanos: 1_500_000,
            cpu_throttled_nanos: 70_000,
            memory_bytes: 3000,
            pids: 3,
            pids_limit: 40,
            block_read_bytes: 11,
            block_write_bytes: 22,
            ..Default::default()
        };
        assert_eq!(hierarchies.usage("0::/pod/warren/abc\n"), expected);
        assert_eq!(hierarchies.usage("0::/elsewhere\n"), v1::ContainerStats::default());
    }

    #[test]
    fn version_1_is_read_beside_version_2() {
        let root = tempfile::tempdir().expect("a directory");
        let at = root.path().display();
        let mount =
            |name: &str, kind: &str, options: &str| format!("1 2 0:3 / {at}/{name} rw - {kind} none {options}\n");
        let mounts = [
            mount("unified", "cgroup2", "rw"),
            mount("cpu", "cgroup", "rw,cpu,cpuacct"),
            mount("memory", "cgroup", "rw,memory"),
            mount("pids", "cgroup", "rw,pids"),
            mount("blkio", "cgroup", "rw,blkio"),
        ];
        let path = |controller: &str| root.path().join(controller).join("warren/abc");
        write(&path("cpu"), &[("cpuacct.usage", "123456\n"), ("cpu.stat", "nr_periods 1\nthrottled_time 99\n")]);
        write(
            &path("memory"),
            &[
                ("memory.usage_in_bytes", "9000\n"),
                ("memory.limit_in_bytes", "9223372036854771712\n"),
                ("memory.stat", "inactive_file 1\ntotal_inactive_file 4000\n"),
            ],
        );
        write(&path("pids"), &[("pids.current", "5\n"), ("pids.max", "max\n")]);
        let io = "8:0 Read 100\n8:0 Write 7\n8:0 Sync 107\n8:16 Read 1\nTotal 108\n";
        write(&path("blkio"), &[("blkio.throttle.io_service_bytes_recursive", io)]);
        let cgroups = "9:name=systemd:/\n7:blkio:/warren/abc\n5:pids:/warren/abc\n4:memory:/warren/abc\n\
            1:cpu,cpuacct:/warren/abc\n0::/warren/abc\n";
        let expected = v1::ContainerStats {
            cpu_usage_nanos: 123_456,
            cpu_throttled_nanos: 99,
            memory_bytes: 5000,
            pids: 5,
            block_read_bytes: 101,
            block_write_bytes: 7,
            ..Default::default()
        };
        assert_eq!(Hierarchies::parse(&mounts.concat()).usage(cgroups), expected);
    }
}
