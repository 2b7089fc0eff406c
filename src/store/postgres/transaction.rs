//! Transactions of handlers.
//!
//! A transaction begins by locking the record's row, if it is the attempt's. The lock stands in for the lease: claims and
//! renewals skip a locked row, so nobody takes the record over, and nothing changes the row under a transaction that
//! sees an older snapshot.
//!
//! Two marks are left at the begin. A setting that ends with the transaction is part of the fence of the completion. A
//! savepoint, to which even a failed transaction can be rolled back, proves in every other case that the transaction is
//! still the one that was begun.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use sqlx::{AssertSqlSafe, PgPool, Postgres, Row, Transaction, postgres::PgConnection};
use tokio::time::timeout;

use super::{PostgresStore, call::Value, connection, of_attempt};
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

/// How the connections of the given pool are set.
#[derive(Debug)]
pub(super) struct Session {
    enable_seqscan: String,
    statement_timeout: Duration,
    idle_timeout: Duration,
}

impl Session {
    async fn learn(pool: &PgPool) -> Result<Self, StoreError> {
        let learned = async {
            let row = match sqlx::raw_sql(SESSION).fetch_one(pool).await {
                Err(error) if code(&error).as_deref() == Some(ABORTED) => {
                    sqlx::raw_sql(AssertSqlSafe(format!("ROLLBACK; {SESSION}"))).fetch_one(pool).await?
                }
                learned => learned?,
            };
            let millis = |name| row.try_get(name).and_then(sql::number).map(Duration::from_millis);
            Ok(Self {
                enable_seqscan: row.try_get("enable_seqscan")?,
                statement_timeout: millis("statement_timeout")?,
                idle_timeout: millis("idle_timeout")?,
            })
        };
        learned.await.map_err(|source| connection::error("begin", source))
    }
}

impl Transactions {
    pub(super) fn new(store: PostgresStore, attempt: Attempt, options: TransactionOptions) -> Self {
        Self { store, attempt, options }
    }

    fn savepoint(&self) -> String {
        format!("tower_idempotency_{}", self.attempt.id.as_uuid().simple())
    }

    /// What begins the transaction, in one message. The record is to be locked by its key: a walk over a small table
    /// would read all records, and under SERIALIZABLE collide with everybody else's transaction.
    fn begin_text(&self, session: &Session, after_failure: bool) -> String {
        // A connection that was left in a failed transaction refuses whatever does not begin with a rollback.
        let first = if after_failure { "ROLLBACK; " } else { "" };
        let isolation = match self.options.isolation {
            None => "",
            Some(IsolationLevel::ReadCommitted) => " ISOLATION LEVEL READ COMMITTED",
            Some(IsolationLevel::RepeatableRead) => " ISOLATION LEVEL REPEATABLE READ",
            Some(IsolationLevel::Serializable) => " ISOLATION LEVEL SERIALIZABLE",
        };
        let (savepoint, attempt) = (self.savepoint(), self.attempt.id);
        let statement = shorter(session.statement_timeout, self.options.statement_timeout);
        let idle = shorter(session.idle_timeout, self.options.idle_timeout);
        format!(
            "{first}BEGIN{isolation}; SAVEPOINT {savepoint}; SET LOCAL tower_idempotency.attempt = '{attempt}'; \
             SET LOCAL statement_timeout = {statement}; SET LOCAL idle_in_transaction_session_timeout = {idle}; \
             SET LOCAL enable_seqscan = off"
        )
    }

    async fn try_begin(
        self,
        after_failure: bool,
    ) -> Result<Transaction<'static, Postgres>, TransactionError> {
        let statements = self.store.sql().await.map_err(unavailable)?;
        let session = self.store.state.session.get_or_make(async || Session::learn(&self.store.pool).await);
        let session = session.await.map_err(unavailable)?;
        let text = self.begin_text(session, after_failure);
        let begun = self.store.pool.begin_with(AssertSqlSafe(text)).await;
        let mut transaction = begun.map_err(|source| match code(&source).as_deref() {
            Some(code) if code.starts_with("25") => left_open().with_source(source),
            _ => not_begun(source),
        })?;
        let lock = of_attempt(&statements.lock, &self.attempt).with(Value::Text(&session.enable_seqscan));
        let rows = lock.fetch_all_inside(&mut transaction, self.store.settings.mode).await;
        let unlocked = |source| before_commit("the record could not be locked", source);
        let rows = rows.map_err(unlocked)?;
        let Some(row) = rows.first() else {
            self.abandon(transaction).await;
            return Err(TransactionError::new(TransactionErrorKind::Lost, "the record is another attempt's"));
        };
        if row.try_get("fresh").map_err(unlocked)? {
            return Ok(transaction);
        }
        self.abandon(transaction).await;
        Err(left_open())
    }

    /// Whether the record was completed: not if the handler has ended the transaction, or forgotten every setting.
    async fn complete(
        &self,
        connection: &mut PgConnection,
        response: &[u8],
    ) -> Result<bool, TransactionError> {
        let statements = self.store.sql().await.map_err(unavailable)?;
        let call = of_attempt(&statements.complete_locked, &self.attempt).with(Value::Bytes(response));
        let rows = call.fetch_all_inside(connection, self.store.settings.mode).await;
        let completed = rows.and_then(|rows| rows.first().map_or(Ok(false), |row| row.try_get("completed")));
        completed.map_err(|source| before_commit("the record could not be completed", source))
    }

    async fn in_time<T>(
        &self,
        otherwise: TransactionErrorKind,
        work: impl Future<Output = Result<T, TransactionError>>,
    ) -> Result<T, TransactionError> {
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
        let completed = self.in_time(TransactionErrorKind::Gone, self.complete(&mut transaction, &response));
        match completed.await {
            Ok(true) => {}
            Ok(false) => {
                self.roll_back(transaction).await?;
                let message = "the handler has reset the settings of its transaction";
                return Err(TransactionError::new(TransactionErrorKind::Failed, message));
            }
            Err(error) if error.kind() == TransactionErrorKind::Failed => {
                self.roll_back(transaction).await?;
                return Err(error);
            }
            Err(error) => {
                self.abandon(transaction).await;
                return Err(error);
            }
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

/// A time-out in milliseconds: that of the session, in which zero means none, unless ours is shorter.
fn shorter(session: Duration, ours: Option<Duration>) -> u128 {
    let session = Some(session).filter(|limit| !limit.is_zero());
    let limit = [session, ours].into_iter().flatten().min();
    limit.map_or(0, |limit| limit.as_millis().clamp(1, i32::MAX.unsigned_abs().into()))
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

const SESSION: &str = "
SELECT current_setting('enable_seqscan') AS enable_seqscan,
    (extract(epoch FROM current_setting('statement_timeout')::interval) * 1000)::bigint AS statement_timeout,
    (extract(epoch FROM current_setting('idle_in_transaction_session_timeout')::interval) * 1000)::bigint AS idle_timeout";

/// A statement was refused because an earlier one of its transaction had failed.
const ABORTED: &str = "25P02";
/// What a backend may be doing when it is terminated.
const ANY: &str = "%";
const IDLE: &str = "idle in transaction%";
const TRIES: u32 = 3;
/// For how long a rollback waits for a statement that still runs, before the server is told to end it.
const PATIENCE: Duration = Duration::from_secs(1);
