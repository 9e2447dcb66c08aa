//! What a service says of its containers, read off the container by the kernel's own account of it.

use std::{
    fs,
    time::{Duration, Instant},
};

use warren_tests::{Inside, Process, World, image_name, until};

#[test]
fn the_process_is_as_the_service_says() {
    let world = World::with_warren("process");
    let options = [
        "--env",
        "COLOUR=red",
        "--workdir",
        "/tmp",
        "--user",
        "demo",
        "--hostname",
        "box.example",
        "--ulimit",
        "nofile=100:200",
        "--ulimit",
        "core=0",
        "--sysctl",
        "net.core.somaxconn=77",
        "--sysctl",
        "kernel.shm_rmid_forced=1",
        "--container-label",
        "team=blue",
        "--label",
        "whole=service",
    ];
    let inside = Inside::of(&world, "said", &options);
    let env = inside.proc("environ");
    for variable in ["COLOUR=red", "HOME=/tmp", "HOSTNAME=box.example", "PATH=/bin"] {
        assert!(env.split('\0').any(|known| known == variable), "{variable} is not in {env}");
    }
    assert!(inside.proc("cmdline").starts_with("sh\0-c\0trap"), "{}", inside.proc("cmdline"));
    let directory = fs::read_link(format!("/proc/{}/cwd", inside.pid)).expect("a link");
    assert_eq!(directory, std::path::Path::new("/tmp"));
    assert_eq!(inside.status("Uid"), "1000 1000 1000 1000");
    assert_eq!(inside.status("Gid"), "1000 1000 1000 1000");
    assert_eq!(inside.status("Groups"), "100");
    assert_eq!((inside.status("NoNewPrivs"), inside.status("Seccomp")), ("1".to_owned(), "2".to_owned()));
    assert_eq!(inside.enter(&["uname", "-n"]), "box.example");
    let limits = inside.proc("limits");
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name}"));
        line[name.len()..].split_whitespace().take(2).collect::<Vec<_>>().join(" ")
    };
    assert_eq!((limit("Max open files"), limit("Max core file size")), ("100 200".to_owned(), "0 0".to_owned()));
    assert_eq!(inside.enter(&["cat", "/proc/sys/net/core/somaxconn"]), "77");
    assert_eq!(inside.enter(&["cat", "/proc/sys/kernel/shm_rmid_forced"]), "1");
    let record = world.ctr(&["containers", "info", &inside.id]).succeeded();
    assert!(record.contains("\"team\": \"blue\""), "{record}");
    let service = world.warren(&["service", "inspect", "said", "--format", "json"]).succeeded();
    assert!(service.contains("\"whole\": \"service\""), "{service}");

    // What the same container is without any of that.
    let plain = Inside::of(&world, "plain", &[]);
    assert_eq!(plain.status("Uid"), "0 0 0 0");
    assert_eq!(plain.enter(&["uname", "-n"]), plain.id[..12]);
    let directory = fs::read_link(format!("/proc/{}/cwd", plain.pid)).expect("a link");
    assert_eq!(directory, std::path::Path::new("/"));
    assert_ne!(plain.enter(&["cat", "/proc/sys/net/core/somaxconn"]), "77");
}

#[test]
fn capabilities_devices_and_privilege_are_given_and_taken() {
    const NET_ADMIN: u64 = 1 << 12;
    const CHOWN: u64 = 1;
    let mut world = World::with_containerd("may");
    let mut manager = world.manager_command();
    manager.arg("--allow-privileged");
    world.start_manager_as(manager);
    world.start_agent(&["--allow-privileged"]);
    world.wait_ready();
    let effective = |inside: &Inside| u64::from_str_radix(&inside.status("CapEff"), 16).expect("a mask");

    let plain = effective(&Inside::of(&world, "plain", &[]));
    assert_eq!((plain & CHOWN, plain & NET_ADMIN), (CHOWN, 0));
    let added = Inside::of(&world, "added", &["--cap-add", "NET_ADMIN", "--cap-drop", "CAP_CHOWN"]);
    assert_eq!((effective(&added) & CHOWN, effective(&added) & NET_ADMIN), (0, NET_ADMIN));
    let only = Inside::of(&world, "only", &["--cap-add", "net_admin", "--cap-drop", "ALL"]);
    assert_eq!(effective(&only), NET_ADMIN);
    // Another user than root has what is added by name, and so do its programs; setuid ones change nothing unless they may.
    let user = Inside::of(&world, "user", &["--user", "demo", "--cap-add", "NET_ADMIN"]);
    assert_eq!((effective(&user), user.status("CapAmb")), (NET_ADMIN, format!("{NET_ADMIN:016x}")));
    let (_, said) = user.shell(&world, "sh -c 'grep CapEff /proc/self/status'");
    assert!(said.contains(&format!("{NET_ADMIN:016x}")), "{said}");
    // A program of root's with the setuid bit: what runs it is root, or not.
    let setuid = "cp /run/warren/init /tmp/setuid && chmod 4755 /tmp/setuid";
    for (name, switch, line, uids) in [
        ("stays", "--no-new-privileges=true", "/tmp/setuid\0--\0sleep\x007771\0", "1000 1000 1000 1000"),
        ("changes", "--no-new-privileges=false", "/tmp/setuid\0--\0sleep\x007772\0", "1000 0 0 0"),
    ] {
        let inside = Inside::of(&world, name, &[switch, "--init"]);
        assert_eq!(inside.shell(&world, setuid).0, 0);
        let mut exec = World::binary("warren");
        exec.args(["--manager", &world.manager_address(), "container", "exec", "--user", "demo", &inside.id, "--"]);
        let exec = Process::start("exec", exec.args(line.trim_end_matches('\0').split('\0')), world.directory.path());
        let pid = until("it runs", || {
            let processes = fs::read_dir("/proc").expect("a directory").flatten();
            let is_it =
                |entry: &fs::DirEntry| fs::read_to_string(entry.path().join("cmdline")).is_ok_and(|l| l == line);
            processes.into_iter().find(is_it).and_then(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        });
        assert_eq!(Inside { pid, ..inside }.status("Uid"), uids, "{name}");
        drop(exec);
    }
    // A capability is of no use without the system calls for it.
    let admin = Inside::of(&world, "admin", &["--cap-add", "SYS_ADMIN"]);
    assert_eq!(admin.shell(&world, "mount -t tmpfs none /tmp").0, 0);
    assert_ne!(only.shell(&world, "mount -t tmpfs none /tmp").0, 0);

    let device = Inside::of(&world, "device", &["--device", "/dev/fuse:/dev/melt:r"]);
    assert_eq!(device.shell(&world, "test -c /dev/melt && : < /dev/melt").0, 0);
    assert_ne!(device.shell(&world, ": > /dev/melt").0, 0, "it may only be read");
    assert_ne!(only.shell(&world, "test -e /dev/fuse").0, 0);

    let privileged = Inside::of(&world, "privileged", &["--privileged"]);
    let own = fs::read_to_string("/proc/self/status").expect("readable");
    let own = own.lines().find_map(|line| line.strip_prefix("CapPrm:\t")).expect("a mask").to_owned();
    assert_eq!(privileged.status("CapEff"), own);
    assert_eq!((privileged.status("NoNewPrivs"), privileged.status("Seccomp")), ("0".to_owned(), "0".to_owned()));
    assert_eq!(privileged.shell(&world, "test -c /dev/fuse && : > /dev/fuse && test -w /proc/sys").0, 0);
}

#[test]
fn limits_and_reservations_reach_the_kernel() {
    let world = World::with_warren("limits");
    let options = [
        "--limit-cpu",
        "0.5",
        "--limit-memory",
        "64M",
        "--reserve-cpu",
        "0.25",
        "--reserve-memory",
        "32M",
        "--limit-pids",
        "20",
    ];
    let inside = Inside::of(&world, "limited", &options);
    let memory = inside.cgroup(&world, "memory", "memory.limit_in_bytes", "memory.max");
    assert_eq!(memory, (64 << 20).to_string());
    let reserved = inside.cgroup(&world, "memory", "memory.soft_limit_in_bytes", "memory.low");
    assert_eq!(reserved, (32 << 20).to_string());
    assert_eq!(inside.cgroup(&world, "pids", "pids.max", "pids.max"), "20");
    let quota = inside.cgroup(&world, "cpu", "cpu.cfs_quota_us", "cpu.max");
    assert!(quota == "50000" || quota == "50000 100000", "{quota}");
    // A quarter of a core: 256 shares, which runc turns into a weight of 10 under v2.
    let weight = inside.cgroup(&world, "cpu", "cpu.shares", "cpu.weight");
    assert!(weight == "256" || weight == "10", "{weight}");
    let (_, said) = inside.shell(&world, "for i in $(seq 30); do sleep 5 & done; echo all");
    assert!(!said.contains("all"), "30 processes started under a limit of 20: {said}");
}

#[test]
fn files_are_mounted_as_the_service_says() {
    let world = World::with_warren("mounts");
    let shared = world.path("shared");
    fs::create_dir(&shared).expect("writable");
    fs::write(shared.join("file"), "from the node").expect("writable");
    let bind = |target: &str, more: &str| format!("type=bind,source={},target={target}{more}", shared.display());
    let (writable, read_only) = (bind("/shared", ""), bind("/deep/er/down", ",readonly"));
    let options = [
        "--mount",
        &writable,
        "--mount",
        &read_only,
        "--mount",
        "type=tmpfs,target=/scratch,size=1M,mode=700",
        "--read-only",
    ];
    let inside = Inside::of(&world, "mounted", &options);
    assert_eq!(inside.shell(&world, "cat /deep/er/down/file").1, "from the node");
    assert_ne!(inside.shell(&world, "touch /deep/er/down/no").0, 0);
    assert_eq!(inside.shell(&world, "echo back > /shared/answer").0, 0);
    assert_eq!(fs::read_to_string(shared.join("answer")).expect("written"), "back\n");
    let scratch = inside.mount("/scratch");
    for part in ["tmpfs", "size=1024k", "mode=700", "nodev", "nosuid", "noexec"] {
        assert!(scratch.contains(part), "{part} is not in {scratch}");
    }
    assert_eq!(inside.shell(&world, "echo x > /scratch/y").0, 0);
    let (code, said) = inside.shell(&world, "touch /etc/no");
    assert!(code != 0 && said.contains("Read-only"), "{said}");
    let writable = Inside::of(&world, "plain", &[]);
    assert_eq!(writable.shell(&world, "touch /etc/yes").0, 0);
}

#[test]
fn an_init_reaps_orphans_and_forwards_signals() {
    let world = World::with_warren("init");
    let inside = Inside::of(&world, "init", &["--init"]);
    assert!(inside.proc("cmdline").starts_with("/run/warren/init\0--\0sh\0"), "{}", inside.proc("cmdline"));
    // An orphan that ends stays as a zombie unless the first process waits for it.
    assert_eq!(inside.shell(&world, "(sleep 0.1 &) ; sleep 0.5; ps | grep -c '[Zz] *sleep'").1.trim(), "0");
    let began = Instant::now();
    let _ = world.warren(&["service", "rm", "init", "--wait"]).succeeded();
    assert!(began.elapsed() < Duration::from_secs(8), "the signal did not reach the command");
}

#[test]
fn what_a_node_cannot_give_is_said_in_words() {
    let world = World::with_warren("cannot");
    for (name, options, words) in [
        ("device", &["--device", "/dev/none-such"][..], "device /dev/none-such of this node: No such file"),
        (
            "mount",
            &["--mount", "type=bind,source=/none/such,target=/x"],
            "mount /x: /none/such of this node: No such file",
        ),
        ("user", &["--user", "nobody-such"], "user: the image has no user \"nobody-such\""),
    ] {
        let mut arguments = vec!["service", "create", name, "--image", image_name(), "--restart", "never"];
        arguments.extend(options);
        let _ = world.warren(&arguments).succeeded();
        let message = until("it is refused", || {
            let containers = world.containers(name);
            let status = &containers.first()?["status"];
            (status["state"] == "CONTAINER_STATE_REJECTED").then(|| status["message"].to_string())
        });
        let message = message.replace("\\\"", "\"");
        assert!(message.contains(words), "{message}");
    }
    // What can be known when the service is created is refused then.
    for (field, options) in [
        ("spec.container.privileged", &["--privileged"][..]),
        ("spec.container.user", &["--user", "a b"]),
        ("spec.container.working_dir", &["--workdir", "tmp"]),
        ("spec.container.hostname", &["--hostname", "a_b"]),
        ("spec.container.capabilities_add", &["--cap-add", "EVERYTHING"]),
        ("spec.container.capabilities_drop", &["--cap-drop", "EVERYTHING"]),
        ("spec.container.ulimits[\"files\"]", &["--ulimit", "files=1"]),
        ("spec.container.sysctls", &["--sysctl", "kernel.panic=1"]),
        ("spec.container.devices[0].source", &["--device", "/etc/passwd"]),
        ("spec.container.mounts[0].target", &["--mount", "type=tmpfs,target=/proc/x"]),
        ("spec.container.pids_limit", &["--limit-pids", "-1"]),
        ("spec.container.labels", &["--container-label", "warren.service=x"]),
        ("spec.container.stop_signal", &["--stop-signal", "NOPE"]),
    ] {
        let mut arguments = vec!["service", "create", "refused", "--image", image_name()];
        arguments.extend(options);
        let error = world.warren(&arguments).failed(2);
        assert!(error.starts_with(&format!("error: {field}: ")), "{error}");
    }
}
