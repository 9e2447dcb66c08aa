//! What containers write, and who gets to see it.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use warren_tests::{Inside, World, image_name, until};

/// Says who it is, then counts for ever.
const COUNTS: &str = "echo begin $(hostname); echo trouble >&2; printf 'no end'; trap 'exit 0' TERM; \
    i=0; while :; do i=$((i+1)); echo; echo line $i; sleep 0.1; done";

fn logs(world: &World, arguments: &[&str]) -> (String, String) {
    let output = world.warren(arguments);
    assert_eq!(output.code, 0, "{}", output.stderr);
    (output.stdout, output.stderr)
}

/// A follower, and the lines that it has shown.
struct Follower {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Follower {
    fn start(world: &World, arguments: &[&str]) -> Self {
        let mut command: Command = World::binary("warren");
        command
            .args(["--manager", &world.manager_address()])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().expect("warren");
        let stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { child, lines }
    }

    fn until(&self, what: &str, mut enough: impl FnMut(&str) -> bool) -> Vec<String> {
        let mut seen = Vec::new();
        loop {
            let line = self.lines.recv_timeout(Duration::from_secs(20)).unwrap_or_else(|_| panic!("{what}: {seen:?}"));
            seen.push(line);
            if enough(seen.last().map_or("", String::as_str)) {
                return seen;
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn what_containers_write_is_shown_across_replicas_and_restarts() {
    let mut world = World::with_warren("logs");
    world.create("talk", 2, &[], COUNTS);
    let all = Inside::all(&world, "talk");
    let (one, two) = (&all[0], &all[1]);
    let short = |container: &Inside| container.id[..12].to_owned();
    until("both have written", || {
        let (stdout, _) = logs(&world, &["service", "logs", "talk"]);
        all.iter().all(|c| stdout.contains(&format!("{} | line 3", short(c)))).then_some(())
    });
    let (stdout, stderr) = logs(&world, &["service", "logs", "talk"]);
    for container in &all {
        assert!(stdout.contains(&format!("@node-1 {} | begin {}", short(container), short(container))), "{stdout}");
        assert!(stderr.contains(&format!("{} | trouble", short(container))), "{stderr}");
        assert!(!stdout.contains("trouble"));
    }
    let (stdout, stderr) = logs(&world, &["container", "logs", &one.id]);
    assert!(stdout.starts_with(&format!("begin {}\nno end\nline 1\n\nline 2\n", short(one))), "{stdout}");
    assert_eq!(stderr, "trouble\n");
    let (stdout, _) = logs(&world, &["container", "logs", &one.id, "--tail", "4", "--timestamps"]);
    let times: Vec<_> = stdout.lines().map(|line| line.split(' ').next().unwrap_or_default().to_owned()).collect();
    assert_eq!(times.len(), 4, "{stdout}");
    let (since, _) = logs(&world, &["container", "logs", &one.id, "--timestamps", "--since", &times[2]]);
    assert!(since.starts_with(&times[2]) && !since.contains(&times[1]), "{since}");
    let (nothing, _) = logs(&world, &["container", "logs", &one.id, "--since", "2099-01-01T00:00:00Z"]);
    assert_eq!(nothing, "");

    // Nobody's restart loses a line, nor holds a container up.
    let number = |line: &str| line.rsplit(' ').next().and_then(|number| number.parse::<u32>().ok());
    world.agent.take().expect("it runs").kill();
    world.stop_containerd();
    std::thread::sleep(Duration::from_millis(500));
    world.start_containerd();
    world.start_agent(&[]);
    world.wait_ready();
    let follower = Follower::start(&world, &["service", "logs", "talk", "--follow", "--tail", "2"]);
    let _ = follower.until("both go on", |line| line.contains(&short(two)) && number(line).is_some_and(|n| n > 20));
    let (whole, _) = logs(&world, &["container", "logs", &one.id]);
    let numbers: Vec<_> = whole.lines().filter(|line| line.starts_with("line ")).filter_map(number).collect();
    assert_eq!(numbers, (1..=numbers.len() as u32).collect::<Vec<_>>(), "none is missing and none twice");

    // A follower hears of containers that come, and the log of one that ended can still be read.
    let _ = world.warren(&["service", "scale", "talk", "3", "--wait"]).succeeded();
    let third = Inside::all(&world, "talk").into_iter().find(|c| all.iter().all(|known| known.id != c.id));
    let third = third.expect("a third one");
    let _ = follower.until("the third is heard", |line| line.contains(&format!("{} | begin", short(&third))));
    let once = [
        "service",
        "create",
        "once",
        "--image",
        image_name(),
        "--restart",
        "never",
        "--wait",
        "--",
        "sh",
        "-c",
        "echo done; exit 3",
    ];
    let _ = world.warren(&once);
    let ended = world.container_when("once", "it ended", |c| c["status"]["exitCode"] == 3);
    let id = ended["id"].as_str().expect("an id");
    until("its log can be read", || (logs(&world, &["container", "logs", id, "--follow"]).0 == "done\n").then_some(()));
    let unknown = world.warren(&["service", "logs", "nobody"]).failed(3);
    assert!(unknown.contains("there is no service \"nobody\""), "{unknown}");
}

#[test]
fn a_container_that_writes_much_is_not_held_up_and_fills_no_disk() {
    let mut world = World::empty("flood").and_containerd();
    world.start_manager();
    world.start_agent(&["--log-max-mb", "0.1", "--log-files", "3", "--keep-logs-h", "0.0005"]);
    world.wait_ready();
    // Some 30 MB, then it says that it got through.
    let script = "i=0; while [ $i -lt 30 ]; do head -c 1000000 /dev/zero | tr '\\0' x | fold -w 99; i=$((i+1)); done; \
        touch /tmp/through; trap 'exit 0' TERM; while :; do sleep 0.05; done";
    world.create("flood", 1, &[], script);
    let inside = Inside::only(&world, "flood");
    until("it got through", || {
        std::path::Path::new(&format!("/proc/{}/root/tmp/through", inside.pid)).exists().then_some(())
    });
    let directory = world.path("agent/logs").join(&inside.id);
    let files = until("all files are there", || {
        // While one is put aside there may be fewer.
        let entries = fs::read_dir(&directory).expect("a directory").flatten();
        let files: Vec<_> = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("log")).collect();
        assert!(files.len() <= 3, "{files:?}");
        (files.len() == 3).then_some(files)
    });
    for file in files {
        assert!(file.metadata().expect("a file").len() <= 100_000, "{file:?}");
    }
    let (last, _) = logs(&world, &["container", "logs", &inside.id, "--tail", "1"]);
    assert!(last.starts_with("xxxx"), "{last}");
    let _ = world.warren(&["service", "rm", "flood", "--wait"]).succeeded();
    until("its log is gone after a while", || (!directory.exists()).then_some(()));
}

#[test]
fn one_line_is_one_line_however_long() {
    let world = World::with_warren("long-lines");
    let script = "head -c 40000 /dev/zero | tr '\\0' x; echo END; echo a; echo b; trap 'exit 0' TERM; while :; do sleep 0.05; done";
    world.create("long", 1, &[], script);
    let id = Inside::only(&world, "long").id;
    let whole = format!("{}END\na\nb\n", "x".repeat(40_000));
    until("all is written", || logs(&world, &["container", "logs", &id]).0.ends_with("a\nb\n").then_some(()));
    assert_eq!(logs(&world, &["container", "logs", &id]).0, whole);
    assert_eq!(logs(&world, &["container", "logs", &id, "-n", "3"]).0, whole);
    assert_eq!(logs(&world, &["container", "logs", &id, "-n", "2"]).0, "a\nb\n");
    // A time and a prefix stand before a line, and nowhere else.
    for arguments in [&["service", "logs", "long"][..], &["service", "logs", "long", "-t", "-n", "3"]] {
        let (stdout, _) = logs(&world, arguments);
        let lengths: Vec<_> = stdout.lines().map(|line| line.rsplit(" | ").next().unwrap_or_default().len()).collect();
        assert_eq!(lengths, [40_003, 1, 1]);
    }
    let follower = Follower::start(&world, &["container", "logs", &id, "--follow"]);
    assert_eq!(follower.until("the last line", |line| line == "b").len(), 3);
}

#[test]
fn what_a_service_wrote_can_be_read_when_it_has_no_containers() {
    let world = World::with_warren("kept-logs");
    let script = "echo from $(hostname); trap 'exit 0' TERM; while :; do sleep 0.05; done";
    world.create("l", 2, &[], script);
    until("both have written", || (logs(&world, &["service", "logs", "l"]).0.lines().count() == 2).then_some(()));
    let before = logs(&world, &["service", "logs", "l", "-t"]).0;
    let _ = world.warren(&["service", "scale", "l", "0", "--wait"]).succeeded();
    until("no container is left", || world.containers("l").is_empty().then_some(()));
    let mut kept: Vec<_> = logs(&world, &["service", "logs", "l", "-t"]).0.lines().map(str::to_owned).collect();
    kept.sort();
    let mut expected: Vec<_> = before.lines().map(str::to_owned).collect();
    expected.sort();
    assert_eq!(kept, expected, "with times, slots, node and container as they were");
    // New ones come besides, each once.
    let _ = world.warren(&["service", "scale", "l", "1", "--wait"]).succeeded();
    until("the new one has written", || (logs(&world, &["service", "logs", "l"]).0.lines().count() == 3).then_some(()));
}

#[test]
fn followers_of_a_service_go_on_when_its_agent_is_back() {
    let mut world = World::with_warren("logs-resume");
    let script = "trap 'exit 0' TERM; i=0; while :; do echo line $i; i=$((i+1)); sleep 0.1; done";
    world.create("web", 1, &[], script);
    let file = world.path("followed");
    let mut follower = World::binary("warren")
        .args(["--manager", &world.manager_address(), "service", "logs", "-f", "web"])
        .stdout(fs::File::create(&file).expect("writable"))
        .spawn()
        .expect("warren");
    let lines = || fs::read_to_string(&file).expect("readable").lines().count();
    until("some are followed", || (lines() > 5).then_some(()));
    world.agent.take().expect("it runs").kill();
    let before = lines();
    world.start_agent(&[]);
    world.wait_ready();
    until("it goes on", || (lines() > before + 30).then_some(()));
    follower.kill().expect("a child");
    let _ = follower.wait();
    // Each once, in order.
    let text = fs::read_to_string(&file).expect("readable");
    let numbers: Vec<u32> = text.lines().filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
    let expected: Vec<u32> = (0..).take(numbers.len()).collect();
    assert_eq!(numbers, expected);
}

#[test]
fn logs_of_what_has_ended_are_bounded_together() {
    let mut world = World::with_containerd("ended");
    world.start_manager();
    world.start_agent(&["--ended-logs-max-mb", "0.03"]);
    world.wait_ready();
    for name in ["first", "second"] {
        world.create(
            name,
            1,
            &[],
            "head -c 20000 /dev/zero | tr '\\0' x; echo; trap 'exit 0' TERM; while :; do sleep 0.05; done",
        );
        let id = Inside::only(&world, name).id;
        until("it has written", || (logs(&world, &["container", "logs", &id]).0.len() >= 20_000).then_some(()));
        let _ = world.warren(&["service", "scale", name, "0", "--wait"]).succeeded();
    }
    let kept = |name: &str| logs(&world, &["service", "logs", name]).0.len();
    until("the older one's is removed", || (kept("first") == 0).then_some(()));
    assert!(kept("second") >= 20_000);
    // What writes a log has a place of its own, with a bound.
    let writing = Inside::of(&world, "writing", &[]);
    let writer = fs::read_dir("/proc").expect("a directory").flatten().find(|process| {
        let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command);
        command.contains("container-log") && command.contains(&writing.id)
    });
    let cgroups = fs::read_to_string(writer.expect("a writer").path().join("cgroup")).expect("it runs");
    let own = format!("{}-logs", world.cgroup_parent());
    assert!(cgroups.lines().any(|line| line.ends_with(&own)), "{cgroups}");
    let limited = world.cgroups().into_iter().filter(|path| path.to_string_lossy().ends_with(&own));
    let quota = |directory: std::path::PathBuf| {
        let said =
            ["cpu.max", "cpu.cfs_quota_us"].iter().find_map(|file| fs::read_to_string(directory.join(file)).ok());
        said?.split_whitespace().next()?.parse::<u64>().ok()
    };
    assert!(limited.filter_map(quota).any(|quota| quota >= 50_000), "{own}");
}
