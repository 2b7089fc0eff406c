//! The PostgreSQL store.

mod call;
mod connection;
mod recovery;
mod setup;
mod statements;
mod transaction;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use http::Extensions;
use sqlx::{
    PgPool, Row,
    postgres::{PgPoolOptions, PgRow},
};

use self::{
    call::{Call, Value},
    connection::{Connections, Settings},
    statements::Statements,
    transaction::{AttemptTransaction, Session},
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
        Attempt, Claim, ClaimOutcome, CompleteOutcome, Fenced, Record, RecordFilter, RenewOutcome, Renewal,
        Resolution, ResolveOutcome,
    },
};

/// Keeps records in a PostgreSQL database, version 12 or newer.
///
/// The store makes a pool of its own from the options, hooks and address of the pool it is given, so that a handler
/// that has taken every connection of the application cannot keep a claim from being completed. A claim is one
/// statement and one round trip; a duplicate of a known key writes nothing and waits for no lock.
///
/// Records are as durable as the server's settings make them. Settings that forget acknowledged commits
/// (`synchronous_commit = off`, `fsync = off`) are reported by [`prepare`](Store::prepare) and logged once.
///
/// The store's own pool does not test a connection before it uses it. After the server was restarted the first call
/// may fail as [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous); the layer repeats it.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use tower_idempotency::PostgresStore;
///
/// let pool = sqlx::PgPool::connect("postgres://app@localhost/app").await?;
/// let store = PostgresStore::new(pool).with_schema("payments")?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct PostgresStore {
    pool: PgPool,
    schema: Option<Identifier>,
    prefix: Identifier,
    creation: TableCreation,
    settings: Settings,
    state: Arc<State>,
}

/// What stands between the store and the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectionMode {
    /// Nothing, or a pooler that gives each client a server connection for the whole session. Statements are prepared
    /// once per connection, and the store's connections are opened with planner settings of their own. The default.
    #[default]
    Direct,
    /// A pooler that hands out server connections per transaction, like PgBouncer with `pool_mode = transaction`.
    /// Nothing outlives a transaction: no prepared statements, no start-up options, no session state.
    ///
    /// Values, responses among them, are sent in the text of the statements, and so are in the server's log if that
    /// logs statements that failed.
    TransactionPooler,
}

#[derive(Debug, Default)]
struct State {
    connections: Connections,
    ready: Lazy<Ready<Statements>>,
    session: Lazy<Session>,
}

impl PostgresStore {
    /// A store in the database of `pool`. Nothing is opened before the first call.
    #[must_use]
    pub fn new(pool: PgPool) -> Self {
        let settings = Settings {
            mode: ConnectionMode::Direct,
            max_connections: None,
            statement_timeout: STATEMENT_TIMEOUT,
        };
        let creation = TableCreation::default();
        Self {
            pool,
            schema: None,
            prefix: Identifier::default_prefix(),
            creation,
            settings,
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

    /// The schema of the tables; it must exist. Default: the account's `current_schema()` at the first call. Either
    /// way every statement names the schema, whatever happens to `search_path` later.
    ///
    /// # Errors
    ///
    /// [`InvalidIdentifier`] unless the name has 1 to 40 bytes of a-z, 0-9 and _ and does not begin with a digit.
    pub fn with_schema(mut self, schema: impl Into<String>) -> Result<Self, InvalidIdentifier> {
        self.schema = Some(Identifier::new(schema)?);
        Ok(self.anew())
    }

    /// What stands between the store and the server. Default: [`ConnectionMode::Direct`].
    #[must_use]
    pub fn with_connection_mode(mut self, mode: ConnectionMode) -> Self {
        self.settings.mode = mode;
        self.anew()
    }

    /// Who creates the tables. Default: the store.
    #[must_use]
    pub fn with_table_creation(mut self, creation: TableCreation) -> Self {
        self.creation = creation;
        self.anew()
    }

    /// How many connections the store opens at most, at least 1. Default: the maximum of the given pool, but not more
    /// than 16.
    #[must_use]
    pub fn with_max_connections(mut self, connections: u32) -> Self {
        self.settings.max_connections = Some(connections);
        self.anew()
    }

    /// How long a statement may take. Shortly before, the server cancels it (not behind a pooler); after that its
    /// connection is closed and the call fails as [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous). Default: 10 s.
    #[must_use]
    pub fn with_statement_timeout(mut self, timeout: Duration) -> Self {
        self.settings.statement_timeout = timeout;
        self.anew()
    }

    /// Options for a pool that serves transactions of handlers ([`Tx`](crate::Tx)): a connection that is given back inside
    /// of a transaction is closed instead of being lent again.
    ///
    /// That happens when a handler's own `pool.begin()` is cancelled, by a time-out for example: sqlx leaves the transaction
    /// open on the connection, and what the next borrower writes is lost. A transaction of the layer notices such a
    /// connection and takes another one; statements of the application do not. Costs a round trip whenever a connection is
    /// given back.
    ///
    /// It takes the place of a hook that was set with `after_release`.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use sqlx::postgres::PgPoolOptions;
    /// use tower_idempotency::PostgresStore;
    ///
    /// let options = PostgresStore::guard_pool(PgPoolOptions::new().max_connections(20));
    /// let pool = options.connect("postgres://app@localhost/app").await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn guard_pool(options: PgPoolOptions) -> PgPoolOptions {
        options.after_release(|connection, _| {
            Box::pin(async move {
                // Equal only in the message that began the transaction.
                let statement = "SELECT transaction_timestamp() = statement_timestamp() AS outside";
                sqlx::raw_sql(statement).fetch_one(connection).await?.try_get("outside")
            })
        })
    }

    /// Creates or migrates the tables, whatever [`TableCreation`] says. Safe twice, and from several processes at once.
    ///
    /// # Errors
    ///
    /// [`Misconfigured`](crate::store::StoreErrorKind::Misconfigured) if the account may not create tables, the server is
    /// read-only or the tables are of a newer release; any other if the server fails.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        self.set_up(TableCreation::Automatic).await.map(drop)
    }

    /// Settings apply to connections that are still to be opened and tables still to be found.
    fn anew(mut self) -> Self {
        self.state = Arc::default();
        self
    }

    async fn sql(&self) -> Result<&Statements, StoreError> {
        Ok(&self.ready().await?.statements)
    }

    async fn rows(&self, operation: &str, call: Call<'_>) -> Result<Vec<PgRow>, StoreError> {
        self.state.connections.rows(&self.pool, &self.settings, operation, call).await
    }

    /// Asks once. `None` if another claim was changing the record.
    async fn ask(&self, claim: &Claim) -> Result<Option<ClaimOutcome>, StoreError> {
        let statements = self.sql().await?;
        let rows = self.rows("claim", of_claim(&statements.claim, claim)).await?;
        let failed = |source| connection::error("claim", source);
        let Some(row) = rows.first() else { return Ok(None) };
        if row.try_get("written").map_err(failed)? {
            return sql::record(row).map(sql::claimed).map(Some).map_err(failed);
        }
        if !row.try_get("open").map_err(failed)? {
            return sql::record(row)
                .map(|record| Some(ClaimOutcome::Exists(Box::new(record))))
                .map_err(failed);
        }
        let rows = self.rows("claim", of_claim(&statements.take, claim)).await?;
        rows.first().map(sql::record).transpose().map(|record| record.map(sql::claimed)).map_err(failed)
    }

    async fn fenced(&self, operation: &str, sql: &Arc<str>, attempt: &Attempt) -> Result<Fenced, StoreError> {
        let rows = self.rows(operation, of_attempt(sql, attempt)).await?;
        Ok(if rows.is_empty() { Fenced::Lost } else { Fenced::Applied })
    }

    async fn renew_batch(&self, renewals: &[Renewal]) -> Result<Vec<RenewOutcome>, StoreError> {
        let attempts = || renewals.iter().map(|renewal| &renewal.attempt);
        let call = Call::new(Arc::clone(&self.sql().await?.renew))
            .with(Value::Texts(attempts().map(|attempt| attempt.consumer.as_str()).collect()))
            .with(Value::Texts(attempts().map(|attempt| attempt.key.as_str()).collect()))
            .with(Value::Uuids(attempts().map(|attempt| attempt.id.as_uuid()).collect()))
            .with(Value::Ints(renewals.iter().map(|renewal| sql::micros(renewal.lease)).collect()));
        let rows = self.rows("renew", call).await?;
        renewed(&rows, renewals.len()).map_err(|source| connection::error("renew", source))
    }
}

#[async_trait]
impl Store for PostgresStore {
    async fn prepare(&self) -> Result<Vec<String>, StoreError> {
        Ok(self.ready().await?.warnings.clone())
    }

    async fn claim(&self, claim: &Claim) -> Result<ClaimOutcome, StoreError> {
        for _ in 0..CLAIM_ROUNDS {
            if let Some(outcome) = self.ask(claim).await? {
                return Ok(outcome);
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
        let call = of_attempt(&self.sql().await?.complete, attempt).with(Value::Bytes(&response));
        if !self.rows("complete", call).await?.is_empty() {
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
        let rows = self.rows("get", of_key(&self.sql().await?.get, consumer, key)).await?;
        rows.first().map(sql::record).transpose().map_err(|source| connection::error("get", source))
    }

    async fn list(&self, filter: RecordFilter, limit: u32) -> Result<Vec<Record>, StoreError> {
        let call = Call::new(Arc::clone(&self.sql().await?.list))
            .with(Value::Int(limit.into()))
            .with(Value::Text(sql::filter(filter)));
        let rows = self.rows("list", call).await?;
        rows.iter()
            .map(sql::record)
            .collect::<Result<_, _>>()
            .map_err(|source| connection::error("list", source))
    }

    async fn evict(&self, consumer: &Consumer, key: &IdempotencyKey) -> Result<bool, StoreError> {
        let rows = self.rows("evict", of_key(&self.sql().await?.evict, consumer, key)).await?;
        Ok(!rows.is_empty())
    }

    async fn resolve(
        &self,
        consumer: &Consumer,
        key: &IdempotencyKey,
        resolution: Resolution,
    ) -> Result<ResolveOutcome, StoreError> {
        let statements = self.sql().await?;
        let calls = match &resolution {
            Resolution::Release => vec![
                of_key(&statements.resolve_release, consumer, key),
                of_key(&statements.resolve_release_kept, consumer, key),
            ],
            Resolution::Complete(response) => {
                vec![of_key(&statements.resolve_complete, consumer, key).with(Value::Bytes(response))]
            }
        };
        for call in calls {
            if !self.rows("resolve", call).await?.is_empty() {
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
        let driver = AttemptTransaction::new(self.clone(), attempt.clone(), limits.clone());
        Some(Slot::lay_out(driver, limits.begin_timeout, None, extensions))
    }

    fn recovery(&self) -> Option<Arc<dyn RecoveryStore>> {
        Some(Arc::new(SqlRecovery(self.clone())))
    }

    async fn purge(&self, limit: u32) -> Result<u64, StoreError> {
        let call = Call::new(Arc::clone(&self.sql().await?.purge)).with(Value::Int(limit.into()));
        let rows = self.rows("purge", call).await?;
        Ok(rows.len().try_into().unwrap_or(u64::MAX))
    }
}

impl IntoStore for PgPool {
    fn into_store(self) -> Arc<dyn Store> {
        PostgresStore::new(self).into_store()
    }
}

fn of_key<'a>(sql: &Arc<str>, consumer: &'a Consumer, key: &'a IdempotencyKey) -> Call<'a> {
    Call::new(Arc::clone(sql)).with(Value::Text(consumer.as_str())).with(Value::Text(key.as_str()))
}

fn of_claim<'a>(sql: &Arc<str>, claim: &'a Claim) -> Call<'a> {
    of_attempt(sql, &claim.attempt)
        .with(Value::Bytes(claim.fingerprint.as_bytes()))
        .with(Value::Uuid(claim.record_id.as_uuid()))
        .with(Value::Small(claim.max_abandoned.try_into().unwrap_or(i16::MAX)))
        .with(Value::Int(sql::micros(claim.lease)))
        .with(Value::Int(sql::micros(claim.retention)))
}

fn of_attempt<'a>(sql: &Arc<str>, attempt: &'a Attempt) -> Call<'a> {
    of_key(sql, &attempt.consumer, &attempt.key).with(Value::Uuid(attempt.id.as_uuid()))
}

/// Rows say the position, from 1, of a renewal and whether it was carried out; no row, that the attempt is gone.
fn renewed(rows: &[PgRow], count: usize) -> Result<Vec<RenewOutcome>, sqlx::Error> {
    let mut outcomes = vec![RenewOutcome::Lost; count];
    for row in rows {
        let position: usize = sql::number(row.try_get("position")?)?;
        let Some(outcome) = position.checked_sub(1).and_then(|index| outcomes.get_mut(index)) else {
            continue;
        };
        if row.try_get("renewed")? {
            *outcome = RenewOutcome::Renewed;
        } else if *outcome == RenewOutcome::Lost {
            *outcome = RenewOutcome::Skipped;
        }
    }
    Ok(outcomes)
}

const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);
