//! A store of somebody else's that keeps records, and neither intents nor requests.

use std::sync::Arc;

use http::Extensions;
use tower_idempotency::{
    MemoryStore,
    store::{Attempt, RecoveryStore, Store, StoreTransaction, TransactionLimits},
};

use crate::support::forward::forward;

#[derive(Debug, Default)]
pub(crate) struct RecordsAlone {
    store: MemoryStore,
}

#[async_trait::async_trait]
impl Store for RecordsAlone {
    forward!(store: prepare claim renew complete release hold get list evict resolve begin_single purge close);

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
}
