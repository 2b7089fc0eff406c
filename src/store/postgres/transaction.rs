//! Transactions of handlers.
//!
//! A transaction begins by locking the record's row, if the record is the attempt's. The lock
//! replaces the lease: claims and renewals skip a locked row. So no claim takes the record over,
//! and no write changes the row under a transaction that sees an older snapshot.
//!
//! The begin leaves two marks. A setting that ends with the transaction is part of the fence of the
//! completion. A savepoint proves in every other case that the transaction is still the one that
//! was begun: even a failed transaction can be rolled back to it. It is set after the row was
//! locked, so that a rollback to it keeps the lock until the lease is renewed.

use std::{pin::pin, time::Duration};

use async_trait::async_trait;
use sqlx::{
    AssertSqlSafe, Connection, PgPool, Postgres, Row, SqlSafeStr, Transaction,
    pool::PoolConnection,
    postgres::{PgConnection, PgDatabaseError},
};
use tokio::time::timeout;

use super::{PostgresStore, connection};
use crate::{
    error::{BoxError, StoreError},
    redact::{TRACING_TARGET, traced},
    store::{
        sql::{
            Engine,
            call::Call,
            errors, savepoint,
            slot::{Driver, Last},
        },
        transaction::{IsolationLevel, TransactionError, TransactionErrorKind, TransactionLimits},
    },
    stored::record::Attempt,
};

/// The transaction of one attempt.
#[derive(Clone, Debug)]
pub(super) struct AttemptTransaction {
    store: PostgresStore,
    attempt: Attempt,
    limits: TransactionLimits,
}

/// The settings of the given pool's connections.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) enable_seqscan: String,
    pub(super) statement_timeout: Duration,
    pub(super) idle_timeout: Duration,
}

impl Session {
    pub(super) async fn learn(pool: &PgPool) -> Result<Self, StoreError> {
        let learned = async {
            let row = match sqlx::raw_sql(SESSION).fetch_one(pool).await {
                // The connection was left in a failed transaction by other code.
                Err(error) if errors::code(&error).as_deref() == Some(ABORTED) => {
                    sqlx::raw_sql(AssertSqlSafe(format!("ROLLBACK; {SESSION}"))).fetch_one(pool).await?
                }
                learned => learned?,
            };
            let millis = |name| {
                row.try_get::<i64, _>(name)
                    .map(|millis| Duration::from_millis(millis.try_into().unwrap_or(0)))
            };
            Ok(Self {
                enable_seqscan: row.try_get("enable_seqscan")?,
                statement_timeout: millis("statement_timeout")?,
                idle_timeout: millis("idle_timeout")?,
            })
        };
        learned.await.map_err(|source| connection::error("begin", source))
    }
}

impl AttemptTransaction {
    pub(super) fn new(store: PostgresStore, attempt: Attempt, limits: TransactionLimits) -> Self {
        Self { store, attempt, limits }
    }

    /// Returns the text that begins the transaction, in one message. The record must be locked by
    /// its key. A walk over a small table would read all records, and collide with every other
    /// transaction under SERIALIZABLE.
    fn begin_text(&self, session: &Session, after_failure: bool) -> String {
        // A connection that was left in a failed transaction refuses every message that does not
        // begin with a rollback.
        let first = if after_failure { "ROLLBACK; " } else { "" };
        let isolation = isolation(self.limits.isolation);
        let attempt = self.attempt.id;
        let statement = shorter(session.statement_timeout, self.limits.statement_timeout);
        let idle = shorter(session.idle_timeout, self.limits.idle_timeout);
        format!(
            "{first}BEGIN{isolation}; SET LOCAL tower_idempotency.attempt = '{attempt}'; \
             SET LOCAL statement_timeout = {statement}; \
             SET LOCAL idle_in_transaction_session_timeout = {idle}; \
             SET LOCAL enable_seqscan = off"
        )
    }

    /// Begins the transaction and locks the record. Runs in a task that is not cancelled: a
    /// connection whose BEGIN was not awaited returns to its pool inside of the transaction.
    async fn try_begin(self, after_failure: bool) -> Result<Transaction<'static, Postgres>, NotBegun> {
        let statements = self.store.statements().await.map_err(not_begun)?;
        let session = self.store.state.session.get_or_make(async || Session::learn(&self.store.pool).await);
        let session = session.await.map_err(not_begun)?;
        let text = self.begin_text(session, after_failure);
        let mut connection = self.store.pool.acquire().await.map_err(not_begun)?;
        if let Err(source) = sqlx::raw_sql(AssertSqlSafe(text)).execute(&mut *connection).await {
            connection.close_on_drop();
            return Err(match errors::code(&source) {
                // An invalid transaction state: other code has left a transaction open.
                Some(code) if code.starts_with("25") => NotBegun::Again(left_open().with_source(source)),
                Some(_) => not_begun(source),
                None => NotBegun::Again(failed("the connection was broken", source)),
            });
        }
        let lock = Call::new(&statements.own.lock)
            .of_attempt(&self.attempt)
            .with("enable_seqscan", session.enable_seqscan.as_str());
        let rows = lock.fetch_all_inside(&mut connection, self.store.settings.mode).await;
        let fresh = rows.and_then(|rows| rows.first().map(|row| row.try_get("fresh")).transpose());
        let refused = match fresh {
            Ok(Some(true)) => {
                let savepoint = AssertSqlSafe(format!("SAVEPOINT {}", savepoint(&self.attempt)));
                let begun = Transaction::begin(connection, Some(savepoint.into_sql_str())).await;
                return begun.map_err(unlocked);
            }
            Ok(Some(false)) => NotBegun::Again(left_open()),
            Ok(None) => {
                let message = "another attempt has taken the record over";
                NotBegun::Final(TransactionError::new(TransactionErrorKind::Lost, message))
            }
            Err(source) => {
                // After a collision with a renewal of the lease the connection is in order. After
                // anything else, other code may have spoilt it for every other request.
                if transaction_error_kind(&source) != Some(TransactionErrorKind::Conflict) {
                    connection.close_on_drop();
                }
                unlocked(source)
            }
        };
        undo_begin(connection).await;
        Err(refused)
    }

    /// Writes the last statement. Returns false if the handler has ended the transaction, or reset
    /// every setting.
    async fn write(&self, connection: &mut PgConnection, last: &Last) -> Result<bool, TransactionError> {
        let own = &self.store.statements().await?.own;
        let call = match last {
            Last::Completion(response) => Call::new(&own.complete_locked).with("response", &**response),
            Last::Phase { name, result } => Call::new(&own.finish_phase)
                .with("name", name.as_str())
                .with("result", &**result)
                .with("lease", self.limits.lease),
        };
        let call = call.of_attempt(&self.attempt);
        let rows = call.fetch_all_inside(connection, self.store.settings.mode).await;
        let completed = rows.and_then(|rows| rows.first().map_or(Ok(false), |row| row.try_get("completed")));
        completed.map_err(|source| failed("the last statement of the transaction failed", source))
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

    /// Undoes the writes of the handler. Fails if the transaction is not the one that was begun.
    /// The lease is renewed before the row is unlocked, so that no claim takes the record over
    /// before the attempt's next write.
    async fn undo(&self, mut transaction: Transaction<'static, Postgres>) -> Result<(), TransactionError> {
        // The error of a statement that the handler did not await says nothing about the statements
        // after it.
        while let Err(sqlx::Error::Database(_)) = transaction.ping().await {}
        let renew = Call::new(&self.store.statements().await?.own.renew_locked)
            .of_attempt(&self.attempt)
            .with("lease", self.limits.lease)
            .text();
        let undo = format!("ROLLBACK TO SAVEPOINT {}; {renew}; {PREPARED}", savepoint(&self.attempt));
        let undone = sqlx::raw_sql(AssertSqlSafe(undo)).fetch_one(&mut *transaction).await;
        let prepared = undone.and_then(|row| row.try_get::<i64, _>("prepared"));
        let prepared = prepared.map_err(|source| failed("the transaction is not in order", source))?;
        // A rollback does not bring back statements that the handler has deallocated.
        if usize::try_from(prepared).is_ok_and(|prepared| prepared < transaction.cached_statements_size()) {
            let cleared = transaction.clear_cached_statements().await;
            cleared.map_err(|source| failed("the connection is not in order", source))?;
        }
        transaction.commit().await.map_err(|source| failed("the lease could not be renewed", source))
    }

    /// Ends the backend that holds the lock on the record, if its state matches `state`: any state,
    /// or only a wait for a statement. Returns `false` if there was none, and `None` if the server
    /// did not answer.
    async fn terminate(&self, state: &str) -> Option<bool> {
        let terminated = async {
            let terminate = &self.store.statements().await?.own.terminate;
            self.store
                .read("terminate", Call::new(terminate).of_attempt(&self.attempt).with("state", state))
                .await
        };
        match terminated.await {
            Ok(backends) => Some(!backends.is_empty()),
            Err(error) => {
                tracing::warn!(
                    target: TRACING_TARGET,
                    attempt = %self.attempt.id,
                    error = &error as &dyn std::error::Error,
                    "the server could not be told to end a transaction; its idle time-out will"
                );
                None
            }
        }
    }
}

#[async_trait]
impl Driver<Postgres> for AttemptTransaction {
    async fn begin(&self) -> Result<Transaction<'static, Postgres>, TransactionError> {
        let limit = self.store.settings.statement_timeout;
        let mut tries = 1;
        loop {
            // In a task, because a BEGIN must be awaited even after the time-out.
            let begun = match timeout(limit, tokio::spawn(traced(self.clone().try_begin(tries > 1)))).await {
                Ok(Ok(begun)) => begun,
                Ok(Err(error)) => Err(not_begun(error)),
                Err(elapsed) => Err(not_begun(elapsed)),
            };
            match begun {
                Ok(transaction) => return Ok(transaction),
                Err(NotBegun::Again(_)) if tries < TRIES => tries += 1,
                Err(NotBegun::Again(error) | NotBegun::Final(error)) => return Err(error),
            }
        }
    }

    async fn commit(
        &self,
        mut transaction: Transaction<'static, Postgres>,
        last: Last,
    ) -> Result<(), TransactionError> {
        let completed = self.in_time(TransactionErrorKind::Lost, self.write(&mut transaction, &last));
        let not_completed = match completed.await {
            Ok(true) => None,
            Ok(false) => {
                let message = "the handler has reset the settings of its transaction";
                Some(TransactionError::new(TransactionErrorKind::Failed, message))
            }
            Err(error) => Some(error),
        };
        if let Some(error) = not_completed {
            self.roll_back(transaction).await?;
            // The rollback has proved that it was the transaction that was begun, so the handler
            // has not ended it.
            let ended = error.kind() == TransactionErrorKind::Ended;
            let kind = if ended { TransactionErrorKind::Failed } else { error.kind() };
            return Err(TransactionError::new(kind, "nothing was committed").with_source(error));
        }
        let commit = async { transaction.commit().await.map_err(at_commit) };
        let committed = self.in_time(TransactionErrorKind::Unconfirmed, commit).await;
        if committed.as_ref().is_err_and(|error| error.kind() == TransactionErrorKind::Unconfirmed) {
            // Not a backend that runs the COMMIT: the server would report a success that a standby
            // does not have.
            self.terminate(IDLE).await;
        }
        committed
    }

    async fn roll_back(&self, transaction: Transaction<'static, Postgres>) -> Result<(), TransactionError> {
        let mut undo = pin!(self.undo(transaction));
        if let Ok(undone) = timeout(PATIENCE, &mut undo).await {
            return undone;
        }
        // The rollback waits for a statement that still runs.
        if self.terminate(ANY).await != Some(false) {
            return Ok(());
        }
        // If no backend has the row locked, the statement has just ended, or the transaction was
        // over before.
        timeout(PATIENCE, undo).await.unwrap_or_else(|elapsed| {
            let message = "the transaction is not the one that was begun";
            Err(TransactionError::new(TransactionErrorKind::Ended, message).with_source(elapsed))
        })
    }

    async fn revoke(&self) {
        self.terminate(ANY).await;
    }

    fn again(&self) -> Box<dyn Driver<Postgres>> {
        Box::new(self.clone())
    }
}

/// Returns a time-out in milliseconds: that of the session, in which zero means none, unless ours
/// is shorter.
pub(super) fn shorter(session: Duration, ours: Duration) -> u128 {
    let limit = if session.is_zero() { ours } else { session.min(ours) };
    limit.as_millis().clamp(1, i32::MAX.unsigned_abs().into())
}

/// Returns the end of a BEGIN with this isolation level.
pub(super) fn isolation(level: Option<IsolationLevel>) -> &'static str {
    match level {
        None => "",
        Some(IsolationLevel::ReadCommitted) => " ISOLATION LEVEL READ COMMITTED",
        Some(IsolationLevel::RepeatableRead) => " ISOLATION LEVEL REPEATABLE READ",
        Some(IsolationLevel::Serializable) => " ISOLATION LEVEL SERIALIZABLE",
    }
}

/// The reason why a transaction did not begin.
enum NotBegun {
    /// Another connection, or another moment, may succeed.
    Again(TransactionError),
    Final(TransactionError),
}

fn not_begun(source: impl Into<BoxError>) -> NotBegun {
    let message = "the transaction could not begin";
    NotBegun::Final(TransactionError::new(TransactionErrorKind::Unavailable, message).with_source(source))
}

fn unlocked(source: sqlx::Error) -> NotBegun {
    NotBegun::Again(failed("the record could not be locked", source))
}

/// Ends a transaction that no handler has seen. Closes the connection if that fails.
async fn undo_begin(mut connection: PoolConnection<Postgres>) {
    let undone = timeout(PATIENCE, sqlx::raw_sql("ROLLBACK").execute(&mut *connection)).await;
    if !matches!(undone, Ok(Ok(_))) {
        connection.close_on_drop();
    }
}

pub(super) fn left_open() -> TransactionError {
    let message = "a connection of the pool was in a transaction that other code had left open: \
                   see PostgresStore::guard_pool";
    TransactionError::new(TransactionErrorKind::Unavailable, message)
}

pub(super) fn failed(message: &str, source: sqlx::Error) -> TransactionError {
    TransactionError::new(kind_of(&source), message).with_source(source)
}

/// Returns the meaning of a failed statement for its transaction, if the error is PostgreSQL's.
pub(crate) fn transaction_error_kind(source: &sqlx::Error) -> Option<TransactionErrorKind> {
    let error = source.as_database_error()?.try_downcast_ref::<PgDatabaseError>()?;
    Some(match error.code() {
        // No transaction is open, or its savepoint is gone.
        "25P01" | "3B001" => TransactionErrorKind::Ended,
        // Serialization failure, deadlock, lock not available.
        "40001" | "40P01" | "55P03" => TransactionErrorKind::Conflict,
        // The server cancelled the statement, or a time-out of the transaction ended it.
        "57014" | "25P03" | "25P04" => TransactionErrorKind::Lost,
        code if code.starts_with("57P") || code.starts_with("08") => TransactionErrorKind::Lost,
        code if REFUSED.iter().any(|class| code.starts_with(class)) => TransactionErrorKind::Refused,
        _ => TransactionErrorKind::Failed,
    })
}

pub(super) fn kind_of(source: &sqlx::Error) -> TransactionErrorKind {
    transaction_error_kind(source).unwrap_or_else(|| errors::transaction_error_kind(source))
}

/// Makes the error of a failed COMMIT. A server that ends the connection at COMMIT does not say
/// whether it has committed.
pub(super) fn at_commit(source: sqlx::Error) -> TransactionError {
    let mut kind = kind_of(&source);
    if kind == TransactionErrorKind::Lost || errors::code(&source).as_deref() == Some("40003") {
        kind = TransactionErrorKind::Unconfirmed;
    }
    TransactionError::new(kind, "COMMIT failed").with_source(source)
}

const SESSION: &str = "
SELECT current_setting('enable_seqscan') AS enable_seqscan,
    (extract(epoch FROM current_setting('statement_timeout')::interval) * 1000)::bigint AS statement_timeout,
    (extract(epoch FROM current_setting('idle_in_transaction_session_timeout')::interval) * 1000)::bigint
        AS idle_timeout";

/// The classes of errors that the same statement meets again: cardinality, data, constraints,
/// syntax and access rules, a view's check option, and errors that a function raises.
const REFUSED: [&str; 6] = ["21", "22", "23", "42", "44", "P0"];
pub(super) const PREPARED: &str = "SELECT count(*) AS prepared FROM pg_prepared_statements";

/// A statement was refused because an earlier one of its transaction had failed.
const ABORTED: &str = "25P02";
/// The states in which a backend is ended, as patterns.
pub(super) const ANY: &str = "%";
pub(super) const IDLE: &str = "idle in transaction%";
pub(super) const TRIES: u32 = 3;
/// The time for which a rollback waits for a statement that still runs, before the server is told
/// to end it.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
