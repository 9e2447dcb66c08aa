//! Who may see metrics: whoever reaches the port, unless it is told otherwise.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use http::{HeaderMap, header};
use sha2::{Digest as _, Sha256};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    },
};

/// What metrics are protected by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// A certificate and its key, as PEM: the endpoint speaks TLS.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// A file with the token that whoever asks for metrics must show.
    pub token: Option<PathBuf>,
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{} of the metrics endpoint: {source}", path.display())]
pub struct FileError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// No token is larger.
const MAX_TOKEN: u64 = 4096;

impl Access {
    /// What begins connections with TLS, where that is wanted.
    ///
    /// # Errors
    ///
    /// When a file cannot be used.
    pub(crate) fn open(&self) -> Result<Option<Tls>, FileError> {
        if let Some(path) = &self.token {
            read_token(path)?;
        }
        let Some((certificate, key)) = &self.tls else { return Ok(None) };
        let tls = Tls { certificate: certificate.clone(), key: key.clone(), known: Arc::default() };
        tls.acceptor().map(|_| Some(tls))
    }

    /// Whether somebody may see metrics. The token is read anew each time: it may be another by now.
    pub(crate) fn allows(&self, headers: &HeaderMap) -> bool {
        let Some(path) = &self.token else { return true };
        let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let shown = shown.and_then(|value| value.split_once(' '));
        let shown = shown.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, token)| token.trim());
        match (read_token(path), shown) {
            // How long it takes to compare digests says nothing of what was digested.
            (Ok(token), Some(shown)) => Sha256::digest(token) == Sha256::digest(shown),
            (Err(error), _) => {
                tracing::warn!(%error, "nobody is shown metrics");
                false
            }
            (Ok(_), None) => false,
        }
    }
}

fn read_token(path: &Path) -> Result<String, FileError> {
    let failed = |source| FileError { path: path.to_owned(), source };
    let size = fs::metadata(path).map_err(failed)?.len();
    if size > MAX_TOKEN {
        return Err(failed(io::Error::other(format!("a token is at most {MAX_TOKEN} bytes long"))));
    }
    let token = fs::read_to_string(path).map_err(failed)?.trim().to_owned();
    if token.is_empty() { Err(failed(io::Error::other("there is no token in it"))) } else { Ok(token) }
}

/// When a certificate and its key were written, and what begins connections with them.
type Known = Option<([SystemTime; 2], TlsAcceptor)>;

/// Begins connections with TLS, with the certificate that is there at the time.
#[derive(Clone)]
pub(crate) struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    known: Arc<Mutex<Known>>,
}

impl Tls {
    /// With the files as they are now; as they were, while they are of no use.
    pub(crate) fn acceptor(&self) -> Result<TlsAcceptor, FileError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let written = |path: &Path| {
            let found = fs::metadata(path).and_then(|found| found.modified());
            found.map_err(|source| FileError { path: path.to_owned(), source })
        };
        let found = written(&self.certificate).and_then(|certificate| Ok([certificate, written(&self.key)?]));
        let loaded = match (found, &*known) {
            (Ok(now), Some((then, acceptor))) if now == *then => return Ok(acceptor.clone()),
            (Ok(now), _) => self.load().map(|acceptor| (now, acceptor)),
            (Err(error), _) => Err(error),
        };
        match (loaded, &*known) {
            (Ok((now, acceptor)), _) => {
                *known = Some((now, acceptor.clone()));
                Ok(acceptor)
            }
            (Err(error), Some((_, acceptor))) => {
                tracing::warn!(%error, "the certificate before this one is still used");
                Ok(acceptor.clone())
            }
            (Err(error), None) => Err(error),
        }
    }

    fn load(&self) -> Result<TlsAcceptor, FileError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |why: String| FileError { path, source: io::Error::other(why) }
        };
        let read = |path: &Path| fs::read(path).map_err(|error| failed(path)(error.to_string()));
        let chain = read(&self.certificate)?;
        let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&chain).collect();
        let chain = chain.map_err(|error| failed(&self.certificate)(error.to_string()))?;
        if chain.is_empty() {
            return Err(failed(&self.certificate)("there is no certificate in it".to_owned()));
        }
        let key = read(&self.key)?;
        let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| failed(&self.key)(error.to_string()))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.map_err(|error| failed(&self.certificate)(error.to_string()))?;
        let config = config.with_no_client_auth().with_single_cert(chain, key);
        let mut config = config.map_err(|error| failed(&self.certificate)(error.to_string()))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_for_those_with_the_token() {
        let directory = std::env::temp_dir().join(format!("warren-token-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("writable");
        let file = directory.join("token");
        let access = Access { token: Some(file.clone()), ..Access::default() };
        let allows = |value: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert(header::AUTHORIZATION, value.parse().expect("a header"));
            }
            access.allows(&headers)
        };
        assert!(Access::default().allows(&HeaderMap::new()), "unless there is one");
        assert!(access.open().is_err() && !allows(Some("Bearer ")), "there is no such file");
        fs::write(&file, " \n").expect("writable");
        assert!(access.open().is_err() && !allows(Some("Bearer ")), "nothing is no token");
        fs::write(&file, "open sesame\n").expect("writable");
        assert!(access.open().is_ok());
        assert!(allows(Some("Bearer open sesame")) && allows(Some("bearer open sesame")));
        for wrong in [None, Some("Bearer open"), Some("open sesame"), Some("Basic open sesame"), Some("Bearer ")] {
            assert!(!allows(wrong), "{wrong:?}");
        }
        fs::write(&file, "another").expect("writable");
        assert!(allows(Some("Bearer another")) && !allows(Some("Bearer open sesame")));
        fs::remove_dir_all(&directory).expect("there");
    }
}
