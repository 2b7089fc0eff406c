//! The store's own connections.

use std::{
    future::poll_fn,
    sync::{Arc, OnceLock},
    time::Duration,
};

use sqlx::{
    AssertSqlSafe, Connection, Either, Executor, SqlitePool, Transaction,
    error::DatabaseError,
    pool::PoolConnection,
    sqlite::{Sqlite, SqliteConnection, SqliteJournalMode, SqliteRow, SqliteSynchronous},
};
use tokio::{
    sync::{Mutex, OwnedMutexGuard},
    time::{Instant, sleep, timeout},
};

use super::Prepared;
use crate::{
    error::{StoreError, StoreErrorKind},
    store::sql::{
        Rank, Reply,
        errors::{self, Meaning},
    },
};

/// One connection that writes, for which writers queue fairly, and a few that read.
#[derive(Debug, Default)]
pub(super) struct Connections {
    writer: OnceLock<SqlitePool>,
    /// The queue of newcomers. An attempt that owns its record does not wait in it: renewals and
    /// ends of attempts wait for the connection only, so they go before the writes in the queue.
    queue: Arc<Mutex<()>>,
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
        let mut connection = patiently(|| readers.acquire()).await.map_err(connect_error)?;
        query.fetch_all(&mut *connection).await.map_err(|source| error(operation, source))
    }

    /// Runs one statement to its end, and returns all its rows.
    pub(super) async fn write(
        &self,
        base: &SqlitePool,
        rank: Rank,
        operation: &str,
        query: Prepared<'_>,
    ) -> Result<Reply<SqliteRow>, StoreError> {
        let _turn = if rank == Rank::Newcomer { Some(self.turn().await?) } else { None };
        let mut connection = self.writer(base).await?;
        reply(query, &mut connection).await.map_err(|source| error(operation, source))
    }

    /// Waits for the head of the queue. The caller has it until the guard is dropped.
    pub(super) async fn turn(&self) -> Result<OwnedMutexGuard<()>, StoreError> {
        timeout(BUSY_TIMEOUT, Arc::clone(&self.queue).lock_owned()).await.map_err(|elapsed| {
            let message = "the database is busy: another transaction is open";
            StoreError::new(StoreErrorKind::Unavailable, message).with_source(elapsed)
        })
    }

    pub(super) async fn writer(&self, base: &SqlitePool) -> Result<PoolConnection<Sqlite>, StoreError> {
        let pool = self.writer_pool(base);
        patiently(|| pool.acquire()).await.map_err(connect_error)
    }

    fn writer_pool(&self, base: &SqlitePool) -> &SqlitePool {
        self.writer.get_or_init(|| own_pool(base, 1))
    }

    /// Begins a transaction on the connection that writes.
    pub(super) async fn begin(
        &self,
        base: &SqlitePool,
        statements: String,
    ) -> Result<Transaction<'static, Sqlite>, StoreError> {
        let pool = self.writer_pool(base);
        let begun = patiently(|| pool.begin_with(AssertSqlSafe(statements.clone()))).await;
        begun.map_err(|source| error("begin", source))
    }
}

/// Runs a statement to its end.
pub(super) async fn reply(
    query: Prepared<'_>,
    connection: &mut SqliteConnection,
) -> Result<Reply<SqliteRow>, sqlx::Error> {
    let mut reply = Reply { changed: 0, rows: Vec::new() };
    let mut stream = connection.fetch_many(query);
    while let Some(part) = poll_fn(|cx| stream.as_mut().poll_next(cx)).await.transpose()? {
        match part {
            Either::Right(row) => reply.rows.push(row),
            Either::Left(done) => reply.changed += done.rows_affected(),
        }
    }
    Ok(reply)
}

/// Opens a connection, and tries again while the database is busy. Opening sets the journal mode,
/// which does not wait for a lock that another connection holds.
async fn patiently<T, F>(open: impl Fn() -> F) -> Result<T, sqlx::Error>
where
    F: Future<Output = Result<T, sqlx::Error>>,
{
    let deadline = Instant::now() + BUSY_TIMEOUT;
    loop {
        match open().await {
            Err(error) if is_busy(&error) && Instant::now() < deadline => sleep(BUSY_PAUSE).await,
            opened => return opened,
        }
    }
}

fn is_busy(error: &sqlx::Error) -> bool {
    errors::code(error).is_some_and(|code| primary(&code) == BUSY)
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
        .after_release(|connection, _| Box::pin(is_in_order(connection)))
        .connect_lazy_with(options)
}

/// Returns `false` if the connection is still in a transaction. A handler may have ended its
/// transaction with its own statement. On the connection that it leaves, sqlx still counts one and
/// never begins another.
async fn is_in_order(connection: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
    if connection.is_in_transaction() {
        // The rollback of a dropped transaction may still be on its way.
        connection.ping().await?;
    }
    Ok(!connection.is_in_transaction())
}

pub(super) fn error(operation: &str, source: sqlx::Error) -> StoreError {
    errors::statement_error(operation, source, meaning)
}

fn connect_error(source: sqlx::Error) -> StoreError {
    errors::connect_error(source, |error| {
        let (kind, hint) = meaning(error);
        (kind == StoreErrorKind::Misconfigured).then_some(hint)
    })
}

/// Returns the primary result code, which is the lowest byte of an extended one.
pub(super) fn primary(code: &str) -> u32 {
    code.parse::<u32>().map_or(0, |code| code & 0xff)
}

fn meaning(error: &dyn DatabaseError) -> Meaning {
    use StoreErrorKind::{Ambiguous, Internal, Misconfigured, Unavailable};
    match primary(&error.code().unwrap_or_default()) {
        1 | 17 => (
            Misconfigured,
            "the tables are missing or not what they should be: \
             call migrate(), or run migrations/sqlite/*.sql",
        ),
        3 | 8 | 23 => (
            Misconfigured,
            "the database is read-only: the process must own the file and may not open it read-only",
        ),
        BUSY | 6 => (Unavailable, "the database is locked by another writer"),
        7 | 13 | 14 => (Unavailable, "the database file cannot be opened, or memory or disk are full"),
        10 => (Ambiguous, "the disk failed"),
        26 => (Misconfigured, "the file is not a SQLite database"),
        _ => (Internal, errors::UNEXPECTED),
    }
}

const BUSY: u32 = 5;
const BUSY_PAUSE: Duration = Duration::from_millis(10);
const MAX_READERS: u32 = 4;
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than one busy writer that comes first may take.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(6);
