//! Charges: one is written down through the request's transaction, in either database.

use std::{
    error::Error,
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Extension, Path, Query, State},
    http::{Extensions, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use sqlx::{
    AssertSqlSafe, PgPool, Postgres, Sqlite, SqlitePool,
    postgres::PgPoolOptions,
    sqlite::{SqliteConnectOptions, SqliteJournalMode},
};
use tower_idempotency::{Consumer, Tx, TxError};
use uuid::Uuid;

use crate::Problem;

#[derive(Serialize)]
struct Charge {
    id: String,
    amount: i64,
    currency: String,
    description: Option<String>,
    consumer: String,
    /// In seconds since 1970.
    created_at: i64,
}

impl Charge {
    fn new(consumer: &Consumer, amount: i64, currency: String, description: Option<String>) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Self {
            // Ids of this version sort by the time they were made.
            id: Uuid::now_v7().to_string(),
            amount,
            currency,
            description,
            consumer: consumer.to_string(),
            created_at: i64::try_from(now).unwrap_or(i64::MAX),
        }
    }
}

#[derive(Deserialize)]
struct NewCharge {
    amount: i64,
    currency: String,
    description: Option<String>,
}

impl NewCharge {
    fn parse(body: &[u8]) -> Result<Self, Problem> {
        let new: Self = serde_json::from_slice(body)
            .map_err(|error| Problem(StatusCode::BAD_REQUEST, format!("the body is no charge: {error}")))?;
        if new.amount <= 0 {
            return Err(Problem(StatusCode::UNPROCESSABLE_ENTITY, "amount must be positive".to_owned()));
        }
        if !CURRENCIES.contains(&new.currency.as_str()) {
            let detail = format!("currency must be one of {}", CURRENCIES.join(", "));
            return Err(Problem(StatusCode::UNPROCESSABLE_ENTITY, detail));
        }
        Ok(new)
    }
}

#[derive(Deserialize)]
struct Behaviour {
    #[serde(default)]
    delay_ms: u64,
    simulate: Option<Simulate>,
}

#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Simulate {
    Panic,
    #[serde(rename = "402")]
    Declined,
    #[serde(rename = "500")]
    InternalError,
    #[serde(rename = "503")]
    Unavailable,
}

async fn create_charge(
    State(charges): State<Charges>,
    Extension(consumer): Extension<Consumer>,
    Query(behaviour): Query<Behaviour>,
    extensions: Extensions,
    body: Bytes,
) -> axum::response::Result<Response> {
    let NewCharge { amount, currency, description } = NewCharge::parse(&body)?;
    if behaviour.simulate == Some(Simulate::Declined) {
        return Err(Problem(StatusCode::PAYMENT_REQUIRED, "the card was declined".to_owned()).into());
    }

    let charge = Charge::new(&consumer, amount, currency, description);
    let mut tx = charges.begin(&extensions).await?;
    tx.insert(&charge).await?;
    tokio::time::sleep(Duration::from_millis(behaviour.delay_ms).min(MAX_DELAY)).await;

    match behaviour.simulate {
        Some(Simulate::Panic) => panic!("simulated"),
        Some(Simulate::InternalError) => {
            Err(Problem(StatusCode::INTERNAL_SERVER_ERROR, "simulated".to_owned()).into())
        }
        Some(Simulate::Unavailable) => {
            Err(Problem(StatusCode::SERVICE_UNAVAILABLE, "simulated".to_owned()).into())
        }
        Some(Simulate::Declined) | None => {
            let location = [(header::LOCATION, format!("/charges/{}", charge.id))];
            Ok((StatusCode::CREATED, location, with_etag(charge)).into_response())
        }
    }
}

async fn list_charges(
    State(charges): State<Charges>,
    Extension(consumer): Extension<Consumer>,
) -> Result<Json<Vec<Charge>>, Problem> {
    Ok(Json(charges.list(&consumer).await?))
}

async fn show_charge(
    State(charges): State<Charges>,
    Extension(consumer): Extension<Consumer>,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    match charges.find(&consumer, &id).await? {
        Some(charge) => Ok(with_etag(charge).into_response()),
        None => Err(Problem(StatusCode::NOT_FOUND, "no such charge".to_owned())),
    }
}

/// A charge never changes, so its id is as good a tag as any.
fn with_etag(charge: Charge) -> impl IntoResponse {
    ([(header::ETAG, format!("\"{}\"", charge.id))], Json(charge))
}

#[derive(Clone)]
pub(crate) enum Charges {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

/// The transaction in which a request's charge and its response are committed together.
pub(crate) enum ChargeTx {
    Sqlite(Tx<Sqlite>),
    Postgres(Tx<Postgres>),
}

/// Evaluates the expression for whichever database it is: the SQL is the same for both, the types are not.
macro_rules! on {
    ($either:expr, $database:ident => $query:expr) => {
        match $either {
            Self::Sqlite($database) => $query,
            Self::Postgres($database) => $query,
        }
    };
}
pub(crate) use on;

impl Charges {
    /// Connects, and creates the table if it is missing.
    pub(crate) async fn open(url: &str) -> Result<Self, Box<dyn Error>> {
        let charges = match url.split_once(':') {
            Some(("sqlite", _)) => {
                let options = SqliteConnectOptions::from_str(url)?
                    .create_if_missing(true)
                    .journal_mode(SqliteJournalMode::Wal)
                    .busy_timeout(Duration::from_secs(5));
                Self::Sqlite(SqlitePool::connect_with(options).await?)
            }
            Some(("postgres" | "postgresql", _)) => {
                let options = PgPoolOptions::new().acquire_timeout(Duration::from_secs(5));
                Self::Postgres(options.connect(url).await?)
            }
            _ => {
                return Err("DATABASE_URL must begin with sqlite: or postgres:".into());
            }
        };
        charges.create(CREATE_TABLE).await?;
        Ok(charges)
    }

    pub(crate) fn router<S>(self) -> Router<S> {
        Router::new()
            .route("/charges", post(create_charge).get(list_charges))
            .route("/charges/{id}", get(show_charge))
            .with_state(self)
    }

    /// Runs this, which creates a table if it is missing.
    pub(crate) async fn create(&self, table: &str) -> sqlx::Result<()> {
        match self {
            Self::Sqlite(pool) => sqlx::raw_sql(AssertSqlSafe(table)).execute(pool).await.map(drop),
            // Two servers that start at once would both find no table; the lock lets one go first.
            Self::Postgres(pool) => {
                let create = format!("SELECT pg_advisory_xact_lock(1); {table}");
                sqlx::raw_sql(AssertSqlSafe(create)).execute(pool).await.map(drop)
            }
        }
    }

    /// Begins the transaction of the request with these extensions.
    pub(crate) async fn begin(&self, extensions: &Extensions) -> Result<ChargeTx, TxError> {
        Ok(match self {
            Self::Sqlite(_) => ChargeTx::Sqlite(Tx::begin(extensions).await?),
            Self::Postgres(_) => ChargeTx::Postgres(Tx::begin(extensions).await?),
        })
    }

    /// A consumer's charges, the newest first.
    async fn list(&self, consumer: &Consumer) -> sqlx::Result<Vec<Charge>> {
        let consumer = consumer.as_str();
        let rows: Vec<Row> = on!(self, pool => sqlx::query_as(LIST).bind(consumer).fetch_all(pool).await)?;
        Ok(rows.into_iter().map(Charge::from).collect())
    }

    /// A charge, if it is this consumer's.
    async fn find(&self, consumer: &Consumer, id: &str) -> sqlx::Result<Option<Charge>> {
        let consumer = consumer.as_str();
        let row: Option<Row> =
            on!(self, pool => sqlx::query_as(FIND).bind(consumer).bind(id).fetch_optional(pool).await)?;
        Ok(row.map(Charge::from))
    }
}

impl ChargeTx {
    /// A failure is one of the transaction: the response says so, and that a retry makes sense.
    async fn insert(&mut self, charge: &Charge) -> Result<(), TxError> {
        let inserted = on!(self, tx => sqlx::query(INSERT)
            .bind(&charge.id)
            .bind(charge.amount)
            .bind(&charge.currency)
            .bind(&charge.description)
            .bind(&charge.consumer)
            .bind(charge.created_at)
            .execute(&mut **tx)
            .await
            .map(drop));
        Ok(inserted?)
    }
}

type Row = (String, i64, String, Option<String>, String, i64);

impl From<Row> for Charge {
    fn from((id, amount, currency, description, consumer, created_at): Row) -> Self {
        Self { id, amount, currency, description, consumer, created_at }
    }
}

const CURRENCIES: [&str; 5] = ["chf", "eur", "gbp", "jpy", "usd"];
const MAX_DELAY: Duration = Duration::from_secs(120);

const CREATE_TABLE: &str = "
    CREATE TABLE IF NOT EXISTS charges (
        id TEXT PRIMARY KEY,
        amount BIGINT NOT NULL,
        currency TEXT NOT NULL,
        description TEXT,
        consumer TEXT NOT NULL,
        created_at BIGINT NOT NULL
    )";

const INSERT: &str = "
    INSERT INTO charges (id, amount, currency, description, consumer, created_at)
    VALUES ($1, $2, $3, $4, $5, $6)";

const LIST: &str = "
    SELECT id, amount, currency, description, consumer, created_at
    FROM charges WHERE consumer = $1 ORDER BY id DESC";

const FIND: &str = "
    SELECT id, amount, currency, description, consumer, created_at
    FROM charges WHERE consumer = $1 AND id = $2";
