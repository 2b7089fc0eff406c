//! The SQLite store.

mod connection;
mod recovery;
mod setup;
mod statements;
mod transaction;

use std::{collections::HashSet, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use http::Extensions;
use sqlx::{
    AssertSqlSafe, Row, SqlitePool,
    query::Query,
    sqlite::{Sqlite, SqliteArguments, SqliteRow},
};
use uuid::Uuid;

use self::{
    connection::{Connections, Rank},
    statements::Statements,
    transaction::AttemptTransaction,
};
use super::{
    IntoStore, RecoveryStore, Store,
    sql::{
        self, CLAIM_ROUNDS, Identifier, InvalidIdentifier, Lazy, Ready, TableCreation, recovery::SqlRecovery,
    },
};
use crate::{
    consumer::Consumer,
    error::StoreError,
    key::IdempotencyKey,
    store::{
        sql::slot::Slot,
        transaction::{StoreTransaction, TransactionLimits},
    },
    stored::record::{
        Attempt, AttemptId, Claim, ClaimOutcome, CompleteOutcome, Fenced, Record, RecordFilter, RenewOutcome,
        Renewal, Resolution, ResolveOutcome,
    },
};

/// Keeps records in a SQLite database file.
///
/// The store makes connections of its own with the connect options of the pool it is given: one that writes, so that
/// everything that is written by this process waits in one fair queue, and up to four that read. They use write-ahead
/// logging and flush at every commit (`journal_mode = WAL`, `synchronous = FULL`). A duplicate of a known key only
/// reads and waits for nobody.
///
/// SQLite has one writer at a time. A process that is stopped while it holds the write lock stops all writers; after
/// the busy time-out (5 s) calls fail as [`Unavailable`](crate::store::StoreErrorKind::Unavailable). In-memory databases are
/// refused, because each connection would see one of its own: take the `MemoryStore`.
///
/// The file must be on a local disk: write-ahead logging does not work over network file systems.
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
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    connections: Connections,
    ready: Lazy<Ready<Statements>>,
}

impl SqliteStore {
    /// A store in the database of `pool`. Nothing is opened before the first call.
    #[must_use]
    pub fn new(pool: SqlitePool) -> Self {
        Self {
            pool,
            prefix: Identifier::default_prefix(),
            creation: TableCreation::default(),
            state: Arc::default(),
        }
    }

    /// Names the tables `<prefix>_records`, `<prefix>_intents` and so on. Default: `idempotency`.
    ///
    /// # Errors
    ///
    /// [`InvalidIdentifier`] unless the prefix has 1 to 40 bytes of a-z, 0-9 and _ and does not begin with a digit.
    pub fn with_table_prefix(mut self, prefix: impl Into<String>) -> Result<Self, InvalidIdentifier> {
        self.prefix = Identifier::new(prefix)?;
        Ok(self.anew())
    }

    /// Who creates the tables. Default: the store.
    #[must_use]
    pub fn with_table_creation(mut self, creation: TableCreation) -> Self {
        self.creation = creation;
        self.anew()
    }

    /// Creates or migrates the tables, whatever [`TableCreation`] says. Safe twice, and from several processes at once.
    ///
    /// # Errors
    ///
    /// [`Misconfigured`](crate::store::StoreErrorKind::Misconfigured) if the database is in memory, read-only or of a newer
    /// release; [`Unavailable`](crate::store::StoreErrorKind::Unavailable) if it stays locked.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        self.set_up(TableCreation::Automatic).await.map(drop)
    }

    /// Settings apply to tables that are still to be found.
    fn anew(mut self) -> Self {
        self.state = Arc::default();
        self
    }

    async fn sql(&self) -> Result<&Statements, StoreError> {
        Ok(&self.ready().await?.statements)
    }

    async fn read(&self, operation: &str, query: Prepared<'_>) -> Result<Vec<SqliteRow>, StoreError> {
        self.state.connections.read(&self.pool, operation, query).await
    }

    async fn write(
        &self,
        rank: Rank,
        operation: &str,
        query: Prepared<'_>,
    ) -> Result<Vec<SqliteRow>, StoreError> {
        self.state.connections.write(&self.pool, rank, operation, query).await
    }

    /// What the claim finds, and whether it can take it.
    async fn look(&self, claim: &Claim) -> Result<Option<(Record, bool)>, StoreError> {
        let query = prepared(&self.sql().await?.look)
            .bind(claim.attempt.consumer.as_str())
            .bind(claim.attempt.key.as_str())
            .bind(claim.attempt.id.as_uuid())
            .bind(claim.fingerprint.as_bytes());
        let rows = self.read("claim", query).await?;
        rows.first().map(found).transpose().map_err(|source| connection::error("claim", source))
    }

    async fn take(&self, claim: &Claim) -> Result<Option<Record>, StoreError> {
        let query = prepared(&self.sql().await?.take)
            .bind(claim.attempt.consumer.as_str())
            .bind(claim.attempt.key.as_str())
            .bind(claim.attempt.id.as_uuid())
            .bind(claim.fingerprint.as_bytes())
            .bind(claim.record_id.as_uuid())
            .bind(i64::from(claim.max_abandoned))
            .bind(statements::millis(claim.lease))
            .bind(statements::millis(claim.retention));
        first_record("claim", &self.write(Rank::Newcomer, "claim", query).await?)
    }

    async fn fenced(&self, operation: &str, sql: &Arc<str>, attempt: &Attempt) -> Result<Fenced, StoreError> {
        let rows = self.write(Rank::Owner, operation, of_attempt(sql, attempt)).await?;
        Ok(if rows.is_empty() { Fenced::Lost } else { Fenced::Applied })
    }

    /// Those of the attempts whose rows the statement returned.
    async fn attempts(
        &self,
        query: &Arc<str>,
        renewals: &[Renewal],
        write: bool,
    ) -> Result<HashSet<Uuid>, StoreError> {
        let query = prepared(query).bind(statements::renewals(renewals));
        let rows = if write {
            self.write(Rank::Owner, "renew", query).await?
        } else {
            self.read("renew", query).await?
        };
        let ids = rows.iter().map(|row| row.try_get::<Uuid, _>("attempt"));
        ids.collect::<Result<_, _>>().map_err(|source| connection::error("renew", source))
    }

    async fn renew_batch(&self, renewals: &[Renewal]) -> Result<Vec<RenewOutcome>, StoreError> {
        let statements = self.sql().await?;
        let renewed = self.attempts(&statements.renew, renewals, true).await?;
        let all_renewed = renewals.iter().all(|renewal| renewed.contains(&renewal.attempt.id.as_uuid()));
        let mine = if all_renewed {
            HashSet::new()
        } else {
            self.attempts(&statements.still_mine, renewals, false).await?
        };
        let outcome = |id: AttemptId| match id.as_uuid() {
            id if renewed.contains(&id) => RenewOutcome::Renewed,
            id if mine.contains(&id) => RenewOutcome::Skipped,
            _ => RenewOutcome::Lost,
        };
        Ok(renewals.iter().map(|renewal| outcome(renewal.attempt.id)).collect())
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn prepare(&self) -> Result<Vec<String>, StoreError> {
        Ok(self.ready().await?.warnings.clone())
    }

    async fn claim(&self, claim: &Claim) -> Result<ClaimOutcome, StoreError> {
        for _ in 0..CLAIM_ROUNDS {
            if let Some((record, false)) = self.look(claim).await? {
                return Ok(ClaimOutcome::Exists(Box::new(record)));
            }
            if let Some(record) = self.take(claim).await? {
                return Ok(sql::claimed(record));
            }
        }
        Ok(ClaimOutcome::Contended)
    }

    async fn renew(&self, renewals: &[Renewal]) -> Result<Vec<RenewOutcome>, StoreError> {
        let mut outcomes = Vec::with_capacity(renewals.len());
        for batch in renewals.chunks(sql::RENEW_BATCH) {
            outcomes.extend(self.renew_batch(batch).await?);
        }
        Ok(outcomes)
    }

    async fn complete(&self, attempt: &Attempt, response: Bytes) -> Result<CompleteOutcome, StoreError> {
        let query = of_attempt(&self.sql().await?.complete, attempt).bind(&*response);
        if !self.write(Rank::Owner, "complete", query).await?.is_empty() {
            return Ok(CompleteOutcome::Completed);
        }
        Ok(sql::not_completed(attempt, self.get(&attempt.consumer, &attempt.key).await?))
    }

    async fn release(&self, attempt: &Attempt) -> Result<Fenced, StoreError> {
        let statements = self.sql().await?;
        match self.fenced("release", &statements.release, attempt).await? {
            Fenced::Applied => Ok(Fenced::Applied),
            Fenced::Lost => self.fenced("release", &statements.release_kept, attempt).await,
        }
    }

    async fn hold(&self, attempt: &Attempt) -> Result<Fenced, StoreError> {
        self.fenced("hold", &self.sql().await?.hold, attempt).await
    }

    async fn get(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<Option<Record>, StoreError> {
        let query = of_key(&self.sql().await?.get, consumer, key);
        first_record("get", &self.read("get", query).await?)
    }

    async fn list(&self, filter: RecordFilter, limit: u32) -> Result<Vec<Record>, StoreError> {
        let query = prepared(&self.sql().await?.list).bind(limit).bind(sql::filter(filter));
        let rows = self.read("list", query).await?;
        rows.iter()
            .map(sql::record)
            .collect::<Result<_, _>>()
            .map_err(|source| connection::error("list", source))
    }

    async fn evict(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<bool, StoreError> {
        let query = of_key(&self.sql().await?.evict, consumer, key);
        Ok(!self.write(Rank::Newcomer, "evict", query).await?.is_empty())
    }

    async fn resolve(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        resolution: Resolution,
    ) -> Result<ResolveOutcome, StoreError> {
        let statements = self.sql().await?;
        let queries = match &resolution {
            Resolution::Release => vec![
                of_key(&statements.resolve_release, consumer, key),
                of_key(&statements.resolve_release_kept, consumer, key),
            ],
            Resolution::Complete(response) => {
                vec![of_key(&statements.resolve_complete, consumer, key).bind(&**response)]
            }
        };
        for query in queries {
            if !self.write(Rank::Newcomer, "resolve", query).await?.is_empty() {
                return Ok(ResolveOutcome::Resolved);
            }
        }
        Ok(sql::not_resolved(self.get(consumer, key).await?))
    }

    fn transaction(
        &self,
        attempt: &Attempt,
        limits: &TransactionLimits,
        extensions: &mut Extensions,
    ) -> Option<Arc<dyn StoreTransaction>> {
        let driver = AttemptTransaction::new(self.clone(), attempt.clone(), limits.lease);
        Some(Slot::lay_out(driver, limits.begin_timeout, Some(limits.time_limit), extensions))
    }

    fn recovery(&self) -> Option<Arc<dyn RecoveryStore>> {
        Some(Arc::new(SqlRecovery(self.clone())))
    }

    async fn purge(&self, limit: u32) -> Result<u64, StoreError> {
        let rows =
            self.write(Rank::Newcomer, "purge", prepared(&self.sql().await?.purge).bind(limit)).await?;
        Ok(rows.len().try_into().unwrap_or(u64::MAX))
    }
}

impl IntoStore for SqlitePool {
    fn into_store(self) -> Arc<dyn Store> {
        SqliteStore::new(self).into_store()
    }
}

type Prepared<'q> = Query<'q, Sqlite, SqliteArguments>;

fn prepared<'q>(sql: &Arc<str>) -> Prepared<'q> {
    sqlx::query(AssertSqlSafe(Arc::clone(sql)))
}

fn of_attempt<'q>(sql: &Arc<str>, attempt: &'q Attempt) -> Prepared<'q> {
    of_key(sql, &attempt.consumer, &attempt.key).bind(attempt.id.as_uuid())
}

fn of_key<'q>(sql: &Arc<str>, consumer: &'q Consumer, key: &'q IdempotencyKey) -> Prepared<'q> {
    prepared(sql).bind(consumer.as_str()).bind(key.as_str())
}

fn first_record(operation: &str, rows: &[SqliteRow]) -> Result<Option<Record>, StoreError> {
    rows.first().map(sql::record).transpose().map_err(|source| connection::error(operation, source))
}

fn found(row: &SqliteRow) -> Result<(Record, bool), sqlx::Error> {
    Ok((sql::record(row)?, row.try_get::<String, _>("action")? != "none"))
}
