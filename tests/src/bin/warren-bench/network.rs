//! Connecting a container: Warren against the CNI plugin `bridge`, in turns in the same network namespace.

use std::{
    collections::HashMap,
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use tokio_util::sync::CancellationToken;
use warren_agent::network::{Network, Options, OverlayKind, Place};
use warren_tests::{World, run};

use crate::{median, ms};

const CONTAINERS: usize = 50;
/// Where Debian's package has its plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// What `attach` does as well: an address of each family, the node as gateway, translation of what leaves.
const CONFIGURATION: &str = r#"{"cniVersion":"0.4.0","name":"bench","type":"bridge","bridge":"cni-bench","isGateway":true,
"ipMasq":true,"hairpinMode":true,"ipam":{"type":"host-local","dataDir":"DIRECTORY",
"ranges":[[{"subnet":"10.99.0.0/16"}],[{"subnet":"fd99::/64"}]],"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}}"#;

/// Runs the plugin as a container engine does.
fn plugin(command: &str, id: &str, configuration: &str) {
    let mut child = Command::new(Path::new(PLUGINS).join("bridge"))
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", id)
        .env("CNI_NETNS", format!("/run/netns/{id}"))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", PLUGINS)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the plugin");
    child.stdin.take().expect("a pipe").write_all(configuration.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("a child");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

pub(crate) fn measure() {
    let world = World::empty("bench-net");
    let configuration = CONFIGURATION.replace("DIRECTORY", &world.path("ipam").to_string_lossy());
    // Of this thread alone: the others are in the machine's own network.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let options = Options {
        run_dir: world.path("netns"),
        data_dir: world.path("network"),
        address: None,
        overlay: OverlayKind::Vxlan,
        domain: "warren".to_owned(),
        reach: Vec::new(),
        metrics_port: 9465,
        managers_metrics_port: 9464,
    };
    let network = runtime.block_on(Network::start(options, &HashMap::new())).expect("a network");
    let prefixes = |texts: [&str; 2]| texts.map(|text| text.parse().expect("a prefix")).to_vec();
    network.set_place(Place {
        node_id: "bench".to_owned(),
        subnets: prefixes(["10.98.0.0/24", "fd98::/64"]),
        cluster: prefixes(["10.98.0.0/16", "fd98::/48"]),
    });
    let shutdown = CancellationToken::new();
    runtime.spawn(network.clone().run(shutdown.clone()));
    let (mut by_warren, mut by_plugin, mut with_namespace) = (Vec::new(), Vec::new(), Vec::new());
    let mut namespaces = Vec::new();
    runtime.block_on(async {
        while network.check().is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        for i in 0..CONTAINERS {
            // Links are named after the beginning.
            let id = format!("{i:02}{}", world.cgroup_parent().replace('/', "-"));
            let began = Instant::now();
            network.attach(&id).await.expect("it is connected");
            by_warren.push(ms(began.elapsed()));

            let began = Instant::now();
            let _ = run("ip", &["netns", "add", &id]).succeeded();
            let made = ms(began.elapsed());
            let began = Instant::now();
            plugin("ADD", &id, &configuration);
            by_plugin.push(ms(began.elapsed()));
            with_namespace.push(made + ms(began.elapsed()));
            namespaces.push(id);
        }
        for id in &namespaces {
            network.detach(id).await.expect("it is taken away");
        }
    });
    for id in &namespaces {
        plugin("DEL", id, &configuration);
        let _ = run("ip", &["netns", "delete", id]);
    }
    shutdown.cancel();
    let _ = fs::remove_dir_all(world.path("ipam"));
    let (warren, plugin) = (median(&mut by_warren), median(&mut by_plugin));
    println!("connect one container, both families, median of {CONTAINERS}, in turns");
    println!("  CNI bridge with host-local and masquerading {plugin:8.1} ms   into a namespace that is there");
    println!("  the same with `ip netns add`                {:8.1} ms", median(&mut with_namespace));
    println!(
        "  warren, making the namespace too            {warren:8.1} ms   {:.2} of the plugin alone (goal: below 1.00, and 15 ms)\n",
        warren / plugin
    );
}
