use std::{collections::BTreeMap, fmt};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;

use crate::Error;

/// Who asks a registry. What is secret in it is not shown.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub enum Credentials {
    /// Nobody.
    #[default]
    Anonymous,
    /// A user with a password, for the registry itself or for its server of tokens.
    Basic {
        /// The user.
        user: String,
        /// The password.
        password: String,
    },
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("Anonymous"),
            Self::Basic { user, .. } => f.debug_struct("Basic").field("user", user).finish_non_exhaustive(),
        }
    }
}

/// As `docker login` writes `~/.docker/config.json`.
#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, DockerAuth>,
}

#[derive(Deserialize)]
struct DockerAuth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
}

impl Credentials {
    /// Those of a registry in a file as `docker login` writes it; or `user:password`.
    ///
    /// # Errors
    ///
    /// When it is neither, or the file has none for the registry.
    pub fn parse(bytes: &[u8], registry: &str) -> Result<Self, Error> {
        let wrong = |why: &str| Error::Credentials(why.to_owned());
        let text = std::str::from_utf8(bytes).map_err(|_| wrong("they are no text"))?.trim();
        if !text.starts_with('{') {
            return Self::pair(text)
                .ok_or_else(|| wrong("they are neither user:password nor a file of docker login's"));
        }
        // What the parser says would quote the file.
        let config: DockerConfig =
            serde_json::from_str(text).map_err(|_| wrong("they begin like a file of docker login's and are none"))?;
        let host = |key: &str| {
            let bare = key.trim_start_matches("https://").trim_start_matches("http://");
            bare.split('/').next().unwrap_or_default().to_owned()
        };
        let is_it = |key: &str| {
            let host = host(key);
            host == registry || (registry == "docker.io" && host == "index.docker.io")
        };
        let found = config.auths.into_iter().find(|(key, _)| is_it(key)).map(|(_, auth)| auth);
        let found = found.ok_or_else(|| Error::Credentials(format!("they have none for {registry}")))?;
        let encoded = found.auth.and_then(|auth| String::from_utf8(STANDARD.decode(auth.trim()).ok()?).ok());
        let plain = found.username.zip(found.password).map(|(user, password)| Self::Basic { user, password });
        encoded.and_then(|pair| Self::pair(&pair)).or(plain).ok_or_else(|| wrong("an entry has no user and password"))
    }

    fn pair(text: &str) -> Option<Self> {
        let (user, password) = text.split_once(':')?;
        let plausible = !user.is_empty() && !user.contains(char::is_whitespace);
        plausible.then(|| Self::Basic { user: user.to_owned(), password: password.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_come_in_two_forms_and_are_not_shown() {
        let basic = Credentials::Basic { user: "ann".to_owned(), password: "s3cret:x".to_owned() };
        let parse =
            |text: &str| Credentials::parse(text.as_bytes(), "r.example:5000").map_err(|error| error.to_string());
        assert_eq!(parse("ann:s3cret:x\n"), Ok(basic.clone()));
        let encoded = STANDARD.encode("ann:s3cret:x");
        assert_eq!(
            parse(&format!(r#"{{"auths":{{"https://r.example:5000/v2/":{{"auth":"{encoded}"}}}}}}"#)),
            Ok(basic.clone())
        );
        let named = r#"{"auths":{"r.example:5000":{"username":"ann","password":"s3cret:x"}},"credsStore":"x"}"#;
        assert_eq!(parse(named), Ok(basic.clone()));
        for wrong in [
            "s3cret",
            r#"{"auths":{"other":{"auth":"czNjcmV0"}}}"#,
            r#"{"auths": s3cret"#,
            r#"{"auths":{"r.example:5000":{}}}"#,
        ] {
            let error = parse(wrong).expect_err(wrong);
            assert!(!error.contains("s3cret"), "{error}");
        }
        assert!(!format!("{basic:?}").contains("s3cret"));
    }
}
