//! Replies of the store that are lost or come late.

use std::time::{Duration, Instant};

use axum::{Router, http::StatusCode, routing::post};
use sqlx::{Connection, PgConnection, Sqlite, postgres::PgPoolOptions};
use tokio::time::sleep;
use tower_idempotency::{
    Idempotency, IdempotencyLayer, IntentError, PostgresStore, RejectionCode, Resource, intent::Opened,
    store::ConnectionMode,
};

use crate::{
    hooked::{Hook, Hooked},
    phases::{Node, Site},
    support::{
        direct::{self, Answer},
        required_env,
        schema::Schema,
        served::Count,
    },
};

impl Node {
    async fn send_until_created(&self) -> Answer {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let answer = self.send().await;
            if answer.status == StatusCode::CREATED {
                return answer;
            }
            assert!(Instant::now() < deadline, "{answer:?}");
            sleep(Duration::from_millis(100)).await;
        }
    }
}

/// The reply of the opening is lost, and then the server is away for a moment.
#[tokio::test(flavor = "multi_thread")]
async fn an_opening_without_reply_is_withdrawn_whatever_comes_after_it() {
    let site = Site::<Sqlite>::open().await;
    let store = Hooked::new(&site.store).on_opening(Hook::LoseReply).on_opening(Hook::Fail);
    let calls = Count::default();
    let counter = calls.clone();
    let handler = async move |idempotency: Idempotency| {
        let call = async |_| {
            counter.add();
            Ok(Resource::new("ch_1"))
        };
        let made = idempotency.intent("charge").call(call).await?;
        Ok::<_, IntentError>((StatusCode::CREATED, made.id))
    };
    let layer = IdempotencyLayer::new(store);
    let router = Router::new().route("/charges", post(handler)).layer(layer.clone());
    let node = Node { router, handle: layer.handle() };
    node.send().await.assert_refused(RejectionCode::StoreUnavailable);
    assert_eq!(calls.get(), 0);
    let answer = node.send_until_created().await;
    assert_eq!((calls.get(), &answer.body[..]), (1, &b"ch_1"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_whose_reply_is_lost_is_recorded() {
    let site = Site::<Sqlite>::open().await;
    let store = Hooked::new(&site.store).on_settling(Hook::LoseReply);
    let handler = async move |idempotency: Idempotency| {
        let Opened::Call(open) = idempotency.intent("charge").open().await? else { panic!() };
        open.dead("card declined").await?;
        Ok::<_, IntentError>(StatusCode::PAYMENT_REQUIRED)
    };
    let router = Router::new().route("/charges", post(handler)).layer(IdempotencyLayer::new(store));
    let answer = direct::send(&router, direct::charge("key")).await;
    assert_eq!(answer.status, StatusCode::PAYMENT_REQUIRED, "{answer:?}");
}

/// Somebody has the record locked in a transaction of his own, in psql for example.
async fn lock_records(schema: &str, for_how_long: Duration) {
    let url = required_env("TEST_POSTGRES_URL");
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let lock = format!("BEGIN; SELECT 1 FROM \"{schema}\".idempotency_records FOR UPDATE");
    sqlx::raw_sql(sqlx::AssertSqlSafe(lock)).execute(&mut connection).await.unwrap();
    tokio::spawn(async move {
        sleep(for_how_long).await;
        sqlx::raw_sql("COMMIT").execute(&mut connection).await.unwrap();
    });
}

/// Behind a transaction pooler no time-out of the server ends a statement that nobody waits for any more.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn an_opening_that_is_carried_out_late_is_withdrawn() {
    let schema = Schema::create().await;
    let pool = PgPoolOptions::new().max_connections(4);
    let store = PostgresStore::new(pool.connect_lazy(&required_env("TEST_PGBOUNCER_URL")).unwrap())
        .with_schema(&schema.name)
        .unwrap()
        .with_connection_mode(ConnectionMode::TransactionPooler)
        .with_statement_timeout(Duration::from_secs(1));
    let (calls, runs) = (Count::default(), Count::default());
    let (counter, name) = (calls.clone(), schema.name.clone());
    let handler = async move |idempotency: Idempotency| {
        if runs.add() == 1 {
            lock_records(&name, Duration::from_secs(5)).await;
        }
        let call = async |_| {
            counter.add();
            Ok(Resource::new("ch_1"))
        };
        let made = idempotency.intent("charge").call(call).await?;
        Ok::<_, IntentError>((StatusCode::CREATED, made.id))
    };
    let layer = IdempotencyLayer::new(store).with_store_timeout(Duration::from_millis(500));
    let router = Router::new().route("/charges", post(handler)).layer(layer.clone());
    let node = Node { router, handle: layer.handle() };
    node.send().await.assert_refused(RejectionCode::StoreUnavailable);
    assert_eq!(calls.get(), 0);
    node.send_until_created().await;
    assert_eq!(calls.get(), 1);
}
