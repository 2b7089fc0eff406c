//! Transactions that a handler shares with the completion of its record: settings, contract and
//! errors.

use std::{error::Error as StdError, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use http::Extensions;

use crate::{
    error::{BoxError, StoreError},
    rejection::{Rejection, RejectionCode},
    stored::record::{Fenced, Record},
};

/// The limits of one transaction: [`TransactionOptions`](crate::TransactionOptions), completed with
/// the defaults of the layer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TransactionLimits {
    /// The lease of the attempt.
    pub lease: Duration,
    /// The isolation level; `None` for the default of the database.
    pub isolation: Option<IsolationLevel>,
    /// The time for which the transaction may be open without a running statement.
    pub idle_timeout: Duration,
    /// The time that one statement of the handler may take.
    pub statement_timeout: Duration,
    /// The time for which the transaction may be open, on a store with one writer.
    pub time_limit: Duration,
    /// The time for which the handler waits for its transaction to begin.
    pub begin_timeout: Duration,
}

/// Isolation of a transaction from those that run beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum IsolationLevel {
    /// `READ COMMITTED`.
    ReadCommitted,
    /// `REPEATABLE READ`.
    RepeatableRead,
    /// `SERIALIZABLE`.
    Serializable,
}

/// The transaction of one attempt, as the layer sees it.
///
/// A store that offers transactions puts a value into the request's extensions, from which the
/// handler gets the transaction. [`Store::transaction`](crate::store::Store::transaction) returns
/// the layer's side of it, which implements this trait.
///
/// # Rules
///
/// * Beginning fails unless the record is in progress and belongs to the attempt. From then until
///   the end of the transaction, no other attempt takes the record over, even if its lease runs
///   out.
/// * Duplicates do not wait for the transaction: their claims are answered immediately.
/// * `commit` completes the record and commits the writes of the handler in one step, or does
///   neither.
/// * The store notices if the handler has ended the transaction.
#[async_trait]
pub trait StoreTransaction: fmt::Debug + Send + Sync + 'static {
    /// Returns the state of the transaction.
    fn usage(&self) -> TransactionUsage;

    /// Returns when the transaction has been open for longer than its limit. Never returns if it
    /// has not begun or has no limit.
    async fn overdue(&self);

    /// Completes the record with the encoded response, as the last statement of the transaction,
    /// and commits.
    ///
    /// # Errors
    ///
    /// The [kind](TransactionError::kind) says how much is known. Something may have been committed
    /// only after [`Unconfirmed`](TransactionErrorKind::Unconfirmed) and
    /// [`Ended`](TransactionErrorKind::Ended).
    async fn commit(&self, response: Bytes) -> Result<(), TransactionError>;

    /// Rolls the transaction back. If the handler still has it, the store takes it away from the
    /// handler as far as the database allows.
    ///
    /// # Errors
    ///
    /// [`Ended`](TransactionErrorKind::Ended) if the handler has ended it: its writes may be
    /// committed. After any other error, the transaction is rolled back too, for example because
    /// its connection was lost.
    async fn roll_back(&self) -> Result<(), TransactionError>;
}

/// The transaction of an attempt that has its key by this transaction alone: there is no claim, and
/// no record before the commit.
///
/// [`Store::begin_single`](crate::store::Store::begin_single) begins it. Its
/// [`commit`](StoreTransaction::commit) adds the completed record, or fails as
/// [`Lost`](TransactionErrorKind::Lost) if the key has a record by then: a claim was faster.
#[async_trait]
pub trait SingleTransaction: StoreTransaction {
    /// Undoes what the handler has written, adds the completed record with the encoded response,
    /// and commits.
    ///
    /// # Errors
    ///
    /// Those of [`commit`](StoreTransaction::commit).
    async fn complete(&self, response: Bytes) -> Result<(), TransactionError>;

    /// Finds out what became of a commit without a reply. Returns the record of the key, unless it
    /// has expired. Without a record, the transaction is rolled back.
    ///
    /// # Errors
    ///
    /// [`Unavailable`](crate::store::StoreErrorKind::Unavailable) while the transaction has not
    /// come to its end. After any error, ask again.
    async fn outcome(&self) -> Result<Option<Record>, StoreError>;

    /// Adds a held record, because effects may be committed without a response. To be called after
    /// the end of the transaction.
    ///
    /// # Errors
    ///
    /// After any error it may be held; calling again is harmless.
    async fn hold(&self) -> Result<Fenced, StoreError>;
}

/// The outcome of [`Store::begin_single`](crate::store::Store::begin_single).
#[derive(Debug)]
#[non_exhaustive]
pub enum BeginOutcome {
    /// The transaction is open, and no other attempt runs for the key until it ends.
    #[non_exhaustive]
    Begun {
        /// The layer's side of the transaction.
        transaction: Arc<dyn SingleTransaction>,
        /// The values from which the handler gets the transaction, for its request's extensions.
        extensions: Extensions,
    },
    /// The key has a record, which was left as it is.
    Exists(Box<Record>),
    /// Another attempt has the key, and no record tells more about it.
    Contended,
}

impl BeginOutcome {
    /// Makes the outcome of a transaction that was begun.
    #[must_use]
    pub fn begun(transaction: Arc<dyn SingleTransaction>, extensions: Extensions) -> Self {
        Self::Begun { transaction, extensions }
    }
}

/// State of the transaction of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TransactionUsage {
    /// The handler has not asked for it.
    Unused,
    /// The handler has asked for it, and does not have it at the moment.
    Open,
    /// The handler has it.
    InUse,
    /// It is being committed or rolled back, or that is done.
    Ended,
}

/// A transaction could not be begun, committed or rolled back.
///
/// [`source`](StdError::source) holds the cause.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct TransactionError {
    kind: TransactionErrorKind,
    message: String,
    source: Option<BoxError>,
}

/// The state of a transaction that failed, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TransactionErrorKind {
    /// It could not begin: the database is unreachable or busy. A retry makes sense.
    Unavailable,
    /// It was lost before the commit: another attempt has the record, the connection broke, or the
    /// server ended it. It is rolled back.
    Lost,
    /// It collided with another transaction: a serialization failure or a deadlock. It is rolled
    /// back; running again may succeed.
    Conflict,
    /// The database would not commit it: an earlier statement had failed. It is rolled back.
    Failed,
    /// The database would not commit it, and would not the next time: a constraint is violated, or
    /// a statement or a value is wrong. It is rolled back.
    Refused,
    /// The handler has it, or had not given it back when it returned. Nothing of it is committed.
    InUse,
    /// The handler has ended it. Its writes may be committed.
    Ended,
    /// The commit was sent and its answer did not arrive. It may be committed.
    Unconfirmed,
}

impl TransactionErrorKind {
    /// The refusal that the client gets.
    pub(crate) fn rejection(self) -> Rejection {
        let (code, detail) = match self {
            Self::Unavailable => (
                RejectionCode::StoreUnavailable,
                "The transaction could not begin. Send the request again with the same key.",
            ),
            Self::Lost => {
                (RejectionCode::TransactionLost, "The transaction was lost, and its writes are rolled back.")
            }
            Self::Conflict => (
                RejectionCode::TransactionConflict,
                "The transaction collided with another one, and its writes are rolled back.",
            ),
            Self::Failed => (
                RejectionCode::TransactionFailed,
                "A statement failed, or the database refused the changes. All writes are rolled back.",
            ),
            Self::Refused => (
                RejectionCode::TransactionFailed,
                "The database refused what the request asks for, and would again. All writes are rolled \
                 back.",
            ),
            Self::InUse => (
                RejectionCode::TransactionInUse,
                "The handler did not return its transaction, or asked for it twice. Nothing is committed.",
            ),
            Self::Ended => (
                RejectionCode::TransactionEnded,
                "The handler ended its transaction. The request is not performed again.",
            ),
            Self::Unconfirmed => (
                RejectionCode::OutcomePending,
                "The database has not confirmed the outcome yet. Send the request again with the same key.",
            ),
        };
        Rejection::new(code, detail).final_if(self == Self::Refused)
    }
}

impl TransactionError {
    /// Makes an error of this kind. The message says which step failed.
    pub fn new(kind: TransactionErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The state of the transaction, as far as it is known.
    #[must_use]
    pub fn kind(&self) -> TransactionErrorKind {
        self.kind
    }
}

impl From<StoreError> for TransactionError {
    fn from(error: StoreError) -> Self {
        Self::new(TransactionErrorKind::Unavailable, "the store is not available").with_source(error)
    }
}
