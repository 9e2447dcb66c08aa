//! The command `warren`: client verbs, and manager and agent in one process.
//!
//! Lists are tables for people and JSON for programs; errors are one sentence on stderr. Exit codes are in [`error`].

mod apply;
mod client;
mod cluster;
mod complete;
mod container;
mod copy;
mod error;
mod events;
mod exec;
mod filter;
mod image;
mod login;
mod logs;
mod node;
mod objects;
mod operator;
mod output;
mod secret;
mod service;
mod stats;
mod terminal;
mod top;
mod up;
mod volume;
mod wait;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use warren_proto::v1::SecretKind;
use warren_telemetry::build::LONG_VERSION;

use crate::{
    client::ClientArguments,
    error::Error,
    output::{Format, FormatArguments, say},
};

/// What scripts go by; README.md has the same.
const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed
  2  usage error, or invalid field
  3  object not found
  4  manager or containerd unavailable
  5  object already exists, or was changed concurrently
  6  permission denied
  7  address in use
  8  data directory unusable";

/// Run containers on small and edge clusters, with timings measured in the kernel.
#[derive(Debug, Parser)]
#[command(name = "warren", version = LONG_VERSION, args_override_self = true, after_help = EXIT_CODES)]
struct Arguments {
    #[command(flatten)]
    client: ClientArguments,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a manager and an agent in one process.
    Up(Box<up::Arguments>),
    /// Apply YAML manifests: create missing objects and update those that differ.
    Apply(apply::Arguments),
    /// Manage services. To change one, apply a manifest: `warren apply`.
    #[command(subcommand)]
    Service(service::Command),
    /// Manage containers. Services create and remove them: see `warren service scale` and `rm`.
    #[command(subcommand)]
    Container(container::Command),
    /// Manage secrets: sealed files or variables for containers.
    #[command(subcommand)]
    Secret(secret::Command),
    /// Manage configs: files for containers.
    #[command(subcommand)]
    Config(secret::Command),
    /// Manage volumes: storage that outlives containers.
    #[command(subcommand)]
    Volume(volume::Command),
    /// Show live resource usage and kernel timings of nodes and containers.
    ///
    /// For container starts, container stops and DNS queries it shows the count, the median and the 99th percentile.
    Top(top::Arguments),
    /// Manage the cluster: initialize, join, health, backup, managers.
    #[command(subcommand)]
    Cluster(cluster::Command),
    /// Manage nodes.
    #[command(subcommand)]
    Node(node::Command),
    /// Manage operators: people who use the cluster from other machines.
    #[command(subcommand)]
    Operator(operator::Command),
    /// Log in to a cluster with an operator's token.
    ///
    /// Stores a certificate in the --identity directory. It is valid for 90 days and is renewed automatically while in
    /// use.
    Login(login::Arguments),
    /// Log out: delete this machine's operator certificate. To revoke it, use `warren operator rm`.
    Logout,
    /// List events: changes with who made them, and what happened to containers and nodes.
    ///
    /// The cluster stores the latest 10,000 changes. Events of containers and nodes are kept in the leader's memory and
    /// are lost when the leader changes.
    Events(events::Arguments),
    /// Manage this node's images.
    #[command(subcommand)]
    Image(image::Command),
    /// Show client and manager versions.
    Version {
        #[command(flatten)]
        format: FormatArguments,
    },
    /// Print a shell completion script: `source <(warren completion bash)`.
    Completion {
        /// Shell.
        shell: clap_complete::Shell,
    },
}

/// The file with the settings of this command, in the configuration's directory.
const FILE: &str = "warren.toml";

fn main() -> ExitCode {
    // `warren up` is an agent too: the runtime starts this very program beside its containers.
    if let Some(code) = warren_agent::cli::beside_an_agent() {
        return code;
    }
    // A shell that wants to know how a word may end.
    clap_complete::CompleteEnv::with_factory(Arguments::command).var(complete::VARIABLE).complete();
    let arguments = warren_config::parse(FILE);
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            complain(&error.to_string());
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(run(arguments));
    // What is being written is; but a thread that a file server holds up, which may be gone for good, does not hold up the end.
    runtime.shutdown_timeout(warren_agent::cli::LAST_THREADS);
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd's and files' errors keep their cause apart.
            match &error {
                // It has said what it had to say itself.
                Error::Exited(_) => {}
                Error::Runtime(error) => complain(&warren_agent::probes::describe(error)),
                error => complain(&error.to_string()),
            }
            error.exit_code().into()
        }
    }
}

/// Says what went wrong, in which may be what others say.
fn complain(why: &str) {
    eprintln!("error: {}", output::printable_lines(why));
}

async fn run(arguments: Arguments) -> Result<(), Error> {
    let client = arguments.client;
    match arguments.command {
        Command::Up(up) => up::run(*up).await,
        Command::Apply(arguments) => apply::run(arguments, &client).await,
        Command::Service(command) => service::run(command, &client).await,
        Command::Container(command) => container::run(command, &client).await,
        Command::Secret(command) => secret::run(SecretKind::Secret, command, &client).await,
        Command::Config(command) => secret::run(SecretKind::Config, command, &client).await,
        Command::Volume(command) => volume::run(command, &client).await,
        Command::Top(arguments) => top::run(arguments, &client).await,
        Command::Cluster(command) => cluster::run(command, &client).await,
        Command::Node(command) => node::run(command, &client).await,
        Command::Operator(command) => operator::run(command, &client).await,
        Command::Login(arguments) => login::login(&arguments, &client.identity()?).await,
        Command::Logout => login::logout(&client.identity()?),
        Command::Events(arguments) => events::run(arguments, &client).await,
        Command::Image(command) => image::run(command).await,
        Command::Version { format } => version(&client, format.format).await,
        Command::Completion { shell } => {
            let shells = clap_complete::env::Shells::builtins();
            let completer = shells.completer(&shell.to_string());
            let completer = completer.ok_or_else(|| Error::Usage(format!("no completion for {shell}")))?;
            let mut script = Vec::new();
            completer.write_registration(complete::VARIABLE, "warren", "warren", "warren", &mut script)?;
            say!("{}", String::from_utf8_lossy(&script).trim_end());
            Ok(())
        }
    }
}

async fn version(client: &ClientArguments, format: Format) -> Result<(), Error> {
    let manager = match client.cluster().await {
        Ok(mut cluster) => cluster.get_cluster_info(warren_proto::v1::GetClusterInfoRequest {}).await.ok(),
        Err(_) => None,
    };
    let manager = manager.map(|info| info.into_inner().version);
    if !output::to_program(format, &serde_json::json!({"warren": LONG_VERSION, "manager": manager}))? {
        say!("warren   {LONG_VERSION}");
        say!("manager  {}", manager.as_deref().unwrap_or("unavailable"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Args as _;
    use warren_manager::cli::ManagerArguments;

    use super::*;

    const INTRODUCTION: &str = "# Configuration

Every setting can be a flag, an environment variable, or a key in a file. Flags override variables, and variables override files. The
files are in `/etc/warren` (`WARREN_CONFIG_DIR`) and are optional. Keys use `_` or `-`, or TOML tables: `otlp_endpoint = \"...\"` is the
same as

```toml
[otlp]
endpoint = \"http://127.0.0.1:4317\"
```

Lists are arrays. Unknown keys and invalid values are errors.

Generated from the commands: `WARREN_BLESS=1 cargo test -p warren-cli` rewrites it, and the same test without the variable
compares.

";

    #[test]
    fn the_documented_settings_are_these() {
        let manager = ManagerArguments::augment_args(clap::Command::new("warren-manager"));
        let sections = [
            warren_config::markdown(&manager, warren_manager::cli::FILE),
            warren_config::markdown(&warren_agent::cli::Arguments::command(), warren_agent::cli::FILE),
            warren_config::markdown(&Arguments::command(), FILE),
        ];
        let text = INTRODUCTION.to_owned() + &sections.join("\n");
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/configuration.md");
        if std::env::var_os("WARREN_BLESS").is_some() {
            std::fs::write(path, &text).expect("docs/ is writable");
        }
        let documented = std::fs::read_to_string(path).expect("docs/configuration.md exists");
        assert!(
            documented == text,
            "docs/configuration.md is out of date: run `WARREN_BLESS=1 cargo test -p warren-cli`"
        );
    }

    /// The help of every command, one file each: what changes in it is read by people before it lands.
    #[test]
    fn help_is_as_it_was_reviewed() {
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("help");
        let mut command = Arguments::command();
        command.build();
        let mut helps = std::collections::BTreeMap::new();
        let mut commands = vec![("warren".to_owned(), command)];
        while let Some((name, mut command)) = commands.pop() {
            let inner = command.get_subcommands().filter(|inner| inner.get_name() != "help");
            commands.extend(inner.map(|inner| (format!("{name}-{}", inner.get_name()), inner.clone())));
            // Without what variables are set to here.
            let help = command.render_long_help().to_string();
            let lines = help.lines().map(|line| match line.trim_start().strip_prefix("[env: ") {
                Some(variable) => {
                    let indent = &line[..line.len() - line.trim_start().len()];
                    format!("{indent}[env: {}=]", variable.split('=').next().unwrap_or_default())
                }
                None => line.to_owned(),
            });
            helps.insert(format!("{name}.txt"), lines.map(|line| line + "\n").collect::<String>());
        }
        if std::env::var_os("WARREN_BLESS").is_some() {
            let _ = std::fs::remove_dir_all(&directory);
            std::fs::create_dir_all(&directory).expect("writable");
            for (file, help) in &helps {
                std::fs::write(directory.join(file), help).expect("writable");
            }
        }
        let kept = std::fs::read_dir(&directory).expect("crates/cli/help exists");
        let mut kept: Vec<_> =
            kept.map(|entry| entry.expect("readable").file_name().into_string().expect("a name")).collect();
        kept.sort();
        assert_eq!(kept, helps.keys().cloned().collect::<Vec<_>>());
        for (file, help) in helps {
            let reviewed = std::fs::read_to_string(directory.join(&file)).expect("readable");
            assert!(
                reviewed == help,
                "crates/cli/help/{file} is out of date: run `WARREN_BLESS=1 cargo test -p warren-cli` and read what changed"
            );
        }
    }
}
