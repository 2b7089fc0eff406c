//! What is wrong with the records.

use std::sync::Arc;

use tower_idempotency::{
    Consumer, IdempotencyKey, StoreError,
    store::{Attempt, Claim, ClaimOutcome, Fenced, RecoveryStore, RenewOutcome, Renewal, Store},
};

use super::{Faulty, RecoveryFault};
use crate::support::forward::forward;

#[async_trait::async_trait]
impl Store for Faulty {
    forward!(inner: prepare complete hold get list resolve transaction begin_single close);

    async fn claim(&self, claim: &Claim) -> Result<ClaimOutcome, StoreError> {
        let forget = "UPDATE idempotency_records SET repeatable_until = NULL, unresolved = 0";
        self.spoil(RecoveryFault::OpenIntentsDoNotHold, forget).await;
        self.inner.claim(claim).await
    }

    async fn renew(&self, renewals: &[Renewal]) -> Result<Vec<RenewOutcome>, StoreError> {
        let renewed = self.inner.renew(renewals).await;
        // Four and a half leases of the fixture, which is the retention of the rule.
        let expired = "UPDATE idempotency_records SET expires_at = created_at + 4500";
        self.spoil(RecoveryFault::RenewalKeepsTheExpiry, expired).await;
        renewed
    }

    async fn release(&self, attempt: &Attempt) -> Result<Fenced, StoreError> {
        self.spoil(RecoveryFault::ReleaseDeletes, "UPDATE idempotency_records SET kept = FALSE").await;
        self.inner.release(attempt).await
    }

    async fn evict(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<bool, StoreError> {
        self.spoil(RecoveryFault::EvictionTakesIntentsAlong, "DELETE FROM idempotency_intents").await;
        self.inner.evict(consumer, key).await
    }

    fn recovery(&self) -> Option<Arc<dyn RecoveryStore>> {
        Some(Arc::new(self.clone()))
    }

    async fn purge(&self, limit: u32) -> Result<u64, StoreError> {
        let forget = "UPDATE idempotency_records SET repeatable_until = NULL, unresolved = 0";
        self.spoil(RecoveryFault::PurgeDeletesUnresolved, forget).await;
        self.inner.purge(limit).await
    }
}
