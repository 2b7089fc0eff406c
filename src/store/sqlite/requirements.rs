//! Requirements of the given pool and the file, without which calls would fail later.

use std::time::Duration;

use sqlx::{
    Row, SqliteConnection, SqlitePool,
    pool::PoolOptions,
    sqlite::{Sqlite, SqliteConnectOptions},
};
use tokio::time::timeout;

use super::connection::{error, is_busy};
use crate::{
    error::StoreError,
    store::sql::{
        errors::misconfigured,
        pool::{OwnPool, Recipe},
    },
};

/// Refuses a database in memory.
pub(super) async fn refuse_memory(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    let file =
        sqlx::query("SELECT file FROM pragma_database_list WHERE name = 'main'").fetch_one(connection).await;
    let file: Option<String> =
        file.and_then(|row| row.try_get("file")).map_err(|source| error("prepare", source))?;
    if file.is_none_or(|file| file.is_empty()) {
        return Err(misconfigured(
            "an in-memory SQLite database cannot be shared by connections: \
             use MemoryStore, or a database file",
        ));
    }
    Ok(())
}

/// Opens a connection as the application does, while the store has the file open in its journal
/// mode. Refuses the pool if that fails, or if the connection keeps the file for itself.
pub(super) async fn refuse_unfitting_pool(base: &SqlitePool) -> Result<(), StoreError> {
    let recipe = Recipe {
        base,
        max_connections: 1,
        pool_options: |options: PoolOptions<Sqlite>| options.acquire_timeout(PATIENCE),
        connect_options: |options: SqliteConnectOptions| options.busy_timeout(PATIENCE / 4),
    };
    let pool = OwnPool::default();
    let opened = match pool.acquire(&recipe).await {
        Ok((mut connection, _)) => {
            let exclusive = is_exclusive(&mut connection).await;
            // Closed before the others, as if it had not been there.
            let _ = connection.close().await;
            exclusive
        }
        Err(source) => Err(source),
    };
    match opened {
        Ok(false) => Ok(()),
        Ok(true) => Err(misconfigured(EXCLUSIVE)),
        Err(source) if is_busy(&source) || matches!(source, sqlx::Error::PoolTimedOut) => Err(misconfigured(
            "the connections of the given pool cannot be opened beside those of the store, which use \
                 journal_mode = WAL: do not set another journal_mode in the pool's options, a PRAGMA or \
                 after_connect, or set SqliteJournalMode::Wal",
        )
        .with_source(source)),
        Err(source) => Err(error("prepare", source)),
    }
}

/// Explains why the store could not open its connection, if the given pool has prevented it.
pub(super) async fn explain(base: &SqlitePool, failed: StoreError) -> StoreError {
    let given = timeout(PATIENCE, async { is_exclusive(&mut *base.acquire().await?).await });
    match given.await {
        Ok(Ok(true)) => misconfigured(EXCLUSIVE).with_source(failed),
        Ok(Ok(false) | Err(_)) | Err(_) => failed,
    }
}

async fn is_exclusive(connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
    let mode: String = sqlx::query("PRAGMA locking_mode").fetch_one(connection).await?.try_get(0)?;
    Ok(mode == "exclusive")
}

const EXCLUSIVE: &str = "a connection of the given pool keeps the file for itself \
                         (PRAGMA locking_mode = EXCLUSIVE), so that the store cannot use it: remove that \
                         setting from the pool's options or its after_connect";
const PATIENCE: Duration = Duration::from_secs(2);
