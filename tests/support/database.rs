//! A database for several example servers at once.

use std::sync::Arc;

use tower_idempotency::{IdempotencyHandle, IdempotencyLayer, Store};

use super::{schema::Schema, server::Server, sqlite::SqliteFile};

/// Where servers keep charges and records.
#[derive(Debug)]
pub enum Database {
    Sqlite(SqliteFile),
    Postgres(Schema),
}

impl Database {
    pub fn sqlite() -> Self {
        Self::Sqlite(SqliteFile::new())
    }

    pub async fn postgres() -> Self {
        Self::Postgres(Schema::create().await)
    }

    /// Starts a server on this database.
    pub fn server(&self, variables: &[(&str, &str)]) -> Server {
        Server::start(Some(&self.url()), variables)
    }

    pub fn url(&self) -> String {
        match self {
            Self::Sqlite(file) => file.url(),
            Self::Postgres(schema) => schema.url(),
        }
    }

    /// The store of the servers, for this process.
    pub fn store(&self) -> Arc<dyn Store> {
        match self {
            Self::Sqlite(file) => Arc::new(tower_idempotency::SqliteStore::new(file.pool())),
            Self::Postgres(schema) => Arc::new(schema.store()),
        }
    }

    /// What an operator works with.
    pub fn handle(&self) -> IdempotencyHandle {
        IdempotencyLayer::new(self.store()).handle()
    }

    /// How often a handler got as far as storing a charge.
    pub async fn charges(&self) -> i64 {
        match self {
            Self::Sqlite(file) => {
                let count = sqlx::query_scalar("SELECT count(*) FROM charges");
                count.fetch_one(&file.pool()).await.unwrap()
            }
            Self::Postgres(schema) => schema.number("SELECT count(*) FROM {s}.charges").await,
        }
    }

    /// Waits until there are that many charges.
    pub async fn until_charges(&self, wanted: i64) {
        let reached = async {
            while self.charges().await < wanted {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        let waited = tokio::time::timeout(std::time::Duration::from_secs(30), reached).await;
        assert!(waited.is_ok(), "waited in vain for charge {wanted}");
    }
}
