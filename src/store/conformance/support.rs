//! Helpers with which the rules are written.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::Barrier,
    task::{JoinError, JoinHandle, JoinSet},
    time::sleep,
};

use super::Fixture;

use crate::{
    consumer::Consumer,
    error::StoreError,
    fingerprint::Fingerprint,
    key::IdempotencyKey,
    store::{Store, recovery::RecoveryStore},
    stored::record::{
        Attempt, Claim, ClaimOutcome, CompleteOutcome, Fenced, Record, RecordFilter, RecordId, RecordState,
        RenewOutcome, Renewal, Resolution, ResolveOutcome,
    },
};

/// A lease or a retention that does not run out.
pub(super) const LONG: Duration = Duration::from_secs(60 * 60);

/// Waits until all that was given one lease of the fixture has run out.
pub(super) async fn run_out(fixture: &dyn Fixture) {
    sleep(fixture.lease() * 5 / 4).await;
}

/// Waits until all that was given no time, or one millisecond, is due.
pub(super) async fn fall_due() {
    sleep(Duration::from_millis(5)).await;
}

/// Makes a claim of a key by a new attempt. Consumer and fingerprint are always the same; lease and
/// retention are long.
pub(super) fn claim_of(key: &str) -> Claim {
    Claim {
        lease: LONG,
        ..Claim::new(Attempt::new(consumer("acme"), key_of(key)), fingerprint("the request"))
    }
}

/// Makes a claim of the same request by another attempt.
pub(super) fn retry_of(claim: &Claim) -> Claim {
    let attempt = Attempt::new(claim.attempt.consumer.clone(), claim.attempt.key.clone());
    Claim { attempt, record_id: RecordId::random(), ..claim.clone() }
}

/// Makes a claim of a different request under the same key.
pub(super) fn other_request(claim: &Claim) -> Claim {
    Claim { fingerprint: fingerprint("another request"), ..retry_of(claim) }
}

pub(super) fn consumer(name: &str) -> Consumer {
    Consumer::new(name).unwrap_or_else(|error| panic!("{name:?}: {error}"))
}

pub(super) fn key_of(key: &str) -> IdempotencyKey {
    IdempotencyKey::new(key).unwrap_or_else(|error| panic!("{key:?}: {error}"))
}

pub(super) fn fingerprint(text: &str) -> Fingerprint {
    Fingerprint::from_bytes(text.as_bytes().to_vec())
}

pub(super) fn response(text: &str) -> Bytes {
    Bytes::from(text.to_owned())
}

/// A store. An error of one of its calls breaks the rule.
#[derive(Clone, Debug)]
pub(super) struct Handle(Arc<dyn Store>);

impl Handle {
    pub(super) fn new(store: Arc<dyn Store>) -> Self {
        Self(store)
    }

    pub(super) fn store(&self) -> &Arc<dyn Store> {
        &self.0
    }

    pub(super) async fn prepare(&self) -> Vec<String> {
        expected(self.0.prepare().await, "prepare")
    }

    pub(super) async fn claim(&self, claim: &Claim) -> ClaimOutcome {
        expected(self.0.claim(claim).await, "claim")
    }

    /// Claims, and must win.
    pub(super) async fn win(&self, claim: &Claim, why: &str) -> (RecordId, u32) {
        match self.claim(claim).await {
            ClaimOutcome::Won { record_id, attempt_number, .. } => (record_id, attempt_number),
            other => panic!("{why}: the claim should have been won and was {other:?}"),
        }
    }

    /// Claims, and must be shown the record that has the key.
    pub(super) async fn be_refused(&self, claim: &Claim, why: &str) -> Record {
        match self.claim(claim).await {
            ClaimOutcome::Exists(record) => *record,
            other => panic!("{why}: the claim should have found the key taken and was {other:?}"),
        }
    }

    /// Wins a key and completes its record.
    pub(super) async fn win_and_complete(&self, claim: &Claim, body: Bytes) {
        self.win(claim, "first claim of a key").await;
        self.complete_as_owner(&claim.attempt, body, "completion by the owner").await;
    }

    pub(super) async fn complete(&self, attempt: &Attempt, body: Bytes) -> CompleteOutcome {
        expected(self.0.complete(attempt, body).await, "complete")
    }

    pub(super) async fn complete_as_owner(&self, attempt: &Attempt, body: Bytes, why: &str) {
        match self.complete(attempt, body).await {
            CompleteOutcome::Completed => {}
            other => panic!("{why}: the completion should have been accepted and was {other:?}"),
        }
    }

    /// Completes, and must be shown the record that is another attempt's.
    pub(super) async fn lose_completion(&self, attempt: &Attempt, why: &str) -> Record {
        match self.complete(attempt, response("of a loser")).await {
            CompleteOutcome::Lost(record) => *record,
            other => panic!("{why}: the completion should have been lost and was {other:?}"),
        }
    }

    pub(super) async fn renew(&self, renewals: &[Renewal]) -> Vec<RenewOutcome> {
        expected(self.0.renew(renewals).await, "renew")
    }

    pub(super) async fn renew_one(&self, attempt: &Attempt, lease: Duration) -> RenewOutcome {
        let outcomes = self.renew(&[Renewal::new(attempt.clone(), lease)]).await;
        assert_eq!(outcomes.len(), 1, "one renewal has one answer, not {outcomes:?}");
        outcomes[0]
    }

    pub(super) async fn release(&self, attempt: &Attempt) -> Fenced {
        expected(self.0.release(attempt).await, "release")
    }

    pub(super) async fn hold(&self, attempt: &Attempt) -> Fenced {
        expected(self.0.hold(attempt).await, "hold")
    }

    /// Wins a key and makes its record held.
    pub(super) async fn win_and_hold(&self, claim: &Claim) {
        self.win(claim, "first claim of a key").await;
        assert_eq!(self.hold(&claim.attempt).await, Fenced::Applied, "the owner could not hold its record");
    }

    pub(super) async fn find(&self, claim: &Claim) -> Option<Record> {
        expected(self.0.get(&claim.attempt.consumer, &claim.attempt.key).await, "get")
    }

    /// Returns the record of a key, which must be there.
    pub(super) async fn get(&self, claim: &Claim, why: &str) -> Record {
        self.find(claim).await.unwrap_or_else(|| panic!("{why}: the record is gone"))
    }

    pub(super) async fn list(&self, filter: RecordFilter, limit: u32) -> Vec<Record> {
        expected(self.0.list(filter, limit).await, "list")
    }

    pub(super) async fn keys_listed(&self, filter: RecordFilter, limit: u32) -> Vec<String> {
        self.list(filter, limit).await.iter().map(|record| record.key.as_str().to_owned()).collect()
    }

    pub(super) async fn evict(&self, claim: &Claim) -> bool {
        expected(self.0.evict(&claim.attempt.consumer, &claim.attempt.key).await, "evict")
    }

    pub(super) async fn resolve(&self, claim: &Claim, resolution: Resolution) -> ResolveOutcome {
        let Attempt { consumer, key, .. } = &claim.attempt;
        expected(self.0.resolve(consumer, key, resolution).await, "resolve")
    }

    pub(super) async fn purge(&self, limit: u32) -> u64 {
        expected(self.0.purge(limit).await, "purge")
    }
}

/// A store with its part for recovery. An error of one of its calls breaks the rule.
#[derive(Clone, Debug)]
pub(super) struct Recovery {
    pub(super) store: Handle,
    pub(super) inner: Arc<dyn RecoveryStore>,
}

impl Recovery {
    /// Returns `None` if the store keeps nothing for recovery.
    pub(super) async fn of(fixture: &dyn Fixture) -> Option<Self> {
        let store = handle(fixture).await;
        let inner = store.store().recovery()?;
        Some(Self { store, inner })
    }

    pub(super) async fn purge_settled(&self, retention: Duration, limit: u32) -> u64 {
        expected(self.inner.purge_settled(retention, limit).await, "purge_settled")
    }
}

pub(super) fn expected<T>(result: Result<T, StoreError>, call: &str) -> T {
    result.unwrap_or_else(|error| panic!("{call} failed: {error} ({error:?})"))
}

/// Claims, and returns the attempt number if the claim is won.
pub(super) async fn wins(store: Handle, claim: Claim) -> Option<u32> {
    match store.claim(&claim).await {
        ClaimOutcome::Won { attempt_number, .. } => Some(attempt_number),
        ClaimOutcome::Exists(_) | ClaimOutcome::Contended => None,
    }
}

/// Returns the record with an empty lease, because the rest of a lease changes with time.
pub(super) fn but_for_the_lease(record: Record) -> Record {
    let state = match record.state {
        RecordState::InProgress { .. } => RecordState::in_progress(Duration::ZERO),
        state @ (RecordState::Held | RecordState::Completed { .. }) => state,
    };
    Record { state, ..record }
}

/// Returns the rest of the lease of a record that must be in progress.
pub(super) fn lease_of(record: &Record) -> Duration {
    match &record.state {
        RecordState::InProgress { lease_remaining } => *lease_remaining,
        other => panic!("the record should be in progress and is {other:?}"),
    }
}

/// Returns the response of a record that must be completed.
pub(super) fn response_of(record: &Record) -> &Bytes {
    match &record.state {
        RecordState::Completed { response } => response,
        other => panic!("the record should be completed and is {other:?}"),
    }
}

/// Runs tasks simultaneously and returns their results. A panic of one is a panic of the rule.
pub(super) async fn at_once<T, F>(tasks: impl IntoIterator<Item = F>) -> Vec<T>
where
    F: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    let mut set: JoinSet<T> = tasks.into_iter().collect();
    let mut results = Vec::new();
    while let Some(joined) = set.join_next().await {
        results.push(unless_it_panicked(joined));
    }
    results
}

/// Runs two calls simultaneously and returns their results. The call that reaches the barrier last
/// has a head start; the round decides which call that is.
pub(super) async fn both_at_once<L, R>(round: usize, left: L, right: R) -> (L::Output, R::Output)
where
    L: Future<Output: Send> + Send + 'static,
    R: Future<Output: Send> + Send + 'static,
{
    let barrier = Arc::new(Barrier::new(2));
    if round.is_multiple_of(2) {
        let (left, right) = (spawn_behind(&barrier, left), spawn_behind(&barrier, right));
        (finished(left).await, finished(right).await)
    } else {
        let (right, left) = (spawn_behind(&barrier, right), spawn_behind(&barrier, left));
        (finished(left).await, finished(right).await)
    }
}

fn spawn_behind<F>(barrier: &Arc<Barrier>, call: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    let barrier = Arc::clone(barrier);
    tokio::spawn(async move {
        barrier.wait().await;
        call.await
    })
}

/// Returns the result of a spawned task. Its panic is a panic of the rule.
pub(super) async fn finished<T>(task: JoinHandle<T>) -> T {
    unless_it_panicked(task.await)
}

fn unless_it_panicked<T>(joined: Result<T, JoinError>) -> T {
    match joined.map_err(JoinError::try_into_panic) {
        Ok(result) => result,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        Err(Err(error)) => panic!("a task of the rule ended early: {error}"),
    }
}

/// Opens two handles to the storage, like two processes.
pub(super) async fn two_handles(fixture: &dyn Fixture) -> [Handle; 2] {
    [Handle::new(fixture.open().await), Handle::new(fixture.open().await)]
}

/// Opens one handle to the storage.
pub(super) async fn handle(fixture: &dyn Fixture) -> Handle {
    Handle::new(fixture.open().await)
}
