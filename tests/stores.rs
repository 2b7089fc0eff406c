//! The conformance suite, for every store and every mode of a store.

use std::{sync::Arc, time::Duration};

use tower_idempotency::{MemoryStore, Store, conformance_tests, store::conformance::Fixture};

#[derive(Debug, Default)]
struct Memory(MemoryStore);

#[async_trait::async_trait]
impl Fixture for Memory {
    async fn open(&self) -> Arc<dyn Store> {
        Arc::new(self.0.clone())
    }

    async fn open_with_clock_ahead(&self, _by: Duration) -> Arc<dyn Store> {
        self.open().await
    }
}

conformance_tests!(memory, Memory::default());
