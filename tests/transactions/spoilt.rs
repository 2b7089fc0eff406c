//! Handlers that leave their connection in a state that others would suffer from.

use axum::http::StatusCode;
use sqlx::{Postgres, Sqlite};
use tower_idempotency::Tx;

use crate::bank::{Bank, Db, charge, charge_once, unique};

/// The statements fail the request of their handler at most: the next ones run, on the same pool.
async fn spoils_only_its_own<DB: Db>(bank: &Bank<DB>, statements: &'static str) {
    for status in [201, 422, 500] {
        let handler = move |mut tx: Tx<DB>| async move {
            charge(&mut tx).await;
            let done = DB::run(&mut tx, statements).await;
            unique(done.map_or(StatusCode::INTERNAL_SERVER_ERROR, |()| StatusCode::from_u16(status).unwrap()))
        };
        let node = bank.node(bank.layer(), handler);
        let spoilt = node.send(&uuid::Uuid::new_v4().to_string()).await;
        let next = bank.node(bank.layer(), charge_once::<DB>);
        for _ in 0..3 {
            let answer = next.send(&uuid::Uuid::new_v4().to_string()).await;
            assert_eq!(answer.status, StatusCode::CREATED, "{statements}: {answer:?} after {spoilt:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_handler_that_spoils_its_connection_fails_alone_on_postgres() {
    for statements in [
        "DEALLOCATE ALL",
        "DISCARD PLANS",
        "SET default_transaction_read_only = on",
        "SET default_transaction_isolation = serializable",
        "SET enable_indexscan = off",
        "SET statement_timeout = 1000",
        "SET bytea_output = escape",
        "SET client_min_messages = error",
        "CREATE TEMP TABLE idempotency_records (key text)",
        "LISTEN channel",
        "SELECT pg_advisory_lock(1)",
        "DECLARE portal CURSOR WITH HOLD FOR SELECT 1",
        "PREPARE sqlx_s_1 AS SELECT 1",
    ] {
        let bank = Bank::<Postgres>::open().await.with_connections(1);
        // The connection knows the store's statements already.
        let before = bank.node(bank.layer(), charge_once::<Postgres>);
        assert_eq!(before.send("before").await.status, StatusCode::CREATED);
        spoils_only_its_own(&bank, statements).await;
    }
}

/// The application's own tables are not found from then on, which is its own affair.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_search_path_that_a_handler_leaves_behind_is_not_the_stores() {
    let bank = Bank::<Postgres>::open().await.with_connections(1);
    let handler = |mut tx: Tx<Postgres>| async move {
        Postgres::run(&mut tx, "SET search_path = pg_catalog").await.unwrap();
        unique(StatusCode::CREATED)
    };
    let node = bank.node(bank.layer(), handler);
    assert_eq!(node.send("path").await.status, StatusCode::CREATED);
    let next = bank.node(bank.layer(), |_: Tx<Postgres>| async { unique(StatusCode::CREATED) });
    assert_eq!(next.send("next").await.status, StatusCode::CREATED);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs PostgreSQL: run scripts/test"]
async fn a_handler_that_changes_its_role_fails_alone() {
    let bank = Bank::<Postgres>::open().await.with_connections(1);
    let role = format!("r_{}", bank.home.name);
    bank.run(&format!("CREATE ROLE {role}")).await;
    for statement in ["SET ROLE", "SET SESSION AUTHORIZATION"] {
        for ending in ["", "COMMIT"] {
            let set = format!("{statement} {role}; {ending}");
            let handler = move |mut tx: Tx<Postgres>| {
                let set = set.clone();
                async move {
                    let _ = Postgres::run(&mut tx, &set).await;
                    unique(StatusCode::CREATED)
                }
            };
            let node = bank.node(bank.layer(), handler);
            let spoilt = node.send(&uuid::Uuid::new_v4().to_string()).await;
            let next = bank.node(bank.layer(), charge_once::<Postgres>);
            for _ in 0..3 {
                let answer = next.send(&uuid::Uuid::new_v4().to_string()).await;
                assert_eq!(answer.status, StatusCode::CREATED, "{statement}: {answer:?} after {spoilt:?}");
            }
        }
    }
    bank.run(&format!("DROP ROLE {role}")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_spoils_its_connection_fails_alone_on_sqlite() {
    for statements in [
        "PRAGMA query_only = ON",
        "PRAGMA locking_mode = EXCLUSIVE",
        "PRAGMA busy_timeout = 0",
        "CREATE TEMP TABLE idempotency_records (key TEXT)",
        "CREATE TEMP TRIGGER t BEFORE INSERT ON main.idempotency_records BEGIN SELECT RAISE(ABORT, 'no'); END",
    ] {
        let bank = Bank::<Sqlite>::open().await;
        spoils_only_its_own(&bank, statements).await;
        // Nor does it lock others out.
        bank.run("UPDATE accounts SET balance = 1").await;
    }
}
