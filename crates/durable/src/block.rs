use sha2::{Digest as _, Sha256};

const CHECKSUM_LEN: usize = 32;

/// Why bytes are not the block that they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Some are missing.
    Short,
    /// Some are others than were written.
    Checksum,
    /// They are of another kind.
    Kind,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Short => "it is cut off",
            Self::Checksum => "its checksum does not match",
            Self::Kind => "it is of another kind or format",
        })
    }
}

impl std::error::Error for Damage {}

/// Puts a head and a body into one block: `kind`, the head's length (8 bytes, big-endian), head, body, and SHA-256 of all that.
#[must_use]
pub fn pack(kind: &[u8; 8], head: &[u8], body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(kind.len() + 8 + head.len() + body.len() + CHECKSUM_LEN);
    bytes.extend(kind);
    bytes.extend((head.len() as u64).to_be_bytes());
    bytes.extend(head);
    bytes.extend(body);
    let checksum = Sha256::digest(&bytes);
    bytes.extend(checksum);
    bytes
}

/// Checks a block and takes it apart into head and body.
///
/// # Errors
///
/// When it is not what [`pack`] made, to the last bit.
pub fn unpack<'a>(kind: &[u8; 8], block: &'a [u8]) -> Result<(&'a [u8], &'a [u8]), Damage> {
    let len = block.len().checked_sub(CHECKSUM_LEN).ok_or(Damage::Short)?;
    let (bytes, checksum) = block.split_at(len);
    let rest = bytes.strip_prefix(kind).ok_or(Damage::Kind)?;
    if Sha256::digest(bytes).as_slice() != checksum {
        return Err(Damage::Checksum);
    }
    let (len, rest) = rest.split_first_chunk::<8>().ok_or(Damage::Short)?;
    let len = usize::try_from(u64::from_be_bytes(*len)).map_err(|_| Damage::Short)?;
    rest.split_at_checked(len).ok_or(Damage::Short)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_damaged_byte_is_noticed() {
        let good = pack(b"SOMEKIND", b"head", b"body");
        assert_eq!(unpack(b"SOMEKIND", &good), Ok((&b"head"[..], &b"body"[..])));
        assert_eq!(unpack(b"OTHERONE", &good), Err(Damage::Kind));
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(unpack(b"SOMEKIND", &bad).is_err(), "byte {at}");
            assert!(unpack(b"SOMEKIND", &good[..at]).is_err(), "cut at {at}");
        }
    }
}
