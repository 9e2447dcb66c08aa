//! What an image's name means, settled once: all containers of a service run the same bytes.

use std::{fmt, time::Duration};

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

#[tonic::async_trait]
impl Pinning for Registries {
    async fn digest(&self, image: &ImageName, credentials: &Credentials) -> Result<Option<String>, Error> {
        if let Reference::Digest(digest) = image.reference() {
            return Ok(Some(digest.clone()));
        }
        match tokio::time::timeout(PATIENCE, self.find(image, credentials)).await {
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
                tracing::warn!(%image, "could not resolve a tag to a digest in time; nodes resolve it");
                Ok(None)
            }
        }
    }
}
