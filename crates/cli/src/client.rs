//! Reaching a manager.

use std::{
    env,
    path::{Path, PathBuf},
};

use clap::Args;
use tonic::transport::Channel;
use warren_pki::Dialer;
use warren_proto::v1::{
    cluster_client::ClusterClient, containers_client::ContainersClient, events_client::EventsClient,
    exec_client::ExecClient, lock_client::LockClient, logs_client::LogsClient, nodes_client::NodesClient,
    operators_client::OperatorsClient, secrets_client::SecretsClient, services_client::ServicesClient,
    stats_client::StatsClient, volumes_client::VolumesClient,
};

use crate::{error::Error, login::Login};

/// Which manager, and as whom.
#[derive(Args, Clone, Debug)]
pub(crate) struct ClientArguments {
    /// Address of any manager, unix:///PATH or HOST:PORT [default: as logged in, else unix:///run/warren/warren.sock]
    #[arg(long, env = "WARREN_MANAGER", global = true, value_name = "ADDRESS", help_heading = "Global options")]
    manager: Option<String>,
    /// Directory of the certificate from `warren login` [default: ~/.config/warren]
    #[arg(long, env = "WARREN_IDENTITY", global = true, value_name = "DIRECTORY", help_heading = "Global options")]
    identity: Option<PathBuf>,
}

/// The socket of a manager on this machine.
const SOCKET: &str = "unix:///run/warren/warren.sock";

/// A page of a list, its specs included.
const MAX_MESSAGE: usize = 256 << 20;

/// All elements of a list: `page` asks for the page with a token and answers with its elements and the next page's token.
pub(crate) async fn all_pages<T>(
    mut page: impl AsyncFnMut(String) -> Result<(Vec<T>, String), Error>,
) -> Result<Vec<T>, Error> {
    let (mut all, mut page_token) = (Vec::new(), String::new());
    loop {
        let (elements, next_page_token) = page(page_token).await?;
        all.extend(elements);
        if next_page_token.is_empty() {
            return Ok(all);
        }
        page_token = next_page_token;
    }
}

/// Whether the reason is that the file belongs to somebody else.
fn is_refused_to_user(error: &(dyn std::error::Error + 'static)) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|io| io.kind() == std::io::ErrorKind::PermissionDenied)
        || error.source().is_some_and(is_refused_to_user)
}

async fn socket(address: &str) -> Result<Channel, Error> {
    let path = address.strip_prefix("unix:").filter(|path| path.starts_with('/'));
    let path = path.ok_or_else(|| Error::BadAddress(address.to_owned()))?;
    let path = path.strip_prefix("//").unwrap_or(path);
    let connected = Dialer::socket(path).map_err(|_| Error::BadAddress(address.to_owned()))?.connect().await;
    connected.map_err(|error| {
        let address = address.to_owned();
        if is_refused_to_user(&error) { Error::NotPermitted { address } } else { Error::NoManager { address } }
    })
}

impl ClientArguments {
    /// Those that words of a command line say that may not be complete, or the environment.
    pub(crate) fn of_words(words: &[String]) -> Self {
        let said = |option: &str, variable: &str| {
            let of = |(at, word): (usize, &String)| match word.strip_prefix(option)?.strip_prefix('=') {
                Some(value) => Some(value.to_owned()),
                None => words.get(at + 1).filter(|_| word == option).cloned(),
            };
            words.iter().enumerate().rev().find_map(of).or_else(|| env::var(variable).ok())
        };
        Self {
            manager: said("--manager", "WARREN_MANAGER"),
            identity: said("--identity", "WARREN_IDENTITY").map(PathBuf::from),
        }
    }

    /// Where whoever has logged in is kept.
    ///
    /// # Errors
    ///
    /// When nobody says where, and this user has no home.
    pub(crate) fn identity(&self) -> Result<PathBuf, Error> {
        if let Some(directory) = &self.identity {
            return Ok(directory.clone());
        }
        let configuration = env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
        let configuration = configuration.or_else(|| Some(env::home_dir()?.join(".config")));
        Ok(configuration.ok_or(Error::Homeless)?.join("warren"))
    }

    pub(crate) async fn channel(&self) -> Result<Channel, Error> {
        match self.manager.as_deref() {
            Some(address) if address.starts_with("unix:") => socket(address).await,
            Some(address) => {
                warren_pki::check_address(address).map_err(|_| Error::BadAddress(address.to_owned()))?;
                Login::load(&self.identity()?)?.ok_or(Error::NotLoggedIn)?.connect(Some(address)).await
            }
            None => match self.identity().ok().map(|directory| Login::load(&directory)).transpose()?.flatten() {
                Some(login) => login.connect(None).await,
                None => socket(SOCKET).await,
            },
        }
    }

    pub(crate) async fn services(&self) -> Result<ServicesClient<Channel>, Error> {
        Ok(ServicesClient::new(self.channel().await?).max_decoding_message_size(MAX_MESSAGE))
    }

    pub(crate) async fn containers(&self) -> Result<ContainersClient<Channel>, Error> {
        Ok(ContainersClient::new(self.channel().await?).max_decoding_message_size(MAX_MESSAGE))
    }

    pub(crate) async fn nodes(&self) -> Result<NodesClient<Channel>, Error> {
        Ok(NodesClient::new(self.channel().await?).max_decoding_message_size(MAX_MESSAGE))
    }

    pub(crate) async fn operators(&self) -> Result<OperatorsClient<Channel>, Error> {
        Ok(OperatorsClient::new(self.channel().await?).max_decoding_message_size(MAX_MESSAGE))
    }

    pub(crate) async fn secrets(&self) -> Result<SecretsClient<Channel>, Error> {
        Ok(SecretsClient::new(self.channel().await?).max_decoding_message_size(MAX_MESSAGE))
    }

    pub(crate) async fn logs(&self) -> Result<LogsClient<Channel>, Error> {
        Ok(LogsClient::new(self.channel().await?))
    }

    pub(crate) async fn exec(&self) -> Result<ExecClient<Channel>, Error> {
        Ok(ExecClient::new(self.channel().await?))
    }

    pub(crate) async fn stats(&self) -> Result<StatsClient<Channel>, Error> {
        Ok(StatsClient::new(self.channel().await?).max_decoding_message_size(MAX_MESSAGE))
    }

    pub(crate) async fn volumes(&self) -> Result<VolumesClient<Channel>, Error> {
        Ok(VolumesClient::new(self.channel().await?).max_decoding_message_size(MAX_MESSAGE))
    }

    pub(crate) async fn lock(&self) -> Result<LockClient<Channel>, Error> {
        // A manager that is locked has no other, and it is this machine's that is to be unlocked.
        let address = self.manager.as_deref().filter(|address| address.starts_with("unix:"));
        Ok(LockClient::new(socket(address.unwrap_or(SOCKET)).await?))
    }

    /// The manager of this machine with this data, at its socket.
    pub(crate) async fn own_cluster(&self, data_dir: &Path) -> Result<ClusterClient<Channel>, Error> {
        let given = self.manager.clone().filter(|address| address.starts_with("unix:"));
        let noted = || Some(format!("unix://{}", warren_manager::socket_of(data_dir)?.display()));
        let address = given.or_else(noted).unwrap_or_else(|| SOCKET.to_owned());
        Ok(ClusterClient::new(socket(&address).await?))
    }

    pub(crate) async fn events(&self) -> Result<EventsClient<Channel>, Error> {
        Ok(EventsClient::new(self.channel().await?).max_decoding_message_size(MAX_MESSAGE))
    }

    pub(crate) async fn cluster(&self) -> Result<ClusterClient<Channel>, Error> {
        Ok(ClusterClient::new(self.channel().await?))
    }
}
