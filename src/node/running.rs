//! The running attempts of this process. Their duplicates are refused without asking the store.
//!
//! After an outage longer than a lease, the store would let a duplicate take over an attempt that
//! still runs here.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    consumer::Consumer,
    key::IdempotencyKey,
    stored::record::{Attempt, Record},
};

/// The records that attempts of this process own.
#[derive(Debug, Default)]
pub(crate) struct Running {
    records: Mutex<HashMap<(Consumer, IdempotencyKey), Record>>,
}

impl Running {
    fn records(&self) -> MutexGuard<'_, HashMap<(Consumer, IdempotencyKey), Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a record once its attempt begins, until the returned guard is dropped.
    pub(crate) fn enter(self: &Arc<Self>, attempt: Attempt, record: Record) -> Entered {
        self.records().insert((record.consumer.clone(), record.key.clone()), record);
        Entered { running: Arc::clone(self), attempt }
    }

    /// The record as it was claimed, if an attempt of this process has the key.
    pub(crate) fn find(&self, consumer: &Consumer, key: &IdempotencyKey) -> Option<Record> {
        self.records().get(&(consumer.clone(), key.clone())).cloned()
    }

    /// Removes the record of an attempt that does not own it any more.
    pub(crate) fn leave(&self, attempt: &Attempt) {
        let identity = (attempt.consumer.clone(), attempt.key.clone());
        let mut records = self.records();
        // The key may have been evicted and claimed again by a newer attempt of this process.
        if records.get(&identity).is_some_and(|record| record.attempt == Some(attempt.id)) {
            records.remove(&identity);
        }
    }

    /// Removes a record that an operator has ended.
    pub(crate) fn forget(&self, consumer: &Consumer, key: &IdempotencyKey) {
        self.records().remove(&(consumer.clone(), key.clone()));
    }
}

/// Removes the record when dropped.
#[derive(Debug)]
pub(crate) struct Entered {
    running: Arc<Running>,
    attempt: Attempt,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.running.leave(&self.attempt);
    }
}
