//! Reaching a manager.

use clap::Args;
use tonic::transport::Channel;
use warren_pki::Dialer;
use warren_proto::v1::{
    cluster_client::ClusterClient, containers_client::ContainersClient, events_client::EventsClient,
    exec_client::ExecClient, lock_client::LockClient, logs_client::LogsClient, nodes_client::NodesClient,
    secrets_client::SecretsClient, services_client::ServicesClient, stats_client::StatsClient,
    volumes_client::VolumesClient,
};

use crate::error::Error;

/// Which manager.
#[derive(Args, Clone, Debug)]
pub(crate) struct ClientArguments {
    /// The socket of a manager on this machine, as unix:///path. Any manager answers for the whole cluster.
    #[arg(long, env = "WARREN_MANAGER", default_value = "unix:///run/warren/warren.sock", global = true)]
    manager: String,
}

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

impl ClientArguments {
    async fn channel(&self) -> Result<Channel, Error> {
        let path = self.manager.strip_prefix("unix:").filter(|path| path.starts_with('/'));
        let path = path.ok_or_else(|| Error::BadAddress(self.manager.clone()))?;
        let path = path.strip_prefix("//").unwrap_or(path);
        let connected = Dialer::socket(path).map_err(|_| Error::BadAddress(self.manager.clone()))?.connect().await;
        connected.map_err(|error| {
            let address = self.manager.clone();
            if is_refused_to_user(&error) { Error::NotPermitted { address } } else { Error::NoManager { address } }
        })
    }

    pub(crate) async fn services(&self) -> Result<ServicesClient<Channel>, Error> {
        Ok(ServicesClient::new(self.channel().await?).max_decoding_message_size(MAX_MESSAGE))
    }

    pub(crate) async fn containers(&self) -> Result<ContainersClient<Channel>, Error> {
        Ok(ContainersClient::new(self.channel().await?).max_decoding_message_size(MAX_MESSAGE))
    }

    pub(crate) async fn nodes(&self) -> Result<NodesClient<Channel>, Error> {
        Ok(NodesClient::new(self.channel().await?))
    }

    pub(crate) async fn secrets(&self) -> Result<SecretsClient<Channel>, Error> {
        Ok(SecretsClient::new(self.channel().await?))
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
        Ok(VolumesClient::new(self.channel().await?))
    }

    pub(crate) async fn lock(&self) -> Result<LockClient<Channel>, Error> {
        Ok(LockClient::new(self.channel().await?))
    }

    pub(crate) async fn events(&self) -> Result<EventsClient<Channel>, Error> {
        Ok(EventsClient::new(self.channel().await?))
    }

    pub(crate) async fn cluster(&self) -> Result<ClusterClient<Channel>, Error> {
        Ok(ClusterClient::new(self.channel().await?))
    }
}
