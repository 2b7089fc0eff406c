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

    /// Notes a record whose claim was won, until the returned guard is dropped.
    pub(crate) fn enter(self: &Arc<Self>, attempt: Attempt, record: Record) -> Entered {
        self.records().insert((record.consumer.clone(), record.key.clone()), record);
        Entered { running: Arc::clone(self), attempt }
    }

    /// The record as it was claimed, if the key is that of a running attempt.
    pub(crate) fn find(&self, consumer: &Consumer, key: &IdempotencyKey) -> Option<Record> {
        self.records().get(&(consumer.clone(), key.clone())).cloned()
    }

    /// The attempt does not own its record any more.
    pub(crate) fn leave(&self, attempt: &Attempt) {
        let identity = (attempt.consumer.clone(), attempt.key.clone());
        let mut records = self.records();
        if records.get(&identity).is_some_and(|record| record.attempt == Some(attempt.id)) {
            records.remove(&identity);
        }
    }

    /// An operator has ended the record.
    pub(crate) fn forget(&self, consumer: &Consumer, key: &IdempotencyKey) {
        self.records().remove(&(consumer.clone(), key.clone()));
    }
}

/// Leaves when dropped.
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
