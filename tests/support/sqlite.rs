//! SQLite databases of one test each.

use std::{sync::Arc, time::Duration};

use sqlx::{
    SqlitePool,
    sqlite::{SqliteConnectOptions, SqlitePoolOptions},
};
use tempfile::TempDir;
use tower_idempotency::{
    SqliteStore,
    store::{Store, conformance::Fixture},
};

use super::{grouping::grouping, wait_for};

/// A database file that goes away with the test.
#[derive(Debug)]
pub struct SqliteFile(TempDir);

impl SqliteFile {
    pub fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub fn options(&self) -> SqliteConnectOptions {
        SqliteConnectOptions::new().filename(self.0.path().join("test.db")).create_if_missing(true)
    }

    /// The URL for a server.
    pub fn url(&self) -> String {
        format!("sqlite:{}", self.0.path().join("test.db").display())
    }

    /// Everything that is in the file, and in those beside it.
    pub fn bytes(&self) -> Vec<u8> {
        let read_all = || {
            let files = std::fs::read_dir(self.0.path())?;
            let contents: Result<Vec<_>, _> = files.map(|file| std::fs::read(file?.path())).collect();
            std::io::Result::Ok(contents?.concat())
        };
        // Those beside it go away with the last connection.
        wait_for("files that can all be read", || read_all().ok())
    }

    pub fn store(&self) -> SqliteStore {
        SqliteStore::new(self.pool()).with_grouping(grouping())
    }

    pub fn pool(&self) -> SqlitePool {
        SqlitePoolOptions::new().max_connections(4).connect_lazy_with(self.options())
    }
}

#[async_trait::async_trait]
impl Fixture for SqliteFile {
    async fn open(&self) -> Arc<dyn Store> {
        Arc::new(self.store())
    }

    async fn open_with_clock_ahead(&self, _by: Duration) -> Arc<dyn Store> {
        self.open().await
    }
}
