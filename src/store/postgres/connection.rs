//! The store's own connections.

use std::{
    future::poll_fn,
    mem,
    ops::{Deref, DerefMut},
    sync::OnceLock,
    time::Duration,
};

use sqlx::{
    AssertSqlSafe, ConnectOptions, Either, PgPool, Postgres,
    error::DatabaseError,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgConnection, PgRow},
};

use tokio::time::{error::Elapsed, timeout};

use super::ConnectionMode;
use crate::{
    error::{StoreError, StoreErrorKind},
    store::sql::{
        Reply,
        call::Call,
        errors::{self, Meaning},
    },
};

/// A pool of the store's own, made from the user's pool at the first use.
#[derive(Debug, Default)]
pub(super) struct Connections(OnceLock<PgPool>);

/// The settings of the store's connections.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) mode: ConnectionMode,
    pub(super) max_connections: Option<u32>,
    pub(super) statement_timeout: Duration,
}

impl Connections {
    pub(super) async fn lend(&self, base: &PgPool, settings: &Settings) -> Result<Lent, StoreError> {
        let pool = self.0.get_or_init(|| own_pool(base, settings));
        pool.acquire().await.map(|connection| Lent(Some(connection))).map_err(connect_error)
    }

    /// Runs one statement.
    pub(super) async fn rows(
        &self,
        base: &PgPool,
        settings: &Settings,
        operation: &str,
        call: Call<'_>,
    ) -> Result<Vec<PgRow>, StoreError> {
        let mut connection = self.lend(base, settings).await?;
        let sent = call.fetch_all(&mut connection, settings.mode);
        let reply = timeout(settings.statement_timeout, sent).await;
        self.received(connection, settings, operation, reply)
    }

    /// Runs one statement and returns the number of rows that it has changed.
    pub(super) async fn change(
        &self,
        base: &PgPool,
        settings: &Settings,
        operation: &str,
        call: Call<'_>,
    ) -> Result<u64, StoreError> {
        let mut connection = self.lend(base, settings).await?;
        let sent = call.execute(&mut connection, settings.mode);
        let reply = timeout(settings.statement_timeout, sent).await;
        self.received(connection, settings, operation, reply)
    }

    /// Runs statements in one transaction and one round trip. Each has a snapshot of its own.
    /// Returns the rows of each.
    pub(super) async fn script(
        &self,
        base: &PgPool,
        settings: &Settings,
        operation: &str,
        calls: &[Call<'_>],
    ) -> Result<Vec<Reply<PgRow>>, StoreError> {
        let isolation = match settings.mode {
            ConnectionMode::Direct => None,
            ConnectionMode::TransactionPooler => Some(ISOLATION.to_owned()),
        };
        let preludes = usize::from(isolation.is_some());
        let text = isolation.into_iter().chain(calls.iter().map(Call::text)).collect::<Vec<_>>().join(";");
        let mut connection = self.lend(base, settings).await?;
        let sent = async {
            let (mut replies, mut rows) = (Vec::new(), Vec::new());
            let mut stream = sqlx::raw_sql(AssertSqlSafe(text)).fetch_many(&mut *connection);
            while let Some(reply) = poll_fn(|cx| stream.as_mut().poll_next(cx)).await.transpose()? {
                match reply {
                    Either::Right(row) => rows.push(row),
                    Either::Left(done) => {
                        replies.push(Reply { changed: done.rows_affected(), rows: mem::take(&mut rows) });
                    }
                }
            }
            // Without the reply to the isolation level, which is none of the calls.
            Ok(replies.split_off(preludes.min(replies.len())))
        };
        let reply = timeout(settings.statement_timeout, sent).await;
        self.received(connection, settings, operation, reply)
    }

    /// Handles the reply to a statement. Closes the connection if its statement did not end in time
    /// or was not awaited.
    fn received<T>(
        &self,
        connection: Lent,
        settings: &Settings,
        operation: &str,
        reply: Result<Result<T, sqlx::Error>, Elapsed>,
    ) -> Result<T, StoreError> {
        match reply {
            Ok(Ok(rows)) => {
                connection.give_back();
                Ok(rows)
            }
            Ok(Err(source)) => {
                let read_only = is_read_only(&source);
                let error = error(operation, source);
                // A connection that is not given back is closed when it is dropped.
                if error.kind() == StoreErrorKind::Ambiguous || read_only {
                    self.forget_idle();
                } else {
                    connection.give_back();
                }
                Err(error)
            }
            Err(elapsed) => {
                self.forget_idle();
                let message = format!("{operation}: no reply within {:?}", settings.statement_timeout);
                Err(StoreError::new(StoreErrorKind::Ambiguous, message).with_source(elapsed))
            }
        }
    }

    /// Closes the idle connections: if one connection broke, they are probably broken too, and no
    /// test before their next use would notice.
    fn forget_idle(&self) {
        while let Some(connection) = self.0.get().and_then(PgPool::try_acquire) {
            drop(connection.detach());
        }
    }
}

/// Returns `true` if the server is read-only. It may have been replaced by another server, which
/// new connections find.
fn is_read_only(error: &sqlx::Error) -> bool {
    errors::code(error).as_deref() == Some(READ_ONLY)
}

/// A connection that returns to its pool only if it is known to be in order. Otherwise it is
/// closed.
#[derive(Debug)]
pub(super) struct Lent(Option<PoolConnection<Postgres>>);

impl Lent {
    pub(super) fn give_back(mut self) {
        self.0.take();
    }
}

impl Deref for Lent {
    type Target = PgConnection;

    #[expect(clippy::expect_used, reason = "the connection leaves only in `give_back` and `drop`")]
    fn deref(&self) -> &PgConnection {
        self.0.as_ref().expect("a lent connection is there until it is given back")
    }
}

impl DerefMut for Lent {
    #[expect(clippy::expect_used, reason = "the connection leaves only in `give_back` and `drop`")]
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.0.as_mut().expect("a lent connection is there until it is given back")
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(connection.detach());
        }
    }
}

fn own_pool(base: &PgPool, settings: &Settings) -> PgPool {
    let connections =
        settings.max_connections.unwrap_or(base.options().get_max_connections().min(MAX_CONNECTIONS));
    base.options()
        .clone()
        .min_connections(0)
        .max_connections(connections.max(1))
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // A test would cost every call a round trip.
        .test_before_acquire(false)
        .connect_lazy_with(connect_options(base.connect_options().as_ref().clone(), settings))
}

fn connect_options(options: PgConnectOptions, settings: &Settings) -> PgConnectOptions {
    // Statements may contain their values, which must not be logged.
    let options = options.disable_statement_logging();
    // The server's limit is shorter than ours, so that a statement that was too slow is not carried
    // out later.
    let server_timeout = settings.statement_timeout * 9 / 10;
    match settings.mode {
        ConnectionMode::Direct => options
            .options(START_UP)
            .options([("statement_timeout", format!("{}ms", server_timeout.as_millis().max(1)))]),
        ConnectionMode::TransactionPooler => options.extra_float_digits(None),
    }
}

pub(super) fn error(operation: &str, source: sqlx::Error) -> StoreError {
    errors::statement_error(operation, source, meaning)
}

fn connect_error(source: sqlx::Error) -> StoreError {
    errors::connect_error(source, |error| match &*error.code()? {
        "08P01" => Some(
            "the server refused the start-up parameters: for PgBouncer use ConnectionMode::TransactionPooler",
        ),
        "3D000" => Some("the database does not exist"),
        code if code.starts_with("28") => Some("the server refused the account"),
        "42501" => Some("the account may not connect to the database"),
        _ => None,
    })
}

fn meaning(error: &dyn DatabaseError) -> Meaning {
    use StoreErrorKind::{Ambiguous, Internal, Misconfigured, Unavailable};
    match &*error.code().unwrap_or_default() {
        "3F000" => (Misconfigured, "the schema does not exist: create it, or correct with_schema()"),
        "42P01" | "42703" => {
            (Misconfigured, "tables are missing or old: call migrate(), or run migrations/postgres/*.sql")
        }
        "42501" => (
            Misconfigured,
            "the account lacks a right: it needs USAGE on the schema, SELECT, INSERT, UPDATE, DELETE on the \
             records and SELECT on the migrations table; to create the tables it needs CREATE on the schema",
        ),
        READ_ONLY => (Misconfigured, "the server is read-only: connect to the primary"),
        "26000" | "42P05" => (
            Misconfigured,
            "prepared statements got lost between connections: \
             for PgBouncer use ConnectionMode::TransactionPooler",
        ),
        "40001" | "40P01" | "55P03" => {
            (Unavailable, "the statement collided with another one and was rolled back")
        }
        "57014" => (Unavailable, "the server cancelled the statement"),
        "57P03" => (Unavailable, "the server does not accept connections at the moment"),
        "40003" => (Ambiguous, "the server does not know whether the statement was completed"),
        code if code.starts_with("57P") || code.starts_with("08") => {
            (Ambiguous, "the server ended the connection")
        }
        code if code.starts_with("53") => (Unavailable, "the server is out of resources"),
        code if code.starts_with("28") => (Misconfigured, "the server refused the account"),
        _ => (Internal, errors::UNEXPECTED),
    }
}

/// Settings for plans that last. A statement that was prepared while the table was small must still
/// find its rows by an index when the table has grown. One that takes a batch must not read all due
/// rows first, as a bitmap scan does.
const START_UP: [(&str, &str); 5] = [
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    ("jit", "off"),
    ("default_transaction_isolation", "read committed"),
];
/// The isolation level of a script. Through a pooler, no start-up option can set it.
const ISOLATION: &str = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED";
const READ_ONLY: &str = "25006";
const MAX_CONNECTIONS: u32 = 16;
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);
