//! What the layer costs, as ratios measured in one run.
//!
//! ```sh
//! cargo bench                        # memory and SQLite
//! scripts/with-servers cargo bench   # PostgreSQL too, on a throw-away server
//! ```
//!
//! Every round runs all variants one after the other; a ratio compares a variant with its reference within the same
//! round, and the median over the rounds is printed. Requests go through the services without a socket, so that nothing
//! hides the difference. The hand-written handlers do what one would write without the layer, with the same pool of sqlx:
//!
//! * insert the key, then save the response, each in a statement of its own;
//! * for handlers with a transaction: insert the key, then the charge, save the response, commit, all in one transaction.
//!   Its duplicates wait for it on PostgreSQL, and what runs leaves no trace that others could see.

use std::{
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use axum::{
    Router, body::Body, extract::State, http::Request, http::StatusCode, response::IntoResponse,
    routing::post,
};
use sqlx::{PgPool, Postgres, Sqlite, SqlitePool, sqlite::SqliteConnectOptions};
use tower::ServiceExt;
use tower_http::limit::RequestBodyLimitLayer;
use tower_idempotency::{IdempotencyLayer, MemoryStore, Tx};
use uuid::Uuid;

#[derive(Clone, Copy)]
enum Keys {
    None,
    Fresh,
    Same,
}

struct Variant {
    name: &'static str,
    app: Router,
    keys: Keys,
    /// Requests of one round.
    requests: u64,
    /// Index of the variant that this one is compared with.
    reference: usize,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = tempfile::tempdir()?;
    let mut variants = in_memory();
    variants.extend(on_sqlite(&directory.path().join("bench.sqlite"), variants.len()).await?);
    match std::env::var("TEST_POSTGRES_URL") {
        Ok(url) => variants.extend(on_postgres(&url, variants.len()).await?),
        Err(_) => println!("PostgreSQL is not measured: run scripts/with-servers cargo bench\n"),
    }
    for concurrency in [1, 16, 64] {
        report(&variants, &measure(&variants, concurrency).await, concurrency);
    }
    Ok(())
}

/// What one variant took in one round, in µs.
struct Cost {
    per_request: f64,
    /// The time that 99 of 100 requests did not exceed.
    p99: f64,
}

/// The costs of every variant in every round.
async fn measure(variants: &[Variant], concurrency: u64) -> Vec<Vec<Cost>> {
    let mut rounds = Vec::new();
    for round in 0..=ROUNDS {
        let mut costs = Vec::new();
        for variant in variants {
            costs.push(run(variant, concurrency).await);
        }
        // The first round warms up.
        if round > 0 {
            rounds.push(costs);
        }
    }
    rounds
}

#[expect(clippy::cast_precision_loss, reason = "counts of requests are small")]
async fn run(variant: &Variant, concurrency: u64) -> Cost {
    let left = Arc::new(AtomicU64::new(variant.requests));
    let started = Instant::now();
    let workers = (0..concurrency).map(|_| {
        let (app, keys, left) = (variant.app.clone(), variant.keys, Arc::clone(&left));
        tokio::spawn(async move {
            let mut times = Vec::new();
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
            {
                let request = request(keys);
                let sent = Instant::now();
                let response = app.clone().oneshot(request).await.expect("the application does not fail");
                times.push(sent.elapsed());
                // Simultaneous first requests of the replay variant are refused in the warm-up.
                let status = response.status();
                assert!(status == StatusCode::CREATED || status == StatusCode::CONFLICT, "{status}");
            }
            times
        })
    });
    let mut times = Vec::new();
    for worker in workers.collect::<Vec<_>>() {
        times.extend(worker.await.expect("a worker does not panic"));
    }
    let per_request = micros(started.elapsed()) / variant.requests as f64;
    times.sort_unstable();
    Cost { per_request, p99: micros(times[times.len() * 99 / 100]) }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn request(keys: Keys) -> Request<Body> {
    let builder = Request::post("/charges").header("content-type", "application/json");
    let builder = match keys {
        Keys::None => builder,
        Keys::Fresh => builder.header("idempotency-key", new_id()),
        Keys::Same => builder.header("idempotency-key", "always-the-same"),
    };
    builder.body(Body::from(r#"{"amount":2000,"currency":"usd"}"#)).expect("a valid request")
}

fn report(variants: &[Variant], rounds: &[Vec<Cost>], concurrency: u64) {
    println!("{concurrency} at once{:34}time   p99, as ratios {:27}µs: time      p99", "", "");
    for (index, variant) in variants.iter().enumerate() {
        let over_rounds = |figure: &dyn Fn(&[Cost]) -> f64| median(rounds.iter().map(|costs| figure(costs)));
        println!(
            "  {:38} {:6.2}{:6.2} × {:38} {:8.1} {:8.0}",
            variant.name,
            over_rounds(&|costs| costs[index].per_request / costs[variant.reference].per_request),
            over_rounds(&|costs| costs[index].p99 / costs[variant.reference].p99),
            variants[variant.reference].name,
            over_rounds(&|costs| costs[index].per_request),
            over_rounds(&|costs| costs[index].p99),
        );
    }
    println!();
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

async fn create_charge() -> impl IntoResponse {
    (StatusCode::CREATED, [("location", "/charges/1")], RESPONSE)
}

fn bare() -> Router {
    Router::new().route("/charges", post(create_charge))
}

fn in_memory() -> Vec<Variant> {
    let layered = bare().layer(IdempotencyLayer::new(MemoryStore::new().with_max_records(10_000_000)));
    let limited = bare().layer(RequestBodyLimitLayer::new(1024 * 1024));
    let variant =
        |name, app: &Router, keys| Variant { name, app: app.clone(), keys, requests: 20_000, reference: 0 };
    vec![
        variant("bare handler", &bare(), Keys::None),
        variant("RequestBodyLimitLayer of tower-http", &limited, Keys::None),
        variant("layer, no key", &layered, Keys::None),
        variant("layer on memory, first", &layered, Keys::Fresh),
        variant("layer on memory, replay", &layered, Keys::Same),
    ]
}

/// The variants on one database: handlers written by hand, and the layer. The SQL is that of both databases.
macro_rules! variants_on {
    ($name:literal, $Database:ty, $Pool:ty, $pool:expr, begin: $begin:literal, first: $first:expr) => {{
        async fn by_hand(State(pool): State<$Pool>, request: Request<Body>) -> impl IntoResponse {
            let key = key_of(&request);
            let claimed = sqlx::query(CLAIM_BY_HAND).bind(&key).fetch_all(&pool).await;
            assert_eq!(claimed.expect("the key is inserted").len(), 1);
            let response = create_charge().await;
            let saved = sqlx::query(SAVE_BY_HAND).bind(RESPONSE.as_bytes()).bind(&key).execute(&pool).await;
            saved.expect("the response is saved");
            response
        }

        async fn transaction_by_hand(State(pool): State<$Pool>, request: Request<Body>) -> impl IntoResponse {
            let key = key_of(&request);
            let mut tx = pool.begin_with($begin).await.expect("the transaction begins");
            let claimed = sqlx::query(CLAIM_BY_HAND).bind(&key).fetch_all(&mut *tx).await;
            assert_eq!(claimed.expect("the key is inserted").len(), 1);
            let charged = sqlx::query(CHARGE).bind(new_id()).execute(&mut *tx).await;
            charged.expect("the charge is inserted");
            let response = create_charge().await;
            let save = sqlx::query(SAVE_BY_HAND).bind(RESPONSE.as_bytes()).bind(&key);
            save.execute(&mut *tx).await.expect("the response is saved");
            tx.commit().await.expect("the transaction is committed");
            response
        }

        async fn with_tx(mut tx: Tx<$Database>) -> impl IntoResponse {
            let charged = sqlx::query(CHARGE).bind(new_id()).execute(&mut *tx).await;
            charged.expect("the charge is inserted");
            create_charge().await
        }

        let pool: $Pool = $pool;
        sqlx::query(TABLE_BY_HAND).execute(&pool).await?;
        sqlx::query(CHARGES).execute(&pool).await?;
        let layer = IdempotencyLayer::new(pool.clone());
        let app = |handler| Router::new().route("/charges", handler);
        let variant = |name, app: &Router<$Pool>, keys, reference| Variant {
            name,
            app: app.clone().with_state(pool.clone()),
            keys,
            requests: 2_000,
            reference: $first + reference,
        };
        let layered = app(post(create_charge)).layer(layer.clone());
        Ok(vec![
            variant(concat!("by hand on ", $name, ", first"), &app(post(by_hand)), Keys::Fresh, 0),
            variant(concat!("layer on ", $name, ", first"), &layered, Keys::Fresh, 0),
            variant(concat!("layer on ", $name, ", replay"), &layered, Keys::Same, 0),
            variant(
                concat!("transaction by hand on ", $name),
                &app(post(transaction_by_hand)),
                Keys::Fresh,
                3,
            ),
            variant(concat!("Tx on ", $name), &app(post(with_tx)).layer(layer), Keys::Fresh, 3),
        ])
    }};
}

async fn on_sqlite(path: &std::path::Path, first: usize) -> Result<Vec<Variant>, sqlx::Error> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(sqlx::sqlite::SqliteJournalMode::Wal)
        .synchronous(sqlx::sqlite::SqliteSynchronous::Full)
        .busy_timeout(Duration::from_secs(30));
    let pool = sqlx::sqlite::SqlitePoolOptions::new().max_connections(8).connect_with(options).await?;
    variants_on!("SQLite", Sqlite, SqlitePool, pool, begin: "BEGIN IMMEDIATE", first: first)
}

async fn on_postgres(url: &str, first: usize) -> Result<Vec<Variant>, sqlx::Error> {
    let pool = sqlx::postgres::PgPoolOptions::new().max_connections(16).connect(url).await?;
    variants_on!("PostgreSQL", Postgres, PgPool, pool, begin: "BEGIN", first: first)
}

fn key_of(request: &Request<Body>) -> String {
    let key = request.headers()["idempotency-key"].to_str();
    key.expect("keys of this program are text").to_owned()
}

fn new_id() -> String {
    Uuid::new_v4().to_string()
}

const ROUNDS: usize = 5;
const RESPONSE: &str = r#"{"id":"01a20023-5446-712a-8e5b-51e13c4c82c0","amount":2000,"currency":"usd"}"#;
const TABLE_BY_HAND: &str = "CREATE TABLE IF NOT EXISTS by_hand (consumer text, key text, response bytea, PRIMARY KEY (consumer, key))";
const CLAIM_BY_HAND: &str =
    "INSERT INTO by_hand (consumer, key) VALUES ('acme', $1) ON CONFLICT DO NOTHING RETURNING 1";
const SAVE_BY_HAND: &str = "UPDATE by_hand SET response = $1 WHERE consumer = 'acme' AND key = $2";
const CHARGES: &str = "CREATE TABLE IF NOT EXISTS charges (id text PRIMARY KEY, amount bigint NOT NULL)";
const CHARGE: &str = "INSERT INTO charges (id, amount) VALUES ($1, 2000)";
