//! Transactions of handlers.
//!
//! A transaction begins by locking the record's row, if it is the attempt's. The lock stands in for the lease: claims and
//! renewals skip a locked row, so nobody takes the record over, and nothing changes the row under a transaction that
//! sees an older snapshot. A savepoint set then proves at the end that the transaction is still the one that was begun.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use sqlx::{AssertSqlSafe, Postgres, Row, Transaction, postgres::PgConnection};
use tokio::time::timeout;

use super::{PostgresStore, call::Value, of_attempt};
use crate::{
    Attempt, IsolationLevel, StoreError, TRACING_TARGET, TransactionError, TransactionErrorKind,
    TransactionOptions, error::BoxError, store::sql, tx::Driver,
};

#[derive(Clone, Debug)]
pub(super) struct Transactions {
    store: PostgresStore,
    attempt: Attempt,
    options: TransactionOptions,
}

impl Transactions {
    pub(super) fn new(store: PostgresStore, attempt: Attempt, options: TransactionOptions) -> Self {
        Self { store, attempt, options }
    }

    fn savepoint(&self) -> String {
        format!("tower_idempotency_{}", self.attempt.id.as_uuid().simple())
    }

    /// A connection that was left in a failed transaction refuses whatever does not begin with a rollback.
    fn begin_text(&self, after_failure: bool) -> String {
        let first = if after_failure { "ROLLBACK; " } else { "" };
        let isolation = match self.options.isolation {
            None => "",
            Some(IsolationLevel::ReadCommitted) => " ISOLATION LEVEL READ COMMITTED",
            Some(IsolationLevel::RepeatableRead) => " ISOLATION LEVEL REPEATABLE READ",
            Some(IsolationLevel::Serializable) => " ISOLATION LEVEL SERIALIZABLE",
        };
        format!("{first}BEGIN{isolation}; SAVEPOINT {}; {REMEMBER_TERMS}", self.savepoint())
    }

    async fn try_begin(
        self,
        after_failure: bool,
    ) -> Result<Transaction<'static, Postgres>, TransactionError> {
        let statements = self.store.sql().await.map_err(unavailable)?;
        let begun = self.store.pool.begin_with(AssertSqlSafe(self.begin_text(after_failure))).await;
        let mut transaction = begun.map_err(|source| match code(&source).as_deref() {
            Some(code) if code.starts_with("25") => left_open().with_source(source),
            _ => not_begun(source),
        })?;
        let micros = |limit: Option<_>| Value::Int(limit.map_or(0, sql::micros));
        let lock = of_attempt(&statements.lock, &self.attempt)
            .with(micros(self.options.statement_timeout))
            .with(micros(self.options.idle_timeout));
        let rows = lock.fetch_all_inside(&mut transaction, self.store.settings.mode).await;
        let rows = rows.map_err(|source| before_commit("the record could not be locked", source))?;
        let Some(row) = rows.first() else {
            self.abandon(transaction).await;
            return Err(TransactionError::new(TransactionErrorKind::Lost, "the record is another attempt's"));
        };
        if row.try_get("fresh").map_err(|source| before_commit("the record could not be locked", source))? {
            return Ok(transaction);
        }
        self.abandon(transaction).await;
        Err(left_open())
    }

    /// Proves that the transaction is the one that was begun, and undoes what the handler has set for it.
    async fn regain(&self, connection: &mut PgConnection) -> Result<(), TransactionError> {
        let text = format!("{OWN_TERMS}; RELEASE SAVEPOINT {}", self.savepoint());
        let regained = sqlx::raw_sql(AssertSqlSafe(text)).execute(connection).await;
        regained.map(drop).map_err(|source| before_commit("the transaction is not in order", source))
    }

    async fn complete(&self, connection: &mut PgConnection, response: &[u8]) -> Result<(), TransactionError> {
        let statements = self.store.sql().await.map_err(unavailable)?;
        let call = of_attempt(&statements.complete, &self.attempt).with(Value::Bytes(response));
        let rows = call.fetch_all_inside(connection, self.store.settings.mode).await;
        match rows.map_err(|source| before_commit("the record could not be completed", source))?.is_empty() {
            true => Err(TransactionError::new(TransactionErrorKind::Lost, "the record is another attempt's")),
            false => Ok(()),
        }
    }

    async fn in_time(
        &self,
        otherwise: TransactionErrorKind,
        work: impl Future<Output = Result<(), TransactionError>>,
    ) -> Result<(), TransactionError> {
        let limit = self.store.settings.statement_timeout;
        timeout(limit, work).await.unwrap_or_else(|elapsed| {
            let message = format!("no reply within {limit:?}");
            Err(TransactionError::new(otherwise, message).with_source(elapsed))
        })
    }

    /// Rolls back without asking whose transaction it is.
    async fn abandon(&self, transaction: Transaction<'static, Postgres>) {
        // Dropped, it is rolled back when the connection can be used again.
        if timeout(PATIENCE, transaction.rollback()).await.is_err() {
            self.terminate(ANY).await;
        }
    }

    /// Ends the backend that holds the lock on the record, whatever it does or only if it waits for a statement.
    async fn terminate(&self, state: &str) {
        let terminated = async {
            let call = of_attempt(&self.store.sql().await?.terminate, &self.attempt).with(Value::Text(state));
            self.store.rows("terminate", call).await
        };
        if let Err(error) = terminated.await {
            tracing::warn!(
                target: TRACING_TARGET, attempt = %self.attempt.id, error = &error as &dyn std::error::Error,
                "the server could not be told to end a transaction; its idle time-out will"
            );
        }
    }
}

#[async_trait]
impl Driver<Postgres> for Transactions {
    async fn begin(&self) -> Result<Transaction<'static, Postgres>, TransactionError> {
        let limit = self.store.settings.statement_timeout;
        let mut tries = 1;
        let mut left_open = false;
        loop {
            // In a task that is not cancelled: a connection whose BEGIN was not awaited goes back to its pool inside of
            // the transaction.
            let begun = match timeout(limit, tokio::spawn(self.clone().try_begin(left_open))).await {
                Ok(Ok(begun)) => begun,
                Ok(Err(error)) => Err(not_begun(error)),
                Err(elapsed) => Err(not_begun(elapsed)),
            };
            left_open = begun.as_ref().is_err_and(|error| error.kind() == TransactionErrorKind::Gone);
            match begun.as_ref().map_err(TransactionError::kind) {
                // A renewal of the lease came between, or the connection was broken.
                Err(TransactionErrorKind::Conflict | TransactionErrorKind::Gone) if tries < TRIES => {
                    tries += 1
                }
                _ => return begun,
            }
        }
    }

    async fn commit(
        &self,
        mut transaction: Transaction<'static, Postgres>,
        response: Bytes,
    ) -> Result<(), TransactionError> {
        if let Err(error) = self.in_time(TransactionErrorKind::Gone, self.regain(&mut transaction)).await {
            if error.kind() == TransactionErrorKind::Failed {
                self.roll_back(transaction).await?;
            }
            return Err(error);
        }
        let completed = self.in_time(TransactionErrorKind::Gone, self.complete(&mut transaction, &response));
        if let Err(error) = completed.await {
            self.abandon(transaction).await;
            return Err(error);
        }
        let commit = async { transaction.commit().await.map_err(at_commit) };
        let committed = self.in_time(TransactionErrorKind::Unconfirmed, commit).await;
        if committed.as_ref().is_err_and(|error| error.kind() == TransactionErrorKind::Unconfirmed) {
            // Not one that has the COMMIT: that would report a success that a standby does not have.
            self.terminate(IDLE).await;
        }
        committed
    }

    async fn roll_back(
        &self,
        mut transaction: Transaction<'static, Postgres>,
    ) -> Result<(), TransactionError> {
        let to_savepoint = AssertSqlSafe(format!("ROLLBACK TO SAVEPOINT {}", self.savepoint()));
        match timeout(PATIENCE, sqlx::raw_sql(to_savepoint).execute(&mut *transaction)).await {
            Ok(Ok(_)) => {
                self.abandon(transaction).await;
                Ok(())
            }
            Ok(Err(source)) => Err(before_commit("the transaction is not in order", source)),
            Err(_) => {
                self.terminate(ANY).await;
                Ok(())
            }
        }
    }

    async fn revoke(&self) {
        self.terminate(ANY).await;
    }
}

fn not_begun(source: impl Into<BoxError>) -> TransactionError {
    TransactionError::new(TransactionErrorKind::Unavailable, "the transaction could not begin")
        .with_source(source)
}

fn left_open() -> TransactionError {
    let message = "a connection of the pool was in a transaction that somebody had left open: see PostgresStore::guard_pool";
    TransactionError::new(TransactionErrorKind::Gone, message)
}

fn unavailable(source: StoreError) -> TransactionError {
    TransactionError::new(TransactionErrorKind::Unavailable, "the store does not answer").with_source(source)
}

fn code(error: &sqlx::Error) -> Option<String> {
    error.as_database_error().and_then(|error| error.code()).map(Into::into)
}

fn before_commit(message: &str, source: sqlx::Error) -> TransactionError {
    let kind = match code(&source).as_deref() {
        Some("25P01" | "3B001") => TransactionErrorKind::Ended,
        Some("40001" | "40P01" | "55P03") => TransactionErrorKind::Conflict,
        Some(code) if !ends_connection(code) && code != "57014" => TransactionErrorKind::Failed,
        _ => TransactionErrorKind::Gone,
    };
    TransactionError::new(kind, message).with_source(source)
}

fn at_commit(source: sqlx::Error) -> TransactionError {
    let kind = match code(&source).as_deref() {
        Some("40001" | "40P01") => TransactionErrorKind::Conflict,
        Some(code) if !ends_connection(code) && code != "40003" => TransactionErrorKind::Failed,
        _ => TransactionErrorKind::Unconfirmed,
    };
    TransactionError::new(kind, "COMMIT failed").with_source(source)
}

/// Errors with which the server closes the connection: shutdowns, time-outs, protocol errors.
fn ends_connection(code: &str) -> bool {
    code.starts_with("57P")
        || code.starts_with("08")
        || code.starts_with("25P0") && code != "25P01" && code != "25P02"
}

/// The statements of the store must find the record by its key. A plan that was made while the table was small would go
/// through all of it, and at SERIALIZABLE collide with everybody else's.
const REMEMBER_TERMS: &str = "
SELECT set_config('tower_idempotency.role', current_setting('role'), true),
    set_config('tower_idempotency.enable_seqscan', current_setting('enable_seqscan'), true),
    set_config('enable_seqscan', 'off', true)";

/// The role is that of the transaction's begin, unless the handler has forgotten every setting, and its time-out does not
/// count.
const OWN_TERMS: &str = "
SELECT set_config('enable_seqscan', 'off', true), set_config('statement_timeout', '0', true), set_config('role',
    coalesce(nullif(current_setting('tower_idempotency.role', true), ''), current_setting('role')), true)";

/// What a backend may be doing when it is terminated.
const ANY: &str = "%";
const IDLE: &str = "idle in transaction%";
const TRIES: u32 = 3;
/// For how long a rollback waits for a statement that still runs, before the server is told to end it.
const PATIENCE: Duration = Duration::from_secs(1);
