//! A database for several example servers at once.

use std::{sync::Arc, time::Duration};

use sqlx::{AssertSqlSafe, ConnectOptions};
use tower_idempotency::{IdempotencyHandle, IdempotencyLayer, store::Store};

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
            Self::Sqlite(file) => Arc::new(file.store()),
            Self::Postgres(schema) => Arc::new(schema.store()),
        }
    }

    /// What an operator works with.
    pub fn handle(&self) -> IdempotencyHandle {
        IdempotencyLayer::new(self.store()).handle()
    }

    /// How many charges are committed.
    pub async fn charges(&self) -> i64 {
        self.number("SELECT count(*) FROM {s}.charges").await
    }

    /// How many payouts are committed in this state.
    pub async fn payouts(&self, state: &str) -> i64 {
        self.number(&format!("SELECT count(*) FROM {{s}}.payouts WHERE state = '{state}'")).await
    }

    /// Waits until that attempt of the only request has written its charge in a transaction that is still open. On
    /// SQLite the sign is that nobody else can write; the records are read without a store, whose set-up would wait.
    pub async fn until_charging(&self, attempt_number: u32) {
        let attempts = format!(
            "SELECT count(*) FROM {{s}}.idempotency_records
            WHERE state = 'in_progress' AND attempt_number = {attempt_number}"
        );
        let reached = async {
            // Others write too, but not for long.
            let mut seen = 0;
            while seen < 10 {
                let charging = self.number(&attempts).await > 0 && self.has_open_transaction().await;
                seen = if charging { seen + 1 } else { 0 };
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(30), reached).await;
        assert!(waited.is_ok(), "waited in vain for attempt {attempt_number} to write a charge");
    }

    /// The one number that a statement returns, in which `{s}` is the schema.
    async fn number(&self, sql: &str) -> i64 {
        match self {
            Self::Sqlite(file) => {
                let number = sqlx::query_scalar(AssertSqlSafe(sql.replace("{s}.", "")));
                number.fetch_one(&file.pool()).await.unwrap()
            }
            Self::Postgres(schema) => schema.number(sql).await,
        }
    }

    async fn has_open_transaction(&self) -> bool {
        match self {
            Self::Sqlite(file) => {
                let options = file.options().busy_timeout(Duration::ZERO);
                let mut connection = options.connect().await.unwrap();
                let begun = sqlx::raw_sql("BEGIN IMMEDIATE; ROLLBACK").execute(&mut connection).await;
                begun.is_err_and(|error| {
                    let code = error.as_database_error().and_then(|error| error.code());
                    assert_eq!(code.as_deref(), Some(SQLITE_BUSY), "{error}");
                    true
                })
            }
            Self::Postgres(schema) => schema.number(CHARGING).await > 0,
        }
    }
}

const SQLITE_BUSY: &str = "5";
/// Whoever has written to a table has a lock on it until the transaction ends.
const CHARGING: &str = "
    SELECT count(*) FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid)
    WHERE l.relation = '{s}.charges'::regclass AND l.mode = 'RowExclusiveLock' AND l.granted
        AND a.state = 'idle in transaction'";
