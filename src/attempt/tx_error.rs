//! Why a handler did not get its transaction, or could not use it.

use std::sync::Arc;

use bytes::Bytes;
use http::Response;

use crate::{
    attempt::error::IntentError,
    error::{BoxError, StoreError},
    redact::TRACING_TARGET,
    rejection::{Rejection, RejectionCode, respond_by_default},
    store::{
        sql::transaction_error_kind,
        transaction::{TransactionError, TransactionErrorKind},
    },
};

/// A handler could not get its transaction, or one of its statements failed. As a response it is a refusal, which is
/// never stored, so that the transaction is rolled back and the key released.
///
/// It is made of any error of sqlx, so that a handler may answer with it: 503 `transaction-conflict` with `Retry-After`
/// for a serialization failure or a deadlock, 503 `transaction-lost` for a time-out or a broken connection, 500
/// `transaction-failed` for everything else. The cause is logged, and not shown to the client.
///
/// `?` is for failures of the database. What the request itself causes, a row that is not there or a name that is taken,
/// is better answered by a 4xx of the handler's own (`fetch_optional`, `is_unique_violation()`): clients are told to
/// retry this. With an error type of its own a handler writes `.await.map_err(TxError::from)?`.
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
    fn new(rejection: Rejection) -> Self {
        Self { rejection: Box::new(rejection), source: None }
    }

    pub(super) fn no_key() -> Self {
        tracing::warn!(
            target: TRACING_TARGET,
            "a handler asks for the transaction of a request that is not guarded: it has no key, its method is not \
             guarded, or no IdempotencyLayer is around the route"
        );
        Self::new(Rejection::new(
            RejectionCode::KeyMissing,
            "This operation needs an idempotency key, or is not guarded by an idempotency layer.",
        ))
    }

    /// The layer lets requests through without protection while its store is away.
    pub(super) fn unprotected() -> Self {
        Self::new(TransactionErrorKind::Unavailable.rejection())
    }

    pub(super) fn no_store() -> Self {
        tracing::error!(
            target: TRACING_TARGET,
            "a handler asks for a transaction of a database that is not the one of its idempotency layer, or whose store \
             has no transactions, like MemoryStore"
        );
        Self::new(Rejection::new(
            RejectionCode::StoreMisconfigured,
            "The request was not performed; the server's log says why.",
        ))
    }

    pub(super) fn in_phase() -> Self {
        IntentError::Misused("the handler's transaction inside a phase would wait for it: write through the connection that the phase gives").into()
    }

    pub(super) fn unreadable_phase(source: serde_json::Error) -> Self {
        let misused = IntentError::Misused(
            "the result of a phase cannot be stored, or is not what an earlier version has stored",
        );
        Self { source: Some(source.into()), ..Self::new(misused.rejection()) }
    }

    /// Why.
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

/// A handler may answer with it whatever fails, a call to an upstream service too.
impl From<IntentError> for TxError {
    fn from(error: IntentError) -> Self {
        let rejection = error.rejection();
        Self { source: Some(error.into()), ..Self::new(rejection) }
    }
}

impl From<StoreError> for TxError {
    fn from(error: StoreError) -> Self {
        let detail = "The request was not performed; the server's log says why.";
        let rejection = Rejection::new(RejectionCode::of_store(error.kind()), detail);
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
            // What became of the transaction shows at its end.
            kind = TransactionErrorKind::Failed;
        }
        Self { source: Some(error.into()), ..Self::new(kind.rejection()) }
    }
}
