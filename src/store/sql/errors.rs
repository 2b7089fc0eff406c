//! Errors of a database, as a store reports them.

use std::borrow::Cow;

use sqlx::error::DatabaseError;

use crate::{
    error::{StoreError, StoreErrorKind},
    store::transaction::TransactionErrorKind,
};

/// The meaning of a database's error, and the advice for an operator.
pub(in crate::store) type Meaning = (StoreErrorKind, &'static str);

pub(in crate::store) fn misconfigured(message: impl Into<String>) -> StoreError {
    StoreError::new(StoreErrorKind::Misconfigured, message)
}

/// Returns the code that the database gave an error.
pub(in crate::store) fn code(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error().and_then(|error| error.code())
}

/// Returns the meaning of a failed statement for its transaction, without a look at the codes of a
/// database: the connection was lost, the statement or its row is wrong, or it failed.
pub(crate) fn transaction_error_kind(error: &sqlx::Error) -> TransactionErrorKind {
    use sqlx::Error::{
        ColumnDecode, ColumnIndexOutOfBounds, ColumnNotFound, Decode, Encode, InvalidArgument, Io,
        PoolClosed, PoolTimedOut, Protocol, RowNotFound, TypeNotFound, WorkerCrashed,
    };
    #[expect(clippy::wildcard_enum_match_arm, reason = "of everything else, nothing is known")]
    match error {
        Io(_) | Protocol(_) | WorkerCrashed | PoolClosed | PoolTimedOut => TransactionErrorKind::Lost,
        ColumnDecode { .. }
        | ColumnIndexOutOfBounds { .. }
        | ColumnNotFound(_)
        | Decode(_)
        | Encode(_)
        | InvalidArgument(_)
        | RowNotFound
        | TypeNotFound { .. } => TransactionErrorKind::Refused,
        _ => TransactionErrorKind::Failed,
    }
}

/// Makes the error for a connection that could not be taken out of a pool. Nothing was sent.
pub(in crate::store) fn connect_error(
    source: sqlx::Error,
    meaning: impl Fn(&dyn DatabaseError) -> Option<Meaning>,
) -> StoreError {
    let error = match (&source, source.as_database_error().and_then(meaning)) {
        (_, Some((kind, hint))) => StoreError::new(kind, hint),
        (sqlx::Error::Configuration(_), None) => {
            misconfigured("the settings of the connection are not usable")
        }
        _ => StoreError::new(StoreErrorKind::Unavailable, "no connection to the database"),
    };
    error.with_source(source)
}

/// Makes the error for a statement that was sent.
pub(in crate::store) fn statement_error(
    operation: &str,
    source: sqlx::Error,
    meaning: fn(&dyn DatabaseError) -> Meaning,
) -> StoreError {
    use sqlx::Error::{Database, Io, PoolClosed, PoolTimedOut, Protocol, WorkerCrashed};
    #[expect(clippy::wildcard_enum_match_arm, reason = "everything else comes from encoding and decoding")]
    let (kind, hint) = match &source {
        Database(error) => meaning(&**error),
        Io(_) | Protocol(_) | WorkerCrashed => {
            (StoreErrorKind::Ambiguous, "the connection broke before the reply")
        }
        PoolClosed | PoolTimedOut => (StoreErrorKind::Unavailable, "no connection to the database"),
        _ => (StoreErrorKind::Internal, "a row could not be read"),
    };
    StoreError::new(kind, format!("{operation}: {hint}")).with_source(source)
}

pub(in crate::store) const UNEXPECTED: &str = "the database answered with an unexpected error";
