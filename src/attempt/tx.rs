//! The transaction of a handler.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::Arc,
};

use http::Extensions;
use sqlx::Database;

use super::{Facts, idempotency::Idempotency, run::RequestCopy, tx_error::TxError, unguarded::Unguarded};
use crate::{
    rejection::RejectionCode,
    store::sql::slot::{Lent, Slot},
};

/// The transaction of an attempt, in a database of sqlx. The handler's writes through it are
/// committed together with the stored response, or not at all.
///
/// With the feature `axum` it is an extractor. Statements of sqlx are executed on `&mut *tx`:
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
/// Extracting it begins the transaction. When the handler has returned, the layer completes the
/// record as the last statement of that transaction and commits. Only then is the response sent:
///
/// | the handler's result | its writes |
/// |---|---|
/// | 2xx or 3xx that is stored | committed, with the response |
/// | 4xx that is stored | rolled back, response stored; see [`keep_writes_of_client_errors`] |
/// | anything else that is stored, by a policy or a directive | rolled back, response stored |
/// | not stored: 5xx, an error, a panic, a directive | rolled back; the key is released or held |
///
/// The handler cannot end the transaction: there is no `commit`, and a COMMIT that it sends is
/// detected. It gives the transaction back by dropping it, and may extract it again. A spawned task
/// or a static that still has it when the handler has returned makes the answer 500
/// `transaction-in-use`, and nothing of it is committed. PostgreSQL is told to end it immediately;
/// SQLite accepts no other writer until it is dropped. In a response body that is a stream it must
/// be dropped at the body's end.
///
/// **Write through it only.** Writes through the application's pool are not part of it. On
/// PostgreSQL the transaction has a connection of that pool: a handler that asks for a second one
/// may wait for itself. On SQLite it has the writing connection of the store, and other writers
/// find the database locked.
///
/// As an argument it begins before the handler does. To begin it later, after calls to others, take
/// the request's `http::Extensions` and call [`begin`](Self::begin) before the first statement.
/// While it is open, rows are locked, and SQLite accepts no other writer.
///
/// `Tx<DB>` refuses a request without a key (400 `key-missing`); `Option<Tx<DB>>` is `None` for it.
/// A request that has a key, and that no layer guards, is refused with 500 `not-guarded`.
///
/// The transaction belongs to one run of the handler. If a retry inside the layer runs it again
/// within the attempt, and it asks for the transaction again, the answer is 500
/// `transaction-in-use`, and nothing is committed. Retry outside the layer, in the client, or with
/// [`with_reruns`](crate::TransactionOptions::with_reruns).
///
/// `Connection::begin` on it sets a savepoint.
///
/// A statement that fails spoils the whole transaction on PostgreSQL: if the handler continues and
/// answers 200, the client gets 500 `transaction-failed`. On SQLite only that statement is undone,
/// and the rest is committed. A handler that has changed its role (`SET ROLE`) must change it back
/// before it returns, or the record cannot be completed: 500 `transaction-failed`.
///
/// [`keep_writes_of_client_errors`]: crate::TransactionOptions::keep_writes_of_client_errors
pub struct Tx<DB: Database>(Lent<DB>);

impl<DB: Database> Tx<DB> {
    /// Begins the transaction of the request with these extensions, or returns it again. For
    /// handlers that take it late, and for services without axum.
    ///
    /// The future borrows nothing of the request and may be dropped.
    ///
    /// A transaction that was begun by one copy of the extensions is not begun again by another
    /// that was made before: the two may be two runs of the handler. Begin it again by the same.
    ///
    /// # Errors
    ///
    /// [`TxError`] if the request has no key or is not guarded, the layer's store is of another
    /// database, the handler has the transaction already or runs a second time within the attempt,
    /// or it cannot begin. Answer with
    /// [`TxError::into_http_response`].
    pub fn begin(extensions: &Extensions) -> impl Future<Output = Result<Self, TxError>> + Send + use<DB> {
        Self::begin_in(extensions, Facts::enter_run_by)
    }

    fn begin_in(
        extensions: &Extensions,
        enter: EnterRun,
    ) -> impl Future<Output = Result<Self, TxError>> + Send + use<DB> {
        let slot = extensions.get::<Arc<Slot<DB>>>().cloned();
        let facts = extensions.get::<Idempotency>().map(|idempotency| Arc::clone(&idempotency.facts));
        let (request, unguarded) = (RequestCopy::of(extensions), Unguarded::of(extensions));
        async move {
            match (slot, facts) {
                (Some(_), Some(facts)) if facts.progress.is_phase_open() => Err(TxError::in_phase()),
                (Some(_), Some(facts)) if !enter(&facts, request.as_ref(), TxError::SECOND_RUN) => {
                    Err(TxError::second_run())
                }
                (Some(slot), _) => slot.lend().await.map(Self).map_err(TxError::from),
                (None, Some(_)) => Err(TxError::no_store()),
                (None, None) => Err(TxError::unguarded(unguarded)),
            }
        }
    }
}

/// Lets a run use the attempt for its transaction.
type EnterRun = fn(&Facts, Option<&Arc<RequestCopy>>, RejectionCode) -> bool;

impl<DB: Database> Deref for Tx<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &DB::Connection {
        &self.0
    }
}

impl<DB: Database> DerefMut for Tx<DB> {
    fn deref_mut(&mut self) -> &mut DB::Connection {
        &mut self.0
    }
}

impl<DB: Database> fmt::Debug for Tx<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tx").field(&DB::NAME).finish()
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

    use crate::attempt::{
        Facts, idempotency::Idempotency, run::RequestCopy, tx::Tx, tx_error::TxError, unguarded::Unguarded,
    };

    impl IntoResponse for TxError {
        fn into_response(self) -> Response {
            self.into_http_response().map(Body::from)
        }
    }

    impl<S: Sync, DB: Database> FromRequestParts<S> for Tx<DB> {
        type Rejection = TxError;

        async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, TxError> {
            RequestCopy::extracted_from(&parts.extensions);
            match parts.extensions.get::<Idempotency>() {
                Some(_) => Self::begin_in(&parts.extensions, Facts::enter_run).await,
                None => Err(TxError::unguarded(Unguarded::of_request(parts))),
            }
        }
    }

    impl<S: Sync, DB: Database> OptionalFromRequestParts<S> for Tx<DB> {
        type Rejection = TxError;

        async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Option<Self>, TxError> {
            let guarded = parts.extensions.get::<Idempotency>().is_some();
            if !guarded && Unguarded::of_request(parts).may_run(&parts.method) {
                return Ok(None);
            }
            <Self as FromRequestParts<S>>::from_request_parts(parts, state).await.map(Some)
        }
    }
}
