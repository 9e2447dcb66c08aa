//! The README's transcripts: every command is run, and prints what the README says that it prints, but for ids, times and the
//! like.

use std::fs;

use warren_tests::{Output, Process, World, until};

/// The README's blocks of this kind.
fn blocks(kind: &str) -> Vec<String> {
    let readme = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).expect("readable");
    let fence = format!("```{kind}\n");
    readme.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap_or_default().to_owned()).collect()
}

/// Characters of an id in a table.
const SHORT_ID: usize = 12;

/// A line without what differs from run to run: words with a digit in them, ids (one in fifty has no digit), the host's name,
/// and the width of columns.
fn shape(line: &str) -> String {
    let word = |word: &str| match word {
        "vm" | "node-1" => "HOST".to_owned(),
        word if word.contains("node=\"") => word.split('{').next().unwrap_or_default().to_owned(),
        word if word.chars().any(|c| c.is_ascii_digit()) => {
            // A container's name keeps its service.
            match word.rsplit_once('-') {
                Some((service, slot)) if slot.chars().all(|c| c.is_ascii_digit()) => format!("{service}-N"),
                _ => "N".to_owned(),
            }
        }
        word if word.len() == SHORT_ID && word.chars().all(|c| c.is_ascii_lowercase()) => "N".to_owned(),
        word => word.to_owned(),
    };
    line.split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

/// Whether `printed` is what the README shows. A line of dots there stands for any number of lines.
fn matches(shown: &[&str], printed: &[&str]) -> bool {
    match (shown.split_first(), printed.split_first()) {
        (None, None) => true,
        (Some((dots, rest)), _) if dots.trim() == "..." => {
            matches(rest, printed) || printed.split_first().is_some_and(|(_, printed)| matches(shown, printed))
        }
        (Some((line, shown)), Some((found, printed))) => shape(line) == shape(found) && matches(shown, printed),
        _ => false,
    }
}

fn lines(text: &str) -> Vec<&str> {
    text.lines().filter(|line| !line.trim().is_empty()).collect()
}

fn run(world: &World, command: &str) -> Output {
    let words: Vec<&str> = command.split_whitespace().collect();
    match words.as_slice() {
        ["target/debug/warren", arguments @ ..] => world.warren(arguments),
        ["curl", "-s", "127.0.0.1:9464/metrics", "|", "grep", wanted] => {
            let (_, text) = world.get(world.manager_port, "/metrics").expect("metrics");
            let found = text.lines().filter(|line| line.contains(wanted) && !line.starts_with('#'));
            Output { code: 0, stdout: found.map(|line| format!("{line}\n")).collect(), stderr: String::new() }
        }
        _ => panic!("this test cannot run {command:?}"),
    }
}

#[test]
fn the_first_session_is_what_is_shown() {
    let world = World::with_warren("readme");
    let arguments = ["service", "create", "demo", "--image", "localhost/warren-demo", "--replicas", "3", "--wait"];
    let _ = world.warren(&arguments).succeeded();
    until("the containers are timed", || {
        (world.manager_metrics().sum("warren_container_start_duration_seconds_count", &[]) == 3.0).then_some(())
    });
    let [_, session] = blocks("console").try_into().expect("two transcripts");
    let mut commands = 0;
    for command in session.split("# ").skip(1) {
        let (command, shown) = command.split_once('\n').unwrap_or((command, ""));
        commands += 1;
        let shown = lines(shown);
        // What the kernel has timed reaches the manager a moment after the container runs.
        let mut last = String::new();
        let mut ran = None;
        until(&format!("{command} prints what the README shows"), || {
            // Only what changes nothing may be repeated.
            let repeats = ["ls", "ps", "curl"].iter().any(|verb| command.split_whitespace().any(|word| word == *verb));
            if repeats || ran.is_none() {
                ran = Some(run(&world, command));
            }
            let output = ran.as_ref().expect("it ran");
            last = format!("{}{}", output.stdout, output.stderr);
            let silent = shown.is_empty();
            let fits = matches(&shown, &lines(&last)) || (silent && output.code == 0);
            assert!(fits || repeats, "{command} printed\n{last}and not\n{}", shown.join("\n"));
            fits.then_some(())
        });
    }
    assert_eq!(commands, 8);
}

#[test]
fn up_prints_what_is_shown() {
    let world = World::empty("readme-up");
    let up = Process::start("up", &mut world.up_command(), world.directory.path());
    let [transcript, _] = blocks("console").try_into().expect("two transcripts");
    let address = format!("on {}", world.path("none.sock").display());
    let shown = transcript.replace("on /run/containerd/containerd.sock", &address);
    let shown = lines(&shown);
    // Everything up to the timings, which grow with what the containers do.
    let timings = shown.iter().position(|line| line.contains("demo-1")).expect("timings");
    let (head, timed) = shown.split_at(timings);
    until("it prints what the README shows", || {
        let log = up.log();
        let printed = lines(&log);
        let begin = printed.iter().position(|line| line.contains("demo-"))?;
        let complete = printed[begin..].iter().filter(|line| line.matches(" ms").count() == 2).count() == timed.len();
        (complete && matches(head, &printed[..begin])).then_some(())
    });
    let log = up.log();
    let last = lines(&log).into_iter().rfind(|line| line.matches(" ms").count() == 2).map(shape);
    assert_eq!(last, timed.last().map(|line| shape(line)), "{log}");
    assert!(up.terminate().success());
}
