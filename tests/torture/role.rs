//! The server: charges whose handler writes through the transaction of its attempt.

use std::{net::Ipv4Addr, thread, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::{FromRequestParts, Request, State},
    http::{HeaderMap, StatusCode, request::Parts},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use rustix::process::{Signal, getppid};
use sqlx::{
    Database, PgConnection, Postgres, Sqlite, SqliteConnection, postgres::PgPoolOptions,
    sqlite::SqlitePoolOptions,
};
use tokio::{net::TcpListener, time::sleep};
use tower_idempotency::{
    Consumer, Idempotency, IdempotencyLayer, PostgresStore, Reaper, SqliteStore, TransactionOptions, Tx,
    layer::Strategy,
    recovery::{Completer, KeptRequests, Refused, Restore},
    store::{IntoStore, IsolationLevel},
};
use uuid::Uuid;

use crate::{
    payout, phased,
    support::required_env,
    trap::{Point, Trap, Trapped},
};

/// Runs the server until it is killed, or its parent ends.
pub async fn serve() {
    thread::spawn(end_with_parent);
    let port = required_env("PORT").parse::<u16>().expect("PORT is a number");
    let app = app(&required_env("DATABASE_URL"), &Settings::from_env());
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.expect("the port is free");
    axum::serve(listener, app).await.expect("the server runs");
}

fn end_with_parent() {
    let parent = getppid();
    while getppid() == parent {
        thread::sleep(Duration::from_secs(1));
    }
    std::process::exit(1);
}

/// What a server can be told, in place or, as far as a part needs it, by the environment.
#[derive(Clone, Debug)]
pub struct Settings {
    pub lease: Duration,
    pub store_timeout: Duration,
    pub statement_timeout: Duration,
    pub transactions: TransactionOptions,
    /// After what time kept requests count as abandoned; without it none is kept.
    pub abandoned_after: Option<Duration>,
    /// Whether it completes abandoned requests.
    pub completes: bool,
    pub strategy: Strategy,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(1),
            store_timeout: Duration::from_secs(2),
            statement_timeout: Duration::from_secs(10),
            transactions: TransactionOptions::default(),
            abandoned_after: None,
            completes: false,
            // Of the whole run, so that its servers inherit it.
            strategy: match std::env::var_os("TORTURE_SINGLE") {
                Some(_) => Strategy::SingleTransaction,
                None => Strategy::Claimed,
            },
        }
    }
}

impl Settings {
    fn from_env() -> Self {
        let mut settings = Self::default();
        let millis = |name| {
            let value = std::env::var(name).ok()?;
            Some(Duration::from_millis(value.parse().expect("a number of milliseconds")))
        };
        settings.lease = millis("LEASE_MS").unwrap_or(settings.lease);
        settings.abandoned_after = millis(ABANDONED_AFTER_MS);
        settings.completes = std::env::var_os(COMPLETES).is_some();
        if let Some(limit) = millis("IDLE_TIMEOUT_MS") {
            settings.transactions = settings.transactions.with_idle_timeout(limit);
        }
        if let Ok(name) = std::env::var("ISOLATION") {
            settings.transactions = settings.transactions.with_isolation(isolation(&name));
        }
        settings
    }

    fn layer(&self, store: impl IntoStore) -> IdempotencyLayer {
        let layer = IdempotencyLayer::new(store)
            .with_lease(self.lease)
            .with_store_timeout(self.store_timeout)
            .with_transactions(self.transactions.clone())
            .with_strategy(self.strategy)
            .with_reaper(Reaper::off());
        match self.abandoned_after {
            Some(time) => layer.with_kept_requests(KeptRequests::new().with_abandoned_after(time)),
            None => layer,
        }
    }
}

fn isolation(name: &str) -> IsolationLevel {
    match name {
        "READ COMMITTED" => IsolationLevel::ReadCommitted,
        "REPEATABLE READ" => IsolationLevel::RepeatableRead,
        "SERIALIZABLE" => IsolationLevel::Serializable,
        unknown => panic!("there is no isolation level {unknown}"),
    }
}

/// The application, for a server of its own or for this process.
pub fn app(database_url: &str, settings: &Settings) -> Router {
    let trap = Trap::default();
    if database_url.starts_with("sqlite:") {
        let pool = SqlitePoolOptions::new().max_connections(4);
        let pool = pool.connect_lazy(database_url).expect("DATABASE_URL is one of SQLite");
        let store = Trapped::new(
            SqliteStore::new(pool).with_grouping(crate::support::grouping::grouping()),
            trap.clone(),
        );
        return router::<Sqlite>(settings, store, trap);
    }
    let pool = PgPoolOptions::new().max_connections(10).acquire_timeout(Duration::from_secs(5));
    let pool = pool.connect_lazy(database_url).expect("DATABASE_URL is one of PostgreSQL");
    let store = PostgresStore::new(pool)
        .with_grouping(crate::support::grouping::grouping())
        .with_statement_timeout(settings.statement_timeout);
    router::<Postgres>(settings, Trapped::new(store, trap.clone()), trap)
}

fn router<DB: Writes>(settings: &Settings, store: impl IntoStore, trap: Trap) -> Router {
    let layer = settings.layer(store);
    let handle = layer.handle();
    let app = Router::new()
        .route("/charges", post(charge::<DB>))
        .merge(payout::router::<DB>())
        .merge(phased::router::<DB>())
        .layer(layer)
        .layer(middleware::from_fn_with_state(trap, set_trap))
        .route("/healthz", get(|| async { "ok" }));
    if settings.completes {
        handle.start_completer(completer(app.clone())).expect("the stores of the torture keep requests");
    }
    app
}

fn completer(app: Router) -> Completer {
    Completer::new(app.into_service::<Body>(), Nothing).with_interval(SOON).with_backoff(SOON, SOON)
}

/// There is no authentication layer.
struct Nothing;

#[async_trait::async_trait]
impl Restore for Nothing {
    async fn restore(&self, _: &mut axum::http::Request<()>, _: &Consumer) -> Result<(), Refused> {
        Ok(())
    }
}

/// `x-kill-at` and `x-freeze-at` name a point of the request's attempt.
async fn set_trap(State(trap): State<Trap>, mut request: Request, next: Next) -> Response {
    let headers = request.headers();
    for (name, signal) in [(KILL_AT, Signal::KILL), (FREEZE_AT, Signal::STOP)] {
        if let (Some(key), Some(point)) = (text(headers, "idempotency-key"), text(headers, name)) {
            trap.set(key, Point::named(point).expect("a known point"), signal);
        }
    }
    request.extensions_mut().insert(trap);
    next.run(request).await
}

/// What a request asks of its handler besides a charge.
pub struct Directions {
    pub idempotency: Idempotency,
    trap: Trap,
    sleep_inside: Duration,
    /// Whether to change a row that all such requests change.
    touches_shared_row: bool,
}

/// Extracted before the transaction: it begins later by what the request says.
impl<S: Sync> FromRequestParts<S> for Directions {
    type Rejection = StatusCode;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, StatusCode> {
        let idempotency = parts.extensions.get::<Idempotency>().cloned().ok_or(StatusCode::BAD_REQUEST)?;
        let trap = parts.extensions.get::<Trap>().cloned().ok_or(StatusCode::INTERNAL_SERVER_ERROR)?;
        let directions = Self {
            idempotency,
            trap,
            sleep_inside: millis(&parts.headers, SLEEP_INSIDE_MS),
            touches_shared_row: parts.headers.contains_key(TOUCH_SHARED_ROW),
        };
        directions.reach(Point::Entered);
        sleep(millis(&parts.headers, SLEEP_BEFORE_MS)).await;
        Ok(directions)
    }
}

impl Directions {
    pub fn reach(&self, point: Point) {
        self.trap.reach(self.idempotency.key().as_str(), point);
    }
}

async fn charge<DB: Writes>(directions: Directions, mut tx: Tx<DB>) -> Response {
    directions.reach(Point::Begun);
    let id = Uuid::new_v4().to_string();
    if let Err(error) = write::<DB>(&mut tx, &directions, &id).await {
        return (StatusCode::SERVICE_UNAVAILABLE, error.to_string()).into_response();
    }
    directions.reach(Point::Written);
    if directions.trap.is_set(directions.idempotency.key().as_str(), Point::Completed) {
        DB::trap_commit(&mut tx, directions.trap.clone()).await;
    }
    sleep(directions.sleep_inside).await;
    (StatusCode::CREATED, [("x-charge", id.clone())], format!("charge {id}")).into_response()
}

/// Writes a charge with this id.
pub async fn write<DB: Writes>(
    connection: &mut DB::Connection,
    directions: &Directions,
    id: &str,
) -> Result<(), sqlx::Error> {
    if directions.touches_shared_row {
        DB::run(connection, TOUCH, &[]).await?;
    }
    let Directions { idempotency, .. } = directions;
    let attempt = idempotency.attempt_id().to_string();
    let charge = [idempotency.consumer().as_str(), idempotency.key().as_str(), id, &attempt];
    DB::run(connection, INSERT, &charge).await
}

/// A database that handlers write to.
pub trait Writes: Database {
    /// Runs a statement with these parameters.
    fn run(
        connection: &mut Self::Connection,
        sql: &'static str,
        parameters: &[&str],
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Has the database step into the trap when it commits, if it calls something then.
    fn trap_commit(connection: &mut Self::Connection, trap: Trap) -> impl Future<Output = ()> + Send;
}

macro_rules! writes {
    ($database:ty, $connection:ty, |$trapped:ident, $trap:ident| $trap_commit:expr) => {
        impl Writes for $database {
            async fn run(
                connection: &mut $connection,
                sql: &'static str,
                parameters: &[&str],
            ) -> Result<(), sqlx::Error> {
                let query = parameters.iter().fold(sqlx::query(sql), |query, text| query.bind(*text));
                query.execute(connection).await.map(drop)
            }

            async fn trap_commit($trapped: &mut $connection, $trap: Trap) {
                $trap_commit
            }
        }
    };
}

writes!(Postgres, PgConnection, |_connection, _trap| ());
writes!(Sqlite, SqliteConnection, |connection, trap| {
    connection.lock_handle().await.expect("the connection is idle").set_commit_hook(move || {
        trap.reach_commit();
        true
    });
});

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn millis(headers: &HeaderMap, name: &str) -> Duration {
    Duration::from_millis(text(headers, name).and_then(|value| value.parse().ok()).unwrap_or_default())
}

pub const ABANDONED_AFTER_MS: &str = "ABANDONED_AFTER_MS";
pub const COMPLETES: &str = "COMPLETES";
pub const KILL_AT: &str = "x-kill-at";
pub const FREEZE_AT: &str = "x-freeze-at";
pub const SLEEP_BEFORE_MS: &str = "x-sleep-before-ms";
pub const SLEEP_INSIDE_MS: &str = "x-sleep-inside-ms";
pub const TOUCH_SHARED_ROW: &str = "x-touch-shared-row";

const SOON: Duration = Duration::from_millis(50);
const TOUCH: &str = "UPDATE accounts SET charges = charges + 1 WHERE id = 1";
const INSERT: &str = "INSERT INTO charges (consumer, key, id, attempt) VALUES ($1, $2, $3, $4)";
