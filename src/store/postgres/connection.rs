//! The store's own connections.

use std::{
    future::poll_fn,
    mem,
    ops::{Deref, DerefMut},
    time::Duration,
};

use sqlx::{
    AssertSqlSafe, ConnectOptions, Either, PgPool, Postgres,
    error::DatabaseError,
    pool::{PoolConnection, PoolOptions},
    postgres::{PgConnectOptions, PgConnection, PgRow},
};

use tokio::time::{error::Elapsed, timeout};

use super::ConnectionMode;
use crate::{
    error::{StoreError, StoreErrorKind},
    store::sql::{
        Reply,
        call::Call,
        errors::{self, Meaning, misconfigured},
        pool::{OwnPool, Recipe},
    },
};

/// The store's own connections.
#[derive(Debug, Default)]
pub(super) struct Connections(OwnPool<Postgres>);

/// The settings of the store's connections.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) mode: ConnectionMode,
    pub(super) max_connections: Option<u32>,
    pub(super) statement_timeout: Duration,
}

impl Connections {
    pub(super) async fn lend(&self, base: &PgPool, settings: &Settings) -> Result<Lent, StoreError> {
        let (mut connection, fresh) = self.acquire(base, settings).await?;
        if fresh {
            connection.arm(settings).await?;
        }
        Ok(connection)
    }

    /// Takes a connection, and returns `true` with one that is not [armed](Lent::arm) yet.
    pub(super) async fn acquire(
        &self,
        base: &PgPool,
        settings: &Settings,
    ) -> Result<(Lent, bool), StoreError> {
        let connections = settings.max_connections;
        let recipe = Recipe {
            base,
            max_connections: connections.unwrap_or(base.options().get_max_connections().min(MAX_CONNECTIONS)),
            pool_options: |options: PoolOptions<Postgres>| options.acquire_timeout(ACQUIRE_TIMEOUT),
            connect_options: |options| connect_options(options, settings),
        };
        match self.0.acquire(&recipe).await {
            Ok((connection, fresh)) => Ok((Lent(Some(connection)), fresh)),
            Err(sqlx::Error::PoolTimedOut) if self.0.has_room() => {
                Err(connect_error(reason(base, settings).await, settings.mode))
            }
            Err(source) => Err(connect_error(source, settings.mode)),
        }
    }

    pub(super) async fn close(&self) {
        self.0.close().await;
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
        let prelude = settings.mode.prelude();
        let text = prelude.iter().map(ToString::to_string).chain(calls.iter().map(Call::text));
        let text = text.collect::<Vec<_>>().join(";");
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
            // Without the replies to the prelude, which is none of the calls.
            Ok(replies.split_off(prelude.len().min(replies.len())))
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
                let spoilt = is_read_only(&source) || is_out_of_order(&source);
                let error = error(operation, source);
                // A connection that is not given back is closed when it is dropped.
                if error.kind() == StoreErrorKind::Ambiguous || spoilt {
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
        while let Some(connection) = self.0.try_acquire() {
            drop(connection.detach());
        }
    }
}

/// Returns `true` if the server is read-only. It may have been replaced by another server, which
/// new connections find.
fn is_read_only(error: &sqlx::Error) -> bool {
    errors::code(error).as_deref() == Some(READ_ONLY)
}

/// Returns `true` if the connection and the server do not agree about prepared statements, or about
/// the protocol.
pub(super) fn is_out_of_order(error: &sqlx::Error) -> bool {
    match errors::code(error) {
        Some(code) => OUT_OF_ORDER.contains(&&*code),
        None => matches!(error, sqlx::Error::Protocol(_) | sqlx::Error::Io(_)),
    }
}

/// A connection that returns to its pool only if it is known to be in order. Otherwise it is
/// closed.
#[derive(Debug)]
pub(super) struct Lent(Option<PoolConnection<Postgres>>);

impl Lent {
    pub(super) fn give_back(mut self) {
        self.0.take();
    }

    /// Sets what the store relies on, after the hooks of the given pool. Changes nothing on a
    /// connection that a pooler may share with others.
    pub(super) async fn arm(&mut self, settings: &Settings) -> Result<(), StoreError> {
        if settings.mode == ConnectionMode::TransactionPooler {
            return Ok(());
        }
        let statement_timeout = format!("{}ms", settings.server_timeout().as_millis().max(1));
        let settings_of_session = SESSION
            .into_iter()
            .chain([("statement_timeout", &*statement_timeout)])
            .map(|(name, value)| format!("set_config('{name}', '{value}', false)"));
        let sets = settings_of_session.collect::<Vec<_>>().join(", ");
        let text = format!("SELECT {sets} WHERE current_setting('{DIRECT}', true) = 'on'");
        let armed = sqlx::raw_sql(AssertSqlSafe(text)).fetch_optional(&mut **self);
        match timeout(settings.statement_timeout, armed).await {
            Ok(Ok(Some(_))) => Ok(()),
            Ok(Ok(None)) => Err(misconfigured(
                "the start-up options of the connection did not reach the server, which a pooler between \
                 them ignores: use ConnectionMode::TransactionPooler, or connect to the server itself",
            )),
            Ok(Err(source)) => Err(error("connect", source)),
            Err(elapsed) => {
                let message = "connect: no reply from the database";
                Err(StoreError::new(StoreErrorKind::Unavailable, message).with_source(elapsed))
            }
        }
    }
}

impl Settings {
    /// Returns the server's limit for a statement. It is shorter than ours, so that a statement
    /// that was too slow is not carried out later.
    fn server_timeout(&self) -> Duration {
        self.statement_timeout / 10 * 9
    }
}

impl ConnectionMode {
    /// Returns the statements that come first in each message. Through a pooler, nothing can be set
    /// for longer.
    pub(super) fn prelude(self) -> &'static [&'static str] {
        match self {
            Self::Direct => &[],
            Self::TransactionPooler => &PRELUDE,
        }
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

fn connect_options(options: PgConnectOptions, settings: &Settings) -> PgConnectOptions {
    // Statements may contain their values, which must not be logged.
    let options = options.disable_statement_logging();
    match settings.mode {
        ConnectionMode::Direct => options.options([(DIRECT, "on")]),
        ConnectionMode::TransactionPooler => options.extra_float_digits(None),
    }
}

/// Asks the server why no connection could be opened. A pool does not tell: it tries again until
/// its time is over.
async fn reason(base: &PgPool, settings: &Settings) -> sqlx::Error {
    let options = connect_options(base.connect_options().as_ref().clone(), settings);
    match timeout(REASON_TIMEOUT, options.connect()).await {
        Ok(Err(reason)) => reason,
        Ok(Ok(_)) | Err(_) => sqlx::Error::PoolTimedOut,
    }
}

pub(super) fn error(operation: &str, source: sqlx::Error) -> StoreError {
    errors::statement_error(operation, source, meaning)
}

fn connect_error(source: sqlx::Error, mode: ConnectionMode) -> StoreError {
    use StoreErrorKind::{Misconfigured, Unavailable};
    errors::connect_error(source, |error| match &*error.code()? {
        "08P01" if mode == ConnectionMode::TransactionPooler => Some((
            Unavailable,
            "the pooler refused the connection: has it reached its limit of clients (max_client_conn), \
             and does it know the database and the account?",
        )),
        "08P01" => Some((
            Misconfigured,
            "the server refused the start-up parameters: for PgBouncer use ConnectionMode::TransactionPooler",
        )),
        "3D000" => Some((Misconfigured, "the database does not exist")),
        "53300" => Some((Unavailable, NO_SLOT)),
        code if code.starts_with("28") => Some((
            Misconfigured,
            "the server refused the account: after a change of its password, give the pool the new one by \
             Pool::set_connect_options",
        )),
        "42501" => Some((Misconfigured, "the account may not connect to the database")),
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
             tables and SELECT on the migrations table; to create the tables it needs CREATE on the schema",
        ),
        READ_ONLY => (Misconfigured, "the server is read-only: connect to the primary"),
        "26000" | "42P05" => (
            Misconfigured,
            "prepared statements got lost between connections: \
             for PgBouncer use ConnectionMode::TransactionPooler",
        ),
        "22P05" | "22021" => (
            Misconfigured,
            "the encoding of the database lacks a character of a value, for example of the consumer; nothing \
             was stored: use a database with ENCODING 'UTF8'",
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
        "53300" => (Unavailable, NO_SLOT),
        code if code.starts_with("53") => (Unavailable, "the server is out of resources"),
        code if code.starts_with("28") => (Misconfigured, "the server refused the account"),
        _ => (Internal, errors::UNEXPECTED),
    }
}

/// Settings of the store's own connections.
///
/// Most are for plans that last. A statement that was prepared while the table was small must still
/// find its rows by an index when the table has grown. One that takes a batch must not read all due
/// rows first, as a bitmap scan does. The rest keeps the meaning of texts and rows.
const SESSION: [(&str, &str); 10] = [
    ("plan_cache_mode", "force_generic_plan"),
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    ("enable_indexscan", "on"),
    ("jit", "off"),
    ("default_transaction_isolation", "read committed"),
    ("bytea_output", "hex"),
    ("client_encoding", "UTF8"),
    ("standard_conforming_strings", "on"),
    ("row_security", "on"),
];
/// A start-up option of which the server knows only the name. If it arrives, the session belongs to
/// this connection.
const DIRECT: &str = "tower_idempotency.direct";
/// The settings of one message, in which a pooler does not change the session.
const PRELUDE: [&str; 3] = [
    "SET TRANSACTION ISOLATION LEVEL READ COMMITTED",
    "SET LOCAL bytea_output = 'hex'",
    "SET LOCAL client_encoding = 'UTF8'",
];
const NO_SLOT: &str = "the server has no connection left: its max_connections, or the limit of the account \
                       or of the database, is reached. Raise the limit, or lower the maximum of the pools \
                       (PostgresStore::with_max_connections for the store's own)";
/// A prepared statement is missing, or is there already; the protocol was violated.
const OUT_OF_ORDER: [&str; 3] = ["26000", "42P05", "08P01"];
const READ_ONLY: &str = "25006";
const MAX_CONNECTIONS: u32 = 16;
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);
const REASON_TIMEOUT: Duration = Duration::from_millis(500);
