//! Work that is done once however many ask for it: one at a time for each key, in the order of asking.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

/// Locks by key. Each lives as long as somebody holds or awaits it. Cheap to clone.
#[derive(Debug)]
pub(super) struct Keyed<T>(Arc<Mutex<HashMap<String, Weak<Slot<T>>>>>);

/// One key's lock, and what its holder shows to those that wait.
#[derive(Debug, Default)]
pub(super) struct Slot<T> {
    /// Fair: whoever has waited longest is next.
    pub(super) turn: tokio::sync::Mutex<()>,
    pub(super) shared: T,
}

impl<T> Clone for Keyed<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Default for Keyed<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: Default> Keyed<T> {
    /// The lock of a key.
    pub(super) fn slot(&self, key: &str) -> Arc<Slot<T>> {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get(key).and_then(Weak::upgrade) {
            return slot;
        }
        slots.retain(|_, slot| slot.strong_count() > 0);
        let slot = Arc::new(Slot::default());
        slots.insert(key.to_owned(), Arc::downgrade(&slot));
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_key_has_one_holder_and_leaves_nothing_behind() {
        let keyed = Keyed::<()>::default();
        let (first, second, other) = (keyed.slot("a"), keyed.slot("a"), keyed.slot("b"));
        let held = first.turn.lock().await;
        assert!(second.turn.try_lock().is_err());
        assert!(other.turn.try_lock().is_ok());
        drop(held);
        assert!(second.turn.try_lock().is_ok());
        drop((first, second, other));
        let _last = keyed.slot("c");
        assert_eq!(keyed.0.lock().expect("no panic").len(), 1);
    }
}
