//! What an image's name means, settled once: all containers of a service run the same bytes.

use std::{
    collections::HashMap,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use warren_registry::{Credentials, Error, Registries};
use warren_spec::{ImageName, Reference};

/// A registry that takes longer is not waited for: nodes go by the name then.
const PATIENCE: Duration = Duration::from_secs(5);

/// Finds out which bytes an image's name means now. A seam: a simulation has no registries.
#[tonic::async_trait]
pub trait Pinning: Send + Sync + fmt::Debug + 'static {
    /// The digest; `None` when nobody could be asked.
    ///
    /// # Errors
    ///
    /// When the registry knows that there is no such image, or none for whoever asks.
    async fn digest(&self, image: &ImageName, credentials: &Credentials) -> Result<Option<String>, Error>;
}

/// Asks nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unasked;

#[tonic::async_trait]
impl Pinning for Unasked {
    async fn digest(&self, _: &ImageName, _: &Credentials) -> Result<Option<String>, Error> {
        Ok(None)
    }
}

/// Asks registries, and for a while none that has just been too slow: it would hold every service of a manifest up in turn.
#[derive(Debug)]
pub struct Asking {
    registries: Registries,
    /// When they were found so.
    slow: Mutex<HashMap<String, Instant>>,
}

impl Asking {
    /// Asks these.
    #[must_use]
    pub fn new(registries: Registries) -> Self {
        Self { registries, slow: Mutex::default() }
    }

    fn slow(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        // Every change is one insertion or removal: a panic leaves it whole.
        self.slow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a registry has not answered in time a moment ago.
    fn is_slow(&self, registry: &str) -> bool {
        let mut slow = self.slow();
        slow.retain(|_, since| since.elapsed() < AGAIN);
        slow.contains_key(registry)
    }
}

/// After this a registry that was too slow is asked again.
const AGAIN: Duration = Duration::from_secs(10);

#[tonic::async_trait]
impl Pinning for Asking {
    async fn digest(&self, image: &ImageName, credentials: &Credentials) -> Result<Option<String>, Error> {
        if let Reference::Digest(digest) = image.reference() {
            return Ok(Some(digest.clone()));
        }
        if self.is_slow(image.registry()) {
            return Ok(None);
        }
        match tokio::time::timeout(PATIENCE, self.registries.find(image, credentials)).await {
            Ok(Ok((_, manifest))) => Ok(Some(manifest.digest)),
            // Images that were imported are called so; that no registry is there is no news.
            Ok(Err(error)) if error.is_transient() && image.registry() == "localhost" => {
                tracing::debug!(%image, %error, "no registry on localhost; nodes resolve the tag");
                Ok(None)
            }
            Ok(Err(error)) if error.is_transient() => {
                tracing::warn!(%image, %error, "could not resolve a tag to a digest; nodes resolve it");
                Ok(None)
            }
            Ok(Err(error)) => Err(error),
            Err(_) => {
                self.slow().insert(image.registry().to_owned(), Instant::now());
                tracing::warn!(%image, "could not resolve a tag to a digest in time; nodes resolve it");
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_registry_that_is_silent_holds_up_one_question_and_not_all() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let image: ImageName = format!("{}/a:1", silent.local_addr().expect("bound")).parse().expect("a name");
        let asking = Asking::new(Registries::new(warren_registry::Options::default()).expect("no files"));
        let began = Instant::now();
        for _ in 0..3 {
            assert_eq!(asking.digest(&image, &Credentials::Anonymous).await.expect("nobody says no"), None);
        }
        let took = began.elapsed();
        assert!((PATIENCE..PATIENCE * 2).contains(&took), "{took:?}");
    }
}
