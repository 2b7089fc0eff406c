//! How the calls of the stores share statements.

use std::{sync::Arc, time::Duration};

use tower_idempotency::store::{Grouping, Store, conformance::Fixture};

use super::{
    schema::{PooledSchema, Schema},
    sqlite::SqliteFile,
};

/// What `TEST_GROUPS` chooses: `on`, the default, `off`, or `one` for groups of one call each.
///
/// # Panics
///
/// If it is something else.
pub fn grouping() -> Grouping {
    match std::env::var("TEST_GROUPS").as_deref() {
        Err(_) | Ok("on") => Grouping::default(),
        Ok("off") => Grouping::off(),
        Ok("one") => Grouping::with_max_rows(1),
        Ok(other) => panic!("TEST_GROUPS is on, off or one, not {other:?}"),
    }
}

/// A place for records whose stores have this grouping, whatever `TEST_GROUPS` says.
#[derive(Debug)]
pub struct Grouped<P>(pub P, pub Grouping);

#[async_trait::async_trait]
impl Fixture for Grouped<Schema> {
    async fn open(&self) -> Arc<dyn Store> {
        Arc::new(self.0.store().with_grouping(self.1))
    }

    async fn open_with_clock_ahead(&self, _by: Duration) -> Arc<dyn Store> {
        self.open().await
    }
}

#[async_trait::async_trait]
impl Fixture for Grouped<PooledSchema> {
    async fn open(&self) -> Arc<dyn Store> {
        Arc::new(self.0.store().with_grouping(self.1))
    }

    async fn open_with_clock_ahead(&self, _by: Duration) -> Arc<dyn Store> {
        self.open().await
    }
}

#[async_trait::async_trait]
impl Fixture for Grouped<SqliteFile> {
    async fn open(&self) -> Arc<dyn Store> {
        Arc::new(self.0.store().with_grouping(self.1))
    }

    async fn open_with_clock_ahead(&self, _by: Duration) -> Arc<dyn Store> {
        self.open().await
    }
}
