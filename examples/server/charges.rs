//! The table of charges, in either database.

use std::{
    error::Error,
    str::FromStr,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::http::Extensions;
use serde::Serialize;
use sqlx::{
    AssertSqlSafe, PgPool, Postgres, Sqlite, SqlitePool,
    postgres::PgPoolOptions,
    sqlite::{SqliteConnectOptions, SqliteJournalMode},
};
use tower_idempotency::{Consumer, Tx, TxError};
use uuid::Uuid;

#[derive(Serialize)]
pub(crate) struct Charge {
    pub(crate) id: String,
    amount: i64,
    currency: String,
    description: Option<String>,
    consumer: String,
    /// In seconds since 1970.
    created_at: i64,
}

impl Charge {
    pub(crate) fn new(
        consumer: &Consumer,
        amount: i64,
        currency: String,
        description: Option<String>,
    ) -> Self {
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
    pub(crate) async fn list(&self, consumer: &Consumer) -> sqlx::Result<Vec<Charge>> {
        let consumer = consumer.as_str();
        let rows: Vec<Row> = on!(self, pool => sqlx::query_as(LIST).bind(consumer).fetch_all(pool).await)?;
        Ok(rows.into_iter().map(Charge::from).collect())
    }

    /// A charge, if it is this consumer's.
    pub(crate) async fn find(&self, consumer: &Consumer, id: &str) -> sqlx::Result<Option<Charge>> {
        let consumer = consumer.as_str();
        let row: Option<Row> =
            on!(self, pool => sqlx::query_as(FIND).bind(consumer).bind(id).fetch_optional(pool).await)?;
        Ok(row.map(Charge::from))
    }
}

impl ChargeTx {
    /// A failure is one of the transaction: the response says so, and that a retry makes sense.
    pub(crate) async fn insert(&mut self, charge: &Charge) -> Result<(), TxError> {
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
