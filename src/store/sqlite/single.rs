//! Transactions of attempts that make no claim.
//!
//! The write lock of the database stands in for a lock on the key. Whoever waits for it in this
//! process has noted its key before, so that duplicates need not wait.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use bytes::Bytes;
use sqlx::{Sqlite, SqliteConnection, Transaction};

use super::{SqliteStore, prepared, transaction::AttemptTransaction};
use crate::{
    consumer::Consumer,
    error::StoreError,
    key::IdempotencyKey,
    store::{
        sql::{
            Engine,
            call::Call,
            single::{self, SingleDriver},
        },
        transaction::{BeginOutcome, TransactionError, TransactionErrorKind, TransactionLimits},
    },
    stored::record::{Attempt, Claim, Fenced, Record},
};

type Identity = (Consumer, IdempotencyKey);

/// The keys of which a transaction of this process is open, or waits for the write lock.
#[derive(Clone, Debug, Default)]
pub(super) struct Taken(Arc<Mutex<HashSet<Identity>>>);

/// One of these keys, until this is dropped.
#[derive(Debug)]
struct Entered {
    taken: Taken,
    identity: Identity,
}

impl Taken {
    fn identities(&self) -> MutexGuard<'_, HashSet<Identity>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, attempt: &Attempt) -> Option<Entered> {
        let identity = (attempt.consumer.clone(), attempt.key.clone());
        let entered = self.identities().insert(identity.clone());
        entered.then(|| Entered { taken: self.clone(), identity })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.taken.identities().remove(&self.identity);
    }
}

/// The transaction of one attempt.
#[derive(Debug)]
struct Single {
    store: SqliteStore,
    claim: Claim,
    transaction: AttemptTransaction,
    /// Dropped at the end of the transaction, which a handle to it may outlive.
    entered: Mutex<Option<Entered>>,
}

/// Begins a transaction, if no other one has its key and the key has no record.
pub(super) async fn begin(
    store: &SqliteStore,
    claim: &Claim,
    limits: &TransactionLimits,
) -> Result<BeginOutcome, StoreError> {
    // A duplicate only reads. A record may be made before the write lock is got, so that the look
    // is repeated then.
    if let Some(record) = single::find(store, &claim.attempt).await? {
        return Ok(BeginOutcome::Exists(Box::new(record)));
    }
    let Some(entered) = store.state.taken.enter(&claim.attempt) else { return Ok(BeginOutcome::Contended) };
    let begun = AttemptTransaction::new(store.clone(), claim.attempt.clone(), limits.lease);
    let transaction = begun.open().await?;
    let record = match single::find(store, &claim.attempt).await {
        Ok(None) => {
            let entered = Mutex::new(Some(entered));
            let driver = Single { store: store.clone(), claim: claim.clone(), transaction: begun, entered };
            return Ok(single::begun(driver, transaction, limits.begin_timeout, Some(limits.time_limit)));
        }
        found => found,
    };
    begun.abandon(transaction).await;
    Ok(record?.map_or(BeginOutcome::Contended, |record| BeginOutcome::Exists(Box::new(record))))
}

impl Single {
    /// Lets the next transaction with the key begin.
    fn leave(&self) {
        self.entered.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Adds a record as the last statement, and commits.
    async fn finish(
        &self,
        mut transaction: Transaction<'static, Sqlite>,
        add: Call<'_>,
    ) -> Result<(), TransactionError> {
        // First of all, this proves that the transaction is the one that was begun.
        let added = match self.transaction.at_savepoint(&mut transaction, "RELEASE").await {
            Ok(()) => self.add(&mut transaction, add).await,
            Err(error) => Err(error),
        };
        if let Err(error) = added {
            self.transaction.abandon(transaction).await;
            return Err(error);
        }
        self.transaction.send_commit(transaction).await
    }

    async fn add(&self, connection: &mut SqliteConnection, add: Call<'_>) -> Result<(), TransactionError> {
        let clear = Call::new(&self.store.statements().await?.singles.clear).of_claim(&self.claim);
        let cleared = prepared(&clear).execute(&mut *connection).await;
        cleared.map_err(AttemptTransaction::last_failed)?;
        let added = prepared(&add.of_claim(&self.claim)).execute(connection).await;
        match added.map_err(AttemptTransaction::last_failed)?.rows_affected() {
            0 => Err(single::taken()),
            _ => Ok(()),
        }
    }

    /// Undoes the writes of the handler. Returns `None` if SQLite has rolled the transaction back
    /// before, and nothing was committed.
    async fn undone(
        &self,
        mut transaction: Transaction<'static, Sqlite>,
    ) -> Result<Option<Transaction<'static, Sqlite>>, TransactionError> {
        let Err(error) = self.transaction.at_savepoint(&mut transaction, "ROLLBACK TO").await else {
            return Ok(Some(transaction));
        };
        self.transaction.abandon(transaction).await;
        if error.kind() == TransactionErrorKind::Ended { Err(error) } else { Ok(None) }
    }

    async fn try_complete(
        &self,
        transaction: Transaction<'static, Sqlite>,
        response: &Bytes,
    ) -> Result<(), TransactionError> {
        match self.undone(transaction).await? {
            Some(transaction) => {
                let add = Call::new(&self.store.statements().await?.singles.add);
                self.finish(transaction, add.with("response", &**response)).await
            }
            None => single::add(&self.store, &self.claim, response).await,
        }
    }

    async fn try_hold(&self, transaction: Transaction<'static, Sqlite>) -> Result<(), TransactionError> {
        match self.undone(transaction).await? {
            Some(transaction) => {
                self.finish(transaction, Call::new(&self.store.statements().await?.singles.hold)).await
            }
            None => self.hold().await.map(drop).map_err(TransactionError::from),
        }
    }
}

#[async_trait]
impl SingleDriver<Sqlite> for Single {
    async fn commit(
        &self,
        transaction: Transaction<'static, Sqlite>,
        response: Bytes,
    ) -> Result<(), TransactionError> {
        let add = Call::new(&self.store.statements().await?.singles.add).with("response", &*response);
        let committed = self.finish(transaction, add).await;
        self.leave();
        committed
    }

    async fn complete(
        &self,
        transaction: Transaction<'static, Sqlite>,
        response: Bytes,
    ) -> Result<(), TransactionError> {
        let completed = self.try_complete(transaction, &response).await;
        self.leave();
        completed
    }

    async fn roll_back(&self, transaction: Transaction<'static, Sqlite>) -> Result<(), TransactionError> {
        let undone = self.transaction.undo(transaction).await;
        self.leave();
        undone
    }

    /// Does nothing: SQLite can end a transaction on its own connection only.
    async fn revoke(&self) {}

    /// Looks only: a commit without a reply has ended.
    async fn outcome(&self) -> Result<Option<Record>, StoreError> {
        single::find(&self.store, &self.claim.attempt).await
    }

    async fn hold_inside(&self, transaction: Transaction<'static, Sqlite>) -> Result<(), TransactionError> {
        let held = self.try_hold(transaction).await;
        self.leave();
        held
    }

    async fn hold(&self) -> Result<Fenced, StoreError> {
        single::hold(&self.store, &self.claim).await
    }
}
