//! Transactions that the handler does not give back.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    body::Body,
    http::{Response, StatusCode},
};
use sqlx::{Postgres, Sqlite};
use tokio_stream::StreamExt;
use tower_idempotency::{RejectionCode, Tx};

use crate::bank::{Bank, Db, End, Gate, at_once, charge, charge_once, with_both_strategies};

with_both_strategies!(
    a_transaction_in_a_task_is_rolled_back,
    a_response_may_write_until_its_end,
    a_response_that_is_too_large_may_not_have_the_transaction,
);

async fn a_transaction_in_a_task_is_rolled_back<DB: Db>(bank: Bank<DB>) {
    let (gate, (sender, ended)) = (Gate::new(), tokio::sync::oneshot::channel());
    let (passed, sender) = (gate.clone(), Arc::new(Mutex::new(Some(sender))));
    let handler = move |mut tx: Tx<DB>| async move {
        charge(&mut tx).await;
        tokio::spawn(async move {
            passed.pass().await;
            let _ = DB::run(&mut tx, crate::bank::CHARGE).await;
            drop(tx);
            sender.lock().unwrap().take().unwrap().send(()).unwrap();
        });
        StatusCode::CREATED
    };
    let node = bank.node(bank.layer(), handler);
    let answer = at_once(node.send("k")).await;
    answer.assert_refused(RejectionCode::TransactionInUse);
    assert_eq!(answer.problem()["retryable"], true);
    gate.open();
    ended.await.unwrap();
    node.until("k", End::Released).await;
    assert_eq!(bank.charges().await, 0);
    assert_eq!(node.send("k").await.status, StatusCode::CREATED);
    assert_eq!((bank.charges().await, node.runs.get()), (1, 2));
}

async fn a_response_may_write_until_its_end<DB: Db>(bank: Bank<DB>) {
    let node = bank.node(bank.layer(), |tx: Tx<DB>| async move { writing(tx, 3) });
    bank.check(&node, 200, 3, End::Stored).await;
}

async fn a_response_that_is_too_large_may_not_have_the_transaction<DB: Db>(bank: Bank<DB>) {
    let layer = bank.layer().with_response_body_limit(20);
    let node = bank.node(layer, |tx: Tx<DB>| async move { writing(tx, 30) });
    bank.check(&node, RejectionCode::TransactionInUse, 0, End::Released).await;
}

/// A body that makes a charge with each of its pieces.
fn writing<DB: Db>(tx: Tx<DB>, pieces: usize) -> Response<Body> {
    let tx = Arc::new(tokio::sync::Mutex::new(tx));
    let pieces = tokio_stream::iter(0..pieces).then(move |_| {
        let tx = Arc::clone(&tx);
        async move {
            charge(&mut *tx.lock().await).await;
            Ok::<_, Infallible>("charged ")
        }
    });
    Response::new(Body::from_stream(pieces))
}

/// Where a handler leaves its transaction.
type Static<DB> = Arc<Mutex<Option<Tx<DB>>>>;

async fn keep<DB: Db>(mut tx: Tx<DB>, place: Static<DB>) -> StatusCode {
    charge(&mut tx).await;
    DB::run(&mut tx, "UPDATE accounts SET balance = 0 WHERE id = 1").await.unwrap();
    *place.lock().unwrap() = Some(tx);
    StatusCode::CREATED
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_transaction_in_a_static_does_not_keep_its_locks_postgres() {
    let bank = Bank::<Postgres>::open().await;
    let place = Static::default();
    let kept = Arc::clone(&place);
    let node = bank.node(bank.layer(), move |tx: Tx<Postgres>| keep(tx, kept));
    at_once(node.send("k")).await.assert_refused(RejectionCode::TransactionInUse);
    at_once(bank.run("UPDATE accounts SET balance = balance - 1 WHERE id = 1")).await;
    assert_eq!(node.send_until_ended("k").await.status, StatusCode::CREATED);
    assert_eq!((bank.charges().await, node.runs.get()), (1, 2));
    let mut tx = place.lock().unwrap().take().unwrap();
    Postgres::run(&mut tx, crate::bank::CHARGE).await.unwrap_err();
    drop(tx);
    bank.check(&bank.node(bank.layer(), charge_once::<Postgres>), 201, 1, End::Stored).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_in_a_static_stops_writers_until_it_is_dropped_sqlite() {
    let bank = Bank::<Sqlite>::open().await;
    let place = Static::default();
    let kept = Arc::clone(&place);
    let layer = bank.layer().with_store_timeout(Duration::from_millis(300));
    let node = bank.node(layer, move |tx: Tx<Sqlite>| keep(tx, kept));
    at_once(node.send("k")).await.assert_refused(RejectionCode::TransactionInUse);
    at_once(node.send("k")).await.assert_refused(RejectionCode::InProgress);
    at_once(node.send("other")).await.assert_refused(RejectionCode::StoreUnavailable);
    drop(place.lock().unwrap().take());
    node.until("k", End::Released).await;
    assert_eq!(node.send("k").await.status, StatusCode::CREATED);
    assert_eq!(node.send_until_ended("other").await.status, StatusCode::CREATED);
    assert_eq!((bank.charges().await, node.runs.get()), (2, 3));
}
