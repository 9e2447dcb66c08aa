//! Health checks of every kind, and what follows from them.

use std::{net::TcpListener, sync::Arc, time::Duration};

use serde_json::Value;
use warren_tests::{Inside, WELL_BEHAVED, World, image_name, run, until};

/// A web server whose `/ok` is there while the file is.
const SERVER: &str = "mkdir /tmp/www; httpd -p 80 -h /tmp/www; sleep 0.7; touch /tmp/www/ok; trap 'exit 0' TERM; while :; do sleep 0.05; done";
const QUICK: [&str; 6] = ["--health-interval", "100ms", "--health-retries", "2", "--health-timeout", "1s"];

fn names(service: &str) -> Vec<String> {
    let found = run("dig", &["@169.254.1.1", "+short", "+tries=1", "+timeout=2", service]).stdout;
    found.lines().map(str::to_owned).collect()
}

fn health(container: &Value) -> &str {
    container["status"]["health"].as_str().unwrap_or("")
}

fn create(world: &World, name: &str, options: &[&str], script: &str) {
    let mut all = QUICK.to_vec();
    all.extend(options);
    world.create(name, 1, &all, script);
}

/// Waits until a service's first container was given up, and says why.
fn given_up(world: &World, name: &str, first: &str) -> String {
    let ended = until("the container is given up", || {
        let containers = world.containers(name);
        let it = containers.into_iter().find(|container| container["id"] == first)?;
        (it["status"]["state"] == "CONTAINER_STATE_FAILED").then_some(it)
    });
    ended["status"]["message"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_container_that_does_not_answer_is_not_named_and_is_replaced() {
    let world = World::with_warren("health");
    // It is up only once it answers; failures before that are not held against it.
    create(
        &world,
        "web",
        &["--health", "http://:80/ok", "--health-start-period", "20s", "--publish", "8080:80"],
        SERVER,
    );
    let first = Inside::only(&world, "web");
    assert_eq!(health(&world.containers("web")[0]), "HEALTH_HEALTHY", "--wait waits for it");
    assert!(world.warren(&["service", "ps", "web"]).succeeded().contains("  running (healthy)  "));
    let never =
        ["service", "create", "never", "--image", image_name(), "--health", "tcp://:81", "--wait", "--timeout", "2"];
    let never = world.warren(&[&never[..], &["--", "sleep", "1000"]].concat());
    let why = "never-1 has not passed a health check: connecting to port 81: Connection refused";
    assert!(never.stderr.contains("not ready after 2 s (0 of 1)") && never.stderr.contains(why), "{}", never.stderr);
    let _ = world.warren(&["service", "rm", "never", "--wait"]).succeeded();
    until("it has a name", || (names("web") == first.addresses[..1]).then_some(()));
    let published =
        || run("busybox", &["timeout", "2", "busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:8080/ok"]).code;
    until("its port is published", || (published() == 0).then_some(()));
    // Checks that find nothing new are nobody's business but the node's.
    let entries = || world.manager_metrics().sum("warren_raft_log_index", &[]);
    let checks = || world.agent_metrics().sum("warren_health_checks_total", &["type=\"http\"", "result=\"success\""]);
    let (log, checked) = (entries(), checks());
    until("it is checked again and again", || (checks() >= checked + 5.0).then_some(()));
    assert_eq!(entries(), log, "an idle cluster writes nothing");
    // An agent's restart does not make it less healthy.
    let mut world = world;
    world.agent.take().expect("it runs").kill();
    world.start_agent(&[]);
    world.wait_ready();
    assert_eq!(names("web"), first.addresses[..1]);
    assert_eq!(health(&world.containers("web")[0]), "HEALTH_HEALTHY");

    assert_eq!(first.shell(&world, "rm /tmp/www/ok").0, 0);
    until("it has no name any more", || (!names("web").contains(&first.addresses[0])).then_some(()));
    assert_eq!(given_up(&world, "web", &first.id), "unhealthy: HTTP status 404 Not Found");
    let second = until("another serves", || {
        let all = Inside::all(&world, "web");
        all.into_iter().find(|container| container.id != first.id && names("web") == container.addresses[..1])
    });
    assert_ne!(second.id, first.id);
    assert!(world.manager_metrics().sum("warren_container_restarts_total", &["service=\"web\""]) >= 1.0);
    let durations = world.agent_metrics().sum("warren_health_check_duration_seconds_count", &["type=\"http\""]);
    assert!(durations > 0.0);
}

#[test]
fn containers_are_checked_by_connecting_and_by_commands() {
    let world = World::with_warren("kinds");
    let listen = "touch /tmp/ok; nc -lk -p 5432 -e true & trap 'exit 0' TERM; while :; do sleep 0.05; done";
    let listen = listen.replace("nc -lk", "nc -ll");
    create(&world, "tcp", &["--health", "tcp://:5432"], &listen);
    // Commands may say something.
    create(&world, "exec", &["--health", "exec:echo out && echo err >&2 && test -f /tmp/ok"], &listen);
    create(&world, "slow", &["--health", "exec:[ -f /tmp/ok ] || sleep 6007", "--health-timeout", "300ms"], &listen);
    let firsts = ["tcp", "exec", "slow"].map(|name| Inside::only(&world, name));
    for first in &firsts {
        let _ = first.shell(&world, "rm /tmp/ok; killall nc");
    }
    for (name, first, why) in [
        ("tcp", &firsts[0], "unhealthy: connecting to port 5432: Connection refused (os error 111)"),
        ("exec", &firsts[1], "unhealthy: the command exited with code 1"),
        ("slow", &firsts[2], "unhealthy: the command took longer than 300ms"),
    ] {
        assert_eq!(given_up(&world, name, &first.id), why);
    }
    // What exceeded its time is gone: nothing sleeps in the container's place.
    let left = std::fs::read_dir("/proc").expect("a directory").flatten().filter_map(|entry| {
        std::fs::read_to_string(entry.path().join("cmdline")).ok().filter(|command| command == "sleep\x006007\0")
    });
    assert_eq!(left.count(), 0);
    // One that is not healthy in its time never serves.
    let never = [
        "service",
        "create",
        "never",
        "--image",
        warren_tests::image_name(),
        "--restart",
        "never",
        "--health",
        "tcp://:1",
    ];
    let _ = world.warren(&[&never[..], &QUICK].concat()).succeeded();
    let containers = until("it is given up", || {
        let containers = world.containers("never");
        (containers.first()?["status"]["state"] == "CONTAINER_STATE_FAILED").then_some(containers)
    });
    assert_eq!(containers.len(), 1, "its restart policy says so");
    let wrong = world.warren(&["service", "create", "x", "--image", "x", "--health", "tcp://:0"]).failed(2);
    assert!(wrong.contains("spec.container.health_check.tcp.port: 0 is not between 1 and 65535"), "{wrong}");
}

#[test]
fn containers_are_checked_by_https_and_grpc() {
    let world = World::with_warren("tls");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    // In the node's network, where this test is too, its servers stand in for the containers'.
    let bind = || {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("a socket option");
        let port = listener.local_addr().expect("an address").port();
        let _runtime = runtime.enter();
        (tokio::net::TcpListener::from_std(listener).expect("a listener"), port)
    };
    let (https, https_port) = bind();
    let certified = rcgen::generate_simple_self_signed(vec!["whoever".to_owned()]).expect("a certificate");
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = tokio_rustls::rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(
            vec![certified.cert.der().clone()],
            tokio_rustls::rustls::pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der())
                .expect("a key"),
        )
        .expect("a configuration");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    runtime.spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

        loop {
            let Ok((stream, _)) = https.accept().await else { continue };
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut request = [0; 1024];
            let read = stream.read(&mut request).await.unwrap_or(0);
            let found = request[..read].starts_with(b"GET /up HTTP/1.1");
            let status = if found { "204 No Content" } else { "500 Oh" };
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    });
    let (grpc, grpc_port) = bind();
    let (reporter, service) = tonic_health::server::health_reporter();
    runtime.spawn(
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(grpc)),
    );
    let check = |name: &str, check: &str| create(&world, name, &["--network", "host", "--health", check], WELL_BEHAVED);
    check("https", &format!("https://:{https_port}/up"));
    check("grpc", &format!("grpc://:{grpc_port}"));
    let first = Inside::only(&world, "grpc");
    runtime.block_on(reporter.set_service_status("", tonic_health::ServingStatus::NotServing));
    assert_eq!(given_up(&world, "grpc", &first.id), "unhealthy: gRPC: NOT_SERVING");
    let bad =
        ["service", "create", "bad", "--image", warren_tests::image_name(), "--restart", "never", "--network", "host"];
    let url = format!("https://:{https_port}/down");
    let _ = world.warren(&[&bad[..], &QUICK, &["--health", &url]].concat()).succeeded();
    let failed = world.container_when("bad", "it is given up", |c| c["status"]["state"] == "CONTAINER_STATE_FAILED");
    assert_eq!(failed["status"]["message"], "unhealthy: HTTP status 500 Internal Server Error");
    runtime.shutdown_timeout(Duration::from_secs(1));
}
