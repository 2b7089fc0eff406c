//! Tables and checks before the first statement.

use sqlx::{AssertSqlSafe, Connection, Row, SqliteConnection};

use super::{
    SqliteStore,
    connection::error,
    dialect::{self, Own},
    requirements,
};
use crate::{
    error::StoreError,
    redact::TRACING_TARGET,
    store::sql::{
        TableCreation,
        setup::{self, Identifier, Migration, Ready, migration},
    },
};

impl SqliteStore {
    pub(super) async fn set_up(&self, creation: TableCreation) -> Result<Ready<Own>, StoreError> {
        // Detached, so that a call that is dropped half-way closes the connection and leaves no
        // transaction open.
        let mut connection = match self.state.connections.writer(&self.pool).await {
            Ok(connection) => connection.detach(),
            Err(failed) => return Err(requirements::explain(&self.pool, failed).await),
        };
        requirements::refuse_memory(&mut connection).await?;
        requirements::refuse_unfitting_pool(&self.pool).await?;
        execute(&mut connection, "BEGIN IMMEDIATE").await?;
        migrate(&mut connection, &self.prefix, creation).await?;
        execute(&mut connection, "COMMIT").await?;
        let warnings = warnings(&mut connection).await?;
        connection.close().await.map_err(|source| error("prepare", source))?;
        Ok(Ready::new(dialect::statements(&self.prefix), warnings))
    }
}

async fn migrate(
    connection: &mut SqliteConnection,
    prefix: &Identifier,
    creation: TableCreation,
) -> Result<(), StoreError> {
    let pending = setup::pending(version(connection, prefix).await?, MIGRATIONS)?;
    if creation == TableCreation::Manual && !pending.is_empty() {
        return Err(setup::tables_missing(pending, None, prefix));
    }
    for migration in pending {
        execute(connection, migration.sql(prefix)).await?;
        tracing::info!(target: TRACING_TARGET, file = migration.file, "migrated the tables");
    }
    // A write that changes nothing: on a read-only database, every transaction begins, and only its
    // first write is refused.
    execute(connection, format!("DELETE FROM \"{prefix}_migrations\" WHERE version < 0")).await
}

/// Returns the version of the tables, 0 if there are none.
async fn version(connection: &mut SqliteConnection, prefix: &Identifier) -> Result<i64, StoreError> {
    let table = sqlx::query("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?")
        .bind(format!("{prefix}_migrations"))
        .fetch_optional(&mut *connection);
    if table.await.map_err(|source| error("prepare", source))?.is_none() {
        return Ok(0);
    }
    let version =
        AssertSqlSafe(format!("SELECT COALESCE(MAX(version), 0) AS version FROM \"{prefix}_migrations\""));
    let row = sqlx::query(version).fetch_one(connection).await;
    row.and_then(|row| row.try_get("version")).map_err(|source| error("prepare", source))
}

async fn warnings(connection: &mut SqliteConnection) -> Result<Vec<String>, StoreError> {
    let row = sqlx::query("PRAGMA journal_mode").fetch_one(connection).await;
    let mode: String = row.and_then(|row| row.try_get(0)).map_err(|source| error("prepare", source))?;
    if mode == "wal" {
        return Ok(Vec::new());
    }
    Ok(vec![format!(
        "the database cannot use write-ahead logging (journal_mode is {mode}): \
         readers and writers block each other"
    )])
}

async fn execute(connection: &mut SqliteConnection, sql: impl Into<String>) -> Result<(), StoreError> {
    let done = sqlx::raw_sql(AssertSqlSafe(sql.into())).execute(connection).await;
    done.map(drop).map_err(|source| error("prepare", source))
}

const MIGRATIONS: &[Migration] =
    &[migration!(1, "sqlite/0001_records.sql"), migration!(2, "sqlite/0002_intents.sql")];
