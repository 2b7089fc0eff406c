//! A store that counts what it is asked, and fails where it is told to.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use tokio::sync::watch;
use tower_idempotency::{
    StoreError,
    store::{Attempt, Claim, ClaimOutcome, CompleteOutcome, RenewOutcome, Renewal, Store, StoreErrorKind},
};

use super::forward::forward;

/// A store behind which another one works. Clones share everything.
#[derive(Clone, Debug)]
pub struct Watched<S> {
    store: S,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    renewals: AtomicUsize,
    most_purged: AtomicU64,
    renewals_fail: AtomicBool,
    completions_fail: AtomicBool,
    completions_hang: watch::Sender<bool>,
    slow_claims: watch::Sender<bool>,
    late_claims: AtomicBool,
    next_renewal_hangs: AtomicBool,
}

impl<S: Store + Clone> Watched<S> {
    pub fn new(store: S) -> Self {
        Self { store, state: Arc::default() }
    }

    /// How often leases were renewed, however many at once.
    pub fn renewals(&self) -> usize {
        self.state.renewals.load(Ordering::SeqCst)
    }

    /// How many records the largest purge has deleted.
    pub fn most_purged(&self) -> u64 {
        self.state.most_purged.load(Ordering::SeqCst)
    }

    /// Whether renewals fail, as if the store could not be reached.
    pub fn fail_renewals(&self, fail: bool) {
        self.state.renewals_fail.store(fail, Ordering::SeqCst);
    }

    /// Whether completions fail, as if the store could not be reached.
    pub fn fail_completions(&self, fail: bool) {
        self.state.completions_fail.store(fail, Ordering::SeqCst);
    }

    /// Whether completions wait before they are carried out, as if their connection did not answer.
    pub fn hang_completions(&self, hang: bool) {
        self.state.completions_hang.send_replace(hang);
    }

    /// Whether the answers of claims wait after those were carried out.
    pub fn hold_claims(&self, hold: bool) {
        self.state.slow_claims.send_replace(hold);
    }

    /// Whether claims fail as if their connection broke, and are carried out half a second later all the same.
    pub fn delay_claims(&self, delay: bool) {
        self.state.late_claims.store(delay, Ordering::SeqCst);
    }

    /// The next renewal is never answered, as if its connection were dead.
    pub fn hang_next_renewal(&self) {
        self.state.next_renewal_hangs.store(true, Ordering::SeqCst);
    }

    /// Whether that has happened.
    pub fn renewal_hangs(&self) -> bool {
        !self.state.next_renewal_hangs.load(Ordering::SeqCst)
    }
}

#[async_trait::async_trait]
impl<S: Store + Clone> Store for Watched<S> {
    forward!(store: prepare release hold get list evict resolve transaction begin_single recovery close);

    async fn claim(&self, claim: &Claim) -> Result<ClaimOutcome, StoreError> {
        if self.state.late_claims.load(Ordering::SeqCst) {
            let (store, claim) = (self.store.clone(), claim.clone());
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(500)).await;
                store.claim(&claim).await
            });
            return Err(StoreError::new(StoreErrorKind::Ambiguous, "told to be late"));
        }
        let outcome = self.store.claim(claim).await;
        let _ = self.state.slow_claims.subscribe().wait_for(|slow| !slow).await;
        outcome
    }

    async fn renew(&self, renewals: &[Renewal]) -> Result<Vec<RenewOutcome>, StoreError> {
        self.state.renewals.fetch_add(1, Ordering::SeqCst);
        if self.state.next_renewal_hangs.swap(false, Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        if self.state.renewals_fail.load(Ordering::SeqCst) {
            return Err(StoreError::new(StoreErrorKind::Unavailable, "told to fail"));
        }
        self.store.renew(renewals).await
    }

    async fn complete(&self, attempt: &Attempt, response: Bytes) -> Result<CompleteOutcome, StoreError> {
        if self.state.completions_fail.load(Ordering::SeqCst) {
            return Err(StoreError::new(
                StoreErrorKind::Misconfigured,
                "read-only for a while, as in a failover",
            ));
        }
        let _ = self.state.completions_hang.subscribe().wait_for(|hang| !hang).await;
        self.store.complete(attempt, response).await
    }

    async fn purge(&self, limit: u32) -> Result<u64, StoreError> {
        let purged = self.store.purge(limit).await?;
        self.state.most_purged.fetch_max(purged, Ordering::SeqCst);
        Ok(purged)
    }
}
