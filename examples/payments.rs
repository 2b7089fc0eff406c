//! A payment that a bank makes once. The example to copy.
//!
//! `cargo run --example payments` listens on port 3000 and keeps payments in `example-payments.sqlite`,
//! or in PostgreSQL if you set `DATABASE_URL=postgres://user@host/database`. Its bank is in memory and
//! forgets everything at exit; that of `job.rs` does not. Send a payment, then the same line again:
//!
//! ```sh
//! curl -i localhost:3000/payments -H 'X-Api-Key: acme-key' -H 'Idempotency-Key: order-1' \
//!   --json '{"iban": "DE02", "cents": 1000}'
//! ```
//!
//! The second answer is the first one, marked `idempotent-replayed: true`. With a new key and the IBAN
//! `XX` the bank refuses: 402. With another key and `LOST` it pays and its answer gets lost: 409. Five
//! seconds later the reconciler has asked the bank, and a retry gets 201.

use std::{collections::HashMap, error::Error as StdError, num::NonZeroU32, sync::Arc, time::Duration};

use axum::extract::{Json, Request, State};
use axum::http::{Extensions, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Router, middleware, middleware::Next, routing::post};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::{PgPool, Postgres, Sqlite, SqlitePool};
use tokio::{net::TcpListener, signal, sync::Mutex};
use tower_idempotency::{
    CallFailure, Consumer, Idempotency, IdempotencyLayer, Intent, IntentError, Lookup, Reconcile, Reconciler,
    Resource, Tx, TxError, UpstreamKey,
};

#[derive(Deserialize, Serialize)]
struct Payment {
    iban: String,
    cents: NonZeroU32,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Call(#[from] IntentError),
    #[error(transparent)]
    Database(#[from] TxError),
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        match self {
            // Stored like every 402: a retry gets it, and the bank is not called again.
            Self::Call(IntentError::Refused(why)) => (StatusCode::PAYMENT_REQUIRED, why).into_response(),
            Self::Call(error) => error.into_response(),
            Self::Database(error) => error.into_response(),
        }
    }
}

async fn pay(
    State((database, bank)): State<(Database, Bank)>,
    idempotency: Idempotency,
    extensions: Extensions,
    Json(payment): Json<Payment>,
) -> Result<(StatusCode, Json<Value>), Error> {
    let intent = idempotency.intent(TRANSFER).with_arguments(&payment).with_timeout(LIMIT);
    let call = intent.with_grace(LIMIT * 2).call(async |key| bank.transfer(key, &payment).await);
    let transfer = call.await?.id;
    // The transaction begins after the call, so that it is never open while the bank is slow.
    database.insert(&extensions, &transfer, payment.cents.get()).await?;
    Ok((StatusCode::CREATED, Json(json!({"transfer": transfer, "cents": payment.cents}))))
}

/// Stands for your authentication: it tells the layer whose key it is.
async fn authenticate(mut request: Request, next: Next) -> Response {
    if request.headers().get("x-api-key").is_none_or(|key| key != "acme-key") {
        return (StatusCode::UNAUTHORIZED, "send a valid X-Api-Key\n").into_response();
    }
    request.extensions_mut().insert(Consumer::new("acme").expect("the name is valid"));
    next.run(request).await
}

/// Your application has one of the two. This one has both, so that it runs without a server.
#[derive(Clone, Copy)]
enum Database {
    Sqlite,
    Postgres,
}

impl Database {
    async fn open(url: &str) -> sqlx::Result<(Self, IdempotencyLayer)> {
        if url.starts_with("sqlite:") {
            let pool = SqlitePool::connect(url).await?;
            sqlx::raw_sql(CREATE_TABLE).execute(&pool).await?;
            return Ok((Self::Sqlite, IdempotencyLayer::new(pool)));
        }
        let pool = PgPool::connect(url).await?;
        sqlx::raw_sql(CREATE_TABLE).execute(&pool).await?;
        Ok((Self::Postgres, IdempotencyLayer::new(pool)))
    }

    /// Writes a payment. Dropping `tx` hands it back, and the layer commits it with the response.
    async fn insert(self, extensions: &Extensions, transfer: &str, cents: u32) -> Result<(), TxError> {
        match self {
            Self::Sqlite => {
                let mut tx = Tx::<Sqlite>::begin(extensions).await?;
                sqlx::query(INSERT).bind(transfer).bind(i64::from(cents)).execute(&mut *tx).await?;
            }
            Self::Postgres => {
                let mut tx = Tx::<Postgres>::begin(extensions).await?;
                sqlx::query(INSERT).bind(transfer).bind(i64::from(cents)).execute(&mut *tx).await?;
            }
        }
        Ok(())
    }
}

/// Stands for the client of a bank that does not recognize repeated calls. Its transfers, by key.
#[derive(Clone, Default)]
struct Bank(Arc<Mutex<HashMap<UpstreamKey, String>>>);

impl Bank {
    async fn transfer(&self, key: UpstreamKey, payment: &Payment) -> Result<Resource, CallFailure> {
        let mut transfers = self.0.lock().await;
        let id = format!("tr_{}", transfers.len() + 1);
        if payment.iban == "XX" {
            return Err(CallFailure::refused("the bank does not know this IBAN"));
        }
        transfers.insert(key, id.clone());
        if payment.iban == "LOST" { Err(CallFailure::unknown("a reset")) } else { Ok(id.into()) }
    }
}

/// Asks the bank about a transfer whose outcome is unknown.
#[async_trait::async_trait]
impl Reconcile for Bank {
    async fn reconcile(&self, intent: &Intent) -> Result<Lookup, Box<dyn StdError + Send + Sync>> {
        let transfers = self.0.lock().await;
        let found = transfers.get(&intent.upstream_key);
        Ok(found.map_or(Lookup::NotFound, |id| Lookup::Found(id.as_str().into())))
    }
}

/// A look-up is registered under the name of the intents that it knows.
fn reconciler(bank: &Bank) -> Reconciler {
    Reconciler::new().on(TRANSFER, bank.clone())
}

fn router(database: Database, bank: Bank, idempotency: IdempotencyLayer) -> Router {
    let payments = Router::new().route("/payments", post(pay)).with_state((database, bank));
    payments.layer(idempotency.required()).layer(middleware::from_fn(authenticate))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn StdError>> {
    tracing_subscriber::fmt().init();
    let url = std::env::var("DATABASE_URL").unwrap_or("sqlite://example-payments.sqlite?mode=rwc".to_owned());
    let (database, idempotency) = Database::open(&url).await?;
    let (handle, bank) = (idempotency.handle(), Bank::default());
    handle.start_reconciler(reconciler(&bank).with_interval(LIMIT))?;
    println!("http://127.0.0.1:3000/payments waits for payments");
    // Ctrl-C, and what systemd and Kubernetes send.
    let mut terminate = signal::unix::signal(signal::unix::SignalKind::terminate())?;
    let stop = async move { tokio::select!(_ = signal::ctrl_c() => {}, _ = terminate.recv() => {}) };
    let server = axum::serve(TcpListener::bind("127.0.0.1:3000").await?, router(database, bank, idempotency));
    server.with_graceful_shutdown(stop).await?;
    // The server is closed, and requests whose client has gone may still be running.
    Ok(handle.drain(Duration::from_secs(30)).await?)
}

const TRANSFER: &str = "bank.transfer";
const LIMIT: Duration = Duration::from_secs(2);
const CREATE_TABLE: &str = "CREATE TABLE IF NOT EXISTS payments (transfer TEXT, cents BIGINT)";
const INSERT: &str = "INSERT INTO payments (transfer, cents) VALUES ($1, $2)";

#[cfg(test)]
mod tests {
    use super::*;
    use tower::ServiceExt;
    #[tokio::test]
    async fn retries_get_the_first_answer_and_a_lost_one_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}/test.sqlite?mode=rwc", folder.path().display());
        let ((database, idempotency), bank) = (Database::open(&url).await.unwrap(), Bank::default());
        let (handle, app) = (idempotency.handle(), router(database, bank.clone(), idempotency));
        for (iban, status) in [("DE02", 201), ("XX", 402), ("LOST", 409)] {
            assert_eq!(send(&app, iban).await, (status, false));
        }
        tokio::time::sleep(LIMIT * 2).await;
        handle.reconcile(&reconciler(&bank)).await.unwrap();
        assert_eq!(send(&app, "LOST").await, (201, false));
        for (iban, status) in [("DE02", 201), ("XX", 402), ("LOST", 201)] {
            assert_eq!(send(&app, iban).await, (status, true));
        }
        assert_eq!(bank.0.lock().await.len(), 2);
    }

    async fn send(app: &Router, iban: &str) -> (u16, bool) {
        let request = Request::post("/payments")
            .header("x-api-key", "acme-key")
            .header("idempotency-key", iban)
            .header("content-type", "application/json")
            .body(axum::body::Body::from(json!({"iban": iban, "cents": 1000}).to_string()));
        let response = app.clone().oneshot(request.unwrap()).await.unwrap();
        (response.status().as_u16(), response.headers().contains_key("idempotent-replayed"))
    }
}
