//! Commands in containers.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::fs::PermissionsExt as _,
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use warren_tests::{Inside, Terminal, World, image_name, until};

fn exec(world: &World, arguments: &[&str]) -> warren_tests::Output {
    world.warren(&[&["container", "exec"], arguments].concat())
}

/// A command with pipes at its ends.
fn spawn(world: &World, arguments: &[&str]) -> Child {
    World::binary("warren")
        .args(["--manager", &world.manager_address(), "container", "exec"])
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("warren")
}

/// Command lines of the container's processes.
fn processes(world: &World, container: &Inside) -> Vec<String> {
    let pids = container.cgroup(world, "pids", "cgroup.procs", "cgroup.procs");
    let line = |pid: &str| fs::read_to_string(format!("/proc/{pid}/cmdline")).ok();
    pids.lines().filter_map(line).map(|line| line.replace('\0', " ").trim().to_owned()).collect()
}

fn runs(world: &World, container: &Inside, command: &str) -> bool {
    processes(world, container).iter().any(|line| line == command)
}

#[test]
fn a_command_has_its_streams_and_its_exit_code() {
    let world = World::with_warren("exec");
    let web = Inside::of(&world, "web", &["--env", "COLOR=blue"]);

    let output = exec(&world, &["web-1", "--", "sh", "-c", "echo out $COLOR; echo err >&2; exit 7"]);
    assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (7, "out blue\n", "err\n"));
    let output = exec(&world, &[&web.id[..10], "sh", "-c", "kill -9 $$"]);
    assert_eq!((output.code, output.stderr.as_str()), (128 + 9, ""));
    // A flag behind the container is the command's.
    assert_eq!(exec(&world, &["web-1", "echo", "-n", "-i"]).succeeded(), "-i");
    // Nothing is at its input unless it is asked for.
    assert_eq!(exec(&world, &["web-1", "cat"]).succeeded(), "");

    // It is one of the container's processes, in its cgroup and namespaces.
    let inside = exec(&world, &["web-1", "sh", "-c", "cat /proc/self/cgroup; hostname"]).succeeded();
    // Seen from the container's cgroup namespace, its own cgroup is the root.
    assert!(inside.contains("pids:/\n"), "{inside}");
    assert!(inside.ends_with(&format!("{}\n", &web.id[..12])), "{inside}");

    let options = ["-u", "1000:1001", "-e", "COLOR=red", "-w", "/etc", "web-1"];
    let show = "id -u; id -g; pwd; echo $COLOR; grep CapEff /proc/self/status";
    let shown = exec(&world, &[&options[..], &["sh", "-c", show]].concat()).succeeded();
    assert_eq!(shown, "1000\n1001\n/etc\nred\nCapEff:\t0000000000000000\n");
    let root = exec(&world, &["web-1", "sh", "-c", "id -u; grep CapEff /proc/self/status"]).succeeded();
    assert_eq!(root, "0\nCapEff:\t00000000a80425fb\n");

    // More than all buffers hold, both ways at once.
    let mut cat = spawn(&world, &["-i", "web-1", "cat"]);
    let sent: Vec<u8> = (0..5_000_000_u32).flat_map(|i| i.to_le_bytes()).collect();
    let mut stdin = cat.stdin.take().expect("a pipe");
    let feed = {
        let sent = sent.clone();
        thread::spawn(move || stdin.write_all(&sent).expect("it is read"))
    };
    let mut received = Vec::new();
    cat.stdout.take().expect("a pipe").read_to_end(&mut received).expect("readable");
    feed.join().expect("everything is read");
    assert!(cat.wait().expect("a child").success());
    assert!(received == sent, "{} bytes of {}", received.len(), sent.len());
}

#[test]
fn what_cannot_be_run_is_said_in_one_sentence() {
    let world = World::with_warren("exec-bad");
    let web = Inside::of(&world, "web", &[]);
    let failed = |code, arguments: &[&str]| exec(&world, arguments).failed(code);
    let refused = failed(127, &["web-1", "nonesuch"]);
    assert!(refused.contains("cannot be started") && refused.contains("nonesuch"), "{refused}");
    let refused = failed(126, &["web-1", "/etc"]);
    assert!(refused.contains("ermission denied") || refused.contains("is a directory"), "{refused}");
    let refused = failed(3, &["nobody", "true"]);
    assert!(refused.contains("there is no container \"nobody\""), "{refused}");
    assert!(failed(126, &["-w", "/none", "web-1", "true"]).contains("/none"));
    assert!(failed(2, &["-w", "etc", "web-1", "true"]).contains("start.working_dir: \"etc\" is not an absolute path"));
    assert!(failed(2, &["-u", "a b", "web-1", "true"]).contains("start.user: "));
    assert!(failed(126, &["-u", "nobody-here", "web-1", "true"]).contains("no user \"nobody-here\""));
    assert!(failed(2, &["-it", "web-1", "true"]).contains("the input is no terminal"));
    // The container is none the worse for it.
    assert_eq!(Inside::only(&world, "web").id, web.id);

    let once = ["service", "create", "once", "--image", image_name(), "--restart", "never"];
    let _ = world.warren(&[&once[..], &["--", "true"]].concat()).succeeded();
    let ended = world.container_when("once", "it ended", |c| c["status"]["exitCode"].is_number());
    let id = ended["id"].as_str().expect("an id");
    assert!(failed(1, &[id, "true"]).contains("does not run: it is complete"));
}

#[test]
fn a_terminal_is_a_terminal() {
    let world = World::with_warren("exec-tty");
    let web = Inside::of(&world, "web", &[]);
    let mut command = World::binary("warren");
    command
        .args(["--manager", &world.manager_address(), "container", "exec", "-it", "web-1", "sh"])
        .env("TERM", "vt220");
    let mut terminal = Terminal::start(&mut command, 33, 101);
    terminal.until("# ");
    terminal.type_in("tty; stty size; echo $TERM\n");
    assert!(terminal.until("vt220\r\n").contains("/dev/pts/0\r\n33 101\r\n"), "the size at its start");
    terminal.resize(40, 120);
    terminal.type_in("while [ \"$(stty size)\" != '40 120' ]; do sleep 0.05; done; echo res''ized\n");
    terminal.until("resized\r\n");
    // Keys that mean something are the command's.
    terminal.type_in("sleep 1000\n");
    until("it runs", || runs(&world, &web, "sleep 1000").then_some(()));
    terminal.type_in("\x03");
    terminal.type_in("echo inter''rupted\n");
    terminal.until("interrupted\r\n");
    terminal.type_in("exit 5\n");
    assert_eq!(terminal.ended().code(), Some(5));

    // A terminal without a keyboard: colours, say, in a script's log.
    let output = exec(&world, &["-t", "web-1", "sh", "-c", "[ -t 1 ] && echo yes"]);
    assert_eq!((output.code, output.stdout.as_str()), (0, "yes\r\n"));
}

#[test]
fn a_command_ends_with_whoever_wanted_it() {
    let mut world = World::with_warren("exec-end");
    let web = Inside::of(&world, "web", &[]);
    let mut sleeper = spawn(&world, &["web-1", "sleep", "1001"]);
    until("it runs", || runs(&world, &web, "sleep 1001").then_some(()));
    sleeper.kill().expect("a child");
    until("it is gone", || (!runs(&world, &web, "sleep 1001")).then_some(()));
    let _ = sleeper.wait();

    // Also one that has far more at its input than it reads, and one that hears no hangup.
    let mut deaf = spawn(&world, &["-i", "web-1", "sh", "-c", "trap '' HUP; sleep 1002"]);
    let mut stdin = deaf.stdin.take().expect("a pipe");
    let feed = thread::spawn(move || while stdin.write_all(&[0; 65536]).is_ok() {});
    until("it runs", || runs(&world, &web, "sleep 1002").then_some(()));
    let shell = "sh -c trap '' HUP; sleep 1002";
    deaf.kill().expect("a child");
    until("it is gone", || (!runs(&world, &web, shell)).then_some(()));
    let _ = deaf.wait();
    feed.join().expect("the pipe is closed");

    // Whoever reads no more has seen enough.
    let mut yes = spawn(&world, &["web-1", "yes", "1003"]);
    let mut some = [0; 100];
    yes.stdout.as_mut().expect("a pipe").read_exact(&mut some).expect("readable");
    drop(yes.stdout.take());
    assert!(yes.wait().expect("a child").success());
    until("it is gone", || (!runs(&world, &web, "yes 1003")).then_some(()));

    // An agent that was killed has left commands without readers.
    let mut left = spawn(&world, &["web-1", "sleep", "1004"]);
    until("it runs", || runs(&world, &web, "sleep 1004").then_some(()));
    world.agent.take().expect("it runs").kill();
    let output = left.wait_with_output();
    let output = output.expect("a child");
    assert_eq!(output.status.code(), Some(4), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(runs(&world, &web, "sleep 1004"));
    world.start_agent(&[]);
    until("it is gone", || (!runs(&world, &web, "sleep 1004")).then_some(()));
    let directory = world.path("agent/exec");
    until("its pipes are too", || (fs::read_dir(&directory).ok()?.count() == 0).then_some(()));
    world.wait_ready();
    assert_eq!(Inside::only(&world, "web").pid, web.pid, "the container goes on");
    left = spawn(&world, &["web-1", "true"]);
    assert!(left.wait().expect("a child").success());
}

#[test]
fn a_reader_that_is_slow_loses_nothing() {
    let world = World::with_warren("exec-slow");
    let _web = Inside::of(&world, "web", &[]);
    const BYTES: usize = 8 << 20;
    // It ends while most of what it wrote is still on its way, and nobody takes it for longer than silence is waited for.
    let mut slow = spawn(&world, &["web-1", "sh", "-c", "head -c 8388608 /dev/zero; exit 3"]);
    let mut stdout = slow.stdout.take().expect("a pipe");
    let mut received = vec![0; BYTES / 2];
    stdout.read_exact(&mut received).expect("readable");
    thread::sleep(Duration::from_secs(8));
    stdout.read_to_end(&mut received).expect("readable");
    assert_eq!((slow.wait().expect("a child").code(), received.len()), (Some(3), BYTES));
}

#[test]
fn containers_are_signalled_and_waited_for() {
    let world = World::with_warren("kill");
    let script =
        "trap 'echo hup' HUP; trap 'exit 9' USR1; trap 'exit 0' TERM; echo ready; while :; do sleep 0.05; done";
    world.create("web", 2, &["--restart-delay-ms", "100"], script);
    let first = Inside::all(&world, "web").into_iter().map(|container| container.id).collect::<Vec<_>>();
    until("both handle signals", || {
        (world.warren(&["service", "logs", "web"]).stdout.matches("ready").count() == 2).then_some(())
    });
    let container = |arguments: &[&str]| world.warren(&[&["container"], arguments].concat());
    assert_eq!(container(&["kill", "--signal", "SIGHUP", "web-1", "web-2"]).succeeded(), "web-1\nweb-2\n");
    until("both have heard it", || {
        (world.warren(&["service", "logs", "web"]).stdout.matches("hup").count() == 2).then_some(())
    });
    assert!(container(&["kill", "-s", "NOPE", "web-1"]).failed(2).contains("\"NOPE\" is not a signal"));
    assert!(container(&["kill", "web-3"]).failed(3).contains("\"web-3\""));
    assert!(
        container(&["wait", "--timeout", "1", "web-1"])
            .failed(1)
            .contains("web-1 has not ended after 1 s: it is running")
    );

    // Whoever waits for it is told how it ended, also when its name means its replacement by then.
    let waiting = World::binary("warren")
        .args(["--manager", &world.manager_address(), "container", "wait", "web-1"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("warren");
    thread::sleep(Duration::from_millis(300));
    let _ = container(&["kill", "-s", "USR1", "web-1"]).succeeded();
    let output = waiting.wait_with_output().expect("a child");
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stdout).as_ref()), (Some(0), "9\n"));
    let _ = container(&["kill", "web-2"]).succeeded();
    let killed = first.iter().map(|id| container(&["wait", id]).succeeded()).collect::<Vec<_>>();
    assert_eq!(killed.concat().lines().collect::<std::collections::BTreeSet<_>>(), ["137", "9"].into());
    until("both are replaced", || {
        let running = Inside::all(&world, "web");
        (running.len() == 2 && running.iter().all(|container| !first.contains(&container.id))).then_some(())
    });

    // What was replaced is shown to whoever asks for it.
    let listed = |arguments: &[&str]| world.warren(&[&["service", "ps", "web"], arguments].concat()).succeeded();
    until("only the latest are listed", || (listed(&[]).lines().count() == 3).then_some(()));
    let all = listed(&["--all"]);
    assert!(all.lines().count() == 5 && all.contains("exited with code 9") && all.contains(image_name()), "{all}");

    // One that keeps failing says when it is tried again.
    let _ = world
        .warren(&[
            "service",
            "create",
            "bad",
            "--image",
            image_name(),
            "--restart-delay",
            "50s",
            "--",
            "sh",
            "-c",
            "exit 3",
        ])
        .succeeded();
    let shown = until("it has failed", || {
        let shown = world.warren(&["service", "ps", "bad"]).succeeded();
        shown.contains("failed").then_some(shown)
    });
    let left = shown.split("exited with code 3; next try in ").nth(1).and_then(|rest| rest.split('s').next());
    let left: u32 = left.and_then(|left| left.parse().ok()).unwrap_or_else(|| panic!("{shown}"));
    assert!((30..=50).contains(&left), "{shown}");
}

#[test]
fn files_are_copied_into_and_out_of_containers() {
    let world = World::with_warren("cp");
    let web = Inside::of(&world, "web", &["--user", "1000:1000", "--mount", "type=tmpfs,target=/work,mode=1777"]);
    let local = world.path("copied");
    fs::create_dir_all(local.join("tree/empty")).expect("writable");
    let content: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
    fs::write(local.join("tree/large"), &content).expect("writable");
    fs::write(local.join("tree/script.sh"), "#!/bin/sh\n").expect("writable");
    fs::set_permissions(local.join("tree/script.sh"), fs::Permissions::from_mode(0o750)).expect("its own");
    std::os::unix::fs::symlink("large", local.join("tree/link")).expect("writable");
    let here = |name: &str| local.join(name).display().to_string();
    let copy = |from: &str, to: &str| world.warren(&["container", "cp", from, to]);

    // Into a directory that is there, and as a name that is not.
    let _ = copy(&here("tree"), "web-1:/work").succeeded();
    let _ = copy(&here("tree/script.sh"), "web-1:/work/other").succeeded();
    let shown = web
        .shell(&world, "cd /work; stat -c '%a %u %g %n' tree/script.sh other; readlink tree/link; ls -d tree/empty")
        .1;
    assert_eq!(shown, "750 1000 1000 tree/script.sh\n750 1000 1000 other\nlarge\ntree/empty\n");
    let _ = copy("web-1:/work/tree", &here("back")).succeeded();
    assert!(fs::read(local.join("back/large")).expect("copied") == content);
    assert_eq!(fs::read_link(local.join("back/link")).expect("copied"), std::path::Path::new("large"));
    assert_eq!(fs::metadata(local.join("back/script.sh")).expect("copied").permissions().mode() & 0o7777, 0o750);
    assert!(local.join("back/empty").is_dir());
    let _ = copy("web-1:/etc/hostname", &here("back")).succeeded();
    assert_eq!(fs::read_to_string(local.join("back/hostname")).expect("copied").trim(), &web.id[..12]);

    assert!(copy("web-1:/none", &here("x")).failed(1).contains("/none") || !local.join("x").exists());
    assert!(copy(&here("none"), "web-1:/work").failed(1).contains("none"));
    assert!(copy(&here("tree"), "web-1:/none/there").failed(1).contains("/none"));
    assert!(copy("web-1:/etc/passwd", "web-1:/tmp").failed(2).contains("copy to this machine first"));
    // What is in a directory goes into another, also twice.
    for _ in 0..2 {
        let _ = copy(&format!("{}/.", here("tree")), "web-1:/work/tree").succeeded();
    }
    let listed = web.shell(&world, "ls /work/tree").1;
    assert_eq!(listed.split_whitespace().collect::<Vec<_>>(), ["empty", "large", "link", "script.sh"]);
    assert!(copy("web-1:/etc/passwd", &here("nodir/x")).failed(1).contains("nodir: "));
    assert!(copy("web-1:/dev/null", &here("null")).failed(1).contains("is not a file"));
    assert!(copy("/dev/null", "web-1:/work").failed(1).contains("is not a file"));
    assert!(copy("/etc/passwd", "/tmp/x").failed(2).contains("CONTAINER:PATH"));
    assert!(copy("web-9:/etc/passwd", &here("x")).failed(3).contains("web-9"));
}
