//! `warren login`: who works with a cluster from a machine that is not of it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use clap::Args;
use rand::seq::SliceRandom as _;
use tonic::transport::Channel;
use warren_pki::{Credentials, Dialer, Request, Token};
use warren_proto::v1::{self, cluster_client::ClusterClient};

use crate::{
    error::Error,
    output::{coarse, say},
};

/// The cluster's managers, beside the certificate.
const MANAGERS: &str = "managers.json";
/// How often somebody who works with a cluster asks who its managers are, and whether its authority changes.
const ASK_AGAIN: Duration = Duration::from_secs(60);

/// A certificate that is not renewed is worth a word when only so much of its life is left.
const SOON: Duration = Duration::from_secs(14 * 24 * 3600);

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Login token from `warren operator create`.
    #[arg(long, env = "WARREN_JOIN_TOKEN", hide_env_values = true)]
    token: String,
    /// Address of any manager of the cluster, as HOST:PORT.
    address: String,
    /// Overwrite the certificate of an earlier login.
    #[arg(long)]
    replace: bool,
}

/// An operator, as their files say.
pub(crate) struct Login {
    directory: PathBuf,
    credentials: Credentials,
    managers: Vec<String>,
}

fn failed(path: &Path) -> impl Fn(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { path: path.clone(), source }
}

fn write_managers(directory: &Path, managers: &[String]) -> Result<(), Error> {
    let path = directory.join(MANAGERS);
    warren_durable::replace(&path, &serde_json::to_vec(managers)?).map_err(failed(&path))
}

impl Login {
    /// Whoever has logged in with this directory, if anybody has.
    ///
    /// # Errors
    ///
    /// When the files cannot be used.
    pub(crate) fn load(directory: &Path) -> Result<Option<Self>, Error> {
        let Some(credentials) = Credentials::load(directory)? else { return Ok(None) };
        let path = directory.join(MANAGERS);
        let bytes = fs::read(&path).map_err(failed(&path))?;
        let managers = serde_json::from_slice(&bytes).map_err(|error| failed(&path)(error.into()))?;
        Ok(Some(Self { directory: directory.to_owned(), credentials, managers }))
    }

    fn has_run_out(&self) -> bool {
        self.credentials.validity().1 < SystemTime::now()
    }

    /// A connection to the manager at an address, or to any.
    ///
    /// # Errors
    ///
    /// When the certificate has run out, or nobody answers.
    pub(crate) async fn connect(&self, address: Option<&str>) -> Result<Channel, Error> {
        if self.has_run_out() {
            return Err(Error::LoginRanOut);
        }
        let mut addresses = match address {
            Some(address) => vec![address],
            None => self.managers.iter().map(String::as_str).collect(),
        };
        addresses.shuffle(&mut rand::rng());
        let mut outcome = Err(Error::NoManagerKnown);
        for address in addresses {
            match Dialer::new(address, &self.credentials)?.connect().await {
                Ok(channel) => {
                    self.keep_up(address, &channel).await;
                    return Ok(channel);
                }
                Err(error) => {
                    let (address, why) = (address.to_owned(), warren_pki::reason(&error));
                    outcome = Err(match why.contains("belongs to another cluster") || why.contains("certificate") {
                        true => Error::Disbelieved { address, why },
                        false => Error::Unreachable { address, why },
                    });
                }
            }
        }
        outcome
    }

    /// Now and then asks who the managers are, and for another certificate. Whoever uses neither for long has to log in again.
    async fn keep_up(&self, address: &str, channel: &Channel) {
        let age = |path: PathBuf| fs::metadata(path).ok()?.modified().ok()?.elapsed().ok();
        if age(self.directory.join(MANAGERS)).is_some_and(|age| age < ASK_AGAIN) {
            return;
        }
        if let Err(error) = self.ask(address, ClusterClient::new(channel.clone())).await {
            let left = self.credentials.validity().1.duration_since(SystemTime::now()).unwrap_or_default();
            if left < SOON {
                eprintln!("warning: the certificate runs out in {}, and there is no other: {error}", coarse(left));
            }
        }
    }

    async fn ask(&self, address: &str, mut cluster: ClusterClient<Channel>) -> Result<(), Error> {
        let info = cluster.get_cluster_info(v1::GetClusterInfoRequest {}).await?.into_inner();
        let (from, to) = self.credentials.validity();
        let half = from + to.duration_since(from).unwrap_or_default() / 2;
        if let Some(rotation) = info.rotation {
            // It waits for everybody who has logged in: until it is over, each command asks.
            if self.credentials.digest() != rotation.digest {
                self.renew(&mut cluster).await?;
            }
            if self.credentials.digest() == rotation.digest {
                cluster.confirm_authorities(v1::ConfirmAuthoritiesRequest { digest: rotation.digest }).await?;
            }
            return Ok(());
        }
        if half < SystemTime::now() {
            self.renew(&mut cluster).await?;
        }
        let managers = info.managers.into_iter().map(|manager| manager.address);
        write_managers(&self.directory, &reached_at(managers, address))
    }

    async fn renew(&self, cluster: &mut ClusterClient<Channel>) -> Result<(), Error> {
        let request = Request::new()?;
        let asked = v1::RequestCertificateRequest { certificate_request: request.pem().to_owned() };
        let signed = cluster.request_certificate(asked).await?.into_inner();
        self.credentials.replace(&self.directory, &request.key_pem(), &signed.certificate, &signed.authorities)?;
        Ok(())
    }
}

/// Where managers are, and where one of them was reached: from here, that may be elsewhere than the others say.
fn reached_at(managers: impl Iterator<Item = String>, address: &str) -> Vec<String> {
    let mut all: Vec<_> = managers.chain([address.to_owned()]).collect();
    all.sort();
    all.dedup();
    all
}

pub(crate) async fn login(arguments: &Arguments, directory: &Path) -> Result<(), Error> {
    let token: Token = arguments.token.parse()?;
    let manager = &arguments.address;
    warren_pki::check_address(manager)?;
    if !arguments.replace
        && let Some(known) = Login::load(directory)?
        && !known.has_run_out()
    {
        let cluster = known.credentials.identity().cluster;
        return Err(Error::LoggedIn { cluster, directory: directory.to_owned() });
    }
    let request = Request::new()?;
    let channel = Dialer::newcomer(manager, &token)?.connect().await;
    let channel =
        channel.map_err(|error| Error::NotJoined { manager: manager.clone(), why: warren_pki::reason(&error) })?;
    let asked = v1::JoinClusterRequest {
        secret: token.secret(),
        certificate_request: request.pem().to_owned(),
        taken: vec![v1::Role::Manager.into(), v1::Role::Worker.into()],
        ..Default::default()
    };
    let joined = match ClusterClient::new(channel).join_cluster(asked).await {
        Err(refused) if refused.code() == tonic::Code::FailedPrecondition => {
            return Err(Error::Usage(format!("{}: use `warren cluster join`", refused.message())));
        }
        joined => joined?.into_inner(),
    };
    fs::create_dir_all(directory).map_err(failed(directory))?;
    write_managers(directory, &reached_at(joined.managers.into_iter(), manager))?;
    // Last: with it they have logged in.
    Credentials::create(directory, &request.key_pem(), &joined.certificate, &joined.authorities)?;
    say!("`warren` works with cluster {} from now on", joined.cluster_id);
    Ok(())
}

pub(crate) fn logout(directory: &Path) -> Result<(), Error> {
    let Some(known) = Login::load(directory)? else { return Err(Error::NotLoggedIn) };
    Credentials::remove(directory)?;
    let path = directory.join(MANAGERS);
    fs::remove_file(&path).map_err(failed(&path))?;
    say!("`warren` no longer works with cluster {} from here", known.credentials.identity().cluster);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_works_is_kept() {
        let managers = || ["b:1".to_owned(), "a:1".to_owned()].into_iter();
        assert_eq!(reached_at(managers(), "c:1"), ["a:1", "b:1", "c:1"]);
        assert_eq!(reached_at(managers(), "a:1"), ["a:1", "b:1"]);
    }
}
