//! Join tokens: `WRN-1-<digest>-<secret>`. The digest says which authority a newcomer is to believe; the secret says to the
//! cluster that the newcomer was invited. The cluster keeps only a hash of the secret.

use std::{fmt, str::FromStr};

use data_encoding::{BASE32_NOPAD, HEXLOWER};
use ring::rand::{SecureRandom as _, SystemRandom};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use sha2::{Digest as _, Sha256};

use crate::Error;

const PREFIX: &str = "WRN-1-";
const SECRET_LEN: usize = 16;
const DIGEST_LEN: usize = 32;

/// The half of a token that nobody may guess: 128 random bits.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; SECRET_LEN]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// A new one.
    ///
    /// # Errors
    ///
    /// Without randomness.
    pub fn random() -> Result<Self, Error> {
        let mut bytes = [0; SECRET_LEN];
        SystemRandom::new().fill(&mut bytes).map_err(|_| Error::Random)?;
        Ok(Self(bytes))
    }

    /// What the cluster keeps of it: with 128 random bits, a plain hash cannot be turned round.
    #[must_use]
    pub fn hash(&self) -> String {
        HEXLOWER.encode(&Sha256::digest(self.0))
    }
}

/// An invitation to a cluster. Shown whole by [`fmt::Display`] only.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    digest: [u8; DIGEST_LEN],
    secret: Secret,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// What tells a certificate from every other.
pub(crate) fn digest(certificate: &[u8]) -> [u8; DIGEST_LEN] {
    Sha256::digest(certificate).into()
}

impl Token {
    /// An invitation by an authority, of which this is the certificate in PEM.
    ///
    /// # Errors
    ///
    /// When that is no certificate.
    pub fn new(authority: &str, secret: Secret) -> Result<Self, Error> {
        let certificate = CertificateDer::from_pem_slice(authority.as_bytes());
        let certificate = certificate.map_err(|error| Error::unusable("the authority's certificate", error))?;
        Ok(Self { digest: digest(&certificate), secret })
    }

    /// What the cluster is told.
    #[must_use]
    pub fn secret(&self) -> String {
        BASE32_NOPAD.encode(&self.secret.0).to_lowercase()
    }

    /// Reads what a newcomer tells.
    ///
    /// # Errors
    ///
    /// When it is none.
    pub fn read_secret(text: &str) -> Result<Secret, Error> {
        let bytes = BASE32_NOPAD.decode(text.to_uppercase().as_bytes()).ok();
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes.map(Secret).ok_or(Error::Token("its last part is not 26 letters and digits"))
    }

    /// What tells the authority's certificate from every other.
    pub(crate) fn digest(&self) -> [u8; DIGEST_LEN] {
        self.digest
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}-{}", BASE32_NOPAD.encode(&self.digest).to_lowercase(), self.secret())
    }
}

impl FromStr for Token {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let rest = text.trim().strip_prefix(PREFIX).ok_or(Error::Token("it does not begin with WRN-1-"))?;
        let (digest, secret) = rest.split_once('-').ok_or(Error::Token("it is cut off"))?;
        let digest = BASE32_NOPAD.decode(digest.to_uppercase().as_bytes()).ok();
        let digest = digest.and_then(|digest| digest.try_into().ok());
        let digest = digest.ok_or(Error::Token("its middle part is not 52 letters and digits"))?;
        Ok(Self { digest, secret: Self::read_secret(secret)? })
    }
}
