//! Payouts, in three steps that an attempt may die between: a phase writes the payout down as `pending`; an intent has the
//! bank make the transfer; and the request's transaction sets it to `paid`, together with the response. The next attempt
//! goes through all of them again: what is finished is not repeated, and gives the result that it gave.

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
use sqlx::{PgConnection, SqliteConnection};
use tower_idempotency::{Consumer, Idempotency, IntentError, Reconciler, Resource, TxError};
use uuid::Uuid;

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
    id: String,
    /// `pending`, `paid` or `refused`.
    state: String,
    transfer: Option<String>,
    recipient: String,
    amount: i64,
    consumer: String,
}

#[derive(Deserialize)]
struct Wish {
    upstream: Option<String>,
}

/// Runs a phase in whichever database it is: the SQL is the same for both, the types are not.
macro_rules! phase {
    ($database:expr, $idempotency:expr, $name:literal, |$tx:ident| $step:expr) => {
        match $database {
            Charges::Sqlite(_) => $idempotency.phase($name, async |$tx: &mut SqliteConnection| $step).await,
            Charges::Postgres(_) => $idempotency.phase($name, async |$tx: &mut PgConnection| $step).await,
        }
    };
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
        Reconciler::new()
            .on("bank.transfer", self.bank.clone())
            .with_interval(self.timeout)
            .with_confirmation_after(self.timeout)
    }

    /// Writes the payout down before anybody is asked to pay. Returns its id: every attempt gets that of the first.
    async fn reserve(&self, idempotency: &Idempotency, new: &NewPayout) -> Result<String, TxError> {
        phase!(&self.database, idempotency, "reserve", |tx| {
            let id = Uuid::now_v7().to_string();
            sqlx::query(RESERVE)
                .bind(&id)
                .bind(&new.recipient)
                .bind(i64::from(new.amount))
                .bind(idempotency.consumer().as_str())
                .execute(tx)
                .await?;
            Ok(id)
        })
    }

    /// The bank gets the same key from every attempt of the request, and is not called again once it has answered.
    async fn transfer(
        &self,
        idempotency: &Idempotency,
        id: &str,
        new: &NewPayout,
        wish: &Wish,
    ) -> Result<Resource, IntentError> {
        let order = format!("{} to {}", new.amount, new.recipient);
        let intent = idempotency
            .intent("bank.transfer")
            .with_arguments(new)
            .with_subject(id)
            .with_timeout(self.timeout)
            .with_grace(self.timeout * 2);
        intent.call(async |key| self.bank.transfer(key, order, wish.upstream.as_deref()).await).await
    }

    /// A phase, which stays whatever the response is: what is written through `Tx` is rolled back with a 4xx.
    async fn refuse(&self, idempotency: &Idempotency, id: &str) -> Result<(), TxError> {
        phase!(&self.database, idempotency, "refuse", |tx| {
            sqlx::query(REFUSE).bind(id).execute(tx).await?;
            Ok(())
        })
    }
}

async fn create_payout(
    State(payouts): State<Payouts>,
    Query(wish): Query<Wish>,
    idempotency: Idempotency,
    extensions: Extensions,
    body: Bytes,
) -> axum::response::Result<Response> {
    let new: NewPayout = serde_json::from_slice(&body)
        .map_err(|error| Problem(StatusCode::BAD_REQUEST, format!("the body is no payout: {error}")))?;

    let id = payouts.reserve(&idempotency, &new).await?;
    let transfer = match payouts.transfer(&idempotency, &id, &new, &wish).await {
        Err(refused @ IntentError::Refused(_)) => {
            payouts.refuse(&idempotency, &id).await?;
            return Err(refused.into());
        }
        // After any other error nothing is decided: it stays pending until a later attempt knows more.
        called => called?,
    };
    // After the call: nobody waits for the bank with a transaction open.
    let payout = payouts.database.begin(&extensions).await?.pay(&id, &transfer.id).await?;
    Ok((StatusCode::CREATED, Json(payout)).into_response())
}

async fn list_payouts(
    State(payouts): State<Payouts>,
    Extension(consumer): Extension<Consumer>,
) -> Result<Json<Vec<Payout>>, Problem> {
    Ok(Json(payouts.database.list_payouts(&consumer).await?))
}

impl ChargeTx {
    async fn pay(&mut self, id: &str, transfer: &str) -> Result<Payout, TxError> {
        let row: Row =
            on!(self, tx => sqlx::query_as(PAY).bind(id).bind(transfer).fetch_one(&mut **tx).await)?;
        Ok(row.into())
    }
}

impl Charges {
    async fn list_payouts(&self, consumer: &Consumer) -> sqlx::Result<Vec<Payout>> {
        let consumer = consumer.as_str();
        let rows: Vec<Row> = on!(self, pool => sqlx::query_as(LIST).bind(consumer).fetch_all(pool).await)?;
        Ok(rows.into_iter().map(Payout::from).collect())
    }
}

type Row = (String, String, Option<String>, String, i64, String);

impl From<Row> for Payout {
    fn from((id, state, transfer, recipient, amount, consumer): Row) -> Self {
        Self { id, state, transfer, recipient, amount, consumer }
    }
}

const CREATE_TABLE: &str = "
    CREATE TABLE IF NOT EXISTS payouts (
        id TEXT PRIMARY KEY,
        state TEXT NOT NULL,
        transfer TEXT,
        recipient TEXT NOT NULL,
        amount BIGINT NOT NULL,
        consumer TEXT NOT NULL
    )";

const RESERVE: &str = "
    INSERT INTO payouts (id, state, recipient, amount, consumer) VALUES ($1, 'pending', $2, $3, $4)";

const PAY: &str = "
    UPDATE payouts SET state = 'paid', transfer = $2 WHERE id = $1
    RETURNING id, state, transfer, recipient, amount, consumer";

const REFUSE: &str = "UPDATE payouts SET state = 'refused' WHERE id = $1";

const LIST: &str = "
    SELECT id, state, transfer, recipient, amount, consumer
    FROM payouts WHERE consumer = $1 ORDER BY id";
