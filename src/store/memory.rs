//! The in-process store, and the executable specification of the contract.

mod entry;

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    hash::{BuildHasher, RandomState},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::SystemTime,
};

use async_trait::async_trait;
use bytes::Bytes;
use http::Extensions;
use tokio::time::Instant;

use self::entry::{Decision, Entry, State, decide};
use crate::{
    Attempt, Claim, ClaimOutcome, CompleteOutcome, Consumer, Fenced, IdempotencyKey, Record, RecordFilter,
    RecordState, RecoveryStore, RenewOutcome, Renewal, Resolution, ResolveOutcome, Store, StoreError,
    StoreErrorKind, StoreTransaction, TransactionLimits,
};

/// Keeps records in this process: for tests and for tools that run as a single process.
///
/// The records are lost with the process, and no other process sees them. A clone is another handle to the same
/// records.
///
/// The store never drops a record that it may not forget. When it is full, a claim of a new key is
/// [`Unavailable`](StoreErrorKind::Unavailable), and the layer answers 503; what is stored is still replayed.
///
/// Time is tokio's, so that a test with a paused clock can let leases run out and records expire.
///
/// ```
/// # use tower_idempotency::MemoryStore;
/// let store = MemoryStore::new().with_max_records(10_000).with_max_bytes(64 * 1024 * 1024);
/// # let _ = store;
/// ```
#[derive(Clone)]
pub struct MemoryStore {
    shared: Arc<Shared>,
    max_records: usize,
    max_bytes: usize,
}

impl MemoryStore {
    /// An empty store with the default limits.
    #[must_use]
    pub fn new() -> Self {
        Self { shared: Arc::default(), max_records: DEFAULT_MAX_RECORDS, max_bytes: DEFAULT_MAX_BYTES }
    }

    /// How many records this handle lets the store grow to. Default: 100,000.
    #[must_use]
    pub fn with_max_records(mut self, max_records: usize) -> Self {
        self.max_records = max_records;
        self
    }

    /// How many bytes of stored responses this handle lets the store grow to. Default: 256 MiB.
    ///
    /// It is checked when a key is claimed, because a response that was earned must be stored; what is in flight at
    /// that moment may overshoot it.
    #[must_use]
    pub fn with_max_bytes(mut self, max_bytes: usize) -> Self {
        self.max_bytes = max_bytes;
        self
    }

    fn full(&self) -> Option<StoreError> {
        let records = self.shared.records.load(Ordering::Relaxed);
        let bytes = self.shared.bytes.load(Ordering::Relaxed);
        (records >= self.max_records || bytes >= self.max_bytes).then(|| {
            let message = format!("the memory store is full: {records} records, {bytes} bytes of responses");
            StoreError::new(StoreErrorKind::Unavailable, message)
        })
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

/// Shows how much is stored, and nothing of it.
impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore")
            .field("records", &self.shared.records)
            .field("bytes", &self.shared.bytes)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn prepare(&self) -> Result<Vec<String>, StoreError> {
        Ok(Vec::new())
    }

    async fn claim(&self, claim: &Claim) -> Result<ClaimOutcome, StoreError> {
        if self.full().is_some() {
            self.shared.purge(PURGED_WHEN_FULL);
        }
        let identity = identity_of(&claim.attempt);
        let mut shard = self.shared.shard(&identity);
        let now = Instant::now();
        match decide(shard.entries.get(&identity), claim, now) {
            Decision::Create => {
                shard.remove(&identity, &self.shared);
                if let Some(error) = self.full() {
                    return Err(error);
                }
                shard.insert(identity, Entry::new(claim, now), &self.shared);
                Ok(ClaimOutcome::won(claim.record_id, 1))
            }
            Decision::Change(entry, outcome) => {
                shard.entries.insert(identity, *entry);
                Ok(outcome)
            }
            Decision::Hold(entry) => {
                let record = self.shared.show(&identity, &entry, now);
                shard.entries.insert(identity, *entry);
                Ok(ClaimOutcome::Exists(Box::new(record)))
            }
            Decision::Show(entry) => {
                Ok(ClaimOutcome::Exists(Box::new(self.shared.show(&identity, entry, now))))
            }
        }
    }

    async fn renew(&self, renewals: &[Renewal]) -> Result<Vec<RenewOutcome>, StoreError> {
        Ok(renewals.iter().map(|renewal| self.shared.renew(renewal)).collect())
    }

    async fn complete(&self, attempt: &Attempt, response: Bytes) -> Result<CompleteOutcome, StoreError> {
        let identity = identity_of(attempt);
        let mut shard = self.shared.shard(&identity);
        let Shard { entries, by_expiry } = &mut *shard;
        let Some(entry) = entries.get_mut(&identity) else {
            return Ok(CompleteOutcome::Absent);
        };
        if entry.attempt != Some(attempt.id) {
            let record = self.shared.show(&identity, entry, Instant::now());
            return Ok(CompleteOutcome::Lost(Box::new(record)));
        }
        if !entry.is_completed() {
            self.shared.bytes.fetch_add(response.len(), Ordering::Relaxed);
            entry.state = State::Completed { response };
            let now = Instant::now();
            if entry.expires_at <= now {
                by_expiry.remove(&(entry.expires_at, identity.clone()));
                entry.expires_at = now + entry.retention();
                by_expiry.insert((entry.expires_at, identity));
            }
        }
        Ok(CompleteOutcome::Completed)
    }

    async fn release(&self, attempt: &Attempt) -> Result<Fenced, StoreError> {
        let identity = identity_of(attempt);
        let mut shard = self.shared.shard(&identity);
        match shard.entries.get(&identity) {
            Some(entry) if entry.is_open_to(attempt) => {
                shard.remove(&identity, &self.shared);
                Ok(Fenced::Applied)
            }
            _ => Ok(Fenced::Lost),
        }
    }

    async fn hold(&self, attempt: &Attempt) -> Result<Fenced, StoreError> {
        let identity = identity_of(attempt);
        let mut shard = self.shared.shard(&identity);
        match shard.entries.get_mut(&identity) {
            Some(entry) if entry.is_open_to(attempt) => {
                entry.state = State::Held;
                Ok(Fenced::Applied)
            }
            _ => Ok(Fenced::Lost),
        }
    }

    async fn get(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<Option<Record>, StoreError> {
        let identity = (consumer.clone(), key.clone());
        let shard = self.shared.shard(&identity);
        Ok(shard.entries.get(&identity).map(|entry| self.shared.show(&identity, entry, Instant::now())))
    }

    async fn list(&self, filter: RecordFilter, limit: u32) -> Result<Vec<Record>, StoreError> {
        let now = Instant::now();
        let mut records: Vec<Record> = Vec::new();
        for shard in &self.shared.shards {
            let shard = lock(shard);
            let shown = shard.entries.iter().map(|(identity, entry)| self.shared.show(identity, entry, now));
            records.extend(shown.filter(|record| matches(filter, &record.state)));
        }
        records.sort_by_key(|record| record.created_at);
        records.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
        Ok(records)
    }

    async fn evict(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<bool, StoreError> {
        let identity = (consumer.clone(), key.clone());
        Ok(self.shared.shard(&identity).remove(&identity, &self.shared))
    }

    async fn resolve(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        resolution: Resolution,
    ) -> Result<ResolveOutcome, StoreError> {
        let identity = (consumer.clone(), key.clone());
        let mut shard = self.shared.shard(&identity);
        let now = Instant::now();
        let Some(entry) = shard.entries.get(&identity) else {
            return Ok(ResolveOutcome::Absent);
        };
        match &entry.state {
            State::Completed { .. } => return Ok(ResolveOutcome::AlreadyCompleted),
            State::InProgress { lease_until } if *lease_until > now => return Ok(ResolveOutcome::InProgress),
            State::InProgress { .. } | State::Held => {}
        }
        let resolved = entry.clone();
        shard.remove(&identity, &self.shared);
        if let Resolution::Complete(response) = resolution {
            let expires_at = now + resolved.retention();
            let state = State::Completed { response };
            shard.insert(identity, Entry { state, attempt: None, expires_at, ..resolved }, &self.shared);
        }
        Ok(ResolveOutcome::Resolved)
    }

    fn transaction(
        &self,
        _: &Attempt,
        _: &TransactionLimits,
        _: &mut Extensions,
    ) -> Option<Arc<dyn StoreTransaction>> {
        None
    }

    fn recovery(&self) -> Option<Arc<dyn RecoveryStore>> {
        None
    }

    async fn purge(&self, limit: u32) -> Result<u64, StoreError> {
        Ok(self.shared.purge(limit))
    }
}

type Identity = (Consumer, IdempotencyKey);

struct Shared {
    shards: [Mutex<Shard>; SHARDS],
    hasher: RandomState,
    records: AtomicUsize,
    bytes: AtomicUsize,
    /// One moment on both clocks: leases are judged by the first, the second is shown to people.
    epoch: (Instant, SystemTime),
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            shards: Default::default(),
            hasher: RandomState::new(),
            records: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            epoch: (Instant::now(), SystemTime::now()),
        }
    }
}

impl Shared {
    fn shard(&self, identity: &Identity) -> MutexGuard<'_, Shard> {
        let hash = self.hasher.hash_one(identity).to_le_bytes()[0];
        lock(&self.shards[usize::from(hash) % SHARDS])
    }

    fn renew(&self, renewal: &Renewal) -> RenewOutcome {
        let identity = identity_of(&renewal.attempt);
        let mut shard = self.shard(&identity);
        let Some(entry) = shard.entries.get_mut(&identity) else { return RenewOutcome::Lost };
        if entry.attempt != Some(renewal.attempt.id) {
            return RenewOutcome::Lost;
        }
        match entry.state {
            State::InProgress { .. } => {
                entry.state = State::in_progress(Instant::now(), renewal.lease);
                RenewOutcome::Renewed
            }
            State::Held => RenewOutcome::Skipped,
            State::Completed { .. } => RenewOutcome::Lost,
        }
    }

    fn purge(&self, limit: u32) -> u64 {
        let mut left = limit;
        for shard in &self.shards {
            let mut shard = lock(shard);
            for identity in shard.absent(Instant::now(), left) {
                shard.remove(&identity, self);
                left -= 1;
            }
        }
        u64::from(limit - left)
    }

    fn show(&self, (consumer, key): &Identity, entry: &Entry, now: Instant) -> Record {
        let state = match &entry.state {
            State::InProgress { .. } if entry.is_to_be_held(now) => RecordState::Held,
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
            abandoned: entry.abandoned,
            unresolved: 0,
            created_at: self.wall_clock(entry.created_at),
            expires_at: self.wall_clock(entry.expires_at),
        }
    }

    fn wall_clock(&self, at: Instant) -> SystemTime {
        self.epoch.1 + at.saturating_duration_since(self.epoch.0)
    }
}

#[derive(Default)]
struct Shard {
    entries: HashMap<Identity, Entry>,
    by_expiry: BTreeSet<(Instant, Identity)>,
}

impl Shard {
    fn insert(&mut self, identity: Identity, entry: Entry, shared: &Shared) {
        shared.records.fetch_add(1, Ordering::Relaxed);
        shared.bytes.fetch_add(entry.size(), Ordering::Relaxed);
        self.by_expiry.insert((entry.expires_at, identity.clone()));
        self.entries.insert(identity, entry);
    }

    fn remove(&mut self, identity: &Identity, shared: &Shared) -> bool {
        let Some(entry) = self.entries.remove(identity) else { return false };
        self.by_expiry.remove(&(entry.expires_at, identity.clone()));
        shared.bytes.fetch_sub(entry.size(), Ordering::Relaxed);
        shared.records.fetch_sub(1, Ordering::Relaxed);
        true
    }

    fn absent(&self, now: Instant, limit: u32) -> Vec<Identity> {
        let expired = self.by_expiry.iter().take_while(|(expires_at, _)| *expires_at <= now);
        expired
            .map(|(_, identity)| identity)
            .filter(|identity| self.entries.get(*identity).is_some_and(|entry| entry.is_absent(now)))
            .take(usize::try_from(limit).unwrap_or(usize::MAX))
            .cloned()
            .collect()
    }
}

fn matches(filter: RecordFilter, state: &RecordState) -> bool {
    match filter {
        RecordFilter::All => true,
        RecordFilter::InProgress => matches!(state, RecordState::InProgress { .. }),
        RecordFilter::Held => matches!(state, RecordState::Held),
        RecordFilter::Completed => matches!(state, RecordState::Completed { .. }),
    }
}

fn identity_of(attempt: &Attempt) -> Identity {
    (attempt.consumer.clone(), attempt.key.clone())
}

/// A poisoned lock is taken all the same: no change to a shard is left half done by a panic.
fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

const SHARDS: usize = 16;
const DEFAULT_MAX_RECORDS: usize = 100_000;
const DEFAULT_MAX_BYTES: usize = 256 * 1024 * 1024;
const PURGED_WHEN_FULL: u32 = 64;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::Fingerprint;

    fn claim(key: &str) -> Claim {
        let consumer = Consumer::new("acme").unwrap();
        let attempt = Attempt::new(consumer, IdempotencyKey::new(key).unwrap());
        Claim::new(attempt, Fingerprint::from_bytes(&b"digest"[..]))
    }

    async fn is_won(store: &MemoryStore, claim: &Claim) -> bool {
        matches!(store.claim(claim).await.unwrap(), ClaimOutcome::Won { .. })
    }

    #[tokio::test]
    async fn a_full_store_refuses_new_keys_and_keeps_what_it_has() {
        let store = MemoryStore::new().with_max_records(2);
        let first = claim("a");
        assert!(is_won(&store, &first).await && is_won(&store, &claim("b")).await);

        let error = store.claim(&claim("c")).await.unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Unavailable);
        assert!(!is_won(&store, &claim("a")).await, "a known key is still answered");

        store.release(&first.attempt).await.unwrap();
        assert!(is_won(&store, &claim("c")).await);
    }

    #[tokio::test]
    async fn stored_responses_are_counted_until_they_are_gone() {
        let store = MemoryStore::new().with_max_bytes(10);
        let first = claim("a");
        assert!(is_won(&store, &first).await);
        store.complete(&first.attempt, Bytes::from_static(&[0; 10])).await.unwrap();
        store.complete(&first.attempt, Bytes::from_static(&[0; 10])).await.unwrap();
        assert_eq!(store.claim(&claim("b")).await.unwrap_err().kind(), StoreErrorKind::Unavailable);

        store.evict(&first.attempt.consumer, &first.attempt.key).await.unwrap();
        assert!(is_won(&store, &claim("b")).await);
        assert_eq!(format!("{store:?}"), "MemoryStore { records: 1, bytes: 0, .. }");
    }

    #[tokio::test(start_paused = true)]
    async fn expired_records_make_room_for_new_ones() {
        let store = MemoryStore::new().with_max_records(1);
        let short = Claim { retention: Duration::from_secs(60), ..claim("a") };
        assert!(is_won(&store, &short).await);
        store.complete(&short.attempt, Bytes::new()).await.unwrap();
        assert!(store.claim(&claim("b")).await.is_err());

        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(is_won(&store, &claim("b")).await);
        assert_eq!(store.shared.records.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_completed_after_its_expiry_is_kept_for_its_whole_retention() {
        let store = MemoryStore::new().with_max_records(1);
        let minute = Duration::from_secs(60);
        let long = Claim { retention: minute, lease: minute * 2, ..claim("a") };
        assert!(is_won(&store, &long).await);
        tokio::time::advance(minute).await;
        store.complete(&long.attempt, Bytes::new()).await.unwrap();
        tokio::time::advance(minute / 2).await;
        assert!(!is_won(&store, &claim("a")).await && store.claim(&claim("b")).await.is_err());
        tokio::time::advance(minute / 2).await;
        assert!(is_won(&store, &claim("b")).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_paused_clock_lets_a_lease_run_out() {
        let store = MemoryStore::new();
        let first = claim("a");
        assert!(is_won(&store, &first).await && !is_won(&store, &claim("a")).await);
        tokio::time::advance(first.lease).await;
        assert!(is_won(&store, &claim("a")).await);
    }

    #[tokio::test]
    async fn the_longest_durations_do_not_overflow() {
        let store = MemoryStore::new();
        let endless = Claim { lease: Duration::MAX, retention: Duration::MAX, ..claim("a") };
        assert!(is_won(&store, &endless).await);
        let renewal = Renewal::new(endless.attempt.clone(), Duration::MAX);
        assert_eq!(store.renew(&[renewal]).await.unwrap(), [RenewOutcome::Renewed]);
        assert!(store.get(&endless.attempt.consumer, &endless.attempt.key).await.unwrap().is_some());
    }

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
