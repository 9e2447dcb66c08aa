//! Tables: objects by id, and by the names that users give them.

use std::{borrow::Borrow, fmt, sync::Arc};

use imbl::OrdMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Expected, Rejection};

/// What a table holds.
pub trait Record: Clone {
    /// Of one object for its whole life.
    type Id: Clone + Ord + fmt::Display;
    /// What users name it by: no two of a table share one.
    type Name: Clone + Ord;
    /// What it is, as errors and events name it.
    const KIND: &'static str;

    /// Its id.
    fn id(&self) -> &Self::Id;

    /// Its name; `None` where only its id tells it apart.
    fn name(&self) -> Option<Self::Name>;

    /// As errors name it, like `volume "data"`.
    fn label(&self) -> String;

    /// The revision of its last write; 0 of what nobody replaces.
    fn version(&self) -> u64 {
        0
    }

    /// Takes note of a write.
    fn set_version(&mut self, _revision: u64) {}

    /// Why another of its name is refused.
    fn taken(&self) -> Rejection {
        Rejection::Exists(self.label())
    }
}

/// All objects of a kind. A copy of it costs a few pointers.
#[derive(Clone, Debug)]
pub struct Table<R: Record> {
    records: OrdMap<R::Id, Arc<R>>,
    names: OrdMap<R::Name, R::Id>,
}

impl<R: Record> Default for Table<R> {
    fn default() -> Self {
        Self { records: OrdMap::new(), names: OrdMap::new() }
    }
}

impl<R: Record> Table<R> {
    /// All of them, by id.
    pub(super) fn values(&self) -> impl Iterator<Item = &Arc<R>> {
        self.records.values()
    }

    pub(super) fn get(&self, id: &R::Id) -> Option<&Arc<R>> {
        self.records.get(id)
    }

    pub(super) fn named<Q: Ord + ?Sized>(&self, name: &Q) -> Option<&Arc<R>>
    where
        R::Name: Borrow<Q>,
    {
        self.records.get(self.names.get(name)?)
    }

    pub(super) fn contains(&self, id: &R::Id) -> bool {
        self.records.contains_key(id)
    }

    /// Whether nothing was written between the two. It says no where something was written and taken back, but costs nothing.
    pub(super) fn is_untouched(&self, other: &Self) -> bool {
        self.records.ptr_eq(&other.records)
    }

    /// The object of this id.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub(super) fn find(&self, id: &R::Id) -> Result<&Arc<R>, Rejection> {
        self.get(id).ok_or_else(|| Rejection::NotFound(format!("{} {id}", R::KIND)))
    }

    /// What there is of an object that is to be written.
    ///
    /// # Errors
    ///
    /// When that is not what the writer saw, or its name is another's.
    pub(super) fn check(&self, record: &R, expected: Expected) -> Result<Option<Arc<R>>, Rejection> {
        let known = self.get(record.id());
        if !expected.is(known.map(|known| known.version())) {
            return Err(Rejection::Conflict(record.label()));
        }
        let owner = record.name().and_then(|name| self.names.get(&name));
        if owner.is_some_and(|owner| owner != record.id()) {
            return Err(record.taken());
        }
        Ok(known.cloned())
    }

    /// Writes an object, whatever there is of it. [`Table::check`] says whether it may be written.
    pub(super) fn put(&mut self, mut record: R, revision: u64) {
        record.set_version(revision);
        self.insert(Arc::new(record));
    }

    /// Writes an object as it is.
    fn insert(&mut self, record: Arc<R>) {
        if let Some(before) = self.get(record.id()).and_then(|known| known.name()) {
            self.names.remove(&before);
        }
        if let Some(name) = record.name() {
            self.names.insert(name, record.id().clone());
        }
        self.records.insert(record.id().clone(), record);
    }

    /// Removes an object.
    ///
    /// # Errors
    ///
    /// When there is none of this id.
    pub(super) fn remove(&mut self, id: &R::Id) -> Result<Arc<R>, Rejection> {
        let record = Arc::clone(self.find(id)?);
        self.records.remove(id);
        if let Some(name) = record.name() {
            self.names.remove(&name);
        }
        Ok(record)
    }

    pub(super) fn retain(&mut self, keep: impl Fn(&R) -> bool) {
        *self = self.values().filter(|record| keep(record)).cloned().collect();
    }
}

impl<R: Record> FromIterator<Arc<R>> for Table<R> {
    fn from_iter<I: IntoIterator<Item = Arc<R>>>(records: I) -> Self {
        let mut table = Self::default();
        records.into_iter().for_each(|record| table.insert(record));
        table
    }
}

/// As snapshots hold it: the objects, by id.
impl<R: Record + Serialize> Serialize for Table<R> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.values())
    }
}

impl<'de, R: Record + Deserialize<'de>> Deserialize<'de> for Table<R> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Vec::<Arc<R>>::deserialize(deserializer)?.into_iter().collect())
    }
}
