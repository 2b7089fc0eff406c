//! The replay cache: completed records that the store has shown lately.
//!
//! A completed record does not change, so that a copy of it answers like the store. Two things can
//! make a copy wrong. An operator may evict the record, and a failover may lose it together with
//! the effect of its request. So a copy lives for seconds, and all copies go when a call of the
//! store fails in a way that a lost connection does.
//!
//! Records are kept when a retry has met them, not when they are completed: most requests have no
//! retry.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

use crate::{
    consumer::Consumer,
    duration::limit,
    error::StoreError,
    key::IdempotencyKey,
    store::transaction::TransactionErrorKind,
    stored::record::{Record, RecordState},
};

/// The cache from which a process answers replays of one key that follow each other closely,
/// without asking the store.
///
/// The first retry of a completed request asks the store; those in the time to live after it are
/// answered from the cache. Each retry is still compared with the request that made the record, and
/// each replay is marked and logged. The cache holds encoded responses, as the store does.
///
/// A cached record is dropped
///
/// * when its time to live is over, counted from when the store was asked,
/// * when an operator evicts it with the [handle](crate::IdempotencyHandle) of this layer. An
///   eviction by another process takes effect here after the time to live at the latest;
/// * when any call of the store cannot reach it or gets no answer. All cached records are dropped
///   then: after a failover, a record and the effect of its request may be lost together.
///
/// A record that expires within five minutes is not cached, because the clock of this process may
/// differ from that of the store.
#[derive(Clone, Debug)]
pub struct ReplayCache(Option<Limits>);

#[derive(Clone, Copy, Debug)]
struct Limits {
    max_bytes: usize,
    time_to_live: Duration,
}

impl Default for ReplayCache {
    /// At most 16 MiB, for 5 s.
    fn default() -> Self {
        Self(Some(Limits { max_bytes: 16 * 1024 * 1024, time_to_live: Duration::from_secs(5) }))
    }
}

impl ReplayCache {
    /// Caches nothing: every replay asks the store.
    ///
    /// ```
    /// # use tower_idempotency::{IdempotencyLayer, MemoryStore, ReplayCache};
    /// let layer = IdempotencyLayer::new(MemoryStore::new()).with_replay_cache(ReplayCache::off());
    /// ```
    #[must_use]
    pub fn off() -> Self {
        Self(None)
    }

    /// Sets the bytes that all cached records may take, with what belongs to them. Default: 16 MiB.
    /// The oldest make room for new ones. A record that would take more than an eighth of them is
    /// not cached.
    ///
    /// A cache that is off stays off.
    ///
    /// ```
    /// # use tower_idempotency::ReplayCache;
    /// let cache = ReplayCache::default().with_max_bytes(64 * 1024 * 1024);
    /// ```
    #[must_use]
    pub fn with_max_bytes(mut self, max_bytes: usize) -> Self {
        if let Some(limits) = &mut self.0 {
            limits.max_bytes = max_bytes;
        }
        self
    }

    /// Sets how long a record is answered from the cache, counted from when the store was asked.
    /// Default: 5 s. This is also the longest time for which an eviction by another process, or a
    /// failover that no call has met, is not seen here.
    ///
    /// A cache that is off stays off.
    ///
    /// ```
    /// # use std::time::Duration;
    /// # use tower_idempotency::ReplayCache;
    /// let cache = ReplayCache::default().with_time_to_live(Duration::from_secs(1));
    /// ```
    ///
    /// # Panics
    ///
    /// Panics if it is shorter than 1 ms.
    #[must_use]
    #[track_caller]
    pub fn with_time_to_live(mut self, time_to_live: Duration) -> Self {
        let time_to_live = limit("a time to live in the replay cache", time_to_live);
        if let Some(limits) = &mut self.0 {
            limits.time_to_live = time_to_live;
        }
        self
    }
}

/// The cached records of a node.
#[derive(Debug)]
pub(crate) struct Replays(RwLock<State>);

#[derive(Debug)]
struct State {
    settings: ReplayCache,
    /// Counts the moments at which what the store has shown before lost its worth.
    epoch: u64,
    records: HashMap<(Consumer, IdempotencyKey), Arc<Cached>>,
    /// The oldest first. One that is forgotten counts until its time to live is over.
    by_age: VecDeque<Arc<Cached>>,
    bytes: usize,
}

#[derive(Debug)]
struct Cached {
    record: Record,
    until: Instant,
    bytes: usize,
}

/// The moment before the store is asked for a record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Look {
    epoch: u64,
    at: Instant,
}

impl Default for Replays {
    fn default() -> Self {
        Self(RwLock::new(State {
            settings: ReplayCache::default(),
            epoch: 0,
            records: HashMap::new(),
            by_age: VecDeque::new(),
            bytes: 0,
        }))
    }
}

impl Replays {
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins again, empty, with these limits.
    pub(crate) fn configure(&self, cache: ReplayCache) {
        let mut state = self.write();
        state.empty();
        state.settings = cache;
    }

    /// The completed record of a key. If there is none, the store is asked next, and the returned
    /// moment belongs to its answer.
    pub(crate) fn find(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<Record, Look> {
        let (state, now) = (self.read(), Instant::now());
        let cached = state.records.get(&(consumer.clone(), key.clone()));
        match cached.filter(|cached| now < cached.until) {
            Some(cached) => Ok(cached.record.clone()),
            None => Err(Look { epoch: state.epoch, at: now }),
        }
    }

    /// Caches a record that the store has shown to a claim, if it is completed.
    pub(crate) fn keep(&self, record: &Record, look: Look) {
        let RecordState::Completed { response } = &record.state else { return };
        let mut state = self.write();
        let Some(Limits { max_bytes, time_to_live }) = state.settings.0 else { return };
        let (consumer, key) = (&record.consumer, &record.key);
        let bytes = OVERHEAD + response.len() + consumer.as_str().len() + key.as_str().len();
        let expires_early = record.expires_at < SystemTime::now() + time_to_live + CLOCK_TOLERANCE;
        // An operator or an outage came while the store was asked: its answer may be from before.
        if look.epoch != state.epoch || expires_early || bytes > max_bytes / 8 {
            return;
        }
        let cached = Arc::new(Cached { record: record.clone(), until: look.at + time_to_live, bytes });
        state.records.insert((consumer.clone(), key.clone()), Arc::clone(&cached));
        state.by_age.push_back(cached);
        state.bytes += bytes;
        state.make_room(max_bytes);
    }

    /// Drops a record that an operator has ended. The answer to a claim that is under way is not
    /// cached either.
    pub(crate) fn forget(&self, consumer: &Consumer, key: &IdempotencyKey) {
        let mut state = self.write();
        state.epoch += 1;
        state.records.remove(&(consumer.clone(), key.clone()));
    }

    /// Drops everything if an answer shows that the connection to the store may be lost.
    pub(crate) fn note<T>(&self, answer: Result<T, StoreError>) -> Result<T, StoreError> {
        answer.inspect_err(|error| {
            if error.is_retryable() {
                self.empty();
            }
        })
    }

    /// The same for a transaction that failed.
    pub(crate) fn note_lost(&self, kind: TransactionErrorKind) {
        use TransactionErrorKind::{Lost, Unavailable, Unconfirmed};
        if matches!(kind, Unavailable | Lost | Unconfirmed) {
            self.empty();
        }
    }

    fn empty(&self) {
        self.write().empty();
    }
}

impl State {
    fn empty(&mut self) {
        self.epoch += 1;
        (self.records, self.by_age, self.bytes) = Default::default();
    }

    /// Drops what is over, and the oldest until the rest fits.
    fn make_room(&mut self, max_bytes: usize) {
        let now = Instant::now();
        while let Some(oldest) =
            self.by_age.pop_front_if(|oldest| oldest.until <= now || self.bytes > max_bytes)
        {
            self.bytes -= oldest.bytes;
            let Record { consumer, key, .. } = &oldest.record;
            let identity = (consumer.clone(), key.clone());
            // A later look may have replaced it.
            if self.records.get(&identity).is_some_and(|cached| Arc::ptr_eq(cached, &oldest)) {
                self.records.remove(&identity);
            }
        }
    }
}

/// The bytes of a cached record beside its texts and its response, about.
const OVERHEAD: usize = 512;

/// The most by which the clock of this process is taken to be behind that of the store.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(5 * 60);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::StoreErrorKind,
        fingerprint::Fingerprint,
        stored::record::{RecordId, RecordState},
    };

    fn record(key: &str, response: usize) -> Record {
        let consumer = Consumer::new("c").unwrap();
        let key = IdempotencyKey::new(key).unwrap();
        let state = RecordState::completed(vec![0; response].into());
        let record = Record::new(RecordId::random(), consumer, key, Fingerprint::from_bytes("f"), state);
        Record { expires_at: SystemTime::now() + Duration::from_secs(60 * 60), ..record }
    }

    fn look(replays: &Replays, record: &Record) -> Result<Record, Look> {
        replays.find(&record.consumer, &record.key)
    }

    fn keep(replays: &Replays, record: &Record) {
        replays.keep(record, look(replays, record).unwrap_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_record_is_cached_for_its_time_to_live_from_the_look() {
        let (replays, record) = (Replays::default(), record("k", 10));
        let before = look(&replays, &record).unwrap_err();
        tokio::time::advance(Duration::from_secs(4)).await;
        replays.keep(&record, before);
        assert_eq!(look(&replays, &record).unwrap(), record);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(look(&replays, &record).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn only_completed_records_that_live_long_enough_are_cached() {
        let replays = Replays::default();
        let completed = record("k", 10);
        for unfit in [
            Record { state: RecordState::Held, ..completed.clone() },
            Record { state: RecordState::in_progress(Duration::from_secs(9)), ..completed.clone() },
            Record { expires_at: SystemTime::now() + CLOCK_TOLERANCE, ..completed.clone() },
            record("k", 16 * 1024 * 1024 / 8),
        ] {
            keep(&replays, &unfit);
            assert!(look(&replays, &completed).is_err(), "{unfit:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_looked_up_before_an_outage_or_an_eviction_is_not_cached() {
        let (replays, shown, other) = (Replays::default(), record("k", 10), record("other", 10));
        for forget in [true, false] {
            keep(&replays, &other);
            let before = look(&replays, &shown).unwrap_err();
            match forget {
                true => replays.forget(&shown.consumer, &shown.key),
                false => {
                    let lost = StoreError::new(StoreErrorKind::Ambiguous, "lost");
                    assert!(replays.note::<()>(Err(lost)).is_err());
                }
            }
            replays.keep(&shown, before);
            assert!(look(&replays, &shown).is_err());
            assert_eq!(look(&replays, &other).is_ok(), forget);
            replays.empty();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn errors_that_are_answers_drop_nothing() {
        let (replays, record) = (Replays::default(), record("k", 10));
        keep(&replays, &record);
        let missing = StoreError::new(StoreErrorKind::Misconfigured, "no table");
        assert!(replays.note::<()>(Err(missing)).is_err());
        assert!(look(&replays, &record).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_make_room_and_forgotten_ones_count() {
        let replays = Replays::default();
        replays.configure(ReplayCache::default().with_max_bytes(100_000));
        for number in 0..1000 {
            let record = record(&format!("k{number}"), 10_000);
            keep(&replays, &record);
            assert!(look(&replays, &record).is_ok());
            if number % 2 == 0 {
                replays.forget(&record.consumer, &record.key);
            }
            let state = replays.read();
            assert!(state.bytes <= 100_000 && state.by_age.len() < 10, "{}", state.bytes);
            assert!(state.records.len() <= state.by_age.len());
        }
        tokio::time::advance(Duration::from_secs(5)).await;
        keep(&replays, &record("last", 10));
        assert_eq!((replays.read().by_age.len(), replays.read().records.len()), (1, 1));
    }

    #[tokio::test]
    async fn a_cache_that_is_off_keeps_nothing() {
        let (replays, record) = (Replays::default(), record("k", 10));
        keep(&replays, &record);
        replays.configure(ReplayCache::off().with_max_bytes(1).with_time_to_live(Duration::from_secs(1)));
        assert!(look(&replays, &record).is_err());
        keep(&replays, &record);
        assert!(look(&replays, &record).is_err());
    }
}
