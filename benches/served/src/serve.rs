//! A server: one application on a port of its own.

use axum::{
    Router,
    body::Bytes,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::post,
    serve::ListenerExt,
};
use idempotent::{
    memory::MemoryStore as RivalMemory, middleware::IdempotencyLayer as Rival, valkey::ValkeyStore,
};
use sqlx::{
    postgres::PgPoolOptions,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use tokio::net::TcpListener;
use tower_http::limit::RequestBodyLimitLayer;
use tower_idempotency::{
    Consumer, ConsumerExtractor, IdempotencyLayer, MemoryStore, layer::Strategy, store::IntoStore,
};

use crate::{Result, by_hand};

/// Serves an application until the process is killed, and prints its port.
pub async fn serve(role: &str, place: &str) -> Result<()> {
    let app = application(role, place).await?;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    println!("{}", listener.local_addr()?.port());
    let listener = listener.tap_io(|stream| stream.set_nodelay(true).unwrap_or_default());
    Ok(axum::serve(listener, app).await?)
}

async fn application(role: &str, place: &str) -> Result<Router> {
    match place.split_once(':').map_or("", |(scheme, _)| scheme) {
        "postgres" => {
            let pool = PgPoolOptions::new().max_connections(16).connect(place).await?;
            by_hand::postgres::application(role, pool).await
        }
        "sqlite" => {
            let pool = SqlitePoolOptions::new().max_connections(8).connect_with(sqlite(place)?).await?;
            by_hand::sqlite::application(role, pool).await
        }
        "redis" => Ok(bare().layer(Rival::new(ValkeyStore::with_url(place).try_build().await?))),
        _ => in_memory(role),
    }
}

fn in_memory(role: &str) -> Result<Router> {
    let store = MemoryStore::new().with_max_records(usize::MAX).with_max_bytes(usize::MAX);
    Ok(match role {
        "bare" => bare(),
        "limit" => bare().layer(RequestBodyLimitLayer::new(1024 * 1024)),
        "layer" => bare().layer(layer(store)),
        "rival" => bare().layer(Rival::new(RivalMemory::builder().try_build()?)),
        _ => return Err(format!("no application {role} in memory").into()),
    })
}

fn sqlite(url: &str) -> Result<SqliteConnectOptions> {
    Ok(url
        .parse::<SqliteConnectOptions>()?
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(std::time::Duration::from_secs(30)))
}

fn bare() -> Router {
    Router::new().route("/charges", post(create_charge))
}

/// The handler: answers with the body that it got.
pub async fn create_charge(body: Bytes) -> impl IntoResponse {
    let headers = [(header::LOCATION, "/charges/1"), (header::CONTENT_TYPE, "application/json")];
    (StatusCode::CREATED, headers, body)
}

/// The layer as the benchmark uses it: more places than the load has connections, one consumer.
pub fn layer(store: impl IntoStore) -> IdempotencyLayer {
    let consumer = Consumer::new(CONSUMER).expect("a valid consumer");
    IdempotencyLayer::new(store).with_consumer(ConsumerExtractor::shared(consumer)).with_max_in_flight(4096)
}

/// The layer with one transaction for record and effect.
pub fn single_transaction(store: impl IntoStore) -> IdempotencyLayer {
    layer(store).with_strategy(Strategy::SingleTransaction)
}

/// A body of so many bytes.
pub fn charge(bytes: usize) -> Vec<u8> {
    let (start, end) = (r#"{"amount":2000,"currency":"usd","description":""#, r#""}"#);
    let filler = "x".repeat(bytes - start.len() - end.len());
    [start, &filler, end].concat().into_bytes()
}

pub const CONSUMER: &str = "acme";
