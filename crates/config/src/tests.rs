use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::*;

#[derive(Debug, Parser, PartialEq)]
#[command(name = "test")]
struct Arguments {
    #[arg(long, env = "WARREN_CONFIG_TEST_LOG", default_value = "info", global = true)]
    log: String,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, PartialEq, Subcommand)]
enum Verb {
    Run(Run),
    Other { name: String },
}

#[derive(Args, Debug, PartialEq)]
struct Run {
    #[arg(long, env = "WARREN_CONFIG_TEST_METRICS_ADDR", default_value = "0.0.0.0:1")]
    metrics_addr: std::net::SocketAddr,
    #[arg(long, env = "WARREN_CONFIG_TEST_PORTS", default_value = "53", value_delimiter = ',')]
    ports: Vec<u16>,
    #[arg(long, env = "WARREN_CONFIG_TEST_QUIET")]
    quiet: bool,
    #[arg(long, env = "WARREN_CONFIG_TEST_ENDPOINT")]
    endpoint: Option<String>,
    /// Not a setting: it has no variable.
    #[arg(long)]
    once: bool,
}

fn with(file: &str, arguments: &[&str]) -> Result<Arguments, Error> {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("test.toml");
    fs::write(&path, file).expect("writable");
    let arguments = ["test"].iter().chain(arguments).map(OsString::from);
    parse_from(arguments, &path)
}

fn run(arguments: Arguments) -> Run {
    match arguments.verb {
        Verb::Run(run) => run,
        Verb::Other { name } => panic!("other {name}"),
    }
}

const FILE: &str = r#"
log = "debug"
ports = [53, 5353]
quiet = true
endpoint = "http://x:1"
[metrics]
addr = "127.0.0.1:2"
"#;

#[test]
fn a_file_is_behind_the_environment_and_the_environment_behind_flags() {
    let parsed = with(FILE, &["run"]).expect("valid");
    assert_eq!(parsed.log, "debug");
    let expected = Run {
        metrics_addr: "127.0.0.1:2".parse().expect("an address"),
        ports: vec![53, 5353],
        quiet: true,
        endpoint: Some("http://x:1".to_owned()),
        once: false,
    };
    assert_eq!(run(parsed), expected);

    let flags = ["run", "--log", "warn", "--metrics-addr", "127.0.0.1:3", "--ports", "1"];
    let parsed = with(FILE, &flags).expect("valid");
    assert_eq!(parsed.log, "warn");
    let parsed = run(parsed);
    assert_eq!((parsed.metrics_addr.port(), parsed.ports), (3, vec![1]));
    // `PATH` is set wherever this runs: it stands for a variable in front of a file.
    let command = Command::new("x").arg(Arg::new("p").long("p").env("PATH"));
    let settings = Settings::parse("p = \"file\"", Path::new("x.toml")).expect("valid");
    let matches = settings.apply(command).expect("known").get_matches_from(["x"]);
    assert_eq!(matches.get_one::<String>("p").cloned(), env::var("PATH").ok());
}

#[test]
fn without_a_file_the_defaults_hold() {
    let arguments = ["test", "run"].map(OsString::from);
    let parsed: Arguments = parse_from(arguments, &PathBuf::from("/nonexistent/test.toml")).expect("valid");
    assert_eq!(parsed.log, "info");
    assert_eq!(run(parsed).ports, [53]);
}

#[test]
fn a_setting_of_another_command_is_no_error() {
    assert!(with(FILE, &["other", "x"]).is_ok());
}

#[test]
fn what_is_wrong_names_the_file_and_the_key() {
    let error = |file| with(file, &["run"]).expect_err("refused").to_string();
    let unknown = error("metrics_adr = \"x\"");
    assert!(unknown.contains("test.toml: there is no setting metrics-adr") && unknown.contains("metrics-addr"));
    assert!(error("once = true").contains("there is no setting once"));
    assert!(error("[metrics]\nbuckets = 1").contains("there is no setting metrics-buckets"));
    assert!(error("\nlog = ").contains("test.toml: line 2"));
    assert!(error("metrics_addr = \"a\"\n[metrics]\naddr = \"b\"").contains("metrics-addr is set twice"));
    assert!(error("log = 2020-01-01").contains("log is a text"));
    let value = error("metrics_addr = \"nowhere\"");
    assert!(value.contains("test.toml: invalid value 'nowhere' for '--metrics-addr"), "{value}");
    // A wrong flag is the flag's fault.
    let flag = with(FILE, &["run", "--metrics-addr", "nowhere"]).expect_err("refused");
    assert!(matches!(flag, Error::Usage(_)), "{flag:?}");
}

#[test]
fn the_reference_names_key_flag_and_variable() {
    use clap::CommandFactory as _;

    let text = markdown(&Arguments::command(), "/etc/warren/test.toml");
    assert!(text.contains("| `metrics_addr` | `--metrics-addr` | `WARREN_CONFIG_TEST_METRICS_ADDR` | `0.0.0.0:1` |"));
    assert!(!text.contains("--once"), "{text}");
}
