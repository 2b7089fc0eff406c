//! The transaction of a handler.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::Arc,
};

use http::Extensions;
use sqlx::Database;

use super::{
    idempotency::{Idempotency, Unprotected},
    tx_error::TxError,
};
use crate::store::sql::slot::{Lent, Slot};

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
    /// # Errors
    ///
    /// [`TxError`] if the request has no key, the layer's store is of another database, the handler
    /// has the transaction already, or it cannot begin. Answer with
    /// [`TxError::into_http_response`].
    pub fn begin(extensions: &Extensions) -> impl Future<Output = Result<Self, TxError>> + Send + use<DB> {
        let slot = extensions.get::<Arc<Slot<DB>>>().cloned();
        let idempotency = extensions.get::<Idempotency>();
        let guarded = idempotency.is_some();
        let in_phase = idempotency.is_some_and(|idempotency| idempotency.facts.progress.is_phase_open());
        let unprotected = extensions.get::<Unprotected>().is_some();
        async move {
            match slot {
                Some(_) if in_phase => Err(TxError::in_phase()),
                Some(slot) => slot.lend().await.map(Self).map_err(TxError::from),
                None if guarded => Err(TxError::no_store()),
                None if unprotected => Err(TxError::unprotected()),
                None => Err(TxError::no_key()),
            }
        }
    }
}

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

    use crate::attempt::idempotency::Idempotency;
    use crate::attempt::{tx::Tx, tx_error::TxError};

    impl IntoResponse for TxError {
        fn into_response(self) -> Response {
            self.into_http_response().map(Body::from)
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
