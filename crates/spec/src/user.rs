use std::str::FromStr;

/// A user or a group: by number, or by a name that the image's own files know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Principal {
    /// By number.
    Id(u32),
    /// By name.
    Name(String),
}

/// Who a container's first process is: "user", or "user:group".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// The user.
    pub user: Principal,
    /// The group; the user's own unless given.
    pub group: Option<Principal>,
}

/// A string that names no user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a user: give a name or a number, and with a colon a group")]
pub struct InvalidUser(String);

/// The largest number of a user or group that the container runtimes take. What counts in 32 bits with a sign would make 0, which is
/// root, of one beyond.
pub const MAX_ID: u32 = i32::MAX as u32;

/// As useradd(8) and adduser allow them, and what images in the wild have besides.
const MAX_NAME: usize = 32;

fn principal(text: &str) -> Option<Principal> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().ok().filter(|id| *id <= MAX_ID).map(Principal::Id);
    }
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-$@+".contains(&byte);
    let well_formed = text.len() <= MAX_NAME && !text.starts_with('-') && text.bytes().all(allowed);
    well_formed.then(|| Principal::Name(text.to_owned()))
}

impl FromStr for User {
    type Err = InvalidUser;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        let parse = || {
            let group = match group {
                Some(group) => Some(principal(group)?),
                None => None,
            };
            Some(Self { user: principal(user)?, group })
        };
        parse().ok_or_else(|| InvalidUser(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_names_or_numbers() {
        let name = |name: &str| Principal::Name(name.to_owned());
        for (text, user, group) in [
            ("0", Principal::Id(0), None),
            ("www-data", name("www-data"), None),
            ("1000:staff", Principal::Id(1000), Some(name("staff"))),
            ("app:7", name("app"), Some(Principal::Id(7))),
        ] {
            assert_eq!(text.parse(), Ok(User { user, group }), "{text}");
        }
        for text in ["", ":", "a:", ":a", "4294967296", "2147483648", "0:2147483648", "a b", "a:b:c", "-a", "../x"] {
            assert!(text.parse::<User>().is_err(), "{text}");
        }
    }
}
