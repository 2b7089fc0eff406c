//! Tables and checks before the first statement.

use std::time::Duration;

use sqlx::{AssertSqlSafe, PgConnection, Row, postgres::PgRow};

use super::{
    PostgresStore,
    call::{Call, Value},
    connection::error,
    statements::Statements,
};
use crate::{
    StoreError, StoreErrorKind,
    store::sql::{self, Identifier, Migration, TableCreation, misconfigured},
};

/// What is known once the tables are there.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) statements: Statements,
    pub(super) warnings: Vec<String>,
}

impl PostgresStore {
    pub(super) async fn ready(&self) -> Result<&Ready, StoreError> {
        self.state.ready.get_or_try_init(|| self.set_up(self.creation)).await
    }

    pub(super) async fn set_up(&self, creation: TableCreation) -> Result<Ready, StoreError> {
        let schema = self.schema.as_ref().map(Identifier::as_str);
        let server = self.one_row(Call::new(SERVER).with(Value::OptionalText(schema))).await?;
        refuse(&server).map_err(|source| error("prepare", source))??;
        let schema = schema_of(&server)?;
        let pending = sql::pending(self.version(&schema).await?, MIGRATIONS)?;
        if !pending.is_empty() {
            if creation == TableCreation::Manual {
                return Err(sql::tables_missing(pending, Some(&schema), &self.prefix));
            }
            self.apply_migrations(&schema).await?;
        }
        let warnings = warnings(&server).map_err(|source| error("prepare", source))?;
        for warning in &warnings {
            tracing::warn!(target: "tower_idempotency", "{warning}");
        }
        Ok(Ready { statements: Statements::new(&schema, &self.prefix), warnings })
    }

    /// The version of the tables, 0 if there are none.
    async fn version(&self, schema: &str) -> Result<i64, StoreError> {
        let table = format!("{schema}.{}_migrations", self.prefix);
        let there = self.one_row(Call::new(TABLE_THERE).with(Value::Text(&table))).await?;
        if !there.try_get::<bool, _>("there").map_err(|source| error("prepare", source))? {
            return Ok(0);
        }
        let row = self.one_row(Call::new(VERSION.replace("{migrations}", &table))).await?;
        row.try_get("version").map_err(|source| error("prepare", source))
    }

    /// Applies what is missing in one transaction, one process after the other.
    async fn apply_migrations(&self, schema: &str) -> Result<(), StoreError> {
        let mut connection = self.state.connections.lend(&self.pool, &self.settings).await?;
        let work = migrate(&mut connection, schema, &self.prefix);
        match tokio::time::timeout(MIGRATION_TIMEOUT, work).await {
            Ok(done) => done?,
            Err(elapsed) => {
                let message = "prepare: the migration did not end in time";
                return Err(StoreError::new(StoreErrorKind::Ambiguous, message).with_source(elapsed));
            }
        }
        connection.give_back();
        Ok(())
    }

    async fn one_row(&self, call: Call<'_>) -> Result<PgRow, StoreError> {
        let mut rows = self.rows("prepare", call).await?;
        rows.pop().ok_or_else(|| error("prepare", sqlx::Error::RowNotFound))
    }
}

async fn migrate(connection: &mut PgConnection, schema: &str, prefix: &Identifier) -> Result<(), StoreError> {
    // The simple protocol throughout: nothing is prepared, so a transaction pooler may stand between.
    let lock = format!("tower-idempotency {schema}.{prefix}").replace('\'', "''");
    execute(connection, BEGIN.replace("{lock}", &lock).replace("{schema}", schema)).await?;
    execute(connection, BOOKKEEPING.replace("{prefix}", prefix.as_str())).await?;
    let version =
        sqlx::raw_sql(AssertSqlSafe(VERSION.replace("{migrations}", &format!("{prefix}_migrations"))));
    let row = version.fetch_one(&mut *connection).await;
    let found: i64 = row.and_then(|row| row.try_get("version")).map_err(|source| error("prepare", source))?;
    for migration in sql::pending(found, MIGRATIONS)? {
        execute(connection, migration.sql(prefix)).await?;
        tracing::info!(target: "tower_idempotency", file = migration.file, schema, "migrated the tables");
    }
    execute(connection, "COMMIT".to_owned()).await
}

async fn execute(connection: &mut PgConnection, sql: String) -> Result<(), StoreError> {
    let done = sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await;
    done.map(drop).map_err(|source| error("prepare", source))
}

/// Refuses a server that cannot keep the contract.
fn refuse(server: &PgRow) -> Result<Result<(), StoreError>, sqlx::Error> {
    let version: i32 = server.try_get("version")?;
    if version < OLDEST_VERSION {
        return Ok(Err(misconfigured(format!(
            "server version {version} is too old: PostgreSQL 12 or newer is needed"
        ))));
    }
    if server.try_get("standby")? {
        return Ok(Err(misconfigured(
            "the server is a standby and cannot be written to: connect to the primary",
        )));
    }
    if server.try_get("read_only")? {
        let message = "transactions are read-only by default (default_transaction_read_only): connect to the primary, \
                       or change the setting for this account";
        return Ok(Err(misconfigured(message)));
    }
    Ok(Ok(()))
}

fn schema_of(server: &PgRow) -> Result<String, StoreError> {
    let schema: Option<String> = server.try_get("schema").map_err(|source| error("prepare", source))?;
    schema.ok_or_else(|| {
        misconfigured("the search path of the account names no existing schema: set it, or use with_schema()")
    })
}

fn warnings(server: &PgRow) -> Result<Vec<String>, sqlx::Error> {
    let mut warnings = Vec::new();
    for (column, warning) in WARNINGS {
        if server.try_get(column)? {
            warnings.push(warning.to_owned());
        }
    }
    Ok(warnings)
}

const SERVER: &str = "
SELECT quote_ident(coalesce($1::text, current_schema()::text)) AS schema,
    current_setting('server_version_num')::int AS version,
    pg_is_in_recovery() AS standby,
    current_setting('default_transaction_read_only')::bool AS read_only,
    current_setting('synchronous_commit') = 'off' AS commit_not_flushed,
    NOT current_setting('fsync')::bool AS fsync_off,
    NOT current_setting('full_page_writes')::bool AS pages_torn,
    current_setting('default_transaction_isolation') NOT IN ('read committed', 'read uncommitted') AS isolated";

const WARNINGS: [(&str, &str); 4] = [
    (
        "commit_not_flushed",
        "synchronous_commit is off: a crash of the server forgets records that were acknowledged",
    ),
    ("fsync_off", "fsync is off: a crash of the machine can forget or destroy records"),
    ("pages_torn", "full_page_writes is off: a crash of the machine can destroy records"),
    (
        "isolated",
        "default_transaction_isolation is stricter than read committed: claims of one key at once fail more often",
    ),
];

const TABLE_THERE: &str = "SELECT to_regclass($1) IS NOT NULL AS there";

const VERSION: &str = "SELECT coalesce(max(version), 0)::bigint AS version FROM {migrations}";

/// The isolation level lets each statement see what another process committed while this one waited for the lock.
const BEGIN: &str = "
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL search_path = {schema};
SELECT pg_advisory_xact_lock(hashtextextended('{lock}', 0))";

const BOOKKEEPING: &str = "
CREATE TABLE IF NOT EXISTS {prefix}_migrations (
    version integer NOT NULL PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now())";

const OLDEST_VERSION: i32 = 120_000;
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(600);

const MIGRATIONS: &[Migration] = &[Migration::new(
    1,
    "migrations/postgres/0001_records.sql",
    include_str!("../../../migrations/postgres/0001_records.sql"),
)];
