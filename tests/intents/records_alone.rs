//! A store of somebody else's that keeps records, and neither intents nor requests.

use std::sync::Arc;

use bytes::Bytes;
use http::Extensions;
use tower_idempotency::{
    MemoryStore, StoreError,
    store::{
        Attempt, Claim, ClaimOutcome, CompleteOutcome, RecoveryStore, RenewOutcome, Renewal, Store,
        StoreTransaction, TransactionLimits,
    },
};

use crate::support::forward::forward_store;

#[derive(Debug, Default)]
pub(crate) struct RecordsAlone {
    store: MemoryStore,
}

#[async_trait::async_trait]
impl Store for RecordsAlone {
    forward_store!(store);

    async fn claim(&self, claim: &Claim) -> Result<ClaimOutcome, StoreError> {
        self.store.claim(claim).await
    }

    async fn renew(&self, renewals: &[Renewal]) -> Result<Vec<RenewOutcome>, StoreError> {
        self.store.renew(renewals).await
    }

    async fn complete(&self, attempt: &Attempt, response: Bytes) -> Result<CompleteOutcome, StoreError> {
        self.store.complete(attempt, response).await
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
        self.store.purge(limit).await
    }
}
