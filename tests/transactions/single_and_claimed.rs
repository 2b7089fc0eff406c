//! Both strategies meet on one key: on different nodes, over one table.

use std::time::Duration;

use axum::http::StatusCode;
use tokio::time::sleep;
use tower_idempotency::{
    Directive, IdempotencyLayer, RejectionCode, Tx,
    layer::Strategy::{Claimed, SingleTransaction},
};

use crate::bank::{Bank, Db, End, Gate, Node, charge, charge_once, on_both_stores, unique};

on_both_stores!(
    either_replays_what_the_other_has_stored,
    a_claim_that_runs_refuses_a_single_transaction,
    what_a_claim_has_abandoned_is_taken_over_by_a_claim,
    a_held_key_stays_held,
);

/// A node of each strategy.
fn nodes<DB: Db>(bank: &Bank<DB>) -> [Node; 2] {
    [Claimed, SingleTransaction]
        .map(|strategy| bank.node(bank.layer().with_strategy(strategy), charge_once::<DB>))
}

async fn either_replays_what_the_other_has_stored<DB: Db>(bank: Bank<DB>) {
    let nodes = nodes(&bank);
    for (key, [first, second]) in [("a", [0, 1]), ("b", [1, 0])] {
        let answer = nodes[first].send(key).await;
        answer.assert_same_replay(&nodes[second].send(key).await);
    }
    assert_eq!(bank.charges().await, 2);
}

async fn a_claim_that_runs_refuses_a_single_transaction<DB: Db>(bank: Bank<DB>) {
    let gate = Gate::new();
    let passed = gate.clone();
    let claimed = bank.node(bank.layer(), move || async move {
        passed.pass().await;
        unique(StatusCode::CREATED)
    });
    let single = bank.node(bank.layer().with_strategy(SingleTransaction), charge_once::<DB>);
    let first = claimed.start("k");
    gate.entered().await;
    single.send("k").await.assert_refused(RejectionCode::InProgress);
    gate.open();
    first.await.unwrap().assert_same_replay(&single.send("k").await);
    assert_eq!((bank.charges().await, single.runs.get()), (0, 0));
}

async fn what_a_claim_has_abandoned_is_taken_over_by_a_claim<DB: Db>(bank: Bank<DB>) {
    let (gate, lease) = (Gate::new(), Duration::from_millis(200));
    // A runtime that ends takes everything with it, as a process does.
    let process = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let passed = gate.clone();
    let layer = IdempotencyLayer::new(DB::store(&DB::pool(&bank.home, 2))).with_lease(lease);
    let doomed = bank.node(layer, move || async move { passed.pass().await });
    process.spawn(async move { doomed.send("k").await });
    gate.entered().await;
    process.shutdown_background();
    sleep(lease * 2).await;
    let layer = bank.layer().with_strategy(SingleTransaction);
    let single = bank.node(layer, |idempotency: tower_idempotency::Idempotency, tx: Tx<DB>| async move {
        assert_eq!(idempotency.attempt_number(), 2);
        charge_once(tx).await
    });
    let answer = single.send("k").await;
    assert_eq!((answer.status, bank.charges().await), (StatusCode::CREATED, 1));
    answer.assert_same_replay(&single.send("k").await);
}

async fn a_held_key_stays_held<DB: Db>(bank: Bank<DB>) {
    for strategies in [[Claimed, SingleTransaction], [SingleTransaction, Claimed]] {
        let [first, second] = strategies.map(|strategy| {
            bank.node(bank.layer().with_strategy(strategy), |mut tx: Tx<DB>| async move {
                charge(&mut tx).await;
                (axum::Extension(Directive::Hold), unique(StatusCode::OK))
            })
        });
        let key = format!("{strategies:?}");
        let key = key.chars().filter(char::is_ascii_alphanumeric).collect::<String>();
        first.send(&key).await;
        first.until(&key, End::Held).await;
        second.send(&key).await.assert_refused(RejectionCode::OutcomeUnknown);
        assert_eq!((second.runs.get(), bank.charges().await), (0, 0));
    }
}

/// A claim does not see a transaction that has no record yet: whichever commits first stays, and the other is undone.
mod a_claim_beside_a_single_transaction {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    #[ignore = "needs PostgreSQL: run scripts/test"]
    async fn wins_over_it_postgres() {
        let (bank, gate) = (Bank::<sqlx::Postgres>::open().await, Gate::new());
        let passed = gate.clone();
        let layer = bank.layer().with_strategy(SingleTransaction);
        let single = bank.node(layer, move |mut tx: Tx<sqlx::Postgres>| async move {
            charge(&mut tx).await;
            passed.pass().await;
            unique(StatusCode::CREATED)
        });
        let claimed = bank.node(bank.layer(), charge_once::<sqlx::Postgres>);
        let first = single.start("k");
        gate.entered().await;
        let second = claimed.send("k").await;
        assert_eq!(second.status, StatusCode::CREATED);
        gate.open();
        second.assert_same_replay(&first.await.unwrap());
        assert_eq!((bank.charges().await, single.runs.get(), claimed.runs.get()), (1, 1, 1));
    }

    #[tokio::test(flavor = "multi_thread")]
    #[ignore = "needs PostgreSQL: run scripts/test"]
    async fn that_still_runs_refuses_it_postgres() {
        let (bank, gates) = (Bank::<sqlx::Postgres>::open().await, [Gate::new(), Gate::new()]);
        let handler = |gate: &Gate| {
            let gate = gate.clone();
            move |mut tx: Tx<sqlx::Postgres>| async move {
                charge(&mut tx).await;
                gate.pass().await;
                unique(StatusCode::CREATED)
            }
        };
        let single = bank.node(bank.layer().with_strategy(SingleTransaction), handler(&gates[0]));
        let claimed = bank.node(bank.layer(), handler(&gates[1]));
        let first = single.start("k");
        gates[0].entered().await;
        let second = claimed.start("k");
        gates[1].entered().await;
        gates[0].open();
        first.await.unwrap().assert_refused(RejectionCode::InProgress);
        gates[1].open();
        let second = second.await.unwrap();
        assert_eq!((second.status, bank.charges().await), (StatusCode::CREATED, 1));
        second.assert_same_replay(&single.send("k").await);
    }
}
