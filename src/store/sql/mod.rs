//! The store in SQL. Records and recovery are written once, for every [`Engine`]: a database and
//! its dialect.

pub(super) mod call;
pub(super) mod errors;
pub(super) mod group;
pub(super) mod grouped;
pub(super) mod pool;
pub(super) mod records;
mod recovery;
mod returning;
pub(super) mod rows;
mod rules;
pub(super) mod setup;
pub(super) mod single;
pub(crate) mod slot;
pub(super) mod statements;

use std::{fmt::Debug, sync::Arc, time::Duration};

use async_trait::async_trait;
use http::Extensions;

use self::{
    call::{Call, Dialect},
    group::Groups,
    grouped::{Completion, Release},
    returning::Takes,
    rows::Fields,
    setup::Ready,
    single::Singles,
    statements::{Purges, Records, Recovery},
};
pub use self::{
    group::Grouping,
    setup::{InvalidIdentifier, TableCreation},
};
use crate::{
    error::StoreError,
    store::transaction::{BeginOutcome, StoreTransaction, TransactionLimits},
    stored::record::{Attempt, Claim, ClaimOutcome, Fenced, Renewal},
};

/// A database: its connections, and the statements that differ from database to database.
///
/// Every engine is a [`Store`](super::Store) and a [`RecoveryStore`](super::RecoveryStore).
#[async_trait]
pub(super) trait Engine: Clone + Debug + Send + Sync + 'static {
    type Row: Fields;
    /// The statements that only this database has.
    type Own: Send + Sync;

    /// Returns the statements and the warnings, once the tables exist.
    async fn ready(&self) -> Result<&Ready<Self::Own>, StoreError>;

    async fn statements(&self) -> Result<&Statements<Self::Own>, StoreError> {
        Ok(&self.ready().await?.statements)
    }

    /// Runs one statement that only reads.
    async fn read(&self, operation: &str, call: Call<'_>) -> Result<Vec<Self::Row>, StoreError>;

    /// Runs one statement. Returns the number of rows that it has changed, or has found and left as
    /// they were.
    async fn change(&self, rank: Rank, operation: &str, call: Call<'_>) -> Result<u64, StoreError>;

    /// Runs statements in one transaction. Each of them sees all that was committed before it
    /// began.
    async fn transact(
        &self,
        operation: &str,
        calls: Vec<Call<'_>>,
    ) -> Result<Vec<Reply<Self::Row>>, StoreError>;

    /// Claims once. Returns `None` if another claim came between, or has the record locked.
    async fn try_claim(&self, claim: &Claim) -> Result<Option<ClaimOutcome>, StoreError>;

    fn grouping(&self) -> Grouping;

    fn groups(&self) -> &Groups;

    /// Claims keys, no two of them the same, with few statements. Skips locked records. Returns
    /// records of these keys: those that a claim has `written`, and those that it found and left.
    /// One of the latter that is `open` is not the answer to its claim.
    async fn claim_together(&self, claims: &[Claim]) -> Result<Vec<Self::Row>, StoreError>;

    /// Completes records that are not locked, in one statement. Returns the `attempt` of each.
    async fn complete_together(&self, completions: &[Completion]) -> Result<Vec<Self::Row>, StoreError>;

    /// Releases keys whose records are neither locked nor retained, in one statement. Returns the
    /// `attempt` of each.
    async fn release_together(&self, releases: &[Release]) -> Result<Vec<Self::Row>, StoreError>;

    /// Renews leases whose records are not locked. Returns one row for each attempt that owns its
    /// record: the `attempt`, and `renewed`, which is true if the lease was renewed.
    async fn renew_batch(&self, renewals: &[Renewal]) -> Result<Vec<Self::Row>, StoreError>;

    /// Takes rows that are due and not locked, so that no other call takes them for `pause`.
    /// Returns the rows after that change.
    async fn take(
        &self,
        operation: &str,
        due: Due<'_>,
        limit: u32,
        pause: Duration,
    ) -> Result<Vec<Self::Row>, StoreError> {
        let takes = &self.statements().await?.takes;
        let call = match due {
            Due::DanglingIntents { names } => Call::new(&takes.dangling).with("names", names),
            Due::AbandonedRequests => Call::new(&takes.abandoned),
        };
        let call = call.with("limit", limit).with("pause", pause);
        let taken = self.transact(operation, vec![call]).await?.pop();
        Ok(taken.map_or_else(Vec::new, |reply| reply.rows))
    }

    /// Offers a transaction to the handler of an attempt.
    fn offer(
        &self,
        attempt: &Attempt,
        limits: &TransactionLimits,
        extensions: &mut Extensions,
    ) -> Arc<dyn StoreTransaction>;

    /// Begins the transaction of an attempt that makes no claim.
    async fn begin(&self, claim: &Claim, limits: &TransactionLimits) -> Result<BeginOutcome, StoreError>;

    /// Closes the store's own connections.
    async fn close_connections(&self);

    fn error(operation: &str, source: sqlx::Error) -> StoreError;
}

/// Every statement of a store, for its tables.
#[derive(Debug)]
pub(super) struct Statements<Own> {
    pub(super) records: Records,
    pub(super) recovery: Recovery,
    pub(super) takes: Takes,
    pub(super) purges: Purges,
    pub(super) singles: Singles,
    pub(super) own: Own,
    /// The dialect of `recovery`, for statements whose text depends on their values.
    pub(super) dialect: Dialect,
}

/// The outcome of one statement of a transaction.
#[derive(Debug)]
pub(super) struct Reply<R> {
    /// The number of rows that it has changed. It has no meaning if the statement only reads.
    pub(super) changed: u64,
    pub(super) rows: Vec<R>,
}

/// The place of a write among others that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rank {
    /// The write of an attempt that owns its record. It goes first where writers queue.
    Owner,
    /// Every other write.
    Newcomer,
}

/// The kinds of work that may be due.
#[derive(Clone, Copy, Debug)]
pub(super) enum Due<'a> {
    /// Intents with one of the names, which are a JSON array.
    DanglingIntents {
        names: &'a str,
    },
    AbandonedRequests,
}

/// Returns a duration in microseconds, at least one and at most a hundred years. Every database can
/// add it to its clock.
pub(super) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(MAX_MICROS).clamp(1, MAX_MICROS)
}

/// Reads all rows of a reply.
fn all<E: Engine, T>(
    operation: &str,
    rows: &[E::Row],
    read: impl Fn(&E::Row) -> Result<T, sqlx::Error>,
) -> Result<Vec<T>, StoreError> {
    rows.iter().map(read).collect::<Result<_, _>>().map_err(|source| E::error(operation, source))
}

fn applied(changed: u64) -> Fenced {
    if changed > 0 { Fenced::Applied } else { Fenced::Lost }
}

/// Returns the name of the savepoint that marks the transaction of an attempt.
pub(super) fn savepoint(attempt: &Attempt) -> String {
    format!("tower_idempotency_{}", attempt.id.as_uuid().simple())
}

const MAX_MICROS: i64 = 100 * 365 * 24 * 60 * 60 * 1_000_000;
