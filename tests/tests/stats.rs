//! What containers use, and what the probes time, as people see it.

use std::{
    io::Read as _,
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use warren_tests::{Inside, Terminal, World, image_name, script_that_asks, until, until_within};

/// A look at all containers: their rows by name.
fn look(world: &World, arguments: &[&str]) -> Vec<Value> {
    let stats = ["container", "stats", "--once", "--interval", "500ms", "--format", "json"];
    let shown = world.warren(&[&stats[..], arguments].concat()).succeeded();
    serde_json::from_str(&shown).expect("JSON")
}

fn row(rows: &[Value], name: &str) -> Value {
    rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no {name}: {rows:?}")).clone()
}

fn number(row: &Value, field: &str) -> f64 {
    row[field].as_f64().unwrap_or_else(|| panic!("no {field}: {row}"))
}

#[test]
fn what_containers_use_is_what_the_kernel_says() {
    let world = World::with_warren("stats");
    let busy = "trap 'exit 0' TERM; i=0; while [ $i -lt 5 ]; do sleep 1000 & i=$((i+1)); done; while :; do :; done";
    world.create("busy", 1, &["--limit-cpu", "0.5", "--limit-memory", "64m"], busy);
    let fat = "dd if=/dev/zero of=/dev/shm/x bs=1M count=32; trap 'exit 0' TERM; while :; do sleep 0.05; done";
    world.create("fat", 1, &[], fat);
    let busy = Inside::only(&world, "busy");
    let fat = Inside::only(&world, "fat");

    let rows = until_within(Duration::from_secs(60), "both are measured", || {
        let rows = look(&world, &[]);
        let at_least = |name, field, least| row(&rows, name)[field].as_f64().is_some_and(|it| it > least);
        // A machine that is busy with something else may leave it less than half a processor for a while.
        let settled = rows.len() == 2
            && at_least("fat-1", "memoryBytes", 32e6)
            && at_least("busy-1", "cpuPercent", 40.0)
            && at_least("busy-1", "cpuThrottledPercent", 10.0);
        settled.then_some(rows)
    });
    let (one, two) = (row(&rows, "busy-1"), row(&rows, "fat-1"));
    assert_eq!((one["id"].as_str(), one["node"].as_str()), (Some(busy.id.as_str()), Some("node-1")));
    // Half a processor, and it would take more.
    let percent = number(&one, "cpuPercent");
    assert!(percent < 60.0, "{one}");
    assert_eq!(number(&one, "memoryLimitBytes"), f64::from(64 << 20));
    assert_eq!(number(&one, "pids"), 6.0, "{one}");
    assert_eq!(number(&two, "memoryLimitBytes"), 0.0);
    assert!((32e6..60e6).contains(&number(&two, "memoryBytes")), "{two}");

    // What goes over its network is counted from its side.
    let before = row(&look(&world, &["fat-1"]), "fat-1");
    let (code, said) = fat.shell(&world, "ping -q -c 2 -s 10000 169.254.1.1");
    assert_eq!(code, 0, "{said}");
    let after = look(&world, &["fat-1"]);
    assert_eq!(after.len(), 1, "only the one that was asked for");
    for field in ["networkReceiveBytes", "networkTransmitBytes"] {
        let grown = number(&after[0], field) - number(&before, field);
        assert!((20_000.0..30_000.0).contains(&grown), "{field}: {grown}");
    }
    assert_eq!(look(&world, &["--service", "busy"]).len(), 1);
    // The agent exports the same.
    let of = |service: &str, more: &str| format!("{{{more}node=\"node-1\",service=\"{service}\",slot=\"1\"}}");
    let memory = |service: &str, kind: &str| {
        let labels = of(service, &format!("kind=\"{kind}\","));
        world.agent_metrics().get(&format!("warren_container_memory_bytes{labels}"))
    };
    assert_eq!(memory("busy", "limit"), Some(f64::from(64 << 20)));
    assert_eq!(memory("fat", "limit"), None);
    assert!(memory("fat", "working_set").is_some_and(|bytes| (32e6..60e6).contains(&bytes)));
    let cpu = || {
        let series = format!("warren_container_cpu_seconds_total{}", of("busy", ""));
        world.agent_metrics().get(&series).expect("it is exported")
    };
    let before = cpu();
    assert!(before > 0.1, "{before}");
    // A container killed and replaced goes on with what its slot has used.
    let _ = world.warren(&["container", "kill", "busy-1"]).succeeded();
    until("it is replaced", || (Inside::all(&world, "busy").first()?.id != busy.id).then_some(()));
    let after = cpu();
    assert!(after >= before, "{after} after {before}");
    assert!(world.warren(&["container", "stats", "nobody", "--once"]).failed(3).contains("\"nobody\""));
    let refused = world.warren(&["container", "stats", "--interval", "1ms"]).failed(2);
    assert!(refused.contains("interval: it is 100 ms to 1 h"), "{refused}");
}

/// A table's cells, line by line.
fn cells(line: &str) -> Vec<&str> {
    line.split("   ").map(str::trim).filter(|cell| !cell.is_empty()).collect()
}

#[test]
fn top_shows_what_the_kernel_times() {
    let world = World::with_warren("top");
    world.create("web", 2, &[], &script_that_asks(world.dns_port, true));
    let shown = until("starts and queries are counted", || {
        let shown = world.warren(&["top", "--once", "--interval", "200ms"]).succeeded();
        let node = cells(shown.lines().nth(1)?);
        (node[4].starts_with("2  ") && node[6].starts_with("2  ")).then_some(shown)
    });
    let lines: Vec<Vec<&str>> = shown.lines().map(cells).collect();
    let header = ["NODE", "CPU", "MEMORY", "CONTAINERS", "STARTS (ALL)", "STOPS", "DNS", "DNS FAILED"];
    assert_eq!(lines[0], header);
    let node = &lines[1];
    assert_eq!([node[0], node[3], node[5], node[7]], ["node-1", "2", "0", "0"], "{shown}");
    for timed in [node[4], node[6]] {
        let took = timed.trim_start_matches("2  ").trim_end_matches(" ms");
        let (median, slow) = took.split_once(" / ").expect("two figures");
        let [median, slow] = [median, slow].map(|ms| ms.parse::<f64>().expect("a number"));
        assert!(0.0 < median && median <= slow && slow < 10_000.0, "{timed}");
    }
    assert!(node[1].ends_with('%') && node[2].contains(" / "), "{shown}");
    let containers: Vec<_> = lines[4..].iter().map(|cells| (cells[1], cells[2])).collect();
    assert!(containers.contains(&("web-1", "node-1")) && containers.contains(&("web-2", "node-1")), "{shown}");

    // On a terminal it goes on until somebody has seen enough, and leaves it as it was.
    let mut command = World::binary("warren");
    command.args(["--manager", &world.manager_address(), "top", "--interval", "200ms"]);
    let mut terminal = Terminal::start(&mut command, 24, 200);
    terminal.until("\x1b[?1049h");
    terminal.until("STARTS (LAST MINUTE)");
    let _ = world.warren(&["service", "scale", "web", "3", "--wait"]).succeeded();
    terminal.until("web-3");
    terminal.type_in("q");
    terminal.until("\x1b[?1049l");
    assert!(terminal.ended().success());
}

/// Somebody who follows a log, and has stopped to read.
fn stopped_reader(world: &World) -> Child {
    let mut reader = World::binary("warren")
        .args(["--manager", &world.manager_address(), "service", "logs", "--follow", "flood"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("warren");
    let mut some = [0; 100];
    reader.stdout.as_mut().expect("a pipe").read_exact(&mut some).expect("readable");
    kill_process(Pid::from_child(&reader), Signal::STOP).expect("it runs");
    reader
}

#[test]
fn readers_that_stand_still_hold_nobody_up() {
    let world = World::with_warren("stalled");
    world.create("flood", 1, &[], "trap 'exit 0' TERM; while :; do yes 0123456789012345678901234567890123456789; done");
    let mut readers: Vec<_> = (0..3).map(|_| stopped_reader(&world)).collect();
    // Long enough for every buffer on the way to be full, and for a node that is not heard of to be given up.
    thread::sleep(Duration::from_secs(12));
    let nodes = world.warren(&["node", "ls"]).succeeded();
    let other =
        ["service", "create", "other", "--image", image_name(), "--wait", "--timeout", "10", "--", "sleep", "1000"];
    let created = world.warren(&other);
    for reader in &mut readers {
        reader.kill().expect("a child");
        reader.wait().expect("a child");
    }
    assert!(nodes.lines().nth(1).is_some_and(|line| line.contains("ready")), "{nodes}");
    assert_eq!(created.code, 0, "{}", created.stderr);
}
