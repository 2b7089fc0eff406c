//! The transaction that a handler writes through.

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
use http::{Extensions, Response};
use sqlx::{Database, Transaction};
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    Idempotency, ProblemJson, Rejection, RejectionCode, StoreTransaction, TRACING_TARGET, TransactionError,
    TransactionErrorKind, TransactionUsage, error::BoxError, rejection::respond,
};

/// The transaction of an attempt, in a database of sqlx: what the handler writes through it is committed together with
/// the stored response, or not at all.
///
/// With the feature `axum` it is an extractor; `&mut *tx` is what sqlx executes on:
///
/// ```
/// # #[cfg(all(feature = "axum", feature = "postgres"))] {
/// use axum::http::StatusCode;
/// use sqlx::Postgres;
/// use tower_idempotency::Tx;
///
/// async fn create_charge(mut tx: Tx<Postgres>) -> Result<StatusCode, StatusCode> {
///     sqlx::query("INSERT INTO charges (amount) VALUES (2000)")
///         .execute(&mut *tx)
///         .await
///         .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
///     Ok(StatusCode::CREATED)
/// }
/// # }
/// ```
///
/// Extracting it begins the transaction. When the handler has returned, the layer completes the record as the last
/// statement of that transaction and commits; only then is the response sent:
///
/// | the handler's result | what it wrote |
/// |---|---|
/// | 2xx or 3xx that is stored | committed, with the response |
/// | 4xx that is stored | rolled back, and the response is stored; see [`keep_writes_of_client_errors`] |
/// | anything else that is stored, by a policy or a directive | rolled back, and the response is stored |
/// | not stored: 5xx, an error, a panic, a directive | rolled back; the key is released or held |
///
/// The handler cannot end the transaction. It gives it back by dropping it, and may extract it again; whoever still has
/// it when the handler has returned (a spawned task, a static) makes the answer 500 `transaction-kept`, and what was
/// written is rolled back. In a response body that is a stream it must be dropped at the body's end.
///
/// `Connection::begin` on it sets a savepoint. Take it after calls to other services, not before: while it is open, rows
/// are locked, and on SQLite nobody else can write.
///
/// A statement that fails spoils the whole transaction on PostgreSQL: if the handler goes on and answers 200 all the
/// same, the client gets 500 `transaction-failed`. On SQLite only that statement is undone, and the rest is committed.
///
/// [`keep_writes_of_client_errors`]: crate::TransactionOptions::keep_writes_of_client_errors
pub struct Tx<DB: Database> {
    /// There until it is dropped.
    transaction: Option<Transaction<'static, DB>>,
    slot: Arc<Slot<DB>>,
}

impl<DB: Database> Tx<DB> {
    /// Begins the transaction of the request with these extensions, or gets it again. For services without axum.
    ///
    /// The future needs nothing of the request and may be dropped.
    ///
    /// # Errors
    ///
    /// [`TxError`] if the request has no key, the layer's store is not of this database, the handler has the transaction
    /// already, or it cannot be begun. Answer with [`TxError::into_response`].
    pub fn begin(extensions: &Extensions) -> impl Future<Output = Result<Self, TxError>> + Send + use<DB> {
        let slot = extensions.get::<Arc<Slot<DB>>>().cloned();
        let guarded = extensions.get::<Idempotency>().is_some();
        async move {
            match slot {
                Some(slot) => slot.lend().await,
                None if guarded => Err(TxError::no_store()),
                None => Err(TxError::no_key()),
            }
        }
    }
}

impl<DB: Database> Deref for Tx<DB> {
    type Target = DB::Connection;

    #[expect(clippy::expect_used, reason = "the transaction leaves only when this is dropped")]
    fn deref(&self) -> &DB::Connection {
        self.transaction.as_ref().expect("the transaction is there until it is given back")
    }
}

impl<DB: Database> DerefMut for Tx<DB> {
    #[expect(clippy::expect_used, reason = "the transaction leaves only when this is dropped")]
    fn deref_mut(&mut self) -> &mut DB::Connection {
        self.transaction.as_mut().expect("the transaction is there until it is given back")
    }
}

impl<DB: Database> Drop for Tx<DB> {
    fn drop(&mut self) {
        if let Some(transaction) = self.transaction.take() {
            self.slot.give_back(transaction);
        }
    }
}

impl<DB: Database> fmt::Debug for Tx<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tx").field(&DB::NAME).finish()
    }
}

/// A handler could not get its transaction, or one of its statements failed. As a response it is a refusal, which is
/// never stored, so that the transaction is rolled back and the key released.
///
/// It is made of any error of sqlx, so that a handler may answer with it: 503 `transaction-conflict` with `Retry-After`
/// for a serialization failure or a deadlock, 503 `transaction-lost` for a time-out of the server or a broken connection,
/// 500 `transaction-failed` for everything else. The cause is logged, and not
/// shown to the client.
///
/// ```
/// # #[cfg(all(feature = "axum", feature = "postgres"))] {
/// # use sqlx::Postgres;
/// # use tower_idempotency::{Tx, TxError};
/// async fn transfer(mut tx: Tx<Postgres>) -> Result<&'static str, TxError> {
///     sqlx::query("UPDATE accounts SET balance = balance - 1 WHERE id = 1").execute(&mut *tx).await?;
///     sqlx::query("UPDATE accounts SET balance = balance + 1 WHERE id = 2").execute(&mut *tx).await?;
///     Ok("done")
/// }
/// # }
/// ```
#[derive(Debug, thiserror::Error)]
#[error("{}", rejection.detail())]
pub struct TxError {
    rejection: Box<Rejection>,
    source: Option<BoxError>,
}

impl TxError {
    fn new(code: RejectionCode, detail: &'static str) -> Self {
        Self { rejection: Box::new(Rejection::new(code, detail)), source: None }
    }

    fn no_key() -> Self {
        Self::new(
            RejectionCode::KeyMissing,
            "This operation needs an idempotency key, or is not guarded by an idempotency layer.",
        )
    }

    fn no_store() -> Self {
        tracing::error!(
            target: TRACING_TARGET,
            "a handler asks for a transaction of a database that is not the one of its idempotency layer"
        );
        Self::new(
            RejectionCode::StoreMisconfigured,
            "The request was not performed; the server's log says why.",
        )
    }

    /// Why.
    #[must_use]
    pub fn code(&self) -> RejectionCode {
        self.rejection.code()
    }

    /// The refusal, rendered as [`ProblemJson`].
    #[must_use]
    pub fn into_response(self) -> Response<Bytes> {
        respond(*self.rejection, &ProblemJson)
    }
}

impl From<Arc<TransactionError>> for TxError {
    fn from(error: Arc<TransactionError>) -> Self {
        let (code, detail) = match error.kind() {
            TransactionErrorKind::Unavailable => (
                RejectionCode::StoreUnavailable,
                "The transaction could not begin; send the request again with the same key.",
            ),
            TransactionErrorKind::Lent => {
                (RejectionCode::TransactionKept, "The transaction of the request is in use already.")
            }
            TransactionErrorKind::Conflict => {
                (RejectionCode::TransactionConflict, "The transaction collided with another one.")
            }
            TransactionErrorKind::Failed | TransactionErrorKind::Ended => {
                (RejectionCode::TransactionFailed, "The transaction could not begin.")
            }
            TransactionErrorKind::Lost | TransactionErrorKind::Gone | TransactionErrorKind::Unconfirmed => {
                (RejectionCode::TransactionLost, "Another attempt has taken the request over.")
            }
        };
        Self { source: Some(error.into()), ..Self::new(code, detail) }
    }
}

impl From<sqlx::Error> for TxError {
    fn from(error: sqlx::Error) -> Self {
        let cause = &error as &dyn std::error::Error;
        tracing::error!(target: TRACING_TARGET, error = cause, "a statement of a handler failed");
        let code = error.as_database_error().and_then(|error| error.code());
        let (code, detail) = match (&error, code.as_deref()) {
            // Serialization failure and deadlock, as PostgreSQL names them.
            (_, Some("40001" | "40P01")) => (
                RejectionCode::TransactionConflict,
                "The request collided with another one and nothing was done.",
            ),
            // Its time-outs, and connections that it ended.
            (_, Some("57014" | "25P03" | "57P01" | "57P02" | "57P03"))
            | (sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::WorkerCrashed, _) => {
                (RejectionCode::TransactionLost, "The transaction was lost and nothing was done.")
            }
            _ => (RejectionCode::TransactionFailed, "The database refused a statement; nothing was done."),
        };
        Self { source: Some(error.into()), ..Self::new(code, detail) }
    }
}

/// What a database does for transactions of handlers. No call is cancelled.
#[async_trait]
pub(crate) trait Driver<DB: Database>: fmt::Debug + Send + Sync + 'static {
    /// A fresh transaction in which the record is the attempt's and stays so.
    async fn begin(&self) -> Result<Transaction<'static, DB>, TransactionError>;

    /// Completes the record as the last statement of the transaction and commits.
    async fn commit(
        &self,
        transaction: Transaction<'static, DB>,
        response: Bytes,
    ) -> Result<(), TransactionError>;

    /// Rolls back, whatever state the transaction is in.
    async fn roll_back(&self, transaction: Transaction<'static, DB>) -> Result<(), TransactionError>;

    /// Ends a transaction that somebody keeps, if the database can.
    async fn revoke(&self);
}

/// Where the transaction of an attempt is: between the request's extensions, the handler and the layer.
#[derive(Debug)]
pub(crate) struct Slot<DB: Database> {
    driver: Box<dyn Driver<DB>>,
    begin_timeout: Duration,
    time_limit: Option<Duration>,
    place: Mutex<Place<DB>>,
    changed: Notify,
}

/// If the task that begins a transaction panics or its runtime goes down, those who wait are told.
struct Unfinished<DB: Database>(Arc<Slot<DB>>);

impl<DB: Database> Unfinished<DB> {
    async fn begin(self) {
        let Self(slot) = &self;
        slot.put(match slot.driver.begin().await {
            Ok(transaction) => {
                Place::Here { transaction, until: slot.time_limit.map(|limit| Instant::now() + limit) }
            }
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
    pub(crate) fn lay_out(
        driver: impl Driver<DB>,
        begin_timeout: Option<Duration>,
        time_limit: Option<Duration>,
        extensions: &mut Extensions,
    ) -> Arc<dyn StoreTransaction> {
        let slot = Arc::new(Self {
            driver: Box::new(driver),
            begin_timeout: begin_timeout.unwrap_or(Duration::MAX),
            time_limit,
            place: Mutex::new(Place::Unused),
            changed: Notify::new(),
        });
        extensions.insert(Arc::clone(&slot));
        slot
    }

    fn place(&self) -> MutexGuard<'_, Place<DB>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, place: Place<DB>) {
        *self.place() = place;
        self.changed.notify_waiters();
    }

    /// Begins the transaction the first time, in a task that goes on when nobody waits for it any more.
    async fn lend(self: Arc<Self>) -> Result<Tx<DB>, TxError> {
        let asked_at = Instant::now();
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(lent) = self.try_lend() {
                return lent.map_err(TxError::from);
            }
            let left = self.begin_timeout.saturating_sub(asked_at.elapsed());
            if timeout(left, changed).await.is_err() {
                let message = format!("the transaction did not begin within {:?}", self.begin_timeout);
                tracing::warn!(target: TRACING_TARGET, "{message}");
                let error = TransactionError::new(TransactionErrorKind::Unavailable, message);
                return Err(Arc::new(error).into());
            }
        }
    }

    /// `None` while it is being begun.
    fn try_lend(self: &Arc<Self>) -> Option<Result<Tx<DB>, Arc<TransactionError>>> {
        let mut place = self.place();
        match mem::replace(&mut *place, Place::Beginning) {
            Place::Unused => {
                tokio::spawn(Unfinished(Arc::clone(self)).begin());
                None
            }
            Place::Beginning => None,
            Place::Here { transaction, until } => {
                *place = Place::Lent { until };
                Some(Ok(Tx { transaction: Some(transaction), slot: Arc::clone(self) }))
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
                Some(Err(Arc::new(TransactionError::new(TransactionErrorKind::Lent, message))))
            }
        }
    }

    fn give_back(&self, transaction: Transaction<'static, DB>) {
        let mut place = self.place();
        match *place {
            Place::Lent { until } => *place = Place::Here { transaction, until },
            // Nobody waits for it any more: dropping it rolls it back.
            Place::Unused | Place::Beginning | Place::Here { .. } | Place::Failed(_) | Place::Taken => {
                drop(transaction);
            }
        }
        drop(place);
        self.changed.notify_waiters();
    }

    /// The transaction, which nobody gets any more. Waits while it is being begun. One that the handler keeps is ended
    /// by the database, if it can.
    async fn take(&self) -> Result<Transaction<'static, DB>, TransactionError> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(taken) = self.try_take() {
                if taken.as_ref().is_err_and(|error| error.kind() == TransactionErrorKind::Lent) {
                    self.driver.revoke().await;
                }
                return taken;
            }
            changed.await;
        }
    }

    fn try_take(&self) -> Option<Result<Transaction<'static, DB>, TransactionError>> {
        let mut place = self.place();
        let error = match mem::replace(&mut *place, Place::Taken) {
            Place::Beginning => {
                *place = Place::Beginning;
                return None;
            }
            Place::Here { transaction, .. } => return Some(Ok(transaction)),
            Place::Lent { .. } => TransactionError::new(
                TransactionErrorKind::Lent,
                "the handler had not given its transaction back when it returned",
            ),
            Place::Failed(error) => {
                TransactionError::new(TransactionErrorKind::Gone, "the transaction was not begun")
                    .with_source(error)
            }
            Place::Unused | Place::Taken => {
                TransactionError::new(TransactionErrorKind::Gone, "there is no transaction")
            }
        };
        Some(Err(error))
    }

    fn until(&self) -> Option<Instant> {
        match *self.place() {
            Place::Here { until, .. } | Place::Lent { until } => until,
            Place::Unused | Place::Beginning | Place::Failed(_) | Place::Taken => None,
        }
    }
}

#[async_trait]
impl<DB: Database> StoreTransaction for Slot<DB> {
    fn usage(&self) -> TransactionUsage {
        match *self.place() {
            Place::Unused => TransactionUsage::Unused,
            Place::Lent { .. } => TransactionUsage::Lent,
            Place::Beginning | Place::Here { .. } | Place::Failed(_) | Place::Taken => TransactionUsage::Open,
        }
    }

    async fn overdue(&self) {
        if self.time_limit.is_none() {
            return pending().await;
        }
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            match self.until() {
                Some(until) => return sleep_until(until).await,
                None => changed.await,
            }
        }
    }

    async fn commit(&self, response: Bytes) -> Result<(), TransactionError> {
        let transaction = self.take().await?;
        self.driver.commit(transaction, response).await
    }

    async fn roll_back(&self) -> Result<(), TransactionError> {
        match self.take().await {
            Ok(transaction) => self.driver.roll_back(transaction).await,
            // There is nothing to roll back, or the database was told to.
            Err(_) => Ok(()),
        }
    }
}

impl<DB: Database> fmt::Debug for Place<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unused => "Unused",
            Self::Beginning => "Beginning",
            Self::Here { .. } => "Here",
            Self::Lent { .. } => "Lent",
            Self::Failed(_) => "Failed",
            Self::Taken => "Taken",
        })
    }
}

#[cfg(feature = "axum")]
mod extract {
    use axum_core::{
        body::Body,
        extract::{FromRequestParts, OptionalFromRequestParts},
        response::{IntoResponse, Response},
    };
    use http::request::Parts;
    use sqlx::Database;

    use super::{Tx, TxError};
    use crate::Idempotency;

    impl IntoResponse for TxError {
        fn into_response(self) -> Response {
            Self::into_response(self).map(Body::from)
        }
    }

    impl<S: Sync, DB: Database> FromRequestParts<S> for Tx<DB> {
        type Rejection = TxError;

        async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, TxError> {
            Self::begin(&parts.extensions).await
        }
    }

    impl<S: Sync, DB: Database> OptionalFromRequestParts<S> for Tx<DB> {
        type Rejection = TxError;

        async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, TxError> {
            if parts.extensions.get::<Idempotency>().is_none() {
                return Ok(None);
            }
            Self::begin(&parts.extensions).await.map(Some)
        }
    }
}
