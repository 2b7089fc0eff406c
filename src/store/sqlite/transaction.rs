//! Transactions of handlers.
//!
//! A transaction runs on the connection that writes. While it is open, there is no other write, and
//! no claim can take the record over. A savepoint, set at its begin, proves at the end that it is
//! still the transaction that was begun. If the savepoint is gone, SQLite has rolled the
//! transaction back, or the handler has ended it. A hook of the connection tells whether anything
//! was committed since the begin: also what a handler has written after a rollback that it did not
//! notice.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use sqlx::{
    AssertSqlSafe, Transaction,
    sqlite::{Sqlite, SqliteConnection, SqliteError},
};
use tokio::sync::OwnedMutexGuard;

use super::{SqliteStore, connection::primary, prepared};
use crate::{
    error::{StoreError, StoreErrorKind},
    redact::TRACING_TARGET,
    store::{
        sql::{
            Engine,
            call::Call,
            errors, savepoint,
            slot::{Driver, Last},
        },
        transaction::{TransactionError, TransactionErrorKind},
    },
    stored::record::Attempt,
};

/// The transaction of one attempt.
#[derive(Debug)]
pub(super) struct AttemptTransaction {
    store: SqliteStore,
    attempt: Attempt,
    lease: Duration,
    /// Something was committed on the connection since the begin. The hook that notes it has the
    /// other reference.
    committed: Arc<AtomicBool>,
    /// The place at the head of the queue of writers, while the transaction is open.
    turn: Mutex<Option<OwnedMutexGuard<()>>>,
}

impl AttemptTransaction {
    pub(super) fn new(store: SqliteStore, attempt: Attempt, lease: Duration) -> Self {
        Self { store, attempt, lease, committed: Arc::default(), turn: Mutex::default() }
    }

    /// Has every commit on the connection noted from now on.
    async fn watch_commits(&self, connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
        let committed = Arc::clone(&self.committed);
        connection.lock_handle().await.map(|mut handle| {
            handle.set_commit_hook(move || {
                committed.store(true, Ordering::SeqCst);
                true
            });
        })
    }

    /// Something may be committed: it was, or the handler has set a hook of its own instead.
    fn may_have_committed(&self) -> bool {
        self.committed.load(Ordering::SeqCst) || Arc::strong_count(&self.committed) == 1
    }

    fn set_turn(&self, turn: Option<OwnedMutexGuard<()>>) {
        *self.turn.lock().unwrap_or_else(PoisonError::into_inner) = turn;
    }

    /// Begins the transaction, whoever the record belongs to.
    pub(super) async fn open(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        let opened = self.try_open().await;
        if opened.is_err() {
            self.set_turn(None);
        }
        opened
    }

    async fn try_open(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        let connections = &self.store.state.connections;
        // A newcomer queues before it asks for the connection, so that owners of records go first.
        self.set_turn(Some(connections.turn().await?));
        let begin = format!("BEGIN IMMEDIATE; SAVEPOINT {}", savepoint(&self.attempt));
        let mut transaction = connections.begin_for_handler(&self.store.pool, begin).await?;
        if let Err(error) = self.watch_commits(&mut transaction).await {
            self.abandon(transaction).await;
            let message = "begin: the connection cannot be watched";
            return Err(StoreError::new(StoreErrorKind::Unavailable, message).with_source(error));
        }
        Ok(transaction)
    }

    async fn lock(&self) -> Result<Transaction<'static, Sqlite>, TransactionError> {
        let statements = self.store.statements().await?;
        let mut transaction = self.open().await?;
        let mine = prepared(&Call::new(&statements.own.mine).of_attempt(&self.attempt))
            .fetch_optional(&mut *transaction)
            .await;
        let error = match mine {
            Ok(Some(_)) => return Ok(transaction),
            Ok(None) => {
                let message = "another attempt has taken the record over";
                TransactionError::new(TransactionErrorKind::Lost, message)
            }
            Err(source) => failed(TransactionErrorKind::Lost, "the record could not be read", source),
        };
        self.abandon(transaction).await;
        Err(error)
    }

    /// Runs a statement about the savepoint. Fails if the savepoint is gone: as
    /// [`Ended`](TransactionErrorKind::Ended) if something may be committed, else as
    /// [`Failed`](TransactionErrorKind::Failed).
    pub(super) async fn at_savepoint(
        &self,
        connection: &mut SqliteConnection,
        verb: &str,
    ) -> Result<(), TransactionError> {
        let statement = AssertSqlSafe(format!("{verb} {}", savepoint(&self.attempt)));
        let done = sqlx::raw_sql(statement).execute(connection).await;
        done.map(drop).map_err(|source| match (self.may_have_committed(), code(&source)) {
            (true, _) => {
                let message = "the transaction is not the one that was begun, and something was committed";
                failed(TransactionErrorKind::Ended, message, source)
            }
            (false, Some(ERROR)) => {
                let message = "SQLite or the handler has rolled the transaction back";
                failed(TransactionErrorKind::Failed, message, source)
            }
            (false, _) => failed(TransactionErrorKind::Lost, "the transaction was lost", source),
        })
    }

    async fn write(&self, connection: &mut SqliteConnection, last: &Last) -> Result<(), TransactionError> {
        // First of all, this proves that the transaction is the one that was begun.
        self.at_savepoint(connection, "RELEASE").await?;
        let statements = self.store.statements().await?;
        let fenced = match last {
            Last::Completion(response) => {
                Call::new(&statements.records.complete).with("response", &**response)
            }
            Last::Phase { .. } => Call::new(&statements.own.retain).with("lease", self.lease),
        };
        let changed = prepared(&fenced.of_attempt(&self.attempt)).execute(&mut *connection).await;
        if changed.map_err(Self::last_failed)?.rows_affected() == 0 {
            return Err(TransactionError::new(TransactionErrorKind::Lost, "the record is another attempt's"));
        }
        if let Last::Phase { name, result } = last {
            let finish = Call::new(&statements.own.finish_phase)
                .of_attempt(&self.attempt)
                .with("name", name.as_str())
                .with("result", &**result);
            prepared(&finish).execute(connection).await.map_err(Self::last_failed)?;
        }
        Ok(())
    }

    pub(super) fn last_failed(source: sqlx::Error) -> TransactionError {
        failed(kind_of(&source), "the last statement of the transaction failed", source)
    }

    pub(super) async fn send_commit(
        &self,
        transaction: Transaction<'static, Sqlite>,
    ) -> Result<(), TransactionError> {
        let committed = transaction.commit().await;
        self.set_turn(None);
        committed.map_err(|source| match code(&source) {
            // Nothing says whether the commit has reached the disk.
            None | Some(INPUT_OUTPUT) => failed(TransactionErrorKind::Unconfirmed, "COMMIT failed", source),
            Some(_) => failed(kind_of(&source), "COMMIT failed", source),
        })
    }

    /// Rolls back, and fails if the transaction is not the one that was begun.
    pub(super) async fn undo(
        &self,
        mut transaction: Transaction<'static, Sqlite>,
    ) -> Result<(), TransactionError> {
        // The proof comes first, because the rollback removes the savepoint.
        let proved = self.at_savepoint(&mut transaction, "ROLLBACK TO").await;
        self.abandon(transaction).await;
        match proved {
            // It was rolled back before.
            Err(error) if error.kind() == TransactionErrorKind::Failed => Ok(()),
            proved => proved,
        }
    }

    /// Rolls back without a proof that the transaction is the one that was begun. Closes a
    /// connection that is not in order.
    pub(super) async fn abandon(&self, transaction: Transaction<'static, Sqlite>) {
        if let Err(error) = transaction.rollback().await {
            let error = &error as &dyn std::error::Error;
            tracing::debug!(target: TRACING_TARGET, error, "nothing to roll back");
        }
        self.set_turn(None);
    }
}

#[async_trait]
impl Driver<Sqlite> for AttemptTransaction {
    async fn begin(&self) -> Result<Transaction<'static, Sqlite>, TransactionError> {
        self.lock().await
    }

    async fn commit(
        &self,
        mut transaction: Transaction<'static, Sqlite>,
        last: Last,
    ) -> Result<(), TransactionError> {
        if let Err(error) = self.write(&mut transaction, &last).await {
            self.abandon(transaction).await;
            return Err(error);
        }
        self.send_commit(transaction).await
    }

    async fn roll_back(&self, transaction: Transaction<'static, Sqlite>) -> Result<(), TransactionError> {
        self.undo(transaction).await
    }

    /// Does nothing: SQLite can end a transaction on its own connection only.
    async fn revoke(&self) {}

    fn again(&self) -> Box<dyn Driver<Sqlite>> {
        Box::new(Self::new(self.store.clone(), self.attempt.clone(), self.lease))
    }
}

/// Returns the meaning of a failed statement for its transaction, if the error is SQLite's.
pub(crate) fn transaction_error_kind(source: &sqlx::Error) -> Option<TransactionErrorKind> {
    source.as_database_error()?.try_downcast_ref::<SqliteError>()?;
    let refused = REFUSED.contains(&code(source)?);
    Some(if refused { TransactionErrorKind::Refused } else { TransactionErrorKind::Failed })
}

fn kind_of(source: &sqlx::Error) -> TransactionErrorKind {
    transaction_error_kind(source).unwrap_or_else(|| errors::transaction_error_kind(source))
}

fn failed(kind: TransactionErrorKind, message: &str, source: sqlx::Error) -> TransactionError {
    TransactionError::new(kind, message).with_source(source)
}

fn code(error: &sqlx::Error) -> Option<u32> {
    errors::code(error).map(|code| primary(&code))
}

/// `SQLITE_ERROR`, the code for a savepoint that does not exist.
const ERROR: u32 = 1;
/// The codes of errors that the same statement meets again: `SQLITE_ERROR`, `SQLITE_TOOBIG`,
/// `SQLITE_CONSTRAINT`, `SQLITE_MISMATCH`, `SQLITE_MISUSE`, `SQLITE_AUTH`, `SQLITE_RANGE`.
const REFUSED: [u32; 7] = [ERROR, 18, 19, 20, 21, 23, 25];
/// `SQLITE_IOERR`.
const INPUT_OUTPUT: u32 = 10;
