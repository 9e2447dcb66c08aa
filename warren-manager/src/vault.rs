//! Secrets at rest: each value is encrypted with a key of its own (AES-256-GCM, the secret's identity as associated data),
//! and that key with the key of keys, which is in a file beside the state and never in it. Whoever has the log or a snapshot
//! has nothing.

use std::{fmt, fs, io, path::Path, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    rand::{SecureRandom as _, SystemRandom},
};

use crate::{ids::SecretId, state::Sealed};

const KEY_LEN: usize = 32;
const FILE: &str = "secrets.key";

/// Why a secret cannot be sealed or opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The key of keys.
    #[error("the key of secrets {path} cannot be used: {source}")]
    KeyFile {
        /// Its file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was sealed with another key, or is damaged.
    #[error("a secret cannot be opened: it was sealed with another key, or is damaged")]
    Sealed,
    /// The machine has no randomness.
    #[error("there is no randomness to seal a secret with")]
    Random,
}

/// What seals and opens secrets. Cheap to clone; does not show its key.
#[derive(Clone)]
pub struct Vault(Arc<Key>);

struct Key {
    cipher: LessSafeKey,
    bytes: [u8; KEY_LEN],
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Vault")
    }
}

fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| Error::Random)?;
    Ok(bytes)
}

impl Key {
    fn new(bytes: [u8; KEY_LEN]) -> Result<Self, Error> {
        Ok(Self { cipher: key(&bytes)?, bytes })
    }
}

fn key(bytes: &[u8]) -> Result<LessSafeKey, Error> {
    UnboundKey::new(&AES_256_GCM, bytes).map(LessSafeKey::new).map_err(|_| Error::Sealed)
}

/// A nonce, and the text encrypted and authenticated behind it. The key is used for few texts: a random nonce will do.
fn encrypt(key: &LessSafeKey, text: &[u8], about: &str) -> Result<Vec<u8>, Error> {
    let nonce = random::<NONCE_LEN>()?;
    let mut body = text.to_vec();
    key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(about.as_bytes()), &mut body)
        .map_err(|_| Error::Sealed)?;
    Ok([&nonce[..], &body].concat())
}

fn decrypt(key: &LessSafeKey, sealed: &[u8], about: &str) -> Result<Vec<u8>, Error> {
    let (nonce, body) = sealed.split_at_checked(NONCE_LEN).ok_or(Error::Sealed)?;
    let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| Error::Sealed)?;
    let mut body = body.to_vec();
    let text = key.open_in_place(nonce, Aad::from(about.as_bytes()), &mut body).map_err(|_| Error::Sealed)?;
    Ok(text.to_vec())
}

/// What a sealed value is bound to: it is of no use as another secret's, nor as another value of the same.
fn identity(id: &SecretId, sequence: u32) -> String {
    format!("warren secret {id} {sequence}")
}

fn authority(cluster: &str) -> String {
    format!("warren authority {cluster}")
}

impl Vault {
    /// A vault whose key nobody else has and nobody keeps.
    ///
    /// # Errors
    ///
    /// Without randomness.
    pub fn ephemeral() -> Result<Self, Error> {
        Ok(Self(Arc::new(Key::new(random()?)?)))
    }

    /// The vault of a data directory; the first time its key is made.
    ///
    /// # Errors
    ///
    /// When the key's file cannot be read or written, or holds no key.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let path = directory.join(FILE);
        let failed = |source| Error::KeyFile { path: path.display().to_string(), source };
        match fs::read(&path) {
            Ok(bytes) => {
                let bytes = bytes.try_into().map_err(|_| failed(io::Error::other("it holds no key")))?;
                return Ok(Self(Arc::new(Key::new(bytes)?)));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        Self::create(directory, &random::<KEY_LEN>()?)
    }

    /// The vault of a data directory from now on, with another manager's key.
    ///
    /// # Errors
    ///
    /// When that is no key, or its file cannot be written.
    pub fn create(directory: &Path, bytes: &[u8]) -> Result<Self, Error> {
        let path = directory.join(FILE);
        let failed = |source| Error::KeyFile { path: path.display().to_string(), source };
        let key = bytes.try_into().map_err(|_| failed(io::Error::other("what was given is no key")))?;
        warren_durable::replace(&path, bytes).map_err(failed)?;
        Ok(Self(Arc::new(Key::new(key)?)))
    }

    /// The key, for a manager that joins.
    #[must_use]
    pub fn key(&self) -> Vec<u8> {
        self.0.bytes.to_vec()
    }

    /// Seals a value.
    ///
    /// # Errors
    ///
    /// Without randomness.
    pub fn seal(&self, id: &SecretId, sequence: u32, value: &[u8]) -> Result<Sealed, Error> {
        self.seal_as(&identity(id, sequence), value)
    }

    /// Seals the key of a cluster's authority.
    ///
    /// # Errors
    ///
    /// Without randomness.
    pub fn seal_authority(&self, cluster: &str, key: &str) -> Result<Sealed, Error> {
        self.seal_as(&authority(cluster), key.as_bytes())
    }

    /// Opens the key of a cluster's authority.
    ///
    /// # Errors
    ///
    /// As [`Self::open_sealed`].
    pub fn open_authority(&self, cluster: &str, sealed: &Sealed) -> Result<String, Error> {
        String::from_utf8(self.open_as(&authority(cluster), sealed)?).map_err(|_| Error::Sealed)
    }

    fn seal_as(&self, about: &str, value: &[u8]) -> Result<Sealed, Error> {
        let own = random::<KEY_LEN>()?;
        let encode = |bytes: Vec<u8>| STANDARD.encode(bytes);
        Ok(Sealed {
            key: encode(encrypt(&self.0.cipher, &own, about)?),
            value: encode(encrypt(&key(&own)?, value, about)?),
        })
    }

    /// Opens a value.
    ///
    /// # Errors
    ///
    /// When it was sealed with another key, or as something else, or is damaged.
    pub fn open_sealed(&self, id: &SecretId, sequence: u32, sealed: &Sealed) -> Result<Vec<u8>, Error> {
        self.open_as(&identity(id, sequence), sealed)
    }

    fn open_as(&self, about: &str, sealed: &Sealed) -> Result<Vec<u8>, Error> {
        let decode = |text: &str| STANDARD.decode(text).map_err(|_| Error::Sealed);
        let own = decrypt(&self.0.cipher, &decode(&sealed.key)?, about)?;
        decrypt(&key(&own)?, &decode(&sealed.value)?, about)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_key_opens_the_same_value_of_the_same_secret() {
        let directory = tempfile::tempdir().expect("a directory");
        let vault = Vault::open(directory.path()).expect("a vault");
        let id = SecretId::from("one");
        let sealed = vault.seal(&id, 1, b"value").expect("sealed");
        let bytes = STANDARD.decode(&sealed.value).expect("base64");
        assert!(!bytes.windows(5).any(|window| window == b"value"));
        assert_eq!(vault.open_sealed(&id, 1, &sealed).expect("opens"), b"value");
        let again = Vault::open(directory.path()).expect("the same vault");
        assert_eq!(again.open_sealed(&id, 1, &sealed).expect("opens"), b"value");
        assert!(vault.open_sealed(&id, 2, &sealed).is_err());
        assert!(vault.open_sealed(&SecretId::from("two"), 1, &sealed).is_err());
        assert!(Vault::ephemeral().expect("a vault").open_sealed(&id, 1, &sealed).is_err());
        let mut damaged = sealed.clone();
        let first = if damaged.value.starts_with('A') { "B" } else { "A" };
        damaged.value.replace_range(..1, first);
        assert!(vault.open_sealed(&id, 1, &damaged).is_err());
        assert_ne!(vault.seal(&id, 1, b"value").expect("sealed"), sealed, "never the same twice");
        use std::os::unix::fs::PermissionsExt as _;
        let mode = fs::metadata(directory.path().join(FILE)).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
