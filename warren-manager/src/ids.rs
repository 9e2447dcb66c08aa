//! Ids: 25 random characters of a-z and 0-9, so that a few of them tell objects apart.

/// Characters of an id: 25 of base 36 hold 128 bits.
const LEN: usize = 25;
const ALPHABET: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

pub(crate) fn encode(mut value: u128) -> String {
    let mut text = [b'0'; LEN];
    for character in text.iter_mut().rev() {
        *character = ALPHABET[(value % 36) as usize];
        value /= 36;
    }
    text.iter().map(|byte| char::from(*byte)).collect()
}

/// An id's type: `id!(/// Names a thing. ThingId);`
macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ::serde::Serialize, ::serde::Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// A new one.
            #[must_use]
            pub fn generate(environment: &dyn $crate::clock::Environment) -> Self {
                Self($crate::ids::encode(environment.random()))
            }

            /// As text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }

        impl ::std::fmt::Display for $name {
            fn fmt(&self, f: &mut ::std::fmt::Formatter<'_>) -> ::std::fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// Names a service for its whole life.
    ServiceId
);
id!(
    /// Names a node for its whole life; its agent chose it.
    NodeId
);
id!(
    /// Names an operator, until they are removed.
    OperatorId
);
id!(
    /// Names a secret or config for its whole life.
    SecretId
);
id!(
    /// Names a volume for its whole life.
    VolumeId
);
id!(
    /// Names a container; containerd and its cgroup know it by the same.
    ContainerId
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_hold_all_bits() {
        assert_eq!(encode(0), "0".repeat(LEN));
        assert_eq!(encode(36 + 10), format!("{}1a", "0".repeat(LEN - 2)));
        assert_eq!(encode(u128::MAX).len(), LEN);
        assert_ne!(encode(u128::MAX), encode(u128::MAX - 1));
    }
}
