use std::{fmt, str::FromStr};

const DEFAULT_REGISTRY: &str = "docker.io";

/// Which version of a repository is meant.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reference {
    /// What the registry calls so now.
    Tag(String),
    /// These bytes.
    Digest(String),
}

/// An image's full name: registry, repository, and tag or digest. `nginx` is `docker.io/library/nginx:latest`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ImageName {
    registry: String,
    repository: String,
    reference: Reference,
}

impl ImageName {
    /// The registry's host, with a port if it has one.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository: words between slashes.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag or digest.
    #[must_use]
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// The same repository at a digest.
    #[must_use]
    pub fn at(&self, digest: &str) -> Self {
        Self { reference: Reference::Digest(digest.to_owned()), ..self.clone() }
    }
}

/// Whether this is a digest that images have: `sha256:` or `sha512:`, and as many hexadecimal digits.
#[must_use]
pub fn is_digest(text: &str) -> bool {
    let hex = match text.split_once(':') {
        Some(("sha256", hex)) if hex.len() == 64 => hex,
        Some(("sha512", hex)) if hex.len() == 128 => hex,
        _ => return false,
    };
    hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// A string that names no image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not an image's name: {why}")]
pub struct InvalidImageName {
    name: String,
    why: &'static str,
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        match &self.reference {
            Reference::Tag(tag) => write!(f, ":{tag}"),
            Reference::Digest(digest) => write!(f, "@{digest}"),
        }
    }
}

impl FromStr for ImageName {
    type Err = InvalidImageName;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let invalid = |why| InvalidImageName { name: name.to_owned(), why };
        if name.is_empty() {
            return Err(invalid("it is empty"));
        }
        if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/:@".contains(&b)) {
            return Err(invalid("it holds characters that no image name does"));
        }
        let (rest, digest) = match name.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (name, None),
        };
        if digest.is_some_and(|digest| !is_digest(digest)) {
            return Err(invalid("what follows @ is no digest"));
        }
        // A first component is a registry if it could be a host's name; anything else is a repository of Docker Hub.
        let (registry, path) = match rest.split_once('/') {
            Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => (first, path.to_owned()),
            Some(_) => (DEFAULT_REGISTRY, rest.to_owned()),
            None => (DEFAULT_REGISTRY, format!("library/{rest}")),
        };
        // Docker Hub has several names, and its official images two.
        let (registry, path) = match registry {
            "docker.io" | "index.docker.io" | "registry-1.docker.io" if !path.contains('/') => {
                (DEFAULT_REGISTRY, format!("library/{path}"))
            }
            "index.docker.io" | "registry-1.docker.io" => (DEFAULT_REGISTRY, path),
            other => (other, path),
        };
        let (repository, tag) = match path.rsplit_once(':') {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (path.as_str(), None),
        };
        let well_formed = |component: &str| {
            !component.is_empty()
                && component.starts_with(|c: char| c.is_ascii_alphanumeric())
                && !component.bytes().any(|b| b.is_ascii_uppercase() || b == b':')
        };
        // A host and a port; what is not checked here, resolving the host will be.
        if !registry.starts_with(|c: char| c.is_ascii_alphanumeric()) || registry.matches(':').count() > 1 {
            return Err(invalid("what stands before the first slash is no registry"));
        }
        if !repository.split('/').all(well_formed) {
            return Err(invalid("its repository must be lower-case words between slashes"));
        }
        if tag.is_some_and(|tag| tag.is_empty() || tag.len() > 128 || tag.contains('/')) {
            return Err(invalid("its tag is empty or too long"));
        }
        let reference = match (tag, digest) {
            (_, Some(digest)) => Reference::Digest(digest.to_owned()),
            (Some(tag), None) => Reference::Tag(tag.to_owned()),
            (None, None) => Reference::Tag("latest".to_owned()),
        };
        Ok(Self { registry: registry.to_owned(), repository: repository.to_owned(), reference })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_completed() {
        for (short, full) in [
            ("nginx", "docker.io/library/nginx:latest"),
            ("nginx:1.27", "docker.io/library/nginx:1.27"),
            ("docker.io/nginx", "docker.io/library/nginx:latest"),
            ("index.docker.io/nginx:1", "docker.io/library/nginx:1"),
            ("registry-1.docker.io/grafana/grafana", "docker.io/grafana/grafana:latest"),
            ("grafana/grafana", "docker.io/grafana/grafana:latest"),
            ("ghcr.io/a/b:v1", "ghcr.io/a/b:v1"),
            ("localhost/demo", "localhost/demo:latest"),
            ("localhost:5000/demo:x", "localhost:5000/demo:x"),
        ] {
            assert_eq!(short.parse::<ImageName>().map(|name| name.to_string()), Ok(full.to_owned()));
        }
        let digest = format!("sha256:{}", "ab".repeat(32));
        let name: ImageName = format!("nginx:1@{digest}").parse().expect("a name");
        assert_eq!(name.to_string(), format!("docker.io/library/nginx@{digest}"));
    }

    #[test]
    fn nonsense_is_no_name() {
        for name in ["", "UPPER", "a b", "nginx:", "a//b", "nginx@sha256:12", "/nginx", "a:b:c", "../etc"] {
            assert!(name.parse::<ImageName>().is_err(), "{name:?}");
        }
    }
}
