//! Payouts: a bank is called through an intent, and then the payout is written down through the request's transaction.

use std::time::Duration;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Extension, Query, State},
    http::{Extensions, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use serde::{Deserialize, Serialize};
use tower_idempotency::{Consumer, Idempotency, Intent, Reconciler, Resource, TxError};

use crate::{
    Problem,
    bank::Bank,
    charges::{ChargeTx, Charges, on},
};

/// Where payouts are written down, and the bank that makes them.
#[derive(Clone)]
pub(crate) struct Payouts {
    database: Charges,
    bank: Bank,
    timeout: Duration,
}

/// What a client asks for.
#[derive(Deserialize, Serialize)]
struct NewPayout {
    recipient: String,
    amount: u32,
}

#[derive(Serialize)]
struct Payout {
    transfer: String,
    recipient: String,
    amount: i64,
    consumer: String,
}

#[derive(Deserialize)]
struct Wish {
    upstream: Option<String>,
}

impl Payouts {
    /// Creates the table if it is missing.
    pub(crate) async fn open(database: Charges, bank: Bank, timeout: Duration) -> sqlx::Result<Self> {
        database.create(CREATE_TABLE).await?;
        Ok(Self { database, bank, timeout })
    }

    pub(crate) fn bank_url(&self) -> &str {
        self.bank.url()
    }

    pub(crate) fn router<S>(self) -> Router<S> {
        Router::new().route("/payouts", post(create_payout).get(list_payouts)).with_state(self)
    }

    /// Asks the bank what became of transfers whose outcome is unknown.
    pub(crate) fn reconciler(&self) -> Reconciler {
        let bank = self.bank.clone();
        let look_up = move |intent: Intent| {
            let bank = bank.clone();
            async move { bank.find(&intent).await }
        };
        Reconciler::new(look_up).with_interval(self.timeout).with_confirmation_after(self.timeout)
    }

    /// The bank gets the same key from every attempt of the request, and is not called again once it has answered.
    async fn transfer(
        &self,
        idempotency: &Idempotency,
        new: &NewPayout,
        wish: &Wish,
    ) -> axum::response::Result<Resource> {
        let order = format!("{} to {}", new.amount, new.recipient);
        let intent = idempotency
            .intent("bank.transfer")
            .with_arguments(new)
            .with_subject(&new.recipient)
            .with_timeout(self.timeout)
            .with_grace(self.timeout * 2);
        Ok(intent.call(async |key| self.bank.transfer(key, order, wish.upstream.as_deref()).await).await?)
    }
}

async fn create_payout(
    State(payouts): State<Payouts>,
    Extension(consumer): Extension<Consumer>,
    Query(wish): Query<Wish>,
    idempotency: Idempotency,
    extensions: Extensions,
    body: Bytes,
) -> axum::response::Result<Response> {
    let new: NewPayout = serde_json::from_slice(&body)
        .map_err(|error| Problem(StatusCode::BAD_REQUEST, format!("the body is no payout: {error}")))?;
    let transfer = payouts.transfer(&idempotency, &new, &wish).await?;
    let payout = Payout {
        transfer: transfer.id,
        recipient: new.recipient,
        amount: new.amount.into(),
        consumer: consumer.to_string(),
    };
    // After the call: nobody waits for the bank with a transaction open.
    payouts.database.begin(&extensions).await?.insert_payout(&payout).await?;
    Ok((StatusCode::CREATED, Json(payout)).into_response())
}

async fn list_payouts(
    State(payouts): State<Payouts>,
    Extension(consumer): Extension<Consumer>,
) -> Result<Json<Vec<Payout>>, Problem> {
    Ok(Json(payouts.database.list_payouts(&consumer).await?))
}

impl ChargeTx {
    async fn insert_payout(&mut self, payout: &Payout) -> Result<(), TxError> {
        let inserted = on!(self, tx => sqlx::query(INSERT)
            .bind(&payout.transfer)
            .bind(&payout.recipient)
            .bind(payout.amount)
            .bind(&payout.consumer)
            .execute(&mut **tx)
            .await
            .map(drop));
        Ok(inserted?)
    }
}

impl Charges {
    async fn list_payouts(&self, consumer: &Consumer) -> sqlx::Result<Vec<Payout>> {
        let consumer = consumer.as_str();
        let rows: Vec<Row> = on!(self, pool => sqlx::query_as(LIST).bind(consumer).fetch_all(pool).await)?;
        Ok(rows.into_iter().map(Payout::from).collect())
    }
}

type Row = (String, String, i64, String);

impl From<Row> for Payout {
    fn from((transfer, recipient, amount, consumer): Row) -> Self {
        Self { transfer, recipient, amount, consumer }
    }
}

const CREATE_TABLE: &str = "
    CREATE TABLE IF NOT EXISTS payouts (
        transfer TEXT NOT NULL,
        recipient TEXT NOT NULL,
        amount BIGINT NOT NULL,
        consumer TEXT NOT NULL
    )";

const INSERT: &str = "INSERT INTO payouts (transfer, recipient, amount, consumer) VALUES ($1, $2, $3, $4)";
const LIST: &str =
    "SELECT transfer, recipient, amount, consumer FROM payouts WHERE consumer = $1 ORDER BY transfer";
