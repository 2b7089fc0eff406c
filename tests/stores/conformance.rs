//! The conformance suite, for every store and every mode of a store.

use std::{io, sync::Arc, time::Duration};

use tokio::runtime::{Builder, Runtime};
use tower_idempotency::{
    MemoryStore, conformance_tests,
    store::{Grouping, Store, conformance::Fixture},
};

use crate::support::{
    grouping::Grouped,
    schema::{PooledSchema, Schema},
    sqlite::SqliteFile,
};

/// A memory store whose tests run under a paused clock.
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

    fn runtime() -> io::Result<Runtime> {
        Builder::new_current_thread().enable_all().start_paused(true).build()
    }
}

/// A memory store whose calls race on several threads.
#[derive(Debug, Default)]
struct MemoryOnThreads(Memory);

#[async_trait::async_trait]
impl Fixture for MemoryOnThreads {
    async fn open(&self) -> Arc<dyn Store> {
        self.0.open().await
    }

    async fn open_with_clock_ahead(&self, by: Duration) -> Arc<dyn Store> {
        self.0.open_with_clock_ahead(by).await
    }
}

/// Without this the rules of the suite for intents and kept requests would check nothing.
#[test]
fn memory_keeps_intents() {
    assert!(MemoryStore::new().recovery().is_some());
}

conformance_tests!(memory, Memory::default());
conformance_tests!(memory_on_threads, MemoryOnThreads::default());
conformance_tests!(sqlite, SqliteFile::new());
conformance_tests!(postgres, Schema::create().await, #[ignore = "needs PostgreSQL: run scripts/test"]);
conformance_tests!(pgbouncer, PooledSchema::create().await, #[ignore = "needs PostgreSQL: run scripts/test"]);

conformance_tests!(sqlite_ungrouped, Grouped(SqliteFile::new(), Grouping::off()));
conformance_tests!(sqlite_in_groups_of_one, Grouped(SqliteFile::new(), Grouping::with_max_rows(1)));
conformance_tests!(
    postgres_ungrouped,
    Grouped(Schema::create().await, Grouping::off()),
    #[ignore = "needs PostgreSQL: run scripts/test"]
);
conformance_tests!(
    postgres_in_groups_of_one,
    Grouped(Schema::create().await, Grouping::with_max_rows(1)),
    #[ignore = "needs PostgreSQL: run scripts/test"]
);
conformance_tests!(
    pgbouncer_in_groups_of_one,
    Grouped(PooledSchema::create().await, Grouping::with_max_rows(1)),
    #[ignore = "needs PostgreSQL: run scripts/test"]
);
