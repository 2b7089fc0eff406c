//! Named points of an attempt at which its process kills or freezes itself.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use http::Extensions;
use rustix::process::{Signal, getpid, kill_process};
use tower_idempotency::{
    IdempotencyKey, StoreError,
    store::{
        Attempt, BeginOutcome, Claim, ClaimOutcome, CompleteOutcome, Fenced, OpenOutcome, Opening, Record,
        RecoveryStore, SingleTransaction, Store, StoreTransaction, TransactionError, TransactionLimits,
        TransactionUsage,
    },
};

use crate::support::forward::forward;

/// A point of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Point {
    /// The claim is won, and nobody was told.
    Claimed,
    /// The handler was called and has no transaction yet.
    Entered,
    /// The first of two phases has written, and is not committed.
    Reserving,
    /// The first of two phases is finished.
    Reserved,
    /// The intent is about to be opened.
    Opening,
    /// The intent is committed, and the upstream was not called.
    Opened,
    /// The upstream has answered, which nobody has recorded.
    Answered,
    /// What the upstream has answered is recorded.
    Finalized,
    /// The second of two phases has written, and is not committed.
    Paying,
    /// The second of two phases is finished.
    Paid,
    /// The transaction has begun.
    Begun,
    /// The handler has written.
    Written,
    /// The handler has returned; the record is not completed yet.
    Returned,
    /// The record is completed in the transaction, which is not committed.
    Completed,
    /// The record is completed for good, and nobody was told.
    Committed,
}

impl Point {
    pub const ALL: [Self; 15] = [
        Self::Claimed,
        Self::Entered,
        Self::Reserving,
        Self::Reserved,
        Self::Opening,
        Self::Opened,
        Self::Answered,
        Self::Finalized,
        Self::Paying,
        Self::Paid,
        Self::Begun,
        Self::Written,
        Self::Returned,
        Self::Completed,
        Self::Committed,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Claimed => "claimed",
            Self::Entered => "entered",
            Self::Reserving => "reserving",
            Self::Reserved => "reserved",
            Self::Opening => "opening",
            Self::Opened => "opened",
            Self::Answered => "answered",
            Self::Finalized => "finalized",
            Self::Paying => "paying",
            Self::Paid => "paid",
            Self::Begun => "begun",
            Self::Written => "written",
            Self::Returned => "returned",
            Self::Completed => "completed",
            Self::Committed => "committed",
        }
    }

    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|point| point.name() == name)
    }
}

/// What happens to this process where. Clones share everything.
#[derive(Clone, Debug, Default)]
pub struct Trap {
    set: Arc<Mutex<HashMap<String, (Point, Signal)>>>,
    at_commit: Arc<AtomicBool>,
}

impl Trap {
    /// When the attempt with this key reaches the point, the process sends itself the signal, once.
    pub fn set(&self, key: &str, point: Point, signal: Signal) {
        self.lock().insert(key.to_owned(), (point, signal));
    }

    pub fn reach(&self, key: &str, point: Point) {
        if self.is_set(key, point)
            && let Some((_, signal)) = self.lock().remove(key)
        {
            send(signal);
        }
    }

    /// For a hook that the database calls when it commits.
    pub fn reach_commit(&self) {
        if self.at_commit.load(Ordering::SeqCst) {
            send(Signal::KILL);
        }
    }

    pub fn is_set(&self, key: &str, point: Point) -> bool {
        self.lock().get(key).is_some_and(|(set, _)| *set == point)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, (Point, Signal)>> {
        self.set.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn send(signal: Signal) {
    kill_process(getpid(), signal).expect("a process can signal itself");
}

/// A store, or a transaction of it, whose attempts step into a trap.
#[derive(Debug)]
pub struct Trapped<T> {
    inner: T,
    trap: Trap,
}

impl<T> Trapped<T> {
    pub fn new(inner: T, trap: Trap) -> Self {
        Self { inner, trap }
    }
}

#[async_trait::async_trait]
impl<S: Store> Store for Trapped<S> {
    forward!(inner: prepare renew release hold get list evict resolve purge close);

    async fn claim(&self, claim: &Claim) -> Result<ClaimOutcome, StoreError> {
        let outcome = self.inner.claim(claim).await;
        if matches!(outcome, Ok(ClaimOutcome::Won { .. })) {
            self.trap.reach(claim.attempt.key.as_str(), Point::Claimed);
        }
        outcome
    }

    async fn complete(&self, attempt: &Attempt, response: Bytes) -> Result<CompleteOutcome, StoreError> {
        self.trap.reach(attempt.key.as_str(), Point::Returned);
        let outcome = self.inner.complete(attempt, response).await;
        if matches!(outcome, Ok(CompleteOutcome::Completed)) {
            self.trap.reach(attempt.key.as_str(), Point::Committed);
        }
        outcome
    }

    fn transaction(
        &self,
        attempt: &Attempt,
        limits: &TransactionLimits,
        extensions: &mut Extensions,
    ) -> Option<Arc<dyn StoreTransaction>> {
        let inner = self.inner.transaction(attempt, limits, extensions)?;
        Some(Arc::new(Trapped::new((inner, attempt.key.clone()), self.trap.clone())))
    }

    async fn begin_single(
        &self,
        claim: &Claim,
        limits: &TransactionLimits,
    ) -> Result<BeginOutcome, StoreError> {
        let outcome = self.inner.begin_single(claim, limits).await?;
        let BeginOutcome::Begun { transaction, extensions, .. } = outcome else { return Ok(outcome) };
        self.trap.reach(claim.attempt.key.as_str(), Point::Claimed);
        let trapped = Trapped::new((transaction, claim.attempt.key.clone()), self.trap.clone());
        Ok(BeginOutcome::begun(Arc::new(trapped), extensions))
    }

    fn recovery(&self) -> Option<Arc<dyn RecoveryStore>> {
        Some(Arc::new(Trapped::new(self.inner.recovery()?, self.trap.clone())))
    }
}

#[async_trait::async_trait]
impl RecoveryStore for Trapped<Arc<dyn RecoveryStore>> {
    forward!(inner:
        update_intent take_dangling count_overlooked get_intent list_intents count_intents
        find_phase keep_request retain_record take_abandoned update_request
        list_requests purge_settled
    );

    async fn open_intent(&self, opening: &Opening) -> Result<OpenOutcome, StoreError> {
        self.trap.reach(opening.attempt.key.as_str(), Point::Opening);
        self.inner.open_intent(opening).await
    }
}

#[async_trait::async_trait]
impl<T: StoreTransaction + ?Sized> StoreTransaction for Trapped<(Arc<T>, IdempotencyKey)> {
    fn usage(&self) -> TransactionUsage {
        self.inner.0.usage()
    }

    async fn overdue(&self) {
        self.inner.0.overdue().await;
    }

    async fn commit(&self, response: Bytes) -> Result<(), TransactionError> {
        let (transaction, key) = &self.inner;
        self.trap.reach(key.as_str(), Point::Returned);
        if self.trap.is_set(key.as_str(), Point::Completed) {
            self.trap.at_commit.store(true, Ordering::SeqCst);
        }
        transaction.commit(response).await?;
        self.trap.reach(key.as_str(), Point::Committed);
        Ok(())
    }

    async fn roll_back(&self) -> Result<(), TransactionError> {
        self.inner.0.roll_back().await
    }
}

#[async_trait::async_trait]
impl SingleTransaction for Trapped<(Arc<dyn SingleTransaction>, IdempotencyKey)> {
    async fn complete(&self, response: Bytes) -> Result<(), TransactionError> {
        self.inner.0.complete(response).await
    }

    async fn outcome(&self) -> Result<Option<Record>, StoreError> {
        self.inner.0.outcome().await
    }

    async fn hold(&self) -> Result<Fenced, StoreError> {
        self.inner.0.hold().await
    }
}
