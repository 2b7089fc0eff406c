//! The SQLite store.

mod connection;
mod dialect;
mod requirements;
mod setup;
mod single;
mod transaction;

use std::{fmt::Write, sync::Arc, time::Duration};

use async_trait::async_trait;
use http::Extensions;
use sqlx::{
    AssertSqlSafe, Row, SqlitePool,
    query::Query,
    sqlite::{Sqlite, SqliteArguments, SqliteRow},
};

pub(crate) use self::transaction::transaction_error_kind;
use self::{connection::Connections, dialect::Own, single::Taken, transaction::AttemptTransaction};
use super::{
    IntoStore, Store,
    sql::{
        self, Engine, Rank, Reply,
        call::{Call, Value, max_abandoned},
        group::{Grouping, Groups},
        grouped::{Completion, Release},
        records::{renewals_as_json, shown, taken},
        rows::{Fields, fields_of},
        setup::{Identifier, InvalidIdentifier, Lazy, Ready, TableCreation},
        slot::Slot,
    },
    transaction::{BeginOutcome, StoreTransaction, TransactionLimits},
};
use crate::{
    error::StoreError,
    stored::record::{Attempt, Claim, ClaimOutcome, Renewal},
};

/// Keeps records in a SQLite database file.
///
/// The store opens connections of its own, with the connect options of the given pool and its hook
/// `after_connect`. One connection writes, and all writes of this process wait for it in one fair
/// queue. Up to four connections read. They use write-ahead logging (`journal_mode = WAL`) and
/// flush at every commit (`synchronous = FULL`), whatever options, hooks and handlers have set. A
/// duplicate of a known key only reads, and never waits for a writer.
///
/// Write-ahead logging is a property of the file, so the given pool must not choose another journal
/// mode. [`prepare`](Store::prepare) refuses a pool that does, or that locks the file for itself
/// (`locking_mode = EXCLUSIVE`). The connections close when the store is [closed](Store::close),
/// when the given pool is closed, and when the store is dropped.
///
/// SQLite has one writer at a time. A process that is stopped while it holds the write lock stops
/// all writers. After the busy time-out (5 s), calls fail as
/// [`Unavailable`](crate::store::StoreErrorKind::Unavailable).
///
/// In-memory databases are refused, because each connection would see its own database. Use the
/// `MemoryStore` instead.
///
/// The file must be on a local disk, because write-ahead logging does not work over network file
/// systems.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use tower_idempotency::SqliteStore;
///
/// let pool = sqlx::SqlitePool::connect("sqlite://app.db?mode=rwc").await?;
/// let store = SqliteStore::new(pool);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct SqliteStore {
    pool: SqlitePool,
    prefix: Identifier,
    creation: TableCreation,
    grouping: Grouping,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    connections: Connections,
    ready: Lazy<Ready<Own>>,
    taken: Taken,
    groups: Groups,
}

impl SqliteStore {
    /// Makes a store in the database of `pool`. Opens no connection before the first call.
    #[must_use]
    pub fn new(pool: SqlitePool) -> Self {
        Self {
            pool,
            prefix: Identifier::default_prefix(),
            creation: TableCreation::default(),
            grouping: Grouping::default(),
            state: Arc::default(),
        }
    }

    /// Names the tables `<prefix>_records`, `<prefix>_intents` and so on. Default: `idempotency`.
    ///
    /// # Errors
    ///
    /// [`InvalidIdentifier`] unless the prefix has 1 to 40 bytes of a-z, 0-9 and _ and does not
    /// begin with a digit.
    pub fn with_table_prefix(mut self, prefix: impl Into<String>) -> Result<Self, InvalidIdentifier> {
        self.prefix = Identifier::new(prefix)?;
        Ok(self.with_new_state())
    }

    /// Sets how the tables are created. Default: [`TableCreation::Automatic`].
    #[must_use]
    pub fn with_table_creation(mut self, creation: TableCreation) -> Self {
        self.creation = creation;
        self.with_new_state()
    }

    /// Sets how calls that arrive simultaneously share statements. Default:
    /// [`Grouping::default()`].
    ///
    /// ```no_run
    /// # fn example(pool: sqlx::SqlitePool) {
    /// use tower_idempotency::{SqliteStore, store::Grouping};
    ///
    /// let store = SqliteStore::new(pool).with_grouping(Grouping::off());
    /// # }
    /// ```
    #[must_use]
    pub fn with_grouping(mut self, grouping: Grouping) -> Self {
        self.grouping = grouping;
        self.with_new_state()
    }

    /// Creates or migrates the tables, whatever [`TableCreation`] says. It is safe to repeat, and
    /// to call from several processes simultaneously.
    ///
    /// # Errors
    ///
    /// [`Misconfigured`](crate::store::StoreErrorKind::Misconfigured) if the database is in memory,
    /// read-only or of a newer release; [`Unavailable`](crate::store::StoreErrorKind::Unavailable)
    /// if it stays locked.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        self.set_up(TableCreation::Automatic).await.map(drop)
    }

    /// Forgets connections and tables, so that a new setting applies to those that are opened
    /// later.
    fn with_new_state(mut self) -> Self {
        self.state = Arc::default();
        self
    }

    async fn write(
        &self,
        rank: Rank,
        operation: &str,
        call: &Call<'_>,
    ) -> Result<Reply<SqliteRow>, StoreError> {
        self.state.connections.write(&self.pool, rank, operation, prepared(call)).await
    }
}

#[async_trait]
impl Engine for SqliteStore {
    type Row = SqliteRow;
    type Own = Own;

    async fn ready(&self) -> Result<&Ready<Own>, StoreError> {
        self.state.ready.get_or_make(|| self.set_up(self.creation)).await
    }

    async fn read(&self, operation: &str, call: Call<'_>) -> Result<Vec<SqliteRow>, StoreError> {
        self.state.connections.read(&self.pool, operation, prepared(&call)).await
    }

    async fn change(&self, rank: Rank, operation: &str, call: Call<'_>) -> Result<u64, StoreError> {
        Ok(self.write(rank, operation, &call).await?.changed)
    }

    async fn transact(
        &self,
        operation: &str,
        calls: Vec<Call<'_>>,
    ) -> Result<Vec<Reply<SqliteRow>>, StoreError> {
        let connections = &self.state.connections;
        // Kept until the commit: a transaction queues as a newcomer.
        let _turn = connections.turn().await?;
        let mut transaction = connections.begin(&self.pool, "BEGIN IMMEDIATE".to_owned()).await?;
        let mut replies = Vec::with_capacity(calls.len());
        for call in calls {
            let reply = connection::reply(prepared(&call), &mut transaction).await;
            replies.push(reply.map_err(|source| connection::error(operation, source))?);
        }
        transaction.commit().await.map_err(|source| connection::error(operation, source))?;
        Ok(replies)
    }

    async fn try_claim(&self, claim: &Claim) -> Result<Option<ClaimOutcome>, StoreError> {
        let own = &self.statements().await?.own;
        let failed = |source| connection::error("claim", source);
        // A duplicate only reads. Another claim may take the record before the statement that
        // writes, which therefore decides again.
        let found = self.read("claim", Call::new(&own.look).of_claim(claim)).await?;
        if let Some(row) = found.first()
            && !row.flag("open").map_err(failed)?
        {
            return shown(row).map_err(failed);
        }
        let reply = self.write(Rank::Newcomer, "claim", &Call::new(&own.take).of_claim(claim)).await?;
        taken(&reply.rows).map_err(failed)
    }

    fn grouping(&self) -> Grouping {
        self.grouping
    }

    fn groups(&self) -> &Groups {
        &self.state.groups
    }

    async fn claim_together(&self, claims: &[Claim]) -> Result<Vec<SqliteRow>, StoreError> {
        let own = &self.statements().await?.own;
        let failed = |source| connection::error("claim", source);
        let json = claims_as_json(claims);
        let look = Call::new(&own.look_together).with("claims", json.as_str());
        let mut rows = self.read("claim", look).await?;
        let mut settled = false;
        for row in &rows {
            settled |= !row.flag("open").map_err(failed)?;
        }
        // A duplicate never waits for the writer, so beside one the others are sent alone. Another
        // claim may take a record before the statement that writes, which therefore decides again.
        if !settled {
            let take = Call::new(&own.take_together).with("claims", json.as_str());
            rows.extend(self.write(Rank::Newcomer, "claim", &take).await?.rows);
        }
        Ok(rows)
    }

    async fn complete_together(&self, completions: &[Completion]) -> Result<Vec<SqliteRow>, StoreError> {
        // The responses as one value, because JSON has no bytes.
        let (mut responses, mut attempts) = (Vec::new(), Vec::with_capacity(completions.len()));
        for Completion { attempt, response } in completions {
            attempts.push(with_id(attempt, [(responses.len() + 1).into(), response.len().into()]));
            responses.extend_from_slice(response);
        }
        let attempts = serde_json::Value::from(attempts).to_string();
        let statement = &self.statements().await?.own.complete_together;
        let call = Call::new(statement).with("attempts", attempts.as_str()).with("responses", &*responses);
        Ok(self.write(Rank::Owner, "complete", &call).await?.rows)
    }

    async fn release_together(&self, releases: &[Release]) -> Result<Vec<SqliteRow>, StoreError> {
        let attempts = releases.iter().map(|Release(attempt)| with_id(attempt, []));
        let attempts = attempts.collect::<serde_json::Value>().to_string();
        let statement = &self.statements().await?.own.release_together;
        let call = Call::new(statement).with("attempts", attempts.as_str());
        Ok(self.write(Rank::Owner, "release", &call).await?.rows)
    }

    async fn renew_batch(&self, renewals: &[Renewal]) -> Result<Vec<SqliteRow>, StoreError> {
        let (own, json) = (&self.statements().await?.own, renewals_as_json(renewals));
        let renew = Call::new(&own.renew).with("renewals", json.as_str());
        let mut rows = self.write(Rank::Owner, "renew", &renew).await?.rows;
        // The rest is held or another attempt's. A read tells which, without waiting for the
        // writer.
        if rows.len() < renewals.len() {
            let still_mine = Call::new(&own.still_mine).with("renewals", json.as_str());
            rows.extend(self.read("renew", still_mine).await?);
        }
        Ok(rows)
    }

    fn offer(
        &self,
        attempt: &Attempt,
        limits: &TransactionLimits,
        extensions: &mut Extensions,
    ) -> Arc<dyn StoreTransaction> {
        let driver = AttemptTransaction::new(self.clone(), attempt.clone(), limits.lease);
        Slot::offer(driver, limits.begin_timeout, Some(limits.time_limit), extensions)
    }

    async fn begin(&self, claim: &Claim, limits: &TransactionLimits) -> Result<BeginOutcome, StoreError> {
        single::begin(self, claim, limits).await
    }

    async fn close_connections(&self) {
        self.state.connections.close().await;
    }

    fn error(operation: &str, source: sqlx::Error) -> StoreError {
        connection::error(operation, source)
    }
}

/// Returns claims as JSON.
fn claims_as_json<'a>(claims: impl IntoIterator<Item = &'a Claim>) -> String {
    let row = |claim: &Claim| {
        let id = hexadecimal(claim.record_id.as_uuid().as_bytes());
        let fingerprint = hexadecimal(claim.fingerprint.as_bytes());
        let (lease, retention) = (sql::micros(claim.lease), sql::micros(claim.retention));
        with_id(
            &claim.attempt,
            [id.into(), fingerprint.into(), max_abandoned(claim).into(), lease.into(), retention.into()],
        )
    };
    claims.into_iter().map(row).collect::<serde_json::Value>().to_string()
}

/// Returns the key of an attempt, its id and `more` as JSON.
fn with_id<const N: usize>(attempt: &Attempt, more: [serde_json::Value; N]) -> serde_json::Value {
    let id = hexadecimal(attempt.id.as_uuid().as_bytes());
    let known = [attempt.consumer.as_str().into(), attempt.key.as_str().into(), id.into()];
    known.into_iter().chain(more).collect()
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut digits, byte| {
        // Writing to a string does not fail.
        let _ = write!(digits, "{byte:02x}");
        digits
    })
}

fields_of!(SqliteRow);

impl IntoStore for SqlitePool {
    fn into_store(self) -> Arc<dyn Store> {
        SqliteStore::new(self).into_store()
    }
}

type Prepared<'q> = Query<'q, Sqlite, SqliteArguments>;

fn prepared<'q>(call: &Call<'q>) -> Prepared<'q> {
    let query = sqlx::query(AssertSqlSafe(Arc::clone(&call.statement.text)));
    call.values().fold(query, |query, value| match value {
        Value::Flag(flag) => query.bind(flag),
        Value::Text(text) => query.bind(text),
        Value::Bytes(bytes) => query.bind(bytes),
        Value::Uuid(id) => query.bind(id),
        Value::Int(number) => query.bind(number),
        Value::Span(span) => query.bind(millis(span)),
        #[cfg(feature = "postgres")]
        Value::List(_) => unreachable!("SQLite has no arrays"),
    })
}

/// Returns a duration in milliseconds, rounded up so that a lease is never shorter than requested.
fn millis(duration: Duration) -> i64 {
    sql::micros(duration).saturating_add(999) / 1000
}
