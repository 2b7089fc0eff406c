//! A part of the records, each beside its intents and its request, so that they change together.

use std::{
    collections::{BTreeSet, HashMap},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    entry::{Entry, Identity, Now},
    intents::{Intents, StoredIntent},
    requests::Request,
};
use crate::stored::{
    intent::{Intent, UpstreamKey},
    record::RecordId,
    request::KeptRequest,
};

/// A part of the records, with their intents and requests, under one lock.
#[derive(Default)]
pub(super) struct Shard {
    pub(super) entries: HashMap<Identity, Entry>,
    by_expiry: BTreeSet<(Instant, Identity)>,
    pub(super) intents: Intents,
    pub(super) requests: HashMap<RecordId, Request>,
}

impl Shard {
    /// Stores an entry. It replaces the one that the key has.
    pub(super) fn put(&mut self, identity: Identity, entry: Entry, stored: &Stored) {
        self.remove(&identity, stored);
        stored.add(entry.size());
        self.by_expiry.insert((entry.expires_at, identity.clone()));
        self.entries.insert(identity, entry);
    }

    pub(super) fn remove(&mut self, identity: &Identity, stored: &Stored) -> bool {
        let Some(entry) = self.entries.remove(identity) else { return false };
        self.by_expiry.remove(&(entry.expires_at, identity.clone()));
        stored.subtract(entry.size());
        true
    }

    /// Frees the key. The next claim makes a new record, unless this one is retained.
    pub(super) fn give_back(&mut self, identity: Identity, released: Entry, stored: &Stored) {
        if released.retained {
            self.put(identity, released, stored);
        } else {
            self.remove(&identity, stored);
        }
    }

    /// Stores an intent as it was opened or changed, and updates its record. Only this code
    /// computes what a record knows about its intents.
    pub(super) fn put_intent(&mut self, kept: StoredIntent, now: Instant, stored: &Stored) {
        let (identity, record) = (kept.identity(), kept.intent.record_id);
        stored.add(kept.size());
        if let Some(old) = self.intents.put(kept) {
            stored.subtract(old.size());
        }
        let Some(entry) = self.record(&identity, record) else { return };
        let open = || {
            let waiting = self.intents.waiting.values();
            waiting.filter(|kept| kept.intent.record_id == record && kept.is_open())
        };
        let entry = Entry {
            retained: true,
            unresolved: open().count().try_into().unwrap_or(u32::MAX),
            repeatable_until: open().filter_map(StoredIntent::repeatable_until).min(),
            expires_at: entry.expiry_if_freed(now),
            ..entry.clone()
        };
        // Only after `retained` was set: a record that is not retained may expire under its lease.
        let expires_at = entry.expiry_if_leased(now);
        self.put(identity, Entry { expires_at, ..entry }, stored);
    }

    /// Returns the record, unless it is gone. Another record may have its key.
    pub(super) fn record(&self, identity: &Identity, record: RecordId) -> Option<&Entry> {
        self.entries.get(identity).filter(|entry| entry.record_id == record)
    }

    /// Returns `true` if its attempt may be calling.
    pub(super) fn is_in_flight(&self, kept: &StoredIntent, now: Instant) -> bool {
        is_in_flight(&self.entries, &kept.intent, now)
    }

    /// Returns the intents whose look-up is due, and the times since which. No attempt can be
    /// calling them any more.
    pub(super) fn due_intents(&mut self, now: Now) -> impl Iterator<Item = (Instant, &mut StoredIntent)> {
        let Self { entries, intents, .. } = self;
        let due = intents.waiting.values_mut().filter_map(move |kept| Some((kept.due_since(now)?, kept)));
        due.filter(move |(_, kept)| !is_in_flight(entries, &kept.intent, now.instant))
    }

    /// Returns the requests that must be sent again, and the times since which they are due. Their
    /// records wait for the next attempt.
    pub(super) fn due_requests(&mut self, now: Instant) -> impl Iterator<Item = (Instant, &mut Request)> {
        let Self { entries, requests, .. } = self;
        let due = requests.values_mut().filter_map(|request| Some((request.next_at?, request)));
        due.filter(move |(next_at, Request { kept, .. })| {
            let entry = entries.get(&(kept.consumer.clone(), kept.key.clone()));
            let waits = |entry: &Entry| entry.record_id == kept.record_id && entry.is_abandoned(now);
            *next_at <= now && entry.is_some_and(waits)
        })
    }

    pub(super) fn purge(&mut self, limit: u32, stored: &Stored) -> u32 {
        let now = Instant::now();
        let expired = self.by_expiry.iter().take_while(|(expires_at, _)| *expires_at <= now);
        let may_go = |identity: &Identity| self.entries.get(identity).is_some_and(|e| e.is_purgeable(now));
        let doomed = expired.map(|(_, identity)| identity).filter(|identity| may_go(identity)).cloned();
        let doomed = at_most(limit, doomed);
        for identity in &doomed {
            self.remove(identity, stored);
        }
        count(&doomed)
    }

    /// Purges settled intents. An intent stays as long as its record, because a retry may ask for
    /// it again.
    pub(super) fn purge_intents(
        &mut self,
        limit: u32,
        retention: Duration,
        now: Now,
        stored: &Stored,
    ) -> u32 {
        let settled = self.intents.settled.iter().filter(|(_, kept)| {
            kept.age(now) >= retention && self.record(&kept.identity(), kept.intent.record_id).is_none()
        });
        let doomed: Vec<UpstreamKey> = at_most(limit, settled.map(|(key, _)| *key));
        for kept in doomed.iter().filter_map(|key| self.intents.remove(*key)) {
            stored.subtract(kept.size());
        }
        count(&doomed)
    }

    /// Purges requests that are not needed any more: those whose record is completed or gone.
    pub(super) fn purge_requests(&mut self, limit: u32, stored: &Stored) -> u32 {
        let done = self.requests.iter().filter(|(id, request)| {
            let identity = (request.kept.consumer.clone(), request.kept.key.clone());
            self.record(&identity, **id).is_none_or(Entry::is_completed)
        });
        let doomed: Vec<RecordId> = at_most(limit, done.map(|(id, _)| *id));
        for id in &doomed {
            self.remove_request(*id, stored);
        }
        count(&doomed)
    }

    pub(super) fn put_request(&mut self, kept: KeptRequest, next_at: Instant, stored: &Stored) {
        // The first request of a record counts: a later one must not change it.
        self.requests.entry(kept.record_id).or_insert_with(|| {
            stored.add(kept.request.len());
            Request { kept, next_at: Some(next_at) }
        });
    }

    pub(super) fn remove_request(&mut self, record: RecordId, stored: &Stored) -> bool {
        let Some(request) = self.requests.remove(&record) else { return false };
        stored.subtract(request.kept.request.len());
        true
    }
}

/// The amount that is stored: the number of records, intents and requests, and the bytes that
/// applications gave them.
#[derive(Debug, Default)]
pub(super) struct Stored {
    pub(super) items: AtomicUsize,
    pub(super) bytes: AtomicUsize,
}

impl Stored {
    pub(super) fn add(&self, size: usize) {
        // Relaxed: the counters guard no data, and a limit may be exceeded a little.
        self.items.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(size, Ordering::Relaxed);
    }

    pub(super) fn subtract(&self, size: usize) {
        self.items.fetch_sub(1, Ordering::Relaxed);
        self.bytes.fetch_sub(size, Ordering::Relaxed);
    }
}

fn is_in_flight(entries: &HashMap<Identity, Entry>, intent: &Intent, now: Instant) -> bool {
    let entry = entries.get(&(intent.consumer.clone(), intent.key.clone()));
    entry.is_some_and(|entry| entry.is_owned_by(intent.attempt, intent.record_id, now))
}

fn at_most<T>(limit: u32, items: impl Iterator<Item = T>) -> Vec<T> {
    items.take(size(limit)).collect()
}

pub(super) fn size(limit: u32) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX)
}

fn count<T>(items: &[T]) -> u32 {
    items.len().try_into().unwrap_or(u32::MAX)
}
