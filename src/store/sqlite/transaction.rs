//! Transactions of handlers.
//!
//! A transaction runs on the connection that writes. While it is open, there is no other write, and
//! no claim can take the record over. A savepoint, set at its begin, proves at the end that it is
//! still the transaction that was begun.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use sqlx::{
    AssertSqlSafe, Transaction,
    sqlite::{Sqlite, SqliteConnection},
};
use tokio::sync::OwnedMutexGuard;

use super::{SqliteStore, connection::primary, prepared};
use crate::{
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
    /// The place at the head of the queue of writers, while the transaction is open.
    turn: Mutex<Option<OwnedMutexGuard<()>>>,
}

impl AttemptTransaction {
    pub(super) fn new(store: SqliteStore, attempt: Attempt, lease: Duration) -> Self {
        Self { store, attempt, lease, turn: Mutex::default() }
    }

    fn set_turn(&self, turn: Option<OwnedMutexGuard<()>>) {
        *self.turn.lock().unwrap_or_else(PoisonError::into_inner) = turn;
    }

    async fn lock(&self) -> Result<Transaction<'static, Sqlite>, TransactionError> {
        let statements = self.store.statements().await?;
        let connections = &self.store.state.connections;
        // A newcomer queues before it asks for the connection, so that owners of records go first.
        self.set_turn(Some(connections.turn().await?));
        let begin = format!("BEGIN IMMEDIATE; SAVEPOINT {}", savepoint(&self.attempt));
        let mut transaction = connections.begin_for_handler(&self.store.pool, begin).await?;
        let mine = prepared(&Call::new(&statements.own.mine).of_attempt(&self.attempt))
            .fetch_optional(&mut *transaction)
            .await;
        match mine
            .map_err(|source| failed(TransactionErrorKind::Lost, "the record could not be read", source))?
        {
            Some(_) => Ok(transaction),
            None => {
                self.abandon(transaction).await;
                let message = "another attempt has taken the record over";
                Err(TransactionError::new(TransactionErrorKind::Lost, message))
            }
        }
    }

    /// Runs a statement about the savepoint. Fails if the savepoint is gone: then the transaction
    /// is another one, or none.
    async fn at_savepoint(
        &self,
        connection: &mut SqliteConnection,
        verb: &str,
    ) -> Result<(), TransactionError> {
        let statement = AssertSqlSafe(format!("{verb} {}", savepoint(&self.attempt)));
        let done = sqlx::raw_sql(statement).execute(connection).await;
        let message = "the transaction is not the one that was begun";
        done.map(drop).map_err(|source| match code(&source) {
            Some(ERROR) => failed(TransactionErrorKind::Ended, message, source),
            _ => failed(TransactionErrorKind::Lost, message, source),
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
        let failed = |source| {
            let message = "the last statement of the transaction failed";
            failed(TransactionErrorKind::Failed, message, source)
        };
        let changed = prepared(&fenced.of_attempt(&self.attempt)).execute(&mut *connection).await;
        if changed.map_err(failed)?.rows_affected() == 0 {
            return Err(TransactionError::new(TransactionErrorKind::Lost, "the record is another attempt's"));
        }
        if let Last::Phase { name, result } = last {
            let finish = Call::new(&statements.own.finish_phase)
                .of_attempt(&self.attempt)
                .with("name", name.as_str())
                .with("result", &**result);
            prepared(&finish).execute(connection).await.map_err(failed)?;
        }
        Ok(())
    }

    /// Rolls back without a proof that the transaction is the one that was begun. Closes a
    /// connection that is not in order.
    async fn abandon(&self, transaction: Transaction<'static, Sqlite>) {
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
        let locked = self.lock().await;
        if locked.is_err() {
            self.set_turn(None);
        }
        locked
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
        let committed = transaction.commit().await;
        self.set_turn(None);
        committed.map_err(|source| match code(&source) {
            // Nothing says whether the commit has reached the disk.
            None | Some(INPUT_OUTPUT) => failed(TransactionErrorKind::Unconfirmed, "COMMIT failed", source),
            Some(_) => failed(TransactionErrorKind::Failed, "COMMIT failed", source),
        })
    }

    async fn roll_back(&self, mut transaction: Transaction<'static, Sqlite>) -> Result<(), TransactionError> {
        // The proof comes first, because the rollback removes the savepoint.
        let proved = self.at_savepoint(&mut transaction, "ROLLBACK TO").await;
        self.abandon(transaction).await;
        proved
    }

    /// Does nothing: SQLite can end a transaction on its own connection only.
    async fn revoke(&self) {}

    fn again(&self) -> Box<dyn Driver<Sqlite>> {
        Box::new(Self::new(self.store.clone(), self.attempt.clone(), self.lease))
    }
}

fn failed(kind: TransactionErrorKind, message: &str, source: sqlx::Error) -> TransactionError {
    TransactionError::new(kind, message).with_source(source)
}

fn code(error: &sqlx::Error) -> Option<u32> {
    errors::code(error).map(|code| primary(&code))
}

/// `SQLITE_ERROR`, the code for a savepoint that does not exist.
const ERROR: u32 = 1;
/// `SQLITE_IOERR`.
const INPUT_OUTPUT: u32 = 10;
