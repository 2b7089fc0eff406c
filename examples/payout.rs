//! A handler that calls a bank, and neither forgets a transfer nor makes one twice.
//!
//! ```sh
//! cargo run --example payout
//! ```
//!
//! listens on port 3000, keeps payouts and idempotency records in a SQLite file, and calls a bank that runs in the same
//! program on a port of its own. Pay somebody:
//!
//! ```sh
//! curl -i localhost:3000/payouts -H 'X-Api-Key: acme-key' -H 'Idempotency-Key: a' --json '{"to": "DE02", "cents": 1000}'
//! ```
//!
//! Add `?upstream=` to the path, with a new key each time, and the bank misbehaves when it is called first:
//!
//! | `?upstream=` | the bank | the client |
//! |---|---|---|
//! | `4xx` | refuses | 422, now and at every retry |
//! | `5xx`, `reset` | answers 500 or breaks the connection off, and has made no transfer | 409 until the reconciler has found out; then a retry makes the transfer |
//! | `apply-then-fail`, `timeout` | answers 500 or not at all, and has made the transfer | 409 until the reconciler has found out; then a retry gets that transfer |
//! | `forget` | answers 500 and has lost the order | as with `5xx` |
//!
//! With `?fail=yes` the handler itself fails after the call. The retry gets the transfer that was made, without a call.
//! `cargo run --example payout -- --demo` sends all of these and prints what comes back. `-- --bank` is the bank alone, on port
//! 4000 or `PORT`, for other programs.
//!
//! What is guaranteed: no call is made that was not written down before; a transfer that is known is never made again; and
//! one that may have been made is only made again when the bank does not know it. Kill the program at any moment.

#[path = "payout/bank.rs"]
mod bank;

use std::{error::Error, time::Duration};

use axum::{
    Json, Router,
    body::Body,
    extract::{Query, Request, State},
    http::{Extensions, StatusCode},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::post,
};
use bank::Bank;
use http_body_util::BodyExt;
use serde::{Deserialize, Serialize};
use sqlx::{
    Sqlite, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode},
};
use tower::ServiceExt;
use tower_idempotency::{Consumer, Idempotency, IdempotencyLayer, Reconciler, Tx, TxError};

#[derive(Deserialize, Serialize)]
struct Payout {
    to: String,
    cents: u32,
}

#[derive(Deserialize)]
struct Wish {
    upstream: Option<String>,
    fail: Option<String>,
}

async fn pay_out(
    State(bank): State<Bank>,
    Query(wish): Query<Wish>,
    idempotency: Idempotency,
    extensions: Extensions,
    Json(payout): Json<Payout>,
) -> axum::response::Result<Response> {
    let order = format!("{} cents to {}", payout.cents, payout.to);
    // Written down before the call and after it. The bank gets the same key from every attempt of this request.
    let transfer = idempotency
        .intent("bank.transfer")
        .with_arguments(&payout)
        .with_timeout(Duration::from_millis(500))
        .with_grace(Duration::from_secs(1))
        .call(async |key| bank.transfer(key, order, wish.upstream.as_deref()).await)
        .await?;
    if wish.fail.is_some() && idempotency.attempt_number() == 1 {
        return Err((StatusCode::INTERNAL_SERVER_ERROR, "the handler fails").into());
    }
    // After the call: nobody waits for the bank with a transaction open.
    let mut tx = Tx::<Sqlite>::begin(&extensions).await?;
    let insert = sqlx::query("INSERT INTO payouts (transfer, cents) VALUES (?, ?)");
    insert.bind(&transfer.id).bind(payout.cents).execute(&mut *tx).await.map_err(TxError::from)?;
    Ok((StatusCode::CREATED, transfer.id).into_response())
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
    if std::env::args().any(|argument| argument == "--bank") {
        let port = std::env::var("PORT").map_or(Ok(4000), |port| port.parse())?;
        println!("a bank at {}", Bank::open(port).await?.url());
        return Ok(tokio::signal::ctrl_c().await?);
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("payouts.sqlite");
    let file = SqliteConnectOptions::new().filename(&path).create_if_missing(true);
    let pool = SqlitePool::connect_with(file.journal_mode(SqliteJournalMode::Wal)).await?;
    sqlx::raw_sql("CREATE TABLE payouts (transfer TEXT NOT NULL, cents INTEGER NOT NULL)")
        .execute(&pool)
        .await?;

    let bank = Bank::open(0).await?;
    let idempotency = IdempotencyLayer::new(pool.clone()).required();
    let handle = idempotency.handle();
    handle.prepare().await?;
    // It asks the bank what became of calls whose outcome is unknown.
    let soon = Duration::from_millis(500);
    handle.start_reconciler(
        Reconciler::new().on("bank.transfer", bank.clone()).with_interval(soon).with_confirmation_after(soon),
    )?;
    let app = Router::new()
        .route("/payouts", post(pay_out))
        .layer(idempotency)
        .layer(middleware::from_fn(authenticate))
        .with_state(bank.clone());

    if std::env::args().any(|argument| argument == "--demo") {
        demonstrate(&app).await?;
        let payouts: i64 = sqlx::query_scalar("SELECT count(*) FROM payouts").fetch_one(&pool).await?;
        println!("payouts: {payouts}");
    } else {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
        let url = format!("http://{}", listener.local_addr()?);
        println!("{url} keeps everything in {} until it ends. Try:\n", path.display());
        println!("  curl -i '{url}/payouts?upstream=apply-then-fail' -H 'X-Api-Key: acme-key' \\");
        println!("    -H 'Idempotency-Key: b' --json '{{\"to\": \"DE02\", \"cents\": 1000}}'");
        println!("  curl {}/transfers\n", bank.url());
        let interrupted = async { tokio::signal::ctrl_c().await.unwrap_or_default() };
        axum::serve(listener, app).with_graceful_shutdown(interrupted).await?;
    }
    handle.drain(Duration::from_secs(10)).await?;
    Ok(())
}

/// Sends every request of the table until its answer is a replay, which is the answer from then on.
async fn demonstrate(app: &Router) -> Result<(), Box<dyn Error>> {
    for wish in WISHES {
        println!("POST /payouts?{wish}");
        let mut last = String::new();
        while !last.contains("(replay)") {
            let request = Request::post(format!("/payouts?{wish}"))
                .header("x-api-key", "acme-key")
                .header("idempotency-key", format!("demo:{wish}"))
                .header("content-type", "application/json")
                .body(Body::from(r#"{"to": "DE02", "cents": 1000}"#))?;
            let (parts, body) = app.clone().oneshot(request).await?.into_parts();
            let replay = if parts.headers.contains_key("idempotent-replayed") { " (replay)" } else { "" };
            let body = body.collect().await?.to_bytes();
            let problem: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
            let shown = match problem.as_ref().and_then(|problem| problem["code"].as_str()) {
                Some(code) => code.into(),
                None => String::from_utf8_lossy(&body),
            };
            let answer = format!("  {}{replay}: {shown}", parts.status);
            if answer != last {
                println!("{answer}");
            }
            last = answer;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
    Ok(())
}

const WISHES: [&str; 8] = [
    "",
    "upstream=4xx",
    "upstream=5xx",
    "upstream=reset",
    "upstream=apply-then-fail",
    "upstream=timeout",
    "upstream=forget",
    "fail=yes",
];
