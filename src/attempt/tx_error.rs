//! Errors of handlers with a transaction.

use std::sync::Arc;

use bytes::Bytes;
use http::Response;

use crate::{
    attempt::{error::IntentError, unguarded::Unguarded},
    error::{BoxError, StoreError, StoreErrorKind},
    redact::TRACING_TARGET,
    rejection::{Rejection, RejectionCode, respond_by_default},
    store::{
        transaction::{TransactionError, TransactionErrorKind},
        transaction_error_kind,
    },
};

/// A handler could not get its transaction, or one of its statements failed.
///
/// As a response it is a refusal, which is never stored: the transaction is rolled back and the key
/// released. Any error of sqlx converts into it, so that a handler can answer with it:
///
/// | the error | the answer |
/// |---|---|
/// | a serialization failure, a deadlock | 503 `transaction-conflict`, with `Retry-After` |
/// | a time-out, a broken connection | 503 `transaction-lost`, with `Retry-After` |
/// | a constraint, a wrong statement or value, an absent row | 500 `transaction-failed`, final |
/// | any other | 500 `transaction-failed` |
///
/// The cause is logged, and not shown to the client.
///
/// Use `?` for failures of the database. If the request itself is the cause, because a row is
/// absent or a name is taken, answer with a 4xx of the handler's own (`fetch_optional`,
/// `is_unique_violation()`): clients retry these refusals. A handler with an error type of its own
/// writes `.await.map_err(TxError::from)?`.
///
/// ```
/// # #[cfg(all(feature = "axum", feature = "postgres"))] {
/// # use sqlx::Postgres;
/// # use tower_idempotency::{Tx, TxError};
/// async fn transfer(mut tx: Tx<Postgres>) -> Result<&'static str, TxError> {
///     let debit = sqlx::query("UPDATE accounts SET balance = balance - 1 WHERE id = 1");
///     debit.execute(&mut *tx).await?;
///     let credit = sqlx::query("UPDATE accounts SET balance = balance + 1 WHERE id = 2");
///     credit.execute(&mut *tx).await?;
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
    fn new(rejection: Rejection) -> Self {
        Self { rejection: Box::new(rejection), source: None }
    }

    pub(super) fn unguarded(why: Unguarded) -> Self {
        Self::new(why.rejection())
    }

    pub(super) fn no_store() -> Self {
        tracing::error!(
            target: TRACING_TARGET,
            "a handler asks for a transaction of a database that is not the one of its idempotency layer, or \
             whose store has no transactions, like MemoryStore"
        );
        Self::new(Rejection::of_store(StoreErrorKind::Misconfigured))
    }

    /// The handler runs a second time within one attempt.
    pub(super) fn second_run() -> Self {
        Self::new(Rejection::second_run(Self::SECOND_RUN))
    }

    pub(super) const SECOND_RUN: RejectionCode = RejectionCode::TransactionInUse;

    pub(super) fn in_phase() -> Self {
        IntentError::Misused(
            "the handler's transaction inside a phase would wait for it: write through the phase's \
             connection",
        )
        .into()
    }

    /// The result of a phase is not what a later attempt could read.
    pub(super) fn unstorable_phase(source: serde_json::Error) -> Self {
        Self::misused(
            "the result of a phase cannot be written as JSON and read again: the phase is rolled back",
            source,
        )
    }

    pub(super) fn unreadable_phase(source: serde_json::Error) -> Self {
        Self::misused("the result of a phase was stored in another form, by an earlier version", source)
    }

    fn misused(message: &'static str, source: serde_json::Error) -> Self {
        tracing::error!(target: TRACING_TARGET, error = &source as &dyn std::error::Error, "{message}");
        let rejection = IntentError::Misused(message).rejection();
        Self { source: Some(source.into()), ..Self::new(rejection) }
    }

    /// The code of the response.
    #[must_use]
    pub fn code(&self) -> RejectionCode {
        self.rejection.code()
    }

    /// Makes the response and logs the cause. The layer around the handler renders it with its
    /// [renderer](crate::IdempotencyLayer::with_renderer).
    #[must_use]
    pub fn into_http_response(self) -> Response<Bytes> {
        match self.source.map(|source| source.downcast::<IntentError>()) {
            Some(Ok(error)) => return error.into_http_response(),
            Some(Err(source)) => {
                let (code, error) = (self.rejection.code(), &*source as &(dyn std::error::Error + 'static));
                tracing::error!(target: TRACING_TARGET, %code, error, "the transaction of a handler failed");
            }
            None => {}
        }
        respond_by_default(*self.rejection)
    }
}

/// So that a handler can answer with one error type whatever fails, also a call to an upstream
/// service.
impl From<IntentError> for TxError {
    fn from(error: IntentError) -> Self {
        let rejection = error.rejection();
        Self { source: Some(error.into()), ..Self::new(rejection) }
    }
}

impl From<StoreError> for TxError {
    fn from(error: StoreError) -> Self {
        let rejection = Rejection::of_store(error.kind());
        Self { source: Some(error.into()), ..Self::new(rejection) }
    }
}

impl From<Arc<TransactionError>> for TxError {
    fn from(error: Arc<TransactionError>) -> Self {
        let rejection = error.kind().rejection();
        Self { source: Some(error.into()), ..Self::new(rejection) }
    }
}

impl From<sqlx::Error> for TxError {
    fn from(error: sqlx::Error) -> Self {
        let mut kind = transaction_error_kind(&error);
        if kind == TransactionErrorKind::Ended {
            // The end of the transaction shows what became of it.
            kind = TransactionErrorKind::Failed;
        }
        Self { source: Some(error.into()), ..Self::new(kind.rejection()) }
    }
}
