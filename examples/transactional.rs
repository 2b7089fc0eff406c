//! A handler whose writes and stored response are committed together.
//!
//! ```sh
//! cargo run --example transactional
//! ```
//!
//! sells ten books, which it keeps in `transactional.sqlite` beside its idempotency records. Order three:
//!
//! ```sh
//! curl -i localhost:3000/orders -H 'X-Api-Key: acme-key' -H 'Idempotency-Key: a' --json '{"books": 3}'
//! ```
//!
//! answers `201 Created` with `{"books":3,"left":7}`. Send the same line again: the same answer, marked
//! `idempotent-replayed: true`, and there are still seven. Order more than there are:
//!
//! ```sh
//! curl -i localhost:3000/orders -H 'X-Api-Key: acme-key' -H 'Idempotency-Key: b' --json '{"books": 8}'
//! ```
//!
//! answers `422 Unprocessable Entity`, of a handler that had already taken the books and written the order: both are
//! rolled back, while the answer is stored and replayed. Another order finds all seven:
//!
//! ```sh
//! curl -i localhost:3000/orders -H 'X-Api-Key: acme-key' -H 'Idempotency-Key: c' --json '{"books": 7}'
//! ```
//!
//! answers `201 Created` with `{"books":7,"left":0}`.
//!
//! What is guaranteed: an order is in the database if and only if its `201` is stored, whatever happens in between: kill
//! the program at any moment, lose the connection, send the request a hundred times at once. One key, one order. As soon
//! as a client has a `201` it stays.
//!
//! Take `Tx` when everything that must happen once is rows in the database of the idempotency layer. What a handler does
//! elsewhere, a payment or a mail, is not rolled back with it. Take it late: on SQLite nobody else writes while it is
//! open, on PostgreSQL rows are locked.

use std::error::Error;

use axum::{
    Json, Router,
    extract::Request,
    http::StatusCode,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::post,
};
use serde::{Deserialize, Serialize};
use sqlx::{
    Sqlite, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode},
};
use tower_idempotency::{Consumer, IdempotencyLayer, Tx, TxError};

#[derive(Deserialize)]
struct Order {
    books: u32,
}

#[derive(Serialize)]
struct Receipt {
    books: u32,
    left: i64,
}

async fn order(mut tx: Tx<Sqlite>, Json(Order { books }): Json<Order>) -> Result<Response, TxError> {
    sqlx::query("INSERT INTO orders (books) VALUES (?)").bind(books).execute(&mut *tx).await?;
    let take = sqlx::query_scalar("UPDATE stock SET books = books - ? RETURNING books").bind(books);
    let left: i64 = take.fetch_one(&mut *tx).await?;
    if left < 0 {
        // Order and stock are what they were before.
        return Ok((StatusCode::UNPROCESSABLE_ENTITY, "there are not so many books\n").into_response());
    }
    Ok((StatusCode::CREATED, Json(Receipt { books, left })).into_response())
}

/// Stands for your authentication: it tells the layer whose key it is.
async fn authenticate(mut request: Request, next: Next) -> Response {
    if request.headers().get("x-api-key").is_none_or(|key| key != "acme-key") {
        return (StatusCode::UNAUTHORIZED, "send a valid X-Api-Key\n").into_response();
    }
    request.extensions_mut().insert(Consumer::new("acme").expect("the name is valid"));
    next.run(request).await
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let file = SqliteConnectOptions::new().filename("transactional.sqlite").create_if_missing(true);
    let pool = SqlitePool::connect_with(file.journal_mode(SqliteJournalMode::Wal)).await?;
    sqlx::raw_sql(
        "CREATE TABLE IF NOT EXISTS orders (number INTEGER PRIMARY KEY, books INTEGER NOT NULL);
         CREATE TABLE IF NOT EXISTS stock (article INTEGER PRIMARY KEY, books INTEGER NOT NULL);
         INSERT OR IGNORE INTO stock VALUES (1, 10)",
    )
    .execute(&pool)
    .await?;

    let idempotency = IdempotencyLayer::new(pool).required();
    let handle = idempotency.handle();
    let app = Router::new()
        .route("/orders", post(order))
        .layer(idempotency)
        .layer(middleware::from_fn(authenticate));

    let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    println!("http://{} keeps everything in transactional.sqlite", listener.local_addr()?);
    let interrupted = async { tokio::signal::ctrl_c().await.unwrap_or_default() };
    axum::serve(listener, app).with_graceful_shutdown(interrupted).await?;
    handle.drain(std::time::Duration::from_secs(10)).await?;
    Ok(())
}
