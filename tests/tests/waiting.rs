//! What `--wait` and `service wait` say is so.

use std::time::{Duration, Instant};

use warren_tests::{Inside, Output, WELL_BEHAVED, World, image_name, until};

/// As people run it: what they are told to be well goes on running for the time that is the default.
fn warren(world: &World, arguments: &[&str]) -> Output {
    let mut command = World::binary("warren");
    command.env_remove("WARREN_STABLE_S").args(["--manager", &world.manager_address()]).args(arguments);
    World::run(&mut command)
}

fn create(world: &World, name: &str, options: &[&str], script: &str) -> Output {
    let mut arguments = vec!["service", "create", name, "--image", image_name(), "--wait"];
    arguments.extend(options);
    arguments.extend(["--", "sh", "-c", script]);
    warren(world, &arguments)
}

/// A manifest of a service of the demo image.
fn manifest(name: &str, replicas: u32, command: &str) -> String {
    format!(
        "apiVersion: warren.io/v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  image: {}\n  replicas: {replicas}\n  \
         command: {command}\n  stopTimeout: 2s\n",
        image_name()
    )
}

fn apply(world: &World, texts: &[String], options: &[&str]) -> Output {
    let file = world.path("manifest.yaml");
    std::fs::write(&file, texts.join("---\n")).expect("writable");
    let file = file.display().to_string();
    let mut arguments = vec!["apply", "-f", &file, "--wait"];
    arguments.extend(options);
    warren(world, &arguments)
}

#[test]
fn an_update_is_done_when_every_container_runs_what_is_wanted() {
    let world = World::with_warren("wait-update");
    let loops = format!("[sh, -c, {WELL_BEHAVED:?}]");
    let _ = apply(&world, &[manifest("web", 3, &loops)], &[]).succeeded();
    let wrong = apply(&world, &[manifest("web", 3, "[/nonexistent]")], &["--timeout", "12"]);
    let said = wrong.failed(1);
    assert!(said.contains("service web is not ready after 12 s (") && said.contains("web-"), "{said}");
    assert!(said.contains("/nonexistent") && said.contains("no such file"), "{said}");
    // What is right again replaces the others, and none of before is left when that is said.
    let marked = format!("[sh, -c, {:?}]", format!(": marked; {WELL_BEHAVED}"));
    let _ = apply(&world, &[manifest("web", 3, &marked)], &[]).succeeded();
    let commands: Vec<_> = Inside::all(&world, "web").iter().map(|inside| inside.proc("cmdline")).collect();
    assert!(commands.len() == 3 && commands.iter().all(|command| command.contains(": marked")), "{commands:?}");
    // Nothing has changed: there is nothing to wait for.
    let began = Instant::now();
    let _ = apply(&world, &[manifest("web", 3, &marked)], &[]).succeeded();
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    // All that fails is named, within one time.
    let (one, two) = (manifest("one", 1, "[/nonexistent]"), manifest("two", 1, "[/nonexistent]"));
    let began = Instant::now();
    let said = apply(&world, &[one, two, manifest("web", 3, &marked)], &["--timeout", "5"]).failed(1);
    assert!(said.contains("service one is") && said.contains("service two is") && !said.contains("web"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
}

#[test]
fn what_ends_too_soon_is_not_well() {
    let world = World::with_warren("wait-crash");
    let said = create(&world, "never", &["--restart", "never"], "exit 4").failed(1);
    assert!(said.contains("never-1 failed: exited with code 4"), "{said}");
    assert_eq!(warren(&world, &["service", "wait", "never"]).code, 4);
    let said = create(&world, "late", &["--restart", "never"], "sleep 2; exit 5").failed(1);
    assert!(said.contains("late-1 failed: exited with code 5"), "{said}");
    let said = create(&world, "again", &["--timeout", "8", "--restart-delay-ms", "100"], "sleep 0.5; exit 3").failed(1);
    assert!(said.contains("again-1 failed") && said.contains("exited with code 3"), "{said}");
    let options = ["--timeout", "8", "--limit-memory", "32M"];
    let said = create(&world, "oom", &options, "dd if=/dev/zero of=/dev/null bs=64M count=1; exit 9").failed(1);
    assert!(said.contains("oom-1 failed") && said.contains("out of memory"), "{said}");
    let given_up = ["--restart-max-attempts", "2", "--restart-delay-ms", "100"];
    let began = Instant::now();
    let said = create(&world, "given-up", &given_up, "exit 6").failed(1);
    assert!(said.contains("given-up-1 failed: exited with code 6"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(20), "it does not wait for what does not come");
    // What is to end may.
    let _ = create(&world, "job", &["--restart", "never", "--replicas", "2"], "exit 0").succeeded();
    assert_eq!(warren(&world, &["service", "wait", "job"]).code, 0);
}

#[test]
fn services_can_be_waited_for_by_name() {
    let world = World::with_warren("wait-name");
    let arguments = ["service", "create", "job", "--image", image_name(), "--restart", "on-failure"];
    let script = ["--restart-max-attempts", "2", "--restart-delay-ms", "100", "--", "sh", "-c", "sleep 1; exit 7"];
    let _ = warren(&world, &[&arguments[..], &script[..]].concat()).succeeded();
    let said = warren(&world, &["service", "wait", "job", "--timeout", "1"]).failed(1);
    assert!(said.contains("service job has not ended after 1 s: job-1 is "), "{said}");
    let said = warren(&world, &["service", "wait", "job"]).failed(7);
    assert!(said.contains("service job exited with code 7"), "{said}");
    world.create("web", 2, &[], WELL_BEHAVED);
    let _ = warren(&world, &["service", "wait", "web"]).succeeded();
    let said = warren(&world, &["service", "wait", "web", "--for", "ended", "--timeout", "1"]).failed(1);
    assert!(said.contains("web-1 is running"), "{said}");
    assert_eq!(warren(&world, &["service", "wait", "none"]).code, 3);
    let missing = create(&world, "missing", &["--restart", "never"], "x");
    assert_eq!(missing.code, 1);
    // Another manager goes on where the one that was asked is gone; here it is the same one, later.
    let waiting = std::thread::scope(|scope| {
        let mut world = world;
        let address = world.manager_address();
        let options = ["--health", "exec:test -e /tmp/well", "--health-interval", "1s", "--health-start-period", "1m"];
        let mut arguments = vec!["--manager", &address, "service", "create", "slow", "--image", image_name(), "--wait"];
        arguments.extend(options);
        arguments.extend(["--", "sh", "-c", "sleep 8; touch /tmp/well; sleep 600"]);
        let mut command = World::binary("warren");
        command.args(arguments);
        let waiting = scope.spawn(move || World::run(&mut command));
        until("it is there", || (warren(&world, &["service", "inspect", "slow"]).code == 0).then_some(()));
        until("it runs", || (!Inside::all(&world, "slow").is_empty()).then_some(()));
        if let Some(manager) = world.manager.take() {
            manager.kill();
        }
        world.start_manager();
        let waiting = waiting.join().expect("no panic");
        let _ = world.warren(&["service", "rm", "slow", "web", "--wait"]).succeeded();
        waiting
    });
    let _ = waiting.succeeded();
}

#[test]
fn services_are_removed_together() {
    let world = World::with_warren("wait-rm");
    let ignores = "trap '' TERM; while :; do sleep 0.1; done";
    for name in ["a", "b", "c"] {
        world.create(name, 1, &["--stop-timeout", "3"], ignores);
    }
    let began = Instant::now();
    let removed = warren(&world, &["service", "rm", "a", "none", "b", "c", "--wait"]);
    assert_eq!((removed.code, removed.stdout.as_str()), (3, "a\nb\nc\n"), "{}", removed.stderr);
    assert!(began.elapsed() < Duration::from_secs(6), "one after the other: {:?}", began.elapsed());
    until("nothing is left", || world.leftovers().is_empty().then_some(()));
    world.create("d", 2, &["--stop-timeout", "30"], ignores);
    let said = warren(&world, &["service", "rm", "d", "--wait", "--timeout", "1"]).failed(1);
    assert!(said.contains("containers of d are still there after 1 s: d-1 on node-1; d-2 on node-1"), "{said}");
    for (_, pid) in world.tasks() {
        let _ = warren_tests::run("kill", &["-9", &pid.to_string()]);
    }
}
