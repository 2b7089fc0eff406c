//! The store's own connections.

use std::{sync::OnceLock, time::Duration};

use sqlx::{
    SqlitePool,
    pool::PoolConnection,
    sqlite::{Sqlite, SqliteJournalMode, SqliteRow, SqliteSynchronous},
};

use super::Prepared;
use crate::{
    StoreError, StoreErrorKind,
    store::sql::{self, Meaning},
};

/// One connection that writes, behind whose pool writers queue fairly, and a few that read.
#[derive(Debug, Default)]
pub(super) struct Connections {
    writer: OnceLock<SqlitePool>,
    readers: OnceLock<SqlitePool>,
}

impl Connections {
    pub(super) async fn read(
        &self,
        base: &SqlitePool,
        operation: &str,
        query: Prepared<'_>,
    ) -> Result<Vec<SqliteRow>, StoreError> {
        let readers = self.readers.get_or_init(|| own_pool(base, MAX_READERS));
        let mut connection = readers.acquire().await.map_err(connect_error)?;
        query.fetch_all(&mut *connection).await.map_err(|source| error(operation, source))
    }

    /// Reads every row that the statement returns, so that it runs to its end.
    pub(super) async fn write(
        &self,
        base: &SqlitePool,
        operation: &str,
        query: Prepared<'_>,
    ) -> Result<Vec<SqliteRow>, StoreError> {
        let mut connection = self.writer(base).await?;
        query.fetch_all(&mut *connection).await.map_err(|source| error(operation, source))
    }

    pub(super) async fn writer(&self, base: &SqlitePool) -> Result<PoolConnection<Sqlite>, StoreError> {
        self.writer.get_or_init(|| own_pool(base, 1)).acquire().await.map_err(connect_error)
    }
}

fn own_pool(base: &SqlitePool, connections: u32) -> SqlitePool {
    let options = base.connect_options().as_ref().clone();
    let options = options
        .shared_cache(false)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(BUSY_TIMEOUT);
    base.options()
        .clone()
        .min_connections(0)
        .max_connections(connections.min(base.options().get_max_connections()).max(1))
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .test_before_acquire(false)
        .connect_lazy_with(options)
}

pub(super) fn error(operation: &str, source: sqlx::Error) -> StoreError {
    sql::statement_error(operation, source, meaning)
}

fn connect_error(source: sqlx::Error) -> StoreError {
    sql::connect_error(source, |code| {
        let (kind, hint) = meaning(code);
        (kind == StoreErrorKind::Misconfigured).then_some(hint)
    })
}

/// Extended result codes keep the primary one in their lowest byte.
fn meaning(code: &str) -> Meaning {
    use StoreErrorKind::{Ambiguous, Internal, Misconfigured, Unavailable};
    match code.parse::<u32>().map_or(0, |code| code & 0xff) {
        1 | 17 => (
            Misconfigured,
            "the tables are missing or not what they should be: call migrate(), or run migrations/sqlite/*.sql",
        ),
        3 | 8 | 23 => (
            Misconfigured,
            "the database is read-only: the process must own the file and may not open it read-only",
        ),
        5 | 6 => (Unavailable, "the database is locked by another writer"),
        7 | 13 | 14 => (Unavailable, "the database file cannot be opened, or memory or disk are full"),
        10 => (Ambiguous, "the disk failed"),
        26 => (Misconfigured, "the file is not a SQLite database"),
        _ => (Internal, sql::UNEXPECTED),
    }
}

const MAX_READERS: u32 = 4;
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than one busy writer before us may take.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(6);
