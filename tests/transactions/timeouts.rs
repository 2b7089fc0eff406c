//! Time-outs inside the layer, which cancel what the handler was doing.

use std::time::{Duration, Instant};

use axum::{extract::Request, http::StatusCode, response::IntoResponse};
use sqlx::Postgres;
use tokio::time::{sleep, timeout};
use tower_http::timeout::TimeoutLayer;
use tower_idempotency::{RejectionCode, Tx};

use crate::bank::{Bank, Db, End, Gate, charge, charge_once, on_both_stores, unique, with_both_strategies};

// The strategy of a single transaction has none of this.
on_both_stores!(a_time_out_while_the_transaction_begins_leaves_nothing);

with_both_strategies!(
    a_time_out_during_a_statement_leaves_nothing,
    a_statement_that_is_cancelled_by_the_handler_itself_does_not_break_the_transaction,
);

async fn a_time_out_while_the_transaction_begins_leaves_nothing<DB: Db>(bank: Bank<DB>) {
    let bank = bank.with_connections(1);
    let [claimed, holding] = [Gate::new(), Gate::new()];
    let passed = claimed.clone();
    let handler = move |request: Request| async move {
        passed.pass().await;
        match timeout(TIMEOUT, Tx::<DB>::begin(request.extensions())).await {
            Ok(begun) => charge_once(begun.unwrap()).await,
            Err(_) => StatusCode::REQUEST_TIMEOUT.into_response(),
        }
    };
    let node = bank.node(bank.layer(), handler);
    let answer = node.start("k");
    claimed.entered().await;
    let held = holding.clone();
    let other = bank.node(bank.layer(), move |tx: Tx<DB>| async move {
        held.pass().await;
        charge_once(tx).await
    });
    let first = other.start("other");
    holding.entered().await;
    claimed.open();
    let answer = timeout(TIMEOUT + Duration::from_secs(1), answer).await.expect("a prompt answer").unwrap();
    assert_eq!((answer.status, answer.rejection), (StatusCode::REQUEST_TIMEOUT, None));
    node.send("k").await.assert_refused(RejectionCode::InProgress);
    holding.open();
    assert_eq!(first.await.unwrap().status, StatusCode::CREATED);
    timeout(Duration::from_secs(2), node.until("k", End::Released)).await.expect("it is released soon");
    assert_eq!(bank.charges().await, 1);
    assert_eq!(node.send("k").await.status, StatusCode::CREATED);
    assert_eq!((bank.charges().await, node.runs.get()), (2, 2));
}

async fn a_time_out_during_a_statement_leaves_nothing<DB: Db>(bank: Bank<DB>) {
    let handler = |mut tx: Tx<DB>| async move {
        charge(&mut tx).await;
        DB::run(&mut tx, DB::SLOW).await.unwrap();
        StatusCode::CREATED
    };
    let time_out = TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, TIMEOUT);
    let node = bank.node_with(bank.layer(), handler, |router| router.layer(time_out));
    let started = Instant::now();
    let answer = node.send("k").await;
    assert!(started.elapsed() < TIMEOUT + Duration::from_secs(1), "{:?}", started.elapsed());
    assert_eq!((answer.status, answer.rejection), (StatusCode::REQUEST_TIMEOUT, None));
    assert_eq!(node.send_until_ended("k").await.status, StatusCode::CREATED);
    assert_eq!((bank.charges().await, node.runs.get()), (1, 2));
}

async fn a_statement_that_is_cancelled_by_the_handler_itself_does_not_break_the_transaction<DB: Db>(
    bank: Bank<DB>,
) {
    let handler = |mut tx: Tx<DB>| async move {
        charge(&mut tx).await;
        timeout(TIMEOUT, DB::run(&mut tx, DB::SLOW)).await.unwrap_err();
        charge(&mut tx).await;
        unique(StatusCode::CREATED)
    };
    bank.check(&bank.node(bank.layer(), handler), 201, 2, End::Stored).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_time_out_inside_the_layer_does_not_reach_a_slow_commit() {
    let bank = Bank::<Postgres>::open().await;
    bank.run(
        "CREATE FUNCTION dawdle() RETURNS trigger AS $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$ LANGUAGE plpgsql;
        CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON charges DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION dawdle()",
    )
    .await;
    let time_out = TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, TIMEOUT);
    let node = bank.node_with(bank.layer(), charge_once::<Postgres>, |router| router.layer(time_out));
    let started = Instant::now();
    let answer = node.send("k").await;
    assert!(started.elapsed() >= Duration::from_secs(1), "COMMIT is slow");
    assert_eq!((answer.status, bank.charges().await), (StatusCode::CREATED, 1));
    answer.assert_same_replay(&node.send("k").await);

    // Nor does a client that leaves.
    let client = node.start("left");
    while bank.number("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'").await == 0 {
        sleep(Duration::from_millis(10)).await;
    }
    client.abort();
    node.until("left", End::Stored).await;
    assert_eq!(bank.charges().await, 2);
}

const TIMEOUT: Duration = Duration::from_millis(300);
