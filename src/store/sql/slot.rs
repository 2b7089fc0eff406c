//! The slot in which the transaction of an attempt lies.

use std::{
    fmt,
    future::pending,
    mem,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use http::Extensions;
use sqlx::{Database, Transaction};
use tokio::{
    runtime::Handle,
    sync::Notify,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    redact::{Length, TRACING_TARGET, traced},
    store::transaction::{StoreTransaction, TransactionError, TransactionErrorKind, TransactionUsage},
};

/// The part of a database in transactions of handlers. Calls of it are not cancelled.
#[async_trait]
pub(crate) trait Driver<DB: Database>: fmt::Debug + Send + Sync + 'static {
    /// Begins a fresh transaction in which the record is the attempt's and stays so.
    async fn begin(&self) -> Result<Transaction<'static, DB>, TransactionError>;

    /// Writes the outcome of the transaction as its last statement, and commits.
    async fn commit(&self, transaction: Transaction<'static, DB>, last: Last)
    -> Result<(), TransactionError>;

    /// Rolls the transaction back, whatever state it is in.
    async fn roll_back(&self, transaction: Transaction<'static, DB>) -> Result<(), TransactionError>;

    /// Ends a transaction that the handler does not give back, if the database can.
    async fn revoke(&self);

    /// Makes a driver for another transaction of the same attempt.
    fn again(&self) -> Box<dyn Driver<DB>>;
}

/// The last statement of a transaction.
#[derive(Clone)]
pub(crate) enum Last {
    /// The response that completes the record.
    Completion(Bytes),
    /// The result of a phase.
    Phase { name: String, result: Bytes },
}

/// Shows the length of a response or a result, and none of its bytes.
impl fmt::Debug for Last {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Completion(response) => f.debug_tuple("Completion").field(&Length(response)).finish(),
            Self::Phase { name, result } => {
                f.debug_struct("Phase").field("name", name).field("result", &Length(result)).finish()
            }
        }
    }
}

/// The slot of an attempt's transaction: between the request's extensions, the handler and the
/// layer.
#[derive(Debug)]
pub(crate) struct Slot<DB: Database> {
    driver: Box<dyn Driver<DB>>,
    begin_timeout: Duration,
    time_limit: Option<Duration>,
    place: Mutex<Place<DB>>,
    changed: Notify,
}

/// The guard of a task that begins a transaction. If the task panics or its runtime shuts down, the
/// guard wakes those who wait, with an error.
struct Unfinished<DB: Database>(Arc<Slot<DB>>);

impl<DB: Database> Unfinished<DB> {
    async fn begin(self) {
        let Self(slot) = &self;
        slot.put(match slot.driver.begin().await {
            Ok(transaction) => Place::Here { transaction, until: until(slot.time_limit) },
            Err(error) => {
                tracing::warn!(
                    target: TRACING_TARGET, error = &error as &dyn std::error::Error,
                    "a transaction could not begin"
                );
                Place::Failed(Arc::new(error))
            }
        });
    }
}

impl<DB: Database> Drop for Unfinished<DB> {
    fn drop(&mut self) {
        let mut place = self.0.place();
        if matches!(*place, Place::Beginning) {
            let message = "the task that began the transaction ended early";
            let error = TransactionError::new(TransactionErrorKind::Unavailable, message);
            *place = Place::Failed(Arc::new(error));
        }
        drop(place);
        self.0.changed.notify_waiters();
    }
}

enum Place<DB: Database> {
    Unused,
    /// It was begun before the handler asks for it.
    Ready {
        transaction: Transaction<'static, DB>,
        until: Option<Instant>,
    },
    Beginning,
    Here {
        transaction: Transaction<'static, DB>,
        until: Option<Instant>,
    },
    Lent {
        until: Option<Instant>,
    },
    /// It could not be begun.
    Failed(Arc<TransactionError>),
    /// The layer has taken it.
    Taken,
}

impl<DB: Database> Slot<DB> {
    /// Puts a transaction that is not begun yet into the extensions of a request.
    pub(crate) fn offer(
        driver: impl Driver<DB>,
        begin_timeout: Duration,
        time_limit: Option<Duration>,
        extensions: &mut Extensions,
    ) -> Arc<dyn StoreTransaction> {
        let slot = Self::new(Box::new(driver), begin_timeout, time_limit, Place::Unused);
        extensions.insert(Arc::clone(&slot));
        slot
    }

    /// Makes the slot of a transaction that is begun.
    pub(crate) fn begun(
        driver: impl Driver<DB>,
        transaction: Transaction<'static, DB>,
        begin_timeout: Duration,
        time_limit: Option<Duration>,
    ) -> Arc<Self> {
        let place = Place::Ready { transaction, until: until(time_limit) };
        Self::new(Box::new(driver), begin_timeout, time_limit, place)
    }

    fn new(
        driver: Box<dyn Driver<DB>>,
        begin_timeout: Duration,
        time_limit: Option<Duration>,
        place: Place<DB>,
    ) -> Arc<Self> {
        let (place, changed) = (Mutex::new(place), Notify::new());
        Arc::new(Self { driver, begin_timeout, time_limit, place, changed })
    }

    /// Makes the slot of another transaction of the same attempt.
    pub(crate) fn again(&self) -> Arc<Self> {
        Self::new(self.driver.again(), self.begin_timeout, self.time_limit, Place::Unused)
    }

    /// Runs work, and stops it when it takes longer than the transaction may be open.
    pub(crate) async fn within_time_limit<T>(
        &self,
        work: impl Future<Output = T>,
    ) -> Result<T, TransactionError> {
        let Some(limit) = self.time_limit else { return Ok(work.await) };
        timeout(limit, work).await.map_err(|elapsed| {
            let message = "the transaction is open for longer than TransactionOptions::with_time_limit";
            TransactionError::new(TransactionErrorKind::Lost, message).with_source(elapsed)
        })
    }

    /// Commits the transaction, with `last` as its last statement.
    pub(crate) async fn finish(&self, last: Last) -> Result<(), TransactionError> {
        let transaction = self.take().await?;
        self.driver.commit(transaction, last).await
    }

    fn place(&self) -> MutexGuard<'_, Place<DB>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, place: Place<DB>) {
        *self.place() = place;
        self.changed.notify_waiters();
    }

    /// Waits until `look` finds something, and returns that.
    async fn wait_for<T>(&self, mut look: impl FnMut() -> Option<T>) -> T {
        loop {
            // Registered before the look, so that a change between the look and the wait is not
            // missed.
            let changed = self.changed.notified();
            if let Some(found) = look() {
                return found;
            }
            changed.await;
        }
    }

    /// Lends the transaction, and begins it the first time. The task that begins it continues if
    /// the caller stops waiting.
    pub(crate) async fn lend(self: Arc<Self>) -> Result<Lent<DB>, Arc<TransactionError>> {
        let lent = timeout(self.begin_timeout, self.wait_for(|| self.try_lend())).await;
        lent.unwrap_or_else(|elapsed| {
            let message = format!("the transaction did not begin within {:?}", self.begin_timeout);
            let error = TransactionError::new(TransactionErrorKind::Unavailable, message);
            Err(Arc::new(error.with_source(elapsed)))
        })
    }

    /// Returns `None` while the transaction is being begun.
    fn try_lend(self: &Arc<Self>) -> Option<Result<Lent<DB>, Arc<TransactionError>>> {
        let mut place = self.place();
        // Taken out under the lock: of several callers, one begins the transaction.
        match mem::replace(&mut *place, Place::Beginning) {
            Place::Unused => {
                drop(place);
                // In a task, because a BEGIN that is cancelled leaves its connection in a
                // transaction.
                tokio::spawn(traced(Unfinished(Arc::clone(self)).begin()));
                None
            }
            Place::Beginning => None,
            Place::Ready { transaction, until } | Place::Here { transaction, until } => {
                *place = Place::Lent { until };
                Some(Ok(Lent { transaction: Some(transaction), slot: Arc::clone(self) }))
            }
            Place::Failed(error) => {
                *place = Place::Failed(Arc::clone(&error));
                Some(Err(error))
            }
            kept @ (Place::Lent { .. } | Place::Taken) => {
                *place = kept;
                tracing::error!(
                    target: TRACING_TARGET,
                    "a handler asks for its transaction while it has it, or after it has returned"
                );
                let message = "the transaction is in use, or its handler has returned";
                Some(Err(Arc::new(TransactionError::new(TransactionErrorKind::InUse, message))))
            }
        }
    }

    fn give_back(self: &Arc<Self>, transaction: Transaction<'static, DB>) {
        let mut place = self.place();
        if let Place::Lent { until } = *place {
            *place = Place::Here { transaction, until };
        } else if let Ok(runtime) = Handle::try_current() {
            // The layer has given it up, and other transactions may wait for its end.
            let slot = Arc::clone(self);
            runtime.spawn(traced(async move { slot.driver.roll_back(transaction).await }));
        }
        drop(place);
        self.changed.notify_waiters();
    }

    /// Takes the transaction away. Waits while it is being begun. If the handler keeps it, the
    /// database ends it, if it can.
    pub(crate) async fn take(&self) -> Result<Transaction<'static, DB>, TransactionError> {
        let taken = self.wait_for(|| self.try_take()).await;
        if taken.as_ref().is_err_and(|error| error.kind() == TransactionErrorKind::InUse) {
            self.driver.revoke().await;
        }
        taken
    }

    fn try_take(&self) -> Option<Result<Transaction<'static, DB>, TransactionError>> {
        let mut place = self.place();
        let error = match mem::replace(&mut *place, Place::Taken) {
            Place::Beginning => {
                *place = Place::Beginning;
                return None;
            }
            Place::Ready { transaction, .. } | Place::Here { transaction, .. } => {
                return Some(Ok(transaction));
            }
            Place::Lent { .. } => TransactionError::new(
                TransactionErrorKind::InUse,
                "the handler had not given its transaction back when it returned",
            ),
            Place::Failed(error) => {
                TransactionError::new(TransactionErrorKind::Lost, "the transaction was not begun")
                    .with_source(error)
            }
            Place::Unused | Place::Taken => {
                TransactionError::new(TransactionErrorKind::Lost, "there is no transaction")
            }
        };
        Some(Err(error))
    }

    fn until(&self) -> Option<Instant> {
        match *self.place() {
            Place::Ready { until, .. } | Place::Here { until, .. } | Place::Lent { until } => until,
            Place::Unused | Place::Beginning | Place::Failed(_) | Place::Taken => None,
        }
    }
}

#[async_trait]
impl<DB: Database> StoreTransaction for Slot<DB> {
    fn usage(&self) -> TransactionUsage {
        match *self.place() {
            Place::Unused | Place::Ready { .. } => TransactionUsage::Unused,
            Place::Lent { .. } => TransactionUsage::InUse,
            Place::Beginning | Place::Here { .. } | Place::Failed(_) => TransactionUsage::Open,
            Place::Taken => TransactionUsage::Ended,
        }
    }

    async fn overdue(&self) {
        if self.time_limit.is_none() {
            return pending().await;
        }
        let until = self.wait_for(|| self.until()).await;
        sleep_until(until).await;
    }

    async fn commit(&self, response: Bytes) -> Result<(), TransactionError> {
        self.finish(Last::Completion(response)).await
    }

    async fn roll_back(&self) -> Result<(), TransactionError> {
        match self.take().await {
            Ok(transaction) => self.driver.roll_back(transaction).await,
            // There is nothing to roll back, or the database was told to end it.
            Err(_) => Ok(()),
        }
    }
}

/// The transaction while the handler has it. Dropping it gives the transaction back.
pub(crate) struct Lent<DB: Database> {
    /// Present until this is dropped.
    transaction: Option<Transaction<'static, DB>>,
    slot: Arc<Slot<DB>>,
}

impl<DB: Database> Deref for Lent<DB> {
    type Target = DB::Connection;

    #[expect(clippy::expect_used, reason = "the transaction leaves only when this is dropped")]
    fn deref(&self) -> &DB::Connection {
        self.transaction.as_ref().expect("the transaction is there until it is given back")
    }
}

impl<DB: Database> DerefMut for Lent<DB> {
    #[expect(clippy::expect_used, reason = "the transaction leaves only when this is dropped")]
    fn deref_mut(&mut self) -> &mut DB::Connection {
        self.transaction.as_mut().expect("the transaction is there until it is given back")
    }
}

impl<DB: Database> Drop for Lent<DB> {
    fn drop(&mut self) {
        if let Some(transaction) = self.transaction.take() {
            self.slot.give_back(transaction);
        }
    }
}

impl<DB: Database> fmt::Debug for Place<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unused => "Unused",
            Self::Ready { .. } => "Ready",
            Self::Beginning => "Beginning",
            Self::Here { .. } => "Here",
            Self::Lent { .. } => "Lent",
            Self::Failed(_) => "Failed",
            Self::Taken => "Taken",
        })
    }
}

/// Returns when a transaction that begins now has been open for its limit.
fn until(time_limit: Option<Duration>) -> Option<Instant> {
    time_limit.and_then(|limit| Instant::now().checked_add(limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_what_is_stored_is_shown() {
        let result = || Bytes::from_static(b"secret");
        let shown = [Last::Completion(result()), Last::Phase { name: "step".to_owned(), result: result() }]
            .map(|last| format!("{last:?}"));
        assert_eq!(shown, ["Completion(6 bytes)", r#"Phase { name: "step", result: 6 bytes }"#]);
    }
}
