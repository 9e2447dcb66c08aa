//! Where in a document something stands: its line by its path, and its path by its line.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, Visitor},
};
use serde_saphyr::Spanned;

/// A document's shape. What its values are is no matter.
enum Tree {
    Map(Vec<(Spanned<String>, Self)>),
    List(Vec<Spanned<Self>>),
    Leaf,
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Tree;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("anything")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Tree, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Tree::Map(entries))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Tree, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = list.next_element()? {
                    items.push(item);
                }
                Ok(Tree::List(items))
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Tree, D::Error> {
                Tree::deserialize(deserializer)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Tree, E> {
                Ok(Tree::Leaf)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Tree, E> {
                Ok(Tree::Leaf)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Tree, E> {
                Ok(Tree::Leaf)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Tree, E> {
                Ok(Tree::Leaf)
            }

            fn visit_str<E>(self, _: &str) -> Result<Tree, E> {
                Ok(Tree::Leaf)
            }

            fn visit_bytes<E>(self, _: &[u8]) -> Result<Tree, E> {
                Ok(Tree::Leaf)
            }

            fn visit_unit<E>(self) -> Result<Tree, E> {
                Ok(Tree::Leaf)
            }

            fn visit_none<E>(self) -> Result<Tree, E> {
                Ok(Tree::Leaf)
            }
        }

        deserializer.deserialize_any(Any)
    }
}

struct Place {
    path: String,
    line: u64,
    column: u64,
}

/// Where everything in a document is, in its order.
pub(super) struct Places(Vec<Place>);

impl Places {
    /// Of a document that is no YAML nothing is known.
    pub(super) fn of(text: &str) -> Self {
        let mut places = Self(Vec::new());
        if let Ok(tree) = serde_saphyr::from_str::<Tree>(text) {
            places.add(&tree, "");
        }
        places
    }

    fn add(&mut self, tree: &Tree, path: &str) {
        match tree {
            Tree::Map(entries) => {
                for (key, value) in entries {
                    let path = if path.is_empty() { key.value.clone() } else { format!("{path}.{}", key.value) };
                    self.note(path.clone(), &key.referenced);
                    self.add(value, &path);
                }
            }
            Tree::List(items) => {
                for (i, item) in items.iter().enumerate() {
                    let path = format!("{path}[{i}]");
                    self.note(path.clone(), &item.referenced);
                    self.add(&item.value, &path);
                }
            }
            Tree::Leaf => {}
        }
    }

    fn note(&mut self, path: String, at: &serde_saphyr::Location) {
        self.0.push(Place { path, line: at.line(), column: at.column() });
    }

    /// The path of what is there: the last that begins before.
    pub(super) fn path_at(&self, line: u64, column: u64) -> Option<&str> {
        let mut before = self.0.iter().rev().filter(|place| (place.line, place.column) <= (line, column));
        before.next().map(|place| place.path.as_str())
    }

    /// The line where a path is, or the nearest that is there of what it is part of.
    pub(super) fn line_of(&self, path: &str) -> Option<u64> {
        let mut path = path;
        loop {
            if let Some(place) = self.0.iter().find(|place| place.path == path) {
                return Some(place.line);
            }
            path = &path[..path.rfind(['.', '['])?];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_have_lines_and_lines_have_paths() {
        let places =
            Places::of("\n\nkind: Service\nspec:\n  ports:\n    - {containerPort: 80}\n    - containerPort: 81\n");
        assert_eq!(places.line_of("kind"), Some(3));
        assert_eq!(places.line_of("spec.ports[1].containerPort"), Some(7));
        assert_eq!(places.line_of("spec.ports[1].hostPort"), Some(7), "not there: its list's entry");
        assert_eq!(places.line_of("spec.image"), Some(4));
        assert_eq!(places.line_of("metadata"), None);
        assert_eq!(places.path_at(6, 23), Some("spec.ports[0].containerPort"));
        assert_eq!(places.path_at(3, 1), Some("kind"));
        assert!(Places::of("a: [").0.is_empty());
    }
}
