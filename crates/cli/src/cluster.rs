//! `warren cluster ...`

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use warren_agent::membership;
use warren_manager::formation;
use warren_pki::{Dialer, Request, Token};
use warren_proto::v1::{self, cluster_client::ClusterClient};

use crate::{
    client::ClientArguments,
    error::Error,
    output::{self, Format, FormatArguments, say},
    parse,
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Founds a cluster, of which this machine is the first manager.
    ///
    /// It prints two tokens, with which machines join for a day, and no more: the cluster keeps only their hashes. The manager of
    /// this machine starts to work, or does when it is started.
    Init {
        #[command(flatten)]
        place: Place,
    },
    /// Lets this machine join a cluster, as what the token is for: a manager, or a node with an agent.
    ///
    /// The manager or agent of this machine starts to take part, or does when it is started.
    Join {
        /// As `warren cluster init` or `warren cluster token` has printed it.
        #[arg(long, env = "WARREN_JOIN_TOKEN", hide_env_values = true)]
        token: String,
        /// A manager of the cluster, as HOST:PORT.
        address: String,
        #[command(flatten)]
        place: Place,
    },
    /// Shows the cluster and its managers, as the manager that answers sees them.
    Info {
        #[command(flatten)]
        format: FormatArguments,
    },
    /// Takes a manager out of the cluster, for good. One that leads hands over first.
    Rm {
        /// Its number, as `warren cluster info` shows it.
        id: u64,
    },
    /// Works with tokens, with which machines join.
    #[command(subcommand)]
    Token(TokenCommand),
}

#[derive(Args, Debug)]
pub(crate) struct Place {
    /// Holds the manager's and the agent's directories.
    #[arg(long, env = "WARREN_DATA_DIR", default_value = "/var/lib/warren")]
    data_dir: PathBuf,
}

impl Place {
    fn manager(&self) -> PathBuf {
        self.data_dir.join("manager")
    }

    fn agent(&self) -> PathBuf {
        self.data_dir.join("agent")
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Makes a token and prints it, once.
    Create {
        #[command(flatten)]
        wanted: Wanted,
    },
    /// Lists tokens that are valid, without their secrets.
    #[command(alias = "list")]
    Ls {
        #[command(flatten)]
        format: FormatArguments,
    },
    /// Makes all tokens of a role useless, and another one.
    Rotate {
        #[command(flatten)]
        wanted: Wanted,
    },
}

#[derive(Args, Debug)]
pub(crate) struct Wanted {
    /// What machines that have it become.
    #[arg(long, value_enum)]
    role: Role,
    /// How long it is valid, like 2h.
    #[arg(long, value_parser = parse::duration)]
    lifetime: Option<pbjson_types::Duration>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Role {
    Manager,
    Worker,
}

impl From<Role> for v1::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::Manager => Self::Manager,
            Role::Worker => Self::Worker,
        }
    }
}

pub(crate) async fn run(command: Command, client: &ClientArguments) -> Result<(), Error> {
    match command {
        Command::Init { place } => init(&place),
        Command::Join { token, address, place } => join(&token, &address, &place).await,
        Command::Info { format } => info(client, format.format).await,
        Command::Rm { id } => remove(client, id).await,
        Command::Token(TokenCommand::Create { wanted }) => create(client, &wanted).await,
        Command::Token(TokenCommand::Ls { format }) => list(client, format.format).await,
        Command::Token(TokenCommand::Rotate { wanted }) => {
            let role = v1::Role::from(wanted.role).into();
            client.cluster().await?.revoke_join_tokens(v1::RevokeJoinTokensRequest { role }).await?;
            create(client, &wanted).await
        }
    }
}

fn init(place: &Place) -> Result<(), Error> {
    let founded = formation::found(&place.manager(), &warren_manager::hostname())?;
    say!("cluster {} is founded; its first manager is on this machine", founded.cluster_id);
    say!("");
    say!("within a day, where HOST is this machine:");
    say!("  a machine with a manager:  warren cluster join --token {} HOST:7443", founded.manager_token);
    say!("  a machine with an agent:   warren cluster join --token {} HOST:7443", founded.worker_token);
    Ok(())
}

async fn join(token: &str, manager: &str, place: &Place) -> Result<(), Error> {
    let token: Token = token.parse()?;
    warren_pki::check_address(manager)?;
    // A machine that can be neither has nothing to ask for.
    if formation::check_free(&place.manager()).is_err() {
        membership::check_free(&place.agent())?;
    }
    let request = Request::new()?;
    let channel = Dialer::newcomer(manager, &token)?.connect().await;
    let channel = channel.map_err(|error| Error::NotJoined { manager: manager.to_owned(), why: innermost(&error) })?;
    let asked = v1::JoinClusterRequest {
        secret: token.secret(),
        certificate_request: request.pem().to_owned(),
        node_id: membership::known_id(&place.agent()).unwrap_or_default(),
        hostname: warren_manager::hostname(),
    };
    let joined = ClusterClient::new(channel).join_cluster(asked).await?.into_inner();
    let settled: (&str, &Path) = if joined.role() == v1::Role::Manager {
        formation::settle(&place.manager(), &joined, &request.key_pem())?;
        ("manager", &place.manager())
    } else {
        membership::settle(&place.agent(), &joined, &request.key_pem())?;
        ("node", &place.agent())
    };
    say!("this machine is {} {} of cluster {}", settled.0, joined.id, joined.cluster_id);
    Ok(())
}

/// The last of an error's causes, which says what happened.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

async fn info(client: &ClientArguments, format: Format) -> Result<(), Error> {
    let info = client.cluster().await?.get_cluster_info(v1::GetClusterInfoRequest {}).await?.into_inner();
    if let Format::Json = format {
        return output::json(&info);
    }
    let leader = if info.leader_id == 0 { "none is known".to_owned() } else { format!("manager {}", info.leader_id) };
    output::fields(&[
        ("cluster", info.cluster_id.clone()),
        ("answered by", format!("manager {}", info.manager_id)),
        ("leader", leader),
        ("term", info.term.to_string()),
        ("applied", format!("{} of {}", info.applied_index, info.last_log_index)),
    ]);
    say!("");
    let rows = info.managers.iter().map(|manager| {
        let role = match (manager.leader, manager.voter) {
            (true, _) => "leader",
            (_, true) => "voter",
            _ => "learner",
        };
        [
            manager.id.to_string(),
            manager.hostname.clone(),
            manager.address.clone(),
            role.to_owned(),
            manager.lag.to_string(),
        ]
    });
    output::table(["MANAGER", "HOSTNAME", "ADDRESS", "ROLE", "BEHIND"], rows);
    Ok(())
}

/// A leader that hands over says so by being unavailable: its successor does the rest.
const REMOVAL_ATTEMPTS: usize = 20;
const REMOVAL_PAUSE: std::time::Duration = std::time::Duration::from_millis(500);

async fn remove(client: &ClientArguments, manager: u64) -> Result<(), Error> {
    let mut cluster = client.cluster().await?;
    let mut attempt = 1;
    loop {
        match cluster.remove_manager(v1::RemoveManagerRequest { id: manager }).await {
            Err(status) if status.code() == tonic::Code::Unavailable && attempt < REMOVAL_ATTEMPTS => {
                attempt += 1;
                tokio::time::sleep(REMOVAL_PAUSE).await;
            }
            Err(status) => return Err(status.into()),
            Ok(_) => break,
        }
    }
    say!("{manager}");
    Ok(())
}

async fn create(client: &ClientArguments, wanted: &Wanted) -> Result<(), Error> {
    let request = v1::GenerateJoinTokenRequest { role: v1::Role::from(wanted.role).into(), lifetime: wanted.lifetime };
    let made = client.cluster().await?.generate_join_token(request).await?.into_inner();
    say!("{}", made.token);
    Ok(())
}

async fn list(client: &ClientArguments, format: Format) -> Result<(), Error> {
    let tokens = client.cluster().await?.list_join_tokens(v1::ListJoinTokensRequest {}).await?.into_inner().tokens;
    if let Format::Json = format {
        return output::json(&tokens);
    }
    let rows = tokens.iter().map(|token| {
        let role = if token.role() == v1::Role::Manager { "manager" } else { "worker" };
        [token.id.clone(), role.to_owned(), output::ago(token.created_at.as_ref()), until(token.expires_at.as_ref())]
    });
    output::table(["TOKEN", "ROLE", "AGE", "VALID FOR"], rows);
    Ok(())
}

fn until(at: Option<&pbjson_types::Timestamp>) -> String {
    let seconds = u64::try_from(at.map_or(0, |at| at.seconds)).unwrap_or(0);
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
    output::coarse(at.duration_since(std::time::SystemTime::now()).unwrap_or_default())
}
