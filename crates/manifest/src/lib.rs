//! Manifests: what YAML documents say is wanted, as the messages that ask for it; and services as manifests.
//!
//! A key that is not known is an error, with its path: what was misspelt is never left out in silence.

mod invalid;
pub mod parse;
mod places;
mod shapes;
mod write;

pub use invalid::{Invalid, Source, path_in_manifest};
pub use write::{manifest_of, time};

use std::collections::BTreeMap;

use serde::{Deserialize, de::IgnoredAny};
use warren_proto::v1::{self, SecretKind};

use invalid::parse as read;
use shapes::{SecretSpec, ServiceSpec, VolumeSpec};

/// What every document has.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document<T> {
    api_version: String,
    kind: String,
    metadata: Metadata,
    spec: T,
    /// What `inspect` says beside what is wanted.
    #[serde(default, rename = "status")]
    _status: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    name: String,
    #[serde(default, deserialize_with = "shapes::or_default")]
    labels: BTreeMap<String, String>,
}

/// Something to be made so.
#[derive(Clone, Debug)]
pub enum Object {
    /// A service.
    Service(Box<v1::ServiceSpec>),
    /// A secret or config. Its request has no id yet.
    Secret(v1::CreateSecretRequest),
    /// A volume. Its request has no id yet.
    Volume(v1::CreateVolumeRequest),
}

impl Object {
    /// What people call it.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Service(spec) => format!("service {}", spec.name),
            Self::Secret(request) => format!("{} {}", kind_word(request.kind), request.name),
            Self::Volume(request) => format!("volume {}", request.name),
        }
    }
}

/// As people call it.
#[must_use]
pub fn kind_word(kind: i32) -> &'static str {
    if kind == i32::from(SecretKind::Config) { "config" } else { "secret" }
}

/// The documents of a file, each with the number of lines before it.
#[must_use]
pub fn documents(text: &str) -> Vec<(u64, String)> {
    // A mark of byte order, as some editors write it.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut documents = vec![(0, String::new())];
    for (i, line) in (0..).zip(text.lines()) {
        // What stands behind the dashes belongs to the document that they begin.
        let begins = if line.trim_end() == "---" {
            Some("")
        } else {
            line.strip_prefix("---").filter(|rest| rest.starts_with([' ', '\t']))
        };
        match (begins, documents.last_mut()) {
            (None, Some((_, document))) => {
                // An end without another beginning.
                if line.trim_end() != "..." {
                    document.push_str(line);
                }
                document.push('\n');
            }
            (rest, _) => documents.push((i, format!("{}\n", rest.unwrap_or_default()))),
        }
    }
    // A directive is about the document behind it.
    let says_nothing =
        |line: &str| line.trim().is_empty() || line.trim_start().starts_with('#') || line.starts_with('%');
    documents.retain(|(_, document)| !document.lines().all(says_nothing));
    documents
}

/// What a document is about, like `service web`, and what is to be made so, or the first that is wrong with it.
///
/// # Errors
///
/// A [`Invalid`], with its path in the document where that is known.
pub fn object(source: &Source) -> (String, Result<Object, Invalid>) {
    let document = match read::<Document<IgnoredAny>>(source) {
        Ok(document) => document,
        Err(invalid) => return (String::new(), Err(invalid)),
    };
    let Document { api_version, kind, metadata, .. } = document;
    let which = format!("{} {}", kind.to_lowercase(), metadata.name);
    if !matches!(api_version.as_str(), "warren.io/v1" | "v1") {
        let why = format!("{api_version:?} is not warren.io/v1");
        return (which, Err(Invalid::new("apiVersion", why)));
    }
    let (name, labels) = (metadata.name, metadata.labels);
    let object = match kind.as_str() {
        "Service" => read::<Document<ServiceSpec>>(source)
            .and_then(|document| Ok(Object::Service(Box::new(document.spec.into_proto(name, labels)?)))),
        "Secret" | "Config" => read::<Document<SecretSpec>>(source).and_then(|document| {
            let kind = if kind == "Secret" { SecretKind::Secret } else { SecretKind::Config };
            let (data, request_id) = (document.spec.value()?, String::new());
            Ok(Object::Secret(v1::CreateSecretRequest { kind: kind.into(), name, labels, data, request_id }))
        }),
        "Volume" => {
            read::<Document<VolumeSpec>>(source).map(|document| Object::Volume(document.spec.into_proto(name, labels)))
        }
        _ => Err(Invalid::new("kind", format!("{kind:?} is not known: Service, Secret, Config or Volume"))),
    };
    (which, object)
}

#[cfg(test)]
mod tests {
    use super::documents;

    #[test]
    fn nothing_of_a_file_is_dropped() {
        let texts = |text: &str| documents(text).iter().map(|(_, text)| text.trim().to_owned()).collect::<Vec<_>>();
        assert_eq!(texts("a: 1\n---\nb: 2\n"), ["a: 1", "b: 2"]);
        assert_eq!(texts("--- {a: 1}\n--- {b: 2}\n---\nc: 3"), ["{a: 1}", "{b: 2}", "c: 3"]);
        assert_eq!(texts("---\ta: 1\n...\n--- # only words\nb: 2"), ["a: 1", "# only words\nb: 2"]);
        assert_eq!(texts("a: |\n  --- inside\n  ----\n----x"), ["a: |\n  --- inside\n  ----\n----x"]);
        assert_eq!(texts("# nothing\n---\n\n--- \n"), Vec::<String>::new());
        assert_eq!(texts("\u{feff}# words\n---\na: 1"), ["a: 1"]);
        assert_eq!(texts("%YAML 1.1\n---\na: 1"), ["a: 1"]);
        // Where they are in the file is known.
        assert_eq!(documents("a: 1\n--- {b: 2}\n")[1].0, 1);
    }
}
