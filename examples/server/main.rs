//! A small payments API that is safe to retry.
//!
//! ```sh
//! cargo run --example server
//! ```
//!
//! listens on 127.0.0.1:3000 and keeps charges and idempotency records in `payments.sqlite`. Charge a card:
//!
//! ```sh
//! curl -i localhost:3000/charges -H 'X-Api-Key: acme-key' -H 'Idempotency-Key: order-1' \
//!   --json '{"amount": 2000, "currency": "usd", "description": "one book"}'
//! ```
//!
//! answers `201 Created` with the new charge. The same command again answers with the very same charge, marked
//! `idempotent-replayed: true`, and nothing was charged: `curl localhost:3000/charges -H 'X-Api-Key: acme-key'` shows
//! one. Another amount under the same key is refused with 422. For another consumer it is another key:
//!
//! ```sh
//! curl -i localhost:3000/charges -H 'X-Api-Key: globex-key' -H 'Idempotency-Key: order-1' \
//!   --json '{"amount": 500, "currency": "eur"}'
//! ```
//!
//! The charge is written through the transaction in which its response is stored, so both are there or neither is,
//! whenever the server dies. `POST /charges?delay_ms=5000` holds that transaction open for so long after the charge was
//! written: press Ctrl-C in curl and send it again to get 409 while it runs and a replay afterwards; `kill -9` the
//! server meanwhile, and the charge is gone with it and is made once by a retry, or by the server when none comes.
//!
//! `?simulate=500`, `503` and `panic` fail *after* the charge was written: it is rolled back, such results are not kept,
//! and a retry runs again. `?simulate=402` declines the card before anything is written, and that answer is kept.
//!
//! `POST /payouts` writes a payout down in a phase and calls a bank through an intent: each is done once, and found again,
//! whatever happens in between.
//!
//! ```sh
//! curl -i localhost:3000/payouts -H 'X-Api-Key: acme-key' -H 'Idempotency-Key: payout-1' \
//!   --json '{"recipient": "DE02", "amount": 2000}'
//! ```
//!
//! `?upstream=5xx`, `reset`, `timeout` and others make the bank misbehave at the first call, see the example `payout`.
//!
//! Requests that were abandoned are completed by the server itself. To see it, take a bank that outlives the server:
//!
//! ```sh
//! cargo build --examples
//! cargo run --example payout -- --bank &
//! export UPSTREAM_URL=http://127.0.0.1:4000 UPSTREAM_TIMEOUT_MS=3000 LEASE_MS=3000 COMPLETER_INTERVAL_MS=1000
//! cargo run --example server &
//! ```
//!
//! kill the server while the bank keeps it waiting, whose client has left as well, and start it again:
//!
//! ```sh
//! curl -m 1 'localhost:3000/payouts?upstream=timeout' -H 'X-Api-Key: acme-key' -H 'Idempotency-Key: payout-2' \
//!   --json '{"recipient": "DE02", "amount": 2000}'; kill -9 $!
//! cargo run --example server & sleep 1
//! curl localhost:3000/payouts -H 'X-Api-Key: acme-key'
//! ```
//!
//! The payout is `pending`. Some ten seconds later, when the bank was asked what became of the transfer, it is `paid`, and
//! `curl localhost:4000/transfers` shows one. The API key was not stored: for whom the request is sent again, and whether
//! it still may be, is told by `Consumers`. With `REVOKED=acme` it is not, and waits for an operator.
//!
//! | variable | default | |
//! |---|---|---|
//! | `UPSTREAM_URL` | a bank in this process, which forgets everything when it ends | a bank like that of the example `payout` |
//! | `UPSTREAM_TIMEOUT_MS` | 5000 | how long a payout waits for the bank; twice that later it is looked up |
//! | `DATABASE_URL` | `sqlite:payments.sqlite` | or `postgres://user@host/database` |
//! | `PORT` | 3000 | |
//! | `LEASE_MS` | 30000 | how long retries get 409 after a crash |
//! | `MAX_EXECUTION_MS` | 600000 | how long a request may run |
//! | `TRANSACTION_LIMIT_MS` | a third of the lease | how long a request may keep all others from writing, on SQLite |
//! | `STORE_TIMEOUT_MS` | 5000 | how long a request waits for the database to claim its key |
//! | `COMPLETER_INTERVAL_MS` | 30000 | after how long without a retry an abandoned request is completed by the server |
//! | `REVOKED` | none | consumers whose API keys count no longer, with commas between them |
//! | `ABANDONED` | `retry` | `hold`: store 5xx, and after a crash or a panic never run again (409) |
//! | `RUST_LOG` | `info` | |

#[path = "../payout/bank.rs"]
mod bank;
mod charges;
mod consumers;
mod payouts;

use std::{error::Error, net::Ipv4Addr, process::ExitCode, str::FromStr, time::Duration};

use axum::{
    Router,
    body::Body,
    http::{StatusCode, header},
    middleware,
    response::{IntoResponse, Response},
    routing::get,
};
use bank::Bank;
use charges::Charges;
use consumers::{Consumers, authenticate};
use payouts::Payouts;
use tokio::signal::unix::{SignalKind, signal};
use tower_idempotency::{
    ConsumerExtractor, IdempotencyLayer, ResultPolicy, TransactionOptions,
    recovery::{Completer, KeptRequests},
};
use tracing_subscriber::EnvFilter;

#[tokio::main]
async fn main() -> ExitCode {
    match serve().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve() -> Result<(), Box<dyn Error>> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).init();

    let database_url = variable("DATABASE_URL")?.unwrap_or_else(|| "sqlite:payments.sqlite".to_owned());
    let charges = Charges::open(&database_url)
        .await
        .map_err(|error| format!("cannot open {}: {error}", without_password(&database_url)))?;
    let idempotency = idempotency_layer(&charges)?;
    let handle = idempotency.handle();
    handle.prepare().await?;
    let payouts = payouts(&charges).await?;
    handle.start_reconciler(payouts.reconciler())?;
    println!("payouts go through the bank at {}", payouts.bank_url());

    let consumers = Consumers::without(&variable::<String>("REVOKED")?.unwrap_or_default());
    let interval = completer_interval()?;
    // Of a charge whose server has died nothing is left. A payout may be half done, so its request is kept, at the cost of a
    // write.
    let kept = KeptRequests::new().with_abandoned_after(interval);
    let app = Router::new()
        .merge(charges.router().layer(idempotency.clone()))
        .merge(payouts.router().layer(idempotency.with_kept_requests(kept)))
        // Added last, so it is outside: the idempotency layers have to know whose key it is.
        .layer(middleware::from_fn_with_state(consumers.clone(), authenticate))
        .route("/healthz", get(async || "ok\n"));
    // It is given the whole application: what it sends passes everything that a request from the network passes.
    let completer = Completer::new(app.clone().into_service::<Body>(), consumers);
    handle.start_completer(completer.with_interval(interval).with_backoff(interval, interval * 64))?;

    let port = variable("PORT")?.unwrap_or(3000);
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port))
        .await
        .map_err(|error| format!("cannot listen on port {port}: {error}; set PORT"))?;
    let url = format!("http://{}", listener.local_addr()?);
    println!("{url} keeps everything in {}. Try:\n", without_password(&database_url));
    println!("  curl -i {url}/charges -H 'X-Api-Key: acme-key' -H 'Idempotency-Key: order-1' \\");
    println!("    --json '{{\"amount\": 2000, \"currency\": \"usd\", \"description\": \"one book\"}}'\n");
    println!("  curl -i {url}/payouts -H 'X-Api-Key: acme-key' -H 'Idempotency-Key: payout-1' \\");
    println!("    --json '{{\"recipient\": \"DE02\", \"amount\": 2000}}'\n");

    axum::serve(listener, app).with_graceful_shutdown(asked_to_end()).await?;
    // All connections are closed, but a request whose client has left may still be running.
    handle.drain(Duration::from_secs(10)).await?;
    Ok(())
}

fn idempotency_layer(charges: &Charges) -> Result<IdempotencyLayer, Box<dyn Error>> {
    let mut layer = match charges {
        Charges::Sqlite(pool) => IdempotencyLayer::new(pool.clone()),
        Charges::Postgres(pool) => IdempotencyLayer::new(pool.clone()),
    }
    .with_consumer(ConsumerExtractor::extension())
    .required();

    if let Some(lease) = variable("LEASE_MS")? {
        layer = layer.with_lease(Duration::from_millis(lease));
    }
    if let Some(limit) = variable("MAX_EXECUTION_MS")? {
        layer = layer.with_max_execution(Duration::from_millis(limit));
    }
    if let Some(limit) = variable("TRANSACTION_LIMIT_MS")? {
        let options = TransactionOptions::default().with_time_limit(Duration::from_millis(limit));
        layer = layer.with_transactions(options);
    }
    if let Some(limit) = variable("STORE_TIMEOUT_MS")? {
        layer = layer.with_store_timeout(Duration::from_millis(limit));
    }
    match variable::<String>("ABANDONED")?.as_deref() {
        None | Some("retry") => Ok(layer),
        Some("hold") => Ok(layer.with_policy(ResultPolicy::at_most_once())),
        Some(other) => Err(format!("ABANDONED is {other:?}: use retry or hold").into()),
    }
}

async fn payouts(charges: &Charges) -> Result<Payouts, Box<dyn Error>> {
    let bank = match variable::<String>("UPSTREAM_URL")? {
        Some(url) => Bank::at(url),
        None => Bank::open(0).await?,
    };
    let timeout = Duration::from_millis(variable("UPSTREAM_TIMEOUT_MS")?.unwrap_or(5000).max(1));
    Ok(Payouts::open(charges.clone(), bank, timeout).await?)
}

/// How often abandoned requests are looked for, for how long after its lease one is left to its client, and the pause after
/// it was sent in vain, which doubles.
fn completer_interval() -> Result<Duration, String> {
    Ok(Duration::from_millis(variable::<u32>("COMPLETER_INTERVAL_MS")?.unwrap_or(30_000).max(1).into()))
}

/// A refusal as `application/problem+json`, like those of the idempotency layer.
struct Problem(StatusCode, String);

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let Self(status, detail) = self;
        let problem = serde_json::json!({
            "title": status.canonical_reason(),
            "status": status.as_u16(),
            "detail": detail,
        });
        (status, [(header::CONTENT_TYPE, "application/problem+json")], problem.to_string()).into_response()
    }
}

impl From<sqlx::Error> for Problem {
    fn from(error: sqlx::Error) -> Self {
        tracing::error!(%error, "the database failed");
        Self(StatusCode::INTERNAL_SERVER_ERROR, "the database failed".to_owned())
    }
}

/// Returns at Ctrl-C and SIGTERM.
async fn asked_to_end() {
    let mut terminate = signal(SignalKind::terminate()).expect("a handler for SIGTERM can be installed");
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

fn variable<T: FromStr<Err: std::fmt::Display>>(name: &str) -> Result<Option<T>, String> {
    match std::env::var(name) {
        Ok(value) => value.parse().map(Some).map_err(|error| format!("{name} is {value:?}: {error}")),
        Err(_) => Ok(None),
    }
}

fn without_password(url: &str) -> String {
    match url.split_once("://").and_then(|(scheme, rest)| Some((scheme, rest.rsplit_once('@')?.1))) {
        Some((scheme, place)) => format!("{scheme}://{place}"),
        None => url.to_owned(),
    }
}
