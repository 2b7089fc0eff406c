//! What is wrong with the records.

use std::sync::Arc;

use bytes::Bytes;
use http::Extensions;
use tower_idempotency::{
    Consumer, IdempotencyKey, StoreError,
    store::{
        Attempt, Claim, ClaimOutcome, CompleteOutcome, Fenced, Record, RecordFilter, RecoveryStore,
        RenewOutcome, Renewal, Resolution, ResolveOutcome, Store, StoreTransaction, TransactionLimits,
    },
};

use super::{Faulty, RecoveryFault};

#[async_trait::async_trait]
impl Store for Faulty {
    async fn prepare(&self) -> Result<Vec<String>, StoreError> {
        self.inner.prepare().await
    }

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

    async fn complete(&self, attempt: &Attempt, response: Bytes) -> Result<CompleteOutcome, StoreError> {
        self.inner.complete(attempt, response).await
    }

    async fn release(&self, attempt: &Attempt) -> Result<Fenced, StoreError> {
        self.spoil(RecoveryFault::ReleaseDeletes, "UPDATE idempotency_records SET kept = FALSE").await;
        self.inner.release(attempt).await
    }

    async fn hold(&self, attempt: &Attempt) -> Result<Fenced, StoreError> {
        self.inner.hold(attempt).await
    }

    async fn get(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<Option<Record>, StoreError> {
        self.inner.get(consumer, key).await
    }

    async fn list(&self, filter: RecordFilter, limit: u32) -> Result<Vec<Record>, StoreError> {
        self.inner.list(filter, limit).await
    }

    async fn evict(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<bool, StoreError> {
        self.spoil(RecoveryFault::EvictionTakesIntentsAlong, "DELETE FROM idempotency_intents").await;
        self.inner.evict(consumer, key).await
    }

    async fn resolve(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        resolution: Resolution,
    ) -> Result<ResolveOutcome, StoreError> {
        self.inner.resolve(consumer, key, resolution).await
    }

    fn transaction(
        &self,
        attempt: &Attempt,
        limits: &TransactionLimits,
        extensions: &mut Extensions,
    ) -> Option<Arc<dyn StoreTransaction>> {
        self.inner.transaction(attempt, limits, extensions)
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
