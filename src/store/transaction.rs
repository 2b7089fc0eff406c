//! Transactions that handlers share with the completion of their record: what a store offers and what the layer asks.

use std::{error::Error as StdError, fmt, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    error::{BoxError, StoreError},
    rejection::{Rejection, RejectionCode},
};

/// What a store keeps to in a transaction: [`TransactionOptions`](crate::TransactionOptions) with the defaults of the layer filled in.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TransactionLimits {
    /// The lease of the attempt.
    pub lease: Duration,
    /// The isolation level; `None`: the database's default.
    pub isolation: Option<IsolationLevel>,
    /// For how long the transaction may be open without a statement running.
    pub idle_timeout: Duration,
    /// How long one statement of the handler may take.
    pub statement_timeout: Duration,
    /// For how long the transaction may be open, on a store with one writer.
    pub time_limit: Duration,
    /// How long the handler waits for its transaction to begin.
    pub begin_timeout: Duration,
}

/// How far a transaction is isolated from those beside it.
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

/// The transaction of one attempt, as the layer sees it. A store that offers transactions puts something into the
/// request's extensions that the handler gets it from, and returns this from
/// [`Store::transaction`](crate::store::Store::transaction).
///
/// # Rules
///
/// * Beginning fails unless the record is in progress and the attempt's. From then until the end of the transaction no
///   other attempt takes the record over, even if its lease runs out.
/// * Duplicates do not wait for it: their claims are answered at once.
/// * `commit` completes the record and commits what the handler wrote in one step, or neither.
/// * A transaction that the handler has ended itself is noticed.
#[async_trait]
pub trait StoreTransaction: fmt::Debug + Send + Sync + 'static {
    /// Where it stands.
    fn usage(&self) -> TransactionUsage;

    /// Returns when the transaction has been open for longer than it may be; never for one that is not begun or has no
    /// limit.
    async fn overdue(&self);

    /// Completes the record with the encoded response as the last statement of the transaction, and commits.
    ///
    /// # Errors
    ///
    /// The [kind](TransactionError::kind) says what is known. Only after
    /// [`Unconfirmed`](TransactionErrorKind::Unconfirmed) and [`Ended`](TransactionErrorKind::Ended) anything may have
    /// been committed.
    async fn commit(&self, response: Bytes) -> Result<(), TransactionError>;

    /// Rolls the transaction back. One that the handler still has is taken from it as far as the database allows.
    ///
    /// # Errors
    ///
    /// [`Ended`](TransactionErrorKind::Ended) if the handler has ended it, so that its writes may be committed. After any
    /// other error it is rolled back too, for example because its connection was lost.
    async fn roll_back(&self) -> Result<(), TransactionError>;
}

/// Where the transaction of an attempt stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TransactionUsage {
    /// The handler has not asked for it: nothing was begun.
    Unused,
    /// The handler has asked for it, and does not have it now.
    Open,
    /// The handler has it.
    InUse,
    /// It is being committed or rolled back, or that is done.
    Ended,
}

/// A transaction could not be begun, committed or rolled back.
///
/// [`source`](StdError::source) keeps the cause.
#[derive(Debug)]
pub struct TransactionError {
    kind: TransactionErrorKind,
    message: String,
    source: Option<BoxError>,
}

/// What is known of a transaction that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TransactionErrorKind {
    /// It could not be begun: the database is away or busy. Trying again makes sense.
    Unavailable,
    /// It was lost before it was committed: another attempt has the record, the connection broke, or the server ended it.
    /// Rolled back.
    Lost,
    /// It collided with another one: a serialization failure or a deadlock. Rolled back; running again may succeed.
    Conflict,
    /// The database would not commit it: a statement had failed before, or a constraint is violated. Rolled back.
    Failed,
    /// The handler has it, or had not given it back when it returned. Nothing of it is committed.
    InUse,
    /// The handler has ended it itself. What it wrote may be committed.
    Ended,
    /// It was told to commit and the answer did not come. It may be committed.
    Unconfirmed,
}

impl TransactionErrorKind {
    /// What the client is told.
    pub(crate) fn rejection(self) -> Rejection {
        let (code, detail) = match self {
            Self::Unavailable => (
                RejectionCode::StoreUnavailable,
                "The transaction could not begin; send the request again with the same key.",
            ),
            Self::Lost => (
                RejectionCode::TransactionLost,
                "The transaction was lost, and what it wrote is rolled back.",
            ),
            Self::Conflict => (
                RejectionCode::TransactionConflict,
                "The transaction collided with another one, and what it wrote is rolled back.",
            ),
            Self::Failed => (
                RejectionCode::TransactionFailed,
                "A statement failed, or the database did not accept the changes; what the transaction wrote is rolled back.",
            ),
            Self::InUse => (
                RejectionCode::TransactionInUse,
                "The handler kept its transaction, or asked for it twice at once; nothing of it is committed.",
            ),
            Self::Ended => (
                RejectionCode::TransactionEnded,
                "The handler ended its transaction itself. The request is not performed again.",
            ),
            Self::Unconfirmed => (
                RejectionCode::OutcomePending,
                "The database has not confirmed the outcome yet. Send the request again with the same key.",
            ),
        };
        Rejection::new(code, detail)
    }
}

impl TransactionError {
    /// An error of a kind, with a message that says what was tried.
    pub fn new(kind: TransactionErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What is known of the transaction.
    #[must_use]
    pub fn kind(&self) -> TransactionErrorKind {
        self.kind
    }
}

impl From<StoreError> for TransactionError {
    fn from(error: StoreError) -> Self {
        Self::new(TransactionErrorKind::Unavailable, "the store does not answer").with_source(error)
    }
}

impl fmt::Display for TransactionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for TransactionError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|source| &**source as &(dyn StdError + 'static))
    }
}
