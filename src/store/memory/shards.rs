//! The state that all handles to a store share: its shards, its clock, and the amount that it
//! keeps.

use std::{
    hash::{BuildHasher, RandomState},
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use tokio::time::Instant;

use super::{
    entry::{Entry, Identity, Now, State},
    shard::{Shard, Stored},
};
use crate::stored::record::{Record, RecordState};

/// The state that all handles share.
pub(super) struct Shards {
    pub(super) parts: [Mutex<Shard>; SHARDS],
    pub(super) stored: Stored,
    hasher: RandomState,
    /// One moment on both clocks: the first decides about leases, the second is shown to people.
    epoch: (Instant, SystemTime),
}

impl Default for Shards {
    fn default() -> Self {
        Self {
            parts: Default::default(),
            stored: Stored::default(),
            hasher: RandomState::new(),
            epoch: (Instant::now(), SystemTime::now()),
        }
    }
}

impl Shards {
    pub(super) fn shard(&self, identity: &Identity) -> MutexGuard<'_, Shard> {
        let hash = self.hasher.hash_one(identity).to_le_bytes()[0];
        lock(&self.parts[usize::from(hash) % SHARDS])
    }

    /// Locks and returns the first shard for which `holds` is true.
    pub(super) fn shard_where(&self, holds: impl Fn(&Shard) -> bool) -> Option<MutexGuard<'_, Shard>> {
        self.parts.iter().map(lock).find(|shard| holds(shard))
    }

    /// Locks all shards, to see them at one moment. They are always locked in this order, and no
    /// other code waits for a second lock.
    pub(super) fn all(&self) -> Vec<MutexGuard<'_, Shard>> {
        self.parts.iter().map(lock).collect()
    }

    /// Purges one shard after the other until `limit` items are deleted.
    pub(super) fn purge(&self, limit: u32, purge: impl Fn(&mut Shard, u32) -> u32) -> u64 {
        let mut left = limit;
        for shard in &self.parts {
            left -= purge(&mut lock(shard), left);
        }
        u64::from(limit - left)
    }

    pub(super) fn now(&self) -> Now {
        let instant = Instant::now();
        Now { instant, shown: self.wall_clock(instant) }
    }

    fn wall_clock(&self, at: Instant) -> SystemTime {
        self.epoch.1 + at.saturating_duration_since(self.epoch.0)
    }

    pub(super) fn show(&self, (consumer, key): &Identity, entry: &Entry, now: Instant) -> Record {
        let state = match &entry.state {
            _ if entry.is_held(now) => RecordState::Held,
            State::InProgress { lease_until } => {
                RecordState::in_progress(lease_until.saturating_duration_since(now))
            }
            State::Held => RecordState::Held,
            State::Completed { response } => RecordState::completed(response.clone()),
        };
        Record {
            id: entry.record_id,
            consumer: consumer.clone(),
            key: key.clone(),
            fingerprint: entry.fingerprint.clone(),
            state,
            attempt: entry.attempt,
            attempt_number: entry.attempt_number,
            abandoned: entry.abandoned.saturating_add(entry.is_exhausted(now).into()),
            unresolved: entry.unresolved,
            created_at: self.wall_clock(entry.created_at),
            expires_at: self.wall_clock(entry.expires_at),
        }
    }
}

/// Locks a shard, even a poisoned one: no panic leaves a change to a shard half done.
pub(super) fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

const SHARDS: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_poisoned_shard_is_still_used() {
        let shard = Mutex::new(Shard::default());
        let panicked = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let _guard = shard.lock();
                    panic!("while holding the lock");
                })
                .join()
        });
        assert!(panicked.is_err() && shard.is_poisoned());
        assert!(lock(&shard).entries.is_empty());
    }
}
