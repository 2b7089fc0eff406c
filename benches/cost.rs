//! What the layer costs, as ratios measured in one run.
//!
//! ```sh
//! cargo bench                        # memory and SQLite
//! scripts/with-servers cargo bench   # PostgreSQL too, on a throw-away server
//! ```
//!
//! Every round runs all variants one after the other; a ratio compares a variant with its reference within the same
//! round, and the median over the rounds is printed. Requests go through the services without a socket, so that nothing
//! hides the difference. The hand-written handlers do what one would write without the layer: insert the key, then save
//! the response, each in a statement of its own, with the same pool of sqlx.

use std::{
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use axum::{
    Router, body::Body, extract::State, http::Request, http::StatusCode, response::IntoResponse,
    routing::post,
};
use sqlx::{PgPool, SqlitePool, sqlite::SqliteConnectOptions};
use tower::ServiceExt;
use tower_http::limit::RequestBodyLimitLayer;
use tower_idempotency::{IdempotencyLayer, MemoryStore};
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

/// Times of every variant in every round.
async fn measure(variants: &[Variant], concurrency: u64) -> Vec<Vec<Duration>> {
    let mut rounds = Vec::new();
    for round in 0..=ROUNDS {
        let mut times = Vec::new();
        for variant in variants {
            times.push(run(variant, concurrency).await);
        }
        // The first round warms up.
        if round > 0 {
            rounds.push(times);
        }
    }
    rounds
}

async fn run(variant: &Variant, concurrency: u64) -> Duration {
    let left = Arc::new(AtomicU64::new(variant.requests));
    let started = Instant::now();
    let workers = (0..concurrency).map(|_| {
        let (app, keys, left) = (variant.app.clone(), variant.keys, Arc::clone(&left));
        tokio::spawn(async move {
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
            {
                let response =
                    app.clone().oneshot(request(keys)).await.expect("the application does not fail");
                // Simultaneous first requests of the replay variant are refused in the warm-up.
                let status = response.status();
                assert!(status == StatusCode::CREATED || status == StatusCode::CONFLICT, "{status}");
            }
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await.expect("a worker does not panic");
    }
    started.elapsed()
}

fn request(keys: Keys) -> Request<Body> {
    let builder = Request::post("/charges").header("content-type", "application/json");
    let builder = match keys {
        Keys::None => builder,
        Keys::Fresh => builder.header("idempotency-key", Uuid::new_v4().to_string()),
        Keys::Same => builder.header("idempotency-key", "always-the-same"),
    };
    builder.body(Body::from(r#"{"amount":2000,"currency":"usd"}"#)).expect("a valid request")
}

fn report(variants: &[Variant], rounds: &[Vec<Duration>], concurrency: u64) {
    println!("{concurrency} at once{:34}time, as a ratio                 µs a request", "");
    for (index, variant) in variants.iter().enumerate() {
        let reference = variant.reference;
        let mut ratios: Vec<f64> = rounds
            .iter()
            .map(|times| {
                per_request(times[index], variant) / per_request(times[reference], &variants[reference])
            })
            .collect();
        let mut absolute: Vec<f64> = rounds.iter().map(|times| per_request(times[index], variant)).collect();
        println!(
            "  {:38} {:6.2} × {:38} {:8.1}",
            variant.name,
            median(&mut ratios),
            variants[reference].name,
            median(&mut absolute)
        );
    }
    println!();
}

#[expect(clippy::cast_precision_loss, reason = "counts of requests are small")]
fn per_request(time: Duration, variant: &Variant) -> f64 {
    time.as_secs_f64() * 1e6 / variant.requests as f64
}

fn median(values: &mut [f64]) -> f64 {
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

/// The variants on one database: a handler written by hand, and the layer. The SQL is that of both databases.
macro_rules! variants_on {
    ($database:literal, $Pool:ty, $pool:expr, $reference:expr) => {{
        async fn by_hand(State(pool): State<$Pool>, request: Request<Body>) -> impl IntoResponse {
            let key = key_of(&request);
            let claimed = sqlx::query(CLAIM_BY_HAND).bind(&key).fetch_all(&pool).await;
            assert_eq!(claimed.expect("the key is inserted").len(), 1);
            let response = create_charge().await;
            let saved = sqlx::query(SAVE_BY_HAND).bind(RESPONSE.as_bytes()).bind(&key).execute(&pool).await;
            saved.expect("the response is saved");
            response
        }

        let pool: $Pool = $pool;
        sqlx::query(TABLE_BY_HAND).execute(&pool).await?;
        let hand = Router::new().route("/charges", post(by_hand)).with_state(pool.clone());
        let layered = bare().layer(IdempotencyLayer::new(pool));
        let variant = |name, app: &Router, keys| Variant {
            name,
            app: app.clone(),
            keys,
            requests: 2_000,
            reference: $reference,
        };
        Ok(vec![
            variant(concat!("by hand on ", $database, ", first"), &hand, Keys::Fresh),
            variant(concat!("layer on ", $database, ", first"), &layered, Keys::Fresh),
            variant(concat!("layer on ", $database, ", replay"), &layered, Keys::Same),
        ])
    }};
}

async fn on_sqlite(path: &std::path::Path, reference: usize) -> Result<Vec<Variant>, sqlx::Error> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(sqlx::sqlite::SqliteJournalMode::Wal)
        .synchronous(sqlx::sqlite::SqliteSynchronous::Full)
        .busy_timeout(Duration::from_secs(30));
    let pool = sqlx::sqlite::SqlitePoolOptions::new().max_connections(8).connect_with(options).await?;
    variants_on!("SQLite", SqlitePool, pool, reference)
}

async fn on_postgres(url: &str, reference: usize) -> Result<Vec<Variant>, sqlx::Error> {
    let pool = sqlx::postgres::PgPoolOptions::new().max_connections(16).connect(url).await?;
    variants_on!("PostgreSQL", PgPool, pool, reference)
}

fn key_of(request: &Request<Body>) -> String {
    let key = request.headers()["idempotency-key"].to_str();
    key.expect("keys of this program are text").to_owned()
}

const ROUNDS: usize = 5;
const RESPONSE: &str = r#"{"id":"01a20023-5446-712a-8e5b-51e13c4c82c0","amount":2000,"currency":"usd"}"#;
const TABLE_BY_HAND: &str = "CREATE TABLE IF NOT EXISTS by_hand (consumer text, key text, response bytea, PRIMARY KEY (consumer, key))";
const CLAIM_BY_HAND: &str =
    "INSERT INTO by_hand (consumer, key) VALUES ('acme', $1) ON CONFLICT DO NOTHING RETURNING 1";
const SAVE_BY_HAND: &str = "UPDATE by_hand SET response = $1 WHERE consumer = 'acme' AND key = $2";
