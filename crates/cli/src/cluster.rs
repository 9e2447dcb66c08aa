//! `warren cluster ...`

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::{Args, Subcommand, ValueEnum};
use warren_agent::membership;
use warren_manager::data::{backup, formation};
use warren_manifest::parse;
use warren_pki::{Dialer, Request, Token};
use warren_proto::v1::{self, cluster_client::ClusterClient};

use crate::{
    client::ClientArguments,
    error::Error,
    filter::ListArguments,
    output::{self, Format, FormatArguments, say},
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Initialize a cluster with this machine as its first manager.
    ///
    /// Prints a join token for managers and one for workers. They expire after a day and cannot be shown again: the
    /// cluster stores only their hashes. If the manager is running, the command returns once it is ready; otherwise it
    /// initializes when started.
    Init {
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        settling: Settling,
    },
    /// Join this machine to a cluster as a manager or a worker, depending on the token.
    ///
    /// If the manager or agent is running, it joins at once; otherwise it joins when started. For a running manager the
    /// command returns once it is ready.
    Join {
        /// Join token from `warren cluster init` or `warren cluster token`.
        #[arg(long, env = "WARREN_JOIN_TOKEN", hide_env_values = true)]
        token: String,
        /// Address of any manager of the cluster, as HOST:PORT.
        address: String,
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        settling: Settling,
    },
    /// Show the cluster and its managers.
    Info {
        #[command(flatten)]
        format: FormatArguments,
    },
    /// Check the health of managers, nodes and services; exits 1 when anything is degraded.
    Health {
        #[command(flatten)]
        format: FormatArguments,
    },
    /// Remove a manager from the cluster permanently. A leader hands over first. For a node, use `warren node rm`.
    Rm {
        /// Manager number from `warren cluster info`, or hostname.
        #[arg(value_name = "MANAGER")]
        named: String,
    },
    /// Manage join tokens.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Back up the cluster's state to a file for `warren cluster restore`.
    ///
    /// The file contains the key that decrypts the cluster's secrets. With autolock on (`warren cluster autolock`) that
    /// key is encrypted with the unlock key.
    Backup {
        /// Backup file; overwritten if it exists.
        file: PathBuf,
    },
    /// Restore a cluster from a backup, with this machine as its first manager.
    ///
    /// The previous managers are no longer members and must not run again. Nodes remain members; they reconnect if this
    /// manager has the address of one of the previous managers.
    Restore {
        /// Backup file from `warren cluster backup`.
        file: PathBuf,
        /// Address at which other managers and agents reach this manager, as HOST:PORT [default: this machine's
        /// address]
        #[arg(long)]
        advertise_addr: Option<String>,
        /// Unlock key, if autolock was on when the backup was made.
        #[arg(long, env = "WARREN_UNLOCK_KEY", hide_env_values = true)]
        unlock_key: Option<String>,
        #[command(flatten)]
        place: Place,
    },
    /// Recover from the permanent loss of a majority: continue with this machine's manager alone.
    ///
    /// Without --force it only prints what it would do. Stop the manager first. Changes that only the lost managers
    /// have are lost.
    Recover {
        /// Recover; without it, only print what would be done.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        place: Place,
    },
    /// Enable or disable autolock for the whole cluster: a manager then needs the unlock key when it starts.
    Autolock {
        /// Whether managers require the unlock key at start.
        #[arg(value_enum, value_name = "on|off")]
        state: Switch,
    },
    /// Show the unlock key.
    UnlockKey {
        /// Rotate the key first. Earlier backups, and managers that are not running, still need the old key.
        #[arg(long)]
        rotate: bool,
    },
    /// Unlock this machine's manager with the unlock key from standard input or WARREN_UNLOCK_KEY.
    Unlock,
    /// Manage the cluster's certificate authority.
    #[command(subcommand)]
    Ca(CaCommand),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    /// Require the unlock key.
    On,
    /// Do not require it.
    Off,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CaCommand {
    /// Replace the CA and reissue all members' certificates, without downtime.
    ///
    /// The rotation is complete when every manager and node has a new certificate; `warren cluster info` lists those
    /// still pending. It invalidates existing join tokens.
    Rotate,
}

#[derive(Args, Debug)]
pub(crate) struct Place {
    /// Parent of the manager's and the agent's data directories.
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

/// What is waited for, after this machine was given its place.
#[derive(Args, Debug)]
pub(crate) struct Settling {
    /// Wait until the manager is ready or the agent is connected, even if the process is not started yet.
    #[arg(long)]
    wait: bool,
    /// Timeout of the wait.
    #[arg(long, default_value = "60s", value_parser = parse::std_duration, value_name = "DURATION")]
    timeout: Duration,
    /// Hostname to register [default: the machine's]
    #[arg(long, env = "WARREN_HOSTNAME")]
    hostname: Option<String>,
}

impl Settling {
    fn hostname(&self) -> String {
        self.hostname.clone().unwrap_or_else(warren_manager::hostname)
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Create a join token and print it; it cannot be shown again.
    Create {
        #[command(flatten)]
        wanted: Wanted,
    },
    /// List valid join tokens, without their secrets.
    #[command(alias = "list")]
    Ls {
        #[command(flatten)]
        list: ListArguments,
    },
    /// Revoke all join tokens of a role and create a new one.
    Rotate {
        #[command(flatten)]
        wanted: Wanted,
    },
}

#[derive(Args, Debug)]
pub(crate) struct Wanted {
    /// Role of machines that join with the token.
    #[arg(long, value_enum)]
    role: Role,
    /// Validity of the token, like 2h [default: a day]
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
        Command::Init { place, settling } => init(client, &place, &settling).await,
        Command::Join { token, address, place, settling } => join(client, &token, &address, &place, &settling).await,
        Command::Info { format } => info(client, format.format).await,
        Command::Health { format } => health(client, format.format).await,
        Command::Rm { named } => remove(client, &named).await,
        Command::Backup { file } => backup(client, &file).await,
        Command::Restore { file, advertise_addr, unlock_key, place } => {
            restore(&file, advertise_addr.as_deref(), unlock_key.as_deref(), &place)
        }
        Command::Recover { force, place } => recover(&place, force),
        Command::Autolock { state } => {
            let request = v1::SetLockRequest { locked: state == Switch::On, rotate: false };
            let key = client.cluster().await?.set_lock(request).await?.into_inner().unlock_key;
            if key.is_empty() {
                say!("managers are not locked");
            } else {
                say!("managers are locked; one that is started waits for `warren cluster unlock` with");
                say!("");
                say!("  {key}");
                say!("");
                say!("keep it: without it a cluster whose managers have all stopped cannot be started again");
            }
            Ok(())
        }
        Command::UnlockKey { rotate } => unlock_key(client, rotate).await,
        Command::Unlock => unlock(client).await,
        Command::Ca(CaCommand::Rotate) => {
            client.cluster().await?.rotate_authority(v1::RotateAuthorityRequest {}).await?;
            say!("members learn of the new authority; `warren cluster info` shows whom it waits for");
            Ok(())
        }
        Command::Token(TokenCommand::Create { wanted }) => create(client, &wanted).await,
        Command::Token(TokenCommand::Ls { list: wanted }) => list(client, &wanted).await,
        Command::Token(TokenCommand::Rotate { wanted }) => {
            let role = v1::Role::from(wanted.role).into();
            client.cluster().await?.revoke_join_tokens(v1::RevokeJoinTokensRequest { role }).await?;
            create(client, &wanted).await
        }
    }
}

/// How long a manager that waits for its place may take to answer from there.
const SETTLES: Duration = Duration::from_secs(10);

/// Waits until the manager of this machine answers for the cluster, if it waits for that, or if it is to be waited for.
async fn manager_answers(
    client: &ClientArguments,
    place: &Place,
    cluster: &str,
    waits: bool,
    settling: &Settling,
) -> Result<(), Error> {
    if !waits && !settling.wait {
        return Ok(());
    }
    let timeout = if settling.wait { settling.timeout } else { SETTLES };
    let end = Instant::now() + timeout;
    loop {
        let info = async {
            let mut own = client.own_cluster(&place.manager()).await?;
            Ok::<_, Error>(own.get_cluster_info(v1::GetClusterInfoRequest {}).await?.into_inner())
        };
        let why = match info.await {
            Ok(info) if info.cluster_id == cluster && info.leader_id != 0 => return Ok(()),
            Ok(info) if info.cluster_id == cluster || info.cluster_id.is_empty() => "it knows no leader yet".to_owned(),
            Ok(_) => "the manager that answers here is another cluster's: say which one with --manager unix:///path"
                .to_owned(),
            Err(error) => error.to_string(),
        };
        if Instant::now() >= end {
            return Err(Error::NotSettled { what: "the manager", timeout, why });
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Between looks.
const LOOK: Duration = Duration::from_millis(100);

/// Whether a manager of this machine waits to be given its place.
async fn manager_waits(client: &ClientArguments, place: &Place) -> bool {
    let Ok(mut own) = client.own_cluster(&place.manager()).await else { return false };
    let answer = own.get_cluster_info(v1::GetClusterInfoRequest {}).await;
    answer.is_err_and(|status| status.message().contains(warren_manager::WAITS))
}

async fn init(client: &ClientArguments, place: &Place, settling: &Settling) -> Result<(), Error> {
    let waits = manager_waits(client, place).await;
    let founded = formation::found(&place.manager(), &settling.hostname())?;
    let directory = place.manager();
    say!("cluster {} is founded; its first manager is on this machine, in {}", founded.cluster_id, directory.display());
    say!("");
    say!("within a day, where HOST is this machine:");
    say!("  a machine with a manager:  warren cluster join --token {} HOST:7443", founded.manager_token);
    say!("  a machine with an agent:   warren cluster join --token {} HOST:7443", founded.worker_token);
    // The tokens are known to nobody else: they come first, whatever follows.
    manager_answers(client, place, &founded.cluster_id, waits, settling).await
}

async fn join(
    client: &ClientArguments,
    token: &str,
    manager: &str,
    place: &Place,
    settling: &Settling,
) -> Result<(), Error> {
    let token: Token = token.parse()?;
    warren_pki::check_address(manager)?;
    // Only the cluster knows what the token is for, and it must not let in whom there is no place for.
    let (manager_free, agent_free) = (formation::check_free(&place.manager()), membership::check_free(&place.agent()));
    let mut taken: Vec<i32> = manager_free.is_err().then_some(v1::Role::Manager.into()).into_iter().collect();
    taken.extend(agent_free.is_err().then_some(i32::from(v1::Role::Worker)));
    if taken.len() == 2 {
        return agent_free.map_err(Error::from);
    }
    taken.push(v1::Role::Admin.into());
    let request = Request::new()?;
    let channel = Dialer::newcomer(manager, &token)?.connect().await;
    let channel =
        channel.map_err(|error| Error::NotJoined { manager: manager.to_owned(), why: warren_pki::reason(&error) })?;
    let asked = v1::JoinClusterRequest {
        secret: token.secret(),
        certificate_request: request.pem().to_owned(),
        node_id: membership::known_id(&place.agent()).unwrap_or_default(),
        hostname: settling.hostname(),
        taken,
        schema: warren_manager::state::SCHEMA,
    };
    let joined = match ClusterClient::new(channel).join_cluster(asked).await {
        Err(refused) if refused.code() == tonic::Code::FailedPrecondition => {
            // It says the same, and where.
            manager_free?;
            agent_free?;
            let hint = if refused.message().ends_with("for an operator") { ": use `warren login`" } else { "" };
            return Err(Error::Usage(format!("{}{hint}", refused.message())));
        }
        joined => joined?.into_inner(),
    };
    let said = |what: &str, directory: &Path| {
        say!("this machine is {what} {} of cluster {}, in {}", joined.id, joined.cluster_id, directory.display());
    };
    if joined.role() == v1::Role::Manager {
        let waits = manager_waits(client, place).await;
        formation::settle(&place.manager(), &joined, &request.key_pem())?;
        said("manager", &place.manager());
        return manager_answers(client, place, &joined.cluster_id, waits, settling).await;
    }
    membership::settle(&place.agent(), &joined, &request.key_pem())?;
    if let Some(hostname) = &settling.hostname {
        membership::give_hostname(&place.agent(), hostname)?;
    }
    said("node", &place.agent());
    if settling.wait { agent_is_in_session(&place.agent(), settling.timeout).await } else { Ok(()) }
}

async fn agent_is_in_session(agent: &Path, timeout: Duration) -> Result<(), Error> {
    let end = Instant::now() + timeout;
    while !membership::has_registered(agent) {
        if Instant::now() >= end {
            let why = "is it running? its log says what keeps it".to_owned();
            return Err(Error::NotSettled { what: "the agent", timeout, why });
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

async fn info(client: &ClientArguments, format: Format) -> Result<(), Error> {
    let info = client.cluster().await?.get_cluster_info(v1::GetClusterInfoRequest {}).await?.into_inner();
    if output::to_program(format, &info)? {
        return Ok(());
    }
    let leader = if info.leader_id == 0 { "none is known".to_owned() } else { format!("manager {}", info.leader_id) };
    output::fields(&[
        ("cluster", info.cluster_id.clone()),
        ("answered by", format!("manager {}", info.manager_id)),
        ("leader", leader),
        ("term", info.term.to_string()),
        ("applied", format!("{} of {}", info.applied_index, info.last_log_index)),
        ("schema", info.schema.to_string()),
        ("locked", if info.locked { "yes" } else { "no" }.to_owned()),
    ]);
    if let Some(rotation) = &info.rotation {
        let phase = match rotation.phase() {
            v1::RotationPhase::Renewing => "members get certificates of the new authority",
            _ => "members learn of the new authority",
        };
        match rotation.waits_for.as_slice() {
            [] => say!("{phase}"),
            waits_for => say!("{phase}; waiting for {}", waits_for.join(", ")),
        }
    }
    say!("");
    let rows = info.managers.iter().map(|manager| {
        let role = match (manager.leader, manager.voter) {
            (true, _) => "leader",
            (_, true) => "voter",
            _ => "learner",
        };
        // Only the leader knows.
        let (heard, behind) = match &manager.silent_for {
            _ if info.leader_id != info.manager_id => ("-".to_owned(), "-".to_owned()),
            _ if manager.leader => ("now".to_owned(), "0".to_owned()),
            Some(silent) if silent.seconds < 1 => ("now".to_owned(), manager.lag.to_string()),
            Some(silent) => (format!("{} s ago", silent.seconds), manager.lag.to_string()),
            None => ("never".to_owned(), manager.lag.to_string()),
        };
        [manager.id.to_string(), manager.hostname.clone(), manager.address.clone(), role.to_owned(), heard, behind]
    });
    let awaited = info.awaited.iter().map(|manager| {
        let [none, role, heard, behind] = ["-", "awaited", "never", "-"].map(str::to_owned);
        [manager.id.to_string(), manager.hostname.clone(), none, role, heard, behind]
    });
    output::table(["MANAGER", "HOSTNAME", "ADDRESS", "ROLE", "HEARD", "BEHIND"], rows.chain(awaited));
    Ok(())
}

async fn health(client: &ClientArguments, format: Format) -> Result<(), Error> {
    let request = v1::GetClusterHealthRequest {};
    let checks = client.cluster().await?.get_cluster_health(request).await?.into_inner().checks;
    if !output::to_program(format, &checks)? {
        let words = |ok| if ok { "ok" } else { "not ok" }.to_owned();
        let rows = checks.iter().map(|check| [check.name.clone(), words(check.ok), check.message.clone()]);
        output::table(["CHECK", "STATUS", "MESSAGE"], rows);
    }
    if checks.iter().all(|check| check.ok) { Ok(()) } else { Err(Error::Unhealthy) }
}

/// A leader that hands over says so by being unavailable: its successor does the rest.
const HANDING_OVER_PATIENCE: Duration = Duration::from_secs(10);
const HANDING_OVER_PAUSE: Duration = Duration::from_millis(500);

/// Calls until somebody leads who does it.
async fn insist<T>(mut call: impl AsyncFnMut() -> Result<T, tonic::Status>) -> Result<T, Error> {
    let end = Instant::now() + HANDING_OVER_PATIENCE;
    loop {
        match call().await {
            Err(status) if status.code() == tonic::Code::Unavailable && Instant::now() < end => {
                tokio::time::sleep(HANDING_OVER_PAUSE).await;
            }
            done => return Ok(done?),
        }
    }
}

/// The number of a manager that is named by it, or by its machine.
fn numbered(info: &v1::GetClusterInfoResponse, named: &str) -> Result<u64, Error> {
    if let Ok(id) = named.parse() {
        return Ok(id);
    }
    let mut on_it = info.managers.iter().chain(&info.awaited).filter(|manager| manager.hostname == named);
    match (on_it.next(), on_it.next()) {
        (Some(only), None) => Ok(only.id),
        (None, _) => Err(Error::NoSuchManager(named.to_owned())),
        (Some(_), Some(_)) => Err(Error::SeveralManagers(named.to_owned())),
    }
}

async fn remove(client: &ClientArguments, named: &str) -> Result<(), Error> {
    let mut cluster = client.cluster().await?;
    let info = cluster.get_cluster_info(v1::GetClusterInfoRequest {}).await?.into_inner();
    let id = numbered(&info, named)?;
    insist(async || cluster.clone().remove_manager(v1::RemoveManagerRequest { id }).await).await?;
    say!("{named}");
    Ok(())
}

/// Gives the manager of this number, or on this machine, a vote, or takes it.
pub(crate) async fn set_voter(client: &ClientArguments, named: &str, voter: bool) -> Result<(), Error> {
    let mut cluster = client.cluster().await?;
    let info = cluster.get_cluster_info(v1::GetClusterInfoRequest {}).await?.into_inner();
    let id = numbered(&info, named)?;
    insist(async || cluster.clone().update_manager(v1::UpdateManagerRequest { id, voter }).await).await?;
    say!("{named}");
    Ok(())
}

async fn backup(client: &ClientArguments, file: &Path) -> Result<(), Error> {
    let mut parts = client.cluster().await?.backup(v1::BackupRequest {}).await?.into_inner();
    let mut bytes = Vec::new();
    while let Some(part) = parts.message().await? {
        bytes.extend(part.data);
    }
    let failed = |source| Error::File { path: file.to_owned(), source };
    warren_durable::replace(file, &bytes).map_err(failed)?;
    // What cannot be read back is no backup.
    let about = backup::check(file)?;
    say!("{} bytes of cluster {}, as of revision {}", bytes.len(), about.cluster_id, about.revision);
    Ok(())
}

fn restore(file: &Path, address: Option<&str>, unlock_key: Option<&str>, place: &Place) -> Result<(), Error> {
    let address = match address {
        Some(address) => address.to_owned(),
        None => {
            let own = warren_pki::own_address().unwrap_or(std::net::Ipv4Addr::LOCALHOST.into());
            std::net::SocketAddr::new(own, 7443).to_string()
        }
    };
    warren_pki::check_address(&address)?;
    let unlock = unlock_key.map(str::parse).transpose()?;
    let hostname = warren_manager::hostname();
    let (about, id) = backup::restore(&place.manager(), file, &hostname, &address, unlock.as_ref())?;
    let age = output::coarse(about.age());
    say!("cluster {} is restored as it was {age} ago; its only manager is {id}, on this machine", about.cluster_id);
    say!("managers that it had must not run any more; containers that were made since then will be removed");
    Ok(())
}

fn recover(place: &Place, force: bool) -> Result<(), Error> {
    let survivor = backup::survey(&place.manager())?;
    let others = survivor.reach.members.iter().filter(|member| member.id != survivor.id);
    let others: Vec<_> = others.map(|member| format!("{} ({})", member.id, member.address)).collect();
    let reach = &survivor.reach;
    output::fields(&[
        ("manager", survivor.id.to_string()),
        ("its log reaches to", format!("entry {} of term {}", reach.last_index, reach.last_term)),
        ("of these committed", format!("{}, as far as it knows", reach.committed_index)),
        ("other managers", if others.is_empty() { "none".to_owned() } else { others.join(", ") }),
    ]);
    say!("");
    if survivor.is_alone() {
        say!("manager {} is the whole cluster already: start it", survivor.id);
        return Ok(());
    }
    if !force {
        say!(
            "WARNING: recovering makes this manager the whole cluster. What only the others know is lost, and none of them"
        );
        say!("may ever run again with the data that it has. If several are left, recover the one whose log reaches");
        say!("furthest (the highest term, then the highest entry), and let the others join anew.");
        say!("");
        say!("nothing was changed; repeat with --force to do it");
        return Ok(());
    }
    let id = survivor.id;
    let before = survivor.go_on_alone(&place.manager(), &warren_manager::hostname())?;
    say!("manager {id} is the whole cluster now; what it had before is in {}", before.display());
    say!("start it, and let other managers join it anew, with empty directories");
    Ok(())
}

async fn unlock_key(client: &ClientArguments, rotate: bool) -> Result<(), Error> {
    let mut cluster = client.cluster().await?;
    let mut key = cluster.get_unlock_key(v1::GetUnlockKeyRequest {}).await?.into_inner().unlock_key;
    if key.is_empty() {
        return Err(Error::NotLocked);
    }
    if rotate {
        key = cluster.set_lock(v1::SetLockRequest { locked: true, rotate }).await?.into_inner().unlock_key;
    }
    say!("{key}");
    Ok(())
}

async fn unlock(client: &ClientArguments) -> Result<(), Error> {
    let unlock_key = match std::env::var("WARREN_UNLOCK_KEY") {
        Ok(key) => key,
        Err(_) => {
            let mut line = String::new();
            std::io::stdin().read_line(&mut line)?;
            line
        }
    };
    client.lock().await?.unlock(v1::UnlockRequest { unlock_key: unlock_key.trim().to_owned() }).await?;
    Ok(())
}

async fn create(client: &ClientArguments, wanted: &Wanted) -> Result<(), Error> {
    let request = v1::GenerateJoinTokenRequest { role: v1::Role::from(wanted.role).into(), lifetime: wanted.lifetime };
    let made = client.cluster().await?.generate_join_token(request).await?.into_inner();
    say!("{}", made.token);
    Ok(())
}

async fn list(client: &ClientArguments, wanted: &ListArguments) -> Result<(), Error> {
    let tokens = client.cluster().await?.list_join_tokens(v1::ListJoinTokensRequest {}).await?.into_inner().tokens;
    let tokens = wanted.apply(tokens)?;
    if output::to_program(wanted.format(), &tokens)? {
        return Ok(());
    }
    let valid_for = |token: &v1::JoinToken| output::coarse(output::left(token.expires_at.as_ref()).unwrap_or_default());
    let rows = tokens.iter().map(|token| {
        let role = if token.role() == v1::Role::Manager { "manager" } else { "worker" };
        [token.id.clone(), role.to_owned(), output::ago(token.created_at.as_ref()), valid_for(token)]
    });
    output::table(["TOKEN", "ROLE", "AGE", "VALID FOR"], rows);
    Ok(())
}
