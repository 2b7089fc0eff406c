//! Transactions of attempts that make no claim.
//!
//! Such a transaction begins by trying a lock on its key that lasts as long as the transaction. The
//! statement after that looks for a record: its snapshot is younger than the lock, so that it shows
//! what an earlier transaction with the lock has committed. At a stricter isolation level the
//! snapshot is older than the lock. A record that it does not show makes the completion fail.
//!
//! A setting that ends with the transaction notes that the lock was got. It is part of the fence of
//! the completion. A savepoint proves in every other case that the transaction is still the one
//! that was begun.

use std::pin::pin;

use async_trait::async_trait;
use bytes::Bytes;
use sha2::{Digest, Sha256};
use sqlx::{AssertSqlSafe, Connection, Postgres, Row, SqlSafeStr, Transaction, postgres::PgConnection};
use tokio::time::timeout;

use super::{
    PostgresStore, connection,
    transaction::{
        ANY, IDLE, PATIENCE, PREPARED, Session, TRIES, at_commit, failed, isolation, left_open, shorter,
    },
};
use crate::{
    error::{StoreError, StoreErrorKind},
    redact::TRACING_TARGET,
    store::{
        Store,
        sql::{
            Engine,
            call::{Call, Value},
            errors, savepoint,
            single::{self, SingleDriver},
        },
        transaction::{BeginOutcome, TransactionError, TransactionErrorKind, TransactionLimits},
    },
    stored::record::{Attempt, Claim, Fenced, Record},
};

/// The transaction of one attempt.
#[derive(Debug)]
struct Single {
    store: PostgresStore,
    claim: Claim,
    lock: i64,
    /// The process of the server that has the transaction.
    backend: i64,
    /// The key has an expired record, which the completion replaces.
    replaces: bool,
}

/// Begins a transaction, if no other one has its key and the key has no record.
pub(super) async fn begin(
    store: &PostgresStore,
    claim: &Claim,
    limits: &TransactionLimits,
) -> Result<BeginOutcome, StoreError> {
    let lock = lock_of(&store.statements().await?.own.table.text, &claim.attempt);
    let mut tries = 1;
    let (transaction, seen) = loop {
        match try_begin(store, claim, limits, lock, tries > 1).await {
            Err(error) if tries == TRIES || error.kind() != StoreErrorKind::Ambiguous => return Err(error),
            Err(_) => tries += 1,
            Ok(begun) => break begun,
        }
    };
    let Seen { locked, absent, backend } = seen;
    if locked && absent != Some(false) {
        let replaces = absent == Some(true);
        let driver = Single { store: store.clone(), claim: claim.clone(), lock, backend, replaces };
        return Ok(single::begun(driver, transaction, limits.begin_timeout, None));
    }
    // Dropped, it is rolled back on the way to its pool.
    drop(transaction);
    let record = match absent {
        Some(false) => store.get(&claim.attempt.consumer, &claim.attempt.key).await?,
        Some(true) | None => None,
    };
    Ok(record.map_or(BeginOutcome::Contended, |record| BeginOutcome::Exists(Box::new(record))))
}

/// The first look of a transaction.
struct Seen {
    locked: bool,
    absent: Option<bool>,
    backend: i64,
}

/// Tries once. Nothing that may be tried again has an effect: its errors are
/// [`Ambiguous`](StoreErrorKind::Ambiguous).
async fn try_begin(
    store: &PostgresStore,
    claim: &Claim,
    limits: &TransactionLimits,
    lock: i64,
    after_failure: bool,
) -> Result<(Transaction<'static, Postgres>, Seen), StoreError> {
    let failed = |source| connection::error("begin", source);
    let session = store.state.session.get_or_make(async || Session::learn(&store.pool).await).await?;
    let text = begin_text(session, claim, limits, lock, after_failure);
    let connection = store.pool.acquire().await.map_err(failed)?;
    let begun = Transaction::begin(connection, Some(AssertSqlSafe(text).into_sql_str())).await;
    let mut transaction = begun.map_err(|source| match errors::code(&source) {
        // An invalid transaction state: other code has left a transaction open.
        Some(code) if code.starts_with("25") => again(left_open()),
        _ => failed(source),
    })?;
    let look = Call::new(&store.statements().await?.own.look)
        .of_attempt(&claim.attempt)
        .with("enable_seqscan", session.enable_seqscan.as_str());
    let rows = look.fetch_all_inside(&mut transaction, store.settings.mode).await.map_err(failed)?;
    let seen = rows.first().ok_or(sqlx::Error::RowNotFound).and_then(|row| {
        let locked = row.try_get::<Option<bool>, _>("locked")?.unwrap_or(false);
        Ok(Seen { locked, absent: row.try_get("absent")?, backend: row.try_get("backend")? })
    });
    Ok((transaction, seen.map_err(failed)?))
}

fn again(error: TransactionError) -> StoreError {
    StoreError::new(StoreErrorKind::Ambiguous, "begin: the connection was not in order").with_source(error)
}

/// Returns the text that begins the transaction and tries the lock, in one message. It contains no
/// value of the request. First comes the end of a transaction that other code has left open: a bare
/// ROLLBACK would be a warning in the server's log.
fn begin_text(
    session: &Session,
    claim: &Claim,
    limits: &TransactionLimits,
    lock: i64,
    after_failure: bool,
) -> String {
    let first = if after_failure { "ROLLBACK; " } else { "" };
    let (isolation, attempt) = (isolation(limits.isolation), claim.attempt.id);
    let statement = shorter(session.statement_timeout, limits.statement_timeout);
    let idle = shorter(session.idle_timeout, limits.idle_timeout);
    format!(
        "{first}BEGIN; ROLLBACK; BEGIN{isolation}; SET LOCAL statement_timeout = {statement}; \
         SET LOCAL idle_in_transaction_session_timeout = {idle}; SET LOCAL enable_seqscan = off; \
         SELECT set_config('tower_idempotency.attempt', \
             CASE WHEN pg_try_advisory_xact_lock({lock}) THEN '{attempt}' ELSE '' END, true); \
         SAVEPOINT {}",
        savepoint(&claim.attempt)
    )
}

/// Returns the lock of a key. Two keys that have the same one, which is most unlikely, are told to
/// try again if they are used simultaneously.
fn lock_of(table: &str, attempt: &Attempt) -> i64 {
    let mut digest = Sha256::new();
    for field in [table, attempt.consumer.as_str(), attempt.key.as_str()] {
        digest.update((field.len() as u64).to_be_bytes());
        digest.update(field);
    }
    let [a, b, c, d, e, f, g, h, ..]: [u8; 32] = digest.finalize().into();
    i64::from_be_bytes([a, b, c, d, e, f, g, h])
}

impl Single {
    /// Adds the completed record.
    async fn add(&self, connection: &mut PgConnection, response: &Bytes) -> Result<Added, TransactionError> {
        self.clear(connection).await?;
        let add = Call::new(&self.store.statements().await?.own.add_completed).of_claim(&self.claim);
        let add = add.with("response", &**response);
        let rows = add.fetch_all_inside(connection, self.store.settings.mode).await;
        let added = rows.and_then(|rows| {
            let Some(row) = rows.first() else { return Ok(Added::Taken) };
            Ok(match (row.try_get("completed")?, row.try_get::<Option<bool>, _>("fenced")?) {
                (true, _) => Added::Completed,
                (false, Some(true)) => Added::Taken,
                (false, _) => Added::NotFenced,
            })
        });
        added.map_err(not_added)
    }

    /// Adds the completed record and commits.
    async fn finish(
        &self,
        mut transaction: Transaction<'static, Postgres>,
        response: &Bytes,
    ) -> Result<(), TransactionError> {
        let added = self.in_time(TransactionErrorKind::Lost, self.add(&mut transaction, response));
        let not_added = match added.await {
            Ok(Added::Completed) => return self.send_commit(transaction).await,
            Ok(Added::Taken) => single::taken(),
            Ok(Added::NotFenced) => {
                let message = "the handler has reset the settings of its transaction";
                TransactionError::new(TransactionErrorKind::Failed, message)
            }
            Err(error) => error,
        };
        self.roll_back(transaction).await?;
        // The rollback has proved that it was the transaction that was begun, so the handler has not
        // ended it.
        let ended = not_added.kind() == TransactionErrorKind::Ended;
        let kind = if ended { TransactionErrorKind::Failed } else { not_added.kind() };
        Err(TransactionError::new(kind, "nothing was committed").with_source(not_added))
    }

    async fn send_commit(&self, transaction: Transaction<'static, Postgres>) -> Result<(), TransactionError> {
        let commit = async { transaction.commit().await.map_err(at_commit) };
        let committed = self.in_time(TransactionErrorKind::Unconfirmed, commit).await;
        if committed.as_ref().is_err_and(|error| error.kind() == TransactionErrorKind::Unconfirmed) {
            // Not a backend that runs the COMMIT: the server would report a success that a standby
            // does not have.
            self.terminate(IDLE).await;
        }
        committed
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
    async fn undo(&self, transaction: &mut Transaction<'static, Postgres>) -> Result<(), TransactionError> {
        // The error of a statement that the handler did not await says nothing about the statements
        // after it.
        while let Err(sqlx::Error::Database(_)) = transaction.ping().await {}
        let undo = format!("ROLLBACK TO SAVEPOINT {}; {PREPARED}", savepoint(&self.claim.attempt));
        let undone = sqlx::raw_sql(AssertSqlSafe(undo)).fetch_one(&mut **transaction).await;
        let prepared = undone.and_then(|row| row.try_get::<i64, _>("prepared"));
        let prepared = prepared.map_err(|source| failed("the transaction is not in order", source))?;
        // A rollback does not bring back statements that the handler has deallocated.
        let known = transaction.cached_statements_size();
        if usize::try_from(prepared).is_ok_and(|prepared| prepared < known) {
            let cleared = transaction.clear_cached_statements().await;
            cleared.map_err(|source| failed("the connection is not in order", source))?;
        }
        Ok(())
    }

    /// The same, but waits for no statement that still runs. Returns `None` if the transaction is
    /// rolled back, because it was lost or such a statement was ended.
    async fn undone(
        &self,
        mut transaction: Transaction<'static, Postgres>,
    ) -> Result<Option<Transaction<'static, Postgres>>, TransactionError> {
        let undone = match timeout(PATIENCE, self.undo(&mut transaction)).await {
            Ok(Ok(())) => return Ok(Some(transaction)),
            Ok(Err(error)) => Err(error),
            Err(_) => self.roll_back(transaction).await,
        };
        match undone {
            Err(error) if error.kind() == TransactionErrorKind::Ended => Err(error),
            Ok(()) | Err(_) => Ok(None),
        }
    }

    async fn clear(&self, connection: &mut PgConnection) -> Result<(), TransactionError> {
        if !self.replaces {
            return Ok(());
        }
        let clear = Call::new(&self.store.statements().await?.singles.clear).of_claim(&self.claim);
        let cleared = clear.fetch_all_inside(connection, self.store.settings.mode).await;
        cleared.map(drop).map_err(not_added)
    }

    async fn add_held(&self, connection: &mut PgConnection) -> Result<(), TransactionError> {
        self.clear(connection).await?;
        let hold = Call::new(&self.store.statements().await?.own.add_held).of_claim(&self.claim);
        match hold.fetch_all_inside(connection, self.store.settings.mode).await.map_err(not_added)?.len() {
            0 => Err(single::taken()),
            _ => Ok(()),
        }
    }

    /// Ends the backend that has the key, if its state matches `state`: any state, or only a wait
    /// for a statement. Returns `false` if it has not, and `None` if the server did not answer.
    async fn terminate(&self, state: &str) -> Option<bool> {
        let terminated = async {
            let terminate = Call::new(&self.store.statements().await?.own.terminate_single)
                .with("lock", Value::Int(self.lock))
                .with("backend", Value::Int(self.backend))
                .with("state", state);
            self.store.read("terminate", terminate).await
        };
        match terminated.await {
            Ok(backends) => Some(!backends.is_empty()),
            Err(error) => {
                tracing::warn!(
                    target: TRACING_TARGET,
                    attempt = %self.claim.attempt.id,
                    error = &error as &dyn std::error::Error,
                    "the server could not be told to end a transaction; its idle time-out will"
                );
                None
            }
        }
    }
}

fn not_added(source: sqlx::Error) -> TransactionError {
    failed("the record could not be added", source)
}

/// The outcome of adding a record.
enum Added {
    Completed,
    /// The key has a record.
    Taken,
    /// The setting of the transaction is gone.
    NotFenced,
}

#[async_trait]
impl SingleDriver<Postgres> for Single {
    async fn commit(
        &self,
        transaction: Transaction<'static, Postgres>,
        response: Bytes,
    ) -> Result<(), TransactionError> {
        self.finish(transaction, &response).await
    }

    async fn complete(
        &self,
        transaction: Transaction<'static, Postgres>,
        response: Bytes,
    ) -> Result<(), TransactionError> {
        match self.undone(transaction).await? {
            Some(transaction) => self.finish(transaction, &response).await,
            None => single::add(&self.store, &self.claim, &response).await,
        }
    }

    async fn roll_back(
        &self,
        mut transaction: Transaction<'static, Postgres>,
    ) -> Result<(), TransactionError> {
        let mut roll_back = pin!(async {
            self.undo(&mut transaction).await?;
            let rolled_back = transaction.rollback().await;
            rolled_back.map_err(|source| failed("the transaction could not be rolled back", source))
        });
        if let Ok(rolled_back) = timeout(PATIENCE, &mut roll_back).await {
            return rolled_back;
        }
        // The rollback waits for a statement that still runs.
        if self.terminate(ANY).await != Some(false) {
            return Ok(());
        }
        // If the key is not locked, the statement has just ended, or the transaction was over before.
        timeout(PATIENCE, roll_back).await.unwrap_or_else(|elapsed| {
            let message = "the transaction is not the one that was begun";
            Err(TransactionError::new(TransactionErrorKind::Ended, message).with_source(elapsed))
        })
    }

    async fn revoke(&self) {
        self.terminate(ANY).await;
    }

    async fn outcome(&self) -> Result<Option<Record>, StoreError> {
        let try_lock = Call::new(&self.store.statements().await?.own.try_lock);
        let rows = self.store.read("outcome", try_lock.with("lock", Value::Int(self.lock))).await?;
        let free = rows.first().map_or(Ok(false), |row| row.try_get("free"));
        if !free.map_err(|source| connection::error("outcome", source))? {
            let message = "the transaction has not come to its end";
            return Err(StoreError::new(StoreErrorKind::Unavailable, message));
        }
        single::find(&self.store, &self.claim.attempt).await
    }

    async fn hold_inside(&self, transaction: Transaction<'static, Postgres>) -> Result<(), TransactionError> {
        let Some(mut transaction) = self.undone(transaction).await? else {
            return self.hold().await.map(drop).map_err(TransactionError::from);
        };
        self.in_time(TransactionErrorKind::Lost, self.add_held(&mut transaction)).await?;
        self.send_commit(transaction).await
    }

    async fn hold(&self) -> Result<Fenced, StoreError> {
        single::hold(&self.store, &self.claim).await
    }
}
