/// Whether a secret or config may be called so: 1 to 64 of letters, digits, `.`, `_` and `-`, beginning with a letter or
/// digit. Such a name is a file's name, and no way out of a directory.
#[must_use]
pub fn secret_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=64).contains(&name.len())
        && name.bytes().all(allowed)
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_nowhere() {
        for name in ["a", "db-password", "tls.key", "A_1"] {
            assert!(secret_name(name), "{name}");
        }
        for name in ["", ".", "..", "../a", "a/b", ".hidden", "-a", "a b", "a\0", &"a".repeat(65)] {
            assert!(!secret_name(name), "{name}");
        }
    }
}
