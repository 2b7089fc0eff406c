//! The store's own connections.

use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sqlx::{
    AssertSqlSafe, Connection, Either, Executor, SqlSafeStr, SqlitePool, Transaction,
    error::DatabaseError,
    pool::{PoolConnection, PoolOptions},
    sqlite::{
        Sqlite, SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteLockingMode, SqliteRow,
    },
};
use tokio::{
    runtime::Handle,
    sync::{Mutex, OwnedMutexGuard},
    time::{Instant, sleep, timeout},
};

use super::Prepared;
use crate::{
    error::{StoreError, StoreErrorKind},
    store::sql::{
        Rank, Reply,
        errors::{self, Meaning},
        pool::{OwnPool, Recipe},
    },
};

/// One connection that writes, for which writers queue fairly, and a few that read.
#[derive(Debug)]
pub(super) struct Connections {
    readers: OwnPool<Sqlite>,
    /// The last to close, because it removes the write-ahead log. Of two connections that close
    /// simultaneously, neither does.
    writer: OwnPool<Sqlite>,
    /// The queue of newcomers. An attempt that owns its record does not wait in it: renewals and
    /// ends of attempts wait for the connection only, so they go before the writes in the queue.
    queue: Arc<Mutex<()>>,
    /// Set while a handler may change the settings of the connection that writes.
    with_handler: Arc<AtomicBool>,
}

impl Default for Connections {
    fn default() -> Self {
        let readers = OwnPool::default();
        let writer = OwnPool::closing_after(&readers);
        Self { readers, writer, queue: Arc::default(), with_handler: Arc::default() }
    }
}

impl Drop for Connections {
    /// Closes the connections one after the other. Without a runtime they close simultaneously.
    fn drop(&mut self) {
        if let Ok(runtime) = Handle::try_current() {
            let writer = self.writer.clone();
            runtime.spawn(async move { writer.close().await });
        }
    }
}

impl Connections {
    pub(super) async fn read(
        &self,
        base: &SqlitePool,
        operation: &str,
        query: Prepared<'_>,
    ) -> Result<Vec<SqliteRow>, StoreError> {
        let mut connection = self.lend(&self.readers, base, MAX_READERS).await.map_err(connect_error)?;
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
        self.lend(&self.writer, base, 1).await.map_err(connect_error)
    }

    /// Begins a transaction on the connection that writes.
    pub(super) async fn begin(
        &self,
        base: &SqlitePool,
        statements: String,
    ) -> Result<Transaction<'static, Sqlite>, StoreError> {
        let statements = AssertSqlSafe(statements).into_sql_str();
        let begun = patiently(|| async {
            let connection = self.lend(&self.writer, base, 1).await?;
            Transaction::begin(connection, Some(statements.clone())).await
        });
        begun.await.map_err(|source| error("begin", source))
    }

    /// The same, for a handler. The settings of the connection are restored afterwards.
    pub(super) async fn begin_for_handler(
        &self,
        base: &SqlitePool,
        statements: String,
    ) -> Result<Transaction<'static, Sqlite>, StoreError> {
        let transaction = self.begin(base, statements).await?;
        self.with_handler.store(true, Ordering::Relaxed);
        Ok(transaction)
    }

    pub(super) async fn close(&self) {
        self.writer.close().await;
    }

    async fn lend(
        &self,
        own: &OwnPool<Sqlite>,
        base: &SqlitePool,
        connections: u32,
    ) -> Result<PoolConnection<Sqlite>, sqlx::Error> {
        let recipe = Recipe {
            base,
            max_connections: connections.min(base.options().get_max_connections()),
            pool_options: |options: PoolOptions<Sqlite>| {
                let with_handler = Arc::clone(&self.with_handler);
                options.acquire_timeout(ACQUIRE_TIMEOUT).after_release(move |connection, _| {
                    Box::pin(is_in_order(connection, with_handler.swap(false, Ordering::Relaxed)))
                })
            },
            connect_options,
        };
        patiently(|| async {
            let (mut connection, fresh) = own.acquire(&recipe).await?;
            if fresh && let Err(error) = arm(&mut connection).await {
                connection.close_on_drop();
                return Err(error);
            }
            Ok(connection)
        })
        .await
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

pub(super) fn is_busy(error: &sqlx::Error) -> bool {
    errors::code(error).is_some_and(|code| primary(&code) == BUSY)
}

fn connect_options(options: SqliteConnectOptions) -> SqliteConnectOptions {
    options
        .shared_cache(false)
        .locking_mode(SqliteLockingMode::Normal)
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(BUSY_TIMEOUT)
}

/// Sets what the store relies on, after the hooks of the given pool or a handler.
async fn arm(connection: &mut SqliteConnection) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(ARM).execute(connection).await.map(drop)
}

/// Returns `false` if the connection is still in a transaction. A handler may have ended its
/// transaction with its own statement. On the connection that it leaves, sqlx still counts one and
/// never begins another.
///
/// After a handler, returns `false` also for temporary tables, which hide others of their name.
async fn is_in_order(connection: &mut SqliteConnection, after_handler: bool) -> Result<bool, sqlx::Error> {
    if connection.is_in_transaction() {
        // The rollback of a dropped transaction may still be on its way.
        connection.ping().await?;
    }
    if connection.is_in_transaction() || !after_handler {
        return Ok(!connection.is_in_transaction());
    }
    arm(connection).await?;
    let temporary = sqlx::query("SELECT 1 FROM sqlite_temp_schema LIMIT 1").fetch_optional(connection);
    Ok(temporary.await?.is_none())
}

pub(super) fn error(operation: &str, source: sqlx::Error) -> StoreError {
    errors::statement_error(operation, source, meaning)
}

fn connect_error(source: sqlx::Error) -> StoreError {
    errors::connect_error(source, |error| {
        let (kind, hint) = meaning(error);
        matches!(kind, StoreErrorKind::Misconfigured | StoreErrorKind::Unavailable).then_some((kind, hint))
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
        14 => (
            Unavailable,
            "the database file cannot be opened: the process must be able to write to the file and to its \
             folder",
        ),
        7 | 13 => (Unavailable, "memory or disk are full"),
        10 => (Ambiguous, "the disk failed"),
        26 => (Misconfigured, "the file is not a SQLite database"),
        _ => (Internal, errors::UNEXPECTED),
    }
}

const ARM: &str = "PRAGMA query_only = OFF; PRAGMA locking_mode = NORMAL; PRAGMA journal_mode = WAL; \
                   PRAGMA synchronous = FULL; PRAGMA busy_timeout = 5000";
const BUSY: u32 = 5;
const BUSY_PAUSE: Duration = Duration::from_millis(10);
const MAX_READERS: u32 = 4;
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than one busy writer that comes first may take.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(6);
