//! What only SQLite does: a statement that fails is undone alone, and there is one writer.

use std::time::Duration;

use axum::http::StatusCode;
use sqlx::Sqlite;
use tokio::time::sleep;
use tower_idempotency::{IdempotencyKey, RejectionCode, TransactionOptions, Tx, store::RecordState};

use crate::{
    bank::{Bank, Db, End, Gate, charge, charge_once, unique},
    support::app::consumer,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_failed_is_undone_alone() {
    let bank = Bank::<Sqlite>::open().await;
    let handler = |mut tx: Tx<Sqlite>| async move {
        charge(&mut tx).await;
        Sqlite::run(&mut tx, "INSERT INTO charges (amount) VALUES (NULL)").await.unwrap_err();
        unique(StatusCode::CREATED)
    };
    bank.check(&bank.node(bank.layer(), handler), 201, 1, End::Stored).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_temporary_table_does_not_shadow_the_records() {
    let bank = Bank::<Sqlite>::open().await;
    let handler = |mut tx: Tx<Sqlite>| async move {
        charge(&mut tx).await;
        let shadow =
            "CREATE TEMP TABLE idempotency_records AS SELECT * FROM main.idempotency_records WHERE FALSE";
        Sqlite::run(&mut tx, shadow).await.unwrap();
        unique(StatusCode::CREATED)
    };
    bank.check(&bank.node(bank.layer(), handler), 201, 1, End::Stored).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_is_open_for_too_long_is_rolled_back() {
    let bank = Bank::<Sqlite>::open().await;
    let options = TransactionOptions::default().with_time_limit(Duration::from_millis(300));
    let handler = |mut tx: Tx<Sqlite>| async move {
        charge(&mut tx).await;
        std::future::pending::<()>().await;
        StatusCode::CREATED
    };
    let node = bank.node(bank.layer().with_transactions(options), handler);
    let limit = Duration::from_millis(1300);
    let check = bank.check(&node, RejectionCode::TransactionLost, 0, End::Released);
    tokio::time::timeout(limit, check).await.expect("it is cancelled in time");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_keys_wait_for_a_transaction_and_are_performed() {
    let bank = Bank::<Sqlite>::open().await;
    let gate = Gate::new();
    let passed = gate.clone();
    let holder = bank.node(bank.layer(), move |tx: Tx<Sqlite>| async move {
        passed.pass().await;
        charge_once(tx).await
    });
    let first = holder.start("first");
    gate.entered().await;
    let with = bank.node(bank.layer(), charge_once::<Sqlite>);
    let without = bank.node(bank.layer(), || async { unique(StatusCode::CREATED) });
    let started: Vec<_> = (0..6)
        .map(|number| if number % 2 == 0 { &with } else { &without }.start(number.to_string()))
        .collect();
    sleep(Duration::from_secs(1)).await;
    assert!(started.iter().all(|answer| !answer.is_finished()));
    gate.open();
    assert_eq!(first.await.unwrap().status, StatusCode::CREATED);
    for answer in started {
        let answer = answer.await.unwrap();
        assert_eq!((answer.status, answer.rejection), (StatusCode::CREATED, None));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn renewals_come_before_transactions_that_queue() {
    let bank = Bank::<Sqlite>::open().await;
    // A renewal is due after 667 ms and waits for one transaction of 400 ms, not for eight.
    let layer = || bank.layer().with_lease(Duration::from_secs(2));
    let gate = Gate::new();
    let passed = gate.clone();
    let long = bank.node(layer(), move || async move {
        passed.pass().await;
        unique(StatusCode::CREATED)
    });
    let answer = long.start("long");
    gate.entered().await;
    let writers: Vec<_> = (0..8)
        .map(|_| {
            let writer = bank.node(layer(), slow);
            tokio::spawn(async move {
                // The first run of a node is the slow one.
                assert_eq!(writer.send(&uuid::Uuid::new_v4().to_string()).await.status, StatusCode::CREATED);
            })
        })
        .collect();
    while !writers.iter().all(tokio::task::JoinHandle::is_finished) {
        let key = IdempotencyKey::new("long").unwrap();
        let record = long.handle.get(&consumer(), &key).await.unwrap().unwrap();
        let RecordState::InProgress { lease_remaining, .. } = record.state else { panic!("{record:?}") };
        assert!(!lease_remaining.is_zero());
        sleep(Duration::from_millis(20)).await;
    }
    for writer in writers {
        writer.await.unwrap();
    }
    gate.open();
    let answer = answer.await.unwrap();
    answer.assert_same_replay(&long.send("long").await);
    assert_eq!((long.runs.get(), bank.charges().await), (1, 8));
}

async fn slow(tx: Tx<Sqlite>) -> axum::response::Response {
    sleep(Duration::from_millis(400)).await;
    charge_once(tx).await
}
