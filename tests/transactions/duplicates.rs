//! Duplicates of a request whose transaction is open.

use std::time::{Duration, Instant};

use sqlx::Postgres;
use tower_idempotency::{RejectionCode, TransactionOptions, Tx};

use crate::bank::{Bank, Db, Gate, charge_once, with_both_strategies};

with_both_strategies!(duplicates_on_another_node_do_not_wait_for_a_transaction);

async fn duplicates_on_another_node_do_not_wait_for_a_transaction<DB: Db>(bank: Bank<DB>) {
    duplicates_during_a_transaction_of_two_seconds(&bank, Duration::from_secs(4)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn duplicates_do_not_wait_for_a_transaction_that_is_longer_than_the_lease_postgres() {
    let bank = Bank::<Postgres>::open().await;
    duplicates_during_a_transaction_of_two_seconds(&bank, Duration::from_millis(500)).await;
}

async fn duplicates_during_a_transaction_of_two_seconds<DB: Db>(bank: &Bank<DB>, lease: Duration) {
    let gate = Gate::new();
    let passed = gate.clone();
    let handler = move |mut tx: Tx<DB>| async move {
        DB::run(&mut tx, "UPDATE accounts SET balance = balance - 20 WHERE id = 1").await.unwrap();
        passed.pass().await;
        charge_once(tx).await
    };
    let layer = || {
        let options = TransactionOptions::default();
        let options =
            options.with_time_limit(Duration::from_secs(30)).with_idle_timeout(Duration::from_secs(30));
        bank.layer().with_lease(lease).with_transactions(options)
    };
    let node = bank.node(layer(), handler.clone());
    let neighbour = bank.node(layer(), handler);
    let first = node.start("k");
    gate.entered().await;
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(2) {
        let sent = Instant::now();
        let answer = neighbour.send("k").await;
        answer.assert_refused(RejectionCode::InProgress);
        assert!(sent.elapsed() < Duration::from_millis(200), "it waited for {:?}", sent.elapsed());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    gate.open();
    let first = first.await.unwrap();
    first.assert_same_replay(&neighbour.send("k").await);
    assert_eq!((bank.charges().await, node.runs.get(), neighbour.runs.get()), (1, 1, 0));
}
