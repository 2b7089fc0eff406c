//! Ends of transactions that outlive their lease, or whose last statement nobody waited for.

use std::time::Duration;

use axum::{extract::Request, http::StatusCode, response::IntoResponse};
use sqlx::{Connection, Postgres, Sqlite};
use tokio::time::{sleep, timeout};
use tower_idempotency::{Directive, RejectionCode, TransactionOptions, Tx};

use crate::bank::{Bank, CHARGE, Db, End, LONG, charge, charge_once, unique};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn nobody_takes_a_record_over_between_its_transaction_and_its_end() {
    for _ in 0..3 {
        outlive_the_lease(StatusCode::OK, Some(Directive::Hold), End::Held).await;
        outlive_the_lease(StatusCode::UNPROCESSABLE_ENTITY, None, End::Stored).await;
    }
}

/// A handler whose transaction is open for longer than its lease, and a neighbour to which the same request is sent again
/// and again.
async fn outlive_the_lease(status: StatusCode, directive: Option<Directive>, end: End) {
    let bank = Bank::<Postgres>::open().await;
    let options = TransactionOptions::default().with_idle_timeout(LONG);
    let layer = || bank.layer().with_lease(Duration::from_secs(1)).with_transactions(options.clone());
    let handler = move |mut tx: Tx<Postgres>| async move {
        charge(&mut tx).await;
        sleep(Duration::from_millis(1500)).await;
        let mut response = unique(status);
        if let Some(directive) = directive {
            response.extensions_mut().insert(directive);
        }
        response
    };
    let node = bank.node(layer(), handler);
    let neighbour = bank.node(layer(), charge_once::<Postgres>);
    let first = node.start("k");
    while node.runs.get() == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    while !first.is_finished() {
        neighbour.send("k").await;
    }
    assert_eq!((first.await.unwrap().status, node.end("k").await), (status, Some(end)));
    assert_eq!((neighbour.runs.get(), bank.charges().await), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_handler_that_commits_and_is_cut_off_in_a_statement_does_not_run_again() {
    for (statement, limit) in [("SELECT 1 / 0", Duration::ZERO), (Postgres::SLOW, Duration::from_millis(200))]
    {
        let bank = Bank::<Postgres>::open().await;
        let handler = move |mut tx: Tx<Postgres>| async move {
            charge(&mut tx).await;
            Postgres::run(&mut tx, "COMMIT").await.unwrap();
            // The statement is sent, and its answer is not awaited.
            let _ = timeout(limit, Postgres::run(&mut tx, statement)).await;
            unique(StatusCode::INTERNAL_SERVER_ERROR)
        };
        let node = bank.node(bank.layer(), handler);
        assert_eq!(node.send("k").await.status, StatusCode::INTERNAL_SERVER_ERROR);
        node.until("k", End::Held).await;
        node.send("k").await.assert_refused(RejectionCode::OutcomeUnknown);
        assert_eq!((node.runs.get(), bank.charges().await), (1, 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_savepoint_that_is_released_without_waiting_holds_no_key() {
    for (status, end) in [(StatusCode::CREATED, None), (StatusCode::UNPROCESSABLE_ENTITY, Some(End::Stored))]
    {
        let bank = Bank::<Postgres>::open().await;
        let handler = move |mut tx: Tx<Postgres>| async move {
            let mut inner = tx.begin().await.unwrap();
            Postgres::run(&mut inner, CHARGE).await.unwrap();
            let _ = timeout(Duration::ZERO, inner.commit()).await;
            unique(status)
        };
        let node = bank.node(bank.layer(), handler);
        let answer = node.send("k").await;
        let stored = end.unwrap_or(if answer.status == status { End::Stored } else { End::Released });
        node.until("k", stored).await;
        let charges = i64::from(answer.status == StatusCode::CREATED);
        assert_eq!(bank.charges().await, charges, "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_keeps_the_request_keeps_nobody_from_writing() {
    let bank = Bank::<Sqlite>::open().await;
    let handler = |request: Request| async move {
        let extensions = request.extensions().clone();
        tokio::spawn(async move {
            let mut tx = Tx::<Sqlite>::begin(&extensions).await.unwrap();
            charge(&mut tx).await;
            sleep(Duration::from_millis(600)).await;
            drop(tx);
            sleep(LONG).await;
            drop(extensions);
        });
        sleep(Duration::from_millis(300)).await;
        StatusCode::CREATED.into_response()
    };
    let node = bank.node(bank.layer(), handler);
    node.send("k").await.assert_refused(RejectionCode::TransactionInUse);
    node.until("k", End::Released).await;
    let next = bank.node(bank.layer(), charge_once::<Sqlite>);
    assert_eq!(next.send("other").await.status, StatusCode::CREATED);
    assert_eq!(bank.charges().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_limit_may_be_as_long_as_there_are_durations() {
    let bank = Bank::<Sqlite>::open().await;
    let options = TransactionOptions::default().with_time_limit(Duration::MAX);
    let node = bank.node(bank.layer().with_transactions(options), charge_once::<Sqlite>);
    assert_eq!(node.send("k").await.status, StatusCode::CREATED);
}
