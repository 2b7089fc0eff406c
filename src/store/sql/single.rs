//! Transactions of attempts that make no claim: the key is the attempt's by its transaction alone.

use std::{fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use http::Extensions;
use sqlx::{Database, Transaction};

use super::{
    Engine, Rank, all, applied,
    call::{Call, statements},
    rows,
    slot::{Driver, Last, Slot},
};
use crate::{
    error::StoreError,
    redact::TRACING_TARGET,
    store::transaction::{
        BeginOutcome, SingleTransaction, StoreTransaction, TransactionError, TransactionErrorKind,
        TransactionUsage,
    },
    stored::record::{Attempt, Claim, Fenced, Record},
};

/// The part of a database in such transactions. Calls of it are not cancelled.
#[async_trait]
pub(in crate::store) trait SingleDriver<DB: Database>:
    fmt::Debug + Send + Sync + 'static
{
    /// Adds the completed record as the last statement, and commits.
    async fn commit(
        &self,
        transaction: Transaction<'static, DB>,
        response: Bytes,
    ) -> Result<(), TransactionError>;

    /// The same, after the writes of the handler are undone.
    async fn complete(
        &self,
        transaction: Transaction<'static, DB>,
        response: Bytes,
    ) -> Result<(), TransactionError>;

    /// Rolls the transaction back, whatever state it is in.
    async fn roll_back(&self, transaction: Transaction<'static, DB>) -> Result<(), TransactionError>;

    /// Ends a transaction that the handler does not give back, if the database can.
    async fn revoke(&self);

    /// Returns the record of the key, unless it has expired, once the transaction has ended.
    async fn outcome(&self) -> Result<Option<Record>, StoreError>;

    /// Undoes the writes of the handler, adds a held record, and commits.
    async fn hold_inside(&self, transaction: Transaction<'static, DB>) -> Result<(), TransactionError>;

    /// Adds a held record in a statement of its own.
    async fn hold(&self) -> Result<Fenced, StoreError>;
}

/// The transaction of one attempt.
#[derive(Debug)]
struct Single<DB: Database> {
    slot: Arc<Slot<DB>>,
    driver: Arc<dyn SingleDriver<DB>>,
}

/// Makes the outcome of a transaction that is begun.
pub(in crate::store) fn begun<DB: Database>(
    driver: impl SingleDriver<DB>,
    transaction: Transaction<'static, DB>,
    begin_timeout: Duration,
    time_limit: Option<Duration>,
) -> BeginOutcome {
    let (driver, mut extensions) = (Arc::new(driver), Extensions::new());
    let in_slot = InSlot(Arc::clone(&driver) as Arc<dyn SingleDriver<DB>>);
    let slot = Slot::begun(in_slot, transaction, begin_timeout, time_limit);
    extensions.insert(Arc::clone(&slot));
    BeginOutcome::begun(Arc::new(Single { slot, driver }), extensions)
}

#[async_trait]
impl<DB: Database> StoreTransaction for Single<DB> {
    fn usage(&self) -> TransactionUsage {
        self.slot.usage()
    }

    async fn overdue(&self) {
        self.slot.overdue().await;
    }

    async fn commit(&self, response: Bytes) -> Result<(), TransactionError> {
        self.slot.commit(response).await
    }

    async fn roll_back(&self) -> Result<(), TransactionError> {
        self.slot.roll_back().await
    }
}

#[async_trait]
impl<DB: Database> SingleTransaction for Single<DB> {
    async fn complete(&self, response: Bytes) -> Result<(), TransactionError> {
        let transaction = self.slot.take().await?;
        self.driver.complete(transaction, response).await
    }

    async fn outcome(&self) -> Result<Option<Record>, StoreError> {
        self.driver.outcome().await
    }

    async fn hold(&self) -> Result<Fenced, StoreError> {
        if let Ok(transaction) = self.slot.take().await {
            match self.driver.hold_inside(transaction).await {
                Ok(()) => return Ok(Fenced::Applied),
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(target: TRACING_TARGET, error, "a key is held after its transaction");
                }
            }
        }
        self.driver.hold().await
    }
}

/// The driver in the slot. It begins nothing, because the attempt has one transaction, which is
/// begun.
#[derive(Debug)]
struct InSlot<DB: Database>(Arc<dyn SingleDriver<DB>>);

#[async_trait]
impl<DB: Database> Driver<DB> for InSlot<DB> {
    async fn begin(&self) -> Result<Transaction<'static, DB>, TransactionError> {
        Err(only_one())
    }

    async fn commit(
        &self,
        transaction: Transaction<'static, DB>,
        last: Last,
    ) -> Result<(), TransactionError> {
        match last {
            Last::Completion(response) => self.0.commit(transaction, response).await,
            Last::Phase { .. } => Err(only_one()),
        }
    }

    async fn roll_back(&self, transaction: Transaction<'static, DB>) -> Result<(), TransactionError> {
        self.0.roll_back(transaction).await
    }

    async fn revoke(&self) {
        self.0.revoke().await;
    }

    fn again(&self) -> Box<dyn Driver<DB>> {
        Box::new(Self(Arc::clone(&self.0)))
    }
}

fn only_one() -> TransactionError {
    let message = "the strategy of a single transaction has no phases";
    TransactionError::new(TransactionErrorKind::Failed, message)
}

statements! {
    /// The statements about records that are made in such transactions.
    pub(in crate::store) struct Singles by dialect {
        /// Finds the record of a key that has one.
        find: dialect.statement("SELECT {record} FROM {records} AS {r} WHERE {this_key} AND NOT {absent}"),
        /// Removes the record of a key that counts as having none.
        clear: dialect.statement("DELETE FROM {records} AS {r} WHERE {this_key} AND {absent}"),
        add: dialect.statement(
            "INSERT INTO {records} (consumer, \"key\", id, fingerprint, state, attempt, attempt_number,
                 abandoned, max_abandoned, lease_until, created_at, expires_at, completed_at, response)
             VALUES (:consumer, :key, :record, :fingerprint, 'completed', :attempt, 1, 0, :max_abandoned,
                 {now}, {now}, {now} + :retention, {now}, :response)
             ON CONFLICT (consumer, \"key\") DO NOTHING"
        ),
        hold: dialect.statement(
            "INSERT INTO {records} (consumer, \"key\", id, fingerprint, state, attempt, attempt_number,
                 abandoned, max_abandoned, lease_until, created_at, expires_at)
             VALUES (:consumer, :key, :record, :fingerprint, 'held', :attempt, 1, 0, :max_abandoned,
                 {now}, {now}, {now} + :retention)
             ON CONFLICT (consumer, \"key\") DO NOTHING"
        ),
    }
}

/// Returns the record of a key, unless it has expired.
pub(in crate::store) async fn find<E: Engine>(
    engine: &E,
    attempt: &Attempt,
) -> Result<Option<Record>, StoreError> {
    let call = Call::new(&engine.statements().await?.singles.find).of_key(&attempt.consumer, &attempt.key);
    Ok(all::<E, _>("get", &engine.read("get", call).await?, rows::record)?.pop())
}

/// Adds a completed record in a statement of its own. Fails if the key has a record.
pub(in crate::store) async fn add<E: Engine>(
    engine: &E,
    claim: &Claim,
    response: &Bytes,
) -> Result<(), TransactionError> {
    let add = Call::new(&engine.statements().await?.singles.add).with("response", &**response);
    match insert(engine, "complete", claim, add.of_claim(claim)).await? {
        Fenced::Applied => Ok(()),
        Fenced::Lost => Err(taken()),
    }
}

/// Adds a held record in a statement of its own, if the key has no record.
pub(in crate::store) async fn hold<E: Engine>(engine: &E, claim: &Claim) -> Result<Fenced, StoreError> {
    let hold = Call::new(&engine.statements().await?.singles.hold).of_claim(claim);
    insert(engine, "hold", claim, hold).await
}

async fn insert<E: Engine>(
    engine: &E,
    operation: &str,
    claim: &Claim,
    insert: Call<'_>,
) -> Result<Fenced, StoreError> {
    let clear = Call::new(&engine.statements().await?.singles.clear).of_claim(claim);
    engine.change(Rank::Owner, operation, clear).await?;
    Ok(applied(engine.change(Rank::Owner, operation, insert).await?))
}

/// Another attempt has made a record meanwhile.
pub(in crate::store) fn taken() -> TransactionError {
    let message = "the key was claimed meanwhile, and has a record";
    TransactionError::new(TransactionErrorKind::Lost, message)
}
