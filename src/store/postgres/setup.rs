//! Tables and checks before the first statement.

use std::time::Duration;

use sqlx::{AssertSqlSafe, Decode, PgConnection, Postgres, Row, Type, postgres::PgRow};
use tokio::time::{Instant, sleep, timeout};

use super::{
    ConnectionMode, PostgresStore,
    connection::{Settings, error},
    dialect::{self, Own},
    requirements,
};
use crate::{
    error::{StoreError, StoreErrorKind},
    redact::TRACING_TARGET,
    store::sql::{
        TableCreation,
        call::{Call, Statement},
        errors::{self, misconfigured},
        setup::{self, Identifier, Migration, Ready, migration},
    },
};

impl PostgresStore {
    /// Sets up the tables. Closes a connection on which something has failed.
    pub(super) async fn set_up(&self, creation: TableCreation) -> Result<Ready<Own>, StoreError> {
        let (mut connection, fresh) = self.state.connections.acquire(&self.pool, &self.settings).await?;
        let Settings { mode, statement_timeout, .. } = self.settings;
        // First of all: another engine may not know what the following statements ask.
        in_time(statement_timeout, requirements::refuse_other_engines(&mut connection)).await?;
        if fresh {
            connection.arm(&self.settings).await?;
        }
        let schema = self.schema.as_ref().map_or_else(String::new, Identifier::to_string);
        let statement = Statement::new(SERVER, Some('$'));
        let server = one_row(&mut connection, mode, Call::new(&statement).with("schema", schema.as_str()));
        let server = in_time(statement_timeout, server).await?;
        // Before the migration: a server that is refused must not be changed.
        refuse(&server)?;
        let schema = schema_of(&server)?;
        let found = version(&mut connection, mode, &schema, &self.prefix);
        let pending = setup::pending(in_time(statement_timeout, found).await?, MIGRATIONS)?;
        if !pending.is_empty() {
            if creation == TableCreation::Manual {
                return Err(setup::tables_missing(pending, Some(&schema), &self.prefix));
            }
            in_time(MIGRATION_TIMEOUT, migrate(&mut connection, mode, &schema, &self.prefix)).await?;
        }
        let usable = requirements::check(&mut connection, mode, &schema, &self.prefix);
        in_time(statement_timeout, usable).await?;
        connection.give_back();
        Ok(Ready::new(dialect::statements(&schema, &self.prefix), warnings(&server)?))
    }
}

/// Migrates as soon as no other transaction has the tables locked. Each try waits only shortly:
/// while it waits, the statements of all other nodes wait behind it.
async fn migrate(
    connection: &mut PgConnection,
    mode: ConnectionMode,
    schema: &str,
    prefix: &Identifier,
) -> Result<(), StoreError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match try_migrate(connection, mode, schema, prefix).await {
            Err(error) if is_locked(&error) && Instant::now() < deadline => {
                execute(connection, "ROLLBACK".to_owned()).await?;
                sleep(LOCK_PAUSE).await;
            }
            Err(error) if is_locked(&error) => {
                return Err(still_locked(schema, prefix).with_source(error));
            }
            done => return done,
        }
    }
}

fn still_locked(schema: &str, prefix: &Identifier) -> StoreError {
    let message = format!(
        "prepare: the tables `{prefix}_*` in schema {schema} could not be migrated within {LOCK_PATIENCE:?}, \
         because other transactions have them locked or another process migrates them. Nothing was changed. \
         Look for old transactions in pg_stat_activity and end them; the next request or a call of migrate() \
         tries again"
    );
    StoreError::new(StoreErrorKind::Unavailable, message)
}

/// Migrates in one transaction. Processes migrate one after the other.
async fn try_migrate(
    connection: &mut PgConnection,
    mode: ConnectionMode,
    schema: &str,
    prefix: &Identifier,
) -> Result<(), StoreError> {
    let lock = format!("tower-idempotency {schema}.{prefix}").replace('\'', "''");
    execute(connection, BEGIN.replace("{lock}", &lock).replace("{schema}", schema)).await?;
    // Under the lock, because another process may have migrated while this one waited.
    for migration in setup::pending(version(connection, mode, schema, prefix).await?, MIGRATIONS)? {
        execute(connection, migration.sql(prefix)).await?;
        tracing::info!(target: TRACING_TARGET, file = migration.file, schema, "migrated the tables");
    }
    execute(connection, "COMMIT".to_owned()).await
}

/// Returns `true` if a statement gave up its wait for a lock.
fn is_locked(error: &StoreError) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<sqlx::Error>());
    source.is_some_and(|source| errors::code(source).as_deref() == Some("55P03"))
}

/// Returns the version of the tables, 0 if there are none.
async fn version(
    connection: &mut PgConnection,
    mode: ConnectionMode,
    schema: &str,
    prefix: &Identifier,
) -> Result<i64, StoreError> {
    let table = format!("{schema}.{prefix}_migrations");
    let there = Statement::new(TABLE_THERE, Some('$'));
    let there = one_row(connection, mode, Call::new(&there).with("table", table.as_str())).await?;
    if !column::<bool>(&there, "there")? {
        return Ok(0);
    }
    let version = Statement::new(&VERSION.replace("{migrations}", &table), Some('$'));
    column(&one_row(connection, mode, Call::new(&version)).await?, "version")
}

pub(super) async fn one_row(
    connection: &mut PgConnection,
    mode: ConnectionMode,
    call: Call<'_>,
) -> Result<PgRow, StoreError> {
    let rows = call.fetch_all(connection, mode).await;
    let row = rows.and_then(|mut rows| rows.pop().ok_or(sqlx::Error::RowNotFound));
    row.map_err(|source| error("prepare", source))
}

async fn execute(connection: &mut PgConnection, sql: String) -> Result<(), StoreError> {
    let done = sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await;
    done.map(drop).map_err(|source| error("prepare", source))
}

pub(super) fn column<'r, T>(row: &'r PgRow, name: &str) -> Result<T, StoreError>
where
    T: Decode<'r, Postgres> + Type<Postgres>,
{
    row.try_get(name).map_err(|source| error("prepare", source))
}

async fn in_time<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    timeout(limit, work).await.unwrap_or_else(|elapsed| {
        let message = format!("prepare: did not end within {limit:?}");
        Err(StoreError::new(StoreErrorKind::Ambiguous, message).with_source(elapsed))
    })
}

/// Refuses a server that cannot keep the contract.
fn refuse(server: &PgRow) -> Result<(), StoreError> {
    let version: i32 = column(server, "version")?;
    if version < OLDEST_VERSION {
        return Err(misconfigured(format!(
            "server version {version} is too old: PostgreSQL 12 or newer is needed"
        )));
    }
    if column(server, "standby")? {
        return Err(misconfigured(
            "the server is a standby and cannot be written to: connect to the primary",
        ));
    }
    if column(server, "read_only")? {
        return Err(misconfigured(
            "transactions are read-only by default (default_transaction_read_only): \
             connect to the primary, or change the setting for this account",
        ));
    }
    Ok(())
}

fn schema_of(server: &PgRow) -> Result<String, StoreError> {
    column::<Option<String>>(server, "schema")?.ok_or_else(|| {
        misconfigured("the search path of the account names no existing schema: set it, or use with_schema()")
    })
}

fn warnings(server: &PgRow) -> Result<Vec<String>, StoreError> {
    let mut warnings = Vec::new();
    for (name, warning) in WARNINGS {
        if column(server, name)? {
            warnings.push(warning.to_owned());
        }
    }
    Ok(warnings)
}

const SERVER: &str = "
SELECT quote_ident(coalesce(nullif(:schema, ''), current_schema()::text)) AS schema,
    current_setting('server_version_num')::int AS version,
    pg_is_in_recovery() AS standby,
    current_setting('default_transaction_read_only')::bool AS read_only,
    current_setting('synchronous_commit') = 'off' AS commit_not_flushed,
    NOT current_setting('fsync')::bool AND NOT neon AS fsync_off,
    NOT current_setting('full_page_writes')::bool AND NOT neon AS pages_torn,
    current_setting('server_encoding') NOT IN ('UTF8', 'SQL_ASCII') AS few_characters,
    NOT pg_has_role(session_user, 'USAGE') AS foreign_sessions
FROM (SELECT current_setting('neon.timeline_id', true) IS NOT NULL AS neon) AS engine";

const WARNINGS: [(&str, &str); 5] = [
    (
        "commit_not_flushed",
        "synchronous_commit is off: a crash of the server forgets records that were acknowledged",
    ),
    ("fsync_off", "fsync is off: a crash of the machine can forget or destroy records"),
    ("pages_torn", "full_page_writes is off: a crash of the machine can destroy records"),
    (
        "few_characters",
        "the encoding of the database is not UTF8: requests whose consumer has a character that it lacks are \
         refused. Use a database with ENCODING 'UTF8'",
    ),
    (
        "foreign_sessions",
        "the role of the connection (SET ROLE) may not end sessions of its own account: a transaction that \
         hangs is ended by its idle time-out only. Grant the account's role to it",
    ),
];

/// Looks for a table. Reading `pg_class` refreshes what the connection has cached before others
/// committed. `to_regclass` alone may still miss a table that was created while this process waited
/// for the lock.
const TABLE_THERE: &str = "SELECT EXISTS (SELECT FROM pg_class WHERE oid = to_regclass(:table)) AS there";

const VERSION: &str = "SELECT coalesce(max(version), 0)::bigint AS version FROM {migrations}";

/// Begins a migration. The isolation level lets each statement see what another process committed
/// while this one waited for the lock.
const BEGIN: &str = "
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL search_path = {schema};
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = '1s';
SELECT pg_advisory_xact_lock(hashtextextended('{lock}', 0))";

const OLDEST_VERSION: i32 = 120_000;
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(600);
/// The time in which a migration is tried. Other nodes work in the pauses.
const LOCK_PATIENCE: Duration = Duration::from_secs(15);
const LOCK_PAUSE: Duration = Duration::from_secs(2);

const MIGRATIONS: &[Migration] =
    &[migration!(1, "postgres/0001_records.sql"), migration!(2, "postgres/0002_intents.sql")];
