//! The store in SQL. Records and recovery are written once, over an [`Engine`]: a database and its
//! dialect.

pub(super) mod call;
pub(super) mod errors;
pub(super) mod records;
mod recovery;
pub(super) mod rows;
mod rules;
pub(super) mod setup;
pub(crate) mod slot;
pub(super) mod statements;

use std::{fmt::Debug, sync::Arc, time::Duration};

use async_trait::async_trait;
use http::Extensions;

pub(crate) use self::errors::transaction_error_kind;
pub use self::setup::{InvalidIdentifier, TableCreation};
use self::{
    call::{Call, Dialect},
    rows::Fields,
    statements::{Purges, Records, Recovery},
};
use crate::{
    error::StoreError,
    store::transaction::{StoreTransaction, TransactionLimits},
    stored::record::{Attempt, Claim, ClaimOutcome, Renewal},
};

/// A database: its connections, and what its dialect must say in its own words.
///
/// Every engine is a [`Store`](super::Store) and a [`RecoveryStore`](super::RecoveryStore).
#[async_trait]
pub(super) trait Engine: Clone + Debug + Send + Sync + 'static {
    type Row: Fields;

    /// The shared statements, once the tables are there.
    async fn statements(&self) -> Result<&Statements, StoreError>;

    /// Warnings about the database for an operator.
    async fn warnings(&self) -> Result<&[String], StoreError>;

    /// Runs one statement that only reads.
    async fn read(&self, operation: &str, call: Call<'_>) -> Result<Vec<Self::Row>, StoreError>;

    /// Runs one statement and returns how many rows it has changed, or has found and left as they
    /// were.
    async fn change(&self, rank: Rank, operation: &str, call: Call<'_>) -> Result<u64, StoreError>;

    /// Runs statements in one transaction, each of which sees what was committed before it began.
    async fn transact(
        &self,
        operation: &str,
        calls: Vec<Call<'_>>,
    ) -> Result<Vec<Reply<Self::Row>>, StoreError>;

    /// Claims once. `None` if another claim came between, or has the record locked.
    async fn try_claim(&self, claim: &Claim) -> Result<Option<ClaimOutcome>, StoreError>;

    /// Renews leases whose records are not locked. Returns `attempt`, and in `renewed` if it was,
    /// for each whose record is its own.
    async fn renew_batch(&self, renewals: &[Renewal]) -> Result<Vec<Self::Row>, StoreError>;

    /// Takes what is due and not locked, so that no other call takes it for `pause`. Returns it as
    /// it is then.
    async fn take(
        &self,
        operation: &str,
        due: Due,
        limit: u32,
        pause: Duration,
    ) -> Result<Vec<Self::Row>, StoreError>;

    /// Offers a transaction to the handler of an attempt.
    fn lay_out(
        &self,
        attempt: &Attempt,
        limits: &TransactionLimits,
        extensions: &mut Extensions,
    ) -> Arc<dyn StoreTransaction>;

    fn error(operation: &str, source: sqlx::Error) -> StoreError;
}

/// The statements that are known by the same names in every dialect.
#[derive(Debug)]
pub(super) struct Statements {
    pub(super) records: Records,
    pub(super) recovery: Recovery,
    pub(super) purges: Purges,
    /// That of `recovery`, for statements that depend on their values.
    pub(super) dialect: Dialect,
}

/// The outcome of one statement of a transaction.
#[derive(Debug)]
pub(super) struct Reply<R> {
    /// The number of rows that it has changed. Means nothing if it only reads.
    pub(super) changed: u64,
    pub(super) rows: Vec<R>,
}

/// The place of a write among others that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rank {
    /// An attempt that owns its record. It goes first where writers queue.
    Owner,
    /// Every other write.
    Newcomer,
}

/// The kinds of work that may be due.
#[derive(Clone, Copy, Debug)]
pub(super) enum Due {
    DanglingIntents,
    AbandonedRequests,
}

/// A duration in microseconds, at least one and at most a hundred years, which every database can
/// add to its clock.
pub(super) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(MAX_MICROS).clamp(1, MAX_MICROS)
}

/// The savepoint that marks the transaction of an attempt.
pub(super) fn savepoint(attempt: &Attempt) -> String {
    format!("tower_idempotency_{}", attempt.id.as_uuid().simple())
}

const MAX_MICROS: i64 = 100 * 365 * 24 * 60 * 60 * 1_000_000;
