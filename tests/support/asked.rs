//! A store that counts its claims, and answers them when and as it is told to.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::watch;
use tower_idempotency::{
    StoreError,
    store::{Claim, ClaimOutcome, Store, StoreErrorKind},
};

use super::forward::forward;

/// A memory store or another behind this one. Clones share everything.
#[derive(Clone, Debug)]
pub struct Asked {
    store: Arc<dyn Store>,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    claims: watch::Sender<usize>,
    held: watch::Sender<bool>,
    failing: AtomicUsize,
    panicking: AtomicUsize,
}

impl Asked {
    pub fn new(store: impl Store) -> Self {
        Self { store: Arc::new(store), state: Arc::default() }
    }

    /// How often a claim was asked for.
    pub fn claims(&self) -> usize {
        *self.state.claims.borrow()
    }

    /// Waits until that many claims were asked for.
    pub async fn until_claims(&self, claims: usize) {
        self.state.claims.subscribe().wait_for(|asked| *asked >= claims).await.unwrap();
    }

    /// Claims that were carried out, and those to come, wait with their answers.
    pub fn hold_answers(&self, hold: bool) {
        self.state.held.send_replace(hold);
    }

    /// The answers of that many claims from now on are that the store cannot be reached.
    pub fn fail_next(&self, claims: usize) {
        self.state.failing.store(claims, Ordering::SeqCst);
    }

    /// The next claim panics.
    pub fn panic_next(&self) {
        self.state.panicking.store(1, Ordering::SeqCst);
    }

    /// The store behind.
    pub fn behind(&self) -> &dyn Store {
        &*self.store
    }
}

fn take(left: &AtomicUsize) -> bool {
    left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

#[async_trait::async_trait]
impl Store for Asked {
    forward!(store: prepare renew complete release hold get list evict resolve transaction begin_single recovery purge close);

    async fn claim(&self, claim: &Claim) -> Result<ClaimOutcome, StoreError> {
        self.state.claims.send_modify(|claims| *claims += 1);
        let fails = take(&self.state.failing);
        let outcome = match fails {
            true => Err(StoreError::new(StoreErrorKind::Unavailable, "away")),
            false => self.store.claim(claim).await,
        };
        let _ = self.state.held.subscribe().wait_for(|held| !held).await;
        assert!(!take(&self.state.panicking), "the store panics");
        outcome
    }
}
