//! Backends that end, time-outs of the server, and a COMMIT whose fate nobody knows.

use std::time::Duration;

use axum::{Router, http::StatusCode, routing::post};
use sqlx::{PgPool, Postgres, postgres::PgPoolOptions};
use tokio::time::{sleep, timeout};
use tower_idempotency::{
    IdempotencyLayer, PostgresStore, Reaper, RejectionCode, TransactionOptions, Tx, TxError, layer::Strategy,
    store::Store,
};

use crate::{
    bank::{Bank, Db, End, Gate, LONG, Node, charge, unique},
    support::{
        direct::Answer,
        postgres::Postgres as Server,
        proxy::{Fault, Proxy},
        served::Count,
    },
};

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_transaction_whose_backend_is_terminated_leaves_nothing() {
    let bank = Bank::<Postgres>::open().await;
    for status in [StatusCode::CREATED, StatusCode::UNPROCESSABLE_ENTITY, StatusCode::INTERNAL_SERVER_ERROR] {
        let gate = Gate::new();
        let passed = gate.clone();
        let node = bank.node(bank.layer(), move |mut tx: Tx<Postgres>| async move {
            charge(&mut tx).await;
            Postgres::run(&mut tx, "SET LOCAL application_name = 'victim'").await.unwrap();
            passed.pass().await;
            unique(status)
        });
        let key = status.as_str();
        let answer = node.start(key);
        gate.entered().await;
        let terminated = bank.number(
            "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid, 5000)) FROM pg_stat_activity
            WHERE application_name = 'victim'",
        );
        assert_eq!(terminated.await, 1);
        gate.open();
        let answer = answer.await.unwrap();
        match status {
            StatusCode::CREATED => answer.assert_refused(RejectionCode::TransactionLost),
            own => assert_eq!((answer.status, answer.rejection), (own, None)),
        }
        assert_eq!(bank.charges().await, 0);
        let retry = node.send_until_ended(key).await;
        match status {
            StatusCode::UNPROCESSABLE_ENTITY => assert!(retry.is_replay()),
            _ => assert_eq!(retry.status, StatusCode::CREATED),
        }
        bank.run("DELETE FROM charges").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_transaction_that_was_idle_for_too_long_leaves_nothing() {
    let bank = Bank::<Postgres>::open().await;
    let options = TransactionOptions::default().with_idle_timeout(Duration::from_millis(300));
    let handler = |mut tx: Tx<Postgres>| async move {
        charge(&mut tx).await;
        sleep(Duration::from_secs(1)).await;
        unique(StatusCode::CREATED)
    };
    let node = bank.node(bank.layer().with_transactions(options.clone()), handler);
    bank.check(&node, RejectionCode::TransactionLost, 0, End::Released).await;
    let handler = |mut tx: Tx<Postgres>| async move {
        charge(&mut tx).await;
        sleep(Duration::from_secs(1)).await;
        let charged = Postgres::run(&mut tx, crate::bank::CHARGE).await;
        unique(charged.map_or(StatusCode::INTERNAL_SERVER_ERROR, |()| StatusCode::CREATED))
    };
    let node = bank.node(bank.layer().with_transactions(options), handler);
    bank.check(&node, 500, 0, End::Released).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_statement_that_takes_too_long_leaves_nothing() {
    let bank = Bank::<Postgres>::open().await;
    let options = TransactionOptions::default().with_statement_timeout(Duration::from_millis(300));
    let handler = |mut tx: Tx<Postgres>| async move {
        charge(&mut tx).await;
        Postgres::run(&mut tx, "SELECT pg_sleep(10)").await.unwrap_err();
        unique(StatusCode::CREATED)
    };
    let node = bank.node(bank.layer().with_transactions(options), handler);
    bank.check(&node, RejectionCode::TransactionFailed, 0, End::Released).await;
}

/// A server of its own, and the network before it.
struct Remote {
    database: Server,
    proxy: Proxy,
    direct: PgPool,
    strategy: Strategy,
}

impl Remote {
    async fn start(strategy: Strategy) -> Self {
        let database = Server::start();
        let proxy = Proxy::start(database.address());
        let direct = PgPoolOptions::new().max_connections(2).connect_lazy(&database.url()).unwrap();
        sqlx::raw_sql("CREATE TABLE charges (amount INTEGER NOT NULL)").execute(&direct).await.unwrap();
        Self { database, proxy, direct, strategy }
    }

    /// A node whose handler waits at the gate after it has charged.
    async fn node(&self, gate: &Gate, store_timeout: Duration) -> Node {
        let url = self.database.url_through(self.proxy.address());
        let pool = PgPoolOptions::new().max_connections(4).connect_lazy(&url).unwrap();
        let store = PostgresStore::new(pool).with_statement_timeout(Duration::from_secs(2));
        store.prepare().await.unwrap();
        let layer = IdempotencyLayer::new(store).with_lease(LONG).with_reaper(Reaper::off());
        let layer = layer.with_store_timeout(store_timeout).with_strategy(self.strategy);
        let (passed, runs) = (gate.clone(), Count::default());
        let counter = runs.clone();
        let handler = async move |mut tx: Tx<Postgres>| {
            counter.add();
            charge(&mut tx).await;
            passed.pass().await;
            unique(StatusCode::CREATED)
        };
        Node::new(layer, axum::Router::new().route("/charges", axum::routing::post(handler)), runs)
    }

    async fn charges(&self) -> i64 {
        Postgres::number(&mut *self.direct.acquire().await.unwrap(), "SELECT count(*) FROM charges")
            .await
            .unwrap()
    }

    /// What the client is told is what the table says, whenever it is told something; in the end there is one charge.
    async fn agrees(&self, node: &Node, key: &str, first: Answer, before: i64) {
        match first.rejection {
            None => assert_eq!((first.status, self.charges().await), (StatusCode::CREATED, before + 1)),
            Some(RejectionCode::TransactionLost) => assert_eq!(self.charges().await, before),
            Some(code) => assert_eq!(code, RejectionCode::OutcomePending),
        }
        let last = node.send_until_ended(key).await;
        assert_eq!((last.status, self.charges().await), (StatusCode::CREATED, before + 1), "{first:?}");
        assert!(first.rejection.is_some() || last.body == first.body);
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_commit_whose_reply_is_lost_is_found_out() {
    a_commit_whose_reply_is_lost_is_found_out_with(Strategy::Claimed).await;
    a_commit_whose_reply_is_lost_is_found_out_with(Strategy::SingleTransaction).await;
}

async fn a_commit_whose_reply_is_lost_is_found_out_with(strategy: Strategy) {
    let remote = Remote::start(strategy).await;
    let gate = Gate::new();
    let node = remote.node(&gate, PATIENT).await;
    let answer = node.start("k");
    gate.entered().await;
    remote.proxy.set(Fault::HoldRepliesFrom(b"COMMIT"));
    gate.open();
    remote.proxy.until(|counts| counts.withheld > 0).await;
    // The other way round the reply would get through.
    remote.proxy.cut();
    remote.proxy.until(|counts| counts.withheld == 0).await;
    remote.proxy.set(Fault::None);
    let answer = answer.await.unwrap();
    assert_eq!((answer.status, answer.rejection), (StatusCode::CREATED, None), "{:?}", answer.body);
    remote.agrees(&node, "k", answer, 0).await;
    assert_eq!(node.runs.get(), 1);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_commit_whose_reply_does_not_come_in_time_is_found_out_by_the_retry() {
    a_commit_whose_reply_does_not_come_in_time_is_found_out_by_the_retry_with(Strategy::Claimed).await;
    a_commit_whose_reply_does_not_come_in_time_is_found_out_by_the_retry_with(Strategy::SingleTransaction)
        .await;
}

async fn a_commit_whose_reply_does_not_come_in_time_is_found_out_by_the_retry_with(strategy: Strategy) {
    let remote = Remote::start(strategy).await;
    let gate = Gate::new();
    let node = remote.node(&gate, Duration::from_millis(500)).await;
    let answer = node.start("k");
    gate.entered().await;
    remote.proxy.set(Fault::HoldRepliesFrom(b"COMMIT"));
    gate.open();
    let answer = timeout(Duration::from_millis(1500), answer).await.expect("a prompt answer").unwrap();
    answer.assert_refused(RejectionCode::OutcomePending);
    assert!(answer.problem()["retryable"] == true && answer.headers.contains_key("retry-after"));
    remote.agrees(&node, "k", answer, 0).await;
    remote.proxy.set(Fault::None);
    assert_eq!(node.runs.get(), 1);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn wherever_the_end_of_a_transaction_is_cut_off_the_answer_agrees_with_the_table() {
    wherever_the_end_of_a_transaction_is_cut_off_the_answer_agrees_with_the_table_with(Strategy::Claimed)
        .await;
    wherever_the_end_of_a_transaction_is_cut_off_the_answer_agrees_with_the_table_with(
        Strategy::SingleTransaction,
    )
    .await;
}

async fn wherever_the_end_of_a_transaction_is_cut_off_the_answer_agrees_with_the_table_with(
    strategy: Strategy,
) {
    let remote = Remote::start(strategy).await;
    let gate = Gate::new();
    let node = remote.node(&gate, PATIENT).await;
    let warm = node.start("warm");
    gate.entered().await;
    gate.open();
    assert_eq!(warm.await.unwrap().status, StatusCode::CREATED);
    let (mut lost, mut committed) = (0, 0);
    for limit in (0..1500).step_by(60) {
        let (gate, key) = (Gate::new(), format!("cut-{limit}"));
        let node = remote.node(&gate, PATIENT).await;
        let before = remote.charges().await;
        let answer = node.start(key.clone());
        gate.entered().await;
        remote.proxy.set(Fault::LoseRequestsAfter(limit));
        gate.open();
        tokio::select! {
            () = remote.proxy.until(|counts| counts.withheld > 0) => {}
            () = sleep(Duration::from_millis(300)) => {}
        }
        remote.proxy.set(Fault::None);
        remote.proxy.cut();
        let answer = answer.await.unwrap();
        *if answer.rejection.is_none() { &mut committed } else { &mut lost } += 1;
        remote.agrees(&node, &key, answer, before).await;
    }
    println!("{lost} lost, {committed} committed");
    assert!(lost > 0 && committed > 0, "{lost} lost, {committed} committed");
}

const PATIENT: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_request_that_collided_is_performed_again_as_often_as_that_is_set() {
    for (reruns, collisions) in [(0, 0), (0, 1), (1, 1), (2, 3), (3, 2)] {
        let bank = Bank::<Postgres>::open().await;
        let options = TransactionOptions::default().with_reruns(reruns);
        let node = colliding(bank.layer().with_transactions(options), collisions);
        let answer = node.send("k").await;
        let performed = collisions.min(reruns as usize) + 1;
        assert_eq!(node.runs.get(), performed, "{answer:?}");
        if collisions < performed {
            assert_eq!((answer.status, bank.charges().await), (StatusCode::CREATED, 1));
            assert!(node.send("k").await.is_replay());
        } else {
            answer.assert_refused(RejectionCode::TransactionConflict);
            assert_eq!(answer.headers["retry-after"], "1");
            assert_eq!((bank.charges().await, node.end("k").await), (0, Some(End::Released)));
        }
    }
}

/// A node whose first runs fail as if another transaction had been faster.
fn colliding(layer: IdempotencyLayer, collisions: usize) -> Node {
    let runs = Count::default();
    let counter = runs.clone();
    let handler = move |mut tx: Tx<Postgres>| {
        let collides = counter.add() <= collisions;
        async move {
            charge(&mut tx).await;
            if collides {
                Postgres::run(&mut tx, "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$").await?;
            }
            Ok::<_, TxError>(unique(StatusCode::CREATED))
        }
    };
    Node::new(layer, Router::new().route("/charges", post(handler)), runs)
}
