//! The PostgreSQL store.

mod call;
mod connection;
mod dialect;
mod requirements;
mod setup;
mod single;
mod transaction;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use http::Extensions;
use sqlx::{
    PgPool, Row,
    postgres::{PgPoolOptions, PgRow},
};
use uuid::Uuid;

pub(crate) use self::transaction::transaction_error_kind;
use self::{
    connection::{Connections, Settings},
    dialect::Own,
    transaction::{AttemptTransaction, Session},
};
use super::{
    IntoStore, Store,
    sql::{
        Engine, Rank, Reply,
        call::{Call, List, Statement, max_abandoned},
        group::{Grouping, Groups, Item},
        grouped::{Completion, Release},
        micros,
        records::{renewals_as_json, shown, taken},
        rows::{Fields, fields_of},
        setup::{Identifier, InvalidIdentifier, Lazy, Ready, TableCreation},
        slot::Slot,
    },
    transaction::{BeginOutcome, StoreTransaction, TransactionLimits},
};
use crate::{
    duration::limit,
    error::StoreError,
    stored::record::{Attempt, Claim, ClaimOutcome, Renewal},
};

/// Keeps records in a PostgreSQL database, version 12 or newer.
///
/// A claim is one statement and one round trip. A duplicate of a known key writes nothing and waits
/// for no lock.
///
/// The store opens a pool of its own, with the options and the address of the given pool. So a
/// handler that has taken every connection of the application cannot delay a completion. The
/// store's pool does not test a connection before it uses it. After a restart of the server, the
/// first call may fail as [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous), and the layer
/// repeats it.
///
/// The store's pool follows `Pool::set_connect_options` of the given one, for example when a
/// password changes. It runs the hook `after_connect`, and then sets what the store relies on. It
/// does not run `before_acquire` and `after_release`. It closes when the store is
/// [closed](Store::close), when the given pool is closed, and when the store is dropped.
///
/// Records are as durable as the server's settings make them. [`prepare`](Store::prepare) reports
/// settings that forget acknowledged commits (`synchronous_commit = off`, `fsync = off`), and logs
/// them once.
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
    grouping: Grouping,
    state: Arc<State>,
}

/// The kind of connection between the store and the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectionMode {
    /// A direct connection, or a pooler that gives each client a server connection for the whole
    /// session. The store prepares its statements once per connection, and opens connections with
    /// planner settings of its own. This is the default.
    #[default]
    Direct,
    /// A pooler that hands out server connections per transaction: PgBouncer with
    /// `pool_mode = transaction`, for example. The store uses nothing that must outlive a
    /// transaction: no prepared statements, start-up options or session state.
    ///
    /// Values, including responses, are part of a statement's text. They appear in the server's log
    /// if it logs failed statements.
    TransactionPooler,
}

#[derive(Debug, Default)]
struct State {
    connections: Connections,
    ready: Lazy<Ready<Own>>,
    groups: Groups,
    session: Lazy<Session>,
}

impl PostgresStore {
    /// Makes a store in the database of `pool`. Opens no connection before the first call.
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

    /// Sets the schema of the tables, which must exist. Default: the account's `current_schema()`
    /// at the first call. Every statement names the schema, so a later change of `search_path` has
    /// no effect.
    ///
    /// # Errors
    ///
    /// [`InvalidIdentifier`] unless the name has 1 to 40 bytes of a-z, 0-9 and _ and does not begin
    /// with a digit.
    pub fn with_schema(mut self, schema: impl Into<String>) -> Result<Self, InvalidIdentifier> {
        self.schema = Some(Identifier::new(schema)?);
        Ok(self.with_new_state())
    }

    /// Sets the kind of connection. Default: [`ConnectionMode::Direct`].
    ///
    /// ```no_run
    /// # fn example(pool: sqlx::PgPool) {
    /// use tower_idempotency::{PostgresStore, store::ConnectionMode};
    ///
    /// let store = PostgresStore::new(pool)
    ///     .with_connection_mode(ConnectionMode::TransactionPooler);
    /// # }
    /// ```
    #[must_use]
    pub fn with_connection_mode(mut self, mode: ConnectionMode) -> Self {
        self.settings.mode = mode;
        self.with_new_state()
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
    /// # fn example(pool: sqlx::PgPool) {
    /// use tower_idempotency::{PostgresStore, store::Grouping};
    ///
    /// let store = PostgresStore::new(pool).with_grouping(Grouping::off());
    /// # }
    /// ```
    #[must_use]
    pub fn with_grouping(mut self, grouping: Grouping) -> Self {
        self.grouping = grouping;
        self.with_new_state()
    }

    /// Sets the number of connections that the store opens at most, 1 to 10,000. Default: the
    /// maximum of the given pool, but not more than 16.
    #[must_use]
    pub fn with_max_connections(mut self, connections: u32) -> Self {
        self.settings.max_connections = Some(connections.clamp(1, MAX_SET_CONNECTIONS));
        self.with_new_state()
    }

    /// Sets the time that a statement may take. At nine tenths of it the server cancels the
    /// statement (not behind a pooler). At the end the connection is closed, and the call fails as
    /// [`Ambiguous`](crate::store::StoreErrorKind::Ambiguous). At most 24 days, as in PostgreSQL.
    /// Default: 10 s.
    ///
    /// # Panics
    ///
    /// If it is shorter than 1 ms.
    #[must_use]
    #[track_caller]
    pub fn with_statement_timeout(mut self, timeout: Duration) -> Self {
        self.settings.statement_timeout = limit("a statement time-out", timeout).min(MAX_STATEMENT_TIMEOUT);
        self.with_new_state()
    }

    /// Guards a pool that serves transactions of handlers ([`Tx`](crate::Tx)). A connection that is
    /// returned inside of a transaction is closed instead of lent again.
    ///
    /// A connection is left in that state when a handler's own `pool.begin()` is cancelled, for
    /// example by a time-out. sqlx leaves the transaction open on the connection, and the writes of
    /// the next borrower are lost. A transaction of the layer notices such a connection and takes
    /// another one. Statements of the application do not notice it.
    ///
    /// The guard costs a round trip whenever a connection is returned. It replaces a hook that was
    /// set with `after_release`.
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
                // The two times are equal only in the message that began the transaction.
                let statement = "SELECT transaction_timestamp() = statement_timestamp() AS outside";
                sqlx::raw_sql(statement).fetch_one(connection).await?.try_get("outside")
            })
        })
    }

    /// Creates or migrates the tables, whatever [`TableCreation`] says. It is safe to repeat, and
    /// to call from several processes simultaneously.
    ///
    /// # Errors
    ///
    /// [`Misconfigured`](crate::store::StoreErrorKind::Misconfigured) if the account may not create
    /// tables, the server is read-only or the tables are of a newer release; any other if the
    /// server fails.
    pub async fn migrate(&self) -> Result<(), StoreError> {
        self.set_up(TableCreation::Automatic).await.map(drop)
    }

    /// Forgets connections and tables, so that a new setting applies to those that are opened
    /// later.
    fn with_new_state(mut self) -> Self {
        self.state = Arc::default();
        self
    }
}

#[async_trait]
impl Engine for PostgresStore {
    type Row = PgRow;
    type Own = Own;

    async fn ready(&self) -> Result<&Ready<Own>, StoreError> {
        self.state.ready.get_or_make(|| self.set_up(self.creation)).await
    }

    async fn read(&self, operation: &str, call: Call<'_>) -> Result<Vec<PgRow>, StoreError> {
        self.state.connections.rows(&self.pool, &self.settings, operation, call).await
    }

    async fn change(&self, _: Rank, operation: &str, call: Call<'_>) -> Result<u64, StoreError> {
        self.state.connections.change(&self.pool, &self.settings, operation, call).await
    }

    async fn transact(&self, operation: &str, calls: Vec<Call<'_>>) -> Result<Vec<Reply<PgRow>>, StoreError> {
        self.state.connections.script(&self.pool, &self.settings, operation, &calls).await
    }

    async fn try_claim(&self, claim: &Claim) -> Result<Option<ClaimOutcome>, StoreError> {
        let own = &self.statements().await?.own;
        let failed = |source| connection::error("claim", source);
        let rows = self.read("claim", Call::new(&own.claim).of_claim(claim)).await?;
        let Some(row) = rows.first() else { return Ok(None) };
        if row.flag("written").map_err(failed)? {
            return taken(&rows).map_err(failed);
        }
        if !row.flag("open").map_err(failed)? {
            return shown(row).map_err(failed);
        }
        // The record may have changed since: the second statement locks the row and decides again.
        let rows = self.read("claim", Call::new(&own.take).of_claim(claim)).await?;
        taken(&rows).map_err(failed)
    }

    fn grouping(&self) -> Grouping {
        self.grouping
    }

    fn groups(&self) -> &Groups {
        &self.state.groups
    }

    async fn claim_together(&self, claims: &[Claim]) -> Result<Vec<PgRow>, StoreError> {
        let attempts = Attempts::of(claims);
        let records: Vec<_> = claims.iter().map(|claim| claim.record_id.as_uuid()).collect();
        let fingerprints: Vec<_> = claims.iter().map(|claim| claim.fingerprint.as_bytes()).collect();
        let limits: Vec<_> = claims.iter().map(|claim| i64::from(max_abandoned(claim))).collect();
        let leases: Vec<_> = claims.iter().map(|claim| micros(claim.lease)).collect();
        let retentions: Vec<_> = claims.iter().map(|claim| micros(claim.retention)).collect();
        let call = attempts
            .call(&self.statements().await?.own.claim_together)
            .with("records", List::Uuids(&records))
            .with("fingerprints", List::Bytes(&fingerprints))
            .with("limits", List::Ints(&limits))
            .with("leases", List::Ints(&leases))
            .with("retentions", List::Ints(&retentions));
        self.read("claim", call).await
    }

    async fn complete_together(&self, completions: &[Completion]) -> Result<Vec<PgRow>, StoreError> {
        let attempts = Attempts::of(completions);
        let responses: Vec<_> = completions.iter().map(|completion| &*completion.response).collect();
        let call = attempts
            .call(&self.statements().await?.own.complete_together)
            .with("responses", List::Bytes(&responses));
        self.read("complete", call).await
    }

    async fn release_together(&self, releases: &[Release]) -> Result<Vec<PgRow>, StoreError> {
        let attempts = Attempts::of(releases);
        self.read("release", attempts.call(&self.statements().await?.own.release_together)).await
    }

    async fn renew_batch(&self, renewals: &[Renewal]) -> Result<Vec<PgRow>, StoreError> {
        let renewals = renewals_as_json(renewals);
        self.read("renew", Call::new(&self.statements().await?.own.renew).with("renewals", renewals.as_str()))
            .await
    }

    fn offer(
        &self,
        attempt: &Attempt,
        limits: &TransactionLimits,
        extensions: &mut Extensions,
    ) -> Arc<dyn StoreTransaction> {
        let driver = AttemptTransaction::new(self.clone(), attempt.clone(), limits.clone());
        Slot::offer(driver, limits.begin_timeout, None, extensions)
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

/// The attempts of a group, by column.
struct Attempts<'a> {
    consumers: Vec<&'a str>,
    keys: Vec<&'a str>,
    ids: Vec<Uuid>,
}

impl<'a> Attempts<'a> {
    fn of(items: &'a [impl Item]) -> Self {
        let attempts = || items.iter().map(Item::attempt);
        Self {
            consumers: attempts().map(|attempt| attempt.consumer.as_str()).collect(),
            keys: attempts().map(|attempt| attempt.key.as_str()).collect(),
            ids: attempts().map(|attempt| attempt.id.as_uuid()).collect(),
        }
    }

    fn call(&'a self, statement: &'a Statement) -> Call<'a> {
        Call::new(statement)
            .with("consumers", List::Texts(&self.consumers))
            .with("keys", List::Texts(&self.keys))
            .with("attempts", List::Uuids(&self.ids))
    }
}

fields_of!(PgRow);

impl IntoStore for PgPool {
    fn into_store(self) -> Arc<dyn Store> {
        PostgresStore::new(self).into_store()
    }
}

const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest that PostgreSQL takes: a number of milliseconds in 32 bits.
const MAX_STATEMENT_TIMEOUT: Duration = Duration::from_secs(24 * 24 * 60 * 60);
/// Far above what a server serves: a pool takes memory for each in advance.
const MAX_SET_CONNECTIONS: u32 = 10_000;
