//! Applications on a database: those that one would write without the layer, and the same with it.

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::IntoResponse,
    routing::{get, post},
};
use tower_idempotency::Tx;

use crate::{
    Result,
    drive::KEYS,
    load::FIRST_NUMBER,
    serve::{charge, create_charge, layer, single_transaction},
};

/// The applications on one database. The SQL is that of both databases.
macro_rules! applications {
    ($module:ident, $Database:ty, begin: $begin:literal) => {
        pub mod $module {
            use super::*;

            type Pool = sqlx::Pool<$Database>;

            pub async fn application(role: &str, pool: Pool) -> Result<Router> {
                sqlx::query(TABLE).execute(&pool).await?;
                sqlx::query(CHARGES).execute(&pool).await?;
                let charges = |handler| Router::new().route("/charges", handler);
                let app = match role {
                    "hand" => charges(post(two_statements)),
                    "hand-tx" => charges(post(one_transaction)),
                    "select" => {
                        sqlx::query(FILL).bind(LAST_NUMBER).bind(charge(200)).execute(&pool).await?;
                        charges(post(select))
                    }
                    "layer" => {
                        let layer = layer(pool.clone());
                        let handle = layer.handle();
                        charges(post(create_charge)).layer(layer).route("/purge", get(|| purge(handle)))
                    }
                    "tx" => charges(post(with_tx)).layer(layer(pool.clone())),
                    "single" => charges(post(with_tx)).layer(single_transaction(pool.clone())),
                    _ => return Err(format!("no application {role} on a database").into()),
                };
                Ok(app.with_state(pool))
            }

            /// Inserts the key, then saves the response, each in a statement of its own.
            async fn two_statements(
                State(pool): State<Pool>,
                headers: HeaderMap,
                body: Bytes,
            ) -> Result<impl IntoResponse, Failed> {
                let key = key_of(&headers);
                if sqlx::query(CLAIM).bind(key).fetch_optional(&pool).await?.is_none() {
                    return Ok(StatusCode::CONFLICT.into_response());
                }
                let response = create_charge(body.clone()).await;
                sqlx::query(SAVE).bind(&body[..]).bind(key).execute(&pool).await?;
                Ok(response.into_response())
            }

            /// Inserts the key, inserts the charge, saves the response, all in one transaction.
            async fn one_transaction(
                State(pool): State<Pool>,
                headers: HeaderMap,
                body: Bytes,
            ) -> Result<impl IntoResponse, Failed> {
                let key = key_of(&headers);
                let mut tx = pool.begin_with($begin).await?;
                if sqlx::query(CLAIM).bind(key).fetch_optional(&mut *tx).await?.is_none() {
                    return Ok(StatusCode::CONFLICT.into_response());
                }
                sqlx::query(CHARGE).bind(key).execute(&mut *tx).await?;
                let response = create_charge(body.clone()).await;
                sqlx::query(SAVE).bind(&body[..]).bind(key).execute(&mut *tx).await?;
                tx.commit().await?;
                Ok(response.into_response())
            }

            /// Answers with what was saved under the key.
            async fn select(
                State(pool): State<Pool>,
                headers: HeaderMap,
                _body: Bytes,
            ) -> Result<impl IntoResponse, Failed> {
                let saved = sqlx::query_scalar::<_, Vec<u8>>(SELECT).bind(key_of(&headers));
                Ok(match saved.fetch_optional(&pool).await? {
                    Some(saved) => create_charge(saved.into()).await.into_response(),
                    None => StatusCode::NOT_FOUND.into_response(),
                })
            }

            async fn with_tx(
                headers: HeaderMap,
                mut tx: Tx<$Database>,
                body: Bytes,
            ) -> Result<impl IntoResponse, Failed> {
                sqlx::query(CHARGE).bind(key_of(&headers)).execute(&mut *tx).await?;
                Ok(create_charge(body).await)
            }
        }
    };
}

applications!(postgres, sqlx::Postgres, begin: "BEGIN");
applications!(sqlite, sqlx::Sqlite, begin: "BEGIN IMMEDIATE");

/// Purges what has expired, as the background task does it, until nothing is left or the client leaves.
async fn purge(handle: tower_idempotency::IdempotencyHandle) -> Result<String, Failed> {
    let mut purged = 0;
    loop {
        match handle.purge(1000).await? {
            0 => return Ok(purged.to_string()),
            more => purged += more,
        }
    }
}

/// An error of the database, answered with 500.
struct Failed(String);

impl<E: std::error::Error> From<E> for Failed {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> axum::response::Response {
        (StatusCode::INTERNAL_SERVER_ERROR, self.0).into_response()
    }
}

fn key_of(headers: &HeaderMap) -> &str {
    headers.get("idempotency-key").and_then(|key| key.to_str().ok()).unwrap_or_default()
}

const TABLE: &str = "CREATE TABLE IF NOT EXISTS by_hand (consumer text, key text, response bytea, PRIMARY KEY (consumer, key))";
const CLAIM: &str =
    "INSERT INTO by_hand (consumer, key) VALUES ('acme', $1) ON CONFLICT DO NOTHING RETURNING 1";
const SAVE: &str = "UPDATE by_hand SET response = $1 WHERE consumer = 'acme' AND key = $2";
const SELECT: &str = "SELECT response FROM by_hand WHERE consumer = 'acme' AND key = $1";
const CHARGES: &str = "CREATE TABLE IF NOT EXISTS charges (id text PRIMARY KEY, amount bigint NOT NULL)";
const CHARGE: &str = "INSERT INTO charges (id, amount) VALUES ($1, 2000)";
const FILL: &str = "
WITH RECURSIVE numbers (number) AS (
    SELECT 1000000000000000 UNION ALL SELECT number + 1 FROM numbers WHERE number < $1
)
INSERT INTO by_hand (consumer, key, response) SELECT 'acme', 'key-' || number, $2 FROM numbers";
const LAST_NUMBER: i64 = (FIRST_NUMBER + KEYS - 1) as i64;
