//! What differs with the strategy of a single transaction.

use std::{sync::Arc, time::Duration};

use axum::{Router, body::Body, http::Request, http::StatusCode, routing::post};
use sqlx::{PgConnection, Postgres, Sqlite, SqliteConnection};
use tokio::time::{sleep, timeout};
use tower_idempotency::{
    Idempotency, IdempotencyKey, IdempotencyLayer, MemoryStore, RejectionCode, ResultPolicy,
    TransactionOptions, Tx, TxError,
    layer::Strategy::SingleTransaction,
    recovery::KeptRequests,
    store::{IsolationLevel, RecordState},
};

use crate::{
    bank::{Answered, Bank, Db, End, Gate, Node, at_once, charge, charge_once, on_both_stores, unique},
    support::{app::consumer, served::Count},
};

on_both_stores!(
    a_record_comes_with_the_commit_and_not_before,
    duplicates_of_this_process_are_compared_and_refused_while_the_first_runs,
    after_a_crash_the_next_retry_runs_immediately,
    of_many_simultaneous_requests_one_is_performed,
    simultaneous_retries_are_all_replayed,
    handlers_without_a_transaction_are_stored_too,
    what_has_expired_is_performed_again,
    a_client_that_leaves_stops_nothing,
    an_execution_that_takes_too_long_leaves_nothing,
    an_inner_layer_passes_through,
    a_drained_node_has_ended_its_transactions,
);

fn single<DB: Db>(bank: Bank<DB>) -> Bank<DB> {
    bank.with_strategy(SingleTransaction)
}

async fn a_record_comes_with_the_commit_and_not_before<DB: Db>(bank: Bank<DB>) {
    let (bank, gate) = (single(bank), Gate::new());
    let passed = gate.clone();
    let node = bank.node(bank.layer(), move |idempotency: Idempotency, tx: Tx<DB>| async move {
        assert_eq!(idempotency.attempt_number(), 1);
        passed.pass().await;
        charge_once(tx).await
    });
    let first = node.start("k");
    gate.entered().await;
    assert_eq!(node.end("k").await, Some(End::Released), "there is no record");
    gate.open();
    let first = first.await.unwrap();
    let record = node.handle.get(&consumer(), &IdempotencyKey::new("k").unwrap()).await.unwrap().unwrap();
    assert!(matches!(record.state, RecordState::Completed { .. }) && record.attempt.is_some());
    assert_eq!((record.attempt_number, record.abandoned, record.unresolved), (1, 0, 0));
    let retained = record.expires_at.duration_since(record.created_at).unwrap();
    assert_eq!(retained, Duration::from_secs(24 * 60 * 60));
    first.assert_same_replay(&node.send("k").await);
}

async fn duplicates_of_this_process_are_compared_and_refused_while_the_first_runs<DB: Db>(bank: Bank<DB>) {
    let (bank, gate) = (single(bank), Gate::new());
    let passed = gate.clone();
    let node = bank.node(bank.layer(), move |tx: Tx<DB>| async move {
        passed.pass().await;
        charge_once(tx).await
    });
    let first = node.start("k");
    gate.entered().await;
    at_once(node.send("k")).await.assert_refused(RejectionCode::InProgress);
    let other = Request::post("/charges").header("idempotency-key", "k").body(Body::from("other")).unwrap();
    at_once(node.send_request(other)).await.assert_refused(RejectionCode::KeyReused);
    // Another node of this store cannot compare it before there is a record.
    let neighbour = bank.node(bank.layer(), charge_once::<DB>);
    let other =
        || Request::post("/charges").header("idempotency-key", "k").body(Body::from("other")).unwrap();
    at_once(neighbour.send_request(other())).await.assert_refused(RejectionCode::InProgress);
    gate.open();
    assert_eq!(first.await.unwrap().status, StatusCode::CREATED);
    neighbour.send_request(other()).await.assert_refused(RejectionCode::KeyReused);
    assert_eq!((bank.charges().await, neighbour.runs.get()), (1, 0));
}

async fn after_a_crash_the_next_retry_runs_immediately<DB: Db>(bank: Bank<DB>) {
    let (bank, gate) = (single(bank), Gate::new());
    // A runtime that ends takes everything with it, as a process does.
    let process = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let store = DB::store(&DB::pool(&bank.home, 2));
    let layer = IdempotencyLayer::new(store).with_strategy(SingleTransaction);
    let passed = gate.clone();
    let node = bank.node(layer, move |mut tx: Tx<DB>| async move {
        charge(&mut tx).await;
        passed.pass().await;
        unique(StatusCode::CREATED)
    });
    let sent = node.clone();
    process.spawn(async move { sent.send("k").await });
    gate.entered().await;
    process.shutdown_background();
    drop(node);
    let survivor = bank.node(bank.layer(), charge_once::<DB>);
    let answer = timeout(Duration::from_secs(3), survivor.send_until_ended("k")).await.expect("no lease");
    assert_eq!((answer.status, bank.charges().await), (StatusCode::CREATED, 1));
}

async fn of_many_simultaneous_requests_one_is_performed<DB: Db>(bank: Bank<DB>) {
    let bank = single(bank);
    let slowly = |mut tx: Tx<DB>| async move {
        charge(&mut tx).await;
        sleep(Duration::from_millis(20)).await;
        unique(StatusCode::CREATED)
    };
    let nodes = [(); 2].map(|()| bank.node(bank.layer(), slowly));
    for round in 0..10 {
        let requests: Vec<_> = (0..20).map(|number| nodes[number % 2].start(round.to_string())).collect();
        let mut performed = 0;
        for request in requests {
            let answer = request.await.unwrap();
            match answer.status {
                StatusCode::CREATED => performed += usize::from(!answer.is_replay()),
                _ => answer.assert_refused(RejectionCode::InProgress),
            }
        }
        assert_eq!((performed, bank.charges().await), (1, round + 1));
    }
}

async fn simultaneous_retries_are_all_replayed<DB: Db>(bank: Bank<DB>) {
    let bank = single(bank);
    let nodes = [(); 2].map(|()| bank.node(bank.layer(), charge_once::<DB>));
    let first = nodes[0].send("k").await;
    let retries: Vec<_> = (0..40).map(|number| nodes[number % 2].start("k")).collect();
    for retry in retries {
        first.assert_same_replay(&retry.await.unwrap());
    }
}

async fn handlers_without_a_transaction_are_stored_too<DB: Db>(bank: Bank<DB>) {
    let bank = single(bank);
    for status in [201, 422] {
        let handler = move || async move { unique(StatusCode::from_u16(status).unwrap()) };
        bank.check(&bank.node(bank.layer(), handler), status, 0, End::Stored).await;
    }
    let handler = || async { unique(StatusCode::INTERNAL_SERVER_ERROR) };
    bank.check(&bank.node(bank.layer(), handler), 500, 0, End::Released).await;
    // A router without the route.
    let router = Router::new().route("/other", post(|| async {}));
    let node = Node::new(
        bank.layer().disabled(),
        Router::new().fallback_service(tower::Layer::layer(&bank.layer(), router)),
        Count::default(),
    );
    assert_eq!(node.send("k").await.status, StatusCode::NOT_FOUND);
    assert!(!node.send("k").await.is_replay());
}

async fn what_has_expired_is_performed_again<DB: Db>(bank: Bank<DB>) {
    let bank = single(bank);
    let layer =
        bank.layer().with_lease(Duration::from_millis(100)).with_max_execution(Duration::from_millis(200));
    let node = bank.node(layer.with_retention(Duration::from_millis(300)), charge_once::<DB>);
    let first = node.send("k").await;
    sleep(Duration::from_millis(400)).await;
    let second = node.send("k").await;
    assert!(second.status == StatusCode::CREATED && second.body != first.body && !second.is_replay());
    second.assert_same_replay(&node.send("k").await);
    assert_eq!(bank.charges().await, 2);
}

async fn a_client_that_leaves_stops_nothing<DB: Db>(bank: Bank<DB>) {
    let (bank, gate) = (single(bank), Gate::new());
    let passed = gate.clone();
    let node = bank.node(bank.layer(), move |tx: Tx<DB>| async move {
        passed.pass().await;
        charge_once(tx).await
    });
    let client = node.start("k");
    gate.entered().await;
    client.abort();
    gate.open();
    assert!(node.send_until_ended("k").await.is_replay());
    assert_eq!(bank.charges().await, 1);
}

async fn an_execution_that_takes_too_long_leaves_nothing<DB: Db>(bank: Bank<DB>) {
    let bank = single(bank);
    let layer = bank.layer().with_max_execution(Duration::from_millis(200));
    let node = bank.node(layer, |mut tx: Tx<DB>| async move {
        charge(&mut tx).await;
        sleep(Duration::from_secs(10)).await;
        unique(StatusCode::CREATED)
    });
    bank.check(&node, RejectionCode::MaxExecutionExceeded, 0, End::Released).await;
}

async fn an_inner_layer_passes_through<DB: Db>(bank: Bank<DB>) {
    let bank = single(bank);
    // Of this node, and of another node over the same table.
    let layer = bank.layer();
    for inner in [layer.clone(), bank.layer()] {
        let node = bank.node_with(layer.clone(), charge_once::<DB>, |router| router.layer(inner));
        bank.check(&node, 201, 1, End::Stored).await;
    }
}

async fn a_drained_node_has_ended_its_transactions<DB: Db>(bank: Bank<DB>) {
    let bank = single(bank);
    let node = bank.node(bank.layer(), |mut tx: Tx<DB>| async move {
        charge(&mut tx).await;
        sleep(Duration::from_millis(300)).await;
        unique(StatusCode::CREATED)
    });
    let first = node.start("k");
    while node.runs.get() == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    assert!(node.handle.drain(Duration::from_secs(10)).await.is_ok());
    assert_eq!((first.await.unwrap().status, bank.charges().await), (StatusCode::CREATED, 1));
    node.send("other").await.assert_refused(RejectionCode::ShuttingDown);
}

#[tokio::test(flavor = "multi_thread")]
async fn intents_and_phases_are_refused_sqlite() {
    let bank = single(Bank::<Sqlite>::open().await);
    let intent = |idempotency: Idempotency| async move {
        idempotency.intent("bank.transfer").call(async |_| panic!("no call is made")).await.map(|_| ())
    };
    let phase = |idempotency: Idempotency| async move {
        let step = async |_: &mut SqliteConnection| -> Result<(), TxError> { panic!("it does not run") };
        idempotency.phase("step", step).await
    };
    bank.check(
        &bank.node(bank.layer(), intent),
        Answered::Final(RejectionCode::IntentMisused),
        0,
        End::Released,
    )
    .await;
    bank.check(
        &bank.node(bank.layer(), phase),
        Answered::Final(RejectionCode::IntentMisused),
        0,
        End::Released,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn intents_and_phases_are_refused_postgres() {
    let bank = single(Bank::<Postgres>::open().await);
    let phase = |idempotency: Idempotency| async move {
        let step = async |_: &mut PgConnection| -> Result<(), TxError> { panic!("it does not run") };
        idempotency.phase("step", step).await
    };
    bank.check(
        &bank.node(bank.layer(), phase),
        Answered::Final(RejectionCode::IntentMisused),
        0,
        End::Released,
    )
    .await;
}

#[tokio::test]
async fn a_store_without_transactions_is_refused() {
    let layer = IdempotencyLayer::new(MemoryStore::new()).with_strategy(SingleTransaction);
    let router = Router::new().route("/charges", post(|| async { panic!("it does not run") as StatusCode }));
    let node = Node::new(layer, router, Count::default());
    node.send("k").await.assert_refused(RejectionCode::StoreMisconfigured);
}

#[test]
#[should_panic(expected = "Strategy::SingleTransaction cannot hold the keys of abandoned attempts")]
fn it_cannot_run_at_most_once() {
    let layer = IdempotencyLayer::new(MemoryStore::new()).with_strategy(SingleTransaction);
    let _ = Router::<()>::new().layer(layer.with_policy(ResultPolicy::at_most_once()));
}

#[test]
#[should_panic(expected = "Strategy::SingleTransaction keeps no requests")]
fn it_cannot_keep_requests() {
    let layer = IdempotencyLayer::new(MemoryStore::new()).with_strategy(SingleTransaction);
    let _ = Router::<()>::new().layer(layer.with_kept_requests(KeptRequests::new()));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_connection_is_held_for_the_whole_handler_postgres() {
    let bank = single(Bank::<Postgres>::open().await.with_connections(1));
    let pool = bank.pool.clone();
    let node = bank.node(bank.layer(), move || async move {
        assert!(pool.try_acquire().is_none());
        unique(StatusCode::CREATED)
    });
    bank.check(&node, 201, 0, End::Stored).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn at_every_isolation_level_one_of_many_is_performed_postgres() {
    use IsolationLevel::{ReadCommitted, RepeatableRead, Serializable};

    for level in [ReadCommitted, RepeatableRead, Serializable] {
        let bank = single(Bank::<Postgres>::open().await);
        let options = TransactionOptions::default().with_isolation(level);
        let nodes = [(); 2]
            .map(|()| bank.node(bank.layer().with_transactions(options.clone()), charge_once::<Postgres>));
        for round in 0..30 {
            let requests: Vec<_> = (0..8).map(|number| nodes[number % 2].start(round.to_string())).collect();
            for request in requests {
                let answer = request.await.unwrap();
                let refused = [RejectionCode::InProgress, RejectionCode::TransactionConflict].map(Some);
                assert!(
                    answer.status == StatusCode::CREATED || refused.contains(&answer.rejection),
                    "{answer:?}"
                );
            }
            nodes[0].send_until_ended(&round.to_string()).await;
            assert_eq!(bank.charges().await, round + 1, "{level:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_handler_that_keeps_its_transaction_is_ended_postgres() {
    let bank = single(Bank::<Postgres>::open().await);
    let kept = Arc::new(std::sync::Mutex::new(None));
    let keeper = Arc::clone(&kept);
    let node = bank.node(bank.layer(), move |mut tx: Tx<Postgres>| async move {
        charge(&mut tx).await;
        *keeper.lock().unwrap() = Some(tx);
        unique(StatusCode::CREATED)
    });
    node.send("k").await.assert_refused(RejectionCode::TransactionInUse);
    assert_eq!(node.send_until_ended("k").await.status, StatusCode::CREATED);
    assert_eq!(bank.charges().await, 1);
    drop(kept);
}
