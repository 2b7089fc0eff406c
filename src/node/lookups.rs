//! The names of intents that this process looks up, and the reports that were made once.

use std::{
    collections::{BTreeSet, HashSet},
    hash::Hash,
    sync::{Mutex, PoisonError},
};

use crate::stored::record::RecordId;

/// Tells which intents this process looks up, and what the log says already.
#[derive(Debug, Default)]
pub(crate) struct Lookups {
    names: Mutex<BTreeSet<String>>,
    unregistered: Once<String>,
    overlooked: Once<String>,
    held: Once<RecordId>,
}

impl Lookups {
    /// Notes that a reconciler of this process looks up intents with these names.
    pub(crate) fn register(&self, names: Vec<String>) {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).extend(names);
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
    }

    /// Returns `true` the first time that intents with this name are reported as overlooked.
    pub(crate) fn is_first_report(&self, name: &str) -> bool {
        self.overlooked.is_first(name.to_owned())
    }

    /// Returns `true` the first time that a key is held by a call that this process does not look
    /// up, by its name.
    pub(crate) fn is_first_unregistered(&self, name: &str) -> bool {
        self.unregistered.is_first(name.to_owned())
    }

    /// Returns `true` the first time that a retry finds this record held.
    pub(crate) fn is_first_refusal(&self, record: RecordId) -> bool {
        self.held.is_first(record)
    }
}

/// Tells the first of equal values from the others. It remembers a limited number of them: when
/// it is full, it begins again.
#[derive(Debug)]
struct Once<T>(Mutex<HashSet<T>>);

impl<T> Default for Once<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Eq + Hash> Once<T> {
    fn is_first(&self, value: T) -> bool {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= MOST_REMEMBERED {
            seen.clear();
        }
        seen.insert(value)
    }
}

const MOST_REMEMBERED: usize = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_first_once_and_few_are_remembered() {
        let once = Once::default();
        assert!(once.is_first(1) && !once.is_first(1));
        for value in 0..3 * MOST_REMEMBERED {
            once.is_first(value);
        }
        let remembered = once.0.lock().unwrap().len();
        assert!(remembered <= MOST_REMEMBERED, "{remembered}");
    }
}
