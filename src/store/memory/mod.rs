//! The in-process store, which is also the executable specification of the contract.

mod entry;
mod intents;
mod records;
mod recovery;
mod requests;
mod shard;
mod shards;

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use self::shards::Shards;
use crate::error::{StoreError, StoreErrorKind};

/// Keeps records, intents and requests in this process. Made for tests, and for tools that run as a
/// single process.
///
/// All data is lost with the process, and no other process sees it. A clone is another handle to
/// the same records.
///
/// The store has no transactions: `Tx` and `phase` are refused as `store-misconfigured`. All else
/// works as with a database: [intents](crate::Idempotency::intent),
/// [`IntentLog`](crate::IntentLog), [`Reconciler`](crate::Reconciler) and
/// [`Completer`](crate::recovery::Completer).
///
/// The store never drops data that it must keep. When it is full, it first forgets settled intents
/// whose record is gone. If that does not help, a claim of a new key is
/// [`Unavailable`](StoreErrorKind::Unavailable), and the layer answers 503. Stored responses are
/// still replayed.
///
/// Time is tokio's. In a test with a paused clock, leases run out and records expire when the test
/// advances the clock.
///
/// ```
/// # use tower_idempotency::MemoryStore;
/// let store = MemoryStore::new().with_max_records(10_000).with_max_bytes(64 * 1024 * 1024);
/// # let _ = store;
/// ```
#[derive(Clone)]
pub struct MemoryStore {
    shards: Arc<Shards>,
    max_records: usize,
    max_bytes: usize,
}

impl MemoryStore {
    /// Makes an empty store with the default limits.
    #[must_use]
    pub fn new() -> Self {
        Self { shards: Arc::default(), max_records: DEFAULT_MAX_RECORDS, max_bytes: DEFAULT_MAX_BYTES }
    }

    /// Sets the number of records, intents and kept requests, counted together, up to which this
    /// handle lets the store grow. Default: 100,000.
    ///
    /// The limit is checked when a key is claimed. The intents and the request of a claimed record
    /// are always kept.
    #[must_use]
    pub fn with_max_records(mut self, max_records: usize) -> Self {
        self.max_records = max_records;
        self
    }

    /// Sets the number of bytes, of stored responses, kept requests and payloads of intents, up to
    /// which this handle lets the store grow. Default: 256 MiB.
    ///
    /// The limit is checked when a key is claimed, because the response of a finished handler must
    /// be stored. So requests that are in flight at that moment may exceed the limit.
    #[must_use]
    pub fn with_max_bytes(mut self, max_bytes: usize) -> Self {
        self.max_bytes = max_bytes;
        self
    }

    fn full(&self) -> Option<StoreError> {
        let items = self.shards.stored.items.load(Ordering::Relaxed);
        let bytes = self.shards.stored.bytes.load(Ordering::Relaxed);
        (items >= self.max_records || bytes >= self.max_bytes).then(|| {
            let message =
                format!("the memory store is full: {items} records, intents and requests, {bytes} bytes");
            StoreError::new(StoreErrorKind::Unavailable, message)
        })
    }

    /// Forgets data that may be forgotten, if the store is full.
    fn make_room(&self) {
        if self.full().is_some() {
            let (now, stored) = (self.shards.now(), &self.shards.stored);
            self.shards.purge(PURGED_WHEN_FULL, |shard, left| shard.purge(left, stored));
            self.shards.purge(PURGED_WHEN_FULL, |shard, left| {
                shard.purge_intents(left, Duration::ZERO, now, stored)
            });
            self.shards.purge(PURGED_WHEN_FULL, |shard, left| shard.purge_requests(left, stored));
        }
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

/// Shows how much is stored, and none of the data.
impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStore")
            .field("items", &self.shards.stored.items)
            .field("bytes", &self.shards.stored.bytes)
            .finish_non_exhaustive()
    }
}

const DEFAULT_MAX_RECORDS: usize = 100_000;
const DEFAULT_MAX_BYTES: usize = 256 * 1024 * 1024;
const PURGED_WHEN_FULL: u32 = 64;

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::{
        consumer::Consumer,
        fingerprint::Fingerprint,
        key::IdempotencyKey,
        store::{Store, recovery::RecoveryStore},
        stored::{
            intent::{IntentFence, IntentUpdate, OpenOutcome, Opening, Resource},
            record::{Attempt, Claim, ClaimOutcome, Fenced, RenewOutcome, Renewal},
        },
    };

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
        assert_eq!(format!("{store:?}"), "MemoryStore { items: 1, bytes: 0, .. }");
    }

    /// Makes a record with an intent, finalized or open. The upstream recognizes its key for a
    /// minute.
    async fn with_intent(store: &MemoryStore, key: &str, finalized: bool) -> (Claim, Opening) {
        let claim = claim(key);
        assert!(is_won(store, &claim).await);
        let mut opening = Opening::first(claim.attempt.clone(), claim.record_id, "transfer");
        opening.repeatable_for = Duration::from_secs(60);
        opening.dangling_after = Duration::from_secs(60);
        assert!(matches!(store.open_intent(&opening).await.unwrap(), OpenOutcome::Opened));
        if finalized {
            let (fence, resource) =
                (IntentFence::Call(opening.call), Resource::new("tr_1").with_payload([0; 10].as_slice()));
            let update = IntentUpdate::Finalize(resource);
            store.update_intent(opening.upstream_key, fence, &update, None).await.unwrap();
        }
        (claim, opening)
    }

    async fn evict(store: &MemoryStore, claim: &Claim) {
        assert!(store.evict(&claim.attempt.consumer, &claim.attempt.key).await.unwrap());
    }

    #[tokio::test]
    async fn intents_and_requests_are_counted_until_they_are_gone() {
        let store = MemoryStore::new();
        let (claim, _) = with_intent(&store, "a", true).await;
        let request = Bytes::from_static(&[0; 7]);
        for _ in 0..2 {
            store.keep_request(&claim.attempt, claim.record_id, &request, Duration::ZERO).await.unwrap();
        }
        assert_eq!(format!("{store:?}"), "MemoryStore { items: 3, bytes: 17, .. }");
        evict(&store, &claim).await;
        assert_eq!(format!("{store:?}"), "MemoryStore { items: 2, bytes: 17, .. }");
        assert_eq!(store.purge_settled(Duration::ZERO, 10).await.unwrap(), 2);
        assert_eq!(format!("{store:?}"), "MemoryStore { items: 0, bytes: 0, .. }");
    }

    #[tokio::test]
    async fn a_full_store_forgets_settled_intents_whose_record_has_gone_and_no_others() {
        let store = MemoryStore::new().with_max_records(4);
        let (gone, settled) = with_intent(&store, "a", true).await;
        let (_, open) = with_intent(&store, "b", false).await;
        assert_eq!(store.claim(&claim("c")).await.unwrap_err().kind(), StoreErrorKind::Unavailable);
        evict(&store, &gone).await;
        assert!(is_won(&store, &claim("c")).await);
        assert!(store.get_intent(settled.upstream_key).await.unwrap().is_some(), "there was room");
        assert!(is_won(&store, &claim("d")).await);
        assert!(store.get_intent(settled.upstream_key).await.unwrap().is_none());
        assert!(store.claim(&claim("e")).await.is_err());
        assert!(store.get_intent(open.upstream_key).await.unwrap().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_paused_clock_lets_an_upstream_forget_a_key() {
        let store = MemoryStore::new();
        let (first, open) = with_intent(&store, "a", false).await;
        let names = [open.name.clone()];
        tokio::time::advance(Duration::from_secs(59)).await;
        let shown = store.get_intent(open.upstream_key).await.unwrap().unwrap();
        assert_eq!((shown.age, shown.dangling), (Duration::from_secs(59), false));
        assert_eq!(store.take_dangling(&names, 10, Duration::ZERO).await.unwrap(), []);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!is_won(&store, &claim("a")).await, "it may not be called again");
        let [taken] = &store.take_dangling(&names, 10, Duration::ZERO).await.unwrap()[..] else {
            panic!("it dangles")
        };
        let (key, fence) = (taken.upstream_key, taken.lookup_fence());
        let settled = store.update_intent(key, fence, &IntentUpdate::Absent(None), None).await.unwrap();
        assert_eq!(settled, Fenced::Applied);
        let ClaimOutcome::Won { record_id, attempt_number, .. } = store.claim(&claim("a")).await.unwrap()
        else {
            panic!("it is settled");
        };
        assert_eq!((record_id, attempt_number), (first.record_id, 2));
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
        assert_eq!(store.shards.stored.items.load(Ordering::Relaxed), 1);
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
    async fn an_intent_under_a_lease_that_outlives_the_expiry_is_not_forgotten() {
        let store = MemoryStore::new();
        let minute = Duration::from_secs(60);
        let first = Claim { retention: minute * 2, lease: minute, ..claim("a") };
        assert!(is_won(&store, &first).await);
        tokio::time::advance(minute * 3 / 2).await;
        store.renew(&[Renewal::new(first.attempt.clone(), minute)]).await.unwrap();
        let opening = Opening::first(first.attempt.clone(), first.record_id, "transfer");
        store.open_intent(&opening).await.unwrap();
        let (fence, update) =
            (IntentFence::Call(opening.call), IntentUpdate::Finalize(Resource::new("tr_1")));
        store.update_intent(opening.upstream_key, fence, &update, None).await.unwrap();
        tokio::time::advance(minute).await;
        let outcome = store.claim(&claim("a")).await.unwrap();
        assert!(matches!(outcome, ClaimOutcome::Won { attempt_number: 2, .. }), "{outcome:?}");
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
}
