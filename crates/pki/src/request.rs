//! Asking for a certificate.

use std::fmt;

use rcgen::{CertificateParams, DistinguishedName, KeyPair};

use crate::Error;

/// A new key, and the request to have it signed. Does not show the key.
pub struct Request {
    key: KeyPair,
    pem: String,
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request").field("pem", &self.pem).finish_non_exhaustive()
    }
}

impl Request {
    /// Makes both.
    ///
    /// # Errors
    ///
    /// Without randomness.
    pub fn new() -> Result<Self, Error> {
        let unusable = |error: rcgen::Error| Error::unusable("the certificate request", error);
        let key = KeyPair::generate().map_err(unusable)?;
        let mut params = CertificateParams::default();
        // Who it is for is not the asker's to say.
        params.distinguished_name = DistinguishedName::new();
        let pem = params.serialize_request(&key).and_then(|request| request.pem()).map_err(unusable)?;
        Ok(Self { key, pem })
    }

    /// What is sent to be signed, in PEM.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The key, in PEM. It stays on this machine.
    #[must_use]
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }
}
