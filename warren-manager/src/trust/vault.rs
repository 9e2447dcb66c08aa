//! Secrets at rest: each value is encrypted with a key of its own (AES-256-GCM, the secret's identity as associated data),
//! and that key with the key of keys, which is in a file beside the state and never in it. Whoever has the log or a snapshot
//! has nothing.
//!
//! That file may be locked: encrypted with an unlock key, which operators hold. A manager that is started then waits for it.

use std::{fmt, fs, io, path::Path, str::FromStr, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use data_encoding::BASE32_NOPAD;
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    rand::{SecureRandom as _, SystemRandom},
};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

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
    /// The key of keys is locked.
    #[error("the key of secrets {path} is locked: `warren cluster unlock` opens it")]
    Locked {
        /// Its file.
        path: String,
    },
    /// There is none to open what is locked.
    #[error("the key of secrets is locked, and no unlock key was given")]
    NoUnlockKey,
    /// It is not this lock's.
    #[error("the unlock key does not fit")]
    UnlockKey,
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

/// Opens a locked key of keys. Operators hold it. Shown by [`fmt::Display`] only.
#[derive(Clone, PartialEq, Eq)]
pub struct UnlockKey(Zeroizing<[u8; KEY_LEN]>);

const UNLOCK_PREFIX: &str = "WRNKEY-1-";
const LOCK: &str = "warren key of secrets";

impl UnlockKey {
    /// A new one.
    ///
    /// # Errors
    ///
    /// Without randomness.
    pub fn random() -> Result<Self, Error> {
        Ok(Self(Zeroizing::new(random()?)))
    }
}

impl fmt::Debug for UnlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UnlockKey")
    }
}

impl fmt::Display for UnlockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{UNLOCK_PREFIX}{}", BASE32_NOPAD.encode(&self.0[..]).to_lowercase())
    }
}

impl FromStr for UnlockKey {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let text = text.trim().strip_prefix(UNLOCK_PREFIX).ok_or(Error::UnlockKey)?;
        let bytes = BASE32_NOPAD.decode(text.to_uppercase().as_bytes()).map_err(|_| Error::UnlockKey)?;
        let bytes = Zeroizing::new(bytes);
        <[u8; KEY_LEN]>::try_from(&bytes[..]).map(|key| Self(Zeroizing::new(key))).map_err(|_| Error::UnlockKey)
    }
}

/// The key of keys as a file has it: as it is, or locked.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeptKey {
    /// In base64; behind it the beginning of its SHA-256, so that damage is noticed before a secret cannot be opened.
    Open(String),
    /// Encrypted with the unlock key; in base64.
    Locked(String),
}

impl fmt::Debug for KeptKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kept = if matches!(self, Self::Open(_)) { "Open" } else { "Locked" };
        f.debug_tuple(kept).finish_non_exhaustive()
    }
}

impl KeptKey {
    /// The vault of it.
    ///
    /// # Errors
    ///
    /// When it is locked and the unlock key is another or none, or it is no key.
    pub fn open(&self, unlock: Option<&UnlockKey>) -> Result<Vault, Error> {
        let decode = |text: &str| STANDARD.decode(text).map_err(|_| Error::Sealed);
        let bytes = match (self, unlock) {
            (Self::Open(text), _) => {
                let checked = decode(text)?;
                let (key, sum) = checked.split_at_checked(KEY_LEN).ok_or(Error::Sealed)?;
                if sum != checksum(key) {
                    return Err(Error::Sealed);
                }
                key.to_vec()
            }
            (Self::Locked(_), None) => return Err(Error::NoUnlockKey),
            (Self::Locked(text), Some(unlock)) => {
                decrypt(&key(&unlock.0[..])?, &decode(text)?, LOCK).map_err(|_| Error::UnlockKey)?
            }
        };
        Ok(Vault(Arc::new(Key::new(bytes.try_into().map_err(|_| Error::Sealed)?)?)))
    }
}

struct Key {
    cipher: LessSafeKey,
    bytes: Zeroizing<[u8; KEY_LEN]>,
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
        Ok(Self { cipher: key(&bytes)?, bytes: Zeroizing::new(bytes) })
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
    let mut body = Zeroizing::new(body.to_vec());
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

const CHECKSUM_LEN: usize = 8;

fn checksum(key: &[u8]) -> [u8; CHECKSUM_LEN] {
    let digest = ring::digest::digest(&ring::digest::SHA256, key);
    std::array::from_fn(|at| digest.as_ref()[at])
}

fn lock(cluster: &str) -> String {
    format!("warren unlock key {cluster}")
}

/// Whether a file is just a key; half of what is written now is not.
fn is_bare(bytes: &[u8]) -> bool {
    bytes.len() == KEY_LEN && !bytes.starts_with(b"{\"")
}

/// The key's file, if there is one.
fn kept(directory: &Path) -> Result<Option<KeptKey>, Error> {
    let path = directory.join(FILE);
    let failed = |source| Error::KeyFile { path: path.display().to_string(), source };
    match fs::read(&path) {
        // The bare key, as files of format 3 have it.
        Ok(bytes) if is_bare(&bytes) => {
            let checked = [&bytes[..], &checksum(&bytes)].concat();
            Ok(Some(KeptKey::Open(STANDARD.encode(checked))))
        }
        Ok(bytes) => {
            let damaged = || failed(io::Error::other("it holds no key, or is damaged"));
            let kept: KeptKey = serde_json::from_slice(&bytes).map_err(|_| damaged())?;
            match kept.open(None) {
                Err(Error::Sealed) => Err(damaged()),
                // Of one that is locked only the unlock key tells.
                _ => Ok(Some(kept)),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
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

    /// The vault of a data directory that has a key.
    ///
    /// # Errors
    ///
    /// When the key's file is missing, cannot be read, or holds no key; [`Error::Locked`] when it is locked.
    pub fn load(directory: &Path) -> Result<Self, Error> {
        if kept(directory)?.is_none() {
            let source = io::Error::new(io::ErrorKind::NotFound, "it is missing; without it secrets cannot be opened");
            return Err(Error::KeyFile { path: directory.join(FILE).display().to_string(), source });
        }
        Self::open(directory)
    }

    /// The vault of a data directory; the first time its key is made.
    ///
    /// # Errors
    ///
    /// When the key's file cannot be read or written, or holds no key; [`Error::Locked`] when it is locked.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        match kept(directory)? {
            Some(KeptKey::Locked(_)) => Err(Error::Locked { path: directory.join(FILE).display().to_string() }),
            Some(open) => open.open(None),
            None => Self::create(directory, &random::<KEY_LEN>()?),
        }
    }

    /// The vault of a data directory whose key is locked.
    ///
    /// # Errors
    ///
    /// When the unlock key is another, or the key's file cannot be read.
    pub fn unlock(directory: &Path, unlock: &UnlockKey) -> Result<Self, Error> {
        kept(directory)?.ok_or(Error::UnlockKey)?.open(Some(unlock))
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
        let vault = Self(Arc::new(Key::new(key)?));
        vault.keep(directory, None)?;
        Ok(vault)
    }

    /// The key as a file has it, locked if there is an unlock key.
    ///
    /// # Errors
    ///
    /// Without randomness.
    pub fn kept(&self, unlock: Option<&UnlockKey>) -> Result<KeptKey, Error> {
        Ok(match unlock {
            None => KeptKey::Open(STANDARD.encode([&self.0.bytes[..], &checksum(&self.0.bytes[..])].concat())),
            Some(unlock) => KeptKey::Locked(STANDARD.encode(encrypt(&key(&unlock.0[..])?, &self.0.bytes[..], LOCK)?)),
        })
    }

    /// Writes the key's file, locked if there is an unlock key, unless it is so already.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn keep(&self, directory: &Path, unlock: Option<&UnlockKey>) -> Result<(), Error> {
        let path = directory.join(FILE);
        let failed = |source| Error::KeyFile { path: path.display().to_string(), source };
        let is_so = |known: &KeptKey| match (known, unlock) {
            (KeptKey::Open(_), None) => self.kept(None).is_ok_and(|own| own == *known),
            (KeptKey::Locked(_), Some(unlock)) => known.open(Some(unlock)).is_ok_and(|own| own.0.bytes == self.0.bytes),
            _ => false,
        };
        let is_old = fs::read(&path).is_ok_and(|bytes| is_bare(&bytes));
        if !is_old && kept(directory).ok().flatten().is_some_and(|known| is_so(&known)) {
            return Ok(());
        }
        let bytes = serde_json::to_vec(&self.kept(unlock)?).map_err(|error| failed(error.into()))?;
        warren_durable::replace(&path, &bytes).map_err(failed)
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

    /// Seals the unlock key, for the cluster's state: whoever has the key of keys may know it.
    ///
    /// # Errors
    ///
    /// Without randomness.
    pub fn seal_unlock_key(&self, cluster: &str, unlock: &UnlockKey) -> Result<Sealed, Error> {
        self.seal_as(&lock(cluster), unlock.to_string().as_bytes())
    }

    /// Opens the unlock key.
    ///
    /// # Errors
    ///
    /// As [`Self::open_sealed`].
    pub fn open_unlock_key(&self, cluster: &str, sealed: &Sealed) -> Result<UnlockKey, Error> {
        let text = String::from_utf8(self.open_as(&lock(cluster), sealed)?).map_err(|_| Error::Sealed)?;
        text.parse()
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

    #[test]
    fn a_locked_key_is_of_no_use_without_the_unlock_key() {
        let directory = tempfile::tempdir().expect("a directory");
        let vault = Vault::open(directory.path()).expect("a vault");
        let (unlock, other) = (UnlockKey::random().expect("a key"), UnlockKey::random().expect("a key"));
        assert_eq!(unlock.to_string().parse::<UnlockKey>().expect("reads"), unlock);
        assert!("WRNKEY-1-x".parse::<UnlockKey>().is_err());
        vault.keep(directory.path(), Some(&unlock)).expect("writable");
        let file = fs::read(directory.path().join(FILE)).expect("a file");
        let plain: String = STANDARD.encode(vault.key()).chars().take(40).collect();
        assert!(!String::from_utf8_lossy(&file).contains(&plain));
        assert!(matches!(Vault::open(directory.path()), Err(Error::Locked { .. })));
        assert!(matches!(Vault::unlock(directory.path(), &other), Err(Error::UnlockKey)));
        assert_eq!(Vault::unlock(directory.path(), &unlock).expect("fits").key(), vault.key());
        // The same again is not written again; another key, or none, is.
        vault.keep(directory.path(), Some(&unlock)).expect("writable");
        assert_eq!(fs::read(directory.path().join(FILE)).expect("a file"), file);
        vault.keep(directory.path(), Some(&other)).expect("writable");
        assert!(Vault::unlock(directory.path(), &unlock).is_err());
        vault.keep(directory.path(), None).expect("writable");
        assert_eq!(Vault::open(directory.path()).expect("open").key(), vault.key());
        // As the version before wrote it.
        fs::write(directory.path().join(FILE), vault.key()).expect("writable");
        assert_eq!(Vault::open(directory.path()).expect("open").key(), vault.key());
        vault.keep(directory.path(), None).expect("writable");
        let good = fs::read(directory.path().join(FILE)).expect("a file");
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            for damaged in [&bad[..], &good[..at]] {
                fs::write(directory.path().join(FILE), damaged).expect("writable");
                assert!(Vault::open(directory.path()).is_err(), "byte {at}");
            }
        }
    }
}
